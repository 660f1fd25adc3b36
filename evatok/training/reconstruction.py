"""Training a tokenizer to reconstruct clips: the proxy and the final tokenizer (evatok.md 2 and 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from evatok.assignment.space import AssignmentSpace
from evatok.losses import LossConfig, PerceptualLoss, spaced_frames
from evatok.metrics.pixels import Mse
from evatok.models.tokenizer import TokenizerConfig, TokenizerOutput, VideoTokenizer
from evatok.training.tasks import Batch, Metrics, Modules, Task

Assigner = Callable[[Tensor, Tensor], Tensor]
"""(clips [B, C, F, H, W], global sample positions int64 [B]) -> assignment int64 [B, T] of token counts."""


@dataclass(frozen=True)
class RandomAssignments:
    """Every clip gets an assignment drawn uniformly, a function of (seed, position) (paper 3.1)."""

    space: AssignmentSpace
    seed: int

    def __call__(self, device: torch.device) -> Assigner:
        return lambda clips, positions: self.space.sample(positions.cpu(), self.seed)


@dataclass
class TokenizerTask(Task):
    """``assignments``: called once in each worker, gives what assigns tokens to clips."""

    tokenizer: TokenizerConfig
    terms: LossConfig
    assignments: Callable[[torch.device], Assigner]

    def build(self, device: torch.device) -> dict[str, nn.Module]:
        self._assign = self.assignments(device)
        self._perceptual = None
        if self.terms.perceptual and self.terms.perceptual_kind != "none":
            self._perceptual = PerceptualLoss(self.terms.perceptual_kind).to(device)
        return {"model": VideoTokenizer(self.tokenizer)}

    def losses(self, modules: Modules, batch: Batch, step: int) -> Iterator[tuple[str, Tensor, Metrics]]:
        clips = batch["clip"].float() / 255
        assignment = self._assign(batch["clip"], batch["position"])
        output: TokenizerOutput = modules["model"](clips, assignment)
        terms = self._reconstruction_terms(output.reconstruction, clips, step) | output.losses
        loss = torch.stack([*terms.values()]).sum()
        tokens = assignment.sum(1).float().mean()
        yield "model", loss, {"loss": loss, **terms, **output.metrics, "tokens": tokens}

    def _reconstruction_terms(self, reconstruction: Tensor, clips: Tensor, step: int) -> dict[str, Tensor]:
        terms = {"l1": self.terms.l1 * (reconstruction - clips).abs().mean()}
        if self._perceptual is not None:
            seen = (spaced_frames(x, self.terms.perceptual_frames, step) for x in (reconstruction, clips))
            terms["perceptual"] = self.terms.perceptual * self._perceptual(*seen)
        return terms

    def evaluate(self, modules: Modules, batch: Batch) -> Metrics:
        clips = batch["clip"].float() / 255
        assignment = self._assign(batch["clip"], batch["position"])
        reconstruction = modules["model"](clips, assignment).reconstruction.clamp(0, 1)
        psnr = -10 * Mse()(reconstruction, clips).clamp(min=1e-10).log10()
        found = {"psnr": psnr.mean(), "tokens": assignment.sum(1).float().mean()}
        if self._perceptual is not None:
            found["perceptual"] = self._perceptual(reconstruction, clips)
        return found

    def export(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        tokenizer = VideoTokenizer(self.tokenizer)
        tokenizer.load_state_dict(weights)
        tokenizer.save_pretrained(folder)
