"""The final tokenizer's assignments, and checks of what a tokenizer's training is told."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from evatok.assignment.policies import RouterPolicy, Sources
from evatok.assignment.space import AssignmentSpace
from evatok.models.layers import TransformerSize
from evatok.models.router import Router, RouterConfig
from evatok.stages import proxy, tokenizer
from evatok.stages.reconstruction import TokenizerTraining
from evatok.stages.tokenizer import PolicyAssignments, TokenizerStageConfig

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


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"kind": "uniform", "count": 100}, "uniform: count 100 is not among the token choices"),
        ({"kind": "budgeted", "budget": 50}, "below the least a clip takes, 64"),
        ({"kind": "random", "tokens": 9}, "clips take 64 to 1024"),
        ({"kind": "ilp", "budget": 300}, "take another policy"),
        ({"kind": "information", "rate": 0.5, "scope": "set"}, "take scope: clip"),
        ({"kind": "budgeted", "budget": 300, "scope": "batch"}, "take scope: clip"),
        ({"kind": "information", "rate": 0.5}, None),
    ],
)
def test_a_policy_that_cannot_assign_batch_by_batch_is_refused_before_anything_starts(
    policy: dict[str, Any], message: str | None
) -> None:
    config = TokenizerStageConfig.model_validate(
        {"model": {"frames": 8}, "policy": policy, "train": {"steps": 1, "global_batch": 2}}
    )
    experiment = SimpleNamespace(resources=SimpleNamespace(workers=1), proxy=None)
    found = dict(tokenizer.STAGE.check(config, experiment))
    if message is None:
        assert found == {}
    else:
        assert message in found["tokenizer.policy"]


def problems(losses: dict[str, Any], **model: Any) -> dict[str, str]:
    given = {"model": {"frames": 8} | model, "losses": losses, "train": {"steps": 1, "global_batch": 2}}
    experiment = SimpleNamespace(resources=SimpleNamespace(workers=1), proxy=None)
    found = dict(proxy.STAGE.check(TokenizerTraining.model_validate(given), experiment))
    final = dict(tokenizer.STAGE.check(TokenizerStageConfig.model_validate(given), experiment))
    assert final == {key.replace("proxy", "tokenizer"): problem for key, problem in found.items()}
    return found


@pytest.mark.parametrize(
    ("model", "patch", "message"),
    [
        ({"frames": 1, "patch": (1, 8, 8)}, (4, 8, 8), "model.frames, which is 1, must be a multiple of 4"),
        ({"frames": 6, "patch": (2, 8, 8)}, (4, 8, 8), "model.frames, which is 6, must be a multiple of 4"),
        ({}, (4, 8, 24), "model.size, which is 128, must be a multiple of 24"),
    ],
)
def test_an_adversarys_patch_must_tile_the_clip(
    model: dict[str, Any], patch: tuple[int, ...], message: str
) -> None:
    adversary = {"kind": "transformer", "patch": patch}
    found = problems({"adversary": adversary}, **model)
    assert message in found["proxy.losses.adversary.patch"]
    assert problems({"adversary": adversary, "adversarial": 0}, **model) == {}
    assert problems({"adversary": {"kind": "videomae"}}, **model) == {}


def test_the_frames_of_the_perceptual_term_must_divide_the_clips() -> None:
    found = problems({"perceptual_frames": 3})
    assert "3 does not divide the clip's frames, which are 8" in found["proxy.losses.perceptual_frames"]
    assert problems({"perceptual_frames": 4}) == {}
    assert problems({"perceptual_frames": 3, "perceptual": 0}) == {}
