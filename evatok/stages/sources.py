"""What policies draw on, gathered from the artifacts of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from evatok.artifacts import Artifact, Location
from evatok.assignment.policies import BasePolicy, Sources
from evatok.assignment.space import AssignmentSpace
from evatok.assignment.table import RewardTable
from evatok.metrics.perceptual import load_quality
from evatok.models.router import Router
from evatok.models.tokenizer import VideoTokenizer
from evatok.stages.curate import CurateConfig, RewardConfig, load_statistics

_SOURCES = {"proxy": "proxy", "router": "router", "training table": "curate", "statistics": "curate"}
"""What policies draw on, and the stage that leaves it."""


def policy_stages(policy: BasePolicy) -> tuple[str, ...]:
    """Stages that its assignments come of: what it needs, and what that was made from and weighed by."""
    if not policy.needs:
        return ()
    return ("proxy", "curate", *["router"] * ("router" in policy.needs))


def policy_sources(
    inputs: Mapping[str, Artifact],
    curate: CurateConfig | None,
    space: AssignmentSpace,
    policies: Iterable[BasePolicy] | None = None,
) -> Sources:
    """What ``policies`` (None: any policy) draw on, as far as ``inputs`` hold it; on the CPU.

    inputs: the stages of ``_SOURCES`` that are there; nothing is read that is not needed. ``curate``: None in
    a run without that stage.
    """
    reward = curate.reward if curate else RewardConfig()
    needed = set(_SOURCES if policies is None else (name for policy in policies for name in policy.needs))
    there = {name: inputs[stage].location for name, stage in _SOURCES.items() if stage in inputs}
    there = {name: location for name, location in there.items() if name in needed}
    metric = reward.quality
    return Sources(
        space=space,
        tokenizer=VideoTokenizer.from_artifact(there["proxy"]) if "proxy" in there else None,
        metric=load_quality(metric) if there.keys() - {"router"} else None,
        statistics=load_statistics(there["statistics"], metric) if "statistics" in there else None,
        router=Router.from_artifact(there["router"]) if "router" in there else None,
        w_q=reward.w_q,
        training_quality=training_quality(there["training table"], metric)
        if "training table" in there
        else None,
    )


def training_quality(curated: Location, metric: str) -> torch.Tensor:
    """The mean quality of every assignment over the training rows of a reward table: float32 [size]."""
    table = RewardTable.open(curated / "table").select("train")
    total = torch.zeros(table.size, dtype=torch.float64)
    for rows in table.batches([metric]):
        total += rows.quality[metric].double().sum(0)
    return (total / len(table)).float()


def policy_problems(key: str, policy: BasePolicy, space: AssignmentSpace) -> Iterator[tuple[str, str]]:
    """(dotted key, problem) of a policy that assigns clips batch by batch."""
    for problem in policy.problems(space):
        yield key, f"{policy.kind}: {problem}"
    if policy.whole_set:
        remedy = "take scope: clip" if "scope" in type(policy).model_fields else "take another policy"
        yield (
            key,
            f"{policy.kind} shares tokens out over all clips of a set, and here they come in batches, whose"
            f" size would decide: {remedy}",
        )
