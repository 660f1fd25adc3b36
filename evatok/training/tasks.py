"""What is trained: a task builds its modules and says what their losses are on a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Batch = dict[str, Tensor]
"""``clip`` uint8 [B, C, F, H, W]; int64 [B]: ``position`` (global sample position), ``row`` (index row)."""

Metrics = Mapping[str, "Tensor | float"]
Modules = Mapping[str, Callable[..., Any]]


class Task(ABC):
    """Made on the driver from configs, pickled, and built inside each worker.

    A task's randomness per sample depends on (seed, position) alone, so that a resumed run or another number
    of workers draws the same. ``watched``: metrics that progress shows beside ``loss``.
    """

    watched: tuple[str, ...] = ()

    @property
    def evaluated(self) -> tuple[str, ...]:
        """Names of what ``summary`` gives at the least; a sweep's objectives are checked by them."""
        return ()

    @abstractmethod
    def build(self, device: torch.device) -> dict[str, nn.Module]:
        """The modules to train by engine name, ``model`` among them; what is frozen stays inside the task.

        Of every part of them that has an ``end_step`` the loop calls it before every optimizer step.
        """

    @abstractmethod
    def losses(self, modules: Modules, batch: Batch, step: int) -> Iterator[tuple[str, Tensor, Metrics]]:
        """Yield (engine name, scalar loss, metrics) for one micro-batch.

        The loop runs the backward pass before it asks for the next loss. A loss is a mean over the batch's
        clips, so that it means the same however the clips are spread over workers. The metric ``loss`` is
        the one that progress lines show.
        """

    def evaluate(self, modules: Modules, batch: Batch) -> Metrics:
        """Metrics of one held-out batch, means over its samples. Called without gradients."""
        return {}

    def summary(self, means: Mapping[str, float]) -> dict[str, float]:
        """What an evaluation reports, of the means that ``evaluate`` gave over all samples."""
        return dict(means)

    def collate(self, columns: Mapping[str, NDArray[Any]]) -> Batch:
        """Tensors of a batch of the stream's rows, on the CPU."""
        # Copies: where in a block of the stream a batch lies decides its alignment, and that the last digits.
        return {name: torch.tensor(np.ascontiguousarray(column)) for name, column in columns.items()}

    def rate_scale(self, engine: str) -> float:
        """Factor on the learning rate of an engine."""
        return 1.0

    @abstractmethod
    def export(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """Write the model for ``from_pretrained``. ``weights``: a state dict of ``build()["model"]``."""
