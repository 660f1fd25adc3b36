"""Training curves: means over steps and ranks, the rate, the time left, and where the time went."""

from __future__ import annotations

import logging
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from evatok.training.engine import World

FLUSH_SECONDS = 120.0
log = logging.getLogger(__name__)

ROW_KEYS = ("step", "samples", "time", "split")


class Sink(Protocol):
    """Takes the rows of the curves, on rank 0."""

    def write(self, row: Mapping[str, Any]) -> None: ...

    def flush(self) -> None: ...


class Curves:
    """Collects what the steps of one attempt report and hands rows to the sinks.

    A row: ``step`` and ``samples`` done, ``time`` (seconds since the epoch), ``split``, and the metrics. Rows
    of the split ``train`` average the steps since the row before and add ``clips_per_second`` and, as shares
    of the elapsed time, ``time_data``, ``time_forward``, ``time_backward`` and ``time_optimizer``.
    """

    def __init__(
        self,
        world: World,
        sinks: Sequence[Sink],
        step: int,
        samples: int,
        steps: int,
        latest: Mapping[str, float],
    ):
        self._world, self._sinks, self._steps = world, sinks, steps
        self._step, self._samples = step, samples
        self._sums: dict[str, Tensor | float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)
        self._seconds: dict[str, float] = defaultdict(float)
        self._begun = self._flushed = time.perf_counter()
        self.latest = dict(latest)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count the block's time as ``data``, ``forward``, ``backward`` or ``optimizer``, the device's work
        included."""
        begun = time.perf_counter()
        yield
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)
        self._seconds[part] += time.perf_counter() - begun

    def add(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Metrics of one micro-batch, the same names on every rank. Tensors stay where they are."""
        for name, value in metrics.items():
            self._sums[name] += value.detach() if isinstance(value, Tensor) else value
            self._counts[name] += 1

    def point(self, step: int, samples: int) -> None:
        """Write a row of the split ``train``. Every rank calls it."""
        local = {name: total / self._counts[name] for name, total in self._sums.items()}
        means = mean_over_ranks(local, self._world)
        elapsed = time.perf_counter() - self._begun
        means["clips_per_second"] = (samples - self._samples) / elapsed
        means |= {f"time_{part}": seconds / elapsed for part, seconds in self._seconds.items()}
        self.latest |= means
        waited = 100 * self._seconds["data"] / elapsed
        own = float(local.get("loss", float("nan")))
        log.info(
            "step %d/%d: loss here %.4f, %.0f %% of the time without clips", step, self._steps, own, waited
        )
        if self._world.rank == 0:
            left = timedelta(seconds=round(elapsed / (step - self._step) * (self._steps - step)))
            loss = means.get("loss", float("nan"))
            rate = means["clips_per_second"]
            line = f"step {step}/{self._steps}  loss {loss:.4f}  {rate:.1f} clips/s  {left} left"
            print(line, file=sys.stderr, flush=True)
        self._write(step, samples, "train", means)
        for collected in (self._sums, self._counts, self._seconds):
            collected.clear()
        self._step, self._samples, self._begun = step, samples, time.perf_counter()
        if self._begun - self._flushed > FLUSH_SECONDS:
            self.flush()

    def evaluated(self, step: int, samples: int, metrics: Mapping[str, float]) -> None:
        """Write a row of the split ``eval``; its metrics are ``latest`` under ``eval_NAME``."""
        self.latest |= {f"eval_{name}": value for name, value in metrics.items()}
        self._write(step, samples, "eval", metrics)
        self._begun = time.perf_counter()

    def flush(self) -> None:
        for sink in self._sinks:
            sink.flush()
        self._flushed = time.perf_counter()

    def _write(self, step: int, samples: int, split: str, metrics: Mapping[str, float]) -> None:
        row = {"step": step, "samples": samples, "time": time.time(), "split": split, **metrics}
        for sink in self._sinks:
            sink.write(row)


def mean_over_ranks(metrics: Mapping[str, Tensor | float], world: World) -> dict[str, float]:
    """Every rank calls it with the same names in the same order. One reduction, one wait for the device."""
    if not metrics:
        return {}
    values = torch.stack([torch.as_tensor(v, dtype=torch.float64).to(world.device) for v in metrics.values()])
    if world.size > 1:
        dist.all_reduce(values)
    return dict(zip(metrics, (values / world.size).tolist(), strict=True))
