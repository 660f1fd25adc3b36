"""Sweeps: checked before they start, shared stages once, trials as runs, the best one goes on."""

import contextlib
import dataclasses
from pathlib import Path

import pytest

from evatok import sweep as sweeps
from evatok.artifacts import read_manifest
from evatok.assignment.reward import HIGHER_IS_BETTER
from evatok.distributed.cluster import Cluster
from evatok.distributed.tune import Finished, MissingObjectiveError
from evatok.errors import UserError
from evatok.experiment import open_experiment, plan
from evatok.sweep import Trial, front, name_of, nearest_to_ideal, open_sweep, run_trial

SWEEPS = Path(__file__).parents[1] / "experiments/sweeps"


class Quiet(list[str]):
    """A listener that keeps what is logged."""

    def log(self, stage, message):
        self.append(message)

    def progress(self, *_):
        pass


def make_shared(sweep):
    sweeps.experiments.run(sweep.base, Quiet(), until="index")


@pytest.fixture
def write(toy_chain, tmp_path: Path):
    (tmp_path / "toy.yaml").write_text(
        f"name: toy\nstorage: {tmp_path}/runs\nindex: {{}}\nrouter: {{}}\nevaluate: {{}}\n"
    )

    def write(
        space: str = "{router.lr: {loguniform: [0.01, 1]}, index.reward: {choice: [1, 2]}}", more=""
    ) -> Path:
        (tmp_path / "sweep.yaml").write_text(
            f"name: sweep\nexperiment: toy.yaml\nspace: {space}\n"
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
        ("{router.lr: {choice: [0.1, 1]}}", "searcher: grid", "every combination: leave trials out"),
    ],
)
def test_mistake_is_found_before_anything_starts(write, toy_chain, space, more, part):
    with pytest.raises(UserError, match=f"(?s){part}"):
        open_sweep(write(space, more))
    assert toy_chain.ran == []


def test_trial_reads_the_shared_stages_and_is_a_run_of_its_own(write, toy_chain):
    sweep = open_sweep(write())
    assert sweep.shared == ["index"]
    make_shared(sweep)
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
    make_shared(sweep)
    for lr, attempts in ((0.1, 1.0), (0.2, 3.0)):
        values = {"router.lr": lr, "index.reward": 1}
        run_trial(sweep, values, lambda *_: None)
        sweeps._record(sweep, Quiet(), Finished(values, {"attempts": attempts}, "done"))
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


@pytest.mark.parametrize("name", ["tiny", "tiny_budget", "router", "routers", "token_budget"])
def test_shipped_sweeps_are_valid_and_search_by_what_their_last_stage_reports(name):
    sweep = open_sweep(SWEEPS / f"{name}.yaml")
    assert sweep.shared == ["index", "proxy", "curate"][: 1 if name == "token_budget" else 3]
    objectives = sweep.config.objectives
    assert objectives.keys() <= set(sweep.last.metrics(sweep.base.router))
    if "eval_quality" in objectives:
        higher = HIGHER_IS_BETTER[sweep.base.curate.reward.quality]
        assert objectives["eval_quality"] == ("max" if higher else "min")


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (
            ["objectives={reward_percentile: max}"],
            "objectives.reward_percentile: is no metric of stage .router",
        ),
        (["set={router.train.eval_every: 0}"], "set router.train.eval_every and router.held_out above 0"),
        (["objectives={eval_reward_percentile: max}"], r"curate\.reward\.w_q.*Use eval_gain"),
    ],
)
def test_objective_that_is_not_reported_or_does_not_compare_trials_is_refused(overrides, part):
    with pytest.raises(UserError, match=part):
        open_sweep(SWEEPS / "tiny.yaml", overrides)


def test_objective_that_only_a_trial_shows_to_be_missing_ends_the_search(write, toy_chain):
    sweep = open_sweep(write(), ["objectives={psnr: max}"])
    make_shared(sweep)
    with pytest.raises(
        MissingObjectiveError, match=r"psnr is no metric of stage .router.\. Its metrics: attempts"
    ):
        run_trial(sweep, {"router.lr": 0.5, "index.reward": 2}, lambda *_: None)


def test_only_the_last_stage_of_a_trial_is_reported(write, toy_chain):
    sweep = open_sweep(write(), ["stages=[router, evaluate]"])
    make_shared(sweep)
    steps = []
    reporter = sweeps._Reporter(lambda step, _: steps.append(step), sweep.last.name)
    reporter.progress("router", 1, 9, "steps", {"attempts": 1.0})
    reporter.progress("evaluate", 2, 9, "steps", {"attempts": 1.0})
    assert steps == [2]


@pytest.mark.parametrize(
    ("mistake", "kind", "text"),
    [
        (True, UserError, "too dark"),
        (False, RuntimeError, "ValueError: too dark"),
    ],
)
def test_cause_is_told_when_no_trial_comes_to_its_end(write, mistake, kind, text):
    sweep = open_sweep(write())
    values, heard = {"router.lr": 0.5, "index.reward": 2}, Quiet()
    error = "too dark" if mistake else "Traceback ...\nValueError: too dark\n"
    sweeps._record(sweep, heard, Finished(values, {}, "failed", 3, error, mistake))
    record = (sweep.location / "trials" / name_of(values)).read_json("trial.json")
    assert (record["error"], record["step"]) == (error, 3)
    assert heard == [f"trial {name_of(values)} failed: {text}"]
    with pytest.raises(kind, match=f"{name_of(values)}, the first to fail: {text}"):
        sweeps._conclude(sweep)


def test_storage_is_one_for_the_sweep_and_its_experiment(write, tmp_path):
    sweep = open_sweep(write())
    assert sweep.location.uri == str(tmp_path / "runs/sweep")
    sweep = open_sweep(write(), [f"storage={tmp_path}/elsewhere"])
    assert sweep.location.uri == str(tmp_path / "elsewhere/sweep")
    assert sweep.base.location.uri == str(tmp_path / "elsewhere/toy")


@pytest.fixture
def searched(monkeypatch):
    """What ``sweeps.run`` asks of Ray and of the search, which does nothing.

    On a local Ray without GPUs; at an address, on a cluster that has one CPU and grows to 9.
    """
    asked = {}

    @contextlib.contextmanager
    def connected(address, *, cpus):
        asked["needed"] = cpus
        asked["found"] = Cluster("", local=address is None, nodes=1, cpus=1 if address else cpus, gpus=0)
        yield asked["found"]

    def describe():
        return asked["found"] if asked["found"].local else dataclasses.replace(asked["found"], cpus=9)

    def search(*arguments, on_end, **options):
        asked.update(options)
        on_end(Finished({"router.lr": 0.5, "index.reward": 2}, {"attempts": 1.0}, "stopped"))

    monkeypatch.setattr("evatok.distributed.cluster.connected", connected)
    monkeypatch.setattr("evatok.distributed.cluster.describe", describe)
    monkeypatch.setattr(sweeps, "search", search)
    return asked


@pytest.mark.parametrize(
    ("trial", "base", "needed", "held", "concurrency"),
    [
        ("{workers: 0}", "{workers: 1}", 4, 1, 2),
        ("{workers: 0}", "{workers: 4, cpus_per_worker: 3}", 14, 1, 12),
        ("{workers: 2, cpus_per_worker: 3}", "{workers: 1}", 8, sweeps.WAITING_CPUS, 1),
    ],
)
def test_local_ray_is_as_large_as_the_larger_of_a_trial_and_the_experiment_needs(
    write, toy_chain, searched, trial, base, needed, held, concurrency
):
    sweep = open_sweep(write(), [f"resources={trial}", f"set={{resources: {base}, router.batch: 4}}"])
    with pytest.raises(RuntimeError, match="no trial"):
        sweeps.run(sweep, Quiet())
    found = {key: searched[key] for key in ("needed", "cpus", "concurrency")}
    assert found == {"needed": needed, "cpus": held, "concurrency": concurrency}


def test_trials_at_once_are_counted_when_the_shared_stages_have_grown_the_cluster(write, toy_chain, searched):
    sweep = open_sweep(write(), ["resources={workers: 0}", "set={router.batch: 4}"])
    with pytest.raises(RuntimeError, match="no trial"):
        sweeps.run(sweep, Quiet(), address="cluster")
    assert searched["concurrency"] == 7


def test_cluster_without_room_for_a_trial_must_be_told_how_many_run_at_once(write, toy_chain, searched):
    trial = "resources={workers: 0, cpus_per_worker: 4}"
    with pytest.raises(UserError, match="needs 4 CPUs and 0 GPUs; the cluster has 1 and 0 now"):
        sweeps.run(open_sweep(write(), [trial]), Quiet(), address="cluster")
    assert toy_chain.ran == []
    with pytest.raises(RuntimeError, match="no trial"):
        sweeps.run(open_sweep(write(), [trial, "concurrency=5"]), Quiet(), address="cluster")
    assert searched["concurrency"] == 5


def test_trials_that_need_more_gpus_than_there_are_do_not_start(write, toy_chain, searched):
    sweep = open_sweep(write(), ["resources={use_gpu: true, workers: 0}"])
    with pytest.raises(UserError, match="found 0 GPUs"):
        sweeps.run(sweep, Quiet())
    assert toy_chain.ran == []


def test_number_of_trials_is_given_or_that_of_a_grid(write):
    def opened(space, searcher):
        path = write(space, f"searcher: {searcher}")
        path.write_text(path.read_text().replace("trials: 3\n", ""))
        return open_sweep(path).config

    choices = "{router.lr: {choice: [0.1, 1]}, index.reward: {choice: [1, 2, 3]}}"
    assert opened(choices, "grid").count == 6
    with pytest.raises(UserError, match="a choice for every setting"):
        opened("{router.lr: {uniform: [0.1, 1]}}", "grid")
    with pytest.raises(UserError, match="give trials"):
        opened(choices, "random")


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
