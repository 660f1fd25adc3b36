"""Training a tokenizer as a stage: what the proxy and the final tokenizer have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from evatok.config import OPERATIONAL, Config
from evatok.losses import LossConfig
from evatok.models.tokenizer import TokenizerConfig, VideoTokenizer
from evatok.stages.stage import Description, StageContext
from evatok.training.loop import TrainConfig
from evatok.training.reconstruction import Assigner, TokenizerTask
from evatok.video.decode import ClipFormat
from evatok.video.index import ClipIndex


class TokenizerTraining(Config):
    """A tokenizer, its losses, its training, and how its clips are cut from the frame."""

    model: TokenizerConfig = TokenizerConfig()
    losses: LossConfig = LossConfig()
    train: TrainConfig
    crop: Literal["center", "random"] = Field("random", description="where a clip's square is cut (LARP)")
    flip: bool = Field(True, description="mirror every second clip (LARP)")
    held_out: Annotated[int, OPERATIONAL] = Field(
        64, ge=0, description="clips of the test split that are reconstructed at every evaluation"
    )

    def problems(self, workers: int) -> Iterator[tuple[str, str]]:
        """(key, what is wrong and what is allowed) for what no single field's type can say."""
        for key, problem in self.train.problems(max(1, workers)):
            yield f"train.{key}", problem


def train_tokenizer(
    context: StageContext,
    config: TokenizerTraining,
    assignments: Callable[[torch.device], Assigner],
) -> dict[str, float]:
    """Train on the index's training clips and leave ``model/`` and ``curves/``; returns the last metrics."""
    from evatok.distributed.stream import clip_stream
    from evatok.distributed.train import fit

    index = ClipIndex.open(context.inputs["index"].location)
    clips, held_out = index.select(split="train"), index.select(split="test")
    form = ClipFormat(frames=config.model.frames, size=config.model.size, crop=config.crop, flip=config.flip)
    whole = form.model_copy(update={"crop": "center", "flip": False})
    workers = context.resources.workers
    shown = min(config.held_out, len(held_out)) // max(1, workers) * max(1, workers)
    return fit(
        TokenizerTask(config.model, config.losses, assignments),
        config.train,
        partial(clip_stream, clips, clips.order(context.seed), form, seed=context.seed),
        location=context.location,
        run_id=context.run_id,
        seed=context.seed,
        workers=workers,
        cpus_per_worker=context.resources.cpus_per_worker,
        use_gpu=context.resources.use_gpu,
        evaluation=partial(
            clip_stream,
            held_out,
            held_out.order(0),
            whole,
            seed=0,
            start=0,
            count=shown,
            rows_per_block=1,
        )
        if shown and config.train.eval_every
        else None,
        listener=lambda done, total, figures: context.progress(done, total, "steps", **figures),
    )


def describe_tokenizer(config: TokenizerTraining, experiment: Any) -> Description:
    """Parameters of the tokenizer without its training-only heads, and what training it computes."""
    with torch.device("meta"):
        model = VideoTokenizer(config.model)
    clips = config.train.steps * config.train.global_batch
    return Description(
        models={"tokenizer": sum(parameter.numel() for parameter in model.parameters())},
        notes=(f"{config.train.steps:,} steps of {config.train.global_batch} clips: {clips:,} clips",),
    )
