"""Where everything of a ragged batch lies, worked out once per pass from its lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from evatok.models.attention import block_causal, full_attention


class Packing:
    """Index maps and attention ranges of a packed batch.

    ``lengths``: int64 ``[B, T]``, tokens per block. ``most``: the largest. ``starts`` and ``counts``:
    ``[B * T]``, where each block's tokens lie among the N packed ones. ``source`` and ``position``: ``[N]``,
    each token's place in a flattened ``[B, T, most]`` and ``[T, most]``. The four attention ranges are named
    after who attends to whom.
    """

    def __init__(self, lengths: Tensor, patches: int, device: torch.device, *, causal: bool) -> None:
        rows: list[list[int]] = lengths.tolist()
        self.lengths = lengths
        self.most = max(map(max, rows))
        self.counts = lengths.flatten().to(device)
        self.starts = self.counts.cumsum(0) - self.counts
        total = sum(map(sum, rows))
        blocks = torch.arange(len(self.counts), device=device)
        block = blocks.repeat_interleave(self.counts, output_size=total)
        within = torch.arange(total, device=device) - self.starts[block]
        self.source = block * self.most + within
        self.position = block % lengths.shape[1] * self.most + within
        cells = [[patches] * len(row) for row in rows]
        ranges = block_causal if causal else full_attention
        self.tokens_to_tokens = ranges(rows, rows)
        self.tokens_to_patches = ranges(rows, cells)
        self.patches_to_patches = ranges(cells, cells)
        self.patches_to_tokens = ranges(cells, rows)
