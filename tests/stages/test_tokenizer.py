"""The final tokenizer's assignments, and checks of what a tokenizer's training is told."""

from pathlib import Path
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


def problems(losses: dict[str, Any], train: dict[str, Any] | None = None, **model: Any) -> dict[str, str]:
    steps = {"steps": 1, "global_batch": 2} | (train or {})
    given = {"model": {"frames": 8} | model, "losses": losses, "train": steps}
    experiment = SimpleNamespace(
        resources=SimpleNamespace(workers=1), proxy=None, index=SimpleNamespace(frames=16)
    )
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


def test_a_clip_must_have_the_frames_of_the_model() -> None:
    assert "more than the 16 of a clip (index.frames)" in problems({}, frames=32)["proxy.model.frames"]


def test_the_best_checkpoints_go_by_what_is_measured() -> None:
    off = {"perceptual": 0, "alignment": 0}
    asked = {"keep_by": "max eval_psnr", "eval_every": 1}
    assert problems(off, asked) == {}
    assert problems(off, {"keep_by": "min loss"}) == {}
    assert "allowed are loss" in problems(off, asked | {"eval_every": 0})["proxy.train.keep_by"]
    wrong = problems(off, asked | {"keep_by": "min eval_perceptual"})["proxy.train.keep_by"]
    assert "allowed are loss, eval_psnr, eval_tokens" in wrong


def test_what_does_not_fit_the_pretrained_models_is_told_before_anything_runs(tmp_path: Path) -> None:
    for name, settings in (("teacher", '{"tubelet_size": 2}'), ("critic", '{"num_hidden_layers": 4}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(settings)
        (tmp_path / name / "model.safetensors").touch()
    critic = {"kind": "videomae", "source": str(tmp_path / "critic"), "taps": (0, 4)}
    losses = {"teacher": {"source": str(tmp_path / "teacher")}, "adversary": critic}
    assert problems(losses) == {}
    assert "tubelet, 2 frames" in problems(losses, patch=(1, 8, 8))["proxy.model.patch"]
    found = problems(losses | {"adversary": critic | {"taps": (0, 5)}})
    assert "[5]: the network has hidden states 0 to 4" in found["proxy.losses.adversary.taps"]
