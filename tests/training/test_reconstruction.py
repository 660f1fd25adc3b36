"""Tokenizers trained by the loop, at a size for tests."""

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
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


def images_at(positions: torch.Tensor) -> Batch:
    """The first frame of each clip, held."""
    batch = clips_at(positions)
    held = batch["clip"][:, :, :1].expand_as(batch["clip"])
    return batch | {"clip": held.contiguous(), "still": torch.ones(len(positions), dtype=torch.bool)}


def test_an_image_is_trained_on_as_a_clip_of_one_block(encoders: dict[str, str]) -> None:
    teacher = {"source": encoders["vjepa2"], "size": 16}
    adversary = {"kind": "transformer", "patch": (4, 4, 4), "network": "nano", "every": 1}
    terms = {"adversary": adversary, "teacher": teacher, "adversarial": 0.3, "alignment": 0.7}
    built = task(**terms, perceptual_frames=8)
    torch.manual_seed(0)
    modules = built.build(torch.device("cpu"))
    batch = images_at(torch.arange(4))
    given = AssignmentSpace((4, 8, 16), 2).sample(batch["position"], seed=1)
    (_, loss, figures), (_, _, theirs) = built.losses(modules, batch, 0)
    assert {name for name in (*figures, *theirs) if not name.startswith("image_")} == {"loss"}
    assert figures["image_tokens"] == given[:, 0].float().mean()
    # The clips' later blocks are seen by nothing: the same loss, and no gradient but of the first block's.
    changed = batch | {"clip": batch["clip"].clone()}
    changed["clip"][:, :, 4:] = 0
    torch.testing.assert_close(next(built.losses(modules, changed, 0))[1], loss, rtol=0, atol=0)
    loss.backward()
    gradient = modules["model"].tokenizer.pixel_position.grad
    assert gradient[0].abs().sum() > 0
    assert not gradient[1].any()


def test_images_and_videos_in_turn_are_both_learnt(tmp_path: Path) -> None:
    def alternating(start: int) -> Iterator[Batch]:
        for at in range(start, 10**6, 4):
            yield (clips_at, images_at)[at // 4 % 2](torch.arange(at, at + 4))

    rows = Rows()
    settings = TrainConfig(**TRAIN | {"steps": 80, "checkpoint_every": 80, "lr": 3e-3, "ema": 0.9})
    checkpoints = FolderCheckpoints(Location.parse(tmp_path))
    train(task(), settings, alternating, seed=0, checkpoints=checkpoints, sinks=[rows])
    for name in ("l1", "image_l1"):
        seen = [row[name] for row in rows if name in row]
        assert len(seen) == 40
        assert sum(seen[-5:]) < 0.6 * sum(seen[:5])


def test_micro_batches_change_no_codebook(tmp_path: Path) -> None:
    # A micro-batch's size does change means over its tokens: no entropy term here, and clips of one length.
    quantizer = {"kind": "vq", "size": 64, "entropy": 0.0, "revive_after": 2}
    built = replace(
        task(),
        tokenizer=TokenizerConfig(**SMALL, quantizer=quantizer),
        assignments=lambda device: lambda clips, positions: torch.full((len(clips), 2), 8),
    )

    def in_micro_batches(start: int):
        for batch in batches(start):
            yield from (clips_at(position) for position in batch["position"].split(1))

    rows, cut_rows = Rows(), Rows()
    for name, size, stream, sink in (("whole", 4, batches, rows), ("cut", 1, in_micro_batches, cut_rows)):
        settings = TrainConfig(**TRAIN | {"micro_batch": size})
        kept = FolderCheckpoints(Location.parse(tmp_path / name))
        train(built, settings, stream, seed=0, checkpoints=kept, sinks=[sink])
    assert cut_rows.losses == pytest.approx(rows.losses, rel=1e-4)


def test_running_layers_again_changes_no_loss(tmp_path: Path) -> None:
    kept, _ = run(tmp_path / "kept", task())
    again, _ = run(tmp_path / "again", task(), recompute=True)
    assert again.losses == pytest.approx(kept.losses, rel=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_tokenizer_has_the_same_losses(tmp_path: Path) -> None:
    plain, _ = run(tmp_path / "plain", task())
    compiled, _ = run(tmp_path / "compiled", task(), compile=True)
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-4)


def test_every_zero_stage_trains_alike(tmp_path: Path) -> None:
    plain, _ = run(tmp_path / "0", task())
    sharded, _ = run(tmp_path / "3", task(), zero_stage=3)
    assert sharded.losses == pytest.approx(plain.losses, rel=1e-5)


def test_the_exported_tokenizer_loads_and_is_the_averaged_one(tmp_path: Path) -> None:
    built = task()
    _, trained = run(tmp_path / "run", built)
    built.export(trained.weights, tmp_path / "model")
    loaded = VideoTokenizer.from_pretrained(tmp_path / "model")
    state = loaded.state_dict()
    assert {f"tokenizer.{key}" for key in state} == set(trained.weights)
    assert all(torch.equal(state[key], trained.weights[f"tokenizer.{key}"]) for key in state)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["frames"] == 8


def test_assignments_follow_the_position_whatever_the_batch(tmp_path: Path) -> None:
    assign = RandomAssignments(AssignmentSpace((4, 8, 16), 2), seed=1)(torch.device("cpu"))
    clips = torch.zeros(8, 3, 8, 16, 16)
    whole = assign(clips, torch.arange(8))
    halves = [assign(clips[:4], torch.arange(4)), assign(clips[4:], torch.arange(4, 8))]
    assert torch.equal(whole, torch.cat(halves))


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tiny random encoders of the real classes."""
    from transformers import VideoMAEConfig, VideoMAEModel, VJEPA2Config, VJEPA2Model

    folder = tmp_path_factory.mktemp("encoders")
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    VideoMAEModel(
        VideoMAEConfig(image_size=16, patch_size=8, num_frames=8, intermediate_size=48, **shape)
    ).save_pretrained(folder / "videomae")
    VJEPA2Model(
        VJEPA2Config(crop_size=16, patch_size=4, frames_per_clip=8, pred_num_hidden_layers=1, **shape)
    ).save_pretrained(folder / "vjepa2")
    return {name: str(folder / name) for name in ("videomae", "vjepa2")}


def adversarial_task(encoders: dict[str, str], kind: str) -> TokenizerTask:
    adversary = {"kind": kind, "start": 2, "every": 2, "rate": 0.5}
    if kind == "transformer":
        adversary |= {"network": "nano", "patch": (4, 4, 4)}
    else:
        adversary |= {"source": encoders["videomae"], "taps": (0, 1, 2)}
    teacher = {"source": encoders["vjepa2"], "size": 16}
    return task(adversarial=0.3, adversary=adversary, alignment=0.7, teacher=teacher)


@pytest.mark.parametrize("kind", ["transformer", "videomae"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_whole_recipe_trains_and_resumes_bit_for_bit(
    encoders: dict[str, str], tmp_path: Path, kind: str, stage: int
) -> None:
    built = adversarial_task(encoders, kind)
    whole, trained = run(tmp_path, built, zero_stage=stage)
    assert [("adversarial" in row, "discriminator" in row) for row in whole if row["split"] == "train"] == [
        (False, False),
        (False, False),
        (True, True),
        (True, False),
        (True, True),
        (True, False),
    ]
    Location.parse(tmp_path).delete("step-000000006")
    resumed, _ = run(tmp_path, built, zero_stage=stage)
    assert resumed.losses == whole.losses[3:]
    built.export(trained.weights, tmp_path / "model")
    assert not any(
        "alignment" in name for name in VideoTokenizer.from_pretrained(tmp_path / "model").state_dict()
    )


@pytest.mark.parametrize("term", ["l1", "l2", "vq", "alignment"])
def test_a_term_alone_lowers_what_it_measures(encoders: dict[str, str], tmp_path: Path, term: str) -> None:
    weights = {name: float(name == term) for name in ("l1", "l2", "perceptual", "alignment")}
    built = task(**weights, teacher={"source": encoders["vjepa2"], "size": 16})
    quantizer = {"kind": "fsq", "levels": (8, 8, 8)}
    if term == "vq":
        quantizer = {"kind": "vq", "size": 64, "entropy": 0.0, "revive_after": 0}
    built = replace(built, tokenizer=TokenizerConfig(**SMALL, quantizer=quantizer))
    rows, _ = run(tmp_path, built, steps=40, checkpoint_every=40, lr=3e-3)
    values = [row[term] for row in rows if row["split"] == "train"]
    before, after = sum(values[:5]) / 5, sum(values[-5:]) / 5
    if term == "alignment":  # minus a cosine
        assert after < min(before - 0.2, -0.9)
    else:
        assert after < 0.7 * before


@pytest.mark.parametrize("kind", ["transformer", "videomae"])
def test_every_trained_parameter_gets_a_gradient_and_no_frozen_one_does(
    encoders: dict[str, str], kind: str
) -> None:
    check_gradients(adversarial_task(encoders, kind), clips_at(torch.arange(4)), step=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["transformer", "videomae"])
def test_a_step_of_the_papers_recipe_at_the_papers_size(tmp_path: Path, kind: str) -> None:
    from transformers import VideoMAEConfig, VideoMAEModel, VJEPA2Config, VJEPA2Model

    VideoMAEModel(VideoMAEConfig()).save_pretrained(tmp_path / "videomae")
    large = VJEPA2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, crop_size=256)
    VJEPA2Model(large).save_pretrained(tmp_path / "vjepa2")
    adversary = {"kind": kind} | ({"source": str(tmp_path / "videomae")} if kind == "videomae" else {})
    terms = {"adversary": adversary, "teacher": {"source": str(tmp_path / "vjepa2")}}
    paper = TokenizerConfig()
    space = AssignmentSpace.of(paper)
    built = TokenizerTask(paper, LossConfig(perceptual_kind="dssim", **terms), RandomAssignments(space, 1))
    clips = torch.randint(0, 256, (1, 3, 16, 128, 128), dtype=torch.uint8)
    check_gradients(built, {"clip": clips, "position": torch.arange(1)}, step=0)


def check_gradients(built: TokenizerTask, batch: Batch, step: int) -> None:
    torch.manual_seed(0)
    modules = built.build(torch.device("cpu"))
    seen = []
    for name, loss, _ in built.losses(modules, batch, step):
        assert torch.isfinite(loss)
        loss.backward()
        seen.append(name)
        others = [module for other, module in modules.items() if other not in seen]
        assert all(p.grad is None for module in others for p in module.parameters())
    assert seen == ["model", "discriminator"]
    for module in modules.values():
        for name, parameter in module.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
    assert all(p.grad is None for p in built._teacher.parameters())
