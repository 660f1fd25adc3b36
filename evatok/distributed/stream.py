"""The order as a Ray dataset: what stands at each global sample position, fetched in tasks, in order.

Three things keep the order free of the number of workers. The blocks are equal, so that a split over workers
deals them out in turn; the rows of a block depend on its positions alone; and the execution preserves order.
Whoever splits the dataset must ask for `preserve_order` without locality, as `evatok.distributed.train` does.
"""

from __future__ import annotations

import faulthandler
import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from evatok.video.decode import STORAGE_PATIENCE, ClipFormat, DecodeError, StorageError, decode_clip
from evatok.video.guard import GRACE, Guard
from evatok.video.index import PREPARED, ClipIndex
from evatok.video.order import Order
from evatok.video.prepared import DamagedError, PreparedClips

Columns = dict[str, NDArray[np.generic]]
Fetch = Callable[[NDArray[np.int64], NDArray[np.int64]], Columns]

log = logging.getLogger(__name__)

TASK_CPUS = 0.5
"""Logical CPUs that a task holds: two to a core, so that one computes while the next is handed out."""

_BLOCK_ROWS = 48
_POSITIONS_PER_EXECUTION = 1 << 18
_POSITIONS_PER_READ = 1 << 16
_VIDEOS_TRIED = 16  # that may fail one after another before the stream gives up
_ROWS_AHEAD = 256  # looked at together for the next video


def ordered_stream(
    order: Order,
    fetch: Fetch,
    *,
    start: int,
    count: int,
    rows_per_block: int,
    workers: int = 1,
    batch: int | None = None,
    num_cpus: float = TASK_CPUS,
    label_selector: dict[str, str] | None = None,
    name: str = "positions",
) -> ray.data.Dataset:
    """The positions start, ..., start + count - 1 of `order` as rows, fetched lazily by tasks.

    `fetch(positions [n], rows [n])` runs in a task for every block of exactly `rows_per_block` positions (the
    last may be shorter) and returns columns of n values each, to which `position` int64 is added. It must be
    picklable and depend on its arguments alone. `num_cpus`: logical CPUs that a task holds. `label_selector`:
    labels of the nodes that may run the tasks. `name`: of the dataset on the dashboard and in metrics.

    With `batch`, a divisor of `rows_per_block`, blocks hold several batches of one worker each: when the
    blocks are dealt to `workers` in turn, the n-th batch of worker w is the n * workers + w-th of the order,
    just as if every block were one batch. `count` is then a multiple of `workers * rows_per_block`.

    One iteration ends after 2**18 positions or so; the next one goes on from there.
    """
    dealing = Dealing(workers, batch or rows_per_block, rows_per_block)
    if dealing.batches > 1 and count % dealing.span:
        raise ValueError(f"{count} positions are not whole rounds of {dealing.span}")
    source = _Positions(start, count, dealing)
    positions = ray.data.read_datasource(source, override_num_blocks=source.reads)
    # The context is the dataset's own: nobody else's executions change. A consumer may be slow for as long
    # as it likes: an evaluation, an upload or a debugger is no failure of the stream.
    positions.context.execution_no_progress_timeout_s = -1
    positions.context.execution_options.preserve_order = True
    dataset = positions.repartition(target_num_rows_per_block=rows_per_block, strict=True).map_batches(
        _fetched,
        fn_kwargs={"order": order, "fetch": fetch},
        batch_size=None,
        num_cpus=num_cpus,
        label_selector=label_selector,
    )
    dataset.set_name(name)
    return dataset


def clip_stream(
    index: ClipIndex,
    order: Order,
    clip_format: ClipFormat,
    *,
    start: int,
    count: int,
    rows_per_block: int,
    seed: int,
    workers: int = 1,
    batch: int | None = None,
    labels: Sequence[str] | None = None,
    num_cpus: float = TASK_CPUS,
    label_selector: dict[str, str] | None = None,
) -> ray.data.Dataset:
    """The clips at the positions start, ..., start + count - 1 of `order` over `index`, decoded in tasks.

    Rows: clip uint8 [C, F, H, W]; position int64; row int64, of the whole index; replaced bool; still bool:
    an image, held for the whole clip; with `labels` also label int64, the label's place in that list or -1.
    A clip that cannot be decoded is replaced by the next clip of another video in the index (`row` is then
    that one's, and `replaced` is true), as what spoils one clip of a file often spoils them all; an image by
    an image. The sampling rate and the limits are the index's. Random crops and flips follow from (`seed`,
    position). Prepared clips are used where there are and whole.
    """
    if order.clips != len(index):
        raise ValueError(f"an order of {order.clips} clips for an index of {len(index)}")
    fetch = ClipFetch(index, clip_format, seed, tuple(labels) if labels is not None else None)
    return ordered_stream(
        order,
        fetch,
        start=start,
        count=count,
        rows_per_block=rows_per_block,
        workers=workers,
        batch=batch,
        num_cpus=num_cpus,
        label_selector=label_selector,
        name="clips",
    )


def large_blocks(count: int, workers: int, batch: int) -> dict[str, Any]:
    """What to ask `ordered_stream` for so that tasks are long against what they cost Ray.

    `count` is rounded up to whole rounds: who takes batches stops when it has enough.
    """
    rows = batch * max(1, min(_BLOCK_ROWS, count // workers) // batch)
    span = workers * rows
    return {"count": -(-count // span) * span, "rows_per_block": rows, "workers": workers, "batch": batch}


def reading_rate(dataset: ray.data.Dataset, batch: int, warm_up: int) -> tuple[float, float]:
    """Clips per second into a worker that takes batches as training does, and seconds to its first batch.

    The clock starts after `warm_up` clips.
    """
    (shard,) = dataset.streaming_split(1, equal=True)
    worker = ray.remote(num_cpus=0)(_Reader).remote()
    rate, first = ray.get(worker.read.remote(shard, batch, warm_up))
    ray.kill(worker)
    return rate, first


class _Reader:
    def read(self, shard: ray.data.DataIterator, batch: int, warm_up: int) -> tuple[float, float]:
        created = now = time.perf_counter()
        first = started = 0.0
        read = timed = 0
        for columns in shard.iter_torch_batches(batch_size=batch, device="cpu", prefetch_batches=2):
            now = time.perf_counter()
            clips = len(columns["position"])
            first = first or now - created
            timed += clips if started else 0
            read += clips
            if not started and read >= warm_up:
                started = now
        return timed / (now - started), first


@dataclass(frozen=True)
class Dealing:
    """Blocks of `rows` rows for `workers` that take them in turn, `rows / batch` batches of one each."""

    workers: int
    batch: int
    rows: int

    @property
    def batches(self) -> int:
        return self.rows // self.batch

    @property
    def span(self) -> int:
        """Positions that one round of blocks, one for every worker, takes up."""
        return self.workers * self.rows

    def places(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """What stands in these rows of the dataset: places in the order, int64 like the slots."""
        round_, slot = np.divmod(slots, self.span)
        worker, slot = np.divmod(slot, self.rows)
        number, within = np.divmod(slot, self.batch)
        places: NDArray[np.int64] = (
            round_ * self.span + (number * self.workers + worker) * self.batch + within
        )
        return places


class _Positions(Datasource):  # type: ignore[misc]
    """The positions themselves, a stretch of them with every execution of the dataset.

    Ray Data would cut a long run into millions of small blocks before the first clip is decoded: nothing
    holds back an operator whose output weighs nothing.
    """

    def __init__(self, start: int, count: int, dealing: Dealing) -> None:
        super().__init__()
        self._start, self._count, self._dealing = start, count, dealing
        self._per_execution = max(1, _POSITIONS_PER_EXECUTION // dealing.span) * dealing.span
        self.reads = max(1, min(count, self._per_execution) // _POSITIONS_PER_READ)

    def estimate_inmemory_data_size(self) -> int:
        return 8 * min(self._count, self._per_execution)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        execution = data_context._execution_idx if data_context is not None else 0
        low = execution * self._per_execution
        high = min(low + self._per_execution, self._count)
        return [
            _read_task(self._start, first, min(first + _POSITIONS_PER_READ, high), self._dealing)
            for first in range(low, high, _POSITIONS_PER_READ)
        ]


def _read_task(start: int, low: int, high: int, dealing: Dealing) -> ReadTask:
    metadata = BlockMetadata(
        num_rows=high - low, size_bytes=8 * (high - low), input_files=None, exec_stats=None
    )
    return ReadTask(
        lambda: [pa.table({"position": start + dealing.places(np.arange(low, high, dtype=np.int64))})],
        metadata,
    )


def _fetched(batch: Columns, order: Order, fetch: Fetch) -> Columns:
    positions = np.asarray(batch["position"], np.int64)
    stretches = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)
    rows = np.concatenate([order.rows(int(stretch[0]), len(stretch)) for stretch in stretches])
    return {**fetch(positions, rows), "position": positions}


@dataclass(frozen=True)
class ClipFetch:
    """Decodes the clips of a block. `labels`: their order gives the numbers of the column `label`."""

    index: ClipIndex
    clip_format: ClipFormat
    seed: int
    labels: tuple[str, ...] | None = None
    decode: Callable[..., NDArray[np.uint8]] = decode_clip

    def __call__(self, positions: NDArray[np.int64], clips: NDArray[np.int64]) -> Columns:
        size, frames = self.clip_format.size, self.clip_format.frames
        pixels = np.empty((len(clips), 3, frames, size, size), np.uint8)
        columns = ("uri", "start", "fps", "frames", *(["label"] if self.labels is not None else []))
        used = self.index.take(clips, columns).to_pylist()
        replaced = np.zeros(len(clips), bool)
        bad = self.index.known_bad()
        prepared = PreparedClips.open(self.index.location / PREPARED)
        if prepared is not None and not prepared.serve(self.clip_format):
            prepared = None
        with self._decoder() as decode:
            for k, position in enumerate(positions):
                for clip in self._candidates(int(clips[k]), used[k]):
                    if clip != clips[k]:
                        (used[k],) = self.index.take(np.asarray([clip]), columns).to_pylist()
                        replaced[k] = True
                    if used[k]["row"] in bad:
                        continue
                    try:
                        _patiently(self._clip, decode, prepared, used[k], int(position), pixels[k])
                        break
                    except (DecodeError, StorageError) as error:
                        log.warning(
                            "clip %d at %.3f s is replaced: %s", used[k]["row"], used[k]["start"], error
                        )
                        if isinstance(error, DecodeError):
                            self.index.report(used[k]["row"], error)
                else:
                    raise RuntimeError(
                        f"Clips of up to {_VIDEOS_TRIED} videos in a row cannot be decoded, the last is of "
                        f"{used[k]['uri']}. Was the data moved or deleted since it was indexed?"
                    )
        found: Columns = {
            "clip": pixels,
            "row": np.asarray([clip["row"] for clip in used], np.int64),
            "replaced": replaced,
            "still": np.asarray([self.clip_format.of(clip).still for clip in used]),
        }
        if self.labels is not None:
            places = {label: place for place, label in enumerate(self.labels)}
            found["label"] = np.asarray([places.get(clip["label"], -1) for clip in used], np.int64)
        return found

    def _candidates(self, clip: int, row: dict[str, Any]) -> Iterator[int]:
        """The clip, then the first one of each other video after it in the index; for an image, images."""
        yield clip
        tried = {row["uri"]}
        for low in range(clip + 1, clip + len(self.index), _ROWS_AHEAD):
            ahead = np.arange(low, min(low + _ROWS_AHEAD, clip + len(self.index))) % len(self.index)
            for other, found in zip(ahead, self.index.take(ahead, ("uri", "frames")).to_pylist()):
                if len(tried) == _VIDEOS_TRIED:
                    return
                if found["uri"] not in tried and found["frames"] == row["frames"]:
                    tried.add(found["uri"])
                    yield int(other)

    @contextmanager
    def _decoder(self) -> Iterator[Callable[..., Any]]:
        """The decoder; in a child process when an earlier attempt at this task took its process down.

        The process dies of a codec that crashes, and of one that hangs, as its own time limit cannot
        interrupt it. Ray repeats such a task without limit. The child finds out which clip it was; only that
        one is lost.
        """
        limit = self.index.limits.time_limit
        attempt = _attempt()
        if not attempt:
            yield self.decode if attempt is None else functools.partial(_or_die, limit + GRACE, self.decode)
            return
        with Guard(limit) as guard:

            def guarded(*arguments: Any, out: NDArray[np.uint8]) -> None:
                out[:] = guard(self.decode, *arguments)

            yield guarded

    def _clip(
        self,
        decode: Callable[..., Any],
        prepared: PreparedClips | None,
        clip: dict[str, Any],
        position: int,
        out: NDArray[np.uint8],
    ) -> None:
        clip_format = self.clip_format.of(clip)
        draw = np.random.default_rng((self.seed % 2**64, position))
        if prepared is not None:
            try:
                pixels = prepared.clip(clip["row"])
            except DamagedError as error:
                log.warning("decoding clip %d itself: %s", clip["row"], error)
            else:
                out[:] = pixels[..., ::-1] if clip_format.drawn(draw)[1] else pixels
                return
        decode(clip["uri"], clip["start"], clip_format, draw, self.index.limits, out=out)


def _patiently(work: Callable[..., None], *arguments: Any) -> None:
    """Do it, again where a storage fails that may only be busy."""
    for seconds in STORAGE_PATIENCE:
        try:
            return work(*arguments)
        except StorageError as error:
            log.warning("trying again in %g s: %s", seconds, error)
            time.sleep(seconds)
    return work(*arguments)


def _or_die(seconds: float, work: Callable[..., object], *arguments: Any, **options: Any) -> None:
    """Do it, and end this process, whatever it is doing, where that takes longer."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        work(*arguments, **options)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _attempt() -> int | None:
    """How often this task was started before, because its worker died; None outside of tasks."""
    worker = ray._private.worker.global_worker
    if worker.mode != ray.WORKER_MODE:
        return None
    return int(worker.core_worker.get_current_task_attempt_number())
