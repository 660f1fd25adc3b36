"""Ray Train around the training loop: workers, the clip stream, checkpoints on storage, restarts."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
import ray.train
import torch
from ray.data import Dataset, ExecutionOptions
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from evatok.artifacts import CurveWriter, Location
from evatok.errors import UserError
from evatok.training.checkpoint import TrainState
from evatok.training.loop import TrainConfig, train
from evatok.training.tasks import Batch, Task

CHECKPOINTS = "checkpoints"
MODEL = "model"


class Stream(Protocol):
    """Clips at the global sample positions from ``start`` to ``start + count`` in order, as a dataset.

    ``rows_per_block`` must be kept to: equal blocks are what makes the order survive the split over workers.
    """

    def __call__(self, *, start: int, count: int, rows_per_block: int) -> Dataset: ...


def fit(
    task: Task,
    config: TrainConfig,
    stream: Stream,
    *,
    location: Location,
    run_id: str,
    seed: int,
    workers: int,
    cpus_per_worker: float = 1,
    use_gpu: bool = False,
    max_failures: int = 3,
) -> dict[str, float]:
    """Train ``task`` on Ray workers and leave ``model/`` and ``curves/`` in ``location``.

    ``run_id`` is one word that is the same for every attempt at this training and for no other one: a driver
    that was killed goes on from the newest checkpoint when it is called again with it. A worker that dies is
    replaced up to ``max_failures`` times (a preempted one without limit), and the stream is then made anew
    from the clips that the newest checkpoint has seen.
    Returns the last metrics. Raises UserError for what is the user's to mend (a diverged loss among it).
    """
    config.check(workers)
    storage = location / CHECKPOINTS
    storage.fs.create_dir(storage.path, recursive=True)
    trainer = TorchTrainer(
        _work,
        train_loop_config={
            "task": task,
            "config": config,
            "location": location,
            "seed": seed,
            "threads": max(1, int(cpus_per_worker)),
        },
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cpus_per_worker} | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=RunConfig(
            name=run_id,
            storage_path=storage.path,
            storage_filesystem=storage.fs,
            checkpoint_config=CheckpointConfig(num_to_keep=config.keep_checkpoints),
            failure_config=FailureConfig(max_failures=max_failures),
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        # Called by the controller whenever a group of workers starts, so every attempt gets its own stream.
        datasets={"train": lambda: _remaining(stream, config, workers, storage / run_id)},
        dataset_config=ray.train.DataConfig(
            execution_options=ExecutionOptions(preserve_order=True), enable_shard_locality=False
        ),
    )
    outcome = trainer.fit().return_value
    if "error" in outcome:
        raise UserError(outcome["error"])
    return dict(outcome["metrics"])


def _remaining(stream: Stream, config: TrainConfig, workers: int, run: Location) -> Dataset:
    seen = _samples_seen(run)
    # Rows are only asked for as training goes; one block more than needed would be decoded for nothing.
    dataset = stream(
        start=seen,
        count=max(config.global_batch, config.steps * config.global_batch - seen),
        rows_per_block=config.micro(workers),
    )
    # A long evaluation or upload is no failure of the stream.
    dataset.context.execution_no_progress_timeout_s = -1
    return dataset


def _samples_seen(run: Location) -> int:
    """Clips that the newest reported checkpoint has seen: the one ``ray.train.get_checkpoint`` will give."""
    try:
        newest = ray.train.Result.from_path(run.path, storage_filesystem=run.fs)
    except RuntimeError:  # nothing was reported yet
        return 0
    return int(newest.metrics["samples"]) if newest.metrics else 0


def _work(settings: dict[str, Any]) -> dict[str, Any]:
    """The training function of one worker. What the user must mend is returned: Ray would retry an error."""
    task, config, location = settings["task"], settings["config"], settings["location"]
    rank = ray.train.get_context().get_world_rank()
    torch.set_num_threads(settings["threads"])
    try:
        trained = train(
            task,
            config,
            _ShardBatches(config),
            seed=settings["seed"],
            checkpoints=_ReportedCheckpoints(),
            sinks=[CurveWriter(location)] if rank == 0 else [],
        )
    except UserError as error:
        return {"error": str(error)}
    if rank == 0:
        with tempfile.TemporaryDirectory() as folder:
            task.export(trained.weights, Path(folder))
            location.upload(folder, MODEL)
    return {"metrics": dict(trained.metrics)}


@dataclass(frozen=True)
class _ShardBatches:
    """This worker's share of the stream, which begins where the newest checkpoint ends."""

    config: TrainConfig

    def __call__(self, start: int) -> Iterator[Batch]:
        workers = ray.train.get_context().get_world_size()
        shard = ray.train.get_dataset_shard("train")
        return iter(
            shard.iter_torch_batches(
                batch_size=self.config.micro(workers), drop_last=True, device="cpu", prefetch_batches=2
            )
        )


class _ReportedCheckpoints:
    """Checkpoints that Ray Train keeps: written by rank 0, uploaded while training goes on."""

    def latest(self) -> TrainState | None:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as folder:
            return TrainState.load(Path(folder))

    def save(self, state: TrainState | None, metrics: Mapping[str, float]) -> None:
        checkpoint = None
        if state is not None:
            folder = tempfile.mkdtemp(prefix="evatok-checkpoint-")  # Ray deletes it after the upload
            state.save(Path(folder))
            checkpoint = Checkpoint.from_directory(folder)
        ray.train.report(
            dict(metrics),
            checkpoint=checkpoint,
            checkpoint_dir_name=f"step-{int(metrics['step']):09d}",
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        )
