"""The final tokenizer's assignments, and checks of what a tokenizer's training is told."""

import torch

from evatok.assignment.policies import RouterPolicy, Sources
from evatok.assignment.space import AssignmentSpace
from evatok.models.layers import TransformerSize
from evatok.models.router import Router, RouterConfig
from evatok.stages.tokenizer import PolicyAssignments

CHOICES = (2, 4, 8)


def test_a_clip_is_assigned_the_same_tokens_under_autocast() -> None:
    torch.manual_seed(0)
    network = TransformerSize(width=32, layers=2, heads=2)
    router = Router(RouterConfig(frames=16, size=16, choices=CHOICES, network=network))
    space = AssignmentSpace(CHOICES, 4)
    assign = PolicyAssignments(RouterPolicy(), Sources(space, router=router))(torch.device("cpu"))
    clips = torch.randint(256, (64, 3, 16, 16, 16), dtype=torch.uint8)
    exact = assign(clips, torch.arange(64))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(assign(clips, torch.arange(64)), exact)
