"""Encoding and decoding block by block, many prefixes at a time, with keys and values kept.

Prefixes of one clip form a tree: blocks that prefixes share are computed and stored once. A cache points
into the stored blocks, so choosing among prefixes copies no keys, and attention runs over each stored
block where it lies; the parts are merged by their softmax denominators. For inference only.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evatok.models.attention import Ranges, attend, attend_with_lse, merge_attention
from evatok.models.layers import QFormer


@dataclass(frozen=True)
class Store:
    """Keys and values of one block: per layer ``[M, H, E]`` packed; where each prefix's part lies."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    starts: tuple[int, ...]
    counts: tuple[int, ...]

    def ranges(self, queries: int) -> Ranges:
        """For ``queries`` packed queries per prefix. Neighbours with the same ancestor become one range."""
        spans: list[tuple[int, int, int, int]] = []
        place = 0
        for (start, count), group in itertools.groupby(zip(self.starts, self.counts)):
            size = queries * sum(1 for _ in group)
            spans.append((place, size, start, count))
            place += size
        return Ranges(tuple(spans), place, self.keys[0].shape[0])

    def select(self, indices: Sequence[int]) -> Store:
        return Store(
            self.keys,
            self.values,
            tuple(self.starts[i] for i in indices),
            tuple(self.counts[i] for i in indices),
        )

    @classmethod
    def cat(cls, stores: Sequence[Store]) -> Store:
        unique = list({id(store.keys): store for store in stores}.values())
        shifts, total = {}, 0
        for store in unique:
            shifts[id(store.keys)] = total
            total += store.keys[0].shape[0]
        starts = tuple(start + shifts[id(store.keys)] for store in stores for start in store.starts)
        counts = tuple(count for store in stores for count in store.counts)
        if len(unique) == 1:
            return cls(unique[0].keys, unique[0].values, starts, counts)
        keys = tuple(torch.cat(layer) for layer in zip(*(store.keys for store in unique)))
        values = tuple(torch.cat(layer) for layer in zip(*(store.values for store in unique)))
        return cls(keys, values, starts, counts)


@dataclass(frozen=True)
class KvCache:
    """What N prefixes have encoded or decoded so far; an immutable value.

    ``blocks[j]`` holds the stores of block j: the encoder's has one (1D tokens), the decoder's two (3D
    queries, 1D tokens).
    """

    blocks: tuple[tuple[Store, ...], ...]

    def __len__(self) -> int:
        return len(self.blocks[0][0].starts)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored blocks that this cache keeps alive, whether or not others share them."""
        return sum(
            tensor.nbytes for block in self.blocks for store in block for tensor in store.keys + store.values
        )

    def select(self, indices: Tensor | Sequence[int]) -> KvCache:
        """The prefixes at ``indices``, in that order, repeats allowed. Copies no keys or values."""
        chosen = indices.tolist() if isinstance(indices, Tensor) else list(indices)
        return KvCache(tuple(tuple(store.select(chosen) for store in block) for block in self.blocks))

    def extend(self, block: tuple[Store, ...]) -> KvCache:
        """This cache with one more block."""
        return KvCache((*self.blocks, block))

    @classmethod
    def cat(cls, caches: Sequence[KvCache]) -> KvCache:
        """The prefixes of several caches of the same depth, one after the other.

        Blocks that the caches share are not copied; token counts may differ between prefixes.
        """
        return cls(
            tuple(
                tuple(Store.cat(stores) for stores in zip(*blocks))
                for blocks in zip(*(cache.blocks for cache in caches))
            )
        )


@dataclass(frozen=True)
class EncoderMemory:
    """What the encoder needs of R clips, computed once.

    ``queries``: ``[R, T, most, D]``, the initial queries with position. ``keys`` and ``values``: per layer
    ``[R * T * patches, H, E]`` of the cross-attention to the patches.
    """

    queries: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def __len__(self) -> int:
        return self.queries.shape[0]

    def ranges(self, rows: Sequence[int], count: int, blocks: int) -> Ranges:
        """Patches of blocks < ``blocks`` for ``count`` packed queries per prefix; clip ``rows[n]`` each."""
        per_clip = self.keys[0].shape[0] // len(self)
        seen = per_clip // self.queries.shape[1] * blocks
        spans: list[tuple[int, int, int, int]] = []
        place = 0
        for row, group in itertools.groupby(rows):
            size = count * sum(1 for _ in group)
            spans.append((place, size, row * per_clip, seen))
            place += size
        return Ranges(tuple(spans), place, self.keys[0].shape[0])


Attention = Callable[[int, Tensor], Tensor]
"""Cross-attention of layer ``i`` for queries ``[N * n, H, E]``."""


def run_block(
    former: QFormer, x: Tensor, past: Sequence[Store], cross: Attention, *, keep: bool
) -> tuple[Tensor, Store | None]:
    """One block of N prefixes through all layers: ``x [N, n, D]`` in and out.

    ``past``: self-attention stores of the earlier blocks. Returns this block's store if ``keep``.
    """
    prefixes, length = x.shape[:2]
    own = each_alone(prefixes, length, length)
    earlier = [(store, store.ranges(length)) for store in past]
    keys: list[Tensor] = []
    values: list[Tensor] = []
    x = x.flatten(0, 1)
    for number, layer in enumerate(former.layers):

        def attend_self(q: Tensor, k: Tensor, v: Tensor, number: int = number) -> Tensor:
            if keep:  # copies: a view would keep the queries' memory alive too
                keys.append(k.contiguous())
                values.append(v.contiguous())
            parts = [
                attend_with_lse(q, store.keys[number], store.values[number], ranges)
                for store, ranges in earlier
            ]
            return merge_attention([*parts, attend_with_lse(q, k, v, own)])

        def attend_cross(q: Tensor, number: int = number) -> Tensor:
            return cross(number, q)

        x = layer.step(x, attend_self, attend_cross)
    x = former.norm(x).unflatten(0, (prefixes, length))
    if not keep:
        return x, None
    starts = tuple(range(0, prefixes * length, length))
    return x, Store(tuple(keys), tuple(values), starts, (length,) * prefixes)


def each_alone(prefixes: int, queries: int, keys: int) -> Ranges:
    """Every prefix's queries see its own keys and no others."""
    spans = tuple((n * queries, queries, n * keys, keys) for n in range(prefixes))
    return Ranges(spans, prefixes * queries, prefixes * keys)


def attend_memory(memory: EncoderMemory, ranges: Ranges) -> Attention:
    """Cross-attention to the patches in ``memory``."""
    return lambda number, q: attend(q, memory.keys[number], memory.values[number], ranges)


def attend_stores(stores: Sequence[Store], queries: int) -> Attention:
    """Cross-attention to the tokens in ``stores``, for ``queries`` packed queries per prefix."""
    placed = [(store, store.ranges(queries)) for store in stores]
    return lambda number, q: merge_attention(
        [attend_with_lse(q, store.keys[number], store.values[number], ranges) for store, ranges in placed]
    )
