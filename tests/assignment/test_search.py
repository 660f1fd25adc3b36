from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from evatok.assignment.reward import RewardStatistics, RewardWeights, percentile, reward
from evatok.assignment.search import Calibration, PrefixTree, beam, best, brute_force, full
from evatok.assignment.space import AssignmentSpace
from evatok.errors import UserError
from evatok.metrics.perceptual import Lpips, load_quality
from evatok.metrics.pixels import QualityMetric
from evatok.models.tokenizer import VideoTokenizer

Make = Callable[..., VideoTokenizer]
Clips = Callable[..., Tensor]
Table = Callable[..., tuple[VideoTokenizer, Tensor]]


def space_of(tokenizer: VideoTokenizer) -> AssignmentSpace:
    return AssignmentSpace.of(tokenizer)


def four_metrics() -> list[QualityMetric]:
    torch.manual_seed(0)
    shapes = {
        0: (64, 3, 11, 11),
        3: (192, 64, 5, 5),
        6: (384, 192, 3, 3),
        8: (256, 384, 3, 3),
        10: (256, 256, 3, 3),
    }
    trunk = {f"features.{n}.weight": torch.randn(shape) / shape[1] for n, shape in shapes.items()}
    trunk |= {f"features.{n}.bias": torch.zeros(shape[0]) for n, shape in shapes.items()}
    return [Lpips("alex", trunk), load_quality("psnr"), load_quality("mse"), load_quality("ssim")]


@pytest.mark.parametrize("sharp", [False, True])
@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
def test_full_equals_brute_force_on_all_metrics(
    make_tokenizer: Make, make_clips: Clips, blocks: int, sharp: bool
) -> None:
    tokenizer = make_tokenizer(blocks, sharp=sharp)
    space, clips, metrics = space_of(tokenizer), make_clips(2, blocks), four_metrics()
    expected = brute_force(tokenizer, clips, space, metrics, batch=27)
    found = full(tokenizer, clips, space, metrics)
    assert set(found) == {"lpips", "psnr", "mse", "ssim"}
    for name, quality in found.items():
        assert quality.shape == (2, 3**blocks)
        torch.testing.assert_close(quality, expected[name], atol=1e-4, rtol=0)
        assert quality.std() > 0


def test_each_node_is_evaluated_once_however_little_memory_there_is(
    make_tokenizer: Make, make_clips: Clips
) -> None:
    tokenizer, clips = make_tokenizer(3), make_clips(2, 3)
    tables = []
    for memory in (1, 50_000, 1 << 30):
        tree = PrefixTree(tokenizer, clips, space_of(tokenizer), [load_quality("mse")], memory)
        tree.grow_all()
        assert tree.evaluator.evaluated == 2 * (3 + 9 + 27)
        tables.append(tree.quality("mse"))
    torch.testing.assert_close(tables[0], tables[2])
    torch.testing.assert_close(tables[1], tables[2])


@pytest.mark.parametrize("prefix", [(3,), (8, 1), (1, 3, 8)])
def test_a_subtree_is_scored_alone(make_tokenizer: Make, make_clips: Clips, prefix: tuple[int, ...]) -> None:
    tokenizer = make_tokenizer(3)
    space, clips, metrics = space_of(tokenizer), make_clips(2, 3), [load_quality("mse")]
    whole = full(tokenizer, clips, space, metrics)["mse"]
    part = full(tokenizer, clips, space, metrics, prefix=prefix)["mse"]
    torch.testing.assert_close(part, whole[:, list(space.subtree(prefix))])
    torch.testing.assert_close(part, brute_force(tokenizer, clips, space, metrics, prefix=prefix)["mse"])


def test_a_proxy_that_sees_later_blocks_is_refused(make_tokenizer: Make, make_clips: Clips) -> None:
    causal = make_tokenizer(2)
    tokenizer = VideoTokenizer(causal.config.model_copy(update={"causal": False}))
    with pytest.raises(UserError, match="causal"):
        full(tokenizer, make_clips(1, 2), space_of(tokenizer), [load_quality("mse")])


def rewards_of(
    tokenizer: VideoTokenizer, clips: Tensor, metric: str, weights: RewardWeights
) -> tuple[Tensor, RewardStatistics]:
    space = space_of(tokenizer)
    quality = full(tokenizer, clips, space, [load_quality(metric)])[metric].double()
    statistics = RewardStatistics.measure([quality], space)
    return reward(quality, space.totals(), metric, weights, statistics), statistics


@pytest.mark.parametrize("metric", ["psnr", "mse"])
@pytest.mark.parametrize("w_q", [0.4, 1.2, 2.0])
def test_best_with_the_proven_bound_is_the_argmax_of_200_clips(
    make_table: Table, metric: str, w_q: float
) -> None:
    tokenizer, clips = make_table(200)
    weights, space = RewardWeights(w_q), space_of(tokenizer)
    rewards, statistics = rewards_of(tokenizer, clips, metric, weights)
    found = best(tokenizer, clips, space, [load_quality(metric)], weights, statistics)
    assert torch.equal(found.index, rewards.argmax(1))
    assert torch.equal(found.assignment, space.assignment(found.index))
    torch.testing.assert_close(found.reward, rewards.amax(1), atol=1e-4, rtol=0)
    assert found.nodes.double().mean() < 0.9 * 780


def test_best_is_the_argmax_with_a_real_tokenizer_and_little_memory(
    make_tokenizer: Make, make_clips: Clips
) -> None:
    tokenizer, clips, weights = make_tokenizer(3), make_clips(3, 3), RewardWeights(1.2)
    rewards, statistics = rewards_of(tokenizer, clips, "ssim", weights)
    found = best(tokenizer, clips, space_of(tokenizer), [load_quality("ssim")], weights, statistics, memory=1)
    assert torch.equal(found.index, rewards.argmax(1))


@pytest.mark.parametrize("calibrated", [False, True])
def test_best_searches_a_subtree_alone(make_table: Table, calibrated: bool) -> None:
    tokenizer, clips = make_table(40)
    space, metrics, weights = space_of(tokenizer), [load_quality("mse")], RewardWeights(1.2)
    rewards, statistics = rewards_of(tokenizer, clips, "mse", weights)
    inside = space.subtree((16, 32))
    tree = PrefixTree(tokenizer, clips, space, metrics)
    tree.grow_all()
    known = []
    for depth, loss in enumerate(tree.losses["mse"], 1):
        below = 5 ** (4 - depth)
        outside = torch.ones(loss.shape[1], dtype=torch.bool)
        outside[inside.start // below : -(-inside.stop // below)] = False
        known.append(loss.masked_fill(outside, torch.nan))
    calibration = Calibration.measure(known, 5, inside.stop - 1) if calibrated else None
    found = best(
        tokenizer, clips, space, metrics, weights, statistics, prefix=(16, 32), calibration=calibration
    )
    assert torch.equal(found.index, inside.start + rewards[:, inside.start : inside.stop].argmax(1))
    assert found.nodes.max() <= 2 + 5 + 25


def test_ties_go_to_the_lowest_index(make_table: Table) -> None:
    tokenizer, clips = make_table(3)
    for losses in tokenizer.losses:
        losses.fill_(0.1)
    statistics = RewardStatistics(0.1, 0.1, 198.4, 87.3)
    space, weights = space_of(tokenizer), RewardWeights(2.0)
    assert best(tokenizer, clips, space, [load_quality("mse")], weights, statistics).index.tolist() == [0] * 3


def test_a_good_guess_spares_nodes_and_a_bad_one_does_no_harm(make_table: Table) -> None:
    tokenizer, clips = make_table(20)
    weights, space, metrics = RewardWeights(1.0), space_of(tokenizer), [load_quality("mse")]
    rewards, statistics = rewards_of(tokenizer, clips, "mse", weights)
    nodes = []
    for guess in (rewards.argmax(1), rewards.argmin(1)):
        incumbent = space.assignment(guess)
        found = best(tokenizer, clips, space, metrics, weights, statistics, incumbent=incumbent)
        assert torch.equal(found.index, rewards.argmax(1))
        nodes.append(int(found.nodes.sum()))
    assert nodes[0] < nodes[1]


def test_a_calibrated_bound_finds_the_argmax_of_other_clips_with_a_fraction_of_the_nodes(
    make_table: Table,
) -> None:
    weights = RewardWeights(1.2)
    tokenizer, clips = make_table(200, seed=1)
    space, metrics = space_of(tokenizer), [load_quality("mse")]
    tree = PrefixTree(tokenizer, clips, space, metrics)
    tree.grow_all()
    calibration = Calibration.measure(tree.losses["mse"], len(space.choices))
    tokenizer, clips = make_table(200, seed=2)
    rewards, statistics = rewards_of(tokenizer, clips, "mse", weights)
    proven = best(tokenizer, clips, space, metrics, weights, statistics)
    calibrated = best(tokenizer, clips, space, metrics, weights, statistics, calibration=calibration)
    assert (calibrated.index == rewards.argmax(1)).double().mean() >= 0.99
    assert percentile(rewards, calibrated.index) >= 99.95
    assert calibrated.nodes.sum() < 0.5 * proven.nodes.sum()


def test_best_reports_the_part_of_the_table_it_saw(make_table: Table) -> None:
    tokenizer, clips = make_table(10)
    weights, space = RewardWeights(1.2), space_of(tokenizer)
    metrics = [load_quality("mse"), load_quality("psnr")]
    table = full(tokenizer, clips, space, metrics)
    _, statistics = rewards_of(tokenizer, clips, "mse", weights)
    found = best(tokenizer, clips, space, metrics, weights, statistics)
    for name, quality in found.quality.items():
        seen = ~quality.isnan()
        assert seen[torch.arange(10), found.index].all()
        assert 0 < seen.sum() < quality.numel()
        torch.testing.assert_close(quality[seen], table[name][seen])


def test_a_calibration_of_another_space_is_refused(make_table: Table) -> None:
    tokenizer, clips = make_table(1, blocks=2)
    statistics = RewardStatistics(0.1, 0.1, 8, 3)
    space, calibration = space_of(tokenizer), Calibration(((0.5, 1.0),))
    with pytest.raises(UserError, match="calibrat"):
        best(
            tokenizer,
            clips,
            space,
            [load_quality("mse")],
            RewardWeights(),
            statistics,
            calibration=calibration,
        )


def test_a_beam_as_wide_as_the_tree_finds_the_best(make_tokenizer: Make, make_clips: Clips) -> None:
    tokenizer, clips, weights = make_tokenizer(3), make_clips(4, 3), RewardWeights(1.2)
    rewards, statistics = rewards_of(tokenizer, clips, "psnr", weights)
    space = space_of(tokenizer)
    found = beam(tokenizer, clips, space, load_quality("psnr"), weights, statistics, width=9)
    assert torch.equal(space.index(found.assignment), rewards.argmax(1))
    torch.testing.assert_close(found.reward, rewards.amax(1), atol=1e-4, rtol=0)


def test_a_wider_beam_regrets_less_and_costs_more(make_table: Table) -> None:
    tokenizer, clips = make_table(40)
    weights, space = RewardWeights(1.2), space_of(tokenizer)
    rewards, statistics = rewards_of(tokenizer, clips, "mse", weights)
    achieved, nodes = [], []
    for width in (1, 5, 125):
        found = beam(tokenizer, clips, space, load_quality("mse"), weights, statistics, width=width)
        achieved.append(percentile(rewards, space.index(found.assignment)))
        nodes.append(found.nodes)
    assert 80 < achieved[0] < achieved[1] < achieved[2]
    assert achieved[2] == pytest.approx(100)
    assert nodes == [40 * 4 * 5, 40 * (5 + 3 * 25), 40 * 780]


def test_a_beam_serves_more_blocks_than_can_be_enumerated(make_tokenizer: Make, make_clips: Clips) -> None:
    tokenizer, clips = make_tokenizer(24), make_clips(2, 24)
    space = space_of(tokenizer)
    statistics = RewardStatistics(0.1, 0.02, 96, 14)
    found = beam(tokenizer, clips, space, load_quality("mse"), RewardWeights(), statistics, width=2)
    assert found.assignment.shape == (2, 24)
    assert found.nodes <= 2 * 24 * 3 * 2
    reconstruction = tokenizer.decode(tokenizer.encode(clips, found.assignment))
    mse = (reconstruction - clips / 255).square().flatten(1).mean(1)
    torch.testing.assert_close(found.quality, mse.float())
