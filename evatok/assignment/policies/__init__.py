"""Policies: everything that maps a clip to an assignment, behind one interface."""

from typing import Annotated, get_args

import torch
from pydantic import Field

from evatok.assignment.policies.budget import DifferencePolicy, IlpPolicy, InformationPolicy
from evatok.assignment.policies.fixed import RandomPolicy, StaticPolicy, UniformPolicy, extremes
from evatok.assignment.policies.measured import (
    BestUniformPolicy,
    OraclePolicy,
    RecurrentPolicy,
    ThresholdPolicy,
)
from evatok.assignment.policies.policy import Assigner, BasePolicy, Evidence, Sources, gather
from evatok.assignment.policies.router import BudgetedPolicy, RouterPolicy
from evatok.assignment.reward import length_statistics

_Any = (
    UniformPolicy
    | StaticPolicy
    | RandomPolicy
    | BestUniformPolicy
    | OraclePolicy
    | ThresholdPolicy
    | RecurrentPolicy
    | IlpPolicy
    | InformationPolicy
    | DifferencePolicy
    | RouterPolicy
    | BudgetedPolicy
)
Policy = Annotated[_Any, Field(discriminator="kind")]
"""Any policy, told apart by ``kind``: in YAML ``{kind: uniform, count: 256}``."""

KINDS: tuple[str, ...] = tuple(policy.model_fields["kind"].default for policy in get_args(_Any))


def common_budget(sources: Sources) -> float:
    """Mean tokens of a clip at which policies are compared: those of ``static``, the run's best constant.

    The space's own mean where there is no reward table to find it with.
    """
    if StaticPolicy().missing(sources):
        return length_statistics(sources.space)[0]
    return float(StaticPolicy().assign(Evidence(torch.arange(1)), sources).sum())


def default_policies(sources: Sources) -> list[BasePolicy]:
    """Every policy that the sources allow.

    Those that weigh quality against tokens do so as the run's reward does, those that keep a budget keep the
    common one; uniform counts, rates and limits are anywhere on their curve.
    """
    space, budget = sources.space, common_budget(sources)
    lowest, highest = extremes(space)
    policies: list[BasePolicy] = [
        UniformPolicy(count=space.choices[0]),
        StaticPolicy(),
        RandomPolicy(tokens=min(max(budget, lowest + 1), highest - 1)),
        BestUniformPolicy(),
        OraclePolicy(),
        IlpPolicy(budget=budget),
        InformationPolicy(rate=0.5),
        DifferencePolicy(rate=0.5),
        RouterPolicy(),
        BudgetedPolicy(budget=budget),
    ]
    if sources.statistics is not None:
        limit = float(f"{sources.statistics.quality_mean:.6g}")
        policies += [ThresholdPolicy(limit=limit), RecurrentPolicy(limit=limit)]
    return [policy.settled(sources) for policy in policies if not policy.missing(sources)]


__all__ = [
    "KINDS",
    "Assigner",
    "BasePolicy",
    "BestUniformPolicy",
    "BudgetedPolicy",
    "DifferencePolicy",
    "Evidence",
    "IlpPolicy",
    "InformationPolicy",
    "OraclePolicy",
    "Policy",
    "RandomPolicy",
    "RecurrentPolicy",
    "RouterPolicy",
    "Sources",
    "StaticPolicy",
    "ThresholdPolicy",
    "UniformPolicy",
    "common_budget",
    "default_policies",
    "gather",
]
