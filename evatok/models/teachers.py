"""Frozen pretrained video encoders (classes of ``transformers``) and the alignment with V-JEPA2."""

from __future__ import annotations

import json
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from evatok import weights
from evatok.config import Config
from evatok.errors import UserError
from evatok.models.tokenizer import TokenizerConfig

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class TeacherConfig(Config):
    """The frozen V-JEPA2 that decoder features are aligned with (paper 3.1, eq. 1)."""

    source: str = Field(
        "facebook/vjepa2-vitl-fpc64-256", description="Hub id or local folder of a VJEPA2Model (V-JEPA2-L)"
    )
    size: int = Field(
        256,
        gt=0,
        description="pixels the teacher sees; at 256 its grid is the tokenizer's 16 x 16 (inferred)",
    )


class Teacher(nn.Module):
    """Frozen V-JEPA2 encoder: clips to features on the tokenizer's grid, ``steps`` of them per block."""

    def __init__(
        self, config: TeacherConfig, tokenizer: TokenizerConfig, backbone: nn.Module | None = None
    ) -> None:
        """``backbone``: a VJEPA2Model for clips of ``config.size`` to use in place of the one that the config
        names.

        Raises UserError if the model is not to be had, or has fewer features per block than one.
        """
        super().__init__()
        self.config = config
        self.grid = tokenizer.grid
        self.backbone = load_vjepa2(config.source, config.size) if backbone is None else backbone
        # Only its encoder is used; the predictor would be dead weight in memory.
        self.backbone.predictor = None  # type: ignore[assignment]
        self.requires_grad_(False).eval()
        shape = cast(Any, self.backbone.config)
        if shape.crop_size != config.size:
            raise ValueError(f"the backbone numbers places for {shape.crop_size} pixels, not {config.size}")
        self.width: int = shape.hidden_size
        self.cells: int = config.size // shape.patch_size
        if tokenizer.patch[0] % shape.tubelet_size:
            raise UserError(
                f"alignment: a block of {tokenizer.patch[0]} frames is no multiple of the teacher's tubelet,"
                f" {shape.tubelet_size} frames"
            )
        self.steps: int = tokenizer.patch[0] // shape.tubelet_size

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, clips: Tensor) -> Tensor:
        """Features ``[B, T * steps * h * w, D]`` of ``clips [B, C, F, H, W]``, uint8 or float in [0, 1].

        A teacher's grid of another size is resampled to the tokenizer's.
        """
        clips = clips.float() / 255 if clips.dtype == torch.uint8 else clips.float()
        pixels = standardised(clips, self.config.size, clips.shape[2])
        found: Tensor = self.backbone(pixels, skip_predictor=True).last_hidden_state
        if (self.cells, self.cells) == self.grid:
            return found
        maps = rearrange(found, "b (t h w) d -> (b t) d h w", h=self.cells, w=self.cells)
        maps = F.interpolate(maps, self.grid, mode="bilinear", antialias=True)
        return rearrange(maps, "(b t) d h w -> b (t h w) d", b=len(clips))


class AlignmentHead(nn.Module):
    """Decoder features projected to the teacher's width and time steps: three linears (GigaTok), a split.

    The projection is on the decoder's side: on the frozen side it could make the target trivial.
    """

    def __init__(self, tokenizer: TokenizerConfig, teacher: Teacher) -> None:
        super().__init__()
        self.cells, self.steps = tokenizer.patches, teacher.steps
        width, inner = tokenizer.decoder.width, 4 * tokenizer.decoder.width
        self.project = nn.Sequential(
            nn.Linear(width, inner),
            nn.SiLU(),
            nn.Linear(inner, inner),
            nn.SiLU(),
            nn.Linear(inner, self.steps * teacher.width),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Decoder features ``[B, T * h * w, D]`` -> ``[B, T * steps * h * w, width]``, as the teacher's."""
        projected: Tensor = self.project(features)
        return rearrange(projected, "b (t n) (s d) -> b (t s n) d", n=self.cells, s=self.steps)


def standardised(clips: Tensor, size: int, frames: int) -> Tensor:
    """``[B, C, F, H, W]`` around [0, 1] as the encoders take it: ``[B, frames, C, size, size]``.

    Bicubic in space, nearest frames in time, ImageNet's mean and deviation.
    """
    if frames != clips.shape[2]:
        chosen = (torch.arange(frames, device=clips.device) * clips.shape[2]) // frames
        clips = clips.index_select(2, chosen)
    pictures = rearrange(clips, "b c f h w -> (b f) c h w")
    if pictures.shape[-2:] != (size, size):
        pictures = F.interpolate(pictures, (size, size), mode="bicubic", antialias=True)
    mean, std = (pictures.new_tensor(v)[:, None, None] for v in (_IMAGENET_MEAN, _IMAGENET_STD))
    return rearrange((pictures - mean) / std, "(b f) c h w -> b f c h w", f=frames)


def build_teacher(config: TeacherConfig, tokenizer: TokenizerConfig) -> Teacher:
    """The teacher that ``config`` names, for clips of ``tokenizer``; UserError if it is not to be had."""
    return Teacher(config, tokenizer)


def load_videomae(source: str) -> nn.Module:
    """A VideoMAEModel from a Hub id or local folder; raises UserError if it is not to be had."""
    from transformers import VideoMAEModel

    return _load(VideoMAEModel, source)


def load_vjepa2(source: str, size: int) -> nn.Module:
    """A VJEPA2Model from a Hub id or local folder; raises UserError if it is not to be had.

    size: pixels of its clips, which may differ from its training's. It has no trained positions, but numbers
    the places in a clip by its config alone, so that has to say the size.
    """
    from transformers import VJEPA2Model

    return _load(VJEPA2Model, source, crop_size=size)


def model_settings(source: str) -> dict[str, Any] | None:
    """What the ``config.json`` of a model says, without what is at the default; None where it is not here."""
    folder = weights.locate(source)
    if folder is None:
        return None
    settings: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return settings


def _load(kind: Any, source: str, **changes: Any) -> nn.Module:
    folder = weights.find(source)
    try:
        model: nn.Module = kind.from_pretrained(folder, local_files_only=True, **changes)
    except (OSError, ValueError) as error:
        raise UserError(f"{source} is no {kind.__name__}: {error}") from error
    return model
