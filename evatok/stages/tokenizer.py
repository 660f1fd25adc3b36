"""Tokenizer: the final adaptive tokenizer, trained from scratch under a policy's assignments (paper 3.4).

Leaves ``model/`` for ``VideoTokenizer.from_pretrained`` and ``curves/``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field

from evatok.assignment.policies import Policy, RouterPolicy, Sources
from evatok.assignment.space import AssignmentSpace
from evatok.models.layers import without_autocast
from evatok.stages.reconstruction import (
    TokenizerTraining,
    describe_tokenizer,
    tokenizer_metrics,
    tokenizer_problems,
    train_tokenizer,
)
from evatok.stages.sources import policy_problems, policy_sources, policy_stages
from evatok.stages.stage import Stage, StageContext
from evatok.training.reconstruction import Assigner


class TokenizerStageConfig(TokenizerTraining):
    policy: Policy = Field(RouterPolicy(), description="what assigns tokens to every training clip")


@dataclass(frozen=True)
class PolicyAssignments:
    """Assigns as ``policy`` does; travels to the workers with everything the policy draws on.

    In full precision whatever the training's, so that a clip gets the tokens that it gets elsewhere.
    """

    policy: Policy
    sources: Sources

    def __call__(self, device: torch.device) -> Assigner:
        assign = self.policy.bind(self.sources.to(device))

        @without_autocast
        def aside(clips: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return assign(clips, positions)

        return aside


def run(context: StageContext) -> dict[str, Any]:
    """Train under the policy's assignments; returns the last metrics."""
    config: TokenizerStageConfig = context.config
    space = AssignmentSpace.of(config.model)
    sources = policy_sources(context.inputs, context.experiment.curate, space, [config.policy])
    return train_tokenizer(context, config, PolicyAssignments(config.policy, sources))


def _check(config: TokenizerStageConfig, experiment: Any) -> Iterator[tuple[str, str]]:
    yield from tokenizer_problems("tokenizer", config, experiment)
    space = AssignmentSpace.of(config.model)
    yield from policy_problems("tokenizer.policy", config.policy, space)
    if experiment.proxy is None:
        return
    proxy = experiment.proxy.model
    for key in ("frames", "size", "choices", "blocks"):
        if getattr(config.model, key) != getattr(proxy, key):
            yield (
                f"tokenizer.model.{key}",
                f"is {getattr(config.model, key)}, but the proxy, for which assignments are chosen, has"
                f" {getattr(proxy, key)}",
            )


STAGE = Stage(
    name="tokenizer",
    config=TokenizerStageConfig,
    run=run,
    inputs=lambda config: ("index", *policy_stages(config.policy)),
    reads=("curate.reward",),
    outputs=("model/", "curves/"),
    version=2,
    check=_check,
    weights=lambda config: config.losses.pretrained,
    describe=describe_tokenizer,
    metrics=tokenizer_metrics,
)
