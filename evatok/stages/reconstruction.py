"""Training a tokenizer as a stage: what the proxy and the final tokenizer have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from evatok.config import OPERATIONAL, Config
from evatok.losses import LossConfig
from evatok.models.discriminators import TransformerAdversaryConfig, VideoMaeAdversaryConfig
from evatok.models.teachers import model_settings
from evatok.models.tokenizer import TokenizerConfig, VideoTokenizer
from evatok.stages.fitting import fit_on_clips, metric_names, train_problems
from evatok.stages.stage import Description, StageContext
from evatok.training.loop import TrainConfig
from evatok.training.reconstruction import Assigner, TokenizerTask, evaluated
from evatok.video.decode import ClipFormat
from evatok.video.index import ClipIndex
from evatok.video.sources.mixture import image_parts


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


def tokenizer_problems(stage: str, config: TokenizerTraining, experiment: Any) -> Iterator[tuple[str, str]]:
    """(dotted key, problem) of what the sections of a tokenizer's training say of each other."""
    yield from train_problems(stage, config.train, experiment, tokenizer_metrics(config), recomputes=True)
    yield from _model_problems(stage, config)
    frames, size, terms = config.model.frames, config.model.size, config.losses
    if terms.adversarial and isinstance(terms.adversary, TransformerAdversaryConfig):
        patch = terms.adversary.patch
        for name, extent, step in zip(("frames", "size", "size"), (frames, size, size), patch):
            if extent % step:
                yield (
                    f"{stage}.losses.adversary.patch",
                    f"{list(patch)} does not tile a clip: model.{name}, which is {extent}, must be a multiple"
                    f" of {step}",
                )
                break
        else:
            depth = config.model.patch[0]
            if depth % patch[0] and image_parts(experiment.index.source):
                yield (
                    f"{stage}.losses.adversary.patch",
                    f"{list(patch)} does not tile an image, which is one block of {depth} frames"
                    " (model.patch): its frames must divide that",
                )
    if frames > experiment.index.frames:
        yield (
            f"{stage}.model.frames",
            f"{frames} frames are more than the {experiment.index.frames} of a clip (index.frames)",
        )
    count = terms.perceptual_frames
    if terms.perceptual and terms.perceptual_kind != "none" and count and frames % count:
        yield (
            f"{stage}.losses.perceptual_frames",
            f"{count} does not divide the clip's frames, which are {frames}; leave it out to compare all",
        )


def _model_problems(stage: str, config: TokenizerTraining) -> Iterator[tuple[str, str]]:
    """What does not fit the pretrained models of the losses, as far as they are here."""
    terms, depth = config.losses, config.model.patch[0]
    teacher = model_settings(terms.teacher.source) if terms.alignment else None
    if teacher is not None and depth % (tubelet := teacher.get("tubelet_size", 2)):
        yield (
            f"{stage}.model.patch",
            f"a block of {depth} frames is no multiple of the teacher's tubelet, {tubelet} frames;"
            " set losses.alignment 0 or take another patch",
        )
    if not terms.adversarial or not isinstance(terms.adversary, VideoMaeAdversaryConfig):
        return
    network = model_settings(terms.adversary.source)
    layers = None if network is None else network.get("num_hidden_layers", 12)
    if layers is not None and (wrong := [tap for tap in terms.adversary.taps if not 0 <= tap <= layers]):
        yield f"{stage}.losses.adversary.taps", f"{wrong}: the network has hidden states 0 to {layers}"


def train_tokenizer(
    context: StageContext,
    config: TokenizerTraining,
    assignments: Callable[[torch.device], Assigner],
) -> dict[str, float]:
    """Train on the index's training clips and leave ``model/`` and ``curves/``; returns the last metrics."""
    index = ClipIndex.open(context.inputs["index"].location)
    return fit_on_clips(
        context,
        TokenizerTask(config.model, config.losses, assignments),
        config.train,
        clips=index.select(split="train"),
        held_out=index.select(split="test"),  # which has no images
        shown=config.held_out,
        form=ClipFormat(
            frames=config.model.frames, size=config.model.size, crop=config.crop, flip=config.flip
        ),
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


def tokenizer_metrics(config: TokenizerTraining) -> tuple[str, ...]:
    """``Stage.metrics`` of a stage that trains a tokenizer."""
    return metric_names(evaluated(config.losses) if config.held_out and config.train.eval_every else ())
