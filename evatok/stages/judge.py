"""The tasks of the evaluate stage: they score clips, film them, take features of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from evatok.assignment.policies import BasePolicy, Evidence, Sources, gather
from evatok.assignment.search import brute_force, full
from evatok.assignment.table import RewardRows, to_table
from evatok.metrics.frechet import I3D
from evatok.metrics.pixels import QualityMetric
from evatok.models.tokenizer import VideoTokenizer
from evatok.stages.fanning import ClipReader, fan_out_models
from evatok.stages.stage import StageContext
from evatok.video.decode import ClipFormat
from evatok.video.write import write_video

if TYPE_CHECKING:
    from evatok.distributed.fanout import ShardOutput
    from evatok.distributed.schedule import Shard

CLIPS_PER_TASK = 4  # fixed: how clips are batched decides the last digits, so it must not follow the cluster
ERROR_GAIN = 4  # how many times as bright the error is shown
SHORT_SIDE = 128  # samples are shown at least this large, pixels
PLAYBACK_FPS = 8


@dataclass(frozen=True)
class Setting:
    """A policy at one value of its knob; ``headline``: the value that it is quoted at, if that is given."""

    name: str
    policy: BasePolicy
    headline: bool


@dataclass(frozen=True)
class Judge:
    """What every task needs; travels to the workers once."""

    clips: ClipReader
    tokenizer: VideoTokenizer
    metrics: tuple[QualityMetric, ...]
    sources: Sources
    settings: tuple[Setting, ...]
    features: I3D | None
    device: str

    def __call__(self) -> Judge:
        """In a worker process: move the models to the device."""
        self.sources.to(self.device)
        for network in (self.tokenizer, *self.metrics):
            network.to(self.device).eval()
        if self.features is not None:
            self.features.to(self.device)
        return self

    def read(self, rows: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.bool_], list[dict[str, str]]]:
        """uint8 [B, C, F, H, W] on the device, bool [B] which of them were decoded, and what was wrong.

        Curate decoded them all, but files change. What cannot be decoded is black.
        """
        shape = self.tokenizer.config
        found, clips, rejected = self.clips.read(rows, ClipFormat(frames=shape.frames, size=shape.size))
        there = np.isin(rows, [entry["row"] for entry in found])
        pixels = np.zeros((len(rows), 3, shape.frames, shape.size, shape.size), np.uint8)
        for place, clip in zip(np.flatnonzero(there), clips):
            pixels[place] = clip
        return torch.from_numpy(pixels).to(self.device), there, rejected

    @torch.no_grad()
    def reconstruct(self, clips: Tensor, assignment: Tensor) -> Tensor:
        """clips: [B, C, F, H, W]; assignment: int64 [B, T]. Float in [0, 1] like the clips."""
        return self.tokenizer.decode(self.tokenizer.encode(clips, assignment))


def score_clips(spec: tuple[int, NDArray[np.int64]], judge: Judge) -> ShardOutput:
    """One task: the clips at these rows of the index, the first of which is held-out clip ``start``."""
    from evatok.distributed.fanout import ShardOutput

    start, rows = spec
    clips, there, rejected = judge.read(rows)
    search = full if judge.tokenizer.config.causal else brute_force  # else prefixes share nothing
    quality = search(judge.tokenizer, clips, judge.sources.space, judge.metrics)
    positions = torch.arange(start, start + len(rows))
    evidence = gather(clips, positions, judge.sources, [setting.policy for setting in judge.settings])
    taken = judge.clips.index.take(rows, ("clip_id", "split"))
    table = to_table(
        RewardRows(taken["clip_id"].to_pylist(), torch.from_numpy(rows), taken["split"].to_pylist(), quality)
    )
    for name, column in evidence_columns(evidence).items():
        table = table.append_column(name, column)
    return ShardOutput(table.filter(pa.array(there)), rejected)


def evidence_columns(evidence: Evidence) -> dict[str, pa.Array]:
    """Evidence as it is stored: a list column per tensor [B, ...], in the order of the clips."""
    tensors = {f"losses-{depth}": values for depth, values in enumerate(evidence.losses or ())}
    tensors |= {f"scores-{w_q}": values for w_q, values in evidence.scores.items()}
    if evidence.change is not None:
        tensors["change"] = evidence.change
    columns = {name: pa.array(list(values.double().numpy())) for name, values in tensors.items()}
    return {"position": pa.array(evidence.positions.numpy()), **columns}


def to_evidence(table: pa.Table) -> Evidence:
    """The inverse of ``evidence_columns``."""

    def tensors(kind: str) -> dict[str, Tensor]:
        names = [name for name in table.column_names if name.partition("-")[0] == kind]
        return {name.partition("-")[2]: torch.from_numpy(np.stack(table[name].to_numpy())) for name in names}

    return Evidence(
        positions=torch.from_numpy(table["position"].to_numpy()),
        losses=list(tensors("losses").values()) or None,
        scores={None if w == "None" else float(w): values for w, values in tensors("scores").items()},
        change=tensors("change").get(""),
    )


def film_clip(spec: tuple[int, Sequence[NDArray[np.int64]]], judge: Judge) -> ShardOutput:
    """One task: the original, then per assignment the reconstruction with its error below, as mp4 each."""
    from evatok.distributed.fanout import ShardOutput

    row, assignments = spec
    clip, _, rejected = judge.read(np.array([row]))
    assignment = torch.from_numpy(np.stack(assignments))
    target = clip.float() / 255
    reconstruction = judge.reconstruct(clip.expand(len(assignment), -1, -1, -1, -1), assignment)
    error = ((reconstruction - target).abs() * ERROR_GAIN).clamp(0, 1)
    pictures = [target[0], *torch.cat([reconstruction, error], dim=3)]
    films = [encoded((picture * 255).round().byte().cpu().numpy()) for picture in pictures]
    return ShardOutput(pa.table({"mp4": pa.array(films, pa.binary())}), rejected)


def encoded(picture: NDArray[np.uint8]) -> bytes:
    """uint8 [C, F, H, W] as mp4; enlarged by a whole factor where small, as H.264 halves colour detail."""
    factor = -(-SHORT_SIDE // picture.shape[3])
    large = picture.repeat(factor, axis=2).repeat(factor, axis=3)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.mp4"
        write_video(file, large, PLAYBACK_FPS)
        return file.read_bytes()


def take_features(spec: tuple[NDArray[np.int64], Sequence[NDArray[np.int64]]], judge: Judge) -> ShardOutput:
    """One task: ``features_of`` the clips at these rows under the assignments int64 [B, T] of the spec."""
    from evatok.distributed.fanout import ShardOutput

    rows, assignments = spec
    clips, there, rejected = judge.read(rows)
    table = features_of(clips, [torch.from_numpy(assignment) for assignment in assignments], judge)
    return ShardOutput(table.filter(pa.array(there)), rejected)


def assign_and_take_features(
    spec: tuple[int, NDArray[np.int64], Sequence[BasePolicy]], judge: Judge
) -> ShardOutput:
    """One task: ``features_of`` the clips at these rows, the first of which is clip ``start``, under what the
    policies of the spec assign to them; columns ``tokens-0``, ... hold how many tokens that is.
    """
    from evatok.distributed.fanout import ShardOutput

    start, rows, policies = spec
    clips, there, rejected = judge.read(rows)
    evidence = gather(clips, torch.arange(start, start + len(rows)), judge.sources, policies)
    assignments = [policy.assign(evidence, judge.sources) for policy in policies]
    table = features_of(clips, assignments, judge)
    for number, assignment in enumerate(assignments):
        table = table.append_column(f"tokens-{number}", pa.array(assignment.sum(1).numpy()))
    return ShardOutput(table.filter(pa.array(there)), rejected)


def features_of(clips: Tensor, assignments: Sequence[Tensor], judge: Judge) -> pa.Table:
    """Features of clips and of their reconstructions: columns ``original``, then ``0``, ``1``, ... for the
    assignments int64 [B, T].
    """
    assert judge.features is not None
    columns = {"original": judge.features(clips.float() / 255)}
    for number, assignment in enumerate(assignments):
        columns[str(number)] = judge.features(judge.reconstruct(clips, assignment))
    return pa.table({name: list(x.float().cpu().numpy()) for name, x in columns.items()})


def ranges(clips: int) -> list[tuple[int, int]]:
    """The clips of every task: [start, stop)."""
    return [(start, min(start + CLIPS_PER_TASK, clips)) for start in range(0, clips, CLIPS_PER_TASK)]


def fan_out_over(
    context: StageContext,
    shards: Sequence[Shard],
    work: Callable[[Any, Any], ShardOutput],
    target: str,
    judge: Judge,
    unit: str,
    assignments: int = 0,
) -> None:
    """The shards of this stage, with its resources and progress."""
    fan_out_models(
        context,
        shards,
        work,
        target,
        state=judge,
        unit=unit,
        figures=lambda progress: {"per_second": progress.rate},
        assignments=assignments,
    )
