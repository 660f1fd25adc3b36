"""The generator: a Llama-style GPT over adaptive token sequences (evatok.md 6)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from evatok.config import Config
from evatok.models.layers import TransformerSize
from evatok.models.pretrained import PretrainedModel
from evatok.models.sequence import PackedSequences, Vocabulary
from evatok.models.tokenizer import Size

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys, values ``[..., heads, D]`` of the new tokens -> attention output of the same shape."""


class NetworkConfig(Config):
    """The transformer. B, L and L-plus are the paper's 99 M, 327 M and 633 M (Tab. 3; shapes inferred)."""

    size: Size = Field(TransformerSize.preset("B"), description="preset name, or width, layers, heads")
    position: Literal["absolute", "rope"] = Field(
        "absolute", description="learned absolute embeddings as in GigaTok and LARP, or rotary"
    )
    token_dropout: float = Field(0.1, ge=0, lt=1, description="on the embeddings; LlamaGen's value")
    dropout: float = Field(0.1, ge=0, lt=1, description="on each residual branch; LlamaGen's value")
    class_dropout: float = Field(
        0.1, ge=0, le=1, description="share of training clips whose class is hidden; guidance needs it"
    )

    @model_validator(mode="after")
    def _rotary_width(self) -> NetworkConfig:
        if self.position == "rope" and self.size.width // self.size.heads % 2:
            raise ValueError(f"rope needs an even head width, not {self.size.width // self.size.heads}")
        return self


class GeneratorConfig(Config):
    """What a generator is, saved beside its weights: a network and the sequences it models."""

    network: NetworkConfig = NetworkConfig()
    codes: int = Field(gt=0, description="codebook size of the tokenizer")
    choices: tuple[int, ...] = Field(description="token choices of a block, ascending")
    blocks: int = Field(gt=0, description="temporal blocks of a clip")
    labels: tuple[str, ...] = Field((), description="names of the classes; none: unconditional")
    condition: tuple[int, ...] = Field(
        (), description="fixed assignment of the given blocks of a frame predictor; K600: (512, 128)"
    )
    known_blocks: int = Field(
        0, ge=0, description="blocks that the given frames fill, so that sampling takes them as they are"
    )
    codebook: str = Field("", description="the tokenizer's codebook, as it names itself")

    @model_validator(mode="after")
    def _consistent(self) -> GeneratorConfig:
        if not self.choices or list(self.choices) != sorted(set(self.choices)) or self.choices[0] < 1:
            raise ValueError(f"choices must be positive and ascending, not {self.choices}")
        if len(self.condition) >= self.blocks:
            raise ValueError(f"condition gives {len(self.condition)} of {self.blocks} blocks: none is left")
        if unknown := set(self.condition) - set(self.choices):
            raise ValueError(
                f"condition {self.condition}: {sorted(unknown)} not among choices {self.choices}"
            )
        return self

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.codes, self.choices, len(self.labels))

    @property
    def positions(self) -> int:
        """Input tokens of the longest sequence; its last code is only ever a target."""
        free = self.blocks - len(self.condition)
        return 2 * sum(self.condition) + free * self.choices[-1] + self.blocks


@dataclass(frozen=True)
class SlotCache:
    """Keys and values ``[layers, slots, positions, heads, D]``, allocated once and written in place."""

    keys: Tensor
    values: Tensor

    def select(self, slots: Tensor) -> SlotCache:
        """A copy of some slots (int64 ``[n]``)."""
        return SlotCache(self.keys[:, slots], self.values[:, slots])

    def slot(self, slot: int) -> SlotCache:
        """One slot, as a view that writes through."""
        return SlotCache(self.keys[:, slot : slot + 1], self.values[:, slot : slot + 1])


class Attention(nn.Module):
    """Causal self-attention; who is attended to is the caller's ``attend``."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.heads = size.heads
        self.qkv = nn.Linear(size.width, 3 * size.width, bias=False)
        self.out = nn.Linear(size.width, size.width, bias=False)

    def forward(self, x: Tensor, rotation: Tensor | None, attend: Attend) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)  # [..., heads, D]
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        out: Tensor = self.out(attend(q, k, v).flatten(-2))
        return out


class FeedForward(nn.Module):
    """SwiGLU; hidden width 8/3 of the width, up to a multiple of 256 as in Llama."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = -(-(8 * width // 3) // 256) * 256
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        out: Tensor = self.down(functional.silu(gate) * up)
        return out


class Layer(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, size: TransformerSize, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(size.width, eps=1e-5)
        self.attention = Attention(size)
        self.feed_norm = nn.RMSNorm(size.width, eps=1e-5)
        self.feed = FeedForward(size.width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rotation: Tensor | None, attend: Attend) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rotation, attend))
        out: Tensor = x + self.dropout(self.feed(self.feed_norm(x)))
        return out


class Generator(PretrainedModel):
    """Predicts codes and length tokens from what stands before them."""

    config: GeneratorConfig
    config_type = GeneratorConfig

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__(config)
        self.vocabulary = config.vocabulary
        network, size = config.network, config.network.size
        self.embedding = nn.Embedding(self.vocabulary.size, size.width)
        self.position = nn.Embedding(config.positions, size.width) if network.position == "absolute" else None
        self.token_dropout = nn.Dropout(network.token_dropout)
        layers = [Layer(size, network.dropout) for _ in range(size.layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = nn.RMSNorm(size.width, eps=1e-5)
        self.head = nn.Linear(size.width, self.vocabulary.predicted, bias=False)
        self.apply(_initialise)
        for layer in layers:
            for branch in (layer.attention.out, layer.feed.down):
                nn.init.normal_(branch.weight, std=0.02 / (2 * size.layers) ** 0.5)

    def forward(self, batch: PackedSequences) -> Tensor:
        """Logits ``[N, predicted]`` of every packed place; cost follows the tokens there are."""
        logits: Tensor = self.head(self.features(batch))
        return logits

    def features(self, batch: PackedSequences) -> Tensor:
        """What the head reads, ``[N, width]``."""
        lengths = batch.lengths.tolist()

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return packed_causal_attention(q, k, v, lengths)

        x, rotation = self._embed(batch.tokens, batch.positions)
        for layer in self.layers:
            x = layer(x, rotation, attend)
        normed: Tensor = self.norm(x)
        return normed

    def step(self, tokens: Tensor, positions: Tensor, cache: SlotCache, keys: int) -> Tensor:
        """Logits ``[S, predicted]`` after new tokens, with everything before them in the cache.

        tokens, positions: int64 ``[S, n]``, positions counting up along n; the new keys and values are
        written into the cache. keys: static bound above every position, so that shapes depend on it alone.
        """
        slots = torch.arange(tokens.shape[0], device=tokens.device)[:, None]
        seen = torch.arange(keys, device=tokens.device) <= positions[..., None]  # [S, n, keys]
        x, rotation = self._embed(tokens, positions)
        for index, layer in enumerate(self.layers):
            cached_keys, cached_values = cache.keys[index], cache.values[index]

            def attend(
                q: Tensor, k: Tensor, v: Tensor, ck: Tensor = cached_keys, cv: Tensor = cached_values
            ) -> Tensor:
                ck[slots, positions] = k
                cv[slots, positions] = v
                out = functional.scaled_dot_product_attention(
                    q.transpose(1, 2),
                    ck[:, :keys].transpose(1, 2),
                    cv[:, :keys].transpose(1, 2),
                    attn_mask=seen[:, None],
                )
                return out.transpose(1, 2)

            x = layer(x, rotation, attend)
        logits: Tensor = self.head(self.norm(x[:, -1]).to(self.head.weight.dtype))
        return logits

    def to_bf16(self) -> Generator:
        """Weights, keys and values in bfloat16, for sampling; the head and the logits stay as they are."""
        for part in self.children():
            if part is not self.head:
                part.bfloat16()
        return self

    def new_cache(self, slots: int) -> SlotCache:
        """An empty cache for so many sequences, on the weights' device and in their precision."""
        size = self.config.network.size
        weight = self.embedding.weight
        shape = (size.layers, slots, self.config.positions, size.heads, size.width // size.heads)
        return SlotCache(weight.new_zeros(shape), weight.new_zeros(shape))

    def _embed(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self.embedding(tokens)
        if self.position is None:
            size = self.config.network.size
            return self.token_dropout(x), rotations(positions, size.width // size.heads).to(x.dtype)
        return self.token_dropout(x + self.position(positions)), None


def packed_causal_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Causal attention inside each of the packed sequences; q, k, v: ``[N, heads, D]``, lengths sum to N."""
    parts = (torch.split(part.transpose(0, 1)[None], lengths, dim=2) for part in (q, k, v))
    pieces = [
        functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        for queries, keys, values in zip(*parts)
    ]
    return torch.cat(pieces, dim=2)[0].transpose(0, 1)


def rotations(positions: Tensor, width: int) -> Tensor:
    """Cosines and sines ``[..., 2, width / 2]`` of rotary embeddings with base 10,000 (Su et al. 2021)."""
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    angles = positions[..., None].float() * 10_000.0**-exponents
    return torch.stack((angles.cos(), angles.sin()), -2)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """x: ``[..., heads, D]``; the first half of D turns against the second."""
    cosine, sine = rotation[..., None, :, :].unbind(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cosine - second * sine, first * sine + second * cosine), -1)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
