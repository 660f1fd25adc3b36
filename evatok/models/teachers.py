"""Frozen pretrained video encoders (classes of ``transformers``) and the alignment with V-JEPA2."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from evatok.config import Config
from evatok.errors import UserError
from evatok.models.tokenizer import TokenizerConfig

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class AlignmentConfig(Config):
    """Alignment of decoder features with a frozen V-JEPA2 (paper 3.1, eq. 1)."""

    source: str = Field(
        "facebook/vjepa2-vitl-fpc64-256", description="Hub id or local folder of a VJEPA2Model (V-JEPA2-L)"
    )
    size: int = Field(
        256,
        gt=0,
        description="pixels the teacher sees; at 256 its grid is the tokenizer's 16 x 16 (inferred)",
    )
    hidden: int = Field(4, gt=0, description="inner width of the projection, times the decoder's (GigaTok)")


class Teacher(nn.Module):
    """Frozen V-JEPA2 encoder: clips to patch features."""

    def __init__(self, config: AlignmentConfig, backbone: nn.Module | None = None) -> None:
        """``backbone``: a VJEPA2Model; None loads ``config.source`` (UserError if it is not to be had)."""
        super().__init__()
        self.config = config
        self.backbone = load_vjepa2(config.source) if backbone is None else backbone
        # Only its encoder is used; the predictor would be dead weight in memory.
        self.backbone.predictor = None  # type: ignore[assignment]
        self.requires_grad_(False).eval()
        shape = cast(Any, self.backbone.config)
        self.width: int = shape.hidden_size
        self.tubelet: int = shape.tubelet_size
        self.cell: int = shape.patch_size

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, clips: Tensor) -> Tensor:
        """Features ``[B, t, h, w, D]`` of ``clips [B, C, F, H, W]``, uint8 or float in [0, 1]."""
        clips = clips.float() / 255 if clips.dtype == torch.uint8 else clips.float()
        pixels = standardised(clips, self.config.size, clips.shape[2])
        found: Tensor = self.backbone(pixels, skip_predictor=True).last_hidden_state
        side = self.config.size // self.cell
        return torch.unflatten(found, 1, (-1, side, side))


class AlignmentHead(nn.Module):
    """Decoder features projected to the teacher's grid and width: three linears, then a temporal split.

    The projection is on the decoder's side: on the frozen side it could make the target trivial.
    """

    def __init__(self, config: AlignmentConfig, tokenizer: TokenizerConfig, teacher: Teacher) -> None:
        """Raises UserError where the teacher has fewer frames per feature than the tokenizer per block."""
        super().__init__()
        if tokenizer.patch[0] % teacher.tubelet:
            raise UserError(
                f"alignment: a block of {tokenizer.patch[0]} frames is no multiple of the teacher's tubelet,"
                f" {teacher.tubelet} frames"
            )
        self.grid = tokenizer.grid
        self.steps = tokenizer.patch[0] // teacher.tubelet
        width, inner = tokenizer.decoder.width, config.hidden * tokenizer.decoder.width
        self.project = nn.Sequential(
            nn.Linear(width, inner),
            nn.SiLU(),
            nn.Linear(inner, inner),
            nn.SiLU(),
            nn.Linear(inner, self.steps * teacher.width),
        )

    def forward(self, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides of the comparison, ``[B, n, D]``.

        ``features``: ``[B, T * h * w, D]`` of the decoder. ``target``: ``[B, t, h', w', D']`` of the teacher,
        averaged or repeated to the decoder's ``h x w``.
        """
        projected = torch.unflatten(self.project(features), -1, (self.steps, -1))
        cells = self.grid[0] * self.grid[1]
        projected = torch.unflatten(projected, 1, (-1, cells)).transpose(2, 3)
        if target.shape[2:4] != self.grid:
            maps = target.flatten(0, 1).permute(0, 3, 1, 2)
            maps = F.interpolate(maps, self.grid, mode="bilinear", antialias=True)
            target = torch.unflatten(maps.permute(0, 2, 3, 1), 0, target.shape[:2])
        return projected.flatten(1, 3), target.flatten(1, 3)


def standardised(clips: Tensor, size: int, frames: int) -> Tensor:
    """``[B, C, F, H, W]`` around [0, 1] as the encoders take it: ``[B, frames, C, size, size]``.

    Bicubic in space, nearest frames in time, ImageNet's mean and deviation.
    """
    if frames != clips.shape[2]:
        chosen = (torch.arange(frames, device=clips.device) * clips.shape[2]) // frames
        clips = clips.index_select(2, chosen)
    pictures = clips.transpose(1, 2).flatten(0, 1)
    if pictures.shape[-2:] != (size, size):
        pictures = F.interpolate(pictures, (size, size), mode="bicubic", antialias=True)
    mean, std = (pictures.new_tensor(v)[:, None, None] for v in (_IMAGENET_MEAN, _IMAGENET_STD))
    return torch.unflatten((pictures - mean) / std, 0, (len(clips), frames))


def load_videomae(source: str) -> nn.Module:
    """A VideoMAEModel from a Hub id or local folder; raises UserError if it is not to be had."""
    from transformers import VideoMAEModel

    return _load(VideoMAEModel, source)


def load_vjepa2(source: str) -> nn.Module:
    """A VJEPA2Model from a Hub id or local folder; raises UserError if it is not to be had."""
    from transformers import VJEPA2Model

    return _load(VJEPA2Model, source)


def _load(kind: Any, source: str) -> nn.Module:
    try:
        model: nn.Module = kind.from_pretrained(source)
    except (OSError, ValueError) as error:
        what = "folder" if Path(source).exists() else "Hub id"
        raise UserError(
            f"no {kind.__name__} at the {what} {source}: {error}\nFetch it where there is a network"
            f" (`hf download {source}`), or name a local folder that holds it."
        ) from error
    return model
