"""Curate: the quality of every assignment of many clips under the proxy (paper section 3.2).

Leaves ``table/*.parquet`` (see ``assignment.table``), ``statistics.json`` (mean and deviation of every metric
over the training clips and all assignments, eq. 6 and 7) and ``rejected.parquet`` (clips that could not be
decoded). Rewards are computed from the table where they are needed: another ``reward`` redoes nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import Field

from evatok.artifacts import Location
from evatok.assignment.reward import RewardStatistics, RewardWeights, reward
from evatok.assignment.search import full
from evatok.assignment.space import AssignmentSpace
from evatok.assignment.table import RewardRows, RewardTable, side_by_side, to_table
from evatok.config import OPERATIONAL, Config
from evatok.errors import UserError
from evatok.metrics.perceptual import load_quality, pretrained
from evatok.metrics.pixels import QualityMetric
from evatok.models.tokenizer import VideoTokenizer
from evatok.stages.fanning import ClipReader, fan_out_models, write_rejected
from evatok.stages.stage import Description, Stage, StageContext
from evatok.video.decode import ClipFormat
from evatok.video.index import ClipIndex

if TYPE_CHECKING:
    from evatok.distributed.fanout import Progress, ShardOutput

MOST_ASSIGNMENTS = 20_000
"""Of a clip; above it, a clip takes minutes to hours and 80 kB per metric."""

Quality = Literal["lpips", "lpips-vgg", "lpips-squeeze", "psnr", "mse", "ssim", "dssim"]


class CurateClips(Config):
    """How many clips of each split are scored, drawn at random; all of them where the index has fewer."""

    train: int = Field(default=100_000, gt=0, description="clips the router learns from (paper 3.2)")
    test: int = Field(default=1_000, ge=0, description="held-out clips that policies are judged on")


class RewardConfig(Config):
    """The metric that the reward takes its quality from, and what quality is worth (eq. 3)."""

    quality: Quality = "lpips"
    w_q: float = Field(
        default=1.2, ge=0, le=2, description="weight of quality; length weighs 2 - w_q (4.2, 4.3)"
    )

    @property
    def weights(self) -> RewardWeights:
        return RewardWeights(self.w_q)


class CurateConfig(Config):
    clips: CurateClips = CurateClips()
    metrics: tuple[Quality, ...] = Field(
        default=("lpips", "psnr", "mse"), min_length=1, description="recorded (3.2); lpips is AlexNet's"
    )
    reward: Annotated[RewardConfig, OPERATIONAL] = RewardConfig()
    clips_per_task: Annotated[int, OPERATIONAL] = Field(
        default=8, gt=0, description="a task should take seconds"
    )
    least_tasks: Annotated[int, OPERATIONAL] = Field(
        default=64,
        gt=0,
        description="with fewer clips than this, each clip's assignments are split over tasks",
    )
    gpu_per_task: Annotated[float, OPERATIONAL] = Field(
        default=1.0, gt=0, le=1, description="share of a GPU that a task holds, with resources.use_gpu"
    )
    memory_gib: Annotated[float | None, OPERATIONAL] = Field(
        default=None,
        gt=0,
        description="limit of a task on the keys and values it holds of prefixes, GiB; default: half of what"
        " is free of its share of a GPU, 1 on a CPU",
    )


@dataclass(frozen=True)
class Part:
    """What one task scores: clips [start, stop) of the drawn ones, assignments that begin with ``prefix``."""

    start: int
    stop: int
    prefix: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        prefix = "".join(f"-{tokens}" for tokens in self.prefix)
        return f"{self.start:08d}-{self.stop:08d}{prefix}.parquet"


@dataclass(frozen=True)
class Scorer:
    """What every task needs; travels to the workers once.

    ``memory``: limit on the keys and values of prefixes, bytes; 0: decided on the worker, where a task
    holds ``share`` of a GPU.
    """

    clips: ClipReader
    proxy: VideoTokenizer
    metrics: tuple[QualityMetric, ...]
    device: str
    memory: int = 0
    share: float = 1.0

    @property
    def space(self) -> AssignmentSpace:
        return AssignmentSpace.of(self.proxy)

    @property
    def form(self) -> ClipFormat:
        return ClipFormat(frames=self.proxy.config.frames, size=self.proxy.config.size)

    def __call__(self) -> Scorer:
        """In a worker process: move the models to the device, then see what memory is left."""
        self.proxy.to(self.device).eval()
        for metric in self.metrics:
            metric.to(self.device)
        return replace(self, memory=self.memory or spare_memory(self.device, self.share))


def spare_memory(device: str, share: float) -> int:
    """Bytes that a task with ``share`` of the device may keep: half of its part of what is free on a GPU."""
    if device == "cpu":
        return 1 << 30
    free, _ = torch.cuda.mem_get_info()
    return int(free * share) // 2


def run(context: StageContext) -> dict[str, Any]:
    """Score all assignments of the drawn clips in Ray tasks; returns the headline metrics."""
    from evatok.distributed.schedule import Shard

    config: CurateConfig = context.config
    scorer = Scorer(
        clips=ClipReader(ClipIndex.open(context.inputs["index"].location)),
        proxy=VideoTokenizer.from_artifact(context.inputs["proxy"].location),
        metrics=tuple(load_quality(name) for name in config.metrics),
        device="cuda" if context.resources.use_gpu else "cpu",
        memory=round(config.memory_gib * 2**30) if config.memory_gib else 0,
        share=config.gpu_per_task,
    )
    space = scorer.space
    rows = draw(scorer.clips.index, config.clips, context)
    parts = divide(len(rows), *_task_sizes(context), space)
    split = any(part.prefix for part in parts)

    def figures(progress: Progress) -> dict[str, float]:
        return {
            "assignments_per_second": progress.rate * space.size,
            "retries": progress.retries,
            "rejected": progress.rejected,
        }

    done = fan_out_models(
        context,
        [
            Shard(
                part.name,
                (part.stop - part.start) * len(space.subtree(part.prefix)),
                (rows[part.start : part.stop], part.prefix),
            )
            for part in parts
        ],
        score,
        "parts" if split else "table",
        state=scorer,
        figures=figures,
        parts=space.size,  # so that the parts of a clip count, too
        assignments=space.size,
    )
    if split:
        join_parts(context.location, parts)
    rejected = write_rejected(context, done)
    table = RewardTable.open(context.location / "table")
    statistics = {
        name: RewardStatistics.measure(_column(table, name, "train"), space) for name in config.metrics
    }
    write_statistics(context.location, statistics, space)
    context.location.delete("parts")
    fresh = done.items - done.kept
    return {
        "clips": len(table),
        "rejected": rejected,
        "assignments_per_second": fresh / done.seconds,
        "clips_per_second": fresh / done.seconds / space.size,
        "task_seconds": done.busy,
        "retries": done.retries,
        **headlines(table, space, config.reward, statistics[config.reward.quality]),
    }


def draw(index: ClipIndex, clips: CurateClips, context: StageContext) -> NDArray[np.int64]:
    """Rows of the index, training clips first, in ascending order within a split."""
    chosen, videos = [], index.without_images()
    for stream, (split, wanted) in enumerate((("train", clips.train), ("test", clips.test))):
        view = videos.select(split=split)
        if len(view) < wanted:
            context.log(
                f"the index has {len(view)} {split} clips, fewer than curate.clips.{split} = {wanted}"
            )
        random = np.random.default_rng([context.seed, stream])
        kept = np.sort(random.choice(len(view), min(wanted, len(view)), replace=False))
        chosen.append(view.selected[kept] if view.selected is not None else kept)
    if not len(chosen[0]):
        raise UserError(f"{index.location.uri} has no clips of the split train: nothing to curate")
    return np.concatenate(chosen)


def _task_sizes(context: StageContext) -> tuple[int, int]:
    """``clips_per_task, least_tasks`` as they were when this stage began: finished shards fit no others."""
    if not context.location.exists("tasks.json"):
        config: CurateConfig = context.config
        context.location.write_json("tasks.json", [config.clips_per_task, config.least_tasks])
    per_task, least = context.location.read_json("tasks.json")
    return per_task, least


def divide(clips: int, per_task: int, least_tasks: int, space: AssignmentSpace) -> list[Part]:
    """Cut the drawn clips into tasks; where there are too few, cut their assignments too.

    A function of its arguments alone, so that a rerun finds the shards of the run before it.
    """
    from evatok.distributed.schedule import shard_ranges

    depth = 0
    while clips * len(space.choices) ** depth < least_tasks and depth < space.blocks - 1:
        depth += 1
    size = min(per_task, max(1, clips // least_tasks))
    prefixes = list(itertools.product(space.choices, repeat=depth))
    return [Part(start, stop, prefix) for start, stop in shard_ranges(clips, size) for prefix in prefixes]


def score(spec: tuple[NDArray[np.int64], tuple[int, ...]], scorer: Scorer) -> ShardOutput:
    """One task: the clips at these rows of the index, the assignments that begin with the prefix."""
    from evatok.distributed.fanout import ShardOutput

    rows, prefix = spec
    found, clips, rejected = scorer.clips.read(rows, scorer.form)
    if clips:
        batch = torch.from_numpy(np.stack(clips)).to(scorer.device)
        quality = full(scorer.proxy, batch, scorer.space, scorer.metrics, prefix=prefix, memory=scorer.memory)
    else:
        width = len(scorer.space.subtree(prefix))
        quality = {metric.name: torch.empty(0, width) for metric in scorer.metrics}
    table = to_table(
        RewardRows(
            clip_id=[clip["clip_id"] for clip in found],
            row=torch.tensor([clip["row"] for clip in found], dtype=torch.int64),
            split=[clip["split"] for clip in found],
            quality=quality,
        )
    )
    return ShardOutput(table, rejected)


def join_parts(location: Location, parts: list[Part]) -> None:
    """Publish ``table/`` from the shards in ``parts/``, whose prefixes are in the order of the space."""
    ranges: dict[tuple[int, int], list[pa.Table]] = {}
    for part in parts:
        ranges.setdefault((part.start, part.stop), []).append(location.read_table(f"parts/{part.name}"))
    for (start, stop), tables in ranges.items():
        location.write_table(f"table/{Part(start, stop).name}", side_by_side(tables))


def headlines(
    table: RewardTable, space: AssignmentSpace, config: RewardConfig, statistics: RewardStatistics
) -> dict[str, Any]:
    """What the table says before any router: the best assignments, and what constants reach (eq. 8).

    ``uniform`` and ``static`` are the best constants of the training clips, judged on the held-out clips
    where there are any. Percentiles in percent, tokens per clip.
    """
    totals = space.totals()

    def means(split: str) -> tuple[torch.Tensor, float, float, float]:
        """Mean reward [size] per assignment; means over clips of the best, the worst, the best's tokens."""
        rewards = torch.zeros(space.size, dtype=torch.float64)
        best, worst, tokens, clips = 0.0, 0.0, 0.0, 0
        for quality in _column(table, config.quality, split):
            part = reward(quality.double(), totals, config.quality, config.weights, statistics)
            rewards += part.sum(0)
            best += float(part.amax(1).sum())
            worst += float(part.amin(1).sum())
            tokens += float(totals[part.argmax(1)].sum())
            clips += len(part)
        return rewards / clips, best / clips, worst / clips, tokens / clips

    train = means("train")[0]
    held, best, worst, tokens = means("test" if len(table.select("test")) else "train")
    uniforms = space.uniforms()
    uniform, static = int(uniforms[train[uniforms].argmax()]), int(train.argmax())
    return {
        "best_tokens": tokens,
        "uniform": space.assignment(torch.tensor(uniform)).tolist(),
        "uniform_percentile": float(100 * (held[uniform] - worst) / (best - worst)),
        "static": space.assignment(torch.tensor(static)).tolist(),
        "static_percentile": float(100 * (held[static] - worst) / (best - worst)),
    }


def write_statistics(
    location: Location, statistics: Mapping[Quality, RewardStatistics], space: AssignmentSpace
) -> None:
    content: dict[str, Any] = {
        metric: {"mean": found.quality_mean, "std": found.quality_std} for metric, found in statistics.items()
    }
    length = next(iter(statistics.values()))
    content["length"] = {"mean": length.length_mean, "std": length.length_std}
    location.write_json("statistics.json", {**content, "choices": space.choices, "blocks": space.blocks})


def load_statistics(location: Location, metric: str) -> RewardStatistics:
    """What the z-scores of ``metric`` need, from a curate artifact; UserError when it was not recorded."""
    found = location.read_json("statistics.json")
    if metric not in found or metric == "length":
        raise UserError(
            f"{location.uri} has no metric {metric!r}: add it to curate.metrics, run with --redo curate"
        )
    quality, length = found[metric], found["length"]
    return RewardStatistics(quality["mean"], quality["std"], length["mean"], length["std"])


def _column(table: RewardTable, metric: str, split: str) -> Iterator[torch.Tensor]:
    return (rows.quality[metric] for rows in table.select(split).batches([metric]))


def _check(config: CurateConfig, experiment: Any) -> Iterator[tuple[str, str]]:
    if config.reward.quality not in config.metrics:
        recorded = ", ".join(config.metrics)
        yield (
            "curate.reward.quality",
            f"is {config.reward.quality!r}, but curate.metrics records only {recorded}",
        )
    model = experiment.proxy.model
    if not model.causal:
        yield (
            "proxy.model.causal",
            "is false, but curate scores assignments block by block, which needs a block-causal proxy: set it"
            " to true (the final tokenizer's, tokenizer.model.causal, may be false)",
        )
    size = AssignmentSpace.of(model).size
    if size > MOST_ASSIGNMENTS:
        yield (
            "proxy.model",
            f"{len(model.choices)} choices for each of {model.blocks} blocks are {size:,} assignments, all of"
            f" which curate scores for every clip; up to {MOST_ASSIGNMENTS:,} are allowed: take fewer"
            " proxy.model.choices, fewer proxy.model.frames, or more frames per proxy.model.patch",
        )


def _describe(config: CurateConfig, experiment: Any) -> Description:
    clips = config.clips.train + config.clips.test
    return Description(notes=(f"up to {clips:,} clips, every assignment of each, {config.metrics}",))


STAGE = Stage(
    name="curate",
    config=CurateConfig,
    run=run,
    inputs=("index", "proxy"),
    outputs=("table/", "statistics.json", "rejected.parquet"),
    check=_check,
    weights=lambda config: pretrained(config.metrics),
    describe=_describe,
)
