import pytest
import torch

from evatok.assignment.space import AssignmentSpace
from evatok.models.layers import TransformerSize
from evatok.models.router import FactorisedHead, Router, RouterConfig, RouterObjective

CHOICES = (2, 4, 8)
SMALL = RouterConfig(frames=8, size=16, choices=CHOICES, network=TransformerSize(width=16, layers=1, heads=2))


def small(**changes: object) -> Router:
    torch.manual_seed(0)
    return Router(SMALL.model_copy(update=changes))


def test_the_default_router_has_the_papers_size() -> None:
    with torch.device("meta"):
        router = Router(RouterConfig())
    assert sum(p.numel() for p in router.parameters()) / 1e6 == pytest.approx(19.9, abs=0.5)


@pytest.mark.parametrize("head", ["classes", "factorised"])
@pytest.mark.parametrize("conditioned", [False, True])
def test_log_probabilities_of_all_assignments_sum_to_one(head: str, conditioned: bool) -> None:
    router = small(head=head, conditioned=conditioned)
    clips = torch.randint(256, (3, 3, 8, 16, 16), dtype=torch.uint8)
    log_probs = router(clips, torch.tensor([0.4, 1.2, 2.0]) if conditioned else None)
    assert log_probs.shape == (3, 9)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(3))


def test_bytes_and_fractions_of_the_same_clip_are_the_same_input() -> None:
    router = small()
    clips = torch.randint(256, (2, 3, 8, 16, 16), dtype=torch.uint8)
    torch.testing.assert_close(router(clips), router(clips.float() / 255))


def test_the_reward_weight_changes_the_answer_of_a_conditioned_router_and_is_required() -> None:
    router = small(conditioned=True)
    clips = torch.rand(2, 3, 8, 16, 16)
    assert not torch.equal(router(clips, torch.tensor([0.4, 0.4])), router(clips, torch.tensor([1.6, 1.6])))
    with pytest.raises(ValueError, match="conditioned"):
        router(clips)
    with pytest.raises(ValueError, match="conditioned"):
        small()(clips, torch.tensor([1.0, 1.0]))


@pytest.mark.parametrize("changes", [{}, {"head": "factorised"}, {"conditioned": True}])
def test_the_head_scores_in_full_precision_under_autocast(changes: dict[str, object]) -> None:
    router = small(choices=(2, 4, 8, 16, 32), **changes)
    clips = torch.rand(2, 3, 8, 16, 16)
    w_q = torch.tensor([0.4, 1.2]) if router.config.conditioned else None
    with torch.autocast("cpu", torch.bfloat16):
        log_probs, features = router(clips, w_q), router.features(clips, w_q)
    torch.testing.assert_close(log_probs, router._score(features, w_q))
    assert all(len(row.unique()) == len(row) for row in log_probs), "bfloat16 would tie some of the 25"


def test_factorised_head_scores_one_assignment_as_in_the_whole_table() -> None:
    head = FactorisedHead(SMALL)
    features = torch.randn(4, 4, 16)  # three blocks
    space = AssignmentSpace(CHOICES, 3)
    table = head(features)
    assert table.shape == (4, 27)
    torch.testing.assert_close(table.exp().sum(-1), torch.ones(4))
    for index in range(27):
        digits = space.digits(torch.tensor(index)).expand(4, 3)
        torch.testing.assert_close(head.log_likelihood(features, digits), table[:, index])


def test_factorised_head_finds_the_likeliest_assignment_when_the_beam_is_wide() -> None:
    head = FactorisedHead(SMALL)
    features = 5 * torch.randn(16, 4, 16)
    space = AssignmentSpace(CHOICES, 3)
    assert torch.equal(head.most_likely(features, width=9), space.digits(head(features).argmax(-1)))


def test_factorised_head_serves_more_blocks_than_can_be_enumerated() -> None:
    features = torch.randn(2, 65, 16)
    assert FactorisedHead(SMALL).most_likely(features).shape == (2, 64)


@pytest.mark.parametrize("kind", ["hard", "soft", "expected"])
def test_every_objective_is_least_when_the_best_assignment_is_certain(kind: str) -> None:
    rewards = torch.tensor([[0.0, 3.0, 1.0]])
    objective = RouterObjective(kind=kind)
    right, wrong = torch.tensor([[0.0, 20.0, 0.0]]), torch.tensor([[0.0, 0.0, 20.0]])
    assert objective.loss(right.log_softmax(-1), rewards) < objective.loss(wrong.log_softmax(-1), rewards)


def test_soft_targets_prefer_the_second_best_to_the_worst_and_hard_targets_do_not() -> None:
    rewards = torch.tensor([[0.0, 3.0, 2.9]])
    second, worst = torch.tensor([[0.0, 1.0, 5.0]]), torch.tensor([[5.0, 1.0, 0.0]])
    losses = {
        kind: [float(RouterObjective(kind=kind).loss(x.log_softmax(-1), rewards)) for x in (second, worst)]
        for kind in ("hard", "soft", "expected")
    }
    assert losses["hard"][0] == pytest.approx(losses["hard"][1])
    assert losses["soft"][0] < losses["soft"][1]
    assert losses["expected"][0] < losses["expected"][1]


def test_a_router_learns_which_half_moves() -> None:
    torch.manual_seed(0)
    router = small()
    optimizer = torch.optim.AdamW(router.parameters(), lr=3e-3)
    rewards = torch.zeros(32, 9)
    late = torch.arange(32) % 2
    rewards[torch.arange(32), torch.where(late == 1, 2, 6)] = 1
    for _ in range(60):
        clips = torch.full((32, 3, 8, 16, 16), 0.5)
        noise = torch.rand(32, 3, 4, 16, 16)
        clips[late == 1, :, 4:], clips[late == 0, :, :4] = noise[late == 1], noise[late == 0]
        loss = RouterObjective().loss(router(clips), rewards)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (router(clips).argmax(-1) == rewards.argmax(-1)).all()


def test_a_saved_router_answers_the_same(tmp_path) -> None:
    router = small(head="factorised", conditioned=True)
    router.save_pretrained(tmp_path)
    clips, w_q = torch.rand(2, 3, 8, 16, 16), torch.tensor([0.8, 1.2])
    assert torch.equal(Router.from_pretrained(tmp_path)(clips, w_q), router(clips, w_q))
