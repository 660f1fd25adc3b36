"""MSE, PSNR and SSIM of blocks."""

from __future__ import annotations

import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from evatok.metrics.perceptual import load_quality
from evatok.metrics.pixels import Dssim, Mse, Psnr, Ssim


def noisy_blocks() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    target = torch.rand(3, 3, 4, 32, 40)
    return (target + 0.1 * torch.randn_like(target)).clamp(0, 1), target


def test_ssim_is_that_of_torchmetrics_without_its_padded_border() -> None:
    reconstruction, target = noisy_blocks()
    frames = [x.transpose(1, 2).flatten(0, 1) for x in (reconstruction, target)]
    _, maps = structural_similarity_index_measure(
        *frames, data_range=1.0, reduction="none", return_full_image=True
    )
    expected = maps[..., 5:-5, 5:-5].mean((1, 2, 3)).view(3, 4).mean(1)
    torch.testing.assert_close(Ssim()(reconstruction, target), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(Dssim()(reconstruction, target), (1 - expected) / 2, atol=1e-5, rtol=0)


def test_psnr_is_that_of_torchmetrics_block_by_block() -> None:
    reconstruction, target = noisy_blocks()
    for found, a, b in zip(Psnr()(reconstruction, target), reconstruction, target):
        torch.testing.assert_close(found, peak_signal_noise_ratio(a, b, data_range=1.0))
    torch.testing.assert_close(Psnr()(reconstruction, target), -10 * Mse()(reconstruction, target).log10())


@pytest.mark.parametrize("name", ["mse", "psnr", "ssim", "dssim"])
def test_a_prepared_target_gives_the_same_for_any_of_its_blocks(name: str) -> None:
    metric = load_quality(name)
    reconstruction, target = noisy_blocks()
    reference = metric.prepare(target)
    rows = torch.tensor([2, 0, 0, 1])
    torch.testing.assert_close(
        metric(reconstruction[rows], reference.select(rows)), metric(reconstruction, target)[rows]
    )
    assert len(reference) == 3


@pytest.mark.parametrize("name", ["mse", "psnr", "ssim", "dssim"])
def test_less_noise_is_better(name: str) -> None:
    metric = load_quality(name)
    _, target = noisy_blocks()
    noise = torch.randn_like(target)
    little, much = metric((target + 0.01 * noise), target), metric(target + 0.2 * noise, target)
    assert ((little > much) == metric.higher_is_better).all()


def test_ssim_keeps_its_precision_under_autocast() -> None:
    reconstruction, target = noisy_blocks()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(Ssim()(reconstruction, target), Ssim()(reconstruction, target).float())
        inside = Ssim()(reconstruction, target)
    torch.testing.assert_close(inside, Ssim()(reconstruction, target))


def test_frames_smaller_than_the_window_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 11"):
        Ssim()(torch.rand(1, 3, 1, 8, 8), torch.rand(1, 3, 1, 8, 8))


def test_unknown_metrics_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="vmaf"):
        load_quality("vmaf")
