"""The final tokenizer's assignments, and checks of what a tokenizer's training is told."""

import json
import os
import subprocess
import sys
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
from evatok.models.tokens import Tokens
from evatok.stages import proxy, tokenizer
from evatok.stages.index import IndexConfig
from evatok.stages.reconstruction import TokenizerTraining
from evatok.stages.tokenizer import PolicyAssignments, TokenizerStageConfig
from evatok.video.synthetic import write_videos

CHOICES = (2, 4, 8)
EXPERIMENTS = Path(__file__).parents[2] / "experiments"
TINY = EXPERIMENTS / "tiny.yaml"
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
    found = dict(tokenizer.STAGE.check(config, with_index()))
    if message is None:
        assert found == {}
    else:
        assert message in found["tokenizer.policy"]


def with_index(images: bool = False) -> Any:
    folder: dict[str, Any] = {"source": {"kind": "folder", "path": "/nowhere"}}
    parts = {"films": folder, "pictures": folder | {"images": images}}
    index = IndexConfig.model_validate({"source": {"kind": "mixture", "parts": parts}})
    return SimpleNamespace(resources=SimpleNamespace(workers=1), proxy=None, index=index)


def test_an_adversarys_patch_that_tiles_no_image_is_refused_where_there_are_images() -> None:
    terms = {"adversarial": 1, "adversary": {"kind": "transformer", "patch": (8, 8, 8)}}
    assert not problems(terms)
    found = problems(terms, images=True)
    assert "does not tile an image, which is one block of 4 frames" in found["proxy.losses.adversary.patch"]


def problems(
    losses: dict[str, Any], train: dict[str, Any] | None = None, images: bool = False, **model: Any
) -> dict[str, str]:
    steps = {"steps": 1, "global_batch": 2} | (train or {})
    given = {"model": {"frames": 8} | model, "losses": losses, "train": steps}
    experiment = with_index(images)
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


@pytest.mark.parametrize("name", ["uniform", "tail_drop", "holistic"])
def test_comparison_models_are_trained_from_the_index_alone_at_the_papers_size(name: str) -> None:
    experiment = open_experiment(EXPERIMENTS / f"webvid_{name}.yaml")
    index, final = plan(experiment)
    assert (index.name, final.name, list(final.inputs)) == ("index", "tokenizer", ["index"])
    (parameters,) = final.describe(experiment).models.values()
    assert parameters == pytest.approx(145e6, abs=1e6)


def test_a_comparison_model_that_is_trained_stays_when_it_is_to_be_evaluated() -> None:
    changes = ["tokenizer.policy={kind: uniform, count: 256}", "tokenizer.train.steps=400000"]
    whole = fingerprints(open_experiment(EXPERIMENTS / "webvid.yaml", changes))
    alone = fingerprints(open_experiment(EXPERIMENTS / "webvid_uniform.yaml"))
    assert "evaluate" in whole
    assert alone == {name: whole[name] for name in ("index", "tokenizer")}


def test_a_uniform_tokenizer_is_trained_and_used_without_proxy_curation_or_router(tmp_path: Path) -> None:
    changes = [
        *ALONE,
        "tokenizer.policy={kind: uniform, count: 8}",
        f"storage={tmp_path}",
        "index.source.count=4",
    ]
    short = ["resources.workers=0", "tokenizer.train={steps: 2, warmup: 0, global_batch: 2}"]
    settings = [word for change in (*changes, *short) for word in ("--set", change)]
    done = evatok("run", str(TINY), *settings, "--json")
    assert [stage["name"] for stage in json.loads(done)["stages"]] == ["index", "tokenizer"]
    video = write_videos(tmp_path, 1, seed=3)[0]
    tokens = str(tmp_path / "video.safetensors")
    options = ["--policy", "{kind: uniform, count: 8}", "--output", tokens]
    evatok("encode", str(tmp_path / "tiny"), str(tmp_path / video.name), *options)
    assert set(Tokens.load(tokens).lengths.flatten().tolist()) == {8}


def evatok(*words: str) -> str:
    """The last line of stdout of a command that must succeed."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "evatok.cli", *words], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


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
