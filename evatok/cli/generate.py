"""The command ``generate``: clips of a class, or clips that go on from given frames, as files."""

from __future__ import annotations

import argparse
import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evatok.cli.console import Console
from evatok.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from evatok.models.generator import GeneratorConfig
    from evatok.models.sampling import Requests, SamplingConfig
    from evatok.models.tokenizer import VideoTokenizer
    from evatok.models.tokens import Tokens

GAP = 2  # pixels between the clips of a grid


def command(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Sample, decode and write: one video and one token file per clip, and a grid of all."""
    import torch

    from evatok.experiment import open_experiment
    from evatok.models.generator import Generator
    from evatok.models.sampling import sample
    from evatok.models.sequence import NO_CLASS
    from evatok.models.tokenizer import VideoTokenizer

    if args.count < 1:
        raise UserError(f"--count {args.count}: must be at least 1")
    experiment = open_experiment(args.experiment)
    console.run = experiment.location
    for stage in ("tokenizer", "generator"):
        if not (experiment.location / stage).exists("model"):
            raise UserError(
                f"{experiment.location.uri} has no trained {stage}: run `evatok run {args.experiment}` first,"
                f" with a section {stage!r} in the experiment"
            )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = Generator.from_artifact(experiment.location / "generator").to(device)
    tokenizer = VideoTokenizer.from_artifact(experiment.location / "tokenizer").to(device).eval()
    config = generator.config
    if config.codebook != tokenizer.codebook:
        raise UserError(
            f"the generator was trained on tokens of codebook {config.codebook}, but the tokenizer of"
            f" {experiment.location.uri} has {tokenizer.codebook}: rerun with --redo tokens"
        )
    section = getattr(experiment, "generate", None)
    if (args.precision or (section.precision if section else "fp32")) == "bf16":
        generator.to_bf16()
    requests = wanted(args, config, tokenizer, experiment)
    settings = sampling_settings(args, experiment)
    tokens = sample(generator, requests, settings)
    titles = [config.labels[label] if label != NO_CLASS else "" for label in requests.labels.tolist()]
    folder = Path(args.output or "generated")
    clips = write_clips(folder, args.format, tokenizer, tokens, titles, requests.seeds.tolist())
    grid = folder / f"grid.{args.format}"
    console.show(f"{len(clips)} clips, {tokens.lengths.sum() / len(tokens):.0f} tokens on average: {grid}")
    return {"output": str(folder), "grid": str(grid), "clips": clips}


def wanted(
    args: argparse.Namespace, config: GeneratorConfig, tokenizer: VideoTokenizer, experiment: Any
) -> Requests:
    """What the options ask for: ``count`` clips of every class named, or in all where none is."""
    import torch

    from evatok.models.sampling import Requests
    from evatok.models.sequence import NO_CLASS

    count = args.count
    if config.condition:
        if args.frames is None:
            raise UserError("this generator goes on from given frames: name a video with --frames")
        if args.classes:
            raise UserError("--class: this generator goes on from given frames and knows no classes")
        condition = read_frames(args.frames, tokenizer, experiment, config).repeat(count, 1)
        return Requests.predicting(
            config,
            condition,
            args.seed + torch.arange(count),
            args.budget,
            assignment=assignment(args.assignment, count),
        )
    if args.classes:
        numbers = [class_number(name, config.labels) for name in args.classes for _ in range(count)]
    else:
        numbers = [k % len(config.labels) if config.labels else NO_CLASS for k in range(count)]
    given = None
    if args.frames is not None:
        given = read_blocks(args.frames, args.keep, config.codebook, len(numbers))
    return Requests(
        torch.tensor(numbers),
        args.seed + torch.arange(len(numbers)),
        assignment=assignment(args.assignment, len(numbers)),
        budget=args.budget,
        given=given,
    )


def class_number(name: str, labels: tuple[str, ...]) -> int:
    """A class by its name in any case, or by its number. Raises UserError that offers the nearest names."""
    if not labels:
        raise UserError(f"--class {name}: this generator was trained without classes")
    by_name = {label.lower(): number for number, label in enumerate(labels)}
    if name.lower() in by_name:
        return by_name[name.lower()]
    if name.isdigit() and int(name) < len(labels):
        return int(name)
    near = difflib.get_close_matches(name.lower(), by_name, n=3, cutoff=0.4)
    names = [labels[by_name[key]] for key in near] or list(labels[:5])
    raise UserError(
        f"--class {name}: no such class. {'The nearest are' if near else 'Some are'} {', '.join(names)};"
        f" numbers 0 to {len(labels) - 1} are allowed too."
    )


def assignment(text: str | None, clips: int) -> Any:
    """``"32,0,64,0"`` as int64 ``[clips, T]``; 0 leaves a block to the model."""
    import torch

    if text is None:
        return None
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"--assignment {text}: give one number per block, as in 32,0,64,0 (0: the model chooses)"
        ) from None
    return torch.tensor(counts).repeat(clips, 1)


def sampling_settings(args: argparse.Namespace, experiment: Any) -> SamplingConfig:
    """The experiment's settings, with those of the command line in their place."""
    from evatok.config import parse
    from evatok.models.sampling import SamplingConfig

    section = getattr(experiment, "generate", None)
    settings = section.sampling.model_dump() if section else {}
    for name in ("guidance", "temperature", "top_k", "top_p"):
        if (value := getattr(args, name)) is not None:
            settings[name] = value
    return parse(json.dumps(settings), SamplingConfig, "the options of generate")


def read_frames(path: str, tokenizer: VideoTokenizer, experiment: Any, config: GeneratorConfig) -> Any:
    """Codes int64 ``[1, P]`` of the first frames of a video, for a frame predictor."""
    import torch

    from evatok.stages.tokens import encode_given
    from evatok.video.decode import ClipFormat, DecodeError, decode_clip

    frames = experiment.tokens.given_frames
    form = ClipFormat(frames=frames, size=tokenizer.config.size, fps=experiment.index.fps)
    try:
        clip = decode_clip(path, 0.0, form)
    except DecodeError as error:
        raise UserError(f"--frames {path}: {frames} frames are needed: {error.detail}") from None
    return encode_given(tokenizer, torch.from_numpy(clip)[None].to(tokenizer.device), config.condition)


def read_blocks(path: str, keep: int, codebook: str, clips: int) -> Tokens:
    """The first blocks of the first clip of a token file, once per clip to generate."""
    from evatok.models.tokens import Tokens

    if not path.endswith(".safetensors"):
        raise UserError(
            f"--frames {path}: this generator goes on from tokens, not from frames: encode the video with"
            " `evatok encode` and give the token file (*.safetensors)"
        )
    blocks = Tokens.load(path, codebook).to_sequences()[0]
    if not 1 <= keep <= len(blocks):
        raise UserError(f"--keep {keep}: {path} has {len(blocks)} blocks; 1 to {len(blocks)} are allowed")
    return Tokens.from_sequences([blocks[:keep]] * clips)


def write_clips(
    folder: Path,
    suffix: str,
    tokenizer: VideoTokenizer,
    tokens: Tokens,
    titles: list[str],
    seeds: list[int],
) -> list[dict[str, Any]]:
    """One video and one token file per clip and ``grid.<suffix>``; returns a record per clip."""
    from evatok.models.tokens import Tokens
    from evatok.stages.generate import to_bytes
    from evatok.stages.judge import PLAYBACK_FPS
    from evatok.video.write import write_video

    folder.mkdir(parents=True, exist_ok=True)
    records, pictures = [], []
    for number, (blocks, title, seed) in enumerate(zip(tokens.to_sequences(), titles, seeds)):
        clip = Tokens.from_sequences([blocks])
        pictures.append(to_bytes(tokenizer.decode(clip)[0]))
        video, file = folder / f"clip-{number:03d}.{suffix}", folder / f"clip-{number:03d}.safetensors"
        write_video(video, pictures[-1], PLAYBACK_FPS)
        clip.save(file, tokenizer.codebook)
        records.append(
            {
                "file": str(video),
                "tokens_file": str(file),
                "class": title or None,
                "seed": seed,
                "tokens": len(clip.indices),
                "assignment": clip.lengths[0].tolist(),
            }
        )
    write_video(folder / f"grid.{suffix}", tile(pictures), PLAYBACK_FPS)
    return records


def tile(pictures: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Clips ``[C, F, H, W]`` side by side in rows, about as many rows as columns."""
    import numpy as np

    columns = int(np.ceil(np.sqrt(len(pictures))))
    channels, frames, height, width = pictures[0].shape
    rows = -(-len(pictures) // columns)
    shape = (channels, frames, rows * (height + GAP) - GAP, columns * (width + GAP) - GAP)
    grid = np.full(shape, 255, np.uint8)
    for number, picture in enumerate(pictures):
        top, left = number // columns * (height + GAP), number % columns * (width + GAP)
        grid[:, :, top : top + height, left : left + width] = picture
    return grid
