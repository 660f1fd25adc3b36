import math

import pytest
import torch

from evatok.assignment.reward import (
    RewardStatistics,
    RewardWeights,
    block_loss,
    clip_quality,
    length_statistics,
    percentile,
    reward,
    sample_weights,
)
from evatok.assignment.space import AssignmentSpace
from evatok.errors import UserError

PAPER = AssignmentSpace((32, 64, 128, 256, 512), 4)


def test_length_statistics_of_the_papers_space() -> None:
    mean, std = length_statistics(PAPER)
    assert mean == 793.6
    assert std == pytest.approx(349.14, abs=0.005)
    assert std == pytest.approx(float(PAPER.totals().double().std(correction=0)))


@pytest.mark.parametrize("metric", ["lpips", "mse", "dssim", "psnr", "ssim"])
def test_better_quality_never_lowers_the_reward_and_tokens_always_do(metric: str) -> None:
    statistics = RewardStatistics(0.2, 0.05, *length_statistics(PAPER))
    worse, better = (0.1, 0.3) if metric in ("psnr", "ssim") else (0.3, 0.1)
    value = reward(torch.tensor([worse, better]), torch.tensor(800), metric, RewardWeights(), statistics)
    assert value[1] > value[0]
    value = reward(torch.tensor(0.2), torch.tensor([128, 2048]), metric, RewardWeights(), statistics)
    assert value[0] > value[1]


def test_one_deviation_of_lpips_is_worth_524_tokens_at_the_papers_weights() -> None:
    statistics = RewardStatistics(0.2, 0.05, *length_statistics(PAPER))
    tokens = 1.2 / 0.8 * statistics.length_std
    values = reward(
        torch.tensor([0.2, 0.15]), torch.tensor([800, 800 + tokens]), "lpips", RewardWeights(1.2), statistics
    )
    assert tokens == pytest.approx(524, abs=0.5)
    torch.testing.assert_close(values[0], values[1])


def test_statistics_do_not_depend_on_how_the_table_is_split() -> None:
    table = torch.rand(40, PAPER.size, dtype=torch.float64) * 1e-3 + 0.5
    whole = RewardStatistics.measure([table], PAPER)
    parts = RewardStatistics.measure(iter(table.split([1, 7, 0, 32])), PAPER)
    assert whole.quality_mean == pytest.approx(float(table.mean()), rel=1e-12)
    assert whole.quality_std == pytest.approx(float(table.std(correction=0)), rel=1e-9)
    assert parts.quality_std == pytest.approx(whole.quality_std, rel=1e-12)


@pytest.mark.parametrize("table", [[], [torch.ones(3, 625)], [torch.full((3, 625), math.nan)]])
def test_a_table_without_spread_is_refused(table: list[torch.Tensor]) -> None:
    with pytest.raises(UserError, match="score more clips"):
        RewardStatistics.measure(table, PAPER)


def test_percentile_is_a_ratio_of_means_between_worst_and_best() -> None:
    rewards = torch.tensor([[0.0, 1.0, 4.0], [10.0, 11.0, 12.0]])
    assert percentile(rewards, torch.tensor([2, 2])) == 100
    assert percentile(rewards, torch.tensor([0, 0])) == 0
    assert percentile(rewards, torch.tensor([1, 1])) == pytest.approx(100 * 2 / 6)


def test_psnr_of_a_clip_comes_from_its_mean_error() -> None:
    psnr = torch.tensor([20.0, 40.0], dtype=torch.float64)
    clip = clip_quality(block_loss(psnr, "psnr").mean(), "psnr")
    assert float(clip) == pytest.approx(-10 * math.log10((1e-2 + 1e-4) / 2))


@pytest.mark.parametrize("metric", ["lpips", "mse", "dssim", "psnr", "ssim"])
def test_losses_are_zero_for_perfect_blocks_and_grow_as_quality_falls(metric: str) -> None:
    values = torch.tensor([0.1, 0.9])
    losses = block_loss(values, metric)
    assert (losses >= 0).all()
    assert (losses[0] > losses[1]) == (metric in ("psnr", "ssim"))


def test_each_clip_may_have_its_own_weight() -> None:
    statistics = RewardStatistics(0.2, 0.05, *length_statistics(PAPER))
    table = torch.rand(2, PAPER.size)
    w_q = torch.tensor([0.4, 1.6])
    both = reward(table, PAPER.totals(), "lpips", RewardWeights(w_q[:, None]), statistics)
    for row in range(2):
        alone = reward(table[row], PAPER.totals(), "lpips", RewardWeights(float(w_q[row])), statistics)
        torch.testing.assert_close(both[row], alone)


@pytest.mark.parametrize("w_q", [-0.1, 2.1, math.nan])
def test_weights_outside_their_range_are_refused(w_q: float) -> None:
    with pytest.raises(UserError, match="w_q"):
        RewardWeights(w_q)


def test_sampled_weights_depend_on_seed_and_position_alone() -> None:
    positions = torch.arange(1000)
    weights = sample_weights(positions, seed=1)
    assert torch.equal(weights[500:], sample_weights(positions[500:], seed=1))
    assert 0.4 <= weights.min() < 0.5 < 1.9 < weights.max() <= 2.0
