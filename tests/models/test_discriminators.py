"""Adversaries: logits, gradients where they belong, augmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import VideoMAEConfig, VideoMAEModel

from evatok.errors import UserError
from evatok.models.augment import DRAWS, augment
from evatok.models.discriminators import (
    LocalBatchNorm,
    TransformerAdversaryConfig,
    VideoMaeAdversaryConfig,
    VideoMaeDiscriminator,
    build_adversary,
)
from evatok.models.tokenizer import TokenizerConfig

TINY = {"width": 32, "layers": 2, "heads": 2}


def clip_config(frames: int, size: int) -> TokenizerConfig:
    return TokenizerConfig(frames=frames, size=size, choices=(4, 8))


def tiny_videomae() -> nn.Module:
    torch.manual_seed(0)
    config = VideoMAEConfig(
        image_size=32,
        patch_size=8,
        num_frames=4,
        tubelet_size=2,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    model: nn.Module = VideoMAEModel(config)
    return model


@pytest.mark.parametrize(("logits", "count"), [("patch", 2 * 4 * 4), ("cls", 1)])
def test_the_transformer_judges_every_patch_or_the_clip(logits: Any, count: int) -> None:
    config = TransformerAdversaryConfig(patch=(4, 8, 8), network=TINY, logits=logits)
    model = build_adversary(config, clip_config(8, 32))
    clips = torch.rand(2, 3, 8, 32, 32, requires_grad=True)
    found = model(clips)
    assert found.shape == (2, count)
    found.sum().backward()
    assert clips.grad is not None
    assert all(p.grad is not None for p in model.parameters())


def test_larps_adversary_has_its_size() -> None:
    with torch.device("meta"):
        model = build_adversary(TransformerAdversaryConfig(), TokenizerConfig())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(38.9e6, rel=0.02)


def test_only_the_heads_of_the_videomae_adversary_learn() -> None:
    model = VideoMaeDiscriminator(VideoMaeAdversaryConfig(taps=(0, 1, 2)), tiny_videomae()).train()
    clips = torch.rand(2, 3, 8, 16, 16, requires_grad=True)
    logits = model(clips)
    assert logits.shape == (2, 3 * 2 * 4 * 4)
    logits.sum().backward()
    assert clips.grad is not None
    assert clips.grad.abs().sum() > 0
    assert not model.backbone.training
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("backbone."), name
        assert parameter.requires_grad != name.startswith("backbone."), name


def test_the_videomae_adversary_loads_a_local_folder(tmp_path: Path) -> None:
    tiny_videomae().save_pretrained(tmp_path)  # type: ignore[operator]
    config = VideoMaeAdversaryConfig(source=str(tmp_path), taps=(0, 2))
    model = build_adversary(config, clip_config(4, 32))
    other = VideoMaeDiscriminator(config, tiny_videomae())
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.backbone.state_dict().values(), other.backbone.state_dict().values())
    )


def test_a_missing_backbone_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no model"):
        build_adversary(VideoMaeAdversaryConfig(source=str(tmp_path)), TokenizerConfig())


def test_local_batch_norm_standardises_each_virtual_batch() -> None:
    x = torch.randn(12, 5, 7) * torch.arange(1, 13)[:, None, None]
    y = LocalBatchNorm(5)(x)
    for part in (y[:8], y[8:]):
        torch.testing.assert_close(part.mean((0, 2)), torch.zeros(5), atol=1e-5, rtol=0)
        torch.testing.assert_close(part.var((0, 2), correction=0), torch.ones(5), atol=1e-3, rtol=0)


def test_augmentation_treats_all_frames_of_a_clip_alike() -> None:
    frame = torch.rand(3, 3, 1, 16, 16)
    augmented = augment(frame.expand(-1, -1, 4, -1, -1))
    torch.testing.assert_close(augmented, augmented[:, :, :1].expand_as(augmented), atol=1e-5, rtol=0)


def test_augmentation_is_decided_by_its_draws_alone() -> None:
    clips, draws = torch.rand(4, 3, 2, 16, 16), torch.rand(4, DRAWS)
    assert torch.equal(augment(clips, draws), augment(clips, draws))
    torch.testing.assert_close(augment(clips, draws)[1:3], augment(clips[1:3], draws[1:3]))


def test_middling_draws_change_nothing_but_the_cutout() -> None:
    clips = torch.rand(1, 3, 2, 20, 20)
    augmented = augment(clips, torch.full((1, DRAWS), 0.5))
    changed = (augmented - clips).abs().amax((0, 1, 2)) > 1e-5
    assert changed.sum() == 4 * 4
    assert torch.equal(augmented[..., changed], torch.full_like(augmented[..., changed], 0.5))


def test_translation_moves_by_at_most_an_eighth() -> None:
    clips = torch.zeros(64, 3, 1, 32, 32)
    clips[..., 16, 16] = 1
    draws = torch.rand(64, DRAWS)
    draws[:, :3], draws[:, 5:] = 0.5, 0.0
    places = (augment(clips, draws) - 0.5).flatten(2).amax(1).argmax(1)
    rows, columns = places // 32, places % 32
    assert rows.min() == columns.min() == 12
    assert rows.max() == columns.max() == 20


def test_gradients_flow_through_the_augmentation() -> None:
    clips = torch.rand(2, 3, 2, 16, 16, requires_grad=True)
    augment(clips).square().sum().backward()
    assert clips.grad is not None
    assert clips.grad.isfinite().all()


def test_the_transformer_judges_clips_of_fewer_frames_by_the_positions_they_have() -> None:
    torch.manual_seed(0)
    config = TransformerAdversaryConfig(patch=(2, 8, 8), network=TINY)
    discriminator = build_adversary(config, clip_config(8, 16)).eval()
    shorter = build_adversary(config, clip_config(4, 16)).eval()
    weights = discriminator.state_dict()
    shorter.load_state_dict(weights | {"position": weights["position"][: shorter.position.shape[0]]})
    clips = torch.rand(2, 3, 4, 16, 16)
    torch.testing.assert_close(discriminator(clips), shorter(clips))
