"""The frozen teacher and the projection to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import VJEPA2Config, VJEPA2Model

from evatok.errors import UserError
from evatok.losses import alignment_loss
from evatok.models.teachers import AlignmentHead, Teacher, TeacherConfig, build_teacher, standardised
from evatok.models.tokenizer import TokenizerConfig

TOKENIZER = TokenizerConfig(
    frames=8, size=32, patch=(4, 8, 8), choices=(4, 8), encoder="nano", decoder="nano", align_layer=1
)


def tiny_vjepa2(tubelet: int = 2, size: int = 32) -> nn.Module:
    torch.manual_seed(0)
    config = VJEPA2Config(
        patch_size=8,
        crop_size=size,
        frames_per_clip=8,
        tubelet_size=tubelet,
        hidden_size=48,
        num_attention_heads=2,
        num_hidden_layers=2,
        pred_hidden_size=24,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
    )
    model: nn.Module = VJEPA2Model(config)
    return model


def test_the_teacher_gives_a_grid_of_features_without_gradients() -> None:
    teacher = Teacher(TeacherConfig(size=32), TOKENIZER, tiny_vjepa2()).train()
    found = teacher(torch.randint(0, 256, (2, 3, 8, 16, 16), dtype=torch.uint8))
    assert found.shape == (2, 4 * 16, 48)
    assert not found.requires_grad
    assert not teacher.backbone.training
    assert not any(p.requires_grad for p in teacher.parameters())


def test_the_teacher_loads_a_local_folder(tmp_path: Path) -> None:
    tiny_vjepa2().save_pretrained(tmp_path)  # type: ignore[operator]
    clips = torch.rand(1, 3, 8, 32, 32)
    loaded = build_teacher(TeacherConfig(source=str(tmp_path), size=32), TOKENIZER)(clips)
    torch.testing.assert_close(loaded, Teacher(TeacherConfig(size=32), TOKENIZER, tiny_vjepa2())(clips))


def test_a_teacher_at_another_size_numbers_the_places_of_its_input(tmp_path: Path) -> None:
    tiny_vjepa2(size=64).save_pretrained(tmp_path)  # type: ignore[operator]
    clips = torch.rand(1, 3, 8, 32, 32)
    loaded = build_teacher(TeacherConfig(source=str(tmp_path), size=32), TOKENIZER)(clips)
    pixels = standardised(clips, 32, 8)
    right, wrong = (
        tiny_vjepa2(size=size).eval()(pixels, skip_predictor=True).last_hidden_state for size in (32, 64)
    )
    torch.testing.assert_close(loaded, right)
    assert (loaded - wrong).abs().max() > 1e-4


def test_a_missing_teacher_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no model"):
        build_teacher(TeacherConfig(source=str(tmp_path)), TOKENIZER)


@pytest.mark.parametrize("size", [32, 16, 64])
def test_both_sides_of_the_comparison_have_the_decoders_grid_and_the_teachers_width(size: int) -> None:
    teacher = Teacher(TeacherConfig(size=size), TOKENIZER, tiny_vjepa2(size=size))
    head = AlignmentHead(TOKENIZER, teacher)
    projected, target = head(torch.randn(2, 2 * 16, 64)), teacher(torch.rand(2, 3, 8, 32, 32))
    assert projected.shape == target.shape == (2, 4 * 16, 48)


def test_a_decoder_cell_meets_the_teachers_cells_at_its_place() -> None:
    teacher = Teacher(TeacherConfig(size=32), TOKENIZER, tiny_vjepa2())
    head = AlignmentHead(TOKENIZER, teacher)
    head.project = nn.Linear(64, 96)  # type: ignore[assignment]
    nn.init.constant_(head.project.weight, 1 / 64)
    nn.init.zeros_(head.project.bias)
    numbers = torch.arange(2 * 16.0).view(1, 32, 1)  # of every decoder cell, block by block
    projected = head(numbers.expand(-1, -1, 64))[0, :, 0]
    place = torch.arange(4 * 16)  # of the teacher's features, time step by time step, two steps a block
    torch.testing.assert_close(projected, (place // 32 * 16 + place % 16).float())


def test_training_the_projection_raises_the_similarity() -> None:
    teacher = Teacher(TeacherConfig(size=32), TOKENIZER, tiny_vjepa2())
    head = AlignmentHead(TOKENIZER, teacher)
    target = teacher(torch.rand(2, 3, 8, 32, 32))
    features = torch.randn(2, 32, 64)
    optimizer = torch.optim.Adam(head.parameters(), 1e-3)
    losses = []
    for _ in range(30):
        loss = alignment_loss(head(features), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert losses[-1] >= -1


def test_a_block_shorter_than_the_teachers_tubelet_is_a_user_error() -> None:
    with pytest.raises(UserError, match="tubelet"):
        Teacher(TeacherConfig(size=32), TOKENIZER, tiny_vjepa2(tubelet=8))


def test_frames_are_resized_spread_and_standardised() -> None:
    clips = torch.arange(8.0).view(1, 1, 8, 1, 1).expand(1, 3, 8, 4, 4) / 8
    found = standardised(clips, 8, 4)
    assert found.shape == (1, 4, 3, 8, 8)
    back = (
        found * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        + torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    )
    torch.testing.assert_close(back[0, :, 0, 0, 0], torch.tensor([0, 2, 4, 6]) / 8)
