"""Ray Train around the loop: the same losses as one process, whatever dies on the way."""

import functools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.util.queue import Queue

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import toy

from evatok.artifacts import Location, read_curves
from evatok.distributed.stream import ordered_stream
from evatok.distributed.train import fit
from evatok.errors import UserError

ray.cloudpickle.register_pickle_by_value(toy)


def fetch(positions: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
    samples = toy.toy_samples(torch.from_numpy(positions))
    return {name: samples[name].numpy() for name in ("x", "y")}


def held_out() -> ray.data.Dataset:
    return ordered_stream(toy.ORDER, fetch, start=5000, count=8, rows_per_block=2, num_cpus=0.5)


def ray_run(folder: Path, task: toy.ToyTask, workers: int = 2, **options: Any) -> dict[str, float]:
    return fit(
        task,
        toy.toy_config(**options.pop("changes", {})),
        functools.partial(ordered_stream, toy.ORDER, fetch, num_cpus=0.5),
        location=Location.parse(folder),
        run_id="toy",
        seed=3,
        workers=workers,
        **options,
    )


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_curves(Location.parse(folder)) if row["split"] == "train"]


@pytest.fixture(scope="module")
def uninterrupted(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder, heard = tmp_path_factory.mktemp("whole"), []
    metrics = ray_run(folder, toy.ToyTask(), evaluation=held_out, listener=lambda *news: heard.append(news))
    return SimpleNamespace(folder=folder, metrics=metrics, heard=heard)


def test_two_ray_workers_have_the_losses_of_one_process(
    uninterrupted: SimpleNamespace, tmp_path: Path
) -> None:
    rows, _ = toy.toy_run(tmp_path)
    assert losses(uninterrupted.folder) == pytest.approx(rows.losses, rel=1e-5)


def test_a_finished_run_leaves_its_model_and_reports_its_last_metrics(uninterrupted: SimpleNamespace) -> None:
    assert (uninterrupted.folder / "model" / "weights.json").exists()
    assert uninterrupted.metrics["loss"] == losses(uninterrupted.folder)[-1]
    assert uninterrupted.metrics["eval_error"] > 0


def test_every_rank_leaves_a_log(uninterrupted: SimpleNamespace) -> None:
    for rank in range(2):
        text = (uninterrupted.folder / "logs" / f"rank-{rank:04d}.log").read_text()
        for line in (f"rank {rank} begins", "step 12/12: loss here", "checkpoint at step 6", "is done"):
            assert line in text


def test_the_driver_hears_of_every_point(uninterrupted: SimpleNamespace) -> None:
    steps = [done for done, total, figures in uninterrupted.heard if "loss" in figures]
    assert steps == list(range(1, 13))
    assert uninterrupted.heard[-1][2]["eval_error"] == uninterrupted.metrics["eval_error"]


def test_a_killed_worker_changes_no_loss(uninterrupted: SimpleNamespace, tmp_path: Path) -> None:
    task = toy.ToyTask(die_at=8, marker=str(tmp_path / "killed"))
    ray_run(tmp_path / "run", task)
    assert (tmp_path / "killed").exists()
    assert losses(tmp_path / "run") == losses(uninterrupted.folder)


def test_a_driver_that_comes_back_goes_on_from_the_last_checkpoint(
    uninterrupted: SimpleNamespace, tmp_path: Path
) -> None:
    task = toy.ToyTask(die_at=8, marker=str(tmp_path / "killed"))
    with pytest.raises(ray.train.TrainingFailedError):
        ray_run(tmp_path / "run", task, max_failures=0)
    # The second attempt has another number of workers, too.
    ended = ray_run(tmp_path / "run", task, workers=1)
    assert losses(tmp_path / "run") == pytest.approx(losses(uninterrupted.folder), rel=1e-5)
    # A third that finds the training finished, as when the driver died before it wrote the manifest.
    assert ray_run(tmp_path / "run", task, workers=1) == ended


def test_progress_that_is_lost_ends_no_training(
    uninterrupted: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queues: list[Queue] = []

    def made(**options: Any) -> Queue:
        queues.append(Queue(**options))
        return queues[-1]

    def lose(*news: Any) -> None:
        ray.kill(queues[-1].actor)

    monkeypatch.setattr("evatok.distributed.train.Queue", made)
    ray_run(tmp_path, toy.ToyTask(), listener=lose, max_failures=0)
    assert losses(tmp_path) == losses(uninterrupted.folder)


def test_progress_comes_by_the_drivers_own_node(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def refused(actor_options: dict[str, Any]) -> Queue:
        asked.append(actor_options["scheduling_strategy"])
        raise RuntimeError("asked enough")

    monkeypatch.setattr("evatok.distributed.train.Queue", refused)
    with pytest.raises(RuntimeError, match="asked enough"):
        ray_run(tmp_path, toy.ToyTask(), listener=lambda *news: None)
    assert (asked[0].node_id, asked[0].soft) == (ray.get_runtime_context().get_node_id(), False)


def test_a_diverged_loss_is_told_to_the_user_and_not_retried(ray_cluster: str, tmp_path: Path) -> None:
    task = toy.ToyTask(poison=tuple(range(3, 12)))
    with pytest.raises(UserError, match="training diverged: 4 losses or gradients in a row"):
        ray_run(tmp_path, task, workers=1, changes={"max_skipped": 3})


def test_no_workers_train_in_this_process(ray_cluster: str, tmp_path: Path) -> None:
    heard: list[Any] = []
    metrics = ray_run(tmp_path / "here", toy.ToyTask(), workers=0, listener=lambda *news: heard.append(news))
    rows, _ = toy.toy_run(tmp_path / "bare")
    assert losses(tmp_path / "here") == rows.losses
    assert heard[-1][:2] == (12, 12)
    assert metrics["loss"] == rows.losses[-1]
    assert (tmp_path / "here" / "model" / "weights.json").exists()


@pytest.mark.parametrize("use_gpu", [False, True])
def test_training_takes_gpus_only_where_the_run_asks_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use_gpu: bool
) -> None:
    def asked(*args: Any, use_gpu: bool, **options: Any) -> Any:
        raise UserError(f"use_gpu {use_gpu}")

    monkeypatch.setattr("evatok.distributed.train.train", asked)
    with pytest.raises(UserError, match=f"use_gpu {use_gpu}"):
        ray_run(tmp_path, toy.ToyTask(), workers=0, use_gpu=use_gpu)
