"""Tokenizers trained by the loop, at a size for tests."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from toy import Rows

from evatok.artifacts import Location
from evatok.assignment.space import AssignmentSpace
from evatok.losses import LossConfig
from evatok.models.tokenizer import TokenizerConfig, VideoTokenizer
from evatok.training.checkpoint import FolderCheckpoints
from evatok.training.loop import TrainConfig, train
from evatok.training.reconstruction import RandomAssignments, TokenizerTask
from evatok.training.tasks import Batch

SMALL = {"frames": 8, "size": 16, "patch": (4, 4, 4), "choices": (4, 8, 16)}
SMALL |= {"encoder": "nano", "decoder": "nano", "align_layer": 1, "latent": 16}
TOKENIZER = TokenizerConfig(**SMALL, quantizer={"kind": "vq", "size": 64})
TRAIN = {"steps": 6, "global_batch": 4, "lr": 1e-3, "ema": 0.5, "log_every": 1, "checkpoint_every": 3}


def clips_at(positions: torch.Tensor) -> Batch:
    """A bright square that moves, one clip per position."""
    clips = torch.full((len(positions), 3, 8, 16, 16), 40, dtype=torch.uint8)
    for clip, position in zip(clips, positions.tolist()):
        for frame in range(8):
            at = (position + frame) % 12
            clip[position % 3, frame, at : at + 4, at : at + 4] = 220
    return {"clip": clips, "position": positions, "row": positions}


def batches(start: int):
    return (clips_at(torch.arange(at, at + 4)) for at in range(start, 10**6, 4))


def task(**terms: object) -> TokenizerTask:
    losses = LossConfig(**{"perceptual_kind": "dssim", "adversarial": 0, "alignment": 0} | terms)
    return TokenizerTask(TOKENIZER, losses, RandomAssignments(AssignmentSpace((4, 8, 16), 2), seed=1))


def run(folder: Path, built: TokenizerTask, **changes: object):
    rows = Rows()
    checkpoints = FolderCheckpoints(Location.parse(folder))
    settings = TrainConfig(**TRAIN | changes)
    held_out = [clips_at(torch.arange(1000, 1008))]
    return rows, train(
        built, settings, batches, seed=0, checkpoints=checkpoints, sinks=[rows], evaluation=held_out
    )


def test_a_tokenizer_learns_to_reconstruct(tmp_path: Path) -> None:
    rows, trained = run(tmp_path, task(), steps=60, checkpoint_every=60, lr=3e-3, ema=0.9)
    assert sum(rows.losses[-5:]) < 0.6 * sum(rows.losses[:5])
    assert trained.metrics["eval_psnr"] > 15


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_resumed_tokenizer_has_the_same_losses_bit_for_bit(tmp_path: Path, stage: int) -> None:
    whole, _ = run(tmp_path, task(), zero_stage=stage)
    Location.parse(tmp_path).delete("step-000000006")
    resumed, _ = run(tmp_path, task(), zero_stage=stage)
    assert resumed.losses == whole.losses[3:]


def test_every_zero_stage_trains_alike(tmp_path: Path) -> None:
    plain, _ = run(tmp_path / "0", task())
    sharded, _ = run(tmp_path / "3", task(), zero_stage=3)
    assert sharded.losses == pytest.approx(plain.losses, rel=1e-5)


def test_the_exported_tokenizer_loads_and_is_the_averaged_one(tmp_path: Path) -> None:
    built = task()
    _, trained = run(tmp_path / "run", built)
    built.export(trained.weights, tmp_path / "model")
    loaded = VideoTokenizer.from_pretrained(tmp_path / "model")
    name = "encoder.layers.0.mlp.0.weight"
    state = loaded.state_dict()
    assert set(state) == set(trained.weights)
    assert all(torch.equal(state[key], trained.weights[key]) for key in state), name
    assert json.loads((tmp_path / "model" / "config.json").read_text())["frames"] == 8


def test_assignments_follow_the_position_whatever_the_batch(tmp_path: Path) -> None:
    assign = RandomAssignments(AssignmentSpace((4, 8, 16), 2), seed=1)(torch.device("cpu"))
    clips = torch.zeros(8, 3, 8, 16, 16)
    whole = assign(clips, torch.arange(8))
    halves = [assign(clips[:4], torch.arange(4)), assign(clips[4:], torch.arange(4, 8))]
    assert torch.equal(whole, torch.cat(halves))
