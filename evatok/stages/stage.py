"""What a stage is, and what it is given to run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pydantic import Field

from evatok.artifacts import Artifact, Location
from evatok.config import Config

LABEL = "evatok-group"
"""The Ray node label that names the group of a node (``cluster/``)."""


class Groups(Config):
    """Node groups for the kinds of work; a kind without one runs anywhere."""

    decode: str | None = Field(default=None, description="decoding of clips")
    train: str | None = Field(default=None, description="training workers")
    curate: str | None = Field(default=None, description="curation and other fan-outs over models")

    def selector(self, kind: Literal["decode", "train", "curate"]) -> dict[str, str] | None:
        """The label selector for ``kind``, None where any node will do."""
        group = getattr(self, kind)
        return None if group is None else {LABEL: group}


class Resources(Config):
    """What one run asks of the cluster. Changes how a stage runs, never what it makes."""

    workers: int = Field(
        default=2,
        ge=0,
        description="training workers; the global batch is split over them; 0: in the calling process",
    )
    cpus_per_worker: float = Field(
        default=1, gt=0, description="logical CPUs that each training worker holds"
    )
    cpus_per_task: float = Field(
        default=1, gt=0, description="logical CPUs that a task of curation or evaluation holds"
    )
    use_gpu: bool = Field(default=False, description="one GPU per training worker and per curation task")
    max_failures: int = Field(
        default=3, ge=0, description="dead training workers that are replaced; preempted ones do not count"
    )
    groups: Groups = Field(default=Groups(), description="on a cluster with labelled node groups")


class Listener(Protocol):
    """Whoever shows a stage's progress."""

    def log(self, stage: str, message: str) -> None: ...

    def progress(
        self, stage: str, done: int, total: int, unit: str, figures: Mapping[str, float]
    ) -> None: ...


@dataclass(frozen=True)
class StageContext:
    """Everything ``Stage.run`` may use.

    ``location``: the stage's own folder, empty on a first run, as it was left when a run is resumed.
    ``inputs``: finished stages by name, exactly those the stage declared.
    ``experiment``: the whole experiment's config (for what belongs to a later or earlier stage).
    ``run_id``: one word, the same for every attempt of this stage of this run; names jobs and datasets.
    """

    stage: str
    run_id: str
    location: Location
    inputs: Mapping[str, Artifact]
    config: Any
    experiment: Any
    seed: int
    resources: Resources
    listener: Listener

    def log(self, message: str) -> None:
        """Tell the person who is watching."""
        self.listener.log(self.stage, message)

    def progress(self, done: int, total: int, unit: str, **figures: float) -> None:
        """Report how far the stage is; ``figures`` are shown beside the bar (loss=0.3)."""
        self.listener.progress(self.stage, done, total, unit, figures)


@dataclass(frozen=True)
class Description:
    """What a stage will build and cost, known before anything runs.

    ``models``: parameters by model name. ``compute``: estimated floating-point operations, 0 if unknown.
    ``notes``: lines for the reader of the plan.
    """

    models: Mapping[str, int] = field(default_factory=dict)
    compute: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """A step of an experiment.

    ``config``: type of the stage's section in the experiment file, which bears the stage's name.
    ``run``: does the work, leaves ``outputs`` in ``context.location``, returns the headline metrics.
    Run again after an interruption it goes on from what it left.
    ``inputs``: names of the stages it reads, or a function of its config that gives them.
    ``reads``: dotted keys of the sections of its inputs that it takes from ``context.experiment``; they count
    in its fingerprint as its own config does.
    ``version``: raise it when the code changes what the same config makes.
    ``check``: called with (config, experiment) before anything starts; yields (dotted key, what is wrong and
    what is allowed) for everything that a single field's type cannot say.
    ``weights``: called with its config; names of the pretrained weights that it loads (``evatok.weights``).
    ``describe``: called with (config, experiment); what ``evatok plan`` shows.
    ``metrics``: called with the config; names of the metrics that ``run`` returns and a sweep may search by
    (``eval_`` ones where there are held-out clips). Without it only a run can tell.
    """

    name: str
    config: type[Config]
    run: Callable[[StageContext], dict[str, Any]]
    inputs: tuple[str, ...] | Callable[[Any], tuple[str, ...]] = ()
    reads: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    version: int = 1
    check: Callable[[Any, Any], Iterable[tuple[str, str]]] | None = None
    weights: Callable[[Any], Iterable[str]] | None = None
    describe: Callable[[Any, Any], Description] | None = None
    metrics: Callable[[Any], tuple[str, ...]] | None = None

    def needs(self, config: Any) -> tuple[str, ...]:
        """Names of the stages that this stage reads under ``config``."""
        return self.inputs(config) if callable(self.inputs) else self.inputs

    def settings(self, config: Any) -> tuple[str, ...]:
        """Those of ``reads`` that count under ``config``: a stage that is not read has no say."""
        return tuple(key for key in self.reads if key.split(".")[0] in self.needs(config))
