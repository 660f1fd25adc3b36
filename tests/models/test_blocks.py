"""Block-wise encoding and decoding of many prefixes equals whole clips."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from evatok.models.blocks import KvCache
from evatok.models.tokenizer import TokenizerConfig, VideoTokenizer

CHOICES = (1, 3, 8)


def tokenizer(**changes: object) -> VideoTokenizer:
    torch.manual_seed(0)
    config = {
        "frames": 6,
        "size": 16,
        "patch": (2, 4, 4),
        "choices": CHOICES,
        "encoder": {"width": 32, "layers": 2, "heads": 2},
        "decoder": {"width": 48, "layers": 3, "heads": 2},
        "latent": 16,
        "quantizer": {"kind": "vq", "size": 64},
        "align_layer": 1,
    }
    return VideoTokenizer(TokenizerConfig(**config | changes)).eval()


def all_reconstructions(model: VideoTokenizer, clips: Tensor) -> dict[tuple[int, int, int], Tensor]:
    """{assignment: [R, C, F, H, W]} of a prefix tree over all clips, each node computed once."""
    memory = model.prepare(clips)
    # Every call gives one choice to all parents; nodes are (parent, clip) pairs, clips innermost.
    parents: list[tuple[int, ...]] = [()]
    rows = torch.arange(len(clips))
    encoder: KvCache | None = None
    decoder: KvCache | None = None
    frames = torch.empty(len(clips), 3, 0, 16, 16)
    for t in range(3):
        encoders, decoders, made = [], [], []
        for count in CHOICES:
            codes, next_encoder = model.encode_block(memory, t, count, encoder, rows)
            pixels, next_decoder = model.decode_block(codes, t, decoder)
            encoders.append(next_encoder)
            decoders.append(next_decoder)
            made.append(torch.cat([frames, pixels], 2))
        frames = torch.cat(made)
        parents = [(*parent, count) for count in CHOICES for parent in parents]
        rows = rows.repeat(len(CHOICES))
        if t < 2:
            encoder = KvCache.cat([cache for cache in encoders if cache is not None])
            decoder = KvCache.cat([cache for cache in decoders if cache is not None])
            assert len(encoder) == len(decoder) == len(rows)
    return {tuple(p): frames[i * len(clips) : (i + 1) * len(clips)] for i, p in enumerate(parents)}  # type: ignore[misc]


@pytest.mark.parametrize("queries", ["first", "cover"])
def test_the_whole_tree_of_prefixes_equals_batched_reconstruction(queries: str) -> None:
    model, clips = tokenizer(decoder_queries=queries), torch.rand(2, 3, 6, 16, 16)
    tree = all_reconstructions(model, clips)
    assert set(tree) == set(itertools.product(CHOICES, repeat=3))
    for assignment, frames in tree.items():
        whole = model.decode(model.encode(clips, torch.tensor([assignment] * 2)))
        torch.testing.assert_close(frames, whole, atol=1e-5, rtol=0)


def test_dropped_tails_have_a_block_form_too() -> None:
    model, clips = tokenizer(drop_tail=True, encoder_queries="learned"), torch.rand(1, 3, 6, 16, 16)
    for assignment, frames in all_reconstructions(model, clips).items():
        whole = model.decode(model.encode(clips, torch.tensor([assignment])))
        torch.testing.assert_close(frames, whole, atol=1e-5, rtol=0)


def test_selecting_prefixes_repeats_reorders_and_drops_them() -> None:
    model, clips = tokenizer(), torch.rand(3, 3, 6, 16, 16)
    memory = model.prepare(clips)
    codes, encoder = model.encode_block(memory, 0, 3, None)
    _, decoder = model.decode_block(codes, 0, None)
    assert encoder is not None
    assert decoder is not None
    chosen = torch.tensor([2, 0, 0])
    codes, _ = model.encode_block(memory, 1, 8, encoder.select(chosen), chosen)
    pixels, _ = model.decode_block(codes, 1, decoder.select(chosen))
    whole = model.decode(model.encode(clips, torch.tensor([[3, 8, 1]] * 3)))[:, :, 2:4]
    torch.testing.assert_close(pixels, whole[chosen], atol=1e-5, rtol=0)


def test_prefixes_of_one_call_may_differ_in_length() -> None:
    model, clips = tokenizer(), torch.rand(2, 3, 6, 16, 16)
    memory = model.prepare(clips)
    caches = []
    for row, count in enumerate((1, 8)):
        codes, encoder = model.encode_block(memory, 0, count, None, torch.tensor([row]))
        caches.append((encoder, model.decode_block(codes, 0, None)[1]))
    encoder, decoder = (KvCache.cat([c for c in kind if c is not None]) for kind in zip(*caches))
    codes, _ = model.encode_block(memory, 1, 3, encoder)
    pixels, _ = model.decode_block(codes, 1, decoder)
    whole = model.decode(model.encode(clips, torch.tensor([[1, 3, 1], [8, 3, 1]])))
    torch.testing.assert_close(pixels, whole[:, :, 2:4], atol=1e-5, rtol=0)


def test_selection_and_joining_share_what_is_stored() -> None:
    model, clips = tokenizer(), torch.rand(2, 3, 6, 16, 16)
    memory = model.prepare(clips)
    _, cache = model.encode_block(memory, 0, 3, None)
    assert cache is not None
    assert cache.select([0] * 50).nbytes == cache.nbytes
    children = [model.encode_block(memory, 1, count, cache)[1] for count in CHOICES]
    joined = KvCache.cat([child for child in children if child is not None])
    assert joined.blocks[0][0].keys[0] is cache.blocks[0][0].keys[0]
    own = sum(child.nbytes - cache.nbytes for child in children if child is not None)
    assert joined.nbytes == cache.nbytes + own


def test_nothing_may_follow_the_last_block() -> None:
    model, clips = tokenizer(frames=2), torch.rand(1, 3, 2, 16, 16)
    codes, encoder = model.encode_block(model.prepare(clips), 0, 3, None)
    assert encoder is None
    assert model.decode_block(codes, 0, None)[1] is None
