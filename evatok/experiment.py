"""An experiment: the stages' configs in one file; plan the chain and run it.

Rerunning does nothing twice. A finished stage whose fingerprint is the planned one is skipped; an unfinished
one goes on from what it left; one that was made (or begun) from another config stops the run before anything
starts. Nothing is ever reused or overwritten silently.
"""

from __future__ import annotations

import functools
import importlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, create_model

from evatok import artifacts, weights
from evatok.artifacts import Artifact, Location, Manifest
from evatok.config import Config, dump, flatten, identity, load, parse, problems
from evatok.errors import UserError
from evatok.stages.stage import Description, Listener, Resources, Stage, StageContext

if TYPE_CHECKING:
    from evatok.distributed.cluster import Cluster

CHAIN = ("index", "proxy", "curate", "router", "tokenizer", "tokens", "generator", "generate", "evaluate")
"""Every stage, in the order in which they run: the module ``evatok.stages.<name>`` holds its ``STAGE``."""

REDO = "redo.json"  # the stages whose artifacts are being deleted


class Experiment(Config):
    """What all experiments have. ``experiment_type`` adds one optional section per stage."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100, description="folder of the run"
    )
    storage: str = Field(
        default="runs", min_length=1, description="local folder or URI under which runs live"
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="of everything random")
    resources: Resources = Resources()

    @property
    def location(self) -> Location:
        """The run's folder."""
        return Location.parse(self.storage) / self.name

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages this experiment has a section for, in order."""
        return tuple(_stage(name) for name in CHAIN if getattr(self, name, None) is not None)


@functools.cache
def experiment_type() -> type[Experiment]:
    """The type of an experiment file."""
    sections: dict[str, Any] = {name: (_stage(name).config | None, None) for name in CHAIN}
    return create_model("ExperimentFile", __base__=Experiment, __module__=__name__, **sections)


def __getattr__(name: str) -> Any:
    if name == "ExperimentFile":  # where pickle looks for the type of an experiment
        return experiment_type()
    raise AttributeError(name)


def _stage(name: str) -> Stage:
    stage = importlib.import_module(f"evatok.stages.{name}").STAGE
    assert isinstance(stage, Stage)
    return stage


def open_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a file, or of a run's folder (its ``experiment.yaml``); checked."""
    experiment = read_experiment(path, overrides)
    check(experiment, str(path))
    return experiment


def read_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """``open_experiment`` without the checks across fields, which may look at files of another machine."""
    text = str(path)
    if text.endswith((".yaml", ".yml")) or not (run := Location.parse(text)).exists("experiment.yaml"):
        return load(text, experiment_type(), overrides)
    storage, name = run.split()  # wherever the folder was moved since its file was written
    moved = [f"storage={json.dumps(storage)}", f"name={json.dumps(name)}"]
    data = run.read_bytes("experiment.yaml")
    return parse(data, experiment_type(), f"{text}/experiment.yaml", [*moved, *overrides])


def check(experiment: Experiment, source: str) -> None:
    """All checks across fields and stages. Raises UserError with every problem."""
    found: list[tuple[str, str]] = []
    stages = experiment.stages
    if not stages:
        found.append(("", f"no stage to run: give at least one of the sections {', '.join(CHAIN)}."))
    for stage in stages:
        config = getattr(experiment, stage.name)
        for needed in stage.needs(config):
            if getattr(experiment, needed, None) is None:
                found.append((stage.name, f"reads what `{needed}` makes; add the section `{needed}`."))
    if not found:
        for stage in stages:
            if stage.check is not None:
                found.extend(stage.check(getattr(experiment, stage.name), experiment))
    if found:
        raise problems(found, source)


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a run as it stands.

    ``state``: ``done`` (skipped), ``partial`` (goes on), ``missing`` (starts) or ``drifted`` (made from
    something else; ``drift`` says what differs).
    """

    stage: Stage
    config: Any
    location: Location
    fingerprint: str
    inputs: dict[str, str]
    state: Literal["done", "partial", "missing", "drifted"]
    manifest: Manifest | None
    drift: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.stage.name

    def describe(self, experiment: Experiment) -> Description:
        return self.stage.describe(self.config, experiment) if self.stage.describe else Description()


def plan(experiment: Experiment) -> list[PlannedStage]:
    """How each stage stands against this experiment. Reads manifests, starts nothing."""
    prints = fingerprints(experiment)
    planned = []
    for stage in experiment.stages:
        config = getattr(experiment, stage.name)
        location = experiment.location / stage.name
        manifest = artifacts.read_manifest(location)
        inputs = {name: prints[name] for name in stage.needs(config)}
        state: Literal["done", "partial", "missing", "drifted"]
        drift: tuple[str, ...] = ()
        if manifest is None:
            state = "missing"
        elif manifest.fingerprint == prints[stage.name]:
            state = "done" if manifest.state == "done" else "partial"
        else:
            state, drift = "drifted", _drift(manifest, stage, experiment, inputs)
        planned.append(
            PlannedStage(stage, config, location, prints[stage.name], inputs, state, manifest, drift)
        )
    return planned


def fingerprints(experiment: Experiment) -> dict[str, str]:
    """The fingerprint that each stage's artifact will have: a function of the experiment alone."""
    prints: dict[str, str] = {}
    for stage in experiment.stages:
        config = getattr(experiment, stage.name)
        inputs = {name: prints[name] for name in stage.needs(config)}
        prints[stage.name] = artifacts.fingerprint(
            _settings(stage, experiment), inputs, stage.version, experiment.seed
        )
    return prints


def _settings(stage: Stage, experiment: Experiment) -> dict[str, Any]:
    """What the stage's result depends on besides its inputs, as plain data by section."""
    config = getattr(experiment, stage.name)
    settings: dict[str, Any] = {stage.name: identity(config)}
    for key in stage.settings(config):
        value = functools.reduce(getattr, key.split("."), experiment)
        settings[key] = identity(value) if isinstance(value, Config) else value
    return settings


def _drift(
    manifest: Manifest, stage: Stage, experiment: Experiment, inputs: dict[str, str]
) -> tuple[str, ...]:
    before, now = flatten(manifest.config), flatten(_settings(stage, experiment))
    lines = [
        f"{key}: was {before.get(key, 'not there')}, is {now.get(key, 'not there')}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, ...) != now.get(key, ...)
    ]
    if manifest.seed != experiment.seed:
        lines.append(f"seed: was {manifest.seed}, is {experiment.seed}")
    changed = [name for name in inputs if manifest.inputs.get(name) != inputs[name]]
    lines += [f"its input {name} is another one" for name in changed]
    return tuple(lines) or ("the code of this stage makes something else now",)


@dataclass(frozen=True)
class StageResult:
    """``seconds`` and ``metrics`` of a finished stage; ``skipped`` when an earlier run had finished it."""

    name: str
    skipped: bool
    seconds: float
    metrics: dict[str, Any]


@dataclass(frozen=True)
class RunResult:
    location: Location
    stages: list[StageResult]
    report: str | None


def run(
    experiment: Experiment,
    listener: Listener,
    *,
    until: str | None = None,
    only: str | None = None,
    redo: str | None = None,
    refresh: str | None = None,
    address: str | None = None,
) -> RunResult:
    """Bring the experiment's stages to done, in order, and write the report.

    ``until``: the last stage to run. ``only``: run this stage alone; refused unless all that it reads,
    directly or not, is done. ``redo``: delete this stage's artifact, and those of all stages that
    read it directly or not, and make them anew. ``refresh``: run this stage in its folder even if it is done;
    refused once other stages have read it. ``address``: of the Ray cluster (``distributed.cluster``).
    Raises UserError when a stage drifted or another process is running this experiment.
    """
    for option, name in (("--until", until), ("stage", only), ("--redo", redo)):
        names = [stage.name for stage in experiment.stages]
        if name is not None and name not in names:
            raise UserError(
                f"{option} {name}: not a stage of this experiment. Its stages: {', '.join(names)}."
            )
    with ExitStack() as stack:
        stack.enter_context(artifacts.exclusive(experiment.location))
        if redo is not None:
            affected = _with_readers(experiment, redo)
            kept = [entry for entry in _concerned(experiment, only) if entry.name not in affected]
            _refuse_drift(kept, experiment, only)
            _refuse_unfinished_inputs(kept, experiment, only)
            experiment.location.write_json(REDO, affected)
        _delete_redone(experiment.location, listener)
        planned = _concerned(experiment, only)
        _refuse_drift(planned, experiment, only)
        _refuse_unfinished_inputs(planned, experiment, only)
        _find_weights(planned)
        if refresh is not None:
            _refuse_stale_readers(planned, experiment, refresh)
        experiment.location.write_bytes("experiment.yaml", dump(experiment).encode())
        results, connection = [], False
        finished: dict[str, Artifact] = {}
        for entry in planned:
            if entry.state == "done" and entry.name != refresh:
                assert entry.manifest is not None
                finished[entry.name] = Artifact(entry.location, entry.manifest)
                results.append(_result(entry.manifest, skipped=True))
                listener.log(entry.name, "done already")
            else:
                if not connection:
                    _connect(stack, experiment, listener, address)
                    connection = True
                finished[entry.name] = run_stage(entry, experiment, finished, listener)
                results.append(_result(finished[entry.name].manifest, skipped=False))
                listener.log(entry.name, f"done in {_duration(results[-1].seconds)}")
            if entry.name == until:
                break
        report = _report(experiment, listener, anew=connection)
    return RunResult(experiment.location, results, report)


def run_stage(
    entry: PlannedStage, experiment: Experiment, inputs: dict[str, Artifact], listener: Listener
) -> Artifact:
    """Run one stage to its published artifact. ``inputs``: at least the finished stages that it reads."""
    began = Manifest(
        stage=entry.name,
        state="started",
        config=_settings(entry.stage, experiment),
        fingerprint=entry.fingerprint,
        inputs=entry.inputs,
        versions=artifacts.versions(),
        seed=experiment.seed,
        started=entry.manifest.started if entry.manifest else datetime.now(timezone.utc),
    )
    artifacts.publish(entry.location, began)
    entry.location.delete(artifacts.MANIFEST)
    clock = time.monotonic()
    metrics = entry.stage.run(
        StageContext(
            stage=entry.name,
            run_id=f"{experiment.name}-{entry.name}-{entry.fingerprint[:8]}",
            location=entry.location,
            inputs={name: inputs[name] for name in entry.inputs},
            config=entry.config,
            experiment=experiment,
            seed=experiment.seed,
            resources=experiment.resources,
            listener=listener,
        )
    )
    for output in entry.stage.outputs:
        if not entry.location.exists(output.rstrip("/")):
            raise RuntimeError(f"stage {entry.name} ended without leaving {entry.location.uri}/{output}")
    done = began.model_copy(
        update={
            "state": "done",
            "versions": artifacts.versions(),
            "finished": datetime.now(timezone.utc),
            "seconds": time.monotonic() - clock,
            "metrics": metrics,
        }
    )
    artifacts.publish(entry.location, done)
    return Artifact(entry.location, done)


def _delete_redone(location: Location, listener: Listener) -> None:
    """Delete what ``--redo`` asked for, now or in a run that was stopped while it deleted."""
    if not location.exists(REDO):
        return
    for name in location.read_json(REDO):
        listener.log(name, "deleting the earlier artifact (--redo)")
        (location / name).delete()
    location.delete(REDO)


def _find_weights(planned: Sequence[PlannedStage]) -> None:
    """Raise UserError now, not in days, where a stage that will run lacks pretrained weights."""
    for entry in planned:
        if entry.state != "done" and entry.stage.weights is not None:
            for name in entry.stage.weights(entry.config):
                weights.find(name)


def _with_readers(experiment: Experiment, name: str) -> list[str]:
    affected = [name]
    for stage in experiment.stages:
        if set(stage.needs(getattr(experiment, stage.name))) & set(affected):
            affected.append(stage.name)
    return affected


def _concerned(experiment: Experiment, only: str | None) -> list[PlannedStage]:
    """The plan; of ``only`` and all that it reads, directly or not, where that is given."""
    planned = plan(experiment)
    if only is None:
        return planned
    wanted = {only}
    for entry in reversed(planned):
        if entry.name in wanted:
            wanted.update(entry.inputs)
    return [entry for entry in planned if entry.name in wanted]


def _refuse_unfinished_inputs(
    planned: Sequence[PlannedStage], experiment: Experiment, only: str | None
) -> None:
    unfinished = [entry.name for entry in planned if entry.state != "done" and entry.name != only]
    if only is not None and unfinished:
        raise UserError(
            f"{only} reads what {', '.join(unfinished)} make{'s' if len(unfinished) == 1 else ''}, which"
            f" {experiment.location.uri} has not yet. Make it first: evatok run EXPERIMENT --until"
            f" {unfinished[-1]}"
        )


def _refuse_drift(planned: Sequence[PlannedStage], experiment: Experiment, only: str | None = None) -> None:
    drifted = [entry for entry in planned if entry.state == "drifted"]
    if not drifted:
        return
    lines = [f"{experiment.location.uri} holds results made from another config:"]
    for entry in drifted:
        lines += [f"  {entry.name}: {line}" for line in entry.drift]
    first = drifted[0].name
    command = "eval" if first == only else "run"
    lines += [
        f"Use evatok {command} ... --redo {first} to delete and remake it and all stages that read it,",
        "or keep it and give this experiment another name (--set name=...), or undo the change.",
    ]
    raise UserError("\n".join(lines))


def _refuse_stale_readers(planned: Sequence[PlannedStage], experiment: Experiment, name: str) -> None:
    begun = [entry.name for entry in planned if entry.name != name and entry.state != "missing"]
    stale = [reader for reader in _with_readers(experiment, name) if reader in begun]
    if stale:
        raise UserError(
            f"{', '.join(stale)} of {experiment.location.uri} already read what {name} made. To make it and "
            f"them anew: evatok run ... --redo {name}; or give this experiment another name (--set name=...)."
        )


def _connect(stack: ExitStack, experiment: Experiment, listener: Listener, address: str | None) -> None:
    from evatok.distributed import cluster

    found = stack.enter_context(cluster.connected(address, cpus=logical_cpus(experiment.resources)))
    where = "a local Ray" if found.local else f"the Ray cluster at {found.address}"
    listener.log("cluster", f"{where}, nodes: {found.nodes}, CPUs: {found.cpus:g}, GPUs: {found.gpus:g}")
    refuse_missing_gpus(experiment.resources, found)
    if found.nodes > 1 and experiment.location.local():
        listener.log("cluster", f"every node must see the folder {experiment.location.uri}")
    if cluster.inside_job() and not Path(experiment.storage).is_absolute() and experiment.location.local():
        listener.log(
            "cluster",
            f"storage {experiment.storage!r} lies in the job's working folder, which Ray deletes in time; "
            "give an absolute path or a URI: --set storage=...",
        )


def logical_cpus(resources: Resources) -> float:
    """What a local Ray needs for these resources: the training workers, and what decodes for them."""
    from evatok.distributed import cluster

    return resources.workers * resources.cpus_per_worker + cluster.DATA_CPUS


def refuse_missing_gpus(resources: Resources, found: Cluster) -> None:
    """Raises UserError when our own Ray lacks the GPUs; a cluster may have more nodes coming."""
    needed = max(resources.workers, 1) * resources.use_gpu
    if found.local and found.gpus < needed:
        raise UserError(
            f"resources.workers: {resources.workers} with resources.use_gpu: found {found.gpus:g} GPUs on "
            "this machine. Lower workers, set resources.use_gpu to false, or give the --address of a cluster."
        )


def _report(experiment: Experiment, listener: Listener, *, anew: bool) -> str | None:
    if not anew and experiment.location.exists("report.html"):
        return f"{experiment.location.uri}/report.html"
    from evatok.report.page import write_report

    write: Callable[[Location], str] = write_report
    uri = write(experiment.location)
    listener.log("report", uri)
    return uri


def _result(manifest: Manifest, *, skipped: bool) -> StageResult:
    return StageResult(manifest.stage, skipped, manifest.seconds, manifest.metrics)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
