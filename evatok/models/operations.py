"""Counted operations of a tokenizer: what a batch must cost, to hold measured times against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from evatok.models.attention import block_causal, full_attention
from evatok.models.layers import TransformerSize
from evatok.models.tokenizer import TokenizerConfig


class Operations(NamedTuple):
    """Floating-point operations (a multiply-add counts two) of the matrix products and attentions."""

    encode: int
    decode: int

    @property
    def step(self) -> int:
        """Forward and backward of a training step: the backward pass costs twice the forward."""
        return 3 * (self.encode + self.decode)


def count_operations(config: TokenizerConfig, lengths: Sequence[Sequence[int]]) -> Operations:
    """Operations to encode and decode clips with ``lengths [B][T]`` tokens per block.

    Left out: norms, activations, softmax, pooling, the search for the nearest code in the codebook (which
    encode and decode of every assignment pay alike per token; ``K * dim`` multiply-adds).
    """
    cells = [[config.patches] * len(row) for row in lengths]
    made = [[config.choices[-1]] * len(row) for row in lengths] if config.drop_tail else lengths
    tokens, patches, encoded = (sum(map(sum, rows)) for rows in (lengths, cells, made))
    ranges = block_causal if config.causal else full_attention
    encode = 2 * patches * config.voxels * config.encoder.width
    if config.encoder_queries == "pooled":
        encode += 2 * encoded * config.encoder.width**2
    encode += _former(config.encoder, encoded, patches, ranges(made, made).pairs, ranges(made, cells).pairs)
    encode += 2 * tokens * config.encoder.width * config.latent
    decode = 2 * tokens * config.latent * config.decoder.width
    decode += _former(
        config.decoder, patches, tokens, ranges(cells, cells).pairs, ranges(cells, lengths).pairs
    )
    decode += 2 * patches * config.voxels * config.decoder.width
    return Operations(encode, decode)


def _former(size: TransformerSize, queries: int, references: int, self_pairs: int, cross_pairs: int) -> int:
    square = size.width**2
    linear = queries * (4 + 2 + 8) * square + references * 2 * square
    attention = 2 * (self_pairs + cross_pairs) * size.width
    return 2 * size.layers * (linear + attention)
