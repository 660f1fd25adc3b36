"""Clips cut into patches of frames x rows x columns, and back."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

Patch = tuple[int, int, int]


def patchify(clips: Tensor, patch: Patch) -> Tensor:
    """``[B, C, F, H, W] -> [B, T, h, w, C * frames * rows * columns]``."""
    p, y, x = patch
    return rearrange(clips, "b c (t p) (h y) (w x) -> b t h w (c p y x)", p=p, y=y, x=x)


def depatchify(values: Tensor, patch: Patch) -> Tensor:
    """The inverse of ``patchify``."""
    p, y, x = patch
    return rearrange(values, "b t h w (c p y x) -> b c (t p) (h y) (w x)", p=p, y=y, x=x)


def centred(clips: Tensor) -> Tensor:
    """Pixels as every network of ours takes them, [-0.5, 0.5], of uint8 or of floats in [0, 1]."""
    return clips - 0.5 if clips.is_floating_point() else clips / 255 - 0.5
