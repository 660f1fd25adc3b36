"""Quality of reconstructed blocks from pixels: MSE, PSNR, SSIM, and the form every metric has."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


class Reference:
    """What a metric needs of the frames it compares with, worked out once.

    Tensors whose first axis runs over the N blocks.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = tuple(parts)

    def __len__(self) -> int:
        return self.parts[0].shape[0]

    def select(self, indices: Tensor) -> Reference:
        """The blocks at ``indices``, repeats allowed."""
        return Reference([part[indices] for part in self.parts])


class QualityMetric(nn.Module):
    """Quality of blocks: ``metric(reconstruction, target) -> float32 [N]``, the mean over a block's frames.

    Both are float in [0, 1], ``[N, C, P, H, W]``. In place of the target may stand what ``prepare(target)``
    made of it. Gradients flow to the reconstruction.
    """

    name: str
    higher_is_better: bool

    def prepare(self, target: Tensor) -> Reference:
        return Reference([target])

    def compare(self, reconstruction: Tensor, reference: Reference) -> Tensor:
        raise NotImplementedError

    def forward(self, reconstruction: Tensor, target: Tensor | Reference) -> Tensor:
        reference = target if isinstance(target, Reference) else self.prepare(target)
        return self.compare(reconstruction, reference)


class Mse(QualityMetric):
    """Mean squared error."""

    name, higher_is_better = "mse", False

    def compare(self, reconstruction: Tensor, reference: Reference) -> Tensor:
        return (reconstruction - reference.parts[0]).square().flatten(1).mean(1)


class Psnr(QualityMetric):
    """Peak signal-to-noise ratio in dB for a peak of 1; of the block's mean squared error."""

    name, higher_is_better = "psnr", True

    def compare(self, reconstruction: Tensor, reference: Reference) -> Tensor:
        mse = (reconstruction - reference.parts[0]).square().flatten(1).mean(1)
        return -10 * mse.clamp(min=1e-10).log10()


class Ssim(QualityMetric):
    """Structural similarity of RGB frames (Wang et al. 2004): Gaussian window 11, sigma 1.5, no padding."""

    name, higher_is_better = "ssim", True

    def prepare(self, target: Tensor) -> Reference:
        frames = target.transpose(1, 2)  # [N, P, C, H, W]
        mean = _blur(frames)
        return Reference([frames, mean, _blur(frames.square()) - mean.square()])

    def compare(self, reconstruction: Tensor, reference: Reference) -> Tensor:
        target, target_mean, target_variance = reference.parts
        frames = reconstruction.transpose(1, 2)
        mean = _blur(frames)
        variance = _blur(frames.square()) - mean.square()
        covariance = _blur(frames * target) - mean * target_mean
        luminance = (2 * mean * target_mean + _C1) / (mean.square() + target_mean.square() + _C1)
        structure = (2 * covariance + _C2) / (variance + target_variance + _C2)
        return (luminance * structure).flatten(1).mean(1)


class Dssim(Ssim):
    """Structural dissimilarity ``(1 - SSIM) / 2``, 0 for equal frames."""

    name, higher_is_better = "dssim", False

    def compare(self, reconstruction: Tensor, reference: Reference) -> Tensor:
        return (1 - super().compare(reconstruction, reference)) / 2


def _blur(frames: Tensor) -> Tensor:
    """Gaussian means of every full window, turned: ``[..., H, W] -> [..., W - 10, H - 10]``."""
    height, width = frames.shape[-2:]
    rows = _band(height).to(frames.device, frames.dtype)
    columns = _band(width).to(frames.device, frames.dtype)
    with torch.autocast(frames.device.type, enabled=False):  # variances are small differences
        return F.linear(F.linear(frames, columns).transpose(-1, -2), rows)


@functools.lru_cache(maxsize=16)
def _band(size: int) -> Tensor:
    """``[size - 10, size]``, the window at every place: a matrix product beats a convolution here."""
    if size < _WINDOW:
        raise ValueError(f"SSIM needs frames of at least {_WINDOW} pixels, not {size}")
    taps = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    weights = (-(taps**2) / (2 * _SIGMA**2)).exp()
    weights /= weights.sum()
    places = size - _WINDOW + 1
    band = torch.zeros(places, size, dtype=torch.float64)
    for place in range(places):
        band[place, place : place + _WINDOW] = weights
    return band
