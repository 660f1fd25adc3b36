"""Coarse-to-fine queries: where a block's 1D tokens come from, and which of them cover a patch.

A block's patch grid ``h x w`` (powers of two) is pooled into groups of 1, 1, 2, 4, ..., h*w cells; each
group splits the cells of the one before in two, width first, the two directions taking turns
(evatok.md 1.2). Concatenated coarse first that is 2*h*w tokens; a block of k tokens uses the first k.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor


def levels(grid: tuple[int, int]) -> list[tuple[int, int]]:
    """Cells ``(rows, columns)`` of every group, coarse first. Both numbers of ``grid`` are powers of two."""
    rows, columns = grid
    groups = [(1, 1), (1, 1)]
    while groups[-1] != grid:
        r, c = groups[-1]
        split_columns = c < columns and (c <= r or r == rows)
        groups.append((r, 2 * c) if split_columns else (2 * r, c))
    return groups


def pool_levels(patches: Tensor, count: int) -> Tensor:
    """The first ``count`` pooled features of every block: ``[B, T, h, w, D] -> [B, T, count, D]``."""
    blocks = patches.flatten(0, 1)  # [B*T, h, w, D]
    groups = levels((blocks.shape[1], blocks.shape[2]))
    pooled = []
    for (rows, columns), (finer_rows, finer_columns) in zip(groups[::-1], [groups[-1], *groups[:0:-1]]):
        if finer_columns > columns:
            blocks = reduce(blocks, "n h (w two) d -> n h w d", "mean", two=2)
        elif finer_rows > rows:
            blocks = reduce(blocks, "n (h two) w d -> n h w d", "mean", two=2)
        pooled.append(rearrange(blocks, "n h w d -> n (h w) d"))
    pooled.reverse()
    return torch.unflatten(torch.cat(pooled, 1)[:, :count], 0, patches.shape[:2])


@functools.lru_cache(maxsize=32)
def covering_tokens(grid: tuple[int, int]) -> Tensor:
    """int64 ``[h*w, groups]``: position in the block's sequence of each group's token over each patch."""
    rows, columns = grid
    y = torch.arange(rows)[:, None].expand(grid)
    x = torch.arange(columns)[None, :].expand(grid)
    covering = []
    offset = 0
    for r, c in levels(grid):
        covering.append(offset + (y * r // rows) * c + x * c // columns)
        offset += r * c
    return torch.stack([cells.flatten() for cells in covering], 1)


def mean_over_cover(tokens: Tensor, starts: Tensor, counts: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean of the tokens that cover each patch, for every block of a packed sequence.

    ``tokens``: ``[N, D]``; ``starts`` and ``counts``: int64 ``[blocks]``, where each block's tokens lie.
    Returns ``[blocks * h * w, D]``. Groups that a short block does not reach take no part.
    """
    cover = covering_tokens(grid).to(tokens.device)  # [P, groups]
    reached = cover < counts[:, None, None]  # [blocks, P, groups]
    index = torch.where(reached, cover + starts[:, None, None], starts[:, None, None]).flatten(0, 1)
    weight = (reached / reached.sum(-1, keepdim=True)).flatten(0, 1).to(tokens.dtype)
    if tokens.device.type == "cpu" and tokens.dtype == torch.float32:
        return F.embedding_bag(index, tokens, mode="sum", per_sample_weights=weight)
    gathered = tokens[index]  # [blocks*P, groups, D]
    return (gathered * weight.unsqueeze(-1)).sum(1)
