"""Policies: everything that maps a clip to an assignment, behind one interface."""

from typing import Annotated

from pydantic import Field

from evatok.assignment.policies.budget import DifferencePolicy, IlpPolicy, InformationPolicy
from evatok.assignment.policies.fixed import RandomPolicy, StaticPolicy, UniformPolicy
from evatok.assignment.policies.measured import (
    BestUniformPolicy,
    OraclePolicy,
    RecurrentPolicy,
    ThresholdPolicy,
)
from evatok.assignment.policies.policy import Assigner, BasePolicy, Evidence, Sources, gather
from evatok.assignment.policies.router import BudgetedPolicy, RouterPolicy
from evatok.assignment.reward import length_statistics

Policy = Annotated[
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
    | BudgetedPolicy,
    Field(discriminator="kind"),
]
"""Any policy, told apart by ``kind``: in YAML ``{kind: uniform, count: 256}``."""


def default_policies(sources: Sources) -> list[BasePolicy]:
    """Every policy that the sources allow, at the setting it is quoted at."""
    space = sources.space
    mean_tokens, _ = length_statistics(space)
    policies: list[BasePolicy] = [
        UniformPolicy(count=space.choices[max(0, len(space.choices) - 2)]),
        StaticPolicy(),
        RandomPolicy(tokens=mean_tokens),
        BestUniformPolicy(),
        OraclePolicy(),
        IlpPolicy(budget=mean_tokens),
        InformationPolicy(rate=0.5),
        DifferencePolicy(rate=0.5),
        RouterPolicy(),
        BudgetedPolicy(budget=mean_tokens),
    ]
    if sources.statistics is not None:
        limit = float(f"{sources.statistics.quality_mean:.6g}")
        policies += [ThresholdPolicy(limit=limit), RecurrentPolicy(limit=limit)]
    return [policy.settled(sources) for policy in policies if not policy.missing(sources)]


__all__ = [
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
    "default_policies",
    "gather",
]
