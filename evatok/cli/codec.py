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
from evatok.assignment.policies import BasePolicy, BudgetedPolicy, Evidence, Policy
from evatok.assignment.space import AssignmentSpace
from evatok.cli.console import Console
from evatok.config import Config, parse
from evatok.errors import UserError
from evatok.experiment import Experiment, open_experiment
from evatok.models.tokenizer import VideoTokenizer
from evatok.models.tokens import Tokens, frame_rate
from evatok.stages.generate import to_bytes
from evatok.stages.sources import policy_sources
from evatok.video.decode import ClipFormat, DecodeError, decode_clip, probe
from evatok.video.index import clip_starts
from evatok.video.write import write_frames

CLIPS_AT_ONCE = 8
FPS = 8.0  # of a token file that does not say
BAR = 6  # pixels of the bar that shows a block's share of the most tokens there are


class PolicyOption(Config):
    policy: Policy


@dataclass(frozen=True)
class Video:
    """A file cut into clips that follow each other; `fps` of their frames."""

    path: str
    form: ClipFormat
    starts: tuple[float, ...]
    fps: float

    def batches(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Some clips at a time, however long the video: the first one's number, uint8 [B, C, F, H, W]."""
        for first in range(0, len(self.starts), CLIPS_AT_ONCE):
            try:
                clips = [
                    decode_clip(self.path, start, self.form)
                    for start in self.starts[first : first + CLIPS_AT_ONCE]
                ]
            except DecodeError as error:
                raise UserError(f"{self.path} cannot be used: {error.detail}") from None
            yield first, torch.from_numpy(np.stack(clips))


@dataclass(frozen=True)
class Codec:
    """A run's final tokenizer on ``device``, and the rate at which it samples frames (0: every frame)."""

    experiment: Experiment
    tokenizer: VideoTokenizer
    fps: float
    device: str

    @classmethod
    def open(cls, args: argparse.Namespace, console: Console) -> Codec:
        experiment = open_experiment(args.experiment, args.overrides)
        console.run = experiment.location
        location = experiment.location / "tokenizer"
        if not location.exists("model"):
            raise UserError(
                f"{experiment.location.uri} has no trained tokenizer:"
                f" run `evatok run {args.experiment}` first"
            )
        index: Any = getattr(experiment, "index")  # noqa: B009  (a section that the file's type adds)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tokenizer = VideoTokenizer.from_artifact(location).to(device).eval()
        return cls(experiment, tokenizer, index.fps, device)

    def wanted(self, args: argparse.Namespace) -> BasePolicy:
        """The policy that the options name, that of the run's own training where they name none."""
        if args.budget is not None:
            if args.policy is not None:
                raise UserError("--budget and --policy exclude each other: a budget is kept by the router")
            return BudgetedPolicy(budget=args.budget)
        if args.policy is None:
            stage: Any = getattr(self.experiment, "tokenizer")  # noqa: B009
            policy: BasePolicy = stage.policy
            return policy
        text = args.policy if args.policy.lstrip().startswith("{") else f"{{kind: {args.policy}}}"
        return parse(f"policy: {text}", PolicyOption, f"--policy {args.policy}").policy

    def assignments(self, video: Video, policy: BasePolicy) -> torch.Tensor:
        """Token counts int64 [N, T] of the video's N clips."""
        manifests = {name: self._artifact(name) for name in ("proxy", "curate", "router")}
        inputs = {name: artifact for name, artifact in manifests.items() if artifact is not None}
        curate: Any = getattr(self.experiment, "curate")  # noqa: B009
        space = AssignmentSpace.of(self.tokenizer)
        sources = policy_sources(inputs, curate, space, [policy]).to(self.device)
        seen = []
        for start, clips in video.batches():
            positions = torch.arange(start, start + len(clips))
            seen.append(policy.observe(clips.to(self.device), positions, sources))
        return policy.assign(Evidence.cat(seen), sources)

    def _artifact(self, name: str) -> Artifact | None:
        location = self.experiment.location / name
        manifest = read_manifest(location)
        return Artifact(location, manifest) if manifest and manifest.state == "done" else None

    def video(self, path: str) -> Video:
        config = self.tokenizer.config
        form = ClipFormat(frames=config.frames, size=config.size, fps=self.fps)
        try:
            info = probe(path)
        except DecodeError as error:
            raise UserError(f"{path} cannot be used: {error.detail}") from None
        starts = clip_starts(info, form, config.frames, None)
        if not starts:
            raise UserError(f"{path} is shorter than one clip of {config.frames} frames")
        return Video(path, form, tuple(starts), self.fps or info.fps)

    @torch.no_grad()
    def encode(self, video: Video, assignment: torch.Tensor) -> Iterator[tuple[torch.Tensor, Tokens]]:
        """The clips of the video, some at a time, with their tokens."""
        for start, clips in video.batches():
            part = assignment[start : start + len(clips)]
            yield clips, self.tokenizer.encode(clips.to(self.device), part).to("cpu")

    @torch.no_grad()
    def decode(self, tokens: Tokens) -> NDArray[np.uint8]:
        """Frames uint8 [C, B * F, H, W] of B clips, one after the other."""
        return in_a_row(to_bytes(self.tokenizer.decode(tokens)))


def encode(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Write a video's tokens."""
    output = output_file(args, args.video, ".safetensors")
    codec = Codec.open(args, console)
    policy, video = codec.wanted(args), codec.video(args.video)
    encoded = codec.encode(video, codec.assignments(video, policy))
    tokens = Tokens.cat([part for _, part in encoded])
    tokens.save(output, codec.tokenizer.codebook, video.fps)
    console.show(f"{_summary(tokens)}: {output}")
    return {"output": str(output), "fps": video.fps, **_figures(tokens)}


def decode(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Write the video of a token file."""
    output = output_file(args, args.tokens, ".mp4", ".gif")
    codec = Codec.open(args, console)
    tokens = Tokens.load(args.tokens, codec.tokenizer.codebook)
    fps = args.fps or frame_rate(args.tokens) or FPS
    sequences = tokens.to_sequences()
    batches = (sequences[i : i + CLIPS_AT_ONCE] for i in range(0, len(sequences), CLIPS_AT_ONCE))
    write_frames(
        output, (f for part in batches for f in frames(codec.decode(Tokens.from_sequences(part)))), fps
    )
    console.show(f"{_summary(tokens)}: {output}")
    return {"output": str(output), "fps": fps, **_figures(tokens)}


def reconstruct(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Write a video beside its reconstruction, with a bar for the tokens of every block."""
    output = output_file(args, f"{Path(args.video).stem}-reconstructed.mp4", ".mp4", ".gif")
    codec = Codec.open(args, console)
    policy, video = codec.wanted(args), codec.video(args.video)
    assignment = codec.assignments(video, policy)
    parts, errors = [], []

    def pictures() -> Iterator[NDArray[np.uint8]]:
        for clips, tokens in codec.encode(video, assignment):
            original, reconstruction = in_a_row(clips.numpy()), codec.decode(tokens)
            error = (original.astype(np.float32) - reconstruction.astype(np.float32)) / 255
            parts.append(tokens)
            errors.append((error**2).mean(dtype=np.float64) * len(clips))
            shares = tokens.lengths.flatten().numpy() / codec.tokenizer.choices[-1]
            yield from frames(with_bar(np.concatenate([original, reconstruction], axis=3), shares))

    write_frames(output, pictures(), video.fps)
    tokens = Tokens.cat(parts)
    psnr = float(-10 * np.log10(max(sum(errors) / len(tokens), 1e-10)))
    console.show(f"{_summary(tokens)}, PSNR {psnr:.2f} dB: {output}")
    return {"output": str(output), "fps": video.fps, "psnr": psnr, **_figures(tokens)}


def output_file(args: argparse.Namespace, source: str, *suffixes: str) -> Path:
    """What ``--output`` names, else a file here that is called like ``source``. UserError if unwritable."""
    output = Path(args.output or Path(source).with_suffix(suffixes[0]).name)
    if output.suffix not in suffixes:
        raise UserError(f"--output {output}: the name of this file ends in {' or '.join(suffixes)}")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}")
    return output


def in_a_row(clips: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Clips [N, C, F, H, W] as one of N * F frames."""
    return np.concatenate(list(clips), axis=1)


def frames(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[C, F, H, W] frame by frame: [F, H, W, C]."""
    return picture.transpose(1, 2, 3, 0)


def with_bar(picture: NDArray[np.uint8], shares: NDArray[np.float64]) -> NDArray[np.uint8]:
    """``picture [C, F, H, W]`` over a bar, as long as the frame's block's share (0 to 1) of the width."""
    channels, frames, _, width = picture.shape
    bar = np.zeros((channels, frames, BAR, width), np.uint8)
    for frame, share in enumerate(np.repeat(shares, frames // len(shares))):
        bar[:, frame, 1:, : round(share * width)] = 220
    return np.concatenate([picture, bar], axis=2)


def _summary(tokens: Tokens) -> str:
    return f"{len(tokens)} clips, {int(tokens.lengths.sum()) / len(tokens):.0f} tokens on average"


def _figures(tokens: Tokens) -> dict[str, Any]:
    lengths: Sequence[Sequence[int]] = tokens.lengths.tolist()
    return {"clips": len(tokens), "tokens": int(tokens.lengths.sum()), "assignments": lengths}
