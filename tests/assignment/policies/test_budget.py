import itertools

import pytest
import torch

from evatok.assignment.policies import (
    BasePolicy,
    BudgetedPolicy,
    DifferencePolicy,
    Evidence,
    IlpPolicy,
    InformationPolicy,
    Sources,
)
from evatok.assignment.policies.budget import largest_sum, spend
from evatok.assignment.policies.policy import block_change
from evatok.assignment.space import AssignmentSpace
from evatok.errors import UserError

SPACE = AssignmentSpace((32, 64, 128, 256, 512), 4)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("exactly", [True, False])
def test_spending_is_optimal_against_enumeration(seed: int, exactly: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(5, 4, generator=generator)
    tokens = torch.tensor([1, 2, 5, 9])
    budget = int(torch.randint(5, 45, (), generator=generator))
    choices = torch.tensor(list(itertools.product(range(4), repeat=5)))
    costs, sums = tokens[choices].sum(1), values[torch.arange(5), choices].sum(1)
    allowed = costs == costs[costs <= budget].max() if exactly else costs <= budget
    chosen = spend(values, tokens, budget, exactly=exactly)
    cost = int(tokens[chosen].sum())
    assert cost <= budget
    assert not exactly or cost == int(costs[costs <= budget].max())
    torch.testing.assert_close(values[torch.arange(5), chosen].sum(), sums[allowed].max())


def test_the_largest_sum_is_found_without_enumeration() -> None:
    sums = {sum(c) for c in itertools.product((6, 10, 14), repeat=4)}
    for budget in range(24, 60):
        assert largest_sum([6, 10, 14], 4, budget) == max(s for s in sums if s <= budget)


def test_ilp_meets_the_budget_of_a_batch_exactly() -> None:
    losses = [torch.rand(32, 5 ** (t + 1)).double().sort(1, descending=True).values for t in range(4)]
    evidence = Evidence(torch.arange(32), losses=losses)
    for budget in (128.0, 500.0, 793.6, 2048.0):
        assignment = IlpPolicy(budget=budget).assign(evidence, Sources(SPACE))
        assert int(assignment.sum()) == int(budget * 32) // 32 * 32


@pytest.mark.parametrize("policy", [IlpPolicy(budget=127), BudgetedPolicy(budget=127)])
def test_a_budget_below_the_shortest_assignment_is_refused(policy: BasePolicy) -> None:
    with pytest.raises(UserError, match=f"{policy.kind}: a budget of 127 tokens .* 128"):
        policy.bind(Sources(SPACE))


def test_options_that_a_group_may_not_take_are_left_out() -> None:
    values = torch.tensor([[-torch.inf, 3.0, 9.0], [1.0, -torch.inf, 2.0]])
    assert spend(values, torch.tensor([1, 2, 4]), 4, exactly=False).tolist() == [1, 0]


@pytest.mark.parametrize("scope", ["clip", "batch"])
@pytest.mark.parametrize("budget", [128.0, 300.0, 1000.0, 2048.0])
def test_the_budgeted_router_never_exceeds_its_budget_and_wastes_no_score(scope: str, budget: float) -> None:
    scores = torch.randn(16, 625).log_softmax(1)
    evidence = Evidence(torch.arange(16), scores={None: scores})
    policy = BudgetedPolicy(budget=budget, scope=scope)
    assignment = policy.assign(evidence, Sources(SPACE))
    totals = assignment.sum(1)
    assert (totals if scope == "clip" else totals.double().mean()).max() <= budget
    achieved = scores.gather(1, SPACE.index(assignment)[:, None]).sum()
    per_clip = BudgetedPolicy(budget=budget).assign(evidence, Sources(SPACE))
    assert achieved >= scores.gather(1, SPACE.index(per_clip)[:, None]).sum() - 1e-4
    if budget == 2048:
        assert torch.equal(SPACE.index(assignment), scores.argmax(1))


def test_information_gives_the_harder_block_more() -> None:
    losses = [torch.full((1, 5 ** (t + 1)), value) for t, value in enumerate((0.1, 0.4, 0.1, 0.1))]
    assignment = InformationPolicy(rate=0.25).assign(Evidence(torch.arange(1), losses=losses), Sources(SPACE))
    assert assignment[0, 1] > assignment[0, 0] == assignment[0, 2] == assignment[0, 3]


def test_information_over_a_set_gives_the_harder_clip_more_and_per_clip_the_same() -> None:
    losses = [torch.tensor([[0.1], [0.5]]).expand(2, 5 ** (t + 1)) for t in range(4)]
    evidence = Evidence(torch.arange(2), losses=losses)
    jointly = InformationPolicy(rate=0.4, scope="set").assign(evidence, Sources(SPACE))
    alone = InformationPolicy(rate=0.4).assign(evidence, Sources(SPACE))
    assert jointly[1].sum() > jointly[0].sum()
    assert alone[1].sum() == alone[0].sum()


def test_difference_gives_the_changing_block_more_and_the_first_block_by_its_weight() -> None:
    clips = torch.full((1, 3, 16, 8, 8), 0.5)
    clips[:, :, :4] += 0.1 * torch.rand(8, 8)
    clips[:, :, 4:8], clips[:, :, 12:] = clips[:, :, :4].clone(), torch.rand(3, 4, 8, 8)
    assert block_change(clips, 4)[0, 1] == 0
    evidence = Evidence(torch.arange(1), change=block_change(clips, 4))
    plain = DifferencePolicy(rate=0.3).assign(evidence, Sources(SPACE))
    weighted = DifferencePolicy(rate=0.3, first=30).assign(evidence, Sources(SPACE))
    assert plain[0].argmax() == 3
    assert plain[0, 1] == 32
    assert weighted[0, 0] > plain[0, 0]
