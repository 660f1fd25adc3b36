"""Ray Train around the training loop: workers, the clip stream, checkpoints on storage, restarts."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
import ray.train
import torch
from ray.data import DataIterator, Dataset, ExecutionOptions
from ray.exceptions import RayActorError
from ray.train import Checkpoint, CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from evatok.artifacts import CurveWriter, Location
from evatok.distributed.logs import rank_log
from evatok.distributed.metrics import TrainingMetrics
from evatok.distributed.stream import large_blocks
from evatok.errors import UserError
from evatok.training.checkpoint import FolderCheckpoints, TrainState
from evatok.training.curves import ROW_KEYS, Sink
from evatok.training.loop import TrainConfig, Trained, train
from evatok.training.tasks import Batch, Task
from evatok.training.tracking import trackers

CHECKPOINTS = "checkpoints"
MODEL = "model"
TRAIN, EVALUATION = "train", "evaluation"


class Stream(Protocol):
    """Samples at the global positions from ``start`` to ``start + count``, in order, as a dataset.

    The blocks must be as asked, see ``ordered_stream``: that makes the order survive the split over workers.
    """

    def __call__(
        self, *, start: int, count: int, rows_per_block: int, workers: int, batch: int
    ) -> Dataset: ...


Listener = Callable[[int, int, Mapping[str, float]], None]
"""Called on the driver with (steps done, steps in all, newest figures)."""


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
    label_selector: dict[str, str] | None = None,
    evaluation: Callable[[], Dataset] | None = None,
    listener: Listener | None = None,
    max_failures: int = 3,
) -> dict[str, float]:
    """Train ``task`` on Ray workers and leave ``model/``, ``curves/`` and ``logs/`` in ``location``.

    ``run_id`` is one word that is the same for every attempt at this training and for no other one: a driver
    that was killed goes on from the newest checkpoint when it is called again with it. A worker that dies is
    replaced up to ``max_failures`` times (a preempted one without limit), and the stream is then made anew
    from the samples that the newest checkpoint has seen.
    ``workers`` 0 trains in this process, without actors of Ray Train and without retries.
    ``label_selector``: labels of the nodes that workers may run on.
    ``evaluation``: held-out samples, few: each worker keeps its share in memory, so that an evaluation never
    waits for a stream nor holds one up.
    Returns the last metrics. Raises UserError for what is the user's to mend (a diverged loss among it).
    """
    config.check(max(1, workers))
    # A node may have to boot first, or the machine be busy; Ray would give up on the group after a minute.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "900")
    job = _Job(task, config, location, run_id, seed, max(1, int(cpus_per_worker)), use_gpu)
    storage = location / CHECKPOINTS
    if workers == 0:
        return _fit_here(job, stream, evaluation, storage / run_id, listener)
    storage.fs.create_dir(storage.path, recursive=True)
    # Called by the controller whenever a group of workers starts, so every attempt gets its own stream.
    datasets = {TRAIN: lambda: _remaining(stream, config, workers, _samples_seen(storage / run_id))}
    if evaluation:
        datasets[EVALUATION] = evaluation
    with _heard(listener, config.steps) as queue:
        trainer = TorchTrainer(
            _work,
            train_loop_config={"job": job, "queue": queue, "evaluate": evaluation is not None},
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=use_gpu,
                label_selector=label_selector,
                resources_per_worker={"CPU": cpus_per_worker} | ({"GPU": 1} if use_gpu else {}),
            ),
            run_config=RunConfig(
                name=run_id,
                storage_path=storage.path,
                storage_filesystem=storage.fs,
                checkpoint_config=_kept(config),
                failure_config=FailureConfig(max_failures=max_failures),
            ),
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            datasets=datasets,
            dataset_config=DataConfig(
                execution_options=ExecutionOptions(preserve_order=True), enable_shard_locality=False
            ),
        )
        outcome = trainer.fit().return_value
    if "error" in outcome:
        raise UserError(outcome["error"])
    return dict(outcome["metrics"])


def _kept(config: TrainConfig) -> CheckpointConfig:
    if not config.keep_by:
        return CheckpointConfig(num_to_keep=config.keep_checkpoints)
    order, metric = config.keep_by.split()
    return CheckpointConfig(
        num_to_keep=config.keep_checkpoints, checkpoint_score_attribute=metric, checkpoint_score_order=order
    )


@dataclass(frozen=True)
class _Job:
    """What a worker is told."""

    task: Task
    config: TrainConfig
    location: Location
    run_id: str
    seed: int
    threads: int
    use_gpu: bool

    @contextmanager
    def sinks(self) -> Iterator[list[Sink]]:
        with trackers(self.config.trackers, self.location, self.run_id) as tracking:
            yield [CurveWriter(self.location), TrainingMetrics(self.run_id), *tracking]

    def batches(self, dataset: DataIterator | Dataset, size: int) -> Iterator[Batch]:
        yield from dataset.iter_torch_batches(
            batch_size=size, collate_fn=self.task.collate, prefetch_batches=2
        )

    def endless_batches(self, dataset: DataIterator | Dataset, size: int) -> Iterator[Batch]:
        """The stream in as many executions as it takes: the next one goes on where one ends."""
        while True:
            batch = None
            for batch in self.batches(dataset, size):
                yield batch
            if batch is None:
                return


def _remaining(stream: Stream, config: TrainConfig, workers: int, seen: int) -> Dataset:
    # At least one step's worth, because Ray refuses an empty dataset; nothing of it runs unless asked for.
    count = max(config.global_batch, config.steps * config.global_batch - seen)
    dataset = stream(start=seen, **large_blocks(count, workers, config.micro(workers)))
    dataset.context.enable_progress_bars = False
    return dataset


def _samples_seen(run: Location) -> int:
    """Samples that the newest reported checkpoint has seen: the one ``ray.train.get_checkpoint`` gives."""
    try:
        newest = ray.train.Result.from_path(run.path, storage_filesystem=run.fs)
    except RuntimeError:  # nothing was reported yet
        return 0
    return int(newest.metrics["samples"]) if newest.metrics else 0


def _work(settings: dict[str, Any]) -> dict[str, Any]:
    """The training function of one worker. What the user must mend is returned: Ray would retry an error."""
    job: _Job = settings["job"]
    context = ray.train.get_context()
    first = context.get_world_rank() == 0
    micro = job.config.micro(context.get_world_size())
    torch.set_num_threads(job.threads)
    held_out = []
    if settings["evaluate"]:
        held_out = list(job.batches(ray.train.get_dataset_shard(EVALUATION), micro))
    try:
        watched: AbstractContextManager[list[Sink]] = job.sinks() if first else nullcontext([])
        with rank_log(job.location, context.get_world_rank()) as publish, watched as sinks:
            if first and settings["queue"] is not None:  # an empty queue is false
                sinks.append(_QueueSink(settings["queue"]))
            trained = train(
                job.task,
                job.config,
                lambda start: job.endless_batches(ray.train.get_dataset_shard(TRAIN), micro),
                seed=job.seed,
                checkpoints=_ReportedCheckpoints(publish),
                sinks=sinks,
                evaluation=held_out,
                use_gpu=job.use_gpu,
            )
        if first:
            _publish(job, trained)
    except UserError as error:
        return {"error": str(error)}
    return {"metrics": dict(trained.metrics)}


def _fit_here(
    job: _Job,
    stream: Stream,
    evaluation: Callable[[], Dataset] | None,
    run: Location,
    listener: Listener | None,
) -> dict[str, float]:
    config, micro = job.config, job.config.micro(1)
    with rank_log(job.location, 0), job.sinks() as sinks:
        if listener:
            sinks.append(_ListenerSink(listener, config.steps))
        trained = train(
            job.task,
            config,
            lambda start: job.endless_batches(_remaining(stream, config, 1, start), micro),
            seed=job.seed,
            checkpoints=FolderCheckpoints(run, config.keep_checkpoints),
            sinks=sinks,
            evaluation=list(job.batches(evaluation(), micro)) if evaluation else [],
            use_gpu=job.use_gpu,
        )
    _publish(job, trained)
    return dict(trained.metrics)


def _publish(job: _Job, trained: Trained) -> None:
    with tempfile.TemporaryDirectory() as folder:
        job.task.export(trained.weights, Path(folder))
        job.location.upload(folder, MODEL)


@dataclass
class _ListenerSink:
    """Passes the newest figures on; those of an evaluation as ``eval_NAME``."""

    listener: Listener
    steps: int

    def write(self, row: Mapping[str, Any]) -> None:
        prefix = "" if row["split"] == "train" else "eval_"
        figures = {prefix + name: v for name, v in row.items() if name not in ROW_KEYS}
        self.listener(row["step"], self.steps, figures)

    def flush(self) -> None:
        pass


@dataclass
class _QueueSink:
    """Progress for who watches: training goes on without it when the queue is lost."""

    queue: Queue

    def write(self, row: Mapping[str, Any]) -> None:
        with suppress(RayActorError):
            self.queue.put(dict(row))

    def flush(self) -> None:
        pass


@contextmanager
def _heard(listener: Listener | None, steps: int) -> Iterator[Queue | None]:
    """A queue for rank 0's rows; while the block runs a thread passes them to the listener."""
    if listener is None:
        yield None
        return
    # Beside the driver: on a preemptible node it would go before the training does.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    sink = _ListenerSink(listener, steps)

    def listen() -> None:
        with suppress(RayActorError):
            while (row := queue.get()) is not None:
                sink.write(row)

    thread = threading.Thread(target=listen, name="evatok-progress", daemon=True)
    thread.start()
    try:
        yield queue
        with suppress(RayActorError):
            queue.put(None)
        thread.join()
    finally:
        queue.shutdown()


@dataclass(frozen=True)
class _ReportedCheckpoints:
    """Checkpoints that Ray Train keeps: written by rank 0, uploaded while training goes on.

    ``publish``: called by every rank after each.
    """

    publish: Callable[[], None]

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
        self.publish()
