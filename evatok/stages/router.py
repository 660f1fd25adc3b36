"""Router: predicts the best assignment of a clip in one pass, learned from the reward table (paper 3.3).

Leaves ``model/`` for ``Router.from_pretrained`` and ``curves/``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from evatok.assignment.table import RewardTable
from evatok.config import OPERATIONAL, Config
from evatok.models.layers import TransformerSize
from evatok.models.router import Router, RouterConfig, RouterObjective
from evatok.models.tokenizer import Size, TokenizerConfig
from evatok.stages.curate import load_statistics
from evatok.stages.fitting import fit_on_clips, metric_names, train_problems
from evatok.stages.stage import Description, Stage, StageContext
from evatok.training.loop import TrainConfig
from evatok.training.routing import EVALUATED, RouterTask
from evatok.video.decode import ClipFormat
from evatok.video.index import ClipIndex


class RouterStageConfig(Config):
    network: Size = Field(TransformerSize.preset("S"), description="preset name, or width, layers, heads")
    patch: tuple[int, int, int] | None = Field(
        None, description="frames, rows, columns; default: the proxy's"
    )
    head: Literal["classes", "factorised"] = Field(
        "classes", description="one class per assignment (paper 3.3), or one choice after the other"
    )
    conditioned: bool = Field(False, description="takes the reward weight w_q as a second input")
    objective: RouterObjective = RouterObjective()
    train: TrainConfig
    held_out: Annotated[int, OPERATIONAL] = Field(
        1024, ge=0, description="curated clips of the test split that the router is measured on"
    )

    def model(self, proxy: TokenizerConfig) -> RouterConfig:
        """The router for this proxy's clips and assignments."""
        return RouterConfig(
            frames=proxy.frames,
            size=proxy.size,
            patch=self.patch or proxy.patch,
            choices=proxy.choices,
            network=self.network,
            head=self.head,
            conditioned=self.conditioned,
        )


def run(context: StageContext) -> dict[str, Any]:
    """Train on the curated training clips; returns the last metrics, held-out ones where there are any."""
    config: RouterStageConfig = context.config
    reward = context.experiment.curate.reward
    proxy = context.experiment.proxy.model
    curated = context.inputs["curate"].location
    table = RewardTable.open(curated / "table")
    index = ClipIndex.open(context.inputs["index"].location)
    return fit_on_clips(
        context,
        RouterTask(
            router=config.model(proxy),
            objective=config.objective,
            table=curated / "table",
            metric=reward.quality,
            weights=reward.weights,
            statistics=load_statistics(curated, reward.quality),
            seed=context.seed,
        ),
        config.train,
        clips=_clips(index, table, "train"),
        held_out=_clips(index, table, "test"),
        shown=config.held_out,
        # A mirrored clip deserves the same tokens.
        form=ClipFormat(frames=proxy.frames, size=proxy.size, flip=True),
    )


def _clips(index: ClipIndex, table: RewardTable, split: str) -> ClipIndex:
    """The clips of ``split`` that were curated."""
    return replace(index, selected=table.select(split).load([]).row.numpy())


def _check(config: RouterStageConfig, experiment: Any) -> Iterator[tuple[str, str]]:
    yield from train_problems("router", config.train, experiment, _metrics(config))
    try:
        config.model(experiment.proxy.model)
    except ValueError as error:
        yield "router.patch", str(error)


def _metrics(config: RouterStageConfig) -> tuple[str, ...]:
    return metric_names(EVALUATED if config.held_out and config.train.eval_every else ())


def _describe(config: RouterStageConfig, experiment: Any) -> Description:
    with torch.device("meta"):
        model = Router(config.model(experiment.proxy.model))
    return Description(models={"router": sum(parameter.numel() for parameter in model.parameters())})


STAGE = Stage(
    name="router",
    config=RouterStageConfig,
    run=run,
    inputs=("index", "proxy", "curate"),
    reads=("curate.reward",),
    outputs=("model/", "curves/"),
    version=2,
    check=_check,
    describe=_describe,
    metrics=_metrics,
)
