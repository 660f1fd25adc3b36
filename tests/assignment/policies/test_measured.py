from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from evatok.assignment.policies import (
    BasePolicy,
    BestUniformPolicy,
    Evidence,
    IlpPolicy,
    InformationPolicy,
    OraclePolicy,
    RecurrentPolicy,
    Sources,
    ThresholdPolicy,
    UniformPolicy,
    gather,
)
from evatok.assignment.reward import RewardStatistics, RewardWeights, reward
from evatok.assignment.search import full
from evatok.assignment.space import AssignmentSpace
from evatok.errors import UserError
from evatok.metrics.perceptual import load_quality
from evatok.models.tokenizer import VideoTokenizer

Table = Callable[..., tuple[VideoTokenizer, Tensor]]


@pytest.fixture
def known(make_table: Table) -> tuple[Sources, Tensor, Tensor]:
    """Sources, clips and the quality of all their assignments."""
    tokenizer, clips = make_table(12)
    space, metric = AssignmentSpace(tokenizer.choices, 4), load_quality("mse")
    quality = full(tokenizer, clips, space, [metric])["mse"].double()
    statistics = RewardStatistics.measure([quality], space)
    return Sources(space, tokenizer, metric, statistics), clips, quality


def policies(statistics: RewardStatistics) -> list[BasePolicy]:
    limit = statistics.quality_mean
    return [
        OraclePolicy(),
        BestUniformPolicy(),
        ThresholdPolicy(limit=limit),
        RecurrentPolicy(limit=limit),
        IlpPolicy(budget=200),
        InformationPolicy(rate=0.3),
    ]


def test_alone_and_from_shared_evidence_every_policy_assigns_the_same(
    known: tuple[Sources, Tensor, Tensor],
) -> None:
    sources, clips, _ = known
    assert sources.statistics is not None
    everything = policies(sources.statistics)
    evidence = gather(clips, torch.arange(12), sources, everything)
    halves = [gather(part, torch.arange(6), sources, everything) for part in clips.split(6)]
    joined = Evidence.cat(halves)
    for policy in everything:
        expected = policy.assign(evidence, sources)
        assert torch.equal(policy.bind(sources)(clips), expected), policy
        assert torch.equal(policy.assign(joined, sources), expected), policy


def test_shared_evidence_knows_the_quality_of_all_assignments(known: tuple[Sources, Tensor, Tensor]) -> None:
    sources, clips, quality = known
    evidence = gather(clips, torch.arange(12), sources, [OraclePolicy()])
    torch.testing.assert_close(evidence.quality("mse"), quality, atol=1e-6, rtol=0)


def test_the_oracle_takes_the_best_and_best_uniform_the_best_of_its_kind(
    known: tuple[Sources, Tensor, Tensor],
) -> None:
    sources, clips, quality = known
    space = sources.space
    assert sources.statistics is not None
    rewards = reward(quality, space.totals(), "mse", RewardWeights(1.6), sources.statistics)
    assert torch.equal(space.index(OraclePolicy(w_q=1.6).bind(sources)(clips)), rewards.argmax(1))
    uniform = space.index(torch.tensor(space.choices)[:, None].expand(-1, 4))
    expected = uniform[rewards[:, uniform].argmax(1)]
    assert torch.equal(space.index(BestUniformPolicy(w_q=1.6).bind(sources)(clips)), expected)


def test_threshold_takes_the_shortest_that_reaches_the_limit_and_else_the_longest(
    known: tuple[Sources, Tensor, Tensor],
) -> None:
    sources, clips, quality = known
    space = sources.space
    limit = float(quality.quantile(0.2))
    index = space.index(ThresholdPolicy(limit=limit).bind(sources)(clips))
    missed = 0
    for row, chosen in zip(quality, index.tolist()):
        reaching = (row <= limit).nonzero().squeeze(1)
        if len(reaching) == 0:
            missed += 1
            assert chosen == space.size - 1
            continue
        shortest = space.totals()[reaching].min()
        alike = reaching[space.totals()[reaching] == shortest]
        assert chosen == int(alike[row[alike].argmin()])
    assert 0 < missed < 12


def test_recurrent_grows_each_block_no_further_than_it_needs(known: tuple[Sources, Tensor, Tensor]) -> None:
    sources, clips, _ = known
    assert sources.statistics is not None
    limit = sources.statistics.quality_mean
    assignment = RecurrentPolicy(limit=limit).bind(sources)(clips)
    digits = sources.space.choice_index(assignment)
    evidence = gather(clips, torch.arange(12), sources, [OraclePolicy()])
    assert evidence.losses is not None
    node = torch.zeros(12, dtype=torch.int64)
    for t, loss in enumerate(evidence.losses):
        for clip in range(12):
            children = loss[clip, node[clip] * 5 : node[clip] * 5 + 5]
            chosen = int(digits[clip, t])
            assert not (children[:chosen] <= limit).any()
            assert children[chosen] <= limit or chosen == 4
        node = node * 5 + digits[:, t]
    assert assignment.unique().numel() > 2


def test_a_higher_knob_never_means_fewer_tokens(known: tuple[Sources, Tensor, Tensor]) -> None:
    sources, clips, _ = known
    assert sources.statistics is not None
    everything = [*policies(sources.statistics), UniformPolicy(count=8)]
    evidence = gather(clips, torch.arange(12), sources, everything)
    for policy in everything:
        sweep = policy.sweep(sources)
        tokens = [float(p.assign(evidence, sources).sum(1).double().mean()) for p in sweep]
        knobs = [getattr(p, p.knob) for p in sweep]
        falling = policy.knob == "limit"  # a higher error is reached with fewer tokens
        assert tokens == sorted(tokens, reverse=falling), (policy, dict(zip(knobs, tokens)))
        assert max(tokens) > 1.5 * min(tokens), policy


def test_what_measures_says_that_it_needs_a_proxy() -> None:
    with pytest.raises(UserError, match="proxy"):
        InformationPolicy(rate=0.5).bind(Sources(AssignmentSpace((1, 2), 2)))
