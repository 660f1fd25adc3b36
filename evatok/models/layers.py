"""Q-Former layers over packed sequences: self-attention, cross-attention, MLP, all pre-norm."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evatok.config import Config
from evatok.models.attention import Ranges, attend

P = ParamSpec("P")
R = TypeVar("R")

PRESETS: dict[str, tuple[int, int, int]] = {
    "nano": (64, 2, 2),
    "tiny": (128, 2, 4),
    "mini": (192, 4, 6),
    "S": (512, 6, 8),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "L-plus": (1280, 30, 20),
}


class TransformerSize(Config):
    """Width, depth and heads of an encoder or decoder; S, B, L are GigaTok's and LlamaGen's."""

    width: int = Field(gt=0, description="channels of the residual stream")
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> TransformerSize:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self

    @classmethod
    def preset(cls, name: str) -> TransformerSize:
        """Size by preset name; raises ValueError naming the presets there are."""
        if name not in PRESETS:
            raise ValueError(f"unknown size {name!r}; presets are {', '.join(PRESETS)}")
        width, layers, heads = PRESETS[name]
        return cls(width=width, layers=layers, heads=heads)


def encoder_layer(size: TransformerSize) -> nn.TransformerEncoderLayer:
    """A plain pre-norm layer over ``[B, N, D]``, for networks whose sequences all have one length."""
    return nn.TransformerEncoderLayer(
        size.width,
        size.heads,
        4 * size.width,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )


class SelfAttention(nn.Module):
    """Multi-head attention of a packed sequence to itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[N, H, E]`` of ``x [N, D]``."""
        q, k, v = rearrange(self.qkv(x), "n (three h e) -> three n h e", three=3, h=self.heads)
        return q, k, v

    def forward(self, x: Tensor, ranges: Ranges) -> Tensor:
        return self.out(attend(*self.project(x), ranges).flatten(-2))  # type: ignore[no-any-return]


class CrossAttention(nn.Module):
    """Multi-head attention of packed queries to packed reference embeddings."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def project_query(self, x: Tensor) -> Tensor:
        """Queries ``[N, H, E]`` of ``x [N, D]``."""
        return rearrange(self.q(x), "n (h e) -> n h e", h=self.heads)  # type: ignore[no-any-return]

    def project_reference(self, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[M, H, E]`` of ``reference [M, D]``."""
        k, v = rearrange(self.kv(reference), "m (two h e) -> two m h e", two=2, h=self.heads)
        return k, v

    def forward(self, x: Tensor, reference: Tensor, ranges: Ranges) -> Tensor:
        k, v = self.project_reference(reference)
        return self.out(attend(self.project_query(x), k, v, ranges).flatten(-2))  # type: ignore[no-any-return]


class Mlp(nn.Sequential):
    """Linear, GELU, linear with the usual fourfold inner width."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class QFormerLayer(nn.Module):
    """Self-attention over the queries, cross-attention to fixed references, MLP (evatok.md 1.3)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_norm = nn.LayerNorm(width)
        self.self_attention = SelfAttention(width, heads)
        self.cross_norm = nn.LayerNorm(width)
        self.cross_attention = CrossAttention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, reference: Tensor, self_ranges: Ranges, cross_ranges: Ranges) -> Tensor:
        x = x + self.self_attention(self.self_norm(x), self_ranges)
        x = x + self.cross_attention(self.cross_norm(x), reference, cross_ranges)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]

    def step(
        self,
        x: Tensor,
        attend_self: Callable[[Tensor, Tensor, Tensor], Tensor],
        attend_cross: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """The same layer with the attentions given as functions of the projections (cached decoding)."""
        attention = self.self_attention
        x = x + attention.out(attend_self(*attention.project(self.self_norm(x))).flatten(-2))
        cross = self.cross_attention
        x = x + cross.out(attend_cross(cross.project_query(self.cross_norm(x))).flatten(-2))
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class QFormer(nn.Module):
    """A stack of Q-Former layers and a final norm; the references are the same for every layer."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.reference_norm = nn.LayerNorm(size.width)
        layers = nn.ModuleList(QFormerLayer(size.width, size.heads) for _ in range(size.layers))
        self.layers = cast("list[QFormerLayer]", layers)
        self.norm = nn.LayerNorm(size.width)
        self.recompute = False
        self._initialise(size)

    def _initialise(self, size: TransformerSize) -> None:
        # The usual 0.02 belongs to a width of about 700; narrow models would start too quiet with it.
        std = 0.5 * size.width**-0.5
        for name, parameter in self.named_parameters():
            if name.endswith(("out.weight", "mlp.2.weight")):
                # Keeps the variance of the residual stream from growing with its 3 branches per layer.
                nn.init.trunc_normal_(parameter, std=std * (3 * size.layers) ** -0.5)
            elif parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self,
        x: Tensor,
        reference: Tensor,
        self_ranges: Ranges,
        cross_ranges: Ranges,
        tap: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Queries ``x [N, D]`` after all layers and the norm, and after layer ``tap`` (1-based, no norm)."""
        reference = self.reference_norm(reference)
        tapped = None
        for number, layer in enumerate(self.layers, start=1):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, reference, self_ranges, cross_ranges, use_reentrant=False)
            else:
                x = layer(x, reference, self_ranges, cross_ranges)
            if number == tap:
                tapped = x
        return self.norm(x), tapped


def without_autocast(method: Callable[P, R]) -> Callable[P, R]:
    """Run a method in full precision: the nearest or likeliest of thousands is a close call."""

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return method(*args, **kwargs)

    return run
