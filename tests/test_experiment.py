"""Planning and running a chain: nothing twice, nothing silently, resumable everywhere."""

import sys
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from evatok import experiment as experiments
from evatok.artifacts import exclusive, read_manifest
from evatok.config import dump
from evatok.errors import UserError
from evatok.experiment import Experiment, check, experiment_type, open_experiment, plan, run


class Quiet:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def log(self, stage: str, message: str) -> None:
        self.lines.append((stage, message))

    def progress(
        self, stage: str, done: int, total: int, unit: str, figures: Mapping[str, float]
    ) -> None: ...


@pytest.fixture
def make(toy_chain, tmp_path: Path):
    def make(**sections) -> Experiment:
        given = {"index": {}, "router": {}, "evaluate": {}} | sections
        return experiment_type()(name="toy", storage=str(tmp_path), **given)

    return make


def states(experiment: Experiment) -> list[str]:
    return [entry.state for entry in plan(experiment)]


def test_stages_run_in_order_and_leave_manifests_and_report(make, toy_chain):
    experiment = make()
    result = run(experiment, Quiet())
    assert toy_chain.ran == ["index", "router", "evaluate"]
    assert [stage.metrics for stage in result.stages] == [{"attempts": 1}] * 3
    manifest = read_manifest(experiment.location / "router")
    assert manifest.state == "done"
    assert manifest.config == {"router": {"lr": 0.1, "batch": 4}, "index.reward": 1.0}
    assert manifest.inputs == {"index": read_manifest(experiment.location / "index").fingerprint}
    assert manifest.finished > manifest.started
    assert experiment.location.read_json("router/out.json") == {"inputs": ["index"]}
    assert experiment.location.read_bytes("report.html") == b"report"
    assert open_experiment(experiment.location.uri) == experiment


def test_second_run_does_nothing(make, toy_chain):
    run(make(), Quiet())
    toy_chain.ran.clear()
    make().location.write_bytes("report.html", b"mine")
    result = run(make(), Quiet())
    assert toy_chain.ran == []
    assert all(stage.skipped for stage in result.stages)
    assert make().location.read_bytes("report.html") == b"mine"


def test_interrupted_stage_goes_on_from_what_it_left(make, toy_chain):
    toy_chain.broken["router"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(make(), Quiet())
    assert states(make()) == ["done", "partial", "missing"]
    result = run(make(), Quiet())
    assert toy_chain.ran == ["index", "router", "router", "evaluate"]
    assert [stage.metrics["attempts"] for stage in result.stages] == [1, 2, 1]
    assert [stage.skipped for stage in result.stages] == [True, False, False]


def test_changed_setting_stops_the_run_before_anything_and_shows_the_difference(make, toy_chain):
    run(make(), Quiet())
    toy_chain.ran.clear()
    changed = make(router={"lr": 0.2})
    assert states(changed) == ["done", "drifted", "drifted"]
    with pytest.raises(UserError) as error:
        run(changed, Quiet())
    text = str(error.value)
    assert "router.lr: was 0.1, is 0.2" in text
    assert "--redo router" in text
    assert toy_chain.ran == []
    assert open_experiment(changed.location.uri) == make()


def test_unfinished_stage_is_never_continued_with_another_config(make, toy_chain):
    toy_chain.broken["router"] = RuntimeError("fault")
    with pytest.raises(RuntimeError):
        run(make(), Quiet())
    with pytest.raises(UserError, match=r"router\.lr: was 0\.1, is 0\.2"):
        run(make(router={"lr": 0.2}), Quiet())


def test_changed_seed_and_code_are_drift(make, toy_chain, monkeypatch):
    run(make(), Quiet())
    with pytest.raises(UserError, match="seed: was 0, is 7"):
        run(make(seed=7), Quiet())
    newer = SimpleNamespace(STAGE=replace(make().stages[0], version=2))
    monkeypatch.setitem(sys.modules, "evatok.stages.index", newer)
    with pytest.raises(UserError, match="code of this stage"):
        run(make(), Quiet())


def test_operational_settings_and_resources_are_no_drift(make):
    run(make(), Quiet())
    assert states(make(index={"log_every": 5}, resources={"workers": 4})) == ["done"] * 3


def test_setting_read_by_a_later_stage_counts_there_alone(make):
    run(make(), Quiet())
    assert states(make(index={"reward": 2.0})) == ["done", "drifted", "drifted"]


def test_redo_remakes_the_stage_and_its_readers_from_nothing(make, toy_chain):
    run(make(), Quiet())
    toy_chain.ran.clear()
    result = run(make(router={"lr": 0.2}), Quiet(), redo="router")
    assert toy_chain.ran == ["router", "evaluate"]
    assert [stage.metrics["attempts"] for stage in result.stages] == [1, 1, 1]


def test_redo_deletes_nothing_when_another_stage_stops_the_run(make, toy_chain):
    run(make(), Quiet())
    with pytest.raises(UserError, match=r"index: seed: was 0, is 7"):
        run(make(seed=7), Quiet(), redo="router")
    assert states(make()) == ["done"] * 3


def test_redo_that_was_stopped_while_it_deleted_is_ended_first(make, toy_chain, monkeypatch):
    run(make(), Quiet())
    toy_chain.ran.clear()

    def stopped(self, name=""):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("evatok.artifacts.Location.delete", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(make(), Quiet(), redo="router")
    result = run(make(), Quiet())
    assert toy_chain.ran == ["router", "evaluate"]
    assert [stage.metrics["attempts"] for stage in result.stages] == [1, 1, 1]


def test_run_that_was_moved_is_opened_where_it_is(make, toy_chain, tmp_path):
    run(make(), Quiet())
    moved = tmp_path / "elsewhere" / "1"
    moved.parent.mkdir()
    make().location.local().rename(moved)
    experiment = open_experiment(moved)
    assert experiment.location.local() == moved
    assert states(experiment) == ["done"] * 3
    assert open_experiment(moved, ["name=other"]).location.local() == moved.with_name("other")


def test_weights_that_a_later_stage_lacks_stop_the_run_before_it_starts(
    make, toy_chain, monkeypatch, tmp_path
):
    monkeypatch.setenv("EVATOK_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    last = make().stages[-1]
    needy = SimpleNamespace(STAGE=replace(last, weights=lambda config: ["i3d"]))
    monkeypatch.setitem(sys.modules, f"evatok.stages.{last.name}", needy)
    with pytest.raises(UserError, match="weights i3d"):
        run(make(), Quiet())
    assert toy_chain.ran == []


def test_refreshed_stage_runs_in_its_folder_until_others_have_read_it(make, toy_chain):
    run(make(), Quiet(), until="index")
    result = run(make(), Quiet(), until="index", refresh="index")
    assert [stage.metrics["attempts"] for stage in result.stages] == [2]
    run(make(), Quiet())
    with pytest.raises(UserError, match=r"router, evaluate of .* already read what index"):
        run(make(), Quiet(), refresh="index")


def test_until_stops_after_the_stage(make, toy_chain):
    run(make(), Quiet(), until="router")
    assert states(make()) == ["done", "done", "missing"]


def test_one_stage_alone_runs_without_what_it_does_not_read(make, toy_chain, monkeypatch):
    aside = SimpleNamespace(STAGE=replace(make().stages[-1], inputs=("index",)))
    monkeypatch.setitem(sys.modules, "evatok.stages.evaluate", aside)
    run(make(), Quiet(), until="index")
    result = run(make(), Quiet(), only="evaluate")
    assert toy_chain.ran == ["index", "evaluate"]
    assert [stage.name for stage in result.stages] == ["index", "evaluate"]
    assert states(make(router={"lr": 0.2})) == ["done", "missing", "done"]


def test_one_stage_alone_is_refused_until_what_it_reads_is_done(make, toy_chain):
    run(make(), Quiet(), until="index")
    with pytest.raises(UserError, match=r"router makes, .*evatok run EXPERIMENT --until router"):
        run(make(), Quiet(), only="evaluate")
    assert toy_chain.ran == ["index"]


@pytest.mark.parametrize("option", ["until", "only", "redo"])
def test_unknown_stage_is_refused(make, option):
    with pytest.raises(UserError, match="index, router, evaluate"):
        run(make(), Quiet(), **{option: "rooter"})


def test_stage_that_leaves_less_than_it_declares_is_not_done(make, toy_chain, monkeypatch):
    experiment = make()
    monkeypatch.setattr("evatok.artifacts.Location.write_json", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"out\.json"):
        run(experiment, Quiet())
    assert states(experiment)[0] == "partial"


def test_second_driver_of_a_run_is_refused(make, toy_chain):
    experiment = make()
    with exclusive(experiment.location), pytest.raises(UserError, match="in use"):
        run(experiment, Quiet())
    assert toy_chain.ran == []


def test_a_local_folder_on_a_cluster_of_several_nodes_is_pointed_out(tmp_path, monkeypatch):
    found = SimpleNamespace(local=False, address="10.0.0.1:6379", nodes=2, cpus=8.0, gpus=0.0)
    monkeypatch.setattr("evatok.distributed.cluster.connected", lambda *_, **__: nullcontext(found))
    quiet = Quiet()
    with ExitStack() as stack:
        experiments._connect(stack, experiment_type()(name="toy", storage=str(tmp_path)), quiet, None)
    assert ("cluster", f"every node must see the folder {tmp_path}/toy") in quiet.lines


def test_missing_sections_are_named(toy_chain, tmp_path):
    with pytest.raises(UserError, match="reads what `index` makes"):
        check(experiment_type()(name="toy", storage=str(tmp_path), router={}), "file")
    with pytest.raises(UserError, match="no stage to run"):
        check(experiment_type()(name="toy", storage=str(tmp_path)), "file")


def test_checks_of_the_stages_are_part_of_opening(toy_chain, tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text("name: toy\nindex: {}\nrouter: {batch: 5}\n")
    with pytest.raises(UserError, match=r"toy\.yaml: 1 problem\n  router\.batch: 5 cannot be split over 2"):
        open_experiment(path)
    assert open_experiment(path, ["router.batch=6"]).router.batch == 6


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "a b"])
def test_name_of_a_run_is_one_safe_folder_name(toy_chain, name):
    with pytest.raises(ValueError):
        experiment_type()(name=name, index={})


def test_written_experiment_is_explicit(make):
    text = dump(make())
    assert "lr: 0.1" in text
    assert "workers: 2" in text


def test_real_chain_loads_and_every_stage_stands_after_what_it_reads():
    experiments.experiment_type.cache_clear()
    known = list(experiments.experiment_type().model_fields)
    for name in experiments.CHAIN:
        if name in known:
            stage = experiments._stage(name)
            assert stage.name == name
            if not callable(stage.inputs):
                assert all(experiments.CHAIN.index(i) < experiments.CHAIN.index(name) for i in stage.inputs)
