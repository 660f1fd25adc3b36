"""Differentiable augmentation of clips (DiffAug, 2006.10738): colour, translation, cutout."""

from __future__ import annotations

import torch
from torch import Tensor

DRAWS = 7
_TRANSLATION, _CUTOUT = 0.125, 0.2


def augment(clips: Tensor, draws: Tensor | None = None) -> Tensor:
    """``clips [B, C, F, H, W]`` around [0, 1], every one changed in its own way, all its frames alike.

    ``draws``: uniform in [0, 1), ``[B, DRAWS]``: brightness, saturation, contrast, translation down and
    right, cutout's row and column; None draws them. What is moved in or cut out is grey.
    """
    if draws is None:
        draws = torch.rand(len(clips), DRAWS, device=clips.device)
    brightness, saturation, contrast, down, right, row, column = draws[..., None, None, None, None].unbind(1)
    x = clips - 0.5 + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * (2 * saturation)
    mean = x.mean((1, 2, 3, 4), keepdim=True)
    x = mean + (x - mean) * (contrast + 0.5)
    return _cut_out(_translate(x, down, right), row, column) + 0.5


def _translate(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    for axis, share in ((-2, down), (-1, right)):
        size = x.shape[axis]
        reach = round(_TRANSLATION * size)
        shift = (share * (2 * reach + 1)).long() - reach  # [B, 1, 1, 1, 1]
        shape = [1] * x.ndim
        shape[axis] = size
        source = torch.arange(size, device=x.device).view(shape) - shift
        index = source.clamp(0, size - 1).expand(x.shape)
        x = x.gather(axis, index) * ((source >= 0) & (source < size))
    return x


def _cut_out(x: Tensor, row: Tensor, column: Tensor) -> Tensor:
    inside = torch.ones((), dtype=torch.bool, device=x.device)
    for axis, share in ((-2, row), (-1, column)):
        size = x.shape[axis]
        extent = round(_CUTOUT * size)
        start = (share * (size + 1 - extent % 2)).long() - extent // 2
        shape = [1] * x.ndim
        shape[axis] = size
        place = torch.arange(size, device=x.device).view(shape)
        inside = inside & (place >= start) & (place < start + extent)
    return x * ~inside
