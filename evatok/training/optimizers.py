"""The optimizers that a model is trained with, as one object with one learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, beside its count of steps
MUON_MOMENT = "momentum_buffer"


def adamw(parameters: Mapping[str, nn.Parameter], betas: tuple[float, float], decay: float) -> AdamW:
    """AdamW whose weight decay is on matrices (and larger tensors) only. The rate is set before each step."""
    groups = [
        {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=0.0, betas=betas)


class MuonWithAdamW(Optimizer):
    """Muon (Jordan et al., 2024) for the matrices of a network's layers, AdamW for everything else.

    Muon steps along the orthogonalised momentum, scaled to the size of an AdamW step (Liu et al.,
    2502.16982), so that both take the same rate. Embeddings, position tables, codebooks and what leads into
    and out of the layers stay with AdamW.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], betas: tuple[float, float], decay: float
    ) -> None:
        matrices = {n: p for n, p in parameters.items() if p.ndim == 2 and ".layers." in f".{n}"}
        others = {n: p for n, p in parameters.items() if n not in matrices}
        self._parts: list[Optimizer] = []
        if matrices:
            muon = Muon(matrices.values(), lr=0.0, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
            self._parts.append(muon)
        if others:
            self._parts.append(adamw(others, betas, decay))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        # One set of groups and states: what sets a rate or saves a state sees all of it here.
        for part in self._parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of both."""
        for part in self._parts:
            part.step()


def empty_state(group: Mapping[str, Any], like: Tensor, count: Tensor) -> dict[str, Tensor]:
    """What is kept of a parameter of this group. ``count``: steps that AdamW has taken with it."""
    if "ns_steps" in group:
        return {MUON_MOMENT: torch.zeros_like(like, requires_grad=False)}
    moments = {name: torch.zeros_like(like, requires_grad=False) for name in MOMENTS}
    return {"step": count.clone(), **moments}
