"""A sweep: trials of one experiment over a space of settings.

The stages before the searched ones run once, as the experiment itself, and all trials read them (for a
router search: one reward table). A trial is a run of its own with its own artifacts; ``trial.json`` beside
them is the sweep's record, from which a sweep that was interrupted goes on.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from evatok import experiment as experiments
from evatok.artifacts import MANIFEST, Artifact, Location, exclusive
from evatok.config import Config, dump, load, parse, problems
from evatok.distributed import cluster
from evatok.distributed.tune import (
    Asha,
    Finished,
    MissingObjectiveError,
    Mode,
    Parameter,
    Report,
    Searcher,
    search,
)
from evatok.errors import UserError
from evatok.experiment import Experiment, experiment_type
from evatok.report.sweep import write_sweep_report
from evatok.stages.stage import Listener, Resources, Stage

Values = dict[str, Any]
WAITING_CPUS = 0.01  # of a trial whose own workers train: Tune refuses a trial that holds nothing
_NO_EVALUATION = " It evaluates nothing: set {0}.train.eval_every and {0}.held_out above 0."


class SweepConfig(Config):
    """A sweep file."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100, description="folder of the sweep"
    )
    storage: str | None = Field(
        default=None,
        min_length=1,
        description="local folder or URI for the sweep and its experiment's run; default: the experiment's",
    )
    experiment: str = Field(description="experiment file, relative to the sweep file")
    set: dict[str, Any] = Field(
        default_factory=dict, description="dotted keys of the experiment, for all trials"
    )
    stages: tuple[str, ...] = Field(default=("router",), min_length=1, description="what each trial runs")
    space: dict[str, Parameter] = Field(
        min_length=1,
        description="dotted keys of the experiment to search; several in one, with commas, get one value",
    )
    objectives: dict[str, Mode] = Field(min_length=1, description="metrics of the last stage: min or max")
    trials: int | None = Field(default=None, ge=1, description="how many in all; a grid has its own number")
    searcher: Searcher = Field(default="random", description="grid: every combination of the choices")
    scheduler: Asha | None = None
    resources: Resources = Field(default=Resources(workers=0), description="what each trial trains with")
    concurrency: int | None = Field(
        default=None,
        ge=1,
        description="trials at once; default: what the cluster has room for when they start. A cluster that "
        "grows with the work needs it",
    )
    seed: int = Field(default=0, ge=0, lt=2**31)

    @model_validator(mode="after")
    def _as_many_trials_as_the_searcher_takes(self) -> SweepConfig:
        if self.searcher != "grid" and self.trials is None:
            raise ValueError("give trials: how many to run in all")
        if self.searcher == "grid" and self.trials is not None:
            raise ValueError("searcher grid runs every combination: leave trials out")
        if self.searcher == "grid" and any(one.choice is None for one in self.space.values()):
            raise ValueError("searcher grid needs a choice for every setting of the space")
        return self

    @property
    def count(self) -> int:
        """Trials in all."""
        return self.trials or math.prod(len(one.ends()) for one in self.space.values())


@dataclass(frozen=True)
class Trial:
    """One trial as the sweep's results show it."""

    name: str
    settings: Values
    metrics: Mapping[str, float]
    state: Literal["done", "stopped", "failed"]


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found.

    ``best``: the best trial, or with several objectives all that no other beats. ``export``: a run's folder
    that holds the shared stages and the best trial's, and goes on with ``evatok run``.
    """

    trials: list[Trial]
    best: tuple[str, ...]
    export: str
    report: str


@dataclass(frozen=True)
class Sweep:
    """A sweep file with its experiment, checked. Paths are absolute: trials run in other processes."""

    config: SweepConfig
    base: Experiment
    location: Location

    def trial(self, values: Values) -> Experiment:
        """The experiment of one trial. Raises UserError when the values do not make one."""
        own = {
            "name": name_of(values),
            "storage": (self.location / "trials").uri,
            "resources": self.config.resources.model_dump(),
        }
        trial = parse(dump(self.base), experiment_type(), self.base.name, _assignments(values | own))
        experiments.check(trial, self.base.name)
        return trial

    @property
    def shared(self) -> list[str]:
        """The stages before the first one that trials run themselves."""
        names = [stage.name for stage in self.base.stages]
        return names[: min(names.index(stage) for stage in self.config.stages)]

    @property
    def last(self) -> Stage:
        """The stage whose metrics are a trial's."""
        return [stage for stage in self.base.stages if stage.name in self.config.stages][-1]


def name_of(values: Values) -> str:
    """A trial's name: a function of its values, so that a trial tried again finds its folder."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def open_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read and check a sweep file, its experiment, and the experiment with every end of the space."""
    config = load(path, SweepConfig, overrides)
    settings = config.set | ({"storage": config.storage} if config.storage else {})
    base = experiments.open_experiment(Path(path).parent / config.experiment, _assignments(settings))
    base = base.model_copy(update={"storage": Location.parse(base.storage).uri})
    sweep = Sweep(config, base, Location.parse(base.storage) / config.name)
    present = [stage.name for stage in base.stages]
    found = [
        ("stages", f"{stage!r} is no stage of {config.experiment}; it has {', '.join(present)}.")
        for stage in config.stages
        if stage not in present
    ]
    if not found:
        found = [*_unknown_objectives(sweep), *_incomparable_objectives(sweep)]
        found += [
            (f"space.{key}", problem)
            for key, parameter in config.space.items()
            if (problem := _problem(sweep, key, parameter))
        ]
    if found:
        raise problems(found, str(path))
    return sweep


def _unknown_objectives(sweep: Sweep) -> Iterator[tuple[str, str]]:
    stage = sweep.last
    if stage.metrics is None:
        return
    known = stage.metrics(getattr(sweep.base, stage.name))
    for name in sweep.config.objectives:
        if name not in known:
            hint = "" if any(one.startswith("eval_") for one in known) else _NO_EVALUATION.format(stage.name)
            listed = ", ".join(known)
            yield f"objectives.{name}", f"is no metric of stage {stage.name!r}, which has {listed}.{hint}"


def _incomparable_objectives(sweep: Sweep) -> Iterator[tuple[str, str]]:
    searched = [key for keys in sweep.config.space for key in keys.split(",")]
    rewards = [key.strip() for key in searched if key.strip().startswith("curate.reward.")]
    for name in sweep.config.objectives:
        if rewards and name.startswith("eval_reward"):
            yield (
                f"objectives.{name}",
                f"does not compare trials whose reward differs, and `space` changes {', '.join(rewards)}. "
                "Use eval_gain, or the two objectives eval_quality and eval_tokens.",
            )


def _problem(sweep: Sweep, key: str, parameter: Parameter) -> str | None:
    before = experiments.fingerprints(sweep.base)
    for value in parameter.ends():
        try:
            after = experiments.fingerprints(sweep.trial({key: value}))
        except UserError as error:
            return str(error)
        for stage in sweep.shared:
            if after[stage] != before[stage]:
                return f"changes stage {stage!r}, which all trials share; add it to `stages`."
    return None


def run(sweep: Sweep, listener: Listener, *, address: str | None = None) -> SweepResult:
    """Run the shared stages and the trials that are still missing, and export the best.

    Raises UserError when the sweep's folder holds trials of another sweep file.
    """
    config, resources = sweep.config, sweep.config.resources
    cpus = max(resources.workers, 1) * resources.cpus_per_worker
    trials = cpus * (1 if resources.workers else 2) + cluster.DATA_CPUS
    needed = max(trials, experiments.logical_cpus(sweep.base.resources))
    with exclusive(sweep.location), cluster.connected(address, cpus=needed) as found:
        experiments.refuse_missing_gpus(resources, found)
        gpus = float(max(resources.workers, 1) * resources.use_gpu)
        _refuse_unknown_concurrency(sweep, found, cpus, gpus)
        _claim(sweep)
        if sweep.shared:
            experiments.run(sweep.base, listener, until=sweep.shared[-1])
        concurrency = config.concurrency or _room(cluster.describe(), cpus, gpus)
        listener.log("tune", f"trials at once: {concurrency}")
        records = _records(sweep)
        finished = [one for one in records if one.state in ("done", "stopped")]
        unfinished = [one.values for one in records if one not in finished]
        own = (WAITING_CPUS, 0.0) if resources.workers else (cpus, gpus)
        search(
            functools.partial(run_trial, sweep),
            config.space,
            config.objectives,
            trials=config.count,
            finished=finished,
            unfinished=unfinished,
            searcher=config.searcher,
            scheduler=config.scheduler,
            seed=config.seed,
            cpus=own[0],
            gpus=own[1],
            concurrency=concurrency,
            on_progress=lambda over: listener.progress("tune", over, config.count, "trials", {}),
            on_end=functools.partial(_record, sweep, listener),
        )
        return _conclude(sweep)


def _refuse_unknown_concurrency(sweep: Sweep, found: cluster.Cluster, cpus: float, gpus: float) -> None:
    if sweep.config.concurrency is None and not found.local and (found.cpus < cpus or found.gpus < gpus):
        raise UserError(
            f"{sweep.config.name}: concurrency: a trial needs {cpus:g} CPUs and {gpus:g} GPUs; the cluster "
            f"has {found.cpus:g} and {found.gpus:g} now. If it grows with the work, say how many trials may "
            "run at once: --set concurrency=N."
        )


def _room(found: cluster.Cluster, cpus: float, gpus: float) -> int:
    """Trials that the cluster has room for, beside what decodes for them; at least 1."""
    fits = (found.cpus - cluster.DATA_CPUS) // cpus
    return max(1, int(min(fits, found.gpus // gpus) if gpus else fits))


def run_trial(sweep: Sweep, values: Values, report: Report) -> Mapping[str, float]:
    """Run one trial's stages in this process; what an earlier attempt finished is kept."""
    experiment = sweep.trial(values)
    listener = _Reporter(report, sweep.last.name)
    base, own = experiments.plan(sweep.base), experiments.plan(experiment)
    artifacts: dict[str, Artifact] = {
        entry.name: Artifact(entry.location, entry.manifest)
        for entry in base
        if entry.manifest is not None and entry.state == "done"
    }
    metrics: Mapping[str, Any] = {}
    with exclusive(experiment.location, patience=24 * 3600.0):
        experiment.location.write_bytes("experiment.yaml", dump(experiment).encode())
        if not experiment.location.exists("trial.json"):
            experiment.location.write_json(
                "trial.json", {"values": values, "metrics": {}, "state": "running"}
            )
        for entry in own:
            if entry.name in sweep.config.stages:
                if entry.state == "done":
                    assert entry.manifest is not None
                    artifacts[entry.name] = Artifact(entry.location, entry.manifest)
                else:
                    artifacts[entry.name] = experiments.run_stage(entry, experiment, artifacts, listener)
                metrics = artifacts[entry.name].manifest.metrics
    missing = [name for name in sweep.config.objectives if name not in metrics]
    if missing:
        raise MissingObjectiveError(
            f"{sweep.config.name}: objectives: {', '.join(missing)} is no metric of stage "
            f"{sweep.last.name!r}. Its metrics: {', '.join(metrics)}."
        )
    return {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}


class _Reporter:
    """Hands the figures of the stage that is searched by to the search."""

    def __init__(self, report: Report, stage: str) -> None:
        self._report, self._stage = report, stage

    def log(self, stage: str, message: str) -> None:
        print(f"{stage:<9} {message}")

    def progress(self, stage: str, done: int, total: int, unit: str, figures: Mapping[str, float]) -> None:
        if stage == self._stage:
            self._report(done, figures)


def _assignments(settings: Mapping[str, Any]) -> list[str]:
    return [
        f"{key.strip()}={json.dumps(value)}" for keys, value in settings.items() for key in keys.split(",")
    ]


def _claim(sweep: Sweep) -> None:
    """Refuse a folder whose trials searched something else; more trials, another searcher are fine."""
    prints = experiments.fingerprints(sweep.base)
    searched = {stage: prints[stage] for stage in (*sweep.shared, *sweep.config.stages)}
    if not sweep.location.exists("sweep.json"):
        sweep.location.write_json("sweep.json", {"searched": searched, "objectives": sweep.config.objectives})
    elif sweep.location.read_json("sweep.json")["searched"] != searched:
        raise UserError(
            f"{sweep.location.uri} holds the trials of another sweep: its experiment was another one.\n"
            "Give this sweep another name (--set name=...), or delete that folder."
        )
    sweep.location.write_bytes("sweep.yaml", dump(sweep.config).encode())


def _records(sweep: Sweep) -> list[Finished]:
    records = []
    for name in (sweep.location / "trials").list():
        location = sweep.location / "trials" / name
        if location.exists("trial.json"):
            record = location.read_json("trial.json")
            records.append(Finished(**record))
    return records


def _record(sweep: Sweep, listener: Listener, trial: Finished) -> None:
    name = name_of(trial.values)
    (sweep.location / "trials" / name).write_json("trial.json", asdict(trial))
    if trial.state == "failed":
        listener.log("tune", f"trial {name} failed: {_reason(trial)}")


def _reason(trial: Finished) -> str:
    return trial.error if trial.mistake else trial.error.strip().rpartition("\n")[2]


def _conclude(sweep: Sweep) -> SweepResult:
    records = _records(sweep)
    trials = [Trial(name_of(one.values), one.values, one.metrics, one.state) for one in records]
    done = [trial for trial in trials if trial.state == "done"]
    if not done:
        failed = [one for one in records if one.state == "failed"]
        why = f". {name_of(failed[0].values)}, the first to fail: {_reason(failed[0])}" if failed else ""
        error = UserError if failed and failed[0].mistake else RuntimeError
        raise error(f"no trial of {sweep.location.uri} came to its end{why}")
    objectives = sweep.config.objectives
    best = front(done, objectives)
    chosen = nearest_to_ideal(best, objectives)
    export = sweep.location / f"best-{chosen.name}"
    _export(sweep, chosen, export)
    summary = {
        "objectives": objectives,
        "trials": [asdict(trial) for trial in trials],
        "best": [trial.name for trial in best],
        "exported": chosen.name,
    }
    sweep.location.write_json("sweep.json", sweep.location.read_json("sweep.json") | summary)
    report = write_sweep_report(sweep.location)
    return SweepResult(trials, tuple(trial.name for trial in best), export.uri, report)


def front(trials: Sequence[Trial], objectives: Mapping[str, Mode]) -> list[Trial]:
    """The trials that no other trial beats in one objective without losing in another."""
    costs = [_costs(trial, objectives) for trial in trials]
    return [
        trial
        for trial, mine in zip(trials, costs, strict=True)
        if not any(other != mine and all(o <= m for o, m in zip(other, mine, strict=True)) for other in costs)
    ]


def nearest_to_ideal(best: Sequence[Trial], objectives: Mapping[str, Mode]) -> Trial:
    """Of a front, the trial closest to having every objective's best value, each scaled to its range."""
    costs = [_costs(trial, objectives) for trial in best]
    lows = [min(column) for column in zip(*costs, strict=True)]
    spans = [max(column) - low or 1.0 for column, low in zip(zip(*costs, strict=True), lows, strict=True)]
    distances = [
        sum(((cost - low) / span) ** 2 for cost, low, span in zip(mine, lows, spans, strict=True))
        for mine in costs
    ]
    return best[distances.index(min(distances))]


def _costs(trial: Trial, objectives: Mapping[str, Mode]) -> list[float]:
    return [trial.metrics[name] * (1 if mode == "min" else -1) for name, mode in objectives.items()]


def _export(sweep: Sweep, trial: Trial, export: Location) -> None:
    """A run of its own out of the shared stages and the trial's, without training checkpoints."""
    for stage in (*sweep.shared, *sweep.config.stages):
        home = sweep.base.location if stage in sweep.shared else sweep.location / "trials" / trial.name
        if not (export / stage).exists(MANIFEST):
            (export / stage).copy(home / stage, skip=("checkpoints",))
    name, _, storage = reversed(export.uri.rpartition("/"))
    own = {"name": name, "storage": storage}
    experiment = parse(dump(sweep.base), experiment_type(), name, _assignments(trial.settings | own))
    export.write_bytes("experiment.yaml", dump(experiment).encode())
