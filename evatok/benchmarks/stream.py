"""What the stream costs: clips per second into a worker, against the bare decoder and a DataLoader.

And what prepared clips gain over decoding.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import Field

from evatok.artifacts import Location
from evatok.config import Config
from evatok.distributed import cluster
from evatok.distributed.stream import clip_stream, large_blocks, reading_rate
from evatok.stages.materialize import materialize
from evatok.video.decode import ClipFormat, MediaLimits, decode_clip, probe
from evatok.video.index import REJECTED_SCHEMA, SCHEMA, ClipIndex, clip_starts, write_index
from evatok.video.synthetic import write_videos

log = logging.getLogger(__name__)

FRAMES = 16
SHORT_GROUP, LONG_GROUP = 16, 256  # frames from keyframe to keyframe


class StreamBenchConfig(Config):
    processes: int = Field(default_factory=lambda: len(os.sched_getaffinity(0)), gt=0)
    clips: int = Field(default=2048, gt=0, description="measured in each of the ways")
    warm_up: int = Field(default=512, ge=0, description="clips of the stream before its clock starts")
    batch: int = Field(default=16, gt=0, description="clips per batch of the training worker")
    rounds: int = Field(default=2, gt=0, description="the ways in turn; the medians are compared")
    sizes: tuple[int, ...] = Field(default=(128, 256), description="pixels; the first is the headline")
    videos: int = Field(default=12, gt=0)
    source_size: int = Field(default=256, gt=0, description="height and width of the videos, pixels")
    frames: int = Field(default=256, gt=0, multiple_of=16, description="per video")


@dataclass(frozen=True)
class Case:
    """One kind of clip: `size` pixels, keyframes every `group` frames."""

    size: int
    group: int
    index: ClipIndex

    @property
    def clip_format(self) -> ClipFormat:
        return ClipFormat(frames=FRAMES, size=self.size, crop="random", flip=True)


def run(config: StreamBenchConfig) -> dict[str, Any]:
    """The three ways on the same cores in one run, and the stream of prepared clips.

    `clips_per_second`, `ratio_to_decoder`, `ratio_to_dataloader`: of the stream, for clips of 16 frames of
    the first size from videos with a short group of pictures; `prepared_speedup`: clips per second of the
    stream when its clips were decoded before, over `clips_per_second`. `cases`: the same for every size and
    group, with `decoder`, `dataloader` and `prepared` in clips per second, `first_batch` in seconds.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that start from here
    with tempfile.TemporaryDirectory(prefix="evatok-bench-") as folder:
        indexes = {group: _videos(config, Path(folder), group) for group in (SHORT_GROUP, LONG_GROUP)}
        cases = [Case(size, group, indexes[group]) for size in config.sizes for group in indexes]
        figures = [_measured(config, case) for case in cases]
    headline = {name: figures[0][name] for name in _HEADLINE}
    return {**headline, "processes": config.processes, "cases": figures}


_HEADLINE = ("clips_per_second", "ratio_to_decoder", "ratio_to_dataloader", "prepared_speedup")


def _videos(config: StreamBenchConfig, folder: Path, group: int) -> ClipIndex:
    folder = folder / f"group{group}"
    rows = []
    blocks, size = config.frames // 4, config.source_size
    for video in write_videos(folder, config.videos, seed=0, blocks=blocks, size=size, group=group):
        uri = str(folder / video.name)
        for number, start in enumerate(clip_starts(probe(uri), ClipFormat(frames=FRAMES), FRAMES, None)):
            clip_id = f"{video.name}#{number}"
            rows.append({"clip_id": clip_id, "uri": uri, "start": start, "fps": 0.0, "split": "train"})
    location = Location.parse(folder / "index")
    write_index(location, pa.Table.from_pylist(rows, SCHEMA), REJECTED_SCHEMA.empty_table())
    return ClipIndex.open(location)


def _measured(config: StreamBenchConfig, case: Case) -> dict[str, Any]:
    bare, loader, stream, first, prepared = [], [], [], [], []
    for turn in range(config.rounds):
        log.info("%d pixels, a keyframe every %d frames, round %d", case.size, case.group, turn + 1)
        bare.append(_decoder_rate(config, case))
        loader.append(_dataloader_rate(config, case))
        rate, seconds = _stream_rate(config, case, case.clip_format)
        stream.append(rate)
        first.append(seconds)
        prepared.append(_prepared_rate(config, case))
    rate = statistics.median(stream)
    return {
        "clip": f"{FRAMES}x{case.size}x{case.size}",
        "group": case.group,
        "clips_per_second": rate,
        "decoder": statistics.median(bare),
        "dataloader": statistics.median(loader),
        "ratio_to_decoder": rate / statistics.median(bare),
        "ratio_to_dataloader": rate / statistics.median(loader),
        "prepared": statistics.median(prepared),
        "prepared_speedup": statistics.median(prepared) / rate,
        "first_batch": statistics.median(first),
    }


def _decoder_rate(config: StreamBenchConfig, case: Case) -> float:
    """(a): the decoder looped in as many processes, each over its share of the clips."""
    context = multiprocessing.get_context("spawn")
    ready, done = context.Barrier(config.processes + 1), context.Barrier(config.processes + 1)
    children = [
        context.Process(target=_decode_share, args=(config, case, number, ready, done), daemon=True)
        for number in range(config.processes)
    ]
    for child in children:
        child.start()
    ready.wait(timeout=300)
    started = time.perf_counter()
    done.wait(timeout=600)
    seconds = time.perf_counter() - started
    for child in children:
        child.join()
    return config.clips / seconds


def _decode_share(config: StreamBenchConfig, case: Case, number: int, ready: Any, done: Any) -> None:
    clips = _Clips(config, case)
    clips[0]
    ready.wait(timeout=300)
    for position in range(number, config.clips, config.processes):
        clips[position]
    done.wait(timeout=600)


class _Clips(torch.utils.data.Dataset[NDArray[np.uint8]]):
    """The clips at the first positions of the order, decoded where they are asked for."""

    def __init__(self, config: StreamBenchConfig, case: Case) -> None:
        self.clip_format = case.clip_format
        rows = case.index.order(0).rows(0, config.clips)
        taken = case.index.take(rows)
        self.clips = list(zip(taken["uri"].to_pylist(), taken["start"].to_pylist()))

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, position: int) -> NDArray[np.uint8]:
        return decode_clip(*self.clips[position], self.clip_format, np.random.default_rng((0, position)))


def _dataloader_rate(config: StreamBenchConfig, case: Case) -> float:
    """(b): a plain DataLoader with the same decoder in as many worker processes."""
    loader = torch.utils.data.DataLoader(
        _Clips(config, case),
        batch_size=config.batch,
        num_workers=config.processes,
        prefetch_factor=2,
        persistent_workers=True,
        multiprocessing_context="spawn",
    )
    sum(len(batch) for batch in loader)  # starts the workers
    started = time.perf_counter()
    clips = sum(len(batch) for batch in loader)
    return clips / (time.perf_counter() - started)


def _prepared_rate(config: StreamBenchConfig, case: Case) -> float:
    """As `_stream_rate`, of clips decoded before, in the first round, and cut from the center as they are.

    The other ways crop at random, for which prepared clips do not serve.
    """
    fixed = case.clip_format.model_copy(update={"crop": "center"})
    with cluster.connected(cpus=config.processes):
        materialize(case.index.location, FRAMES, case.size, MediaLimits())
    return _stream_rate(config, case, fixed)[0]


def _stream_rate(config: StreamBenchConfig, case: Case, clip_format: ClipFormat) -> tuple[float, float]:
    """Clips per second of the stream into a worker once it flows, and seconds to its first batch."""
    with cluster.connected(cpus=config.processes):
        dataset = clip_stream(
            case.index,
            case.index.order(0),
            clip_format,
            start=0,
            seed=0,
            **large_blocks(config.warm_up + config.clips, 1, config.batch),
        )
        return reading_rate(dataset, config.batch, config.warm_up)
