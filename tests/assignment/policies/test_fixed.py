import pytest
import torch
from pydantic import TypeAdapter

from evatok.assignment.policies import Evidence, Policy, RandomPolicy, Sources, StaticPolicy, UniformPolicy
from evatok.assignment.reward import RewardStatistics, RewardWeights, length_statistics, reward
from evatok.assignment.space import AssignmentSpace
from evatok.errors import UserError
from evatok.metrics.perceptual import load_quality

SPACE = AssignmentSpace((32, 64, 128, 256, 512), 4)
CLIPS = torch.zeros(3, 3, 16, 8, 8, dtype=torch.uint8)


def test_a_policy_is_named_in_yaml_by_its_kind() -> None:
    policy = TypeAdapter(Policy).validate_python({"kind": "uniform", "count": 256})
    assert policy.bind(Sources(SPACE))(CLIPS).tolist() == [[256] * 4] * 3


def test_a_uniform_count_outside_the_choices_is_refused() -> None:
    with pytest.raises(UserError, match="100"):
        UniformPolicy(count=100).bind(Sources(SPACE))(CLIPS)


def test_static_has_the_highest_mean_reward_on_the_training_table() -> None:
    table = torch.rand(10, SPACE.size)
    metric = load_quality("mse")
    statistics = RewardStatistics.measure([table], SPACE)
    sources = Sources(SPACE, metric=metric, statistics=statistics, training_quality=table.mean(0))
    rewards = reward(table, SPACE.totals(), "mse", RewardWeights(1.4), statistics).mean(0)
    assigned = StaticPolicy(w_q=1.4).bind(sources)(CLIPS)
    assert SPACE.index(assigned).tolist() == [int(rewards.argmax())] * 3


def test_a_weight_left_open_is_that_of_the_run() -> None:
    torch.manual_seed(0)
    table = torch.rand(10, SPACE.size) - 0.0001 * SPACE.totals()
    statistics = RewardStatistics.measure([table], SPACE)
    known = {"metric": load_quality("mse"), "statistics": statistics, "training_quality": table.mean(0)}
    run = Sources(SPACE, w_q=2.0, **known)
    assert torch.equal(StaticPolicy().bind(run)(CLIPS), StaticPolicy(w_q=2.0).bind(run)(CLIPS))
    assert not torch.equal(StaticPolicy().bind(run)(CLIPS), StaticPolicy(w_q=1.2).bind(run)(CLIPS))
    assert StaticPolicy().settled(run) == StaticPolicy(w_q=2.0)


def test_static_says_what_it_lacks() -> None:
    with pytest.raises(UserError, match="training table"):
        StaticPolicy().bind(Sources(SPACE))


@pytest.mark.parametrize("tokens", [200.0, 500.0, 793.6, 1500.0])
def test_random_has_the_mean_that_its_knob_says(tokens: float) -> None:
    evidence = Evidence(torch.arange(20_000))
    assignment = RandomPolicy(tokens=tokens).assign(evidence, Sources(SPACE))
    assert float(assignment.sum(1).double().mean()) == pytest.approx(tokens, rel=0.02)
    assert assignment.unique().tolist() == list(SPACE.choices)


def test_random_at_the_mean_of_the_space_is_uniform() -> None:
    assignment = RandomPolicy(tokens=length_statistics(SPACE)[0]).assign(
        Evidence(torch.arange(20_000)), Sources(SPACE)
    )
    shares = torch.bincount(SPACE.choice_index(assignment).flatten()) / assignment.numel()
    torch.testing.assert_close(shares, torch.full((5,), 0.2), atol=0.01, rtol=0)


def test_random_depends_on_the_sample_position_and_not_on_the_batch() -> None:
    policy = RandomPolicy(tokens=600).bind(Sources(SPACE))
    together = policy(CLIPS, torch.tensor([4, 9, 2]))
    assert torch.equal(policy(CLIPS[:1], torch.tensor([9])), together[1:2])


def test_random_refuses_a_mean_that_no_clip_can_have() -> None:
    with pytest.raises(UserError, match="128 to 2048"):
        RandomPolicy(tokens=100).bind(Sources(SPACE))(CLIPS)
