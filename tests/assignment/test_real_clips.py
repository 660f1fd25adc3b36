"""The searches on real clips, with a proxy that was trained."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from evatok.assignment.reward import RewardStatistics, RewardWeights, reward
from evatok.assignment.search import best, brute_force, full
from evatok.assignment.space import AssignmentSpace
from evatok.metrics.perceptual import load_quality
from evatok.models.tokenizer import VideoTokenizer
from evatok.video.decode import ClipFormat, decode_clip

CLIPS, MANY = 12, 200


@pytest.fixture(scope="module")
def proxy(tiny_run: Path) -> VideoTokenizer:
    return VideoTokenizer.from_pretrained(tiny_run / "proxy" / "model").eval()


@pytest.fixture(scope="module")
def clips(proxy: VideoTokenizer, test_data: Path) -> Tensor:
    return first_clips(proxy, test_data, CLIPS)


def first_clips(proxy: VideoTokenizer, test_data: Path, count: int) -> Tensor:
    """uint8 [count, C, F, H, W], of as many videos."""
    files = [
        file for split in ("test", "train") for file in sorted((test_data / "clips" / split).rglob("*.mp4"))
    ]
    form = ClipFormat(frames=proxy.config.frames, size=proxy.config.size)
    return torch.from_numpy(np.stack([decode_clip(str(file), 0.0, form) for file in files[:count]]))


def test_full_equals_brute_force_on_all_metrics(
    proxy: VideoTokenizer, clips: Tensor, test_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVATOK_WEIGHTS", str(test_data / "weights"))
    space = AssignmentSpace.of(proxy)
    metrics = [load_quality(name) for name in ("lpips", "psnr", "mse", "ssim", "dssim")]
    expected = brute_force(proxy, clips[:2], space, metrics, batch=64)
    for name, quality in full(proxy, clips[:2], space, metrics).items():
        torch.testing.assert_close(quality, expected[name], atol=1e-4, rtol=0)
        assert quality.std() > 0


def test_best_with_the_proven_bound_is_the_argmax(proxy: VideoTokenizer, clips: Tensor) -> None:
    space, metrics = AssignmentSpace.of(proxy), [load_quality("dssim")]
    table = full(proxy, clips, space, metrics)["dssim"]
    statistics = RewardStatistics.measure([table], space)
    chosen = set()
    for w_q, nodes in ((1.5, 780), (1.9, 781)):  # a proxy of so few steps gives little reason for tokens
        weights = RewardWeights(w_q)
        rewards = reward(table.double(), space.totals(), "dssim", weights, statistics)
        found = best(proxy, clips, space, metrics, weights, statistics)
        assert torch.equal(found.index, rewards.argmax(1))
        assert found.nodes.double().mean() < nodes
        chosen |= set(found.index.tolist())
    assert len(chosen) > 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_best_is_the_argmax_of_brute_force_on_200_clips(proxy: VideoTokenizer, test_data: Path) -> None:
    space, metrics = AssignmentSpace.of(proxy), [load_quality("dssim")]
    clips = first_clips(proxy, test_data, MANY)
    table = brute_force(proxy, clips, space, metrics, batch=64)["dssim"]
    statistics, weights = RewardStatistics.measure([table], space), RewardWeights(1.9)
    rewards = reward(table.double(), space.totals(), "dssim", weights, statistics)
    found = best(proxy, clips, space, metrics, weights, statistics)
    agreement = (found.index == rewards.argmax(1)).double().mean()
    print(f"{len(clips)} clips, {len(set(found.index.tolist()))} assignments, agreement {float(agreement)}")
    assert len(clips) == MANY
    assert agreement == 1
