"""The loop in one process."""

import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

sys.path.insert(0, str(Path(__file__).parent))
from toy import Rows, ToyTask, toy_batches, toy_config, toy_run, toy_samples

from evatok.artifacts import Location
from evatok.errors import UserError
from evatok.training.checkpoint import FolderCheckpoints
from evatok.training.curves import Curves
from evatok.training.engine import World, has_bf16
from evatok.training.loop import _Run, train


def test_a_task_is_overfitted(tmp_path: Path) -> None:
    rows = Rows()
    same = toy_samples(torch.arange(8))
    train(
        ToyTask(),
        toy_config(steps=150, micro_batch=8, lr=3e-2),
        lambda start: (same | {"position": torch.arange(at, at + 8)} for at in range(start, 9999, 8)),
        seed=0,
        checkpoints=FolderCheckpoints(Location.parse(tmp_path)),
        sinks=[rows],
    )
    assert rows.losses[-1] < 0.01 * rows.losses[0]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_has_the_same_losses_bit_for_bit(tmp_path: Path, optimizer: str) -> None:
    task = ToyTask(dropout=0.3, adversarial=True)
    whole, ended = toy_run(tmp_path, task, optimizer=optimizer)
    shutil.rmtree(tmp_path / "step-000000012")
    resumed, ended_again = toy_run(tmp_path, task, optimizer=optimizer)
    assert resumed.losses == whole.losses[6:]
    assert [row.get("margin") for row in resumed] == [row.get("margin") for row in whole[6:]]
    assert all(torch.equal(ended.weights[name], ended_again.weights[name]) for name in ended.weights)


def test_an_evaluation_that_lacks_what_its_task_declares_is_a_fault(tmp_path: Path) -> None:
    class Forgetful(ToyTask):
        evaluated = ("error", "percentile")

    with pytest.raises(RuntimeError, match=r"evaluates \['percentile'\], and did not"):
        toy_run(tmp_path, Forgetful(), evaluation=[toy_samples(torch.arange(4))])


def test_a_finished_run_only_gives_its_weights_and_metrics_again(tmp_path: Path) -> None:
    _, ended = toy_run(tmp_path)
    rows, again = toy_run(tmp_path)
    assert not rows
    assert again.metrics == ended.metrics
    assert again.metrics["loss"] > 0
    assert all(torch.equal(ended.weights[name], again.weights[name]) for name in ended.weights)


def test_micro_batches_add_up_to_the_batch(tmp_path: Path) -> None:
    whole, _ = toy_run(tmp_path / "whole", micro_batch=8)
    split, _ = toy_run(tmp_path / "split", micro_batch=2)
    assert split.losses == pytest.approx(whole.losses, rel=1e-5)


def test_the_exported_weights_are_the_moving_average(tmp_path: Path) -> None:
    _, raw = toy_run(tmp_path / "raw", ema=0.0)
    _, averaged = toy_run(tmp_path / "averaged", ema=0.99)
    # Same training; only what is handed over differs.
    last = FolderCheckpoints(Location.parse(tmp_path / "averaged")).latest()
    assert last is not None
    engine = last.engines["model"]
    assert torch.equal(engine["parameter.layers.0.weight"], raw.weights["layers.0.weight"])
    assert torch.equal(engine["average.layers.0.weight"], averaged.weights["layers.0.weight"])
    assert not torch.equal(raw.weights["layers.0.weight"], averaged.weights["layers.0.weight"])


def test_evaluation_leaves_no_trace_in_training(tmp_path: Path) -> None:
    plain, _ = toy_run(tmp_path / "plain", ToyTask(dropout=0.3))
    held_out = [toy_samples(torch.arange(1000, 1008))]
    looked, _ = toy_run(tmp_path / "looked", ToyTask(dropout=0.3), evaluation=held_out, eval_every=4)
    assert looked.losses == plain.losses
    assert [row["step"] for row in looked if row["split"] == "eval"] == [4, 8, 12]
    assert all(row["error"] > 0 for row in looked if row["split"] == "eval")


def test_a_non_finite_loss_is_skipped_and_counted(tmp_path: Path) -> None:
    rows, trained = toy_run(tmp_path, ToyTask(poison=(3, 7)), micro_batch=8)
    assert rows[-1]["skipped"] == 2
    assert all(torch.isfinite(value).all() for value in trained.weights.values())
    assert len(rows) == 12


def test_non_finite_losses_in_a_row_stop_the_run_and_keep_the_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="5 losses or gradients in a row were not finite, the last at step 11"
    ):
        toy_run(tmp_path, ToyTask(poison=tuple(range(7, 20))), micro_batch=8, max_skipped=5, steps=20)
    last = FolderCheckpoints(Location.parse(tmp_path)).latest()
    assert last is not None
    assert last.step == 6
    assert all(torch.isfinite(value).all() for value in last.engines["model"].values())


def test_a_non_finite_gradient_is_skipped_and_counted(tmp_path: Path) -> None:
    rows, trained = toy_run(tmp_path, ToyTask(steep=(3, 7)))
    assert [row["skipped"] for row in rows] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2]
    assert all(torch.isfinite(value).all() for value in trained.weights.values())


def test_a_discriminators_non_finite_gradient_skips_its_update_alone(tmp_path: Path) -> None:
    task = ToyTask(adversarial=True, steep=(4,), steep_engine="discriminator")
    rows, _ = toy_run(tmp_path, task)
    assert rows[-1]["skipped"] == 1
    last = FolderCheckpoints(Location.parse(tmp_path)).latest()
    assert last is not None
    assert int(last.engines["model"]["updates"]) == 12
    assert int(last.engines["discriminator"]["updates"]) == 5
    assert all(value.isfinite().all() for value in last.engines["discriminator"].values())


@pytest.mark.parametrize("stage", [0, 1])
def test_non_finite_gradients_in_a_row_stop_the_run(tmp_path: Path, stage: int) -> None:
    with pytest.raises(UserError, match="3 losses or gradients in a row were not finite, the last at step 9"):
        toy_run(tmp_path, ToyTask(steep=tuple(range(7, 20))), max_skipped=3, steps=20, zero_stage=stage)
    last = FolderCheckpoints(Location.parse(tmp_path)).latest()
    assert last is not None
    assert last.step == 6


def test_weights_that_are_not_finite_are_never_kept(tmp_path: Path) -> None:
    class Breaking(ToyTask):
        def losses(self, modules, batch, step):
            yield from super().losses(modules, batch, step)
            if step == 1:
                modules["model"].layers[0].bias.data[0] = torch.inf

    with pytest.raises(UserError, match="training diverged: the weights are not finite after step 2"):
        toy_run(tmp_path, Breaking(), checkpoint_every=1)
    last = FolderCheckpoints(Location.parse(tmp_path)).latest()
    assert last is not None
    assert last.step == 1


def test_waiting_for_a_loss_counts_as_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(run: _Run, finite: torch.Tensor) -> bool:
        time.sleep(0.05)
        return bool(finite)

    monkeypatch.setattr(_Run, "_everywhere", slow)
    rows, _ = toy_run(tmp_path, steps=2, micro_batch=8)
    assert all(row["time_forward"] * 8 / row["clips_per_second"] > 0.05 for row in rows)


def test_a_part_of_a_step_is_timed_with_the_devices_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: time.sleep(0.05))
    curves = Curves(World(0, 1, torch.device("cuda")), [], 0, 0, 1, {})
    with curves.timed("backward"):
        pass
    assert curves._seconds["backward"] >= 0.05


@pytest.mark.parametrize(("major", "expected"), [(7, False), (8, True)])
def test_a_gpu_that_only_emulates_bfloat16_computes_in_fp32(
    monkeypatch: pytest.MonkeyPatch, major: int, expected: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = SimpleNamespace(major=major)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    assert has_bf16(torch.device("cuda")) is expected
    assert not has_bf16(torch.device("cpu"))


@pytest.mark.parametrize("keep_by", ["eval_psnr", "best loss", "max eval psnr"])
def test_an_order_of_checkpoints_that_says_nothing_is_refused(keep_by: str) -> None:
    with pytest.raises(ValidationError, match="keep_by"):
        toy_config(keep_by=keep_by)


def test_a_stream_out_of_order_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"takes clips from position 0 on and was given 8 to"):
        train(
            ToyTask(),
            toy_config(),
            lambda start: toy_batches(8, 2)(start + 8),
            seed=0,
            checkpoints=FolderCheckpoints(Location.parse(tmp_path)),
        )


@pytest.mark.parametrize(
    ("changes", "workers", "message"),
    [
        ({"global_batch": 9}, 2, "train.global_batch: 9 clips cannot be split evenly over 2 workers"),
        (
            {"micro_batch": 3},
            2,
            "train.micro_batch: 3 does not divide a worker's share of the batch, which is 4",
        ),
        ({"warmup": 12}, 2, "train.warmup: 12 must be less than steps, which is 12"),
        ({"optimizer": "muon", "zero_stage": 2}, 1, "train.optimizer: muon .* ZeRO stage 2 cuts up"),
        ({"final_lr": 0.5}, 2, "train.final_lr: 0.5 must not exceed lr, which is 0.01"),
    ],
)
def test_a_config_that_cannot_work_is_refused_before_anything_starts(
    changes: dict[str, Any], workers: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        toy_config(**changes).check(workers)
