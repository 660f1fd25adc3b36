"""Generator: a GPT on the tokens of the final tokenizer (evatok.md 6).

Leaves ``model/`` (weights and config for ``Generator.from_pretrained``) and ``curves/``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field

from evatok.config import OPERATIONAL, Config
from evatok.models.generator import Generator, GeneratorConfig, NetworkConfig
from evatok.models.layers import TransformerSize
from evatok.models.tokenizer import VideoTokenizer
from evatok.stages.fitting import fit_stage, metric_names, train_problems
from evatok.stages.stage import Description, Stage, StageContext
from evatok.training.generation import EVALUATED, GenerationTask
from evatok.training.loop import TrainConfig
from evatok.training.token_table import count_rows, mean_tokens, read_vocabulary

PAPER_SIZES = ("B", "L", "L-plus")


class GeneratorStageConfig(Config):
    network: NetworkConfig = NetworkConfig()
    train: TrainConfig
    held_out: Annotated[int, OPERATIONAL] = Field(
        256, ge=0, description="clips of the test split that the loss is also measured on"
    )


def run(context: StageContext) -> dict[str, Any]:
    """Train on the encoded training clips; returns the last metrics of training."""
    from evatok.distributed.tokens import token_stream

    config: GeneratorStageConfig = context.config
    tokens = context.inputs["tokens"].location
    vocabulary = read_vocabulary(tokens)
    ranks = max(1, context.resources.workers)
    held_out = min(config.held_out, count_rows(tokens, "test")) // ranks * ranks
    task = GenerationTask(
        GeneratorConfig(network=config.network, **dict(vocabulary)),
        mean_tokens=mean_tokens(tokens, "train"),
        seed=context.seed,
    )
    evaluation = partial(
        token_stream, tokens, "test", context.seed, start=0, count=held_out, rows_per_block=1
    )
    stream = partial(token_stream, tokens, "train", context.seed)
    return fit_stage(context, task, config.train, stream, evaluation if held_out else None)


def _check(config: GeneratorStageConfig, experiment: Any) -> Iterator[tuple[str, str]]:
    return train_problems("generator", config.train, experiment, _metrics(config))


def _metrics(config: GeneratorStageConfig) -> tuple[str, ...]:
    return metric_names(EVALUATED if config.held_out else ())


def _describe(config: GeneratorStageConfig, experiment: Any) -> Description:
    shape = experiment.tokenizer.model
    with torch.device("meta"):
        codes = VideoTokenizer(shape).codes

    def counted(network: NetworkConfig) -> tuple[int, int]:
        """Parameters and positions."""
        known = {"codes": codes, "choices": shape.choices, "blocks": shape.blocks}
        model_config = GeneratorConfig(network=network, condition=experiment.tokens.condition, **known)
        with torch.device("meta"):
            model = Generator(model_config)
        return sum(parameter.numel() for parameter in model.parameters()), model_config.positions

    parameters, longest = counted(config.network)
    presets = {
        f"generator_{name}": counted(
            config.network.model_copy(update={"size": TransformerSize.preset(name)})
        )[0]
        for name in PAPER_SIZES
    }
    clips = config.train.steps * config.train.global_batch
    return Description(
        models={"generator": parameters, **presets},
        compute=6.0 * parameters * clips * longest,
        notes=(
            f"generator_{', generator_'.join(PAPER_SIZES)}: what the presets would have here",
            f"compute: at most, for sequences of {longest:,} tokens",
            f"not counted: an embedding of {config.network.size.width} numbers per class of the index",
        ),
    )


STAGE = Stage(
    name="generator",
    config=GeneratorStageConfig,
    run=run,
    inputs=("tokens",),
    outputs=("model/", "curves/"),
    check=_check,
    describe=_describe,
    metrics=_metrics,
)
