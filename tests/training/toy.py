"""A small task for tests of the loop: a regression with dropout, and a GAN around it."""

from __future__ import annotations

import json
import os
import signal
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from evatok.artifacts import Location
from evatok.errors import UserError
from evatok.training.checkpoint import FolderCheckpoints
from evatok.training.loop import TrainConfig, train
from evatok.training.tasks import Batch, Metrics, Modules, Task
from evatok.video.order import ClipOrder

ORDER = ClipOrder(50, seed=5)


@dataclass
class ToyTask(Task):
    dropout: float = 0.0
    adversarial: bool = False
    poison: tuple[int, ...] = ()  # steps whose loss is made infinite
    steep: tuple[int, ...] = ()  # steps whose loss is finite, but on the last rank its gradient is not,
    steep_engine: str = "model"  # for this engine
    broken: str = ""  # what the last rank cannot be built for
    die_at: int = -1  # step at which one process kills itself, once,
    marker: str = ""  # which is when this file is not there yet

    def build(self, device: torch.device) -> dict[str, nn.Module]:
        if self.broken and dist.get_rank() == dist.get_world_size() - 1:
            raise UserError(self.broken)
        body = [nn.Linear(5, 13), nn.Tanh(), nn.Dropout(self.dropout), nn.BatchNorm1d(13, momentum=0.0)]
        layers = nn.Sequential(*body[: 3 if self.dropout else 2], nn.Linear(13, 3))
        modules: dict[str, nn.Module] = {"model": nn.Sequential(OrderedDict(layers=layers))}
        if self.adversarial:
            modules["discriminator"] = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 1))
        return modules

    def losses(
        self, modules: Modules, batch: Batch, step: int
    ) -> Iterator[tuple[str, torch.Tensor, Metrics]]:
        if step == self.die_at and not os.path.exists(self.marker):
            Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        x, y = batch["x"], batch["y"]
        prediction = modules["model"](x)
        if step in self.steep and self.steep_engine == "model":
            make_steep(prediction)
        loss = (prediction - y).square().mean()
        metrics = {"loss": loss}
        if step in self.poison:
            loss = loss * torch.inf
        if self.adversarial:
            discriminator = modules["discriminator"]
            discriminator.requires_grad_(False)
            fooled = -discriminator(prediction).mean()
            discriminator.requires_grad_(True)
            loss, metrics["fooled"] = loss + 0.1 * fooled, fooled
        yield "model", loss, metrics
        if self.adversarial and step % 2 == 0:
            logits = discriminator(prediction.detach())
            if step in self.steep and self.steep_engine == "discriminator":
                make_steep(logits)
            margin = logits.mean() - discriminator(y).mean()
            yield "discriminator", margin + 0.1 * margin**2, {"margin": margin}

    def evaluate(self, modules: Modules, batch: Batch) -> Metrics:
        return {"error": (modules["model"](batch["x"]) - batch["y"]).abs().mean()}

    def export(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        plain = {name: value.tolist() for name, value in weights.items()}
        (folder / "weights.json").write_text(json.dumps(plain))


def make_steep(value: torch.Tensor) -> None:
    """Make the gradient that comes back through ``value`` infinite, on the last rank alone."""
    if value.requires_grad and dist.get_rank() == dist.get_world_size() - 1:
        value.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))


def toy_samples(positions: torch.Tensor) -> Batch:
    """The samples at these global positions: y is a fixed function of an x that goes by the row."""
    rows = [ORDER.rows(int(position), 1)[0] for position in positions]
    x = torch.stack([torch.randn(5, generator=torch.Generator().manual_seed(int(row))) for row in rows])
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x[:, 3:].sum(1)], 1)
    return {"x": x, "y": y, "position": positions.clone()}


def toy_batches(batch: int, micro: int, rank: int = 0, workers: int = 1):
    """``batches`` of ``train`` for one rank: steps of ``batch`` samples in micro-batches, round robin."""

    def batches(start: int) -> Iterator[Batch]:
        first = start
        while True:
            for begin in range(first + rank * micro, first + batch, micro * workers):
                yield toy_samples(torch.arange(begin, begin + micro))
            first += batch

    return batches


class Rows(list[dict[str, Any]]):
    """A sink that keeps the rows."""

    def write(self, row: dict[str, Any]) -> None:
        self.append(dict(row))

    def flush(self) -> None:
        pass

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self if row["split"] == "train"]


def toy_config(**changes: Any) -> TrainConfig:
    settings = {"steps": 12, "global_batch": 8, "micro_batch": 2, "lr": 1e-2, "final_lr": 1e-3, "ema": 0.9}
    return TrainConfig(**settings | {"log_every": 1, "checkpoint_every": 6, "keep_checkpoints": 9} | changes)


def toy_run(folder: Path, task: Task | None = None, evaluation: Sequence[Batch] = (), **changes: Any):
    """Train in this process group; returns the curve's rows and what ``train`` returned."""
    config, rows = toy_config(**changes), Rows()
    workers, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    trained = train(
        task or ToyTask(),
        config,
        toy_batches(config.global_batch, config.micro(workers), rank, workers),
        seed=3,
        checkpoints=FolderCheckpoints(Location.parse(folder), keep=config.keep_checkpoints),
        sinks=[rows] if rank == 0 else [],
        evaluation=evaluation,
    )
    return rows, trained
