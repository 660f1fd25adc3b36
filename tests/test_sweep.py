"""Sweeps: checked before they start, shared stages once, trials as runs, the best one goes on."""

from pathlib import Path

import pytest

from evatok import sweep as sweeps
from evatok.artifacts import read_manifest
from evatok.errors import UserError
from evatok.experiment import open_experiment, plan
from evatok.sweep import Trial, front, name_of, nearest_to_ideal, open_sweep, run_trial


@pytest.fixture
def write(toy_chain, tmp_path: Path):
    (tmp_path / "toy.yaml").write_text(
        f"name: toy\nstorage: {tmp_path}/runs\nindex: {{}}\nrouter: {{}}\nevaluate: {{}}\n"
    )

    def write(
        space: str = "{router.lr: {loguniform: [0.01, 1]}, index.reward: {choice: [1, 2]}}", more=""
    ) -> Path:
        (tmp_path / "sweep.yaml").write_text(
            f"name: sweep\nstorage: {tmp_path}/runs\nexperiment: toy.yaml\nspace: {space}\n"
            f"objectives: {{attempts: max}}\ntrials: 3\n{more}"
        )
        return tmp_path / "sweep.yaml"

    return write


@pytest.mark.parametrize(
    ("space", "more", "part"),
    [
        ("{router.lrr: {uniform: [0, 1]}}", "", "Did you mean 'lr'?"),
        ("{router.lr: {uniform: [-1, 1]}}", "", "space.router.lr: .*greater than 0"),
        ("{index.videos: {choice: [1, 2]}}", "", "changes stage 'index', which all trials share"),
        ("{router.lr: {unifrm: [0, 1]}}", "", "Did you mean 'uniform'?"),
        ("{router.lr: {uniform: [0, 1], choice: [1]}}", "", "exactly one"),
        ("{router.lr: {uniform: [0.1, 1]}}", "stages: [rooter]", "no stage of toy.yaml"),
        ("{router.lr: {uniform: [0.1, 1]}}", "set: {router.batch: 5}", "cannot be split over 2 workers"),
    ],
)
def test_mistake_is_found_before_anything_starts(write, toy_chain, space, more, part):
    with pytest.raises(UserError, match=f"(?s){part}"):
        open_sweep(write(space, more))
    assert toy_chain.ran == []


def test_trial_reads_the_shared_stages_and_is_a_run_of_its_own(write, toy_chain):
    sweep = open_sweep(write())
    assert sweep.shared == ["index"]
    sweeps.experiments.run(sweep.base, sweeps._Reporter(lambda *_: None), until="index")
    reported = []
    values = {"router.lr": 0.5, "index.reward": 2}
    metrics = run_trial(sweep, values, lambda step, figures: reported.append((step, dict(figures))))
    assert toy_chain.ran == ["index", "router"]
    assert metrics == {"attempts": 1.0}
    assert reported == [(1, {"loss": 0.5})]
    home = sweep.location / "trials" / name_of(values)
    assert read_manifest(home / "router").config == {"router": {"lr": 0.5, "batch": 4}, "index.reward": 2.0}
    assert open_experiment(home.uri).router.lr == 0.5
    assert run_trial(sweep, values, lambda *_: None) == metrics
    assert toy_chain.ran == ["index", "router"]


def test_best_trial_goes_on_as_a_run(write, toy_chain):
    sweep = open_sweep(write())
    sweeps._claim(sweep)
    sweeps.experiments.run(sweep.base, sweeps._Reporter(lambda *_: None), until="index")
    for lr, attempts in ((0.1, 1.0), (0.2, 3.0)):
        values = {"router.lr": lr, "index.reward": 1}
        run_trial(sweep, values, lambda *_: None)
        sweeps._record(sweep, sweeps.Finished(values, {"attempts": attempts}, "done"))
    result = sweeps._conclude(sweep)
    best = open_experiment(result.export)
    assert best.router.lr == 0.2
    assert best.resources == sweep.base.resources
    assert [entry.state for entry in plan(best)] == ["done", "done", "missing"]
    summary = sweep.location.read_json("sweep.json")
    assert summary["best"] == list(result.best)
    assert [trial["settings"]["router.lr"] for trial in summary["trials"]] != []


def test_keys_that_must_agree_are_searched_as_one(write):
    sweep = open_sweep(write('{"router.lr, index.reward": {choice: [2, 3]}}'))
    trial = sweep.trial({"router.lr, index.reward": 3})
    assert (trial.router.lr, trial.index.reward) == (3.0, 3.0)


@pytest.mark.parametrize("name", ["tiny", "tiny_budget", "router", "token_budget"])
def test_shipped_sweeps_are_valid(name):
    root = Path(__file__).parents[1]
    sweep = open_sweep(root / "experiments/sweeps" / f"{name}.yaml")
    assert sweep.shared == ["index", "proxy", "curate"][: 1 if name == "token_budget" else 3]


def test_objective_that_no_stage_reports_is_named(write, toy_chain):
    sweep = open_sweep(write(), ["objectives={psnr: max}"])
    sweeps.experiments.run(sweep.base, sweeps._Reporter(lambda *_: None), until="index")
    with pytest.raises(UserError, match=r"psnr is no metric of stage .router.\. Its metrics: attempts"):
        run_trial(sweep, {"router.lr": 0.5, "index.reward": 2}, lambda *_: None)


def test_folder_of_another_sweep_is_refused(write):
    sweeps._claim(open_sweep(write()))
    sweeps._claim(open_sweep(write(), ["trials=9"]))
    with pytest.raises(UserError, match="another sweep"):
        sweeps._claim(open_sweep(write(), ["set={router.batch: 8}"]))


def test_front_keeps_what_nothing_beats():
    points = {"a": (1.0, 9.0), "b": (2.0, 5.0), "c": (3.0, 5.0), "d": (9.0, 1.0), "e": (9.0, 9.0)}
    trials = [Trial(name, {}, {"lpips": x, "tokens": y}, "done") for name, (x, y) in points.items()]
    objectives = {"lpips": "min", "tokens": "min"}
    best = front(trials, objectives)
    assert [trial.name for trial in best] == ["a", "b", "d"]
    assert nearest_to_ideal(best, objectives).name == "b"
    assert [trial.name for trial in front(trials, {"lpips": "max"})] == ["d", "e"]


def test_name_of_a_trial_depends_on_its_values_alone():
    assert name_of({"a": 1, "b": [2]}) == name_of({"b": [2], "a": 1})
    assert name_of({"a": 1}) != name_of({"a": 2})
