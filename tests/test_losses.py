"""Each training term drives its own quantity the right way."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evatok.errors import UserError
from evatok.losses import (
    LeCam,
    LossConfig,
    PerceptualLoss,
    alignment_loss,
    discriminator_loss,
    generator_loss,
    spaced_frames,
)
from evatok.metrics.pixels import Ssim


def drive(parameter: nn.Parameter, loss: object, steps: int = 60, rate: float = 0.05) -> None:
    assert callable(loss)
    optimizer = torch.optim.Adam([parameter], rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def test_the_structural_term_raises_structural_similarity() -> None:
    target = F.interpolate(torch.rand(1, 3, 2, 8, 8), (2, 32, 32), mode="nearest")
    frames = nn.Parameter(torch.rand(1, 3, 2, 32, 32))
    term, ssim = PerceptualLoss("dssim"), Ssim()
    before = float(ssim(frames.detach(), target))
    drive(frames, lambda: term(frames, target))
    assert float(ssim(frames.detach(), target)) > before + 0.3


def test_equal_clips_have_no_perceptual_distance() -> None:
    clips = torch.rand(2, 3, 4, 64, 64)
    assert float(PerceptualLoss("dssim")(clips, clips)) == pytest.approx(0, abs=1e-5)


def test_lpips_without_weights_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("EVATOK_WEIGHTS", "XDG_CACHE_HOME", "TORCH_HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    with pytest.raises(UserError, match="evatok weights lpips-vgg"):
        PerceptualLoss("lpips-vgg")


def test_the_lpips_term_lowers_lpips(test_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVATOK_WEIGHTS", str(test_data / "weights"))
    target = F.interpolate(torch.rand(1, 3, 1, 8, 8), (1, 64, 64), mode="nearest")
    frames = nn.Parameter(torch.rand(1, 3, 1, 64, 64))
    term = PerceptualLoss("lpips-squeeze")
    before = float(term(frames, target).detach())
    drive(frames, lambda: term(frames, target), steps=25)
    assert float(term(frames, target).detach()) < 0.6 * before


def test_successive_turns_see_every_frame_once() -> None:
    clips = torch.arange(16.0).view(1, 1, 16, 1, 1)
    seen = [spaced_frames(clips, 4, turn).flatten().tolist() for turn in range(4)]
    assert seen[1] == [1, 5, 9, 13]
    assert sorted(frame for turn in seen for frame in turn) == list(range(16))
    assert spaced_frames(clips, None, 3) is clips
    with pytest.raises(ValueError, match="does not divide"):
        spaced_frames(clips, 5, 0)


def test_the_generator_wants_its_clips_called_real() -> None:
    logits = nn.Parameter(torch.randn(10))
    before = logits.detach().clone()
    drive(logits, lambda: generator_loss(logits))
    assert (logits > before).all()
    assert float(generator_loss(torch.zeros(3, 4))) == pytest.approx(math.log(2))


def test_the_adversary_separates_real_from_fake_but_is_never_sure() -> None:
    torch.manual_seed(0)
    real, fake = nn.Parameter(torch.zeros(200)), nn.Parameter(torch.zeros(200))
    drive(real, lambda: discriminator_loss(real, fake.detach()), steps=400)
    drive(fake, lambda: discriminator_loss(real.detach(), fake), steps=400)
    assert 0.7 < real.sigmoid().mean() < 0.95, "targets lie in [0.7, 1]"
    assert 0.05 < fake.sigmoid().mean() < 0.3


def test_lecam_pulls_each_side_towards_the_running_mean_of_the_other() -> None:
    lecam = LeCam(decay=0.0)
    lecam(torch.full((4,), 1.0), torch.full((4,), -1.0))
    lecam.decay = 1.0
    real = nn.Parameter(torch.full((4,), 3.0))
    drive(real, lambda: lecam(real, torch.full((4,), 5.0)), steps=200)
    torch.testing.assert_close(real.detach(), torch.full((4,), -1.0), atol=0.1, rtol=0)
    fake = nn.Parameter(torch.full((4,), -3.0))
    drive(fake, lambda: lecam(torch.full((4,), -5.0), fake), steps=200)
    torch.testing.assert_close(fake.detach(), torch.full((4,), 1.0), atol=0.1, rtol=0)


def test_lecams_means_follow_the_logits() -> None:
    lecam = LeCam(decay=0.9)
    for _ in range(60):
        lecam(torch.full((4,), 2.0), torch.full((4,), -3.0))
    torch.testing.assert_close(lecam.means, torch.tensor([2.0, -3.0]), atol=0.02, rtol=0)


def test_logits_that_are_not_finite_do_not_spoil_lecams_means() -> None:
    lecam = LeCam(decay=0.5)
    lecam(torch.full((4,), 2.0), torch.full((4,), -3.0))
    lecam(torch.full((4,), torch.nan), torch.full((4,), -torch.inf))
    torch.testing.assert_close(lecam.means, torch.tensor([1.0, -1.5]))


def test_alignment_turns_features_towards_the_teacher() -> None:
    teacher: Tensor = torch.randn(2, 5, 8)
    features = nn.Parameter(torch.randn(2, 5, 8))
    drive(features, lambda: alignment_loss(features, teacher), steps=150)
    assert float(alignment_loss(features, teacher).detach()) < -0.95
    assert float(alignment_loss(3 * teacher, teacher)) == pytest.approx(-1)


def test_the_terms_name_the_models_that_they_load() -> None:
    terms = LossConfig(
        perceptual=0,
        alignment=0.7,
        teacher={"source": "owner/teacher"},
        adversarial=0.1,
        adversary={"kind": "videomae", "source": "owner/critic"},
    )
    assert terms.pretrained == ["owner/teacher", "owner/critic"]
    assert terms.model_copy(update={"alignment": 0, "adversarial": 0}).pretrained == []
