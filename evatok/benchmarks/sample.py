"""Sampling speed: with and without the cache, at several batch sizes, uniform against adaptive clips.

Ratios of one process on one machine, random weights: the speed does not depend on what was learnt.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from evatok.config import Config
from evatok.models.generator import Generator, GeneratorConfig, NetworkConfig
from evatok.models.layers import TransformerSize
from evatok.models.sampling import Requests, SamplingConfig, sample
from evatok.models.sequence import NO_CLASS
from evatok.models.tokenizer import Size

CHOICES = (32, 64, 128, 256, 512)
UNIFORM = ((256, 256, 256, 256),)
# Eight clips of 756 tokens on average, the paper's mean on UCF-101 (Tab. 3), from 480 to 1,120.
ADAPTIVE = (
    (512, 128, 64, 32),
    (512, 128, 128, 32),
    (256, 256, 128, 64),
    (512, 256, 128, 64),
    (256, 128, 64, 32),
    (512, 512, 64, 32),
    (512, 128, 64, 32),
    (256, 128, 64, 64),
)


log = logging.getLogger(__name__)


class Settings(Config):
    size: Size = Field(TransformerSize.preset("tiny"), description="of the generator")
    codes: int = Field(8192, gt=0)
    batches: tuple[int, ...] = Field((1, 16, 64), description="clips sampled at once")
    waves: int = Field(2, ge=1, description="clips per slot: more than one shows slots being refilled")
    guidance: float = Field(1.0, ge=0)


def run(settings: Settings) -> dict[str, Any]:
    """Tokens and clips per second by batch size; ratios of cached to uncached and adaptive to uniform."""
    config = GeneratorConfig(
        network=NetworkConfig(size=settings.size),
        codes=settings.codes,
        choices=CHOICES,
        blocks=4,
        labels=("class",),
    )
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = Generator(config).to(device).eval()
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads",
        "parameters": sum(parameter.numel() for parameter in generator.parameters()),
    }
    _seconds(generator, ((32, 32, 32, 32),), 1, 1, settings)  # warm up
    alone = _seconds(generator, UNIFORM, 1, 1, settings)
    uncached = _seconds(generator, UNIFORM, 1, 1, settings, cached=False)
    figures |= {
        "uncached_tokens_per_second": 1024 / uncached,
        "cached_tokens_per_second": 1024 / alone,
        "cached_speedup": uncached / alone,
    }
    for batch in settings.batches:
        clips = batch * settings.waves
        log.info("%d clips, %d at once", clips, batch)
        for name, assignments in (("uniform", UNIFORM), ("adaptive", ADAPTIVE)):
            seconds = _seconds(generator, assignments, clips, batch, settings)
            tokens = int(_assignment(assignments, clips).sum())
            figures[f"batch_{batch}_{name}_clips_per_second"] = clips / seconds
            figures[f"batch_{batch}_{name}_tokens_per_second"] = tokens / seconds
        faster = figures[f"batch_{batch}_adaptive_clips_per_second"]
        figures[f"batch_{batch}_adaptive_speedup"] = (
            faster / figures[f"batch_{batch}_uniform_clips_per_second"]
        )
    return figures


def _seconds(
    generator: Generator,
    assignments: tuple[tuple[int, ...], ...],
    clips: int,
    slots: int,
    settings: Settings,
    cached: bool = True,
) -> float:
    requests = Requests(
        torch.full((clips,), 0 if settings.guidance != 1 else NO_CLASS),
        torch.arange(clips),
        assignment=_assignment(assignments, clips),
    )
    started = time.perf_counter()
    sample(generator, requests, SamplingConfig(slots=slots, guidance=settings.guidance), cached=cached)
    return time.perf_counter() - started


def _assignment(assignments: tuple[tuple[int, ...], ...], clips: int) -> Tensor:
    return torch.tensor([assignments[k % len(assignments)] for k in range(clips)])
