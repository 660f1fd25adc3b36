"""The tokenizer: causality, ragged batches, variants, sizes, saving."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from evatok.config import parse
from evatok.errors import UserError
from evatok.models.tokenizer import TokenizerConfig, VideoTokenizer
from evatok.models.tokens import Tokens

SMALL: dict[str, Any] = {
    "frames": 8,
    "size": 16,
    "patch": (2, 4, 4),
    "choices": (1, 2, 5, 8, 32),
    "encoder": {"width": 32, "layers": 2, "heads": 2},
    "decoder": {"width": 48, "layers": 2, "heads": 2},
    "latent": 16,
    "quantizer": {"kind": "vq", "size": 64},
    "align_layer": 1,
}
assignments = st.lists(st.sampled_from(SMALL["choices"]), min_size=4, max_size=4)


def small(**changes: Any) -> VideoTokenizer:
    torch.manual_seed(0)
    return VideoTokenizer(TokenizerConfig(**SMALL | changes)).eval()


def lively(**changes: Any) -> VideoTokenizer:
    """With weights large enough for what is visible to an untrained model to show in its tokens."""
    model = small(**changes)
    with torch.no_grad():
        for former in (model.encoder, model.decoder):
            for parameter in former.parameters():
                parameter.mul_(8)
    return model


def random_clips(count: int) -> Tensor:
    return torch.rand(count, 3, 8, 16, 16)


@settings(max_examples=15, deadline=None)
@given(st.lists(assignments, min_size=1, max_size=3), st.integers(1, 3))
def test_tokens_of_a_block_know_nothing_of_later_frames(rows: list[list[int]], block: int) -> None:
    model, clips = small(), random_clips(len(rows))
    changed = clips.clone()
    changed[:, :, 2 * block :] = torch.rand_like(changed[:, :, 2 * block :])
    before = model.encode(clips, torch.tensor(rows)).to_sequences()
    after = model.encode(changed, torch.tensor(rows)).to_sequences()
    for old, new in zip(before, after):
        assert all(torch.equal(a, b) for a, b in zip(old[:block], new[:block]))


@settings(max_examples=15, deadline=None)
@given(st.lists(assignments, min_size=1, max_size=3), st.integers(1, 3))
def test_frames_of_a_block_know_nothing_of_later_tokens(rows: list[list[int]], block: int) -> None:
    model = small()
    sequences = [[torch.randint(64, (count,)) for count in row] for row in rows]
    others = [
        [tokens if t < block else torch.randint(64, tokens.shape) for t, tokens in enumerate(row)]
        for row in sequences
    ]
    before = model.decode(Tokens.from_sequences(sequences))[:, :, : 2 * block]
    after = model.decode(Tokens.from_sequences(others))[:, :, : 2 * block]
    torch.testing.assert_close(before, after, atol=1e-6, rtol=0)


def test_earlier_frames_do_reach_later_blocks() -> None:
    model, clips = lively(), random_clips(1)
    assignment = torch.tensor([[8, 8, 8, 8]])
    changed = clips.clone()
    changed[:, :, :2] = 1 - changed[:, :, :2]
    before, after = (model(x, assignment).reconstruction[:, :, 6:] for x in (clips, changed))
    assert (before - after).abs().max() > 1e-3


@settings(max_examples=10, deadline=None)
@given(st.lists(assignments, min_size=2, max_size=4), st.sampled_from(["first", "cover", "learned"]))
def test_a_ragged_batch_equals_its_clips_one_at_a_time(rows: list[list[int]], queries: str) -> None:
    model, clips = small(decoder_queries=queries), random_clips(len(rows))
    together = model(clips, torch.tensor(rows)).reconstruction
    for clip, row, expected in zip(clips, rows, together):
        alone = model(clip[None], torch.tensor([row])).reconstruction[0]
        torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["vq", "fsq", "lfq", "residual_vq"])
def test_decoding_the_encoded_tokens_gives_the_reconstruction(kind: str, tmp_path: Path) -> None:
    sizes = {"vq": {"size": 64}, "fsq": {}, "lfq": {"bits": 6}, "residual_vq": {"size": 16, "depth": 2}}
    model, clips = small(quantizer={"kind": kind} | sizes[kind]), random_clips(2)
    assignment = torch.tensor([[1, 8, 2, 2], [32, 5, 1, 8]])
    model.encode(clips, assignment).save(tmp_path / "tokens.safetensors")
    decoded = model.decode(Tokens.load(tmp_path / "tokens.safetensors"))
    expected = model(clips, assignment).reconstruction.clamp(0, 1)
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=0)
    assert model.encode(clips, assignment).indices.max() < model.codes


def test_bytes_and_fractions_of_one_mean_the_same_pixels() -> None:
    model = small()
    clips = torch.randint(0, 256, (1, 3, 8, 16, 16), dtype=torch.uint8)
    assignment = torch.tensor([[2, 2, 2, 2]])
    a, b = model(clips, assignment).reconstruction, model(clips / 255, assignment).reconstruction
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_patches_go_back_to_where_they_came_from() -> None:
    config = SMALL | {
        "encoder": {"width": 96, "layers": 1, "heads": 1},
        "decoder": {"width": 96, "layers": 1, "heads": 1},
    }
    model, clips = VideoTokenizer(TokenizerConfig(**config)), random_clips(2)
    with torch.no_grad():
        for layer in (model.patch_embed, model.to_pixels):
            layer.weight.copy_(torch.eye(96))
            layer.bias.zero_()
        torch.testing.assert_close(model.to_frames(model.embed_patches(clips).flatten(2, 3)), clips)


def test_clips_may_have_fewer_blocks_than_the_model() -> None:
    model, clips = small(), random_clips(2)
    assignment = torch.tensor([[2, 8, 5, 1], [1, 2, 2, 8]])
    whole = model(clips, assignment).reconstruction
    for blocks in (1, 3):
        part = model(clips[:, :, : 2 * blocks], assignment[:, :blocks]).reconstruction
        torch.testing.assert_close(part, whole[:, :, : 2 * blocks], atol=1e-5, rtol=0)


def test_images_are_clips_of_one_frame() -> None:
    model = small(frames=1, patch=(1, 4, 4))
    output = model(torch.rand(2, 3, 1, 16, 16), torch.tensor([[8], [2]]))
    assert output.reconstruction.shape == (2, 3, 1, 16, 16)


def test_a_dropped_tail_changes_nothing_before_it() -> None:
    model, clips = lively(drop_tail=True), random_clips(1)
    few, many = (model.encode(clips, torch.tensor([[k] * 4])).to_sequences()[0] for k in (5, 32))
    assert all(torch.equal(short, long[:5]) for short, long in zip(few, many))
    pooled = lively()
    created = pooled.encode(clips, torch.tensor([[5] * 4])).indices
    assert not torch.equal(created, torch.cat(few)), "without drop_tail the tokens know their number"


def test_the_holistic_variant_sees_later_frames() -> None:
    model = lively(causal=False, encoder_queries="learned", decoder_queries="learned")
    clips = random_clips(1)
    changed = clips.clone()
    changed[:, :, 6:] = 1 - changed[:, :, 6:]
    assignment = torch.tensor([[8, 8, 8, 8]])
    before, after = (model(x, assignment).reconstruction[:, :, :2] for x in (clips, changed))
    assert (before - after).abs().max() > 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"decoder_queries": "cover"},
        {"drop_tail": True, "encoder_queries": "learned"},
        {"causal": False, "encoder_queries": "learned", "decoder_queries": "learned"},
    ],
)
def test_every_parameter_gets_a_gradient(changes: dict[str, Any]) -> None:
    model = small(**changes).train()
    output = model(random_clips(2), torch.tensor([[32, 8, 2, 1], [32, 32, 32, 32]]))
    (output.reconstruction.square().mean() + sum(output.losses.values())).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == []


def test_recomputing_activations_gives_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        model = small().train()
        model.recompute_activations(recompute)
        torch.manual_seed(1)
        model(random_clips(1), torch.tensor([[8, 2, 2, 1]])).reconstruction.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("codes", [8192, 16384])
def test_the_papers_tokenizer_has_145_million_parameters(codes: int) -> None:
    with torch.device("meta"):
        model = VideoTokenizer(TokenizerConfig(quantizer={"kind": "vq", "size": codes}))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(145e6, abs=1e6)


@pytest.mark.parametrize(
    ("encoder", "decoder"), itertools.product(["nano", "tiny", "mini", "S", "B", "L"], repeat=2)
)
def test_every_pair_of_presets_builds(encoder: str, decoder: str) -> None:
    with torch.device("meta"):
        model = VideoTokenizer(TokenizerConfig(encoder=encoder, decoder=decoder, align_layer=1))
    assert len(model.encoder.layers) == model.config.encoder.layers
    assert model.to_pixels.in_features == model.config.decoder.width


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choices": [8, 64]}, "at most 32"),
        ({"choices": [8, 8]}, "ascending and distinct"),
        ({"size": 24, "patch": [2, 8, 8]}, "power of two"),
        ({"size": 20}, "does not divide|power of two"),
        ({"frames": 7}, "does not divide"),
        ({"encoder": {"width": 30, "layers": 1, "heads": 4}}, "not a multiple of heads"),
        ({"encoder": "huge"}, "presets are"),
        ({"align_layer": 3}, "align_layer"),
        ({"encoder_queries": "learned", "decoder_queries": "cover"}, "cover no patches"),
    ],
)
def test_impossible_configs_are_user_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(json.dumps(SMALL | changes), TokenizerConfig, "experiment.yaml")
    with pytest.raises(ValidationError):
        TokenizerConfig(**SMALL | changes)


@pytest.mark.parametrize("assignment", [[[1, 1, 1, 33]], [[0, 1, 1, 1]], [[1, 1, 1, 1, 1]], [1, 1, 1, 1]])
def test_impossible_assignments_are_refused(assignment: list[Any]) -> None:
    with pytest.raises(ValueError, match="assignment"):
        small().encode(random_clips(1), torch.tensor(assignment))


def test_a_saved_model_comes_back_as_it_was(tmp_path: Path) -> None:
    model, clips = small(), random_clips(1)
    model.save_pretrained(tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    loaded = VideoTokenizer.from_pretrained(tmp_path / "model")
    assert not loaded.training
    assert loaded.config == model.config
    assert loaded.codebook == model.codebook
    assignment = torch.tensor([[8, 2, 2, 1]])
    assert torch.equal(loaded.encode(clips, assignment).indices, model.encode(clips, assignment).indices)


def test_a_folder_without_a_model_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="VideoTokenizer"):
        VideoTokenizer.from_pretrained(tmp_path)


def test_models_with_other_codes_name_their_codebooks_differently() -> None:
    trained = small().train()
    name = trained.codebook
    trained(random_clips(1), torch.tensor([[8, 8, 8, 8]]))
    trained.quantizer.end_step()
    assert trained.codebook != name
    assert small(quantizer={"kind": "fsq"}).codebook == small(quantizer={"kind": "fsq"}).codebook
    assert (
        small(quantizer={"kind": "fsq"}).codebook
        != small(quantizer={"kind": "fsq", "levels": [8, 8]}).codebook
    )
