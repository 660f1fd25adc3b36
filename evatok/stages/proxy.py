"""Proxy: a tokenizer trained under random assignments, so that it reconstructs under any (paper 3.1).

Leaves ``model/`` for ``VideoTokenizer.from_pretrained`` and ``curves/``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from evatok.assignment.space import AssignmentSpace
from evatok.stages.reconstruction import (
    TokenizerTraining,
    describe_tokenizer,
    tokenizer_metrics,
    tokenizer_problems,
    train_tokenizer,
)
from evatok.stages.stage import Stage, StageContext
from evatok.training.reconstruction import RandomAssignments


def run(context: StageContext) -> dict[str, Any]:
    """Train under assignments drawn uniformly for every clip; returns the last metrics."""
    config: TokenizerTraining = context.config
    space = AssignmentSpace.of(config.model)
    return train_tokenizer(context, config, RandomAssignments(space, context.seed))


def _check(config: TokenizerTraining, experiment: Any) -> Iterator[tuple[str, str]]:
    return tokenizer_problems("proxy", config, experiment)


STAGE = Stage(
    name="proxy",
    config=TokenizerTraining,
    run=run,
    inputs=("index",),
    outputs=("model/", "curves/"),
    version=2,
    check=_check,
    weights=lambda config: config.losses.pretrained,
    describe=describe_tokenizer,
    metrics=tokenizer_metrics,
)
