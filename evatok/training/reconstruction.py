"""Training a tokenizer to reconstruct clips: the proxy and the final tokenizer (evatok.md 2 and 5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evatok.assignment.space import AssignmentSpace
from evatok.losses import (
    LeCam,
    LossConfig,
    PerceptualLoss,
    alignment_loss,
    discriminator_loss,
    generator_loss,
    spaced_frames,
)
from evatok.metrics.pixels import Mse
from evatok.models.discriminators import build_adversary
from evatok.models.teachers import AlignmentHead, Teacher, build_teacher
from evatok.models.tokenizer import TokenizerConfig, TokenizerOutput, VideoTokenizer
from evatok.training.tasks import Batch, Metrics, Modules, Task

Assigner = Callable[[Tensor, Tensor], Tensor]
"""(clips [B, C, F, H, W], global sample positions int64 [B]) -> assignment int64 [B, T] of token counts."""

TOKENIZER = "tokenizer."


@dataclass(frozen=True)
class RandomAssignments:
    """Every clip gets an assignment drawn uniformly, a function of (seed, position) (paper 3.1)."""

    space: AssignmentSpace
    seed: int

    def __call__(self, device: torch.device) -> Assigner:
        return lambda clips, positions: self.space.sample(positions.cpu(), self.seed)


def evaluated(terms: LossConfig) -> tuple[str, ...]:
    """What an evaluation under these losses measures."""
    perceptual = bool(terms.perceptual) and terms.perceptual_kind != "none"
    return ("psnr", "tokens", *(["perceptual"] if perceptual else []))


@dataclass
class TokenizerTask(Task):
    """Reconstruction, quantizer, alignment and adversarial terms; a term of weight 0 builds nothing.

    A batch is of videos or of images (``still``), never of both; an image is a clip of one block, and gets
    the tokens that its first block gets when it is held for a whole clip.
    ``assignments``: called once in each worker, gives what assigns tokens to clips.
    """

    watched = ("l1", "perceptual", "tokens")

    tokenizer: TokenizerConfig
    terms: LossConfig
    assignments: Callable[[torch.device], Assigner]

    @property
    def evaluated(self) -> tuple[str, ...]:
        return evaluated(self.terms)

    def build(self, device: torch.device) -> dict[str, nn.Module]:
        terms = self.terms
        self._assign = self.assignments(device)
        self._perceptual = None
        if terms.perceptual and terms.perceptual_kind != "none":
            self._perceptual = PerceptualLoss(terms.perceptual_kind).to(device)
        self._teacher = build_teacher(terms.teacher, self.tokenizer).to(device) if terms.alignment else None
        modules: dict[str, nn.Module] = {"model": _Trainee(self.tokenizer, self._teacher)}
        if terms.adversarial:
            modules["discriminator"] = _Adversary(build_adversary(terms.adversary, self.tokenizer))
        return modules

    def losses(self, modules: Modules, batch: Batch, step: int) -> Iterator[tuple[str, Tensor, Metrics]]:
        clips, assignment = self._shown(batch)
        images = clips.shape[2] < self.tokenizer.frames
        output, projected = modules["model"](clips, assignment)
        reconstruction = output.reconstruction
        terms = self._reconstruction_terms(reconstruction, clips, step) | output.losses
        if self._teacher is not None:
            terms["alignment"] = self.terms.alignment * alignment_loss(projected, self._teacher(clips))
        adversary: Any = modules.get("discriminator")
        fighting = adversary is not None and step >= self.terms.adversary.start
        if fighting:
            with _frozen(adversary):
                terms["adversarial"] = self.terms.adversarial * generator_loss(adversary(reconstruction))
        loss = torch.stack([*terms.values()]).sum()
        tokens = assignment.sum(1).float().mean()
        figures = {**terms, **output.metrics, **_counts(batch), "tokens": tokens}
        yield "model", loss, {"loss": loss, **_named(figures, images)}
        if fighting and (step - self.terms.adversary.start) % self.terms.adversary.every == 0:
            real, fake = adversary(clips), adversary(reconstruction.detach())
            loss = discriminator_loss(real, fake) + self.terms.lecam * adversary.lecam(real, fake)
            figures = {"discriminator": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
            yield "discriminator", loss, _named(figures, images)

    def rate_scale(self, engine: str) -> float:
        return self.terms.adversary.rate if engine == "discriminator" else 1.0

    def evaluate(self, modules: Modules, batch: Batch) -> Metrics:
        clips = batch["clip"].float() / 255
        assignment = self._assign(batch["clip"], batch["position"])
        output: TokenizerOutput = modules["model"](clips, assignment)[0]
        reconstruction = output.reconstruction.clamp(0, 1)
        psnr = -10 * Mse()(reconstruction, clips).clamp(min=1e-10).log10()
        found = {"psnr": psnr.mean(), "tokens": assignment.sum(1).float().mean()}
        if self._perceptual is not None:
            found["perceptual"] = self._perceptual(reconstruction, clips)
        return found

    def export(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """Without the alignment head."""
        tokenizer = VideoTokenizer(self.tokenizer)
        kept = {k.removeprefix(TOKENIZER): v for k, v in weights.items() if k.startswith(TOKENIZER)}
        tokenizer.load_state_dict(kept)
        tokenizer.save_pretrained(folder)

    def _shown(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Clips in [0, 1] and their assignments. A batch of images is of clips of one block."""
        assignment = self._assign(batch["clip"], batch["position"])
        clips = batch["clip"].float() / 255
        if "still" in batch and batch["still"].any():
            return clips[:, :, : self.tokenizer.patch[0]], assignment[:, :1]
        return clips, assignment

    def _reconstruction_terms(self, reconstruction: Tensor, clips: Tensor, step: int) -> dict[str, Tensor]:
        terms = {"l1": self.terms.l1 * (reconstruction - clips).abs().mean()}
        if self.terms.l2:
            terms["l2"] = self.terms.l2 * (reconstruction - clips).square().mean()
        if self._perceptual is not None:
            count = self.terms.perceptual_frames
            count = count and math.gcd(count, clips.shape[2])  # fewer of an image, which has fewer frames
            seen = (spaced_frames(x, count, step) for x in (reconstruction, clips))
            terms["perceptual"] = self.terms.perceptual * self._perceptual(*seen)
        return terms


class _Trainee(nn.Module):
    """The tokenizer and the head that only its training needs."""

    def __init__(self, config: TokenizerConfig, teacher: Teacher | None) -> None:
        super().__init__()
        self.tokenizer = VideoTokenizer(config)
        self.alignment = AlignmentHead(config, teacher) if teacher is not None else None

    def forward(self, clips: Tensor, assignment: Tensor) -> tuple[TokenizerOutput, Tensor | None]:
        output: TokenizerOutput = self.tokenizer(clips, assignment)
        return output, self.alignment(output.features) if self.alignment is not None else None


class _Adversary(nn.Module):
    """A discriminator with the running means of its LeCam term, which a checkpoint must keep."""

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator
        self.lecam = LeCam()

    def forward(self, clips: Tensor) -> Tensor:
        logits: Tensor = self.discriminator(clips)
        return logits


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No gradients for the module's parameters from what is computed in the block."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _named(figures: dict[str, Tensor], images: bool) -> dict[str, Tensor]:
    """The figures of images have curves of their own."""
    return {f"image_{name}": value for name, value in figures.items()} if images else figures


def _counts(batch: Batch) -> dict[str, Tensor]:
    """Share of the clips that stand in for one that could not be decoded."""
    return {"replaced": batch["replaced"].float().mean()} if "replaced" in batch else {}
