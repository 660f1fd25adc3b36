"""The tokenizer's training terms beside the quantizer's own (evatok.md section 2)."""

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, distributed, nn

from evatok.config import Config
from evatok.metrics.perceptual import Lpips, Network
from evatok.metrics.pixels import Dssim
from evatok.models.discriminators import AdversaryConfig, TransformerAdversaryConfig, VideoMaeAdversaryConfig
from evatok.models.teachers import TeacherConfig

Perceptual = Literal["lpips-vgg", "lpips-alex", "lpips-squeeze", "dssim", "none"]
_SMALLEST_SCALE = 16


class LossConfig(Config):
    """Weights of the terms; a term of weight 0 costs nothing.

    The paper states L1, the perceptual family, 0.7 for the alignment, and the quantizer's 0.02.
    """

    l1: float = Field(1.0, ge=0, description="weight of the mean absolute error (LARP)")
    l2: float = Field(
        0.0,
        ge=0,
        description="weight of the mean squared error (not in EVATok); the L1 of a short training favours the"
        " median, which leaves small things out",
    )
    perceptual: float = Field(1.0, ge=0, description="weight of the perceptual term (LARP, GigaTok)")
    perceptual_kind: Perceptual = Field("lpips-vgg", description="dssim needs no pretrained weights")
    perceptual_frames: int | None = Field(
        None, gt=0, description="evenly spaced frames of a clip that the perceptual term sees; None: all"
    )
    adversarial: float = Field(0.3, ge=0, description="weight of the generator's adversarial term (LARP)")
    lecam: float = Field(0.001, ge=0, description="weight of LeCam in the discriminator's loss (LARP)")
    adversary: AdversaryConfig = TransformerAdversaryConfig()
    alignment: float = Field(0.7, ge=0, description="lambda, weight of the alignment term (paper 3.1)")
    teacher: TeacherConfig = TeacherConfig()

    @property
    def pretrained(self) -> list[str]:
        """The weights (``evatok.weights``) that the terms load."""
        names: list[str] = []
        if self.perceptual and "lpips" in self.perceptual_kind:
            names.append(self.perceptual_kind)
        if self.alignment:
            names.append(self.teacher.source)
        if self.adversarial and isinstance(self.adversary, VideoMaeAdversaryConfig):
            names.append(self.adversary.source)
        return names


class PerceptualLoss(nn.Module):
    """Perceptual distance of whole clips as a training term: LPIPS, or multi-scale DSSIM offline."""

    def __init__(self, kind: Literal["lpips-vgg", "lpips-alex", "lpips-squeeze", "dssim"]) -> None:
        """Raises UserError when LPIPS weights are not there."""
        super().__init__()
        self.metric = Dssim() if kind == "dssim" else Lpips(cast(Network, kind.removeprefix("lpips-")))
        self.scales = 3 if kind == "dssim" else 1

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Mean over the batch; both float ``[B, C, F, H, W]`` around [0, 1]."""
        distances = []
        for _ in range(self.scales):
            distances.append(self.metric(reconstruction, target).mean())
            if min(target.shape[-2:]) < 2 * _SMALLEST_SCALE:
                break
            reconstruction, target = (F.avg_pool3d(x, (1, 2, 2)) for x in (reconstruction, target))
        return torch.stack(distances).mean()


def spaced_frames(clips: Tensor, count: int | None, turn: int) -> Tensor:
    """``count`` evenly spaced frames of ``clips [B, C, F, H, W]``; None keeps every frame.

    Successive values of ``turn`` go through all frames. Raises ValueError when count does not divide F.
    """
    if count is None:
        return clips
    frames = clips.shape[2]
    if frames % count:
        raise ValueError(f"perceptual_frames {count} does not divide the {frames} frames of a clip")
    stride = frames // count
    return clips[:, :, turn % stride :: stride]


def generator_loss(fake: Tensor) -> Tensor:
    """Non-saturating ``-mean log sigmoid`` of the discriminator's logits on reconstructions, any shape."""
    return F.softplus(-fake).mean()


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Binary cross-entropy with noisy one-sided targets (LARP): real in [0.7, 1], fake in [0, 0.3]."""
    real_target = 1 - (torch.randn_like(real).abs() * 0.15).clamp(max=0.3)
    fake_target = (torch.randn_like(fake).abs() * 0.15).clamp(max=0.3)
    real_loss = F.binary_cross_entropy_with_logits(real, real_target)
    return (real_loss + F.binary_cross_entropy_with_logits(fake, fake_target)) / 2


class LeCam(nn.Module):
    """LeCam regularisation (Tseng et al., 2104.03310): ties logits to running means of the other side."""

    means: Tensor

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("means", torch.zeros(2))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """Penalty of logits on clips and reconstructions; then moves the running means, over all workers.

        Logits that are not finite leave the means as they are: the step that they belong to is skipped.
        """
        real_mean, fake_mean = self.means.float().unbind()
        penalty = (real - fake_mean).relu().square().mean() + (real_mean - fake).relu().square().mean()
        with torch.no_grad():
            now = torch.stack([real.float().mean(), fake.float().mean()])
            if distributed.is_available() and distributed.is_initialized():
                distributed.all_reduce(now)
                now /= distributed.get_world_size()
            moved = self.means.float().lerp(now, 1 - self.decay)
            self.means.copy_(torch.where(now.isfinite().all(), moved, self.means.float()))
        return penalty


def alignment_loss(features: Tensor, teacher: Tensor) -> Tensor:
    """Minus the mean cosine similarity of ``[B, n, D]`` features (eq. 1), between -1 and 1."""
    return -F.cosine_similarity(features.float(), teacher.float(), dim=-1).mean()
