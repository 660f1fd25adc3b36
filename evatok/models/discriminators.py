"""Adversaries of the tokenizer: a transformer on patches (LARP), or heads on frozen VideoMAE features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from evatok.config import Config
from evatok.models.augment import augment
from evatok.models.layers import TransformerSize, encoder_layer
from evatok.models.patches import Patch, centred, patchify
from evatok.models.teachers import load_videomae, standardised
from evatok.models.tokenizer import Size, TokenizerConfig

_LARP_SIZE = TransformerSize(width=512, layers=12, heads=8)
_VIRTUAL_BATCH = 8


class _Learning(Config):
    """When and how fast an adversary learns."""

    start: int = Field(0, ge=0, description="step from which the tokenizer sees the adversarial term (LARP)")
    every: int = Field(5, gt=0, description="steps of the tokenizer per step of the adversary (LARP)")
    rate: float = Field(0.3, gt=0, description="its learning rate as a share of the tokenizer's (LARP)")


class TransformerAdversaryConfig(_Learning):
    """Transformer discriminator "as in LARP" (paper 3.1)."""

    kind: Literal["transformer"] = "transformer"
    patch: Patch = Field((4, 8, 8), description="frames, rows and columns of a patch (LARP)")
    network: Size = Field(_LARP_SIZE, description="preset name, or width, layers, heads (LARP's script)")
    logits: Literal["patch", "cls"] = Field(
        "patch", description="one logit per patch, as the paper's word PatchGAN says, or LARP's single one"
    )


class VideoMaeAdversaryConfig(_Learning):
    """Frozen VideoMAE-B features under trained heads (paper 3.4, I.2); replaces the transformer."""

    kind: Literal["videomae"] = "videomae"
    source: str = Field(
        "MCG-NJU/videomae-base",
        description="Hub id or local folder of a VideoMAEModel; not the paper's own, which cites InternVideo"
        " (V-RAE: its vit_b_hybrid_pt_800e.pth, layer_norm_eps 1e-6) and would have to be converted",
    )
    taps: tuple[int, ...] = Field(
        (0, 3, 6, 9, 12),
        description="hidden states under a head; 0 is the embedding (GigaTok: 0 and 2, 5, 8, 11)",
    )
    rate: float = Field(0.1, gt=0, description="its learning rate as a share of the tokenizer's (V-RAE)")


AdversaryConfig = Annotated[TransformerAdversaryConfig | VideoMaeAdversaryConfig, Field(discriminator="kind")]


class TransformerDiscriminator(nn.Module):
    """Patches, a plain transformer over all of them, logits."""

    def __init__(self, config: TransformerAdversaryConfig, frames: int, size: int) -> None:
        super().__init__()
        self.config = config
        depth, rows, columns = config.patch
        width = config.network.width
        places = frames // depth * (size // rows) * (size // columns)
        self.embed = nn.Linear(3 * depth * rows * columns, width)
        self.position = nn.Parameter(torch.randn(places, width) * 0.02)
        if config.logits == "cls":
            self.cls = nn.Parameter(torch.randn(width) * 0.02)
        self.layers = nn.ModuleList(encoder_layer(config.network) for _ in range(config.network.layers))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(self, clips: Tensor) -> Tensor:
        """Logits ``[B, n]``, positive for real, of ``clips [B, C, F, H, W]`` around [0, 1].

        Clips may have fewer frames than it was made for.
        """
        patches = patchify(centred(clips), self.config.patch).flatten(1, 3)
        x = self.embed(patches.to(self.embed.weight.dtype)) + self.position[: patches.shape[1]]
        if self.config.logits == "cls":
            x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1)
        for layer in self.layers:
            x = layer(x)
        if self.config.logits == "cls":
            x = x[:, :1]
        return self.head(x).squeeze(-1).float()  # type: ignore[no-any-return]


class VideoMaeDiscriminator(nn.Module):
    """Logits from several layers of a frozen VideoMAE; only the heads learn.

    Clips are augmented as in DiffAug before the backbone sees them, gradients flow through both.
    """

    def __init__(self, config: VideoMaeAdversaryConfig, backbone: nn.Module | None = None) -> None:
        """``backbone``: a VideoMAEModel; None loads ``config.source`` (UserError if it is not to be had)."""
        super().__init__()
        self.config = config
        self.backbone = load_videomae(config.source) if backbone is None else backbone
        self.backbone.requires_grad_(False).eval()
        shape = self.backbone.config
        self.size: int = shape.image_size  # type: ignore[union-attr, assignment]
        self.frames: int = shape.num_frames  # type: ignore[union-attr, assignment]
        self.heads = nn.ModuleList(FeatureHead(shape.hidden_size) for _ in config.taps)  # type: ignore[union-attr, arg-type]

    def train(self, mode: bool = True) -> VideoMaeDiscriminator:
        """The backbone stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, clips: Tensor, draws: Tensor | None = None) -> Tensor:
        """Logits ``[B, taps * n]``, positive for real, of ``clips [B, C, F, H, W]`` around [0, 1].

        ``draws``: uniform in [0, 1), ``[B, augment.DRAWS]``, decide the augmentation (None: fresh ones).
        """
        pixels = standardised(augment(clips.float(), draws), self.size, self.frames)
        states: Sequence[Tensor] = self.backbone(pixels, output_hidden_states=True).hidden_states
        logits = [head(states[tap].mT) for head, tap in zip(self.heads, self.config.taps)]
        return torch.cat(logits, 1).float()


class FeatureHead(nn.Module):
    """1D convolutions over a layer's token sequence (StyleGAN-T's head, as GigaTok uses it)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pointwise = _ConvBlock(width, 1)
        self.wide = _ConvBlock(width, 9)
        self.logit = spectral_norm(nn.Conv1d(width, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``[B, n]`` of ``features [B, D, n]``."""
        x = self.pointwise(features)
        x = (x + self.wide(x)) * 0.5**0.5
        return self.logit(x).squeeze(1)  # type: ignore[no-any-return]


class _ConvBlock(nn.Sequential):
    def __init__(self, width: int, kernel: int) -> None:
        convolution = nn.Conv1d(width, width, kernel, padding=kernel // 2, padding_mode="circular")
        super().__init__(spectral_norm(convolution), LocalBatchNorm(width), nn.LeakyReLU(0.2))


class LocalBatchNorm(nn.Module):
    """Batch norm over virtual batches of 8 clips, without running statistics."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, D, n]`` in and out."""
        parts = torch.split(x, _VIRTUAL_BATCH)
        normed = [F.batch_norm(part, None, None, self.weight, self.bias, True, 0.0, 1e-6) for part in parts]
        return torch.cat(normed)


def build_adversary(
    config: TransformerAdversaryConfig | VideoMaeAdversaryConfig,
    tokenizer: TokenizerConfig,
    backbone: nn.Module | None = None,
) -> TransformerDiscriminator | VideoMaeDiscriminator:
    """The adversary that ``config`` describes, for clips of ``tokenizer``.

    ``backbone``: a VideoMAEModel to use in place of the one that the config names.
    """
    if isinstance(config, VideoMaeAdversaryConfig):
        return VideoMaeDiscriminator(config, backbone)
    return TransformerDiscriminator(config, tokenizer.frames, tokenizer.size)
