"""The generator's task: next-token prediction over packed adaptive sequences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from evatok.models.generator import Generator, GeneratorConfig
from evatok.models.sampling import uniform
from evatok.models.sequence import IGNORED, NO_CLASS, pack
from evatok.training.tasks import Batch, Metrics, Modules, Task

EVALUATED = ("loss", "length_loss", "code_loss", "tokens")


@dataclass(frozen=True)
class GenerationTask(Task):
    """``mean_tokens``: codes of a clip, mean over the training clips."""

    watched = ("code_loss", "length_loss")

    config: GeneratorConfig
    mean_tokens: float
    seed: int

    @property
    def evaluated(self) -> tuple[str, ...]:
        return EVALUATED

    def build(self, device: torch.device) -> dict[str, nn.Module]:
        return {"model": Generator(self.config).to(device)}

    def collate(self, rows: Mapping[str, Any]) -> Batch:
        """Rows as ``token_table.ragged`` gives them -> int64 tensors, the codes packed without padding.

        ``indices [N]``, ``lengths [B, T]``, ``label [B]``, ``condition [B, P]``, ``position [B]``.
        """
        return {
            "indices": torch.from_numpy(np.concatenate(rows["indices"]).astype(np.int64)),
            "lengths": torch.from_numpy(np.stack(rows["lengths"]).astype(np.int64)),
            "label": torch.from_numpy(rows["label"].astype(np.int64)),
            "condition": torch.from_numpy(np.stack(rows["condition"]).astype(np.int64)),
            "position": torch.from_numpy(rows["position"].astype(np.int64)),
        }

    def losses(self, modules: Modules, batch: Batch, step: int) -> Iterator[tuple[str, Tensor, Metrics]]:
        loss, metrics = self._loss(modules, batch, self._hide_classes(batch))
        yield "model", loss, metrics

    def evaluate(self, modules: Modules, batch: Batch) -> Metrics:
        return self._loss(modules, batch, batch["label"])[1]

    def export(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        generator = Generator(self.config)
        generator.load_state_dict(weights)
        generator.save_pretrained(folder)

    def _hide_classes(self, batch: Batch) -> Tensor:
        seeds = torch.full_like(batch["position"], self.seed)
        hidden = uniform(seeds, batch["position"], 1)[:, 0] < self.config.network.class_dropout
        return torch.where(hidden, NO_CLASS, batch["label"])

    def _loss(self, modules: Modules, batch: Batch, labels: Tensor) -> tuple[Tensor, Metrics]:
        condition = batch["condition"] if self.config.condition else None
        packed = pack(self.config.vocabulary, labels, batch["indices"], batch["lengths"], condition)
        logits = modules["model"](packed)
        losses = functional.cross_entropy(logits, packed.targets, ignore_index=IGNORED, reduction="none")
        # Divided by a constant, not by the tokens of this micro-batch: every token weighs the same however
        # the clips are spread over workers.
        clips = len(labels)
        loss = losses.sum() / (clips * (self.mean_tokens + self.config.blocks))
        is_length = packed.targets >= self.config.codes
        detached = losses.detach()
        metrics = {
            "loss": loss.detach(),
            "length_loss": detached[is_length].sum() / (clips * self.config.blocks),
            "code_loss": detached[~is_length].sum() / len(batch["indices"]),
            "tokens": torch.tensor(len(batch["indices"]) / clips),
        }
        return loss, metrics
