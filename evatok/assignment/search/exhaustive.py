"""The quality of every assignment: by brute force, and through the prefix tree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evatok.assignment.reward import block_loss, clip_quality
from evatok.assignment.search.tree import MEMORY, Nodes, PrefixTree, nodes_at_once, targets
from evatok.assignment.space import AssignmentSpace
from evatok.metrics.pixels import QualityMetric
from evatok.models.tokenizer import VideoTokenizer


@torch.inference_mode()
def brute_force(
    tokenizer: VideoTokenizer,
    clips: Tensor,
    space: AssignmentSpace,
    metrics: Sequence[QualityMetric],
    *,
    prefix: Sequence[int] = (),
    batch: int = 8,
) -> dict[str, Tensor]:
    """Encode, decode and measure every assignment on its own (paper eq. 4): the reference for ``full``.

    Arguments and result as in ``full``; ``batch`` is the number of (clip, assignment) pairs per forward pass.
    """
    subtree = space.subtree(prefix)
    assignments = space.assignment(torch.arange(subtree.start, subtree.stop))
    # Neighbours in total length fill a batch evenly.
    order = assignments.sum(1).argsort(stable=True)
    pairs = torch.cartesian_prod(torch.arange(clips.shape[0]), order)
    references = [metric.prepare(targets(clips, space.blocks).flatten(0, 1)) for metric in metrics]
    block = torch.arange(space.blocks)
    tables = {metric.name: torch.empty(clips.shape[0], len(subtree)) for metric in metrics}
    for rows, columns in (part.unbind(1) for part in pairs.split(batch)):
        tokens = tokenizer.encode(clips[rows], assignments[columns])
        reconstructions = tokenizer.decode(tokens).float()
        blocks = targets(reconstructions, space.blocks).flatten(0, 1)  # [n * T, C, P, H, W]
        places = (rows[:, None] * space.blocks + block).flatten().to(clips.device)
        for metric, reference in zip(metrics, references):
            losses = block_loss(metric(blocks, reference.select(places)), metric.name)
            quality = clip_quality(losses.unflatten(0, (-1, space.blocks)).mean(1), metric.name)
            tables[metric.name][rows, columns] = quality.float().cpu()
    return tables


def full(
    tokenizer: VideoTokenizer,
    clips: Tensor,
    space: AssignmentSpace,
    metrics: Sequence[QualityMetric],
    *,
    prefix: Sequence[int] = (),
    memory: int = MEMORY,
) -> dict[str, Tensor]:
    """The quality of every assignment of every clip, each node of the prefix tree evaluated once.

    clips: uint8 or float in [0, 1], [B, C, F, H, W] on the tokenizer's device. prefix: token counts of the
    first blocks; only the assignments that begin with them are scored. memory: limit in bytes on the keys
    and values held. Returns {metric name: float32 [B, n]} on the CPU, in the metric's unit, n assignments in
    the space's order. Equal to ``brute_force`` within float tolerance.
    """
    subtree = space.subtree(prefix)
    path = space.choice_index(torch.tensor(prefix, dtype=torch.int64)).tolist()
    parts = []
    for shard in clips.split(nodes_at_once(tokenizer, memory)):
        tree = PrefixTree(tokenizer, shard, space, metrics, memory)
        tree.grow(lambda nodes: on_path(nodes, path, len(space.choices)))
        parts.append({m.name: tree.quality(m.name)[:, subtree.start : subtree.stop].cpu() for m in metrics})
    return {m.name: torch.cat([part[m.name] for part in parts]) for m in metrics}


def on_path(nodes: Nodes, path: Sequence[int], choices: int) -> Tensor:
    """bool [N, m]: only the child on ``path`` (choice indices), and every child below its end."""
    mask = torch.ones(len(nodes), choices, dtype=torch.bool)
    if nodes.depth < len(path):
        mask[:] = torch.arange(choices) == path[nodes.depth]
    return mask
