"""Policies that follow the router."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from evatok.assignment.policies.budget import budgets, spend, unaffordable, whole_tokens
from evatok.assignment.policies.policy import WEIGHTS, BasePolicy, Evidence, Sources
from evatok.assignment.space import AssignmentSpace

_PRICES = (8.0, 4.0, 2.0, 1.0, 0.0, -0.5, -1.0, -1.5, -2.0, -2.5, -3.0, -4.0, -8.0)


class AskingPolicy(BasePolicy):
    """Policies that follow the router's scores, and a conditioned router's at a weight of quality."""

    needs: ClassVar[tuple[str, ...]] = ("router",)
    w_q: float | None = Field(
        None, ge=0, le=2, description="reward weight of quality, for a conditioned router; none: the run's"
    )

    def score_weights(self, sources: Sources) -> tuple[float | None, ...]:
        return (self.w_q,)

    def settled(self, sources: Sources) -> BasePolicy:
        if self.w_q is None and _conditioned(sources):
            return self.model_copy(update={"w_q": sources.w_q})
        return self


class RouterPolicy(AskingPolicy):
    """The router's most likely assignment (paper 3.3).

    A conditioned router is moved by ``w_q``. Any other by ``price``: its log-probabilities less the price of
    the tokens, which are counted in standard deviations of the length.
    """

    kind: Literal["router"] = "router"
    weighs: ClassVar[bool] = True
    price: float = Field(0.0, description="log-probability that one standard deviation of length costs")

    @property
    def knob(self) -> str:
        return "price" if self.w_q is None else "w_q"

    def assign(self, evidence: Evidence, sources: Sources) -> Tensor:
        scores = evidence.scores[self.w_q]
        totals = sources.space.totals().double()
        scores = scores - self.price * (totals - totals.mean()) / totals.std(correction=0)
        return sources.space.assignment(scores.argmax(1))

    def sweep(self, sources: Sources) -> list[BasePolicy]:
        if _conditioned(sources):
            return [self.model_copy(update={"w_q": w_q}) for w_q in WEIGHTS]
        return [self.model_copy(update={"price": price}) for price in _PRICES]


class BudgetedPolicy(AskingPolicy):
    """The most likely assignments under a budget of tokens that is never exceeded."""

    kind: Literal["budgeted"] = "budgeted"
    budget: float = Field(gt=0, description="most tokens of a clip, or their mean over a batch")
    scope: Literal["clip", "batch"] = Field(default="clip", description="what the budget holds for")

    @property
    def knob(self) -> str:
        return "budget"

    @property
    def whole_set(self) -> bool:
        return self.scope == "batch"

    def problems(self, space: AssignmentSpace) -> Iterator[str]:
        yield from unaffordable(self.budget, space)

    def assign(self, evidence: Evidence, sources: Sources) -> Tensor:
        scores, space = evidence.scores[self.w_q], sources.space
        if self.scope == "clip":
            return space.assignment(scores.masked_fill(space.totals() > self.budget, -torch.inf).argmax(1))
        best, index, lengths = _best_of_each_length(scores, space)
        chosen = spend(best, lengths, whole_tokens(self.budget, len(scores)), exactly=False)
        return space.assignment(index.gather(1, chosen[:, None]).squeeze(1))

    def sweep(self, sources: Sources) -> list[BasePolicy]:
        return [self.model_copy(update={"budget": budget}) for budget in budgets(sources.space)]


def _conditioned(sources: Sources) -> bool:
    return sources.router is not None and sources.router.config.conditioned


def _best_of_each_length(scores: Tensor, space: AssignmentSpace) -> tuple[Tensor, Tensor, Tensor]:
    """The best score [B, n] of each total length, whose it is [B, n], and the lengths int64 [n].

    No other assignment can be part of an optimum, and the integer program shrinks by an order of magnitude.
    """
    lengths, group = space.totals().unique(return_inverse=True)
    kept = [scores[:, group == number].max(1) for number in range(len(lengths))]
    members = [(group == number).nonzero().squeeze(1) for number in range(len(lengths))]
    best = torch.stack([values for values, _ in kept], 1)
    index = torch.stack([places[found] for places, (_, found) in zip(members, kept)], 1)
    return best, index, lengths
