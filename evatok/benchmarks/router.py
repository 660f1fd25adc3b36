"""What the choices of a router are worth: every kind trained on one run's reward table, judged on its
held-out clips."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from evatok.artifacts import Location
from evatok.assignment.reward import RewardWeights, percentile, reward
from evatok.assignment.space import AssignmentSpace
from evatok.assignment.table import RewardTable
from evatok.benchmarks.search import decoded
from evatok.config import Config
from evatok.errors import UserError
from evatok.models.layers import TransformerSize
from evatok.models.router import Router, RouterConfig, RouterObjective
from evatok.models.tokenizer import Size, VideoTokenizer
from evatok.stages.curate import load_statistics
from evatok.training.checkpoint import FolderCheckpoints
from evatok.training.loop import TrainConfig, train
from evatok.training.routing import RouterTask
from evatok.training.tasks import Batch
from evatok.video.index import ClipIndex

log = logging.getLogger(__name__)


class Settings(Config):
    """What is compared. On two cores the defaults take a few minutes after `make quickstart`."""

    run: str = Field("runs/quickstart", description="folder of a run that has curated clips of both splits")
    metric: str = Field("psnr", description="the recorded quality that the rewards are made of")
    w_q: tuple[float, ...] = Field(
        (0.4, 0.8, 1.2, 1.6, 2.0), min_length=1, description="weights of quality (paper 4.2); 1.2 is needed"
    )
    network: Size = TransformerSize(width=64, layers=2, heads=2)
    temperature: float = Field(0.1, gt=0, description="of soft targets, in units of reward")
    steps: int = Field(300, gt=0, description="of every router for one weight")
    conditioned_steps: int = Field(
        900, gt=0, description="of a router for all weights; fewer than those of one for each of five"
    )
    batch: int = Field(32, gt=0, description="clips per step")
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    seeds: int = Field(3, gt=0, description="trainings of every kind; percentiles are their means")
    threads: int = Field(2, gt=0, description="CPU threads")


@dataclass(frozen=True)
class Clips:
    """Curated clips of one split in memory. pixels: uint8 [N, C, F, H, W]; rewards need the qualities."""

    row: Tensor
    pixels: Tensor
    quality: Tensor

    def batches(self, size: int, start: int) -> Iterator[Batch]:
        """Endless batches in a shuffled order; the same position always is the same clip."""
        position = start
        while True:
            positions = torch.arange(position, position + size)
            epochs = positions // len(self.row)
            orders = {int(e): np.random.default_rng(int(e)).permutation(len(self.row)) for e in epochs}
            places = torch.tensor(
                [orders[int(p) // len(self.row)][int(p) % len(self.row)] for p in positions]
            )
            yield {"clip": self.pixels[places], "row": self.row[places], "position": positions}
            position += size


def run(settings: Settings) -> dict[str, Any]:
    """Reward percentiles (eq. 8) on the held-out clips, in percent.

    ``objectives``: hard, soft, expected at w_q 1.2; ``factorised``: soft targets with that head; ``static``
    and ``uniform``: the best fixed and the best uniform assignment of the training clips; ``conditioned``:
    per w_q {"one", "own"}, of one conditioned router and of a router trained for that weight alone, both
    with soft targets; ``largest_gap``: the most that "own" is ahead, in points.
    """
    torch.set_num_threads(settings.threads)
    comparison = _Comparison(settings)
    objectives = {kind: comparison.percentile(kind, 1.2) for kind in ("hard", "soft", "expected")}
    conditioned = {
        f"{w_q:g}": {
            "one": comparison.percentile("soft", w_q, conditioned=True),
            "own": comparison.percentile("soft", w_q),
        }
        for w_q in settings.w_q
    }
    return {
        "objectives": objectives,
        "factorised": comparison.percentile("soft", 1.2, head="factorised"),
        **comparison.constants(1.2),
        "conditioned": conditioned,
        "largest_gap": max(entry["own"] - entry["one"] for entry in conditioned.values()),
        "clips": {"train": len(comparison.train.row), "test": len(comparison.test.row)},
        "seconds_per_router": comparison.seconds / len(comparison.routers),
    }


class _Comparison:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        run = Location.parse(settings.run)
        self.table = run / "curate" / "table"
        if not self.table.list():
            raise UserError(
                f"{run.uri} holds no curated clips: run `make quickstart`, or name another run with"
                " --set run=FOLDER"
            )
        self.statistics = load_statistics(run / "curate", settings.metric)
        self.proxy = VideoTokenizer.from_artifact(run / "proxy").config
        self.space = AssignmentSpace.of(self.proxy)
        self.shape = RouterConfig(
            frames=self.proxy.frames,
            size=self.proxy.size,
            patch=self.proxy.patch,
            choices=self.proxy.choices,
            network=settings.network,
        )
        index = ClipIndex.open(run / "index")
        self.train, self.test = (self._clips(index, split) for split in ("train", "test"))
        self.routers: dict[tuple[Any, ...], Router] = {}
        self.seconds = 0.0

    def percentile(self, kind: str, w_q: float, *, conditioned: bool = False, head: str = "classes") -> float:
        """Of routers trained so, under the weight ``w_q``."""
        found = []
        for seed in range(self.settings.seeds):
            router = self._router(kind, None if conditioned else w_q, head, seed)
            with torch.inference_mode():
                given = [torch.full((len(self.test.row),), w_q)] if conditioned else []
                chosen = router(self.test.pixels, *given).argmax(-1)
            found.append(percentile(self._rewards(self.test, w_q), chosen))
        return sum(found) / len(found)

    def constants(self, w_q: float) -> dict[str, float]:
        """Percentiles of the best fixed and the best uniform assignment of the training clips."""
        means, held = self._rewards(self.train, w_q).mean(0), self._rewards(self.test, w_q)
        uniforms = self.space.uniforms()
        best = {"static": means.argmax(), "uniform": uniforms[means[uniforms].argmax()]}
        return {name: percentile(held, index.expand(len(held))) for name, index in best.items()}

    def _rewards(self, clips: Clips, w_q: float) -> Tensor:
        weights = RewardWeights(w_q)
        return reward(
            clips.quality.double(), self.space.totals(), self.settings.metric, weights, self.statistics
        )

    def _router(self, kind: str, w_q: float | None, head: str, seed: int) -> Router:
        """Trained once; ``w_q`` None: conditioned on it."""
        key = (kind, w_q, head, seed)
        if key not in self.routers:
            settings, started = self.settings, time.perf_counter()
            task = RouterTask(
                router=self.shape.model_copy(update={"head": head, "conditioned": w_q is None}),
                objective=RouterObjective.model_validate({"kind": kind, "temperature": settings.temperature}),
                table=self.table,
                metric=settings.metric,
                weights=RewardWeights(1.2 if w_q is None else w_q),
                statistics=self.statistics,
                seed=seed,
            )
            steps = settings.conditioned_steps if w_q is None else settings.steps
            log.info("%s router number %d, %d steps", kind, len(self.routers) + 1, steps)
            config = TrainConfig(
                steps=steps,
                global_batch=settings.batch,
                lr=settings.lr,
                final_lr=settings.lr / 100,
                warmup=steps // 10,
                weight_decay=settings.weight_decay,
                clip=1.0,
                ema=0.98,
                log_every=steps,
                checkpoint_every=steps,
            )
            with tempfile.TemporaryDirectory() as folder:
                trained = train(
                    task,
                    config,
                    lambda start: self.train.batches(settings.batch, start),
                    seed=seed,
                    checkpoints=FolderCheckpoints(Location.parse(folder)),
                )
            router = Router(task.router)
            router.load_state_dict(trained.weights)
            self.routers[key] = router.eval()
            self.seconds += time.perf_counter() - started
        return self.routers[key]

    def _clips(self, index: ClipIndex, split: str) -> Clips:
        known = RewardTable.open(self.table).select(split).load([self.settings.metric])
        if not len(known):
            raise UserError(f"{self.table.uri} has no clips of the split {split}")
        found = index.take(known.row.numpy()).to_pylist()
        pixels = decoded([(clip["uri"], clip["start"], clip["fps"]) for clip in found], self.proxy)
        return Clips(known.row, pixels, known.quality[self.settings.metric])
