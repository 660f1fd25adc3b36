"""Exact attention over packed ragged sequences, without an ``[N, N]`` mask.

Every query attends to one contiguous range of keys. Block causality makes that enough: in a packed
sequence (sample-major, then block, then position) the keys that a query of block t may see, blocks <= t
of its own sample, are neighbours. The same ranges drive a fused CPU kernel call per range and, on CUDA,
FlexAttention with a block mask worked out from the range ends alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

# FlexAttention is imported where it is used: it brings the compiler, whose import takes as long as torch's.
if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_TILE = 128
_COMPILED = 64


@dataclass(frozen=True)
class Ranges:
    """Which contiguous keys each contiguous group of queries attends to.

    ``spans`` holds one ``(query start, query count, key start, key count)`` per group. The groups are
    disjoint and together cover the ``queries`` packed queries; key ranges may overlap.
    """

    spans: tuple[tuple[int, int, int, int], ...]
    queries: int
    keys: int
    _masks: dict[torch.device, BlockMask] = field(default_factory=dict, repr=False, compare=False)

    @functools.cached_property
    def runs(self) -> Tensor:
        """int64 ``[R, 7]`` on the CPU: ``(batch, q start, q stride, q count, k start, k stride, k count)``.

        Spans of equal shape at an equal distance that share no key become one batched kernel call.
        """
        runs: list[list[int]] = []
        for q_start, q_count, k_start, k_count in self.spans:
            if runs:
                batch, q0, q_stride, q_len, k0, k_stride, k_len = runs[-1]
                if (q_len, k_len) == (q_count, k_count):
                    if batch == 1:
                        q_stride, k_stride = q_start - q0, k_start - k0
                    follows = q_start == q0 + batch * q_stride and k_start == k0 + batch * k_stride
                    if follows and q_stride >= q_len and k_stride >= k_len:
                        runs[-1] = [batch + 1, q0, q_stride, q_len, k0, k_stride, k_len]
                        continue
            runs.append([1, q_start, 0, q_count, k_start, 0, k_count])
        return torch.tensor(runs, dtype=torch.int64).reshape(-1, 7)

    @property
    def pairs(self) -> int:
        """Number of query-key pairs, the unit in which attention is paid."""
        return sum(q_count * k_count for _, q_count, _, k_count in self.spans)

    def bounds(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """First and one-past-last key of every query: two int64 ``[queries]``."""
        spans = torch.tensor(self.spans, dtype=torch.int64, device=device).reshape(-1, 4)
        order = spans[:, 0].argsort()
        _, counts, k_starts, k_counts = spans[order].unbind(1)
        first = k_starts.repeat_interleave(counts, output_size=self.queries)
        return first, first + k_counts.repeat_interleave(counts, output_size=self.queries)

    def block_mask(self, device: torch.device) -> BlockMask:
        """FlexAttention's tile mask, from the range ends: ``[queries / 128, keys / 128]`` work, no more."""
        if device not in self._masks:
            self._masks[device] = _block_mask(*self.bounds(device), keys=self.keys)
        return self._masks[device]


def _block_mask(first: Tensor, last: Tensor, keys: int) -> BlockMask:
    from torch.nn.attention.flex_attention import BlockMask

    queries = first.shape[0]
    rows, columns = -(-queries // _TILE), -(-keys // _TILE)
    pad = rows * _TILE - queries
    # Edge padding keeps the extremes of the last, partly filled row of tiles unchanged.
    first_tiles = torch.cat([first, first[-1:].expand(pad)]).view(rows, _TILE)
    last_tiles = torch.cat([last, last[-1:].expand(pad)]).view(rows, _TILE)
    left = torch.arange(columns, device=first.device) * _TILE
    right = (left + _TILE).clamp(max=keys)
    touched = (first_tiles.amin(1)[:, None] < right) & (last_tiles.amax(1)[:, None] > left)
    full = (first_tiles.amax(1)[:, None] <= left) & (last_tiles.amin(1)[:, None] >= right)
    full &= left + _TILE <= keys

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first[query]) & (key < last[query])

    partial_counts, partial_tiles = _ordered(touched & ~full)
    full_counts, full_tiles = _ordered(full)
    return BlockMask.from_kv_blocks(
        partial_counts,
        partial_tiles,
        full_counts,
        full_tiles,
        BLOCK_SIZE=_TILE,
        mask_mod=allowed,
        seq_lengths=(queries, keys),
    )


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    counts = tiles.sum(1, dtype=torch.int32)
    indices = tiles.to(torch.int32).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], indices[None, None]


def block_causal(queries: Sequence[Sequence[int]], keys: Sequence[Sequence[int]]) -> Ranges:
    """Ranges of a packed batch: block t of sample b sees blocks <= t of sample b.

    ``queries`` and ``keys`` are the lengths ``[B][T]`` of the two packed sequences. The spans come block
    by block, so that equal neighbours over the batch share one kernel call.
    """
    blocks = len(queries[0])
    q_starts, k_starts = _starts(queries), _starts(keys)
    spans = [
        (q_starts[b][t], row[t], k_starts[b][0], sum(keys[b][: t + 1]))
        for t in range(blocks)
        for b, row in enumerate(queries)
    ]
    return Ranges(tuple(spans), sum(map(sum, queries)), sum(map(sum, keys)))


def full_attention(queries: Sequence[Sequence[int]], keys: Sequence[Sequence[int]]) -> Ranges:
    """Ranges of a packed batch without causality: every query of a sample sees all its keys."""
    return block_causal([[sum(row)] for row in queries], [[sum(row)] for row in keys])


def _starts(lengths: Sequence[Sequence[int]]) -> list[list[int]]:
    position = 0
    starts: list[list[int]] = []
    for row in lengths:
        starts.append([])
        for count in row:
            starts[-1].append(position)
            position += count
    return starts


def attend(q: Tensor, k: Tensor, v: Tensor, ranges: Ranges) -> Tensor:
    """Softmax attention of every query over its range of keys.

    ``q``: ``[N, H, E]`` packed, ``k`` and ``v``: ``[M, H, E]`` packed; returns ``[N, H, E]``.
    """
    return attend_with_lse(q, k, v, ranges)[0]


def attend_with_lse(q: Tensor, k: Tensor, v: Tensor, ranges: Ranges) -> tuple[Tensor, Tensor]:
    """As ``attend``, and the log of the softmax denominators ``[H, N]``, by which parts can be merged."""
    if q.device.type == "cpu":
        output, lse = _range_attention(q, k, v, ranges.runs)
        return output, lse
    from torch.nn.attention.flex_attention import AuxRequest

    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    output, extra = _compiled_flex()(
        q, k, v, block_mask=ranges.block_mask(q.device), return_aux=AuxRequest(lse=True)
    )
    return output.squeeze(0).transpose(0, 1), extra.lse.squeeze(0)


@functools.cache
def _compiled_flex():  # type: ignore[no-untyped-def]
    from torch.nn.attention.flex_attention import flex_attention

    # Head counts, small masks and the gradient mode are each compiled for. Beyond the limit it raises:
    # without ``fullgraph`` it would go on uncompiled, and hold the scores of all pairs.
    return torch.compile(  # type: ignore[call-overload]  # its overloads lack recompile_limit
        flex_attention, dynamic=True, fullgraph=True, recompile_limit=_COMPILED
    )


def merge_attention(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention over the union of disjoint key sets from the attention over each.

    ``parts``: outputs ``[N, H, E]`` with their log denominators ``[H, N]``.
    """
    if len(parts) == 1:
        return parts[0][0]
    weights = torch.stack([lse for _, lse in parts]).softmax(0)  # [parts, H, N]
    merged = torch.zeros_like(parts[0][0])
    for (output, _), weight in zip(parts, weights):
        merged.addcmul_(output, weight.t().unsqueeze(-1).to(output.dtype))
    return merged


@torch.library.custom_op("evatok::range_attention", mutates_args=(), device_types="cpu")
def _range_attention(q: Tensor, k: Tensor, v: Tensor, runs: Tensor) -> tuple[Tensor, Tensor]:
    output = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(
        q.shape[1], q.shape[0], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32
    )
    for batch, q0, q_stride, q_len, k0, k_stride, k_len in runs.tolist():
        part, part_lse = _FLASH(
            _window(q, batch, q0, q_stride, q_len),
            _window(k, batch, k0, k_stride, k_len),
            _window(v, batch, k0, k_stride, k_len),
        )
        _window(output, batch, q0, q_stride, q_len).copy_(part)
        _lse_window(lse, batch, q0, q_stride, q_len).copy_(part_lse)
    return output, lse


@torch.library.custom_op("evatok::range_attention_backward", mutates_args=(), device_types="cpu")
def _range_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, runs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad = grad.contiguous()
    grad_q = torch.empty(q.shape, dtype=q.dtype)
    grad_k, grad_v = torch.zeros(k.shape, dtype=k.dtype), torch.zeros(v.shape, dtype=v.dtype)
    for batch, q0, q_stride, q_len, k0, k_stride, k_len in runs.tolist():
        part_q, part_k, part_v = _FLASH_BACKWARD(
            _window(grad, batch, q0, q_stride, q_len),
            _window(q, batch, q0, q_stride, q_len),
            _window(k, batch, k0, k_stride, k_len),
            _window(v, batch, k0, k_stride, k_len),
            _window(output, batch, q0, q_stride, q_len),
            _lse_window(lse, batch, q0, q_stride, q_len),
            0.0,
            False,
        )
        _window(grad_q, batch, q0, q_stride, q_len).copy_(part_q)
        _window(grad_k, batch, k0, k_stride, k_len).add_(part_k)
        _window(grad_v, batch, k0, k_stride, k_len).add_(part_v)
    return grad_q, grad_k, grad_v


def _window(x: Tensor, batch: int, start: int, stride: int, count: int) -> Tensor:
    """View ``[batch, H, count, E]`` of packed ``[N, H, E]``."""
    row, head, lane = x.stride()
    return x.as_strided(
        (batch, x.shape[1], count, x.shape[2]),
        (stride * row, head, row, lane),
        x.storage_offset() + start * row,
    )


def _lse_window(lse: Tensor, batch: int, start: int, stride: int, count: int) -> Tensor:
    """View ``[batch, H, count]`` of ``[H, N]``."""
    return lse.as_strided((batch, lse.shape[0], count), (stride, lse.stride(0), 1), start)


@_range_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, runs: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@_range_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, runs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx, grad, grad_lse):  # type: ignore[no-untyped-def]
    q, k, v, runs, output, lse = ctx.saved_tensors
    return (*_range_attention_backward(grad, q, k, v, output, lse, runs), None)


_range_attention.register_autograd(_backward, setup_context=_save)
