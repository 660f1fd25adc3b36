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
from evatok.models.tokenizer import TokenizerConfig, VideoTokenizer
from evatok.stages.curate import CurateConfig, RewardConfig, load_statistics


def policy_sources(
    inputs: Mapping[str, Artifact], model: TokenizerConfig, curate: CurateConfig | None
) -> Sources:
    """Everything a policy may draw on, as far as ``inputs`` (proxy, curate, router) hold it; on the CPU.

    ``model``: of the tokenizer that tokens are assigned to. ``curate``: None in a run without that stage.
    """
    reward = curate.reward if curate else RewardConfig()
    curated = inputs["curate"].location if "curate" in inputs else None
    return Sources(
        space=AssignmentSpace(model.choices, model.blocks),
        tokenizer=VideoTokenizer.from_artifact(inputs["proxy"].location) if "proxy" in inputs else None,
        metric=load_quality(reward.quality) if curated else None,
        statistics=load_statistics(curated, reward.quality) if curated else None,
        router=Router.from_artifact(inputs["router"].location) if "router" in inputs else None,
        w_q=reward.w_q,
        training_quality=mean_quality(RewardTable.open(curated / "table"), reward) if curated else None,
    )


def mean_quality(table: RewardTable, reward: RewardConfig) -> torch.Tensor:
    """The mean quality of every assignment over the training clips of the table: float32 [size]."""
    train = table.select("train")
    total = torch.zeros(train.size, dtype=torch.float64)
    for rows in train.batches([reward.quality]):
        total += rows.quality[reward.quality].double().sum(0)
    return (total / len(train)).float()
