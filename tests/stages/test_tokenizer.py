"""The final tokenizer's assignments, and checks of what a tokenizer's training is told."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from evatok.assignment.policies import RouterPolicy, Sources
from evatok.assignment.space import AssignmentSpace
from evatok.errors import UserError
from evatok.experiment import fingerprints, open_experiment, plan
from evatok.models.layers import TransformerSize
from evatok.models.router import Router, RouterConfig
from evatok.stages import proxy, tokenizer
from evatok.stages.reconstruction import TokenizerTraining
from evatok.stages.tokenizer import PolicyAssignments, TokenizerStageConfig

CHOICES = (2, 4, 8)
TINY = Path(__file__).parents[2] / "experiments" / "tiny.yaml"
ALONE = ["proxy=null", "curate=null", "router=null", "evaluate=null"]


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


@pytest.mark.parametrize("policy", ["{kind: uniform, count: 8}", "{kind: random, tokens: 40}"])
def test_under_assignments_that_ask_nobody_the_index_is_enough(policy: str, tmp_path: Path) -> None:
    experiment = open_experiment(TINY, [*ALONE, f"tokenizer.policy={policy}", f"storage={tmp_path}"])
    assert {entry.name: list(entry.inputs) for entry in plan(experiment)} == {
        "index": [],
        "tokenizer": ["index"],
    }
    with pytest.raises(UserError, match="reads what `curate` makes"):
        open_experiment(TINY, [*ALONE, "tokenizer.policy={kind: static}"])


def test_only_a_policy_that_weighs_rewards_makes_the_tokenizer_depend_on_them() -> None:
    def prints(policy: str, w_q: float) -> str:
        settings = [f"tokenizer.policy={policy}", f"curate.reward.w_q={w_q}"]
        return fingerprints(open_experiment(TINY, settings))["tokenizer"]

    assert prints("{kind: uniform, count: 8}", 1.2) == prints("{kind: uniform, count: 8}", 1.4)
    assert prints("{kind: static}", 1.2) != prints("{kind: static}", 1.4)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("{kind: uniform, count: 9}", "count 9 is not among the token choices"),
        ("{kind: random, tokens: 1000}", "a mean of 1000.0 tokens is impossible"),
    ],
)
def test_assignments_that_the_tokenizer_cannot_make_are_refused_early(policy: str, message: str) -> None:
    with pytest.raises(UserError, match=f"tokenizer.policy: .*{message}"):
        open_experiment(TINY, [f"tokenizer.policy={policy}"])
