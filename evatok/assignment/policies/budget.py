"""Policies that share out a budget of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, vstack
from torch import Tensor

from evatok.assignment.policies.fixed import extremes
from evatok.assignment.policies.measured import MeasuringPolicy
from evatok.assignment.policies.policy import BasePolicy, Evidence, Sources
from evatok.assignment.search.tree import Nodes, PrefixTree
from evatok.assignment.space import AssignmentSpace


class IlpPolicy(MeasuringPolicy):
    """The choices of a whole set with the least loss under a total budget: AdapTok's integer program.

    Blocks are taken to be independent, as there: a block's loss with each choice is measured after blocks of
    the maximum length. The budget is spent to the last token that any choices can add up to.
    """

    kind: Literal["ilp"] = "ilp"
    budget: float = Field(gt=0, description="mean total tokens of a clip")

    @property
    def knob(self) -> str:
        return "budget"

    @property
    def whole_set(self) -> bool:
        return True

    def problems(self, space: AssignmentSpace) -> Iterator[str]:
        yield from unaffordable(self.budget, space)

    def measure(self, tree: PrefixTree, sources: Sources) -> None:
        m = len(sources.space.choices)

        def below_maximum(nodes: Nodes) -> Tensor:
            return nodes.prefix.eq(m**nodes.depth - 1)[:, None].expand(-1, m)

        tree.grow(below_maximum)

    def assign(self, evidence: Evidence, sources: Sources) -> Tensor:
        space = sources.space
        m = len(space.choices)
        # The children of the all-maximum node are the last m nodes of their depth.
        losses = torch.stack([loss[:, -m:] for loss in self.losses(evidence)], 1)  # [B, T, m]
        total = whole_tokens(self.budget, len(losses))
        chosen = spend(-losses.flatten(0, 1), torch.tensor(space.choices), total, exactly=True)
        return torch.tensor(space.choices)[chosen].view(-1, space.blocks)

    def sweep(self, sources: Sources) -> list[BasePolicy]:
        return [self.model_copy(update={"budget": budget}) for budget in budgets(sources.space)]


class RatePolicy(BasePolicy):
    """Policies that give a block tokens in proportion to some measure of what is in it."""

    rate: float = Field(gt=0, le=1, description="mean share of the maximum tokens")
    first: float = Field(
        1.0,
        gt=0,
        description="how many times the first block's measure counts; what all later blocks build on",
    )

    @property
    def knob(self) -> str:
        return "rate"

    def sweep(self, sources: Sources) -> list[BasePolicy]:
        rates = np.geomspace(sources.space.choices[0] / sources.space.choices[-1], 1, 9)
        return [self.model_copy(update={"rate": round(float(rate), 4)}) for rate in rates]

    def proportional(self, content: Tensor, space: AssignmentSpace, jointly: bool) -> Tensor:
        """content: [B, T], not negative -> assignment int64 [B, T].

        InfoTok's rule: ``rate * (1 + s * (content / mean - 1))`` with s in (0, 1] so that no rate exceeds 1,
        then at least 1/16; the mean and s over each clip, or jointly over all. To the nearest choice.
        """
        content = content.double().clone()
        content[:, 0] *= self.first
        over = (0, 1) if jointly else (1,)
        excess = content / content.mean(over, keepdim=True).clamp(min=1e-12) - 1
        scale = ((1 / self.rate - 1) / excess.amax(over, keepdim=True).clamp(min=1e-12)).clamp(max=1)
        rates = (self.rate * (1 + scale * excess)).clamp(1 / 16, 1)
        choices = torch.tensor(space.choices)
        distance = (rates.unsqueeze(-1) * space.choices[-1] - choices).abs()
        return choices[distance.argmin(-1)]


class InformationPolicy(RatePolicy, MeasuringPolicy):
    """Tokens in proportion to each block's loss in one full-rate pass (InfoTok)."""

    kind: Literal["information"] = "information"
    scope: Literal["clip", "set"] = Field(
        "clip", description="share out over the blocks of each clip, or of all clips"
    )

    @property
    def whole_set(self) -> bool:
        return self.scope == "set"

    def measure(self, tree: PrefixTree, sources: Sources) -> None:
        m = len(sources.space.choices)

        def maximum(nodes: Nodes) -> Tensor:
            return torch.arange(m).eq(m - 1).expand(len(nodes), m)

        tree.grow(maximum)

    def assign(self, evidence: Evidence, sources: Sources) -> Tensor:
        losses = torch.stack([loss[:, -1] for loss in self.losses(evidence)], 1)
        return self.proportional(losses, sources.space, self.scope == "set")


class DifferencePolicy(RatePolicy):
    """Tokens in proportion to the change of pixels from block to block."""

    kind: Literal["difference"] = "difference"
    reads_change: ClassVar[bool] = True

    def assign(self, evidence: Evidence, sources: Sources) -> Tensor:
        assert evidence.change is not None
        return self.proportional(evidence.change, sources.space, jointly=False)


def budgets(space: AssignmentSpace) -> list[float]:
    """Budgets of a clip from the fewest to the most tokens, evenly in ratio."""
    return [float(round(budget)) for budget in np.geomspace(*extremes(space), 9)]


def unaffordable(budget: float, space: AssignmentSpace) -> Iterator[str]:
    """The problem that no clip is as short as a budget, if so."""
    least = extremes(space)[0]
    if budget < least:
        yield f"a budget of {budget:g} tokens is below the least a clip takes, {least}"


def whole_tokens(budget: float, clips: int) -> int:
    """The tokens that ``clips`` clips may take in all."""
    return math.floor(budget * clips + 1e-6)


def spend(values: Tensor, tokens: Tensor, budget: int, *, exactly: bool) -> Tensor:
    """One option for each of G groups with the highest sum of values under a budget: int64 [G].

    values: [G, n], minus infinity where a group may not take an option; tokens: int64 [n], what option i
    costs in any group. ``exactly`` spends the largest amount up to the budget that options can add up to,
    otherwise at most the budget is spent. Solved to optimality as an integer program (multiple-choice
    knapsack).
    """
    groups, options = values.shape
    lowest = budget = min(budget, groups * int(tokens.max()))
    if exactly:
        lowest = budget = largest_sum(tokens.tolist(), groups, budget)
    values = values.double()
    allowed = values.isfinite().flatten()
    regret = (values.amax(1, keepdim=True) - values).flatten().where(allowed, 0.0).numpy()
    variables = np.arange(groups * options)
    ones = np.ones(groups * options)
    one_each = coo_array((ones, (variables // options, variables)))
    cost = coo_array((tokens.repeat(groups).double().numpy(), (np.zeros_like(variables), variables)))
    solution = milp(
        regret,
        integrality=ones,
        bounds=Bounds(0, allowed.double().numpy()),
        constraints=LinearConstraint(
            vstack([one_each, cost]),
            np.append(np.ones(groups), lowest if exactly else 0),
            np.append(np.ones(groups), budget),
        ),
        options={"mip_rel_gap": 0},
    )
    if solution.x is None:
        raise RuntimeError(f"the integer program of {groups} groups failed: {solution.message}")
    return torch.from_numpy(solution.x).view(groups, options).argmax(1)


def largest_sum(tokens: list[int], groups: int, budget: int) -> int:
    """The largest total up to ``budget`` that one option of each group can add up to."""
    unit = math.gcd(*tokens)
    reachable, mask = 1, (1 << (budget // unit + 1)) - 1  # bit s: a total of s units can be reached
    for _ in range(groups):
        reached = 0
        for count in set(tokens):
            reached |= reachable << (count // unit)
        reachable = reached & mask
    return (reachable.bit_length() - 1) * unit
