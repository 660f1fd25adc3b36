"""What the tasks of the evaluate stage do with clips: score them, film them, take features of them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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
from evatok.stages.fanning import ClipReader
from evatok.video.decode import ClipFormat
from evatok.video.write import write_video

if TYPE_CHECKING:
    from evatok.distributed.fanout import ShardOutput

ERROR_GAIN = 4  # how many times as bright the error is shown
SHORT_SIDE = 128  # samples are shown at least this large, pixels
PLAYBACK_FPS = 8


@dataclass(frozen=True)
class Setting:
    """A policy at one value of its knob; ``headline``: the value that it is quoted at."""

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
    """One task: features of the clips at these rows and of their reconstructions.

    Columns ``original``, then ``0``, ``1``, ... for the assignments int64 [B, T] of the spec.
    """
    from evatok.distributed.fanout import ShardOutput

    rows, assignments = spec
    clips, there, rejected = judge.read(rows)
    assert judge.features is not None
    columns = {"original": judge.features(clips.float() / 255)}
    for number, assignment in enumerate(assignments):
        reconstruction = judge.reconstruct(clips, torch.from_numpy(assignment))
        columns[str(number)] = judge.features(reconstruction)
    table = pa.table({name: list(x.float().cpu().numpy()) for name, x in columns.items()})
    return ShardOutput(table.filter(pa.array(there)), rejected)
