import torch

from evatok.assignment.policies import RouterPolicy, Sources, default_policies, gather
from evatok.assignment.space import AssignmentSpace
from evatok.models.layers import TransformerSize
from evatok.models.router import Router, RouterConfig

CLIPS = torch.randint(256, (4, 3, 8, 16, 16), dtype=torch.uint8)


def sources(conditioned: bool) -> Sources:
    torch.manual_seed(0)
    network = TransformerSize(width=16, layers=1, heads=2)
    config = RouterConfig(frames=8, size=16, choices=(2, 4, 8), network=network, conditioned=conditioned)
    router = Router(config)
    with torch.no_grad():
        (router.head.quality if conditioned else router.head.classes).weight.mul_(50)
    return Sources(AssignmentSpace((2, 4, 8), 2), router=router)


def test_the_router_policy_takes_the_most_likely_assignment() -> None:
    known = sources(conditioned=False)
    expected = known.space.assignment(known.router(CLIPS).argmax(1))
    assert torch.equal(RouterPolicy().bind(known)(CLIPS), expected)


def test_a_price_on_tokens_shortens_what_the_router_assigns() -> None:
    known = sources(conditioned=False)
    sweep = RouterPolicy().sweep(known)
    evidence = gather(CLIPS, torch.arange(4), known, sweep)
    tokens = [int(policy.assign(evidence, known).sum()) for policy in sweep]
    assert tokens == sorted(tokens)
    assert tokens[0] < tokens[-1]


def test_a_conditioned_router_is_asked_at_the_weight_of_the_policy() -> None:
    known = sources(conditioned=True)
    sweep = RouterPolicy().sweep(known)
    assert [policy.knob for policy in sweep] == ["w_q"] * 9
    evidence = gather(CLIPS, torch.arange(4), known, sweep)
    for policy in sweep:
        expected = known.router(CLIPS, torch.full((4,), policy.w_q)).argmax(1)
        assert torch.equal(known.space.index(policy.assign(evidence, known)), expected)


def test_default_policies_are_those_that_the_sources_allow() -> None:
    kinds = {policy.kind for policy in default_policies(sources(conditioned=False))}
    assert kinds == {"uniform", "random", "difference", "router", "budgeted"}
