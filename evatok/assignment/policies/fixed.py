"""Policies that do not look at the clip: the controls."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from scipy.optimize import brentq
from torch import Tensor

from evatok.assignment.policies.policy import BasePolicy, Evidence, Sources, WeightedPolicy
from evatok.assignment.reward import reward
from evatok.assignment.space import AssignmentSpace, hashed


class UniformPolicy(BasePolicy):
    """The same token count for every block of every clip."""

    kind: Literal["uniform"] = "uniform"
    count: int = Field(gt=0, description="tokens of every block, one of the token choices")

    @property
    def knob(self) -> str:
        return "count"

    def problems(self, space: AssignmentSpace) -> Iterator[str]:
        if self.count not in space.choices:
            yield f"count {self.count} is not among the token choices {list(space.choices)}"

    def assign(self, evidence: Evidence, sources: Sources) -> Tensor:
        return torch.full((len(evidence.positions), sources.space.blocks), self.count)

    def sweep(self, sources: Sources) -> list[BasePolicy]:
        return [UniformPolicy(count=count) for count in sources.space.choices]


class StaticPolicy(WeightedPolicy):
    """The one assignment with the highest mean reward over the training rows of the reward table.

    It tells content adaptivity from mere front-loading.
    """

    kind: Literal["static"] = "static"
    needs: ClassVar[tuple[str, ...]] = ("training table", "statistics")

    def assign(self, evidence: Evidence, sources: Sources) -> Tensor:
        self.require(sources)
        assert sources.metric is not None
        assert sources.statistics is not None
        assert sources.training_quality is not None
        # The reward is linear in quality, so the mean reward is the reward of the mean quality.
        rewards = reward(
            sources.training_quality,
            sources.space.totals(),
            sources.metric.name,
            self.weights(sources),
            sources.statistics,
        )
        return sources.space.assignment(rewards.argmax()).expand(len(evidence.positions), -1).clone()


class RandomPolicy(BasePolicy):
    """Independent random choices for every block, a pure function of (seed, sample position).

    Among all distributions with the wanted mean the one of highest entropy; uniform at the space's own mean.
    """

    kind: Literal["random"] = "random"
    tokens: float = Field(gt=0, description="mean total tokens of a clip")
    seed: int = 0

    @property
    def knob(self) -> str:
        return "tokens"

    def problems(self, space: AssignmentSpace) -> Iterator[str]:
        lowest, highest = extremes(space)
        if not lowest < self.tokens < highest:
            yield f"a mean of {self.tokens} tokens is impossible, clips take {lowest} to {highest}"

    def assign(self, evidence: Evidence, sources: Sources) -> Tensor:
        space = sources.space
        probabilities = tilted(space, self.tokens)
        draws = hashed(evidence.positions, self.seed, space.blocks) / 2.0**64
        digits = np.searchsorted(np.cumsum(probabilities)[:-1], draws, side="right")
        return torch.tensor(space.choices)[torch.from_numpy(digits)]

    def sweep(self, sources: Sources) -> list[BasePolicy]:
        lowest, highest = extremes(sources.space)
        steps = np.linspace(0.05, 0.95, 9)
        return [
            self.model_copy(update={"tokens": round(lowest + float(step) * (highest - lowest), 1)})
            for step in steps
        ]


def extremes(space: AssignmentSpace) -> tuple[int, int]:
    """The fewest and the most tokens of a clip."""
    return space.blocks * space.choices[0], space.blocks * space.choices[-1]


def tilted(space: AssignmentSpace, tokens: float) -> NDArray[np.float64]:
    """Probabilities [m] of the choices: mean ``tokens / blocks``, highest entropy (an exponential tilt)."""
    highest = extremes(space)[1]
    share = np.array(space.choices, dtype=np.float64) / space.choices[-1]

    def probabilities(tilt: float) -> NDArray[np.float64]:
        weights = np.exp(tilt * share - np.max(tilt * share))
        return np.asarray(weights / weights.sum())

    def excess(tilt: float) -> float:
        return float(probabilities(tilt) @ share) - tokens / highest

    reach = 1.0
    while not (excess(-reach) < 0 < excess(reach)) and reach < 1e6:
        reach *= 4
    tilt = brentq(excess, -reach, reach)
    return probabilities(0.0 if math.isclose(tilt, 0, abs_tol=1e-9) else tilt)
