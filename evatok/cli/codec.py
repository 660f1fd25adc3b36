"""The commands ``encode``, ``decode`` and ``reconstruct``: a trained tokenizer on one's own videos."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evatok.artifacts import Artifact, read_manifest
from evatok.assignment.policies import BudgetedPolicy, Policy, RouterPolicy
from evatok.assignment.policies.policy import BasePolicy
from evatok.cli.console import Console
from evatok.config import Config, parse
from evatok.errors import UserError
from evatok.experiment import Experiment, open_experiment
from evatok.models.tokenizer import VideoTokenizer
from evatok.models.tokens import Tokens
from evatok.stages.generate import to_bytes
from evatok.stages.sources import policy_sources
from evatok.video.decode import ClipFormat, DecodeError, decode_clip, probe
from evatok.video.index import clip_starts
from evatok.video.write import write_video

CLIPS_AT_ONCE = 8
BAR = 6  # pixels of the bar that shows a block's share of the most tokens there are


class PolicyOption(Config):
    policy: Policy


@dataclass(frozen=True)
class Codec:
    """A run's final tokenizer and the rate at which it samples frames (0: every frame)."""

    experiment: Experiment
    tokenizer: VideoTokenizer
    fps: float

    @classmethod
    def open(cls, args: argparse.Namespace, console: Console) -> Codec:
        experiment = open_experiment(args.experiment)
        console.run = experiment.location
        location = experiment.location / "tokenizer"
        if not location.exists("model"):
            raise UserError(
                f"{experiment.location.uri} has no trained tokenizer:"
                f" run `evatok run {args.experiment}` first"
            )
        index: Any = getattr(experiment, "index")  # noqa: B009  (a section that the file's type adds)
        return cls(experiment, VideoTokenizer.from_artifact(location).eval(), index.fps)

    def assignments(self, clips: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
        """Token counts int64 [N, T] of uint8 clips [N, C, F, H, W] under the policy that the options name."""
        manifests = {name: self._artifact(name) for name in ("proxy", "curate", "router")}
        inputs = {name: artifact for name, artifact in manifests.items() if artifact is not None}
        reward: Any = getattr(self.experiment, "curate")  # noqa: B009
        sources = policy_sources(inputs, reward.reward)
        with torch.no_grad():
            return wanted(args).bind(sources)(clips)

    def _artifact(self, name: str) -> Artifact | None:
        location = self.experiment.location / name
        manifest = read_manifest(location)
        return Artifact(location, manifest) if manifest and manifest.state == "done" else None

    def clips(self, path: str) -> tuple[NDArray[np.uint8], float]:
        """All clips of a video one after the other, uint8 [N, C, F, H, W], and their frame rate."""
        config = self.tokenizer.config
        form = ClipFormat(frames=config.frames, size=config.size, fps=self.fps)
        try:
            info = probe(path)
            starts = clip_starts(info, form, config.frames, None)
            clips = [decode_clip(path, start, form) for start in starts]
        except DecodeError as error:
            raise UserError(f"{path} cannot be used: {error.detail}") from None
        if not clips:
            raise UserError(f"{path} is shorter than one clip of {config.frames} frames")
        return np.stack(clips), self.fps or info.fps

    @torch.no_grad()
    def encode(self, clips: NDArray[np.uint8], assignment: torch.Tensor) -> Tokens:
        batches = zip(_batches(torch.from_numpy(clips)), _batches(assignment))
        return Tokens.cat([self.tokenizer.encode(batch, tokens) for batch, tokens in batches])

    @torch.no_grad()
    def decode(self, tokens: Tokens) -> NDArray[np.uint8]:
        """Frames uint8 [C, N * F, H, W] of N clips, one after the other."""
        sequences = tokens.to_sequences()
        parts = [
            to_bytes(self.tokenizer.decode(Tokens.from_sequences(sequences[i : i + CLIPS_AT_ONCE])))
            for i in range(0, len(sequences), CLIPS_AT_ONCE)
        ]
        return in_a_row(np.concatenate(parts))


def encode(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Write a video's tokens."""
    codec = Codec.open(args, console)
    clips, fps = codec.clips(args.video)
    tokens = codec.encode(clips, codec.assignments(torch.from_numpy(clips), args))
    output = args.output or str(Path(args.video).with_suffix(".safetensors").name)
    tokens.save(output, codec.tokenizer.codebook)
    console.show(f"{_summary(tokens)}: {output}")
    return {"output": output, "fps": fps, **_figures(tokens)}


def decode(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Write the video of a token file."""
    codec = Codec.open(args, console)
    tokens = Tokens.load(args.tokens, codec.tokenizer.codebook)
    output = args.output or str(Path(args.tokens).with_suffix(".mp4").name)
    write_video(output, codec.decode(tokens), args.fps)
    console.show(f"{_summary(tokens)}: {output}")
    return {"output": output, **_figures(tokens)}


def reconstruct(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Write a video beside its reconstruction, with a bar for the tokens of every block."""
    codec = Codec.open(args, console)
    clips, fps = codec.clips(args.video)
    tokens = codec.encode(clips, codec.assignments(torch.from_numpy(clips), args))
    original, reconstruction = in_a_row(clips), codec.decode(tokens)
    error = (original.astype(np.float32) - reconstruction.astype(np.float32)) / 255
    psnr = float(-10 * np.log10(max(float((error**2).mean()), 1e-10)))
    picture = np.concatenate([original, reconstruction], axis=3)
    shares = tokens.lengths.flatten().numpy() / codec.tokenizer.choices[-1]
    output = args.output or f"{Path(args.video).stem}-reconstructed.mp4"
    write_video(output, with_bar(picture, shares), fps)
    console.show(f"{_summary(tokens)}, PSNR {psnr:.2f} dB: {output}")
    return {"output": output, "fps": fps, "psnr": psnr, **_figures(tokens)}


def wanted(args: argparse.Namespace) -> BasePolicy:
    """The policy that the options name; the router by default."""
    if args.budget is not None:
        if args.policy is not None:
            raise UserError("--budget and --policy exclude each other: a budget is kept by the router")
        return BudgetedPolicy(budget=args.budget)
    if args.policy is None:
        return RouterPolicy()
    text = args.policy if args.policy.lstrip().startswith("{") else f"{{kind: {args.policy}}}"
    return parse(f"policy: {text}", PolicyOption, f"--policy {args.policy}").policy


def in_a_row(clips: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Clips [N, C, F, H, W] as one of N * F frames."""
    return np.concatenate(list(clips), axis=1)


def with_bar(picture: NDArray[np.uint8], shares: NDArray[np.float64]) -> NDArray[np.uint8]:
    """``picture [C, F, H, W]`` over a bar, as long as the frame's block's share (0 to 1) of the width."""
    channels, frames, _, width = picture.shape
    bar = np.zeros((channels, frames, BAR, width), np.uint8)
    for frame, share in enumerate(np.repeat(shares, frames // len(shares))):
        bar[:, frame, 1:, : round(share * width)] = 220
    return np.concatenate([picture, bar], axis=2)


def _batches(items: torch.Tensor) -> Iterator[torch.Tensor]:
    return iter(items.split(CLIPS_AT_ONCE))


def _summary(tokens: Tokens) -> str:
    return f"{len(tokens)} clips, {int(tokens.lengths.sum()) / len(tokens):.0f} tokens on average"


def _figures(tokens: Tokens) -> dict[str, Any]:
    lengths: Sequence[Sequence[int]] = tokens.lengths.tolist()
    return {"clips": len(tokens), "tokens": int(tokens.lengths.sum()), "assignments": lengths}
