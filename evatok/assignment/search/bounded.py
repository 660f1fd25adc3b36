"""Branch and bound: the best assignment alone, without evaluating the nodes that cannot lead to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evatok.assignment.reward import RewardStatistics, RewardWeights, clip_quality, reward
from evatok.assignment.search.tree import MEMORY, Nodes, PrefixTree, leaf_losses, nodes_at_once
from evatok.assignment.space import AssignmentSpace
from evatok.errors import UserError
from evatok.metrics.pixels import QualityMetric
from evatok.models.tokenizer import VideoTokenizer


@dataclass(frozen=True)
class Calibration:
    """How low a block's loss may fall, as a share of the clip's own loss under the longest assignment.

    ``ratio[t][i]``: the lowest ratio seen for block t with choice i, whatever the blocks before it had. A
    bound learnt from examples and not a proven one, so its agreement with brute force has to be measured.
    """

    ratio: tuple[tuple[float, ...], ...]

    @classmethod
    def measure(cls, losses: Sequence[Tensor], choices: int, longest: int = -1) -> Calibration:
        """From the block losses of a whole tree or subtree, per depth t [N, choices ** (t + 1)] as in
        ``PrefixTree.losses``; ``longest``: index of the subtree's longest assignment.
        """
        ratio = []
        for depth, loss in enumerate(losses, 1):
            unit = loss[:, longest // choices ** (len(losses) - depth), None].clamp(min=1e-12)
            own_choice = (loss / unit).nan_to_num(nan=torch.inf).unflatten(1, (-1, choices))
            ratio.append(tuple(own_choice.amin((0, 1)).tolist()))
        return cls(tuple(ratio))


@dataclass(frozen=True)
class BestResult:
    """The best assignment of each of B clips and what finding it took.

    index: int64 [B]; assignment: int64 [B, T] token counts; reward: float64 [B]; quality: {metric: float32
    [B, size]}, the part of the reward table that was seen, NaN elsewhere; evaluated: per depth t bool
    [B, m ** (t + 1)], which nodes of the prefix tree were.
    """

    index: Tensor
    assignment: Tensor
    reward: Tensor
    quality: dict[str, Tensor]
    evaluated: tuple[Tensor, ...]

    @property
    def nodes(self) -> Tensor:
        """How many nodes were evaluated: int64 [B]."""
        return torch.cat(self.evaluated, 1).sum(1)


def best(
    tokenizer: VideoTokenizer,
    clips: Tensor,
    space: AssignmentSpace,
    metrics: Sequence[QualityMetric],
    weights: RewardWeights,
    statistics: RewardStatistics,
    *,
    prefix: Sequence[int] = (),
    calibration: Calibration | None = None,
    incumbent: Tensor | None = None,
    memory: int = MEMORY,
) -> BestResult:
    """The assignment with the highest reward of each clip, ties to the lowest index.

    The reward is that of the first metric; the others are recorded beside it. clips: uint8 or float in
    [0, 1], [B, C, F, H, W] on the tokenizer's device. prefix: token counts of the first blocks; only the
    assignments that begin with them are searched, and calibration and incumbent are of those. Without
    ``calibration`` the bound is proven (a block not yet decoded loses nothing) and the result is the
    brute-force argmax. incumbent: a first guess int64 [B, T], of a router or the best static assignment;
    without one the search dives along the best bound.
    """
    parts = []
    size = nodes_at_once(tokenizer, memory)
    for start in range(0, clips.shape[0], size):
        rows = slice(start, start + size)
        tree = PrefixTree(tokenizer, clips[rows], space, metrics, memory)
        search = _Bounded(tree, metrics[0].name, weights, statistics, space.subtree(prefix))
        guess = None if incumbent is None else space.index(incumbent[rows]).to(clips.device)
        parts.append(search.run(calibration, guess))
    return BestResult(
        index=torch.cat([part.index for part in parts]),
        assignment=torch.cat([part.assignment for part in parts]),
        reward=torch.cat([part.reward for part in parts]),
        quality={m.name: torch.cat([part.quality[m.name] for part in parts]) for m in metrics},
        evaluated=tuple(torch.cat(depth) for depth in zip(*(part.evaluated for part in parts))),
    )


def grow_to_best(tree: PrefixTree, metric: str, weights: RewardWeights, statistics: RewardStatistics) -> None:
    """Evaluate no more of the tree than the proven best assignment of each clip takes."""
    _Bounded(tree, metric, weights, statistics, tree.space.subtree(())).run(None, None)


class _Bounded:
    """One batch of clips, all advanced together so that pruning leaves the calls full."""

    def __init__(
        self,
        tree: PrefixTree,
        metric: str,
        weights: RewardWeights,
        statistics: RewardStatistics,
        subtree: range,
    ) -> None:
        self.tree = tree
        self.subtree = subtree
        self.space = tree.space
        self.metric = metric
        self.losses = tree.losses[metric]
        device = self.losses[0].device
        self.totals = self.space.totals().to(device)
        self.weights = weights
        self.statistics = statistics
        self.choices = len(self.space.choices)
        self.least = [torch.zeros_like(loss) for loss in self.losses]

    def run(self, calibration: Calibration | None, guess: Tensor | None) -> BestResult:
        if calibration is not None:
            self._calibrate(calibration)
        if guess is None:
            self._dive()
        else:
            self._walk(guess)
        self.tree.grow(self._promising)
        rewards = self._rewards().masked_fill(~self._seen(self.space.blocks - 1), -torch.inf)
        reward = rewards.amax(1)
        index = rewards.eq(reward[:, None]).int().argmax(1)
        return BestResult(
            index.cpu(),
            self.space.assignment(index).cpu(),
            reward.cpu(),
            {metric: self.tree.quality(metric).cpu() for metric in self.tree.losses},
            tuple(self._seen(depth).cpu() for depth in range(self.space.blocks)),
        )

    def _calibrate(self, calibration: Calibration) -> None:
        """Pay the longest path of every clip and take its losses as the unit of the bound."""
        if len(calibration.ratio) != self.space.blocks or len(calibration.ratio[0]) != self.choices:
            raise UserError(
                f"the calibration has {len(calibration.ratio)} blocks of {len(calibration.ratio[0])} choices,"
                f" the space has {self.space.blocks} of {self.choices}: calibrate with this proxy"
            )
        longest = self.subtree.stop - 1
        self._walk(torch.full_like(self.losses[0][:, 0], longest, dtype=torch.int64))
        for depth, (least, loss, ratio) in enumerate(zip(self.least, self.losses, calibration.ratio), 1):
            unit = loss[:, longest // self.choices ** (self.space.blocks - depth), None]
            per_choice = unit * torch.tensor(ratio, dtype=loss.dtype, device=loss.device)
            least.copy_(per_choice.repeat(1, least.shape[1] // self.choices))

    def _walk(self, index: Tensor) -> None:
        """Evaluate the path from the root to leaf ``index`` [B] of every clip."""

        def on_way(nodes: Nodes) -> Tensor:
            child = index[nodes.clip] // self.choices ** (self.space.blocks - nodes.depth - 1)
            return self._children(nodes).eq(child[:, None]) & ~self._known(nodes)

        self.tree.grow(on_way, keep=True)

    def _dive(self) -> None:
        """Evaluate all children of each clip's most promising node, depth after depth."""
        node = torch.zeros(len(self.losses[0]), dtype=torch.int64, device=self.losses[0].device)
        for depth in range(self.space.blocks):

            def below(nodes: Nodes, depth: int = depth, node: Tensor = node) -> Tensor:
                here = (nodes.prefix == node[nodes.clip]) & (nodes.depth == depth)
                return here[:, None] & self._bounds(nodes).isfinite() & ~self._known(nodes)

            self.tree.grow(below, keep=True)
            bounds = self._rewards().unflatten(
                1, (-1, self.choices, self.choices ** (self.space.blocks - depth - 1))
            )
            node = node * self.choices + bounds[torch.arange(len(node)), node].amax(-1).argmax(1)

    def _promising(self, nodes: Nodes) -> Tensor:
        """Children not yet evaluated whose bound is not below the best leaf so far."""
        found = self._rewards().masked_fill(~self._seen(self.space.blocks - 1), -torch.inf).amax(1)
        return self._bounds(nodes).ge(found[nodes.clip, None]) & ~self._known(nodes)

    def _bounds(self, nodes: Nodes) -> Tensor:
        """[N, m]: the most that any assignment below each child can be worth."""
        bounds = self._rewards().unflatten(1, (self.choices ** (nodes.depth + 1), -1)).amax(-1)
        bound: Tensor = bounds[nodes.clip[:, None], self._children(nodes)]
        return bound

    def _rewards(self) -> Tensor:
        """[B, size]: the reward of every assignment, or the most it can be as far as is known; minus infinity
        outside the subtree.
        """
        optimistic = [torch.where(loss.isnan(), least, loss) for loss, least in zip(self.losses, self.least)]
        quality = clip_quality(leaf_losses(optimistic), self.metric)
        rewards = reward(quality, self.totals, self.metric, self.weights, self.statistics)
        rewards[:, : self.subtree.start] = -torch.inf
        rewards[:, self.subtree.stop :] = -torch.inf
        return rewards

    def _seen(self, depth: int) -> Tensor:
        return ~self.losses[depth].isnan()

    def _children(self, nodes: Nodes) -> Tensor:
        return nodes.prefix[:, None] * self.choices + torch.arange(self.choices, device=nodes.prefix.device)

    def _known(self, nodes: Nodes) -> Tensor:
        return self._seen(nodes.depth)[nodes.clip[:, None], self._children(nodes)]
