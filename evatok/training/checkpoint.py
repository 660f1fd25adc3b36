"""Checkpoints that know no world size: whole tensors in safetensors, counters in JSON.

``state.json`` holds the counters and the newest metrics, ``<engine>.safetensors`` all tensors of one engine
under the keys that ``Engine.state`` gives. Any number of workers, at any ZeRO stage, loads what any other
wrote.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor

from evatok.artifacts import Location

STATE = "state.json"


@dataclass(frozen=True)
class TrainState:
    """What a run needs to go on: finished steps, clips seen, skipped losses and updates, engines' tensors.

    ``metrics``: the newest of the curves, so that a run that ended before it could report them still can.
    """

    step: int
    samples: int
    skipped: int
    engines: Mapping[str, Mapping[str, Tensor]]
    metrics: Mapping[str, float]

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, tensors in self.engines.items():
            save_file(dict(tensors), folder / f"{name}.safetensors")
        counters = {"step": self.step, "samples": self.samples, "skipped": self.skipped}
        rest = {"engines": sorted(self.engines), "metrics": dict(self.metrics)}
        (folder / STATE).write_text(json.dumps(counters | rest))

    @classmethod
    def load(cls, folder: Path) -> TrainState:
        counters = json.loads((folder / STATE).read_text())
        engines = {name: load_file(folder / f"{name}.safetensors") for name in counters["engines"]}
        return cls(counters["step"], counters["samples"], counters["skipped"], engines, counters["metrics"])


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
    """Checkpoints in a folder that every rank sees; the newest ``keep`` stay.

    One without its ``state.json``, which is written last, does not exist.
    """

    location: Location
    keep: int = 2

    def latest(self) -> TrainState | None:
        for name in reversed(self.location.list()):
            if not self.location.exists(f"{name}/{STATE}"):
                continue
            with tempfile.TemporaryDirectory() as folder:
                return TrainState.load(self.location.download(name, folder))
        return None

    def save(self, state: TrainState | None, metrics: Mapping[str, float]) -> None:
        if state is None:
            return
        name = f"step-{state.step:09d}"
        with tempfile.TemporaryDirectory() as folder:
            state.save(Path(folder))
            counters = (Path(folder) / STATE).read_bytes()
            (Path(folder) / STATE).unlink()
            self.location.upload(folder, name)
        self.location.write_bytes(f"{name}/{STATE}", counters)
        for stale in self.location.list()[: -self.keep]:
            self.location.delete(stale)
