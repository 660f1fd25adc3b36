"""Beam search, for clips with more blocks than can be enumerated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from evatok.assignment.reward import RewardStatistics, RewardWeights, block_loss, clip_quality, reward
from evatok.assignment.search.tree import MEMORY, BlockEvaluator, Nodes, nodes_at_once
from evatok.assignment.space import AssignmentSpace
from evatok.metrics.pixels import QualityMetric
from evatok.models.tokenizer import VideoTokenizer


@dataclass(frozen=True)
class BeamResult:
    """assignment: int64 [B, T] token counts; reward: float64 [B]; quality: float32 [B]; nodes: in all."""

    assignment: Tensor
    reward: Tensor
    quality: Tensor
    nodes: int


@torch.inference_mode()
def beam(
    tokenizer: VideoTokenizer,
    clips: Tensor,
    space: AssignmentSpace,
    metric: QualityMetric,
    weights: RewardWeights,
    statistics: RewardStatistics,
    *,
    width: int = 8,
    memory: int = MEMORY,
) -> BeamResult:
    """Keep the ``width`` most rewarding prefixes of every clip at every depth.

    At most ``width * m * T`` nodes per clip, linear in the number of blocks. Prefixes of one depth are
    compared as if the coming blocks cost and lost what the past ones did. clips: as in ``full``.
    """
    parts = [
        _beam(BlockEvaluator(tokenizer, shard, space, [metric]), metric.name, weights, statistics, width)
        for shard in clips.split(max(1, nodes_at_once(tokenizer, memory) // width))
    ]
    return BeamResult(
        torch.cat([part.assignment for part in parts]),
        torch.cat([part.reward for part in parts]),
        torch.cat([part.quality for part in parts]),
        sum(part.nodes for part in parts),
    )


def _beam(
    evaluator: BlockEvaluator, metric: str, weights: RewardWeights, statistics: RewardStatistics, width: int
) -> BeamResult:
    space = evaluator.space
    m = len(space.choices)
    nodes = evaluator.root()
    losses = torch.zeros(evaluator.clips, dtype=torch.float64, device=evaluator.device)
    tokens = torch.zeros_like(nodes.clip)
    for depth in range(1, space.blocks + 1):
        grown = [evaluator.extend(nodes, choice) for choice in range(m)]
        nodes = Nodes.cat([children for children, _ in grown])
        losses = losses.repeat(m) + block_loss(torch.cat([v[metric] for _, v in grown]).double(), metric)
        counts = torch.tensor(space.choices, device=evaluator.device)
        tokens = tokens.repeat(m) + counts.repeat_interleave(len(nodes) // m)
        quality = clip_quality(losses / depth, metric)
        scores = reward(quality, tokens * (space.blocks / depth), metric, weights, statistics)
        kept = _leaders(nodes.clip, scores, width if depth < space.blocks else 1)
        nodes, losses, tokens = nodes.select(kept), losses[kept], tokens[kept]
    return BeamResult(
        space.assignment(nodes.prefix).cpu(),
        scores[kept].cpu(),
        quality[kept].float().cpu(),
        evaluator.evaluated,
    )


def _leaders(clip: Tensor, scores: Tensor, width: int) -> Tensor:
    """Positions of the ``width`` best-scored candidates of each clip, clip by clip; clip, scores: [M]."""
    order = scores.argsort(descending=True, stable=True)
    order = order[clip[order].argsort(stable=True)]
    ranks = torch.arange(len(order), device=order.device) - torch.searchsorted(clip[order], clip[order])
    return order[ranks < width]
