"""What policies draw on, gathered from the artifacts of a run."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from evatok.artifacts import Artifact
from evatok.assignment.policies import Sources
from evatok.assignment.space import AssignmentSpace
from evatok.assignment.table import RewardTable
from evatok.metrics.perceptual import load_quality
from evatok.models.router import Router
from evatok.models.tokenizer import VideoTokenizer
from evatok.stages.curate import RewardConfig, load_statistics


def policy_sources(inputs: Mapping[str, Artifact], reward: RewardConfig) -> Sources:
    """Everything a policy may draw on, as far as ``inputs`` (proxy, curate, router) hold it; on the CPU."""
    proxy = VideoTokenizer.from_artifact(inputs["proxy"].location)
    curated = inputs["curate"].location
    table = RewardTable.open(curated / "table").select("train")
    total = torch.zeros(table.size, dtype=torch.float64)
    for rows in table.batches([reward.quality]):
        total += rows.quality[reward.quality].double().sum(0)
    return Sources(
        space=AssignmentSpace(proxy.choices, proxy.blocks),
        tokenizer=proxy,
        metric=load_quality(reward.quality),
        statistics=load_statistics(curated, reward.quality),
        router=Router.from_artifact(inputs["router"].location) if "router" in inputs else None,
        w_q=reward.w_q,
        training_quality=(total / len(table)).float(),
    )
