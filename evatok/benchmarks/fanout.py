"""What Ray costs the curation: the fan-out against plain processes, and a simulated large cluster.

The work is the curate stage's own task (decode, search, publish) at quickstart size with a random proxy.
"""

from __future__ import annotations

import heapq
import logging
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field

from evatok.artifacts import Location
from evatok.config import Config
from evatok.distributed import cluster
from evatok.distributed.fanout import Job, ShardOutput, fan_out, make_shard
from evatok.distributed.schedule import Attempt, Schedule, Shard, shard_ranges
from evatok.metrics.perceptual import load_quality
from evatok.models.layers import TransformerSize
from evatok.models.tokenizer import TokenizerConfig, VideoTokenizer
from evatok.stages.curate import Scorer, score
from evatok.stages.fanning import ClipReader
from evatok.video.index import REJECTED_SCHEMA, SCHEMA, ClipIndex, write_index
from evatok.video.synthetic import write_videos

log = logging.getLogger(__name__)

VIDEOS = 8
BLOCKS = 4
START_SECONDS = 600.0  # a plain process that is not ready by then has died
PROXY = TokenizerConfig(
    size=32,
    choices=(2, 4, 8, 16, 32),
    encoder=TransformerSize(width=96, layers=2, heads=3),
    decoder=TransformerSize(width=128, layers=3, heads=4),
    latent=64,
    align_layer=1,
)


class SimulationConfig(Config):
    """A cluster that is not here. Rates are per attempt."""

    clips: int = Field(default=100_000, gt=0)
    workers: int = Field(default=256, gt=0)
    per_node: int = Field(default=8, gt=0, description="workers that a lost node takes with it")
    straggler_rate: float = Field(default=0.01, ge=0, le=1)
    straggler_factor: float = Field(default=10.0, ge=1, description="times as long as measured")
    failure_rate: float = Field(default=0.005, ge=0, lt=1, description="attempts that fail half way")
    lost_nodes: int = Field(default=4, ge=0, description="over the run, evenly; replaced at once")
    seed: int = 0


class FanoutBenchConfig(Config):
    workers: tuple[int, ...] = Field(default=(1, 2), min_length=1, description="numbers of worker processes")
    clips_per_task: int = Field(default=8, gt=0)
    tasks_per_worker: int = Field(default=8, gt=0)
    rounds: int = Field(default=2, gt=0, description="plain and Ray in turn; the medians are compared")
    empty_tasks: int = Field(default=400, gt=0, description="tasks without work that measure the overhead")
    simulation: SimulationConfig = SimulationConfig()


def run(config: FanoutBenchConfig) -> dict[str, Any]:
    """Seconds for the same shards by plain processes and by Ray tasks, one thread each.

    ``workers.<n>``: ``efficiency`` (plain seconds / Ray seconds), both times, clips per second; ``overhead``:
    milliseconds per task and its share of a measured task; ``simulation``: see ``simulate``.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that start from here
    most = max(config.workers)
    result: dict[str, Any] = {"workers": {}}
    with tempfile.TemporaryDirectory() as folder, cluster.connected(cpus=most) as found:
        scorer = _scorer(Path(folder), most * config.tasks_per_worker * config.clips_per_task)
        place, each = Location.parse(folder), found.cpus / most
        fan_out(_shards(config, most), score, place / "warm", key="k", state=scorer, cpus=each, threads=1)
        task_seconds: list[float] = []
        for workers in config.workers:
            shards = _shards(config, workers)
            plain, with_ray = [], []
            for turn in range(config.rounds):
                log.info("%d processes, round %d", workers, turn + 1)
                target = place / f"{workers}-{turn}"
                plain.append(_plain(Job(score, scorer, target / "plain", "k"), shards, workers))
                cpus = found.cpus / workers
                summary = fan_out(shards, score, target / "ray", key="k", state=scorer, cpus=cpus, threads=1)
                with_ray.append(summary.seconds)
                task_seconds += [record.seconds for record in summary.records]
            ray_seconds, plain_seconds = statistics.median(with_ray), statistics.median(plain)
            result["workers"][str(workers)] = {
                "efficiency": plain_seconds / ray_seconds,
                "plain_seconds": plain_seconds,
                "ray_seconds": ray_seconds,
                "clips_per_second": sum(shard.items for shard in shards) / ray_seconds,
            }
        nothing = [Shard(f"{i:06d}.parquet", 1, i) for i in range(config.empty_tasks)]
        empty = fan_out(nothing, _nothing, place / "empty", key="k", cpus=each)
    measured = statistics.median(task_seconds)
    cost = (most * empty.seconds - empty.busy) / len(empty.records)
    result["overhead"] = {
        "task_seconds": measured,
        "milliseconds_per_task": 1000 * cost,
        "share": cost / measured,
        "tasks_per_second": len(empty.records) / empty.seconds,
    }
    result["simulation"] = simulate(config.simulation, config.clips_per_task, task_seconds)
    return result


def simulate(config: SimulationConfig, clips_per_task: int, task_seconds: Sequence[float]) -> dict[str, Any]:
    """Drive the fan-out's own ``Schedule`` over a simulated cluster.

    ``task_seconds``: measured, of whole shards; drawn at random and scaled by a shard's clips.
    ``efficiency``: ideal seconds (no stragglers, no failures, spread evenly) over the simulated ones;
    ``tail_seconds``: from the first idle worker to the end.
    """
    random = np.random.default_rng(config.seed)
    shards = [Shard(str(a), b - a, None) for a, b in shard_ranges(config.clips, clips_per_task)]
    ideal = statistics.mean(task_seconds) * config.clips / clips_per_task / config.workers
    losses = deque((np.arange(config.lost_nodes) + 0.5) * ideal / max(1, config.lost_nodes))
    schedule = Schedule(shards, retries=3)
    queue: deque[Attempt] = deque()
    running: dict[Attempt, str] = {}
    ends: list[tuple[float, int, Attempt, float]] = []
    now, started, first_idle, given_up = 0.0, 0, 0.0, 0
    while schedule.open:
        while attempt := schedule.start(now, config.workers):
            queue.append(attempt)
        while queue and len(running) < config.workers:
            attempt = queue.popleft()
            seconds = float(random.choice(task_seconds)) * attempt.shard.items / clips_per_task
            if random.random() < config.straggler_rate:
                seconds *= config.straggler_factor
            fails = random.random() < config.failure_rate
            running[attempt] = "failed" if fails else "done"
            started += 1
            heapq.heappush(ends, (now + seconds * (0.5 if fails else 1.0), started, attempt, seconds))
        if not queue and len(running) < config.workers and not first_idle:
            first_idle = now
        if losses and losses[0] <= now:
            losses.popleft()
            for attempt in list(running)[: config.per_node]:
                del running[attempt]
                schedule.lost(attempt)
            continue
        # Between two ends nothing happens but that an attempt becomes a straggler: look again every second.
        if len(running) < config.workers and ends and ends[0][0] > now + 1:
            now += 1
            continue
        now, _, attempt, seconds = heapq.heappop(ends)
        outcome = running.pop(attempt, "")
        if outcome == "failed":
            given_up += not schedule.failed(attempt)
        elif outcome == "done" and schedule.done(attempt, seconds):
            for other in [other for other in running if other.shard is attempt.shard]:
                del running[other]
    return {
        "clips": config.clips,
        "workers": config.workers,
        "seconds": now,
        "ideal_seconds": ideal,
        "efficiency": ideal / now,
        "tail_seconds": now - first_idle,
        "tasks": len(shards),
        "retries": schedule.retried,
        "copies": schedule.copied,
        "given_up": given_up,
    }


def _scorer(folder: Path, clips: int) -> Scorer:
    """The curate task at quickstart size, over an index that repeats a few synthetic videos."""
    videos = write_videos(folder / "videos", VIDEOS, seed=0, blocks=BLOCKS, size=PROXY.size)
    paths = [str(folder / "videos" / video.name) for video in videos]
    rows = [
        {"clip_id": str(i), "uri": paths[i % VIDEOS], "start": 0.0, "fps": 0.0, "frames": PROXY.frames}
        | {"width": PROXY.size, "height": PROXY.size, "split": "train"}
        for i in range(clips)
    ]
    index = Location.parse(folder) / "index"
    write_index(index, pa.Table.from_pylist(rows, SCHEMA), REJECTED_SCHEMA.empty_table())
    torch.manual_seed(0)
    metrics = tuple(load_quality(name) for name in ("dssim", "psnr"))
    return Scorer(ClipReader(ClipIndex.open(index)), VideoTokenizer(PROXY), metrics, "cpu", 1 << 30)


def _shards(config: FanoutBenchConfig, workers: int) -> list[Shard]:
    size = config.clips_per_task
    starts = range(0, workers * config.tasks_per_worker * size, size)
    return [Shard(f"{start:06d}.parquet", size, (np.arange(start, start + size), ())) for start in starts]


def _plain(job: Job, shards: Sequence[Shard], workers: int) -> float:
    """Seconds from when all processes are ready until the last has published its share of the shards."""
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(workers + 1)
    processes = [
        context.Process(target=_plain_worker, args=(job, shards[k::workers], ready)) for k in range(workers)
    ]
    for process in processes:
        process.start()
    ready.wait(timeout=START_SECONDS)
    started = time.monotonic()
    for process in processes:
        process.join()
    seconds = time.monotonic() - started
    if any(process.exitcode for process in processes):
        raise RuntimeError("a plain worker process failed; its traceback is above")
    return seconds


def _plain_worker(job: Job, shards: Sequence[Shard], ready: Barrier) -> None:
    state = job.state() if job.state else None
    ready.wait(timeout=START_SECONDS)
    for shard in shards:
        record = make_shard(job, state, shard)
        if record.failure:
            raise RuntimeError(record.failure)


def _nothing(spec: int, state: None) -> ShardOutput:
    return ShardOutput(pa.table({"n": [spec]}))
