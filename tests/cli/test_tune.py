"""Sweeps by the command line: to the best trial, with Ray, DeepSpeed and real clips."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SWEEPS = Path(__file__).parents[2] / "experiments/sweeps"
SHORT = {
    "index.source.count": 6,
    "proxy.train": {"steps": 2, "warmup": 0, "global_batch": 4, "eval_every": 2},
    "curate.clips": {"train": 6, "test": 4},
    "router.train": {"steps": 4, "warmup": 0, "global_batch": 4, "eval_every": 1},
    "router.held_out": 4,
}


def start(sweep: Path, storage: Path, *settings: str) -> subprocess.Popen:
    """``evatok tune --json``; the experiment's run is shortened."""
    words = ["tune", str(sweep), "--json", "--set", f"set={json.dumps(SHORT)}"]
    for setting in (f"storage={storage}", "concurrency=2", *settings):
        words += ["--set", setting]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", "evatok.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def tune(sweep: Path, storage: Path, *settings: str) -> dict:
    """What the command says in the end."""
    process = start(sweep, storage, *settings)
    out, error = process.communicate()
    assert process.returncode == 0, out + error
    return json.loads(out.splitlines()[-1])


@pytest.mark.slow
def test_the_tiny_sweep_comes_to_its_best_trial(tmp_path):
    found = tune(SWEEPS / "tiny.yaml", tmp_path, "trials=2", "scheduler.grace=2")
    done = [trial for trial in found["trials"] if trial["state"] == "done"]
    assert {trial["state"] for trial in found["trials"]} <= {"done", "stopped"}
    best = max(trial["metrics"]["eval_gain"] for trial in done)
    assert best in [t["metrics"]["eval_gain"] for t in done if t["name"] in found["best"]]
    assert (Path(found["export"]) / "router/model/model.safetensors").is_file()
    # What decides about early ends is told on the way: a trial that told nothing would stand at step 0.
    steps = [
        json.loads(path.read_text())["step"] for path in tmp_path.glob("tiny-router/trials/*/trial.json")
    ]
    assert len(steps) == 2
    assert all(step >= 2 for step in steps)


@pytest.mark.slow
def test_killed_sweep_started_again_runs_only_what_is_left(tmp_path):
    sweep = SWEEPS / "tiny_budget.yaml"
    trials = tmp_path / "tiny-budget/trials"

    def done() -> dict[str, float]:
        """When the routers of the finished trials were made, by trial."""
        ended = [path.parent for path in trials.glob("*/trial.json") if '"done"' in path.read_text()]
        return {trial.name: (trial / "router/manifest.json").stat().st_mtime for trial in ended}

    command = start(sweep, tmp_path, "trials=2", "concurrency=1")
    deadline = time.monotonic() + 400
    while not (before := done()):
        assert command.poll() is None, command.communicate()
        assert time.monotonic() < deadline, "no trial came to its end"
        time.sleep(0.1)
    command.kill()
    command.communicate()
    shared = (tmp_path / "tiny/curate/manifest.json").stat().st_mtime

    found = tune(sweep, tmp_path, "trials=2", "concurrency=1")
    assert [trial["state"] for trial in found["trials"]] == ["done"] * 2
    assert all({"eval_quality", "eval_tokens"} <= set(trial["metrics"]) for trial in found["trials"])
    after = done()
    assert len(after) == 2
    assert before.items() <= after.items()
    assert (tmp_path / "tiny/curate/manifest.json").stat().st_mtime == shared


@pytest.mark.slow
def test_trials_over_token_budgets_train_proxies_and_curate_with_workers_of_their_own(tmp_path):
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        f"name: budgets\nexperiment: {SWEEPS.parent}/tiny.yaml\nstages: [proxy, curate, router]\ntrials: 2\n"
        "space:\n"
        "  proxy.model.choices, tokenizer.model.choices: {choice: [[2, 4, 8], [4, 8]]}\n"
        "objectives: {eval_quality: max, eval_tokens: min}\n"
        "resources: {workers: 1}\n"
    )
    found = tune(sweep, tmp_path)
    assert [trial["state"] for trial in found["trials"]] == ["done", "done"]
    assert all(
        len(list(tmp_path.glob(f"budgets/trials/{t['name']}/curate/table/*"))) for t in found["trials"]
    )
