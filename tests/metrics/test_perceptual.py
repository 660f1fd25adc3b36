"""LPIPS with the published weights, and its plumbing with random ones."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import lpips
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from evatok.metrics.perceptual import Lpips


def random_metric(network: Any = "alex") -> tuple[Lpips, lpips.LPIPS]:
    torch.manual_seed(0)
    packaged = lpips.LPIPS(net=network, pnet_rand=True, verbose=False)
    trunk = {f"features.{key.split('.', 1)[1]}": value for key, value in packaged.net.state_dict().items()}
    return Lpips(network, trunk), packaged


def picture(path: Path) -> Tensor:
    pixels = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy())
    return pixels.permute(2, 0, 1)[None, :, None].float() / 255


@pytest.mark.parametrize(("network", "near", "far"), [("alex", 0.1376, 0.7219), ("squeeze", 0.1479, 0.7110)])
def test_the_published_distances_come_out(
    network: Any, near: float, far: float, test_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = test_data / "weights"
    monkeypatch.setenv("EVATOK_WEIGHTS", str(folder))
    metric = Lpips(network)
    reference = picture(folder / "lpips/ex_ref.png")
    assert float(metric(picture(folder / "lpips/ex_p1.png"), reference)) == pytest.approx(near, abs=1e-4)
    assert float(metric(picture(folder / "lpips/ex_p0.png"), reference)) == pytest.approx(far, abs=1e-4)


@pytest.mark.parametrize("network", ["alex", "squeeze", pytest.param("vgg", marks=pytest.mark.slow)])
def test_blocks_get_the_mean_of_the_packages_distance_over_their_frames(network: Any) -> None:
    metric, packaged = random_metric(network)
    a, b = torch.rand(2, 3, 2, 64, 64), torch.rand(2, 3, 2, 64, 64)
    frames = [x.transpose(1, 2).flatten(0, 1) for x in (a, b)]
    with torch.no_grad():
        expected = packaged(*frames, normalize=True).view(2, 2).mean(1)
        torch.testing.assert_close(metric(a, b), expected, atol=1e-5, rtol=1e-4)


def test_a_prepared_target_gives_the_same_for_any_of_its_blocks() -> None:
    metric, _ = random_metric()
    a, b = torch.rand(3, 3, 1, 64, 64), torch.rand(3, 3, 1, 64, 64)
    rows = torch.tensor([2, 0, 0])
    reference = metric.prepare(b).select(rows)
    torch.testing.assert_close(metric(a[rows], reference), metric(a, b)[rows])


def test_gradients_reach_the_reconstruction_and_no_weight() -> None:
    metric, _ = random_metric()
    a = torch.rand(1, 3, 1, 64, 64, requires_grad=True)
    metric.train()(a, torch.rand(1, 3, 1, 64, 64)).sum().backward()
    assert a.grad is not None
    assert a.grad.abs().sum() > 0
    assert all(p.grad is None for p in metric.parameters())
    assert not metric.training


def test_the_metric_travels_by_pickle() -> None:
    metric, _ = random_metric()
    a, b = torch.rand(1, 3, 1, 64, 64), torch.rand(1, 3, 1, 64, 64)
    assert torch.equal(pickle.loads(pickle.dumps(metric))(a, b), metric(a, b))  # noqa: S301
