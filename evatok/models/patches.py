"""Clips cut into patches of frames x rows x columns, and back."""

from __future__ import annotations

from torch import Tensor

Patch = tuple[int, int, int]


def patchify(clips: Tensor, patch: Patch) -> Tensor:
    """``[B, C, F, H, W] -> [B, T, h, w, C * frames * rows * columns]``."""
    frames, rows, columns = patch
    batch, channels, _, height, width = clips.shape
    cut = clips.reshape(batch, channels, -1, frames, height // rows, rows, width // columns, columns)
    return cut.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


def depatchify(values: Tensor, patch: Patch, channels: int = 3) -> Tensor:
    """The inverse of ``patchify``."""
    frames, rows, columns = patch
    batch, blocks, height, width, _ = values.shape
    cut = values.reshape(batch, blocks, height, width, channels, frames, rows, columns)
    return cut.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(
        batch, channels, blocks * frames, height * rows, width * columns
    )


def centred(clips: Tensor) -> Tensor:
    """Pixels as every network of ours takes them, [-0.5, 0.5], of uint8 or of floats in [0, 1]."""
    return clips / 255 - 0.5 if not clips.is_floating_point() else clips - 0.5
