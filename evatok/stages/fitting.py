"""Training as a stage: what the stages that train have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from evatok.errors import UserError
from evatok.stages.stage import StageContext
from evatok.training.loop import TrainConfig
from evatok.training.tasks import Task
from evatok.video.decode import ClipFormat
from evatok.video.index import ClipIndex

if TYPE_CHECKING:
    from evatok.distributed.train import Stream


def fit_on_clips(
    context: StageContext,
    task: Task,
    config: TrainConfig,
    *,
    clips: ClipIndex,
    held_out: ClipIndex,
    shown: int,
    form: ClipFormat,
) -> dict[str, float]:
    """Train ``task`` on ``clips`` cut as ``form`` says; leaves ``model/`` and ``curves/``.

    At most ``shown`` clips of ``held_out``, cut from the centre, are evaluated as often as ``config`` says.
    Returns the last headline metrics. UserError where there is no clip to train on.
    """
    from evatok.distributed.stream import clip_stream

    if not len(clips):
        raise UserError(
            f"{context.stage}: {clips.location.uri} has no clip of the split train; give more videos, or keep"
            " fewer for tests (index.test_fraction)"
        )
    resources = context.resources
    workers = max(1, resources.workers)
    shown = min(shown, len(held_out)) // workers * workers
    place = resources.groups.selector("decode")
    whole = form.model_copy(update={"crop": "center", "flip": False})
    evaluation = None
    if shown and config.eval_every:
        evaluation = partial(
            clip_stream,
            held_out,
            held_out.order(0),
            whole,
            seed=0,
            start=0,
            count=shown,
            rows_per_block=1,
            label_selector=place,
        )
    stream = partial(
        clip_stream,
        clips,
        clips.order(context.seed, config.global_batch),
        form,
        seed=context.seed,
        label_selector=place,
    )
    return fit_stage(context, task, config, stream, evaluation)


def fit_stage(
    context: StageContext,
    task: Task,
    config: TrainConfig,
    stream: Stream,
    evaluation: Callable[[], Any] | None,
) -> dict[str, float]:
    """``fit`` into the stage's folder, with the run's resources and node group; returns headline metrics."""
    from evatok.distributed.train import fit

    resources = context.resources
    last = fit(
        task,
        config,
        stream,
        location=context.location,
        run_id=context.run_id,
        seed=context.seed,
        workers=resources.workers,
        cpus_per_worker=resources.cpus_per_worker,
        use_gpu=resources.use_gpu,
        label_selector=resources.groups.selector("train"),
        evaluation=evaluation,
        max_failures=resources.max_failures,
        listener=lambda done, total, figures: context.progress(
            done, total, "steps", **headline(task, figures)
        ),
    )
    return headline(task, last)


def headline(task: Task, figures: Mapping[str, float]) -> dict[str, float]:
    """Of a point of the curves, what a person wants to see at a glance."""
    shown = {"loss", "clips_per_second", *task.watched}
    return {name: value for name, value in figures.items() if name in shown or name.startswith("eval_")}


def metric_names(evaluated: Sequence[str]) -> tuple[str, ...]:
    """Names in ``headline`` whatever the data, of a training that evaluates ``evaluated``."""
    return ("loss", "clips_per_second", *(f"eval_{name}" for name in evaluated))


def train_problems(
    stage: str, config: TrainConfig, experiment: Any, metrics: Sequence[str], *, recomputes: bool = False
) -> Iterator[tuple[str, str]]:
    """(dotted key, problem) of everything wrong with a stage's ``train`` section under the run's workers.

    ``metrics``: as ``metric_names`` gives them. ``recomputes``: whether the model can run layers again.
    """
    for key, problem in config.problems(max(1, experiment.resources.workers)):
        yield f"{stage}.train.{key}", problem
    if config.recompute and not recomputes:
        yield f"{stage}.train.recompute", "this model has no layers that it can run again; set it false"
    scores = [name for name in metrics if name == "loss" or (name.startswith("eval_") and config.eval_every)]
    score = config.keep_by.partition(" ")[2]
    if score and score not in scores:
        yield (
            f"{stage}.train.keep_by",
            f"{score} is not measured; allowed are {', '.join(scores)}"
            + ("" if config.eval_every else ", and eval_ ones where train.eval_every is above 0"),
        )
