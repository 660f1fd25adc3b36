import math

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.image.fid import _compute_fid

from evatok.metrics.frechet import (
    I3D,
    FeatureStatistics,
    frechet_distance,
    precision_recall,
)


def features(count: int, dim: int, seed: int) -> np.ndarray:
    draws = np.random.default_rng(seed)
    return draws.normal(size=(count, dim)) @ draws.normal(size=(dim, dim)) + draws.normal(size=dim)


def exact(mean: np.ndarray, covariance: np.ndarray) -> FeatureStatistics:
    return FeatureStatistics(2, mean, covariance)


def test_gaussians_with_commuting_covariances_have_the_closed_form():
    # Diagonal covariances: the distance is |gap|^2 + sum (sigma_a - sigma_b)^2.
    sigma_a, sigma_b, gap = np.array([1.0, 2.0, 0.0]), np.array([3.0, 0.5, 4.0]), np.array([1.0, -2.0, 2.0])
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    a = exact(np.zeros(3), turn @ np.diag(sigma_a**2) @ turn.T)
    b = exact(turn @ gap, turn @ np.diag(sigma_b**2) @ turn.T)
    assert frechet_distance(a, b) == pytest.approx(gap @ gap + ((sigma_a - sigma_b) ** 2).sum(), rel=1e-8)


def test_one_dimension_is_the_difference_of_means_and_deviations():
    a, b = np.random.default_rng(1).normal(3, 2, (500, 1)), np.random.default_rng(2).normal(1, 5, (500, 1))
    expected = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert frechet_distance(FeatureStatistics.of(a), FeatureStatistics.of(b)) == pytest.approx(expected)


def test_a_set_is_at_no_distance_from_itself_even_with_fewer_clips_than_dimensions():
    few = FeatureStatistics.of(features(10, 64, seed=3))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6 * np.trace(few.covariance))


def test_agrees_with_the_fid_mathematics_of_torchmetrics():
    a, b = FeatureStatistics.of(features(400, 32, 4)), FeatureStatistics.of(features(300, 32, 5))
    expected = _compute_fid(*(torch.from_numpy(x) for x in (a.mean, a.covariance, b.mean, b.covariance)))
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_statistics_of_parts_add_up_to_those_of_the_whole():
    whole = features(1000, 16, seed=6) + 1e4
    parts = [FeatureStatistics.of(part) for part in np.split(whole, [1, 37, 500])]
    added = parts[0] + parts[1] + parts[2] + parts[3]
    assert added.count == 1000
    np.testing.assert_allclose(added.mean, whole.mean(0), rtol=1e-12)
    np.testing.assert_allclose(added.covariance, np.cov(whole.T), rtol=1e-9)


def test_one_clip_has_no_distance():
    with pytest.raises(ValueError, match="two or more"):
        frechet_distance(FeatureStatistics.of(np.zeros((1, 3))), FeatureStatistics.of(np.zeros((5, 3))))


def test_precision_falls_when_clips_leave_the_manifold_and_recall_when_modes_are_missing():
    draws = torch.Generator().manual_seed(0)
    modes = torch.tensor([[0.0, 0.0], [20.0, 0.0]])
    real = modes.repeat(200, 1) + torch.randn(400, 2, generator=draws)
    one_mode = modes[:1].repeat(200, 1) + torch.randn(200, 2, generator=draws)
    precision, recall = precision_recall(real, one_mode)
    assert precision > 0.9
    assert 0.4 < recall < 0.55
    far = torch.cat([one_mode, torch.full((200, 2), 500.0)])
    assert precision_recall(real, far)[0] == pytest.approx(precision / 2, abs=0.02)


def test_a_set_covers_itself():
    points = torch.randn(3000, 4, generator=torch.Generator().manual_seed(1))
    assert precision_recall(points, points) == (1.0, 1.0)


class StandIn(nn.Module):
    """The call of the I3D TorchScript file, with features that tell what arrived."""

    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        assert rescale
        assert resize
        assert return_features
        return torch.stack([x.amin(dim=[1, 2, 3, 4]), x.amax(dim=[1, 2, 3, 4])], 1)


def test_i3d_gets_pixels_from_0_to_255_and_is_named_by_its_file(tmp_path):
    file = tmp_path / "i3d_torchscript.pt"
    torch.jit.script(StandIn()).save(str(file))
    network = I3D(file)
    clips = torch.linspace(-0.5, 1, 2 * 3 * 4 * 8 * 8).reshape(2, 3, 4, 8, 8)
    assert network(clips)[1, 1] == 255
    assert network(clips)[0, 0] == 0
    assert network.name.startswith("i3d@")
    assert math.prod(network(clips).shape) == 4
