"""Tokens: the final tokenizer under a policy turns the clip index into the generator's token table.

Leaves ``table/*.parquet`` (see ``training.token_table``), ``vocabulary.json`` (what the numbers mean) and
``rejected.parquet`` (clips that could not be decoded).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from evatok.assignment.policies import Policy, RouterPolicy, Sources, gather
from evatok.assignment.space import AssignmentSpace
from evatok.config import OPERATIONAL, Config
from evatok.errors import UserError
from evatok.models.sequence import NO_CLASS
from evatok.models.tokenizer import VideoTokenizer
from evatok.models.tokens import Tokens
from evatok.stages.fanning import ClipReader, fan_out_models, write_rejected
from evatok.stages.sources import policy_problems, policy_sources, policy_stages
from evatok.stages.stage import Stage, StageContext
from evatok.training.token_table import (
    ROWS,
    SCHEMA,
    VOCABULARY,
    TokenVocabulary,
    mean_tokens,
    to_table,
)
from evatok.video.decode import ClipFormat
from evatok.video.index import ClipIndex
from evatok.video.sources.mixture import part_problems

if TYPE_CHECKING:
    from evatok.distributed.fanout import ShardOutput

ENCODED_AT_ONCE = (
    16  # fixed: how clips are batched decides the last digits, so it must not follow the cluster
)

UNLABELLED = ("folder", "webvid")  # sources whose videos have no classes


class TokensConfig(Config):
    part: str | None = Field(None, description="only this part of a mixture; none: all clips of the index")
    policy: Policy = Field(RouterPolicy(), description="what assigns tokens to every clip")
    passes: int = Field(
        1, ge=1, description="times each training clip is encoded: once plain, then with random crop and flip"
    )
    clips_per_video: int | None = Field(
        None, gt=0, description="training clips of every video that a pass encodes, drawn anew; none: all"
    )
    held_out: int = Field(1000, ge=0, description="clips of the test split that are encoded too, once")
    labels: bool = Field(True, description="keep the clips' classes")
    condition: tuple[int, ...] = Field(
        (), description="frame prediction: assignment of the blocks of the given frames; K600: [512, 128]"
    )
    given_frames: int = Field(5, ge=1, description="frame prediction: frames that are given (K600: 5)")
    clips_per_task: Annotated[int, OPERATIONAL] = Field(64, gt=0, description="a task should take seconds")
    gpu_per_task: Annotated[float, OPERATIONAL] = Field(
        1.0, gt=0, le=1, description="share of a GPU that a task holds, with resources.use_gpu"
    )


@dataclass(frozen=True)
class Encoder:
    """What every task needs; travels to the workers once."""

    clips: ClipReader
    tokenizer: VideoTokenizer
    sources: Sources
    config: TokensConfig
    labels: tuple[str, ...]
    seed: int
    device: str

    def __call__(self) -> Encoder:
        """In a worker process: move the models to the device."""
        self.tokenizer.to(self.device).eval()
        self.sources.to(self.device)
        return self

    def read(
        self, rows: NDArray[np.int64], augmentation: int
    ) -> tuple[list[dict[str, Any]], list[NDArray[np.uint8]], list[dict[str, str]]]:
        """As ``ClipReader.read``; augmentation 0 is the plain clip."""
        shape, moved = self.tokenizer.config, augmentation > 0
        form = ClipFormat(
            frames=shape.frames, size=shape.size, crop="random" if moved else "center", flip=moved
        )
        return self.clips.read(rows, form, lambda row: np.random.default_rng([self.seed, augmentation, row]))

    def assign(self, clips: Tensor, positions: Tensor) -> Tensor:
        """The policy's assignment int64 ``[B, T]`` of clips; a frame predictor's begins with the condition.

        A policy that scores assignments takes the best of those that begin so (paper 4.4).
        """
        policy, condition = self.config.policy, self.config.condition
        if not condition:
            assignment: Tensor = policy.bind(self.sources)(clips, positions).cpu()
            return assignment
        evidence = gather(clips, positions, self.sources, [policy])
        outside = torch.ones(self.sources.space.size, dtype=torch.bool)
        inside = self.sources.space.subtree(condition)
        outside[inside.start : inside.stop] = False
        masked = {key: scores.masked_fill(outside, -torch.inf) for key, scores in evidence.scores.items()}
        assignment = policy.assign(replace(evidence, scores=masked), self.sources).clone()
        if masked and (assignment[:, : len(condition)] != torch.tensor(condition)).any():
            raise UserError(
                f"tokens.policy {policy.kind}: no assignment that begins with {list(condition)} is allowed by"
                " its settings"
            )
        assignment[:, : len(condition)] = torch.tensor(condition)
        return assignment

    def given(self, clips: Tensor) -> Tensor | None:
        """Codes int64 ``[B, P]`` of the given frames alone, None without frame prediction."""
        config = self.config
        if not config.condition:
            return None
        return encode_given(self.tokenizer, clips[:, :, : config.given_frames], config.condition)


def encode_given(tokenizer: VideoTokenizer, frames: Tensor, condition: tuple[int, ...]) -> Tensor:
    """Codes int64 ``[B, P]`` of frames ``[B, C, f, H, W]`` padded with the last one, on the CPU (paper 4.4).

    The tokenizer is causal, so the blocks of the condition do not see what follows them.
    """
    missing = tokenizer.config.frames - frames.shape[2]
    padded = torch.cat((frames, frames[:, :, -1:].expand(-1, -1, missing, -1, -1)), 2)
    rest = tokenizer.blocks - len(condition)
    assignment = torch.tensor([*condition, *[tokenizer.choices[0]] * rest]).repeat(len(frames), 1)
    codes: Tensor = tokenizer.encode(padded, assignment).indices
    return codes.view(len(frames), -1)[:, : sum(condition)].cpu()


def run(context: StageContext) -> dict[str, Any]:
    """Encode all training clips and some held-out ones in Ray tasks; returns the headline metrics."""
    from evatok.distributed.schedule import Shard, shard_ranges

    config: TokensConfig = context.config
    encoder = assemble(context)
    splits = np.asarray(encoder.clips.index.column("split").to_pylist())
    train, test = (np.flatnonzero(splits == split) for split in ("train", "test"))
    drawn = draw_clips(encoder.clips.index, train, config, context.seed)
    held_out = np.random.default_rng(context.seed).permutation(test)[: config.held_out]
    shards = [
        Shard(
            f"{split}-{augmentation:02d}-{start:08d}.parquet", stop - start, (rows[start:stop], augmentation)
        )
        for split, augmentation, rows in [
            *(("train", *batch) for batch in enumerate(drawn)),
            ("test", 0, held_out),
        ]
        for start, stop in shard_ranges(len(rows), config.clips_per_task)
    ]

    done = fan_out_models(context, shards, encode_clips, ROWS, state=encoder)
    rejected = write_rejected(context, done)
    tokenizer = encoder.tokenizer
    vocabulary = TokenVocabulary(
        codes=tokenizer.codes,
        choices=tokenizer.choices,
        blocks=tokenizer.blocks,
        labels=encoder.labels,
        condition=config.condition,
        known_blocks=config.given_frames // tokenizer.config.patch[0] if config.condition else 0,
        codebook=tokenizer.codebook,
    )
    context.location.write_json(VOCABULARY, vocabulary.model_dump(mode="json"))
    return {
        "clips": done.rows,
        "rejected": rejected,
        "classes": len(encoder.labels),
        "mean_tokens": mean_tokens(context.location, "train"),
        "clips_per_second": (done.items - done.kept) / done.seconds,
    }


def draw_clips(
    index: ClipIndex, rows: NDArray[np.int64], config: TokensConfig, seed: int
) -> list[NDArray[np.int64]]:
    """The rows int64 of the index, ascending, that each pass encodes of the training clips ``rows``."""
    if config.clips_per_video is None:
        return [rows] * config.passes
    videos = index.videos()[rows]
    drawn = []
    for augmentation in range(config.passes):
        order = np.random.default_rng([seed, augmentation]).permutation(len(rows))
        order = order[np.argsort(videos[order], kind="stable")]  # video by video, in a random order within
        firsts = np.flatnonzero(np.diff(videos[order], prepend=-1))
        places = np.arange(len(order)) - np.repeat(firsts, np.diff(firsts, append=len(order)))
        drawn.append(np.sort(rows[order[places < config.clips_per_video]]))
    return drawn


def open_clips(context: StageContext) -> ClipIndex:
    """The clips that the generator learns from."""
    index = ClipIndex.open(context.inputs["index"].location).without_images()
    part = context.experiment.tokens.part
    return index if part is None else index.part(part)


def gives_labels(experiment: Any) -> bool:
    """Whether the clips that the generator learns from have classes, as far as their source tells."""
    source, part = experiment.index.source, experiment.tokens.part
    if source.kind != "mixture":
        return source.kind not in UNLABELLED
    kinds = [p.source.kind for name, p in source.parts.items() if part in (None, name) and not p.images]
    return any(kind not in UNLABELLED for kind in kinds)


def assemble(context: StageContext) -> Encoder:
    """The index and the models."""
    config: TokensConfig = context.config
    index = open_clips(context)
    tokenizer = VideoTokenizer.from_artifact(context.inputs["tokenizer"].location)
    space = AssignmentSpace.of(tokenizer)
    return Encoder(
        clips=ClipReader(index),
        tokenizer=tokenizer,
        sources=policy_sources(context.inputs, context.experiment.curate, space, [config.policy]),
        config=config,
        labels=tuple(index.labels()) if config.labels else (),
        seed=context.seed,
        device="cuda" if context.resources.use_gpu else "cpu",
    )


@torch.no_grad()
def encode_clips(spec: tuple[NDArray[np.int64], int], encoder: Encoder) -> ShardOutput:
    """One task: the clips at these rows of the index, in one augmentation."""
    from evatok.distributed.fanout import ShardOutput

    rows, augmentation = spec
    found, clips, rejected = encoder.read(rows, augmentation)
    tables = []
    for start in range(0, len(found), ENCODED_AT_ONCE):
        entries = found[start : start + ENCODED_AT_ONCE]
        batch = torch.from_numpy(np.stack(clips[start : start + ENCODED_AT_ONCE])).to(encoder.device)
        positions = torch.tensor([entry["row"] for entry in entries])
        tokens = encoder.tokenizer.encode(batch, encoder.assign(batch, positions))
        labels = [_number(encoder.labels, entry["label"]) for entry in entries]
        tables.append(
            to_table(
                entries,
                labels,
                Tokens(tokens.indices.cpu(), tokens.lengths.cpu()),
                encoder.given(batch),
                augmentation,
            )
        )
    return ShardOutput(pa.concat_tables(tables) if tables else SCHEMA.empty_table(), rejected)


def _number(labels: tuple[str, ...], label: str | None) -> int:
    return labels.index(label) if label in labels else NO_CLASS


def _check(config: TokensConfig, experiment: Any) -> Iterator[tuple[str, str]]:
    tokenizer = experiment.tokenizer.model
    if tokenizer.quantizer.kind == "residual_vq":
        yield (
            "tokenizer.model.quantizer.kind",
            "residual_vq gives several codes per token, and a generator models one: take vq, fsq or lfq",
        )
    space = AssignmentSpace.of(tokenizer)
    yield from policy_problems("tokens.policy", config.policy, space)
    yield from part_problems("tokens.part", config.part, experiment.index.source)
    if not config.condition:
        return
    given, depth = len(config.condition), tokenizer.patch[0]
    if config.policy.reads_losses:
        yield (
            "tokens.policy",
            f"{config.policy.kind} measures whole clips, and here the first blocks' tokens are given: take"
            " router, budgeted, difference, static, random or uniform",
        )
    if not tokenizer.causal:
        yield "tokens.condition", "frames are given one block at a time, which needs tokenizer.model.causal"
    if unknown := [count for count in config.condition if count not in tokenizer.choices]:
        yield "tokens.condition", f"{unknown} are not among the token choices {list(tokenizer.choices)}"
    if given >= tokenizer.blocks:
        yield (
            "tokens.condition",
            f"gives {given} of {tokenizer.blocks} blocks; at most {tokenizer.blocks - 1}",
        )
    if not (given - 1) * depth < config.given_frames <= given * depth:
        yield (
            "tokens.given_frames",
            f"{config.given_frames} frames do not fill {given} blocks of {depth} frames:"
            f" {(given - 1) * depth + 1} to {given * depth} do",
        )


STAGE = Stage(
    name="tokens",
    config=TokensConfig,
    run=run,
    inputs=lambda config: ("index", *policy_stages(config.policy), "tokenizer"),
    reads=("curate.reward",),
    outputs=(f"{ROWS}/", VOCABULARY, "rejected.parquet"),
    check=_check,
)
