"""What training costs: Ray and the clip stream over the bare loop, and what fewer tokens save.

The first part trains a small tokenizer three times by the same loop with one worker: bare with batches from
memory, under Ray Train with batches from memory, under Ray Train fed by the clip stream. The second part
times encode, decode and a training step of a large one, uniform against adaptive assignments.
"""

from __future__ import annotations

import logging
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from evatok.artifacts import CurveWriter, Location, read_curves, versions
from evatok.assignment.space import AssignmentSpace
from evatok.config import Config
from evatok.losses import LossConfig
from evatok.models.operations import count_operations
from evatok.models.tokenizer import TokenizerConfig, VideoTokenizer
from evatok.training.checkpoint import FolderCheckpoints
from evatok.training.engine import Engine, EngineOptions, World, has_bf16, join_world
from evatok.training.loop import TrainConfig, train
from evatok.training.reconstruction import RandomAssignments, TokenizerTask
from evatok.training.tasks import Batch
from evatok.video.decode import ClipFormat
from evatok.video.index import SCHEMA, ClipIndex, write_index
from evatok.video.synthetic import write_videos

TERMS = LossConfig(perceptual_kind="none", adversarial=0, alignment=0)
WARM_UP = 5
log = logging.getLogger(__name__)

PARTS = ("data", "forward", "backward", "optimizer")


class Settings(Config):
    """What is measured. The defaults take some ten minutes on two cores, most of them at S-B size."""

    loop: TokenizerConfig = Field(
        default=TokenizerConfig(
            size=64, choices=(8, 16, 32, 64, 128), encoder="mini", decoder="mini", latent=64
        ),
        description="tokenizer that Ray's and the stream's cost is measured on",
    )
    loop_batch: int = Field(default=4, gt=0, description="clips per step of the loop")
    loop_steps: int = Field(
        default=25, gt=WARM_UP, description="steps of the loop, the first five not counted"
    )
    adaptive: TokenizerConfig = Field(
        default=TokenizerConfig(), description="tokenizer that the cost of tokens is measured on (S-B)"
    )
    adaptive_clips: int = Field(default=2, gt=0, description="clips of a batch there")
    repeats: int = Field(default=2, gt=0, description="the fastest of so many and one is reported")
    threads: int = Field(default=1, gt=0, description="CPU threads of the training process")


def run(settings: Settings) -> dict[str, Any]:
    """Keys: ``ray_over_bare`` and ``stream_over_bare`` (median step times over the bare loop's, each the
    better of two runs);
    ``adaptive_speedup``, ``adaptive_counted_ratio`` and ``same_mean_speedup``, each with ``encode``,
    ``decode``, ``step``: uniform 1,024 tokens against a ragged batch of mean 774 (and of mean 1,024);
    ``mfu`` (counted operations of the uniform step over its time and a measured matrix product's rate);
    ``peak_memory_bytes``; ``step_seconds``, ``step_shares``, ``clips_per_second``, ``tokens_per_second``;
    ``conditions``."""
    torch.set_num_threads(settings.threads)
    world = join_world()
    with tempfile.TemporaryDirectory() as folder:
        overhead = _overhead(settings, Path(folder))
    figures = _adaptive(settings, world)
    return {
        **overhead,
        **figures,
        "peak_memory_bytes": _peak_memory(world),
        "conditions": {
            "workers": 1,
            "micro_batch": {"loop": settings.loop_batch, "adaptive": settings.adaptive_clips},
            "clip": {"loop": _shape(settings.loop), "adaptive": _shape(settings.adaptive)},
            "precision": "bf16" if has_bf16(world.device) else "fp32",
            "device": torch.cuda.get_device_name() if world.device.type == "cuda" else platform.processor(),
            "threads": settings.threads,
            "versions": versions(),
        },
    }


@dataclass
class _MemoryTask(TokenizerTask):
    """Takes its clips from memory: of the stream it uses the rows' numbers alone."""

    def collate(self, columns: Mapping[str, NDArray[Any]]) -> Batch:
        batch = super().collate(columns)
        noise = torch.Generator().manual_seed(0)
        shape = (16, 3, self.tokenizer.frames, self.tokenizer.size, self.tokenizer.size)
        if not hasattr(self, "_pool"):
            self._pool = torch.randint(0, 256, shape, dtype=torch.uint8, generator=noise)
        return batch | {"clip": self._pool[batch["row"] % len(self._pool)]}


def _overhead(settings: Settings, folder: Path) -> dict[str, Any]:
    from evatok.distributed.cluster import connected
    from evatok.distributed.stream import clip_stream, ordered_stream
    from evatok.distributed.train import fit

    space = AssignmentSpace.of(settings.loop)
    parts = (settings.loop, TERMS, RandomAssignments(space, 0))
    config = TrainConfig(
        steps=settings.loop_steps,
        global_batch=settings.loop_batch,
        log_every=1,
        checkpoint_every=settings.loop_steps,
    )
    index = _index(folder / "clips")
    order = index.order(0)
    form = ClipFormat(frames=settings.loop.frames, size=settings.loop.size)

    def bare(name: str) -> Location:
        location = Location.parse(folder / name)
        task = _MemoryTask(*parts)
        train(
            task,
            config,
            lambda start: _numbered(task, settings.loop_batch, start),
            seed=0,
            checkpoints=FolderCheckpoints(location / "checkpoints"),
            sinks=[CurveWriter(location)],
        )
        return location

    def ray(name: str, task: TokenizerTask, stream: Any) -> Location:
        location = Location.parse(folder / name)
        fit(
            task,
            config,
            stream,
            location=location,
            run_id=name,
            seed=0,
            workers=1,
            cpus_per_worker=settings.threads,
            use_gpu=join_world().device.type == "cuda",  # where the bare loop trains
        )
        return location

    log.info("six trainings of %d steps: bare, Ray, Ray with the stream, and back", settings.loop_steps)
    found: dict[str, list[Location]] = {"bare": [bare("bare-0")]}
    with connected(cpus=settings.threads + 1):
        memory = partial(ordered_stream, order, _row_numbers)
        clips = partial(clip_stream, index, order, form, seed=0)
        # There and back again, so that a machine that slows down or speeds up favours none.
        found["ray"] = [ray("ray-0", _MemoryTask(*parts), memory)]
        found["stream"] = [ray(f"stream-{number}", TokenizerTask(*parts), clips) for number in range(2)]
        found["ray"].append(ray("ray-1", _MemoryTask(*parts), memory))
    found["bare"].append(bare("bare-1"))
    seconds = {way: min(_step_seconds(run, settings) for run in runs) for way, runs in found.items()}
    return {
        "ray_over_bare": seconds["ray"] / seconds["bare"],
        "stream_over_bare": seconds["stream"] / seconds["bare"],
        "step_seconds": seconds,
        "step_shares": {way: _shares(found[way][-1]) for way in ("bare", "stream")},
    }


def _index(folder: Path) -> ClipIndex:
    videos = write_videos(folder, 24, seed=0)
    columns = {
        "clip_id": [video.name for video in videos],
        "uri": [str(folder / video.name) for video in videos],
        "start": [0.0] * len(videos),
        "fps": [0.0] * len(videos),
    }
    missing = {name: pa.nulls(len(videos), SCHEMA.field(name).type) for name in SCHEMA.names}
    location = Location.parse(folder)
    write_index(
        location,
        pa.table(missing | columns).select(SCHEMA.names),
        pa.table({"uri": [], "code": [], "detail": []}),
    )
    return ClipIndex.open(location)


def _row_numbers(positions: NDArray[np.int64], rows: NDArray[np.int64]) -> dict[str, NDArray[np.generic]]:
    return {"row": rows}


def _numbered(task: TokenizerTask, batch: int, start: int) -> Iterator[Batch]:
    while True:
        positions = np.arange(start, start + batch)
        yield task.collate({"position": positions, "row": positions})
        start += batch


def _rows(location: Location) -> list[dict[str, Any]]:
    return read_curves(location)[WARM_UP:]


def _step_seconds(location: Location, settings: Settings) -> float:
    return float(median(settings.loop_batch / row["clips_per_second"] for row in _rows(location)))


def _shares(location: Location) -> dict[str, float]:
    return {part: mean(row[f"time_{part}"] for row in _rows(location)) for part in PARTS}


def _adaptive(settings: Settings, world: World) -> dict[str, Any]:
    config, clips = settings.adaptive, settings.adaptive_clips
    space = AssignmentSpace.of(config)
    middle = config.choices[len(config.choices) // 2 + 1]
    uniform = torch.full((clips, config.blocks), middle)
    whole = config.blocks * middle
    batches = {
        "uniform": uniform,
        "adaptive": _ragged(space, clips, 774 * whole // 1024),
        "same_mean": _ragged(space, clips, whole),
    }
    seconds = _measure(config, batches, settings.repeats, world)
    counted = {name: count_operations(config, lengths.tolist()) for name, lengths in batches.items()}
    kinds = ("encode", "decode", "step")

    def ratios(of: Mapping[str, Any], other: str) -> dict[str, float]:
        return {kind: of["uniform"][kind] / of[other][kind] for kind in kinds}

    operations = {name: {kind: getattr(found, kind) for kind in kinds} for name, found in counted.items()}
    step = seconds["uniform"]["step"]
    return {
        "adaptive_speedup": ratios(seconds, "adaptive"),
        "adaptive_counted_ratio": ratios(operations, "adaptive"),
        "same_mean_speedup": ratios(seconds, "same_mean"),
        "adaptive_mean_tokens": {name: float(a.sum(1).float().mean()) for name, a in batches.items()},
        "mfu": operations["uniform"]["step"] / step / _matmul_rate(world),
        "clips_per_second": clips / step,
        "tokens_per_second": float(uniform.sum()) / step,
        "adaptive_seconds": seconds,
    }


def _ragged(space: AssignmentSpace, clips: int, tokens: int) -> Tensor:
    """Assignments ``[clips, T]`` whose mean total is as near to ``tokens`` as a seeded search finds."""
    draws = space.sample(torch.arange(clips * 20000), seed=0).view(-1, clips, space.blocks)
    return draws[(draws.sum((1, 2)) - clips * tokens).abs().argmin()]


def _measure(
    config: TokenizerConfig, batches: Mapping[str, Tensor], repeats: int, world: World
) -> dict[str, dict[str, float]]:
    """Seconds of encode, decode and a training step under each batch's assignments; they take turns."""
    torch.manual_seed(0)
    clips = len(batches["uniform"])
    shape = (clips, 3, config.frames, config.size, config.size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8).to(world.device)
    model = VideoTokenizer(config)
    options = EngineOptions(0, clips, 1, (0.9, 0.95), 1e-4, 10.0, 0.0, has_bf16(world.device))
    engine = Engine(model, options, world, None)

    def step(assignment: Tensor) -> None:
        with torch.autocast(world.device.type, torch.bfloat16, enabled=options.bf16):
            output = engine.forward(pixels, assignment)
            loss = (output.reconstruction - pixels / 255).abs().mean() + sum(output.losses.values())
        engine.backward(loss)
        engine.step(1e-5)

    seconds: dict[str, dict[str, float]] = {name: {} for name in batches}
    for _ in range(repeats + 1):
        for name, assignment in batches.items():
            log.info("encode, decode and step of the batch %s", name)
            model.eval()
            with torch.autocast(world.device.type, torch.bfloat16, enabled=options.bf16):
                tokens = model.encode(pixels, assignment)
                actions: dict[str, Callable[[], object]] = {
                    "encode": partial(model.encode, pixels, assignment),
                    "decode": partial(model.decode, tokens),
                    "step": partial(step, assignment),
                }
                taken = {}
                for kind, action in actions.items():
                    model.train(kind == "step")
                    taken[kind] = _seconds(action, world)
            best = seconds[name]
            seconds[name] = {kind: min(value, best.get(kind, value)) for kind, value in taken.items()}
    return seconds


def _seconds(action: Callable[[], object], world: World) -> float:
    def wait() -> None:
        if world.device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    begun = time.perf_counter()
    action()
    wait()
    return time.perf_counter() - begun


def _matmul_rate(world: World) -> float:
    """Operations per second of a large square matrix product on this device and precision."""
    size, dtype = (8192, torch.bfloat16) if has_bf16(world.device) else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=world.device, dtype=dtype) for _ in range(2))
    fastest = min(_seconds(lambda: a @ b, world) for _ in range(6))
    return 2 * size**3 / fastest


def _peak_memory(world: World) -> int:
    if world.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _shape(config: TokenizerConfig) -> list[int]:
    return [config.frames, config.size, config.size]
