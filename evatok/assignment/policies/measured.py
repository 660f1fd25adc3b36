"""Policies that reconstruct the clip and measure, by search over the prefix tree."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from evatok.assignment.policies.policy import BasePolicy, Evidence, Sources, WeightedPolicy
from evatok.assignment.reward import RewardStatistics, block_loss, reward
from evatok.assignment.search.bounded import grow_to_best
from evatok.assignment.search.tree import Nodes, PrefixTree, leaf_losses
from evatok.errors import UserError


class MeasuringPolicy(BasePolicy):
    """What these policies share: the proxy's losses, and the name of their metric."""

    needs: ClassVar[tuple[str, ...]] = ("proxy",)
    reads_losses: ClassVar[bool] = True

    @staticmethod
    def losses(evidence: Evidence) -> list[Tensor]:
        """Per depth [B, m ** (t + 1)]."""
        if evidence.losses is None:
            raise ValueError("the evidence was gathered without losses")
        return evidence.losses

    @staticmethod
    def metric(sources: Sources) -> str:
        """Name of the quality metric."""
        assert sources.metric is not None
        return sources.metric.name


class RewardPolicy(MeasuringPolicy, WeightedPolicy):
    """Policies that weigh the measured quality against tokens."""

    needs: ClassVar[tuple[str, ...]] = ("proxy", "statistics")

    def statistics(self, sources: Sources) -> RewardStatistics:
        """The z-scores' statistics; UserError without them."""
        self.require(sources)
        assert sources.statistics is not None
        return sources.statistics

    def rewards(self, evidence: Evidence, sources: Sources) -> Tensor:
        """Float64 [B, size]; minus infinity where a node was not measured."""
        metric, statistics = self.metric(sources), self.statistics(sources)
        quality = evidence.quality(metric)
        rewards = reward(quality, sources.space.totals(), metric, self.weights(sources), statistics)
        return rewards.nan_to_num(nan=-torch.inf)


class OraclePolicy(RewardPolicy):
    """The assignment with the highest proxy reward (paper eq. 4)."""

    kind: Literal["oracle"] = "oracle"
    oracle: ClassVar[bool] = True

    def measure(self, tree: PrefixTree, sources: Sources) -> None:
        grow_to_best(tree, self.metric(sources), self.weights(sources), self.statistics(sources))

    def assign(self, evidence: Evidence, sources: Sources) -> Tensor:
        return sources.space.assignment(self.rewards(evidence, sources).argmax(1))


class BestUniformPolicy(RewardPolicy):
    """The clip's best among the assignments that treat all blocks alike (paper table 8)."""

    kind: Literal["best_uniform"] = "best_uniform"
    oracle: ClassVar[bool] = True

    def measure(self, tree: PrefixTree, sources: Sources) -> None:
        choices = torch.arange(len(sources.space.choices))

        def alike(nodes: Nodes) -> Tensor:
            last = nodes.prefix.cpu()[:, None] % len(choices)
            return (
                (choices == last) if nodes.depth else torch.ones(len(nodes), len(choices), dtype=torch.bool)
            )

        tree.grow(alike)

    def assign(self, evidence: Evidence, sources: Sources) -> Tensor:
        space = sources.space
        uniforms = space.uniforms()
        rewards = self.rewards(evidence, sources)[:, uniforms]
        return space.assignment(uniforms[rewards.argmax(1)])


class LimitPolicy(MeasuringPolicy):
    """Policies that spend tokens until a quality is reached."""

    limit: float = Field(description="quality to reach, in the unit of the metric")

    @property
    def knob(self) -> str:
        return "limit"

    def highest_loss(self, sources: Sources) -> float:
        """The limit as a block loss."""
        return float(block_loss(torch.tensor(self.limit, dtype=torch.float64), self.metric(sources)))

    def sweep(self, sources: Sources) -> list[BasePolicy]:
        if sources.statistics is None:
            raise UserError(
                f"policy {self.kind}: its sweep needs the reward statistics; run the curate stage"
            )
        mean, std = sources.statistics.quality_mean, sources.statistics.quality_std
        limits = [float(f"{mean + float(z) * std:.6g}") for z in np.linspace(-2, 2, 17)]
        return [self.model_copy(update={"limit": limit}) for limit in limits]


class ThresholdPolicy(LimitPolicy):
    """The shortest assignment whose clip reaches the limit, else the longest of all (ElasticTok)."""

    kind: Literal["threshold"] = "threshold"

    def assign(self, evidence: Evidence, sources: Sources) -> Tensor:
        space = sources.space
        losses = leaf_losses(self.losses(evidence))
        # Among assignments of equal length the better one.
        order = space.totals().double() + losses / (1 + losses.amax())
        order = order.masked_fill(~(losses <= self.highest_loss(sources)), torch.inf)
        found = torch.where(order.amin(1).isfinite(), order.argmin(1), space.size - 1)
        return space.assignment(found)


class RecurrentPolicy(LimitPolicy):
    """Each block in turn grows until it reaches the limit, then the next (ALIT); works as frames arrive."""

    kind: Literal["recurrent"] = "recurrent"

    def measure(self, tree: PrefixTree, sources: Sources) -> None:
        m, most = len(sources.space.choices), self.highest_loss(sources)
        (losses,) = tree.losses.values()
        node = torch.zeros(len(losses[0]), dtype=torch.int64, device=losses[0].device)
        for depth, loss in enumerate(losses):
            for choice in range(m):
                reached = (self._children(loss, node, m)[:, :choice] <= most).any(1)

                def next_choice(
                    nodes: Nodes,
                    depth: int = depth,
                    choice: int = choice,
                    node: Tensor = node,
                    done: Tensor = reached,
                ) -> Tensor:
                    mask = torch.zeros(len(nodes), m, dtype=torch.bool, device=node.device)
                    if nodes.depth == depth:
                        mask[:, choice] = (nodes.prefix == node[nodes.clip]) & ~done[nodes.clip]
                    return mask

                tree.grow(next_choice, keep=True)
            node = node * m + self._first_enough(self._children(loss, node, m), most)

    def assign(self, evidence: Evidence, sources: Sources) -> Tensor:
        m, most = len(sources.space.choices), self.highest_loss(sources)
        losses = self.losses(evidence)
        node = torch.zeros(len(losses[0]), dtype=torch.int64)
        for loss in losses:
            node = node * m + self._first_enough(self._children(loss, node, m), most)
        return sources.space.assignment(node)

    @staticmethod
    def _children(loss: Tensor, node: Tensor, m: int) -> Tensor:
        """Losses [B, m] of the children of ``node`` [B]."""
        return loss.gather(1, node[:, None] * m + torch.arange(m, device=node.device))

    @staticmethod
    def _first_enough(children: Tensor, most: float) -> Tensor:
        """The first choice whose loss is low enough, else the last: int64 [B]."""
        enough = children <= most
        return torch.where(enough.any(1), enough.int().argmax(1), children.shape[1] - 1)
