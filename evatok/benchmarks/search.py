"""Search speed: brute force, the prefix tree and branch and bound on the same clips in one run."""

from __future__ import annotations

import logging
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from evatok.artifacts import Location
from evatok.assignment.reward import RewardStatistics, RewardWeights, percentile, reward
from evatok.assignment.search import BestResult, Calibration, PrefixTree, best, brute_force, full
from evatok.assignment.search.exhaustive import on_path
from evatok.assignment.space import AssignmentSpace
from evatok.config import Config
from evatok.errors import UserError
from evatok.metrics.perceptual import load_quality
from evatok.metrics.pixels import QualityMetric
from evatok.models.operations import count_operations
from evatok.models.tokenizer import TokenizerConfig, VideoTokenizer
from evatok.video.decode import ClipFormat, decode_clip
from evatok.video.index import ClipIndex
from evatok.video.synthetic import write_videos

Result = TypeVar("Result")

log = logging.getLogger(__name__)


class Settings(Config):
    """What is searched. The defaults take about ten minutes on two cores."""

    run: str | None = Field(
        None, description="folder of a run, for its trained proxy and its clips; none: a proxy trained here"
    )
    tokenizer: TokenizerConfig = Field(
        TokenizerConfig(
            size=32,
            choices=(2, 4, 8, 16, 32),
            encoder={"width": 64, "layers": 2, "heads": 2},
            decoder={"width": 96, "layers": 3, "heads": 3},
            latent=64,
            decoder_queries="cover",
            align_layer=1,
        ),
        description="the proxy that is trained here",
    )
    steps: int = Field(200, gt=0, description="training steps of that proxy, 16 synthetic clips each")
    clips: int = Field(16, gt=0, description="clips that are searched, by brute force too")
    agreement_clips: int = Field(
        100, gt=0, description="clips, those among them, on which best is compared with full"
    )
    calibration_clips: int = Field(
        32, gt=0, description="training clips whose whole tree calibrates the bound"
    )
    large: TokenizerConfig | None = Field(
        TokenizerConfig(), description="S-B, of random weights, for the speed of a subtree alone"
    )
    large_prefix: tuple[int, ...] = Field((128, 128), description="first blocks of that subtree")
    metric: str = Field("dssim", description="quality of the reward")
    w_q: float = Field(1.2, ge=0, le=2, description="reward weight of quality")
    batch: int = Field(32, gt=0, description="assignments per pass of brute force")
    memory: int = Field(1 << 30, gt=0, description="keys and values that the tree may hold, bytes")
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the tokenizer's weights")
    threads: int = Field(2, gt=0, description="CPU threads")


def run(settings: Settings) -> dict[str, Any]:
    """Keys: ``full``, ``best_proven``, ``best_calibrated``, each with ``speedup`` over batched brute force in
    seconds, ``counted_ratio`` (the same in counted operations), ``nodes`` per clip of the tree's ``m + m ** 2
    + ...``, ``seconds``, ``agreement`` with brute force's argmax (0 to 1) and ``reward_percentile``;
    ``agreement``: ``clips``, and of ``best_proven`` and ``best_calibrated`` the share of them that agree with
    the argmax of ``full``; ``large_full``, ``large_best_proven`` and ``large_best_calibrated``, the same on a
    subtree of one clip, with the first four; ``conditions``.

    The large tokenizer's weights are random, and one other clip calibrates its bound: the nodes that its
    bounds spare say nothing of a trained proxy's.
    """
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    tokenizer, training, clips = _proxy_and_clips(settings)
    figures = _compare(settings, tokenizer, training, clips)
    if settings.large is not None:
        figures |= _subtree(settings, settings.large)
    figures["conditions"] = {
        "device": torch.cuda.get_device_name() if settings.device == "cuda" else platform.processor(),
        "threads": settings.threads,
        "precision": settings.precision,
        "proxy": settings.run or f"trained here for {settings.steps} steps",
        "clips": settings.clips,
    }
    return figures


def _compare(
    settings: Settings, tokenizer: VideoTokenizer, training: Tensor, held_out: Tensor
) -> dict[str, Any]:
    clips = held_out[: settings.clips]
    space = AssignmentSpace.of(tokenizer)
    metrics: list[QualityMetric] = [load_quality(settings.metric).to(settings.device)]
    weights, memory = RewardWeights(settings.w_q), settings.memory
    losses = []
    qualities = []
    log.info("whole trees of %d training clips", len(training))
    for shard in training.split(16):
        tree = PrefixTree(tokenizer, shard, space, metrics, memory)
        tree.grow_all()
        losses.append([depth.cpu() for depth in tree.losses[settings.metric]])
        qualities.append(tree.quality(settings.metric).cpu())
    calibration = Calibration.measure([torch.cat(depth) for depth in zip(*losses)], len(space.choices))
    statistics = RewardStatistics.measure(qualities, space)
    mean_quality = torch.cat(qualities).double().mean(0)
    static = reward(mean_quality, space.totals(), settings.metric, weights, statistics).argmax()
    incumbent = space.assignment(static)

    def bounded(bound: Calibration | None, clips: Tensor = clips) -> BestResult:
        return best(
            tokenizer,
            clips,
            space,
            metrics,
            weights,
            statistics,
            calibration=bound,
            incumbent=incumbent.expand(len(clips), -1),
            memory=memory,
        )

    log.info("brute force, the tree and the bounds on %d clips", len(clips))
    table, brute_seconds = _timed(
        lambda: brute_force(tokenizer, clips, space, metrics, batch=settings.batch)[settings.metric]
    )
    rewards = reward(table.double(), space.totals(), settings.metric, weights, statistics)
    tree_table, full_seconds = _timed(
        lambda: full(tokenizer, clips, space, metrics, memory=memory)[settings.metric]
    )
    found = reward(tree_table.double(), space.totals(), settings.metric, weights, statistics).argmax(1)
    prepare, nodes = node_operations(tokenizer.config, space)
    brute = len(clips) * assignment_operations(tokenizer.config, space.all().tolist())
    tree_cost = len(clips) * (prepare + float(sum(depth.sum() for depth in nodes)))

    def entry(index: Tensor, seconds: float, cost: float, evaluated: float) -> dict[str, float]:
        return {
            "speedup": brute_seconds / seconds,
            "counted_ratio": brute / cost,
            "nodes": evaluated,
            "seconds": seconds,
            "agreement": float((index == rewards.argmax(1)).double().mean()),
            "reward_percentile": percentile(rewards, index),
        }

    figures = {"full": entry(found, full_seconds, tree_cost, sum(map(len, nodes)))}
    many = held_out[: settings.agreement_clips]
    log.info("agreement on %d clips", len(many))
    table = full(tokenizer, many, space, metrics, memory=memory)[settings.metric]
    expected = reward(table.double(), space.totals(), settings.metric, weights, statistics).argmax(1)
    agreement: dict[str, float] = {"clips": len(many)}
    for name, bound in (("best_proven", None), ("best_calibrated", calibration)):
        agreement[name] = float((bounded(bound, many).index == expected).double().mean())
        result, seconds = _timed(lambda bound=bound: bounded(bound))  # type: ignore[misc]
        cost = len(clips) * prepare + float(
            sum((seen * cost).sum() for seen, cost in zip(result.evaluated, nodes))
        )
        figures[name] = entry(result.index, seconds, cost, float(result.nodes.double().mean()))
    return {**figures, "agreement": agreement, "brute_force": {"seconds": brute_seconds}}


def _subtree(settings: Settings, config: TokenizerConfig) -> dict[str, dict[str, float]]:
    """The searches against brute force on the assignments of one clip that share their first blocks.

    Another clip's subtree calibrates the bound, and both give the reward its statistics.
    """
    log.info("a subtree of the large tokenizer")
    tokenizer = _placed(VideoTokenizer(config), settings)
    space, prefix = AssignmentSpace.of(config), settings.large_prefix
    shape = (2, 3, config.frames, config.size, config.size)
    clip, other = torch.randint(256, shape, dtype=torch.uint8).to(settings.device).split(1)
    metrics: list[QualityMetric] = [load_quality(settings.metric).to(settings.device)]
    subtree = space.subtree(prefix)
    path = space.choice_index(torch.tensor(prefix, dtype=torch.int64)).tolist()
    tree = PrefixTree(tokenizer, other, space, metrics, settings.memory)  # also warms up
    tree.grow(lambda reached: on_path(reached, path, len(space.choices)))
    losses = [depth.cpu() for depth in tree.losses[settings.metric]]
    calibration = Calibration.measure(losses, len(space.choices), subtree.stop - 1)
    table, seconds = _timed(
        lambda: full(tokenizer, clip, space, metrics, prefix=prefix, memory=settings.memory)[settings.metric]
    )
    known = tree.quality(settings.metric)[:, subtree.start : subtree.stop].cpu()
    statistics = RewardStatistics.measure([table, known], space)
    # As many assignments at once as the tree's calls have nodes.
    batch = min(settings.batch, len(space.choices))
    _, brute = _timed(lambda: brute_force(tokenizer, clip, space, metrics, prefix=prefix, batch=batch))
    prepare, nodes = node_operations(config, space)
    cost = prepare
    for each in nodes:
        below = space.size // len(each)
        cost += float(each[subtree.start // below : -(-subtree.stop // below)].sum())
    operations = assignment_operations(config, space.all()[subtree.start : subtree.stop].tolist())
    visited = len(prefix) + sum(
        len(space.choices) ** depth for depth in range(1, space.blocks - len(prefix) + 1)
    )
    figures = {
        "large_full": {
            "speedup": brute / seconds,
            "counted_ratio": operations / cost,
            "nodes": float(visited),
            "seconds": seconds,
        }
    }
    weights = RewardWeights(settings.w_q)
    for name, bound in (("large_best_proven", None), ("large_best_calibrated", calibration)):
        result, seconds = _timed(
            lambda bound=bound: best(  # type: ignore[misc]
                tokenizer,
                clip,
                space,
                metrics,
                weights,
                statistics,
                prefix=prefix,
                calibration=bound,
                memory=settings.memory,
            )
        )
        cost = prepare + float(sum((seen * each).sum() for seen, each in zip(result.evaluated, nodes)))
        figures[name] = {
            "speedup": brute / seconds,
            "counted_ratio": operations / cost,
            "nodes": float(result.nodes.double().mean()),
            "seconds": seconds,
        }
    return figures


def assignment_operations(config: TokenizerConfig, assignments: Sequence[Sequence[int]]) -> float:
    """Operations to encode and decode a clip under every one of ``assignments``, each on its own."""
    return float(sum(sum(count_operations(config, [assignment])) for assignment in assignments))


def node_operations(config: TokenizerConfig, space: AssignmentSpace) -> tuple[float, list[Tensor]]:
    """Operations to prepare a clip, and per depth t of every node's last block: float64 [m ** (t + 1)].

    What a whole pass over a prefix costs more than one over its parent; patches are embedded and projected
    once per clip.
    """

    def passes(lengths: list[int]) -> float:
        return float(
            sum(count_operations(config, [lengths])) - count_operations(config, [[0] * len(lengths)]).encode
        )

    per_depth = []
    parents = torch.zeros(1, dtype=torch.float64)
    for depth in range(1, space.blocks + 1):
        prefixes = AssignmentSpace(space.choices, depth).all().tolist()
        whole = torch.tensor([passes(prefix) for prefix in prefixes], dtype=torch.float64)
        per_depth.append(whole - parents.repeat_interleave(len(space.choices)))
        parents = whole
    return float(count_operations(config, [[0] * space.blocks]).encode), per_depth


def _proxy_and_clips(settings: Settings) -> tuple[VideoTokenizer, Tensor, Tensor]:
    """A trained proxy, clips to calibrate on and other clips to search, uint8 [n, C, F, H, W]."""
    wanted = settings.calibration_clips, max(settings.clips, settings.agreement_clips)
    if settings.run is not None:
        location = Location.parse(settings.run)
        with tempfile.TemporaryDirectory() as folder:
            proxy = VideoTokenizer.from_pretrained((location / "proxy").download("model", folder))
        index = ClipIndex.open(location / "index")
        parts = [spread(index, split, count) for split, count in zip(("train", "test"), wanted)]
        found = [decoded([(c["uri"], c["start"], c["fps"]) for c in part], proxy.config) for part in parts]
        return _placed(proxy, settings), found[0].to(settings.device), found[1].to(settings.device)
    proxy = VideoTokenizer(settings.tokenizer).to(settings.device)
    with tempfile.TemporaryDirectory() as folder:
        videos = write_videos(folder, sum(wanted), seed=0, blocks=4)
        places = [(f"{folder}/{video.name}", 0.0, 0.0) for video in videos]
        training, clips = decoded(places, proxy.config).to(settings.device).split(wanted)
    log.info("training a proxy for %d steps", settings.steps)
    _train(proxy, training, settings.steps)
    return _placed(proxy, settings), training, clips


def spread(index: ClipIndex, split: str, count: int) -> list[dict[str, Any]]:
    """``count`` clips evenly over a split, and so over its videos. UserError where there are fewer."""
    clips = index.select(split=split)
    if len(clips) < count:
        raise UserError(
            f"bench search needs {count} clips of the split {split}, {index.location.uri} has {len(clips)}:"
            " lower calibration_clips (train), clips or agreement_clips (test)"
        )
    places = np.linspace(0, len(clips) - 1, count).round().astype(np.int64)
    found: list[dict[str, Any]] = clips.take(places).to_pylist()
    return found


def _train(proxy: VideoTokenizer, clips: Tensor, steps: int) -> None:
    """Enough for assignments to differ as they do with a proxy; no more is needed here."""
    space = AssignmentSpace.of(proxy)
    optimizer = torch.optim.AdamW(proxy.parameters(), lr=1e-3)
    proxy.train()
    for step in range(steps):
        positions = torch.arange(16) + 16 * step
        batch = clips[(positions % len(clips)).to(clips.device)]
        output = proxy(batch, space.sample(positions, seed=0))
        loss = (output.reconstruction - batch / 255).abs().mean() + sum(output.losses.values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(proxy.parameters(), 1.0)
        proxy.quantizer.end_step()
        optimizer.step()


def decoded(places: Sequence[tuple[str, float, float]], config: TokenizerConfig) -> Tensor:
    """Clips (uri, start, fps) as a tokenizer takes them, uint8 [n, C, F, H, W]."""
    clips = [
        decode_clip(uri, start, ClipFormat(frames=config.frames, size=config.size, fps=fps))
        for uri, start, fps in places
    ]
    return torch.from_numpy(np.stack(clips))


def _placed(tokenizer: VideoTokenizer, settings: Settings) -> VideoTokenizer:
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    return tokenizer.to(settings.device, dtype).eval()


def _timed(work: Callable[[], Result]) -> tuple[Result, float]:
    started = time.perf_counter()
    result = work()  # ends with results on the CPU, so the device has finished
    return result, time.perf_counter() - started
