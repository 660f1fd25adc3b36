"""Checkpoints that know no world size: whole tensors in safetensors, counters in JSON.

``state.json`` holds the counters, ``<engine>.safetensors`` all tensors of one engine under the keys that
``Engine.state`` gives. Any number of workers, at any ZeRO stage, loads what any other wrote.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor

STATE = "state.json"


@dataclass(frozen=True)
class TrainState:
    """What a run needs to go on: finished steps, clips seen, skipped micro-batches, engines' tensors."""

    step: int
    samples: int
    skipped: int
    engines: Mapping[str, Mapping[str, Tensor]]

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, tensors in self.engines.items():
            save_file(dict(tensors), folder / f"{name}.safetensors")
        counters = {"step": self.step, "samples": self.samples, "skipped": self.skipped}
        (folder / STATE).write_text(json.dumps(counters | {"engines": sorted(self.engines)}))

    @classmethod
    def load(cls, folder: Path) -> TrainState:
        counters = json.loads((folder / STATE).read_text())
        engines = {name: load_file(folder / f"{name}.safetensors") for name in counters["engines"]}
        return cls(counters["step"], counters["samples"], counters["skipped"], engines)


class Checkpoints(Protocol):
    """Where checkpoints go. Every rank calls every method at the same step."""

    def latest(self) -> TrainState | None:
        """The newest complete checkpoint, None on a fresh start."""
        ...

    def save(self, state: TrainState | None, metrics: Mapping[str, float]) -> None:
        """Keep a checkpoint. ``state`` is there on rank 0 only; ``metrics`` hold step and samples too."""
        ...


@dataclass(frozen=True)
class FolderCheckpoints:
    """Checkpoints in a local (or shared) folder, published by rename; the newest ``keep`` stay."""

    folder: Path
    keep: int = 2

    def latest(self) -> TrainState | None:
        complete = self._complete()
        return TrainState.load(complete[-1]) if complete else None

    def save(self, state: TrainState | None, metrics: Mapping[str, float]) -> None:
        if state is None:
            return
        target = self.folder / f"step-{state.step:09d}"
        with _partial(self.folder) as partial:
            state.save(partial)
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
        for stale in self._complete()[: -self.keep]:
            shutil.rmtree(stale)

    def _complete(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))


@contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    path = folder / ".partial"
    shutil.rmtree(path, ignore_errors=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
