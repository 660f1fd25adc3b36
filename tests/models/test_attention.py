"""Attention over packed ranges: equal to masked attention, gradients included, on both kinds of device."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from evatok.models import attention
from evatok.models.attention import (
    Ranges,
    attend,
    attend_with_lse,
    block_causal,
    full_attention,
    merge_attention,
)

lengths = st.lists(st.lists(st.integers(1, 40), min_size=3, max_size=3), min_size=1, max_size=4)


def dense_mask(queries: list[list[int]], keys: list[list[int]]) -> Tensor:
    """bool [N, M] written down from the definition: same sample and key block <= query block."""

    def labels(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        pairs = [(b, t) for b, row in enumerate(rows) for t, count in enumerate(row) for _ in range(count)]
        return torch.tensor(pairs).unbind(1)

    (q_sample, q_block), (k_sample, k_block) = labels(queries), labels(keys)
    return (q_sample[:, None] == k_sample) & (k_block <= q_block[:, None])


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)


def random_qkv(ranges: Ranges) -> list[Tensor]:
    counts = (ranges.queries, ranges.keys, ranges.keys)
    return [torch.randn(n, 2, 8, dtype=torch.float64, requires_grad=True) for n in counts]


@settings(max_examples=30, deadline=None)
@given(lengths, st.integers(1, 20))
def test_packed_attention_and_its_gradients_equal_masked_attention(
    queries: list[list[int]], cells: int
) -> None:
    keys = [[cells] * 3 for _ in queries]
    for q_rows, k_rows in ((queries, queries), (queries, keys), (keys, queries), (keys, keys)):
        ranges = block_causal(q_rows, k_rows)
        inputs = random_qkv(ranges)
        packed = attend(*inputs, ranges)
        masked = masked_attention(*inputs, dense_mask(q_rows, k_rows))
        torch.testing.assert_close(packed, masked)
        weight = torch.randn_like(packed)
        gradients = torch.autograd.grad((packed * weight).sum(), inputs)
        torch.testing.assert_close(gradients, torch.autograd.grad((masked * weight).sum(), inputs))


def test_a_strided_view_of_fused_projections_gives_the_same_as_a_copy() -> None:
    ranges = block_causal([[3, 5], [2, 2]], [[3, 5], [2, 2]])
    q, k, v = torch.randn(12, 3, 2, 8).unbind(1)
    copied = attend(q.contiguous(), k.contiguous(), v.contiguous(), ranges)
    torch.testing.assert_close(attend(q, k, v, ranges), copied)


def test_equal_lengths_share_one_kernel_call_per_block() -> None:
    rows = [[16] * 4 for _ in range(8)]
    runs = block_causal(rows, rows).runs
    assert runs[:, 0].tolist() == [8, 8, 8, 8]


def test_ranges_that_share_keys_stay_separate_calls() -> None:
    ranges = Ranges(((0, 2, 0, 4), (2, 2, 0, 4)), 4, 4)
    assert ranges.runs[:, 0].tolist() == [1, 1]


def test_pairs_count_every_query_key_pair_once() -> None:
    rows = [[3, 5], [2, 7]]
    assert block_causal(rows, rows).pairs == int(dense_mask(rows, rows).sum())
    assert full_attention(rows, rows).pairs == 8 * 8 + 9 * 9


def test_parts_merged_by_their_denominators_equal_the_whole() -> None:
    q, k, v = torch.randn(6, 2, 8), torch.randn(10, 2, 8), torch.randn(10, 2, 8)
    parts = [
        attend_with_lse(q, k[a:b], v[a:b], Ranges(((0, 6, 0, b - a),), 6, b - a))
        for a, b in ((0, 3), (3, 4), (4, 10))
    ]
    torch.testing.assert_close(merge_attention(parts), attend(q, k, v, Ranges(((0, 6, 0, 10),), 6, 10)))


def dense_from_tiles(mask: BlockMask, queries: int, keys: int) -> Tensor:
    """bool [N, M]: the pairs that FlexAttention computes for this tile mask."""
    tile = mask.BLOCK_SIZE[0]
    rows = torch.arange(queries)[:, None]
    columns = torch.arange(keys)[None, :]
    shape = (-(-queries // tile), -(-keys // tile))
    partial, full = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for tiles, counts, indices in (
        (partial, mask.kv_num_blocks, mask.kv_indices),
        (full, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        assert counts is not None
        assert indices is not None
        for row, count in enumerate(counts[0, 0].tolist()):
            tiles[row, indices[0, 0, row, :count].long()] = True
    assert not (partial & full).any()
    inside = mask.mask_mod(torch.tensor(0), torch.tensor(0), rows, columns)
    where = (rows // tile, columns // tile)
    return (partial[where] & inside) | full[where]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.integers(1, 300), min_size=3, max_size=3), min_size=1, max_size=4))
def test_the_tile_mask_for_cuda_allows_exactly_the_ranges(rows: list[list[int]]) -> None:
    cells = [[64] * 3 for _ in rows]
    for q_rows, k_rows in ((rows, rows), (rows, cells), (cells, rows)):
        ranges = block_causal(q_rows, k_rows)
        allowed = dense_from_tiles(ranges.block_mask(torch.device("cpu")), ranges.queries, ranges.keys)
        assert torch.equal(allowed, dense_mask(q_rows, k_rows))


def test_most_tiles_of_a_long_ragged_batch_are_skipped_or_need_no_mask() -> None:
    rows = [[512, 128, 64, 256]] * 8
    mask = block_causal(rows, rows).block_mask(torch.device("cpu"))
    assert mask.full_kv_num_blocks is not None
    tiles = (sum(rows[0]) * 8 // 128) ** 2
    partial, full = int(mask.kv_num_blocks.sum()), int(mask.full_kv_num_blocks.sum())
    assert partial + full < 0.12 * tiles
    assert full > partial


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_under_the_tile_mask_equals_the_cpu_kernel() -> None:
    rows = [[100, 30, 7], [1, 200, 64]]
    ranges = block_causal(rows, rows)
    q, k, v = torch.randn(ranges.queries, 3, 2, 16).unbind(1)
    batched = [x.transpose(0, 1).unsqueeze(0).contiguous() for x in (q, k, v)]
    flex = flex_attention(*batched, block_mask=ranges.block_mask(torch.device("cpu")))
    assert isinstance(flex, Tensor)
    torch.testing.assert_close(flex.squeeze(0).transpose(0, 1), attend(q, k, v, ranges))


def test_flex_attention_stays_compiled_for_many_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = functools.partial(torch.compile, backend=backend)
    monkeypatch.setattr(torch, "compile", compiled)
    flex = attention._compiled_flex.__wrapped__()
    for heads in range(1, 12):
        ranges = block_causal([[20, 10]], [[20, 10]])
        q = torch.randn(1, heads, 30, 8)
        flex(q, q, q, block_mask=ranges.block_mask(q.device))
    assert len(graphs) == 11


def test_bfloat16_inputs_are_attended_in_bfloat16() -> None:
    rows = [[16, 16]]
    ranges = block_causal(rows, rows)
    q, k, v = torch.randn(32, 3, 2, 16).unbind(1)
    half = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), ranges)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), attend(q, k, v, ranges), atol=0.05, rtol=0.05)
