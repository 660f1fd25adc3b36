import numpy as np
import pytest

from evatok.artifacts import Location
from evatok.report.sweep import write_sweep_report


@pytest.fixture
def sweep(tmp_path) -> Location:
    """A finished search over a weight, a learning rate and a loss, with one failed trial."""
    location = Location.parse(tmp_path / "tiny")
    draws = np.random.default_rng(0)
    for i in range(24):
        w_q, rate = float(draws.uniform(0.4, 2)), float(10 ** draws.uniform(-5, -3))
        tokens = 60 + 180 * w_q + float(draws.normal(0, 20))
        percentile = 97 - 4 * (np.log10(rate) + 4) ** 2 - 3 * (w_q - 1.2) ** 2 + float(draws.normal(0, 0.3))
        record = {
            "values": {
                "curate.reward.w_q": w_q,
                "router.train.lr": rate,
                "router.objective.kind": ["hard", "soft"][i % 2],
            },
            "metrics": {} if i == 5 else {"reward_percentile": float(percentile), "mean_tokens": tokens},
            "state": "failed" if i == 5 else "done",
        }
        (location / "trials" / f"t{i:02d}").write_json("trial.json", record)
    location.write_bytes("sweep.yaml", b"name: tiny\ntrials: 24\n")
    return location


def finish(location: Location) -> None:
    found = {}
    for name in location.list("trials"):
        metrics = (location / "trials" / name).read_json("trial.json")["metrics"]
        if metrics:
            found[name] = (metrics["reward_percentile"], -metrics["mean_tokens"])
    front = [
        n
        for n, a in found.items()
        if not any(b != a and b[0] >= a[0] and b[1] >= a[1] for b in found.values())
    ]
    location.write_json(
        "sweep.json",
        {
            "objectives": {"reward_percentile": "max", "mean_tokens": "min"},
            "best": front,
            "exported": front[0],
        },
    )


def page_of(location: Location) -> str:
    assert write_sweep_report(location) == f"{location.uri}/report.html"
    return location.read_bytes("report.html").decode()


def test_a_finished_sweep_shows_its_front_its_settings_and_every_trial(sweep):
    finish(sweep)
    page = page_of(sweep)
    for section in ("front", "parallel", "settings", "trials"):
        assert f'<section id="{section}">' in page
    assert "23 of 24 trials done, 1 failed" in page
    assert page.count("<tr><th scope") + page.count("<tr class=headline><th scope") == 24
    assert page.count("class=headline") == len(sweep.read_json("sweep.json")["best"])
    assert "src=" not in page
    assert "nan" not in page.split("<script>")[0].lower().replace("nano", "")


def test_a_running_sweep_lists_what_there_is(sweep):
    page = page_of(sweep)
    assert '<section id="trials">' in page
    assert '<section id="front">' not in page


def test_one_objective_has_no_trade_off(sweep):
    finish(sweep)
    summary = sweep.read_json("sweep.json")
    sweep.write_json("sweep.json", {**summary, "objectives": {"reward_percentile": "max"}})
    page = page_of(sweep)
    assert '<section id="front">' not in page
    assert '<section id="parallel">' in page
