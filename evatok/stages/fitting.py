"""Training on a stream of clips as a stage: what the tokenizers and the router have in common."""

from __future__ import annotations

from functools import partial

from evatok.stages.stage import StageContext
from evatok.training.loop import TrainConfig
from evatok.training.tasks import Task
from evatok.video.decode import ClipFormat
from evatok.video.index import ClipIndex


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
    Returns the last metrics.
    """
    from evatok.distributed.stream import clip_stream
    from evatok.distributed.train import fit

    resources = context.resources
    workers = max(1, resources.workers)
    shown = min(shown, len(held_out)) // workers * workers
    place = resources.groups.selector("decode")
    whole = form.model_copy(update={"crop": "center", "flip": False})
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
    return fit(
        task,
        config,
        partial(clip_stream, clips, clips.order(context.seed), form, seed=context.seed, label_selector=place),
        location=context.location,
        run_id=context.run_id,
        seed=context.seed,
        workers=resources.workers,
        cpus_per_worker=resources.cpus_per_worker,
        use_gpu=resources.use_gpu,
        label_selector=resources.groups.selector("train"),
        evaluation=evaluation if shown and config.eval_every else None,
        listener=lambda done, total, figures: context.progress(done, total, "steps", **figures),
    )
