"""Bounded fan-out of Ray tasks, each of which publishes its own shard.

A shard is one Parquet file, published whole or not at all by the task that computes it; the driver sees
small records only. What is on storage is the only memory of a fan-out: a rerun keeps the shards that are
whole and made from the same inputs, and makes the others. So a killed worker, node or driver costs the
shards in flight, and two drivers on one target share the work or, at worst, do some of it twice.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import random
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.exceptions import NodeDiedError, RayError

from evatok.artifacts import Location
from evatok.distributed import cluster
from evatok.distributed.schedule import Attempt, Schedule, Shard
from evatok.errors import UserError

log = logging.getLogger(__name__)

NOTE = b"evatok"  # key of our note in a shard's Parquet metadata
BLANK = b"digest-of-this-file-comes-here".ljust(64, b".")  # stands for the digest while it is computed
POLL_SECONDS = 0.5  # how often stragglers are looked for and progress is reported
RESIZE_SECONDS = 5.0  # how often the size of the cluster is asked for
HOPELESS = 5  # shards given up on after which the rest is not tried
STORAGE_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class ShardOutput:
    """What ``work`` returns: the shard's rows, and the items that could not be turned into rows.

    ``rejected``: one ``{"uri", "code", "detail"}`` each.
    """

    table: pa.Table
    rejected: Sequence[dict[str, str]] = ()


@dataclass(frozen=True)
class ShardRecord:
    """What a task tells the driver. ``seconds``: of computing and publishing, without building the state."""

    name: str
    items: int
    rows: int = 0
    rejected: tuple[dict[str, str], ...] = ()
    seconds: float = 0.0
    kept: bool = False
    failure: str = ""
    storage_full: bool = False
    passing: bool = False  # the failure: of a storage, a network or a limit of the machine
    user_error: str = ""


@dataclass(frozen=True)
class Progress:
    """How far a fan-out is. ``rate``: items per second of this driver; ``left``: seconds, estimated."""

    items: int
    total: int
    rate: float
    left: float
    retries: int
    rejected: int
    running: int


@dataclass(frozen=True)
class FanOutSummary:
    """A completed fan-out: every shard is on storage. ``copies``: second attempts at stragglers."""

    records: tuple[ShardRecord, ...]
    retries: int
    copies: int
    seconds: float

    @property
    def items(self) -> int:
        return sum(record.items for record in self.records)

    @property
    def rows(self) -> int:
        return sum(record.rows for record in self.records)

    @property
    def kept(self) -> int:
        """Items whose shard was there already."""
        return sum(record.items for record in self.records if record.kept)

    @property
    def busy(self) -> float:
        """Seconds of all tasks, added."""
        return sum(record.seconds for record in self.records)

    @property
    def rejected(self) -> list[dict[str, str]]:
        return [item for record in self.records for item in record.rejected]


class FanOutError(RuntimeError):
    """Some shards could not be made. Finished ones are kept and a rerun makes only the others."""


@dataclass(frozen=True)
class Job:
    """What all shards of a fan-out have in common; put into the object store once."""

    work: Callable[[Any, Any], ShardOutput]
    state: Callable[[], Any] | None
    target: Location
    key: str
    cpus: float = 1.0
    threads: int = 0


def fan_out(
    shards: Sequence[Shard],
    work: Callable[[Any, Any], ShardOutput],
    target: Location,
    *,
    key: str,
    state: Callable[[], Any] | None = None,
    cpus: float = 1.0,
    gpus: float = 0.0,
    threads: int = 0,
    label_selector: dict[str, str] | None = None,
    retries: int = 3,
    on_progress: Callable[[Progress], None] | None = None,
) -> FanOutSummary:
    """Publish every shard as ``target/<shard.name>``; needs a connected Ray.

    ``work(shard.spec, state)`` runs in a task that holds ``cpus`` and ``gpus`` (fractions allowed) on a node
    with the labels of ``label_selector``; it must be deterministic and importable on the workers. ``state``
    is called once per worker process; arrays inside it travel once per node. A process with a state computes
    with ``threads``, or with its share of its node's cores if that is 0. ``key`` identifies all that the
    rows depend on: a whole shard with the same key is kept, any other Parquet file in ``target``, a folder of
    this fan-out alone, is made again or removed.

    A task that fails is tried ``retries`` times more, after growing pauses if it was an OSError; one lost
    with its node is always tried again.
    Raises FanOutError when shards are missing at the end, at once when the storage is full, and the UserError
    that a task raised, at once.
    """
    started = time.monotonic()
    records = _keep_finished(shards, target, key)
    kept = sum(record.items for record in records)
    missing = {shard.name for shard in shards} - {record.name for record in records}
    schedule = Schedule(_shuffled([shard for shard in shards if shard.name in missing]), retries)
    total = sum(shard.items for shard in shards)
    handle = ray.put(Job(work, state, target, key, cpus, threads))
    # In a trial of Tune, tasks without a strategy could use only what the trial itself holds.
    task = ray.remote(
        num_cpus=cpus,
        num_gpus=gpus,
        label_selector=label_selector,
        scheduling_strategy="DEFAULT",
        max_retries=0,
        max_calls=0,
        name=f"{work.__module__.rpartition('.')[2]}:{work.__name__}",  # one per fan-out: Ray counts by it
    )(_run_shard)
    running: dict[ray.ObjectRef, Attempt] = {}
    failures: dict[str, str] = {}
    slots, resized, reported = _slots(cpus, gpus), started, 0.0

    def report() -> None:
        items = sum(record.items for record in records)
        elapsed = time.monotonic() - started
        rate = (items - kept) / elapsed
        left = (total - items) / rate if rate else float("inf")
        rejected = sum(len(record.rejected) for record in records)
        if on_progress:
            on_progress(Progress(items, total, rate, left, schedule.retried, rejected, len(running)))

    try:
        while schedule.open and len(failures) < HOPELESS:
            now = time.monotonic()
            if now - resized > RESIZE_SECONDS:
                slots, resized = _slots(cpus, gpus), now
            while attempt := schedule.start(now, slots):
                running[task.remote([handle], attempt.shard)] = attempt
            if not running:
                time.sleep(POLL_SECONDS)
            ready, _ = ray.wait(list(running), timeout=POLL_SECONDS)
            for ref in ready:
                attempt = running.pop(ref)
                record = _outcome(ref, attempt)
                if record is None:
                    schedule.lost(attempt)
                elif record.user_error:
                    raise UserError(record.user_error)
                elif record.storage_full:
                    raise FanOutError(_full(target, record, len(records), len(shards)))
                elif record.failure and schedule.failed(attempt, now if record.passing else None):
                    log.warning("shard %s failed, trying again: %s", record.name, _last_line(record.failure))
                elif record.failure:
                    log.error("shard %s given up:\n%s", record.name, record.failure)
                    failures[record.name] = record.failure
                elif schedule.done(attempt, record.seconds):
                    records.append(record)
                    for ref in [ref for ref, other in running.items() if other.shard is attempt.shard]:
                        ray.cancel(ref, force=True)
                        del running[ref]
            if time.monotonic() - reported > POLL_SECONDS:
                reported = time.monotonic()
                report()
    finally:
        for ref in running:
            ray.cancel(ref, force=True)
    report()
    if failures:
        raise FanOutError(_given_up(target, failures, len(records), len(shards)))
    return FanOutSummary(
        records=tuple(sorted(records, key=lambda record: record.name)),
        retries=schedule.retried,
        copies=schedule.copied,
        seconds=time.monotonic() - started,
    )


def make_shard(job: Job, state: Any, shard: Shard) -> ShardRecord:
    """Compute and publish one shard, unless another driver has by now. Errors end in the record."""
    started = time.monotonic()
    try:
        if record := read_record(job.target, shard, job.key):
            return record
        output = job.work(shard.spec, state)
        job.target.write_bytes(shard.name, _encode(output, shard, job.key))
    except UserError as error:
        return ShardRecord(shard.name, shard.items, user_error=str(error))
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in STORAGE_FULL
        return ShardRecord(
            shard.name,
            shard.items,
            failure=traceback.format_exc(),
            storage_full=full,
            passing=isinstance(error, OSError),
        )
    seconds = time.monotonic() - started
    return ShardRecord(shard.name, shard.items, output.table.num_rows, tuple(output.rejected), seconds)


def read_record(target: Location, shard: Shard, key: str) -> ShardRecord | None:
    """The record of a published shard; None when it is missing, damaged, or made for another key or plan."""
    try:
        data = target.read_bytes(shard.name)
    except FileNotFoundError:
        return None
    note = _note(data)
    if note is None:
        log.warning("shard %s/%s is damaged and will be made again", target.uri, shard.name)
        return None
    if (note["key"], note["items"]) != (key, shard.items):
        return None
    rows = pq.read_metadata(pa.BufferReader(data)).num_rows
    return ShardRecord(shard.name, shard.items, rows, tuple(note["rejected"]), kept=True)


def whole_shards(target: Location, key: str) -> list[pa.Table]:
    """The rows of every whole shard with this key in a folder, of whatever plan, in the order of names."""

    def read(name: str) -> pa.Table | None:
        data = target.read_bytes(name)
        note = _note(data)
        return pq.read_table(pa.BufferReader(data)) if note and note["key"] == key else None

    names = [name for name in target.list() if name.endswith(".parquet")]
    with ThreadPoolExecutor(max_workers=16) as pool:
        return [table for table in pool.map(read, names) if table is not None]


def _note(data: bytes) -> dict[str, Any] | None:
    """Our note in a shard; None when the shard is damaged."""
    try:
        note: dict[str, Any] = json.loads(pq.read_metadata(pa.BufferReader(data)).metadata[NOTE])
        whole = _digest(data.replace(note["digest"].encode(), BLANK)) == note["digest"]
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return note if whole else None


def _encode(output: ShardOutput, shard: Shard, key: str) -> bytes:
    """Parquet with our note in the footer: what the shard was made for, and a digest of the whole file."""
    note = {"key": key, "items": shard.items, "rejected": list(output.rejected), "digest": BLANK.decode()}
    sink = pa.BufferOutputStream()
    schema = output.table.schema
    texts = [field.name for field in schema if pa.types.is_string(field.type)]
    floats = [path for field in schema for path in _float_leaf(field)]
    with pq.ParquetWriter(
        sink, schema, compression="zstd", use_dictionary=texts, use_byte_stream_split=floats
    ) as writer:
        writer.write_table(output.table)
        writer.add_key_value_metadata({NOTE: json.dumps(note)})
    data = bytes(sink.getvalue().to_pybytes())
    return data.replace(BLANK, _digest(data).encode())


def _float_leaf(field: pa.Field) -> list[str]:
    """The Parquet path of a column of floats or of lists of floats; nothing for any other column."""
    path = field.name
    if pa.types.is_list(field.type) or pa.types.is_fixed_size_list(field.type):
        path, field = f"{path}.list.element", field.type.value_field
    return [path] if pa.types.is_floating(field.type) else []


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@functools.lru_cache(maxsize=1)
def _load(handle: ray.ObjectRef) -> tuple[Job, Any]:
    job: Job = ray.get(handle)
    if job.state is None:
        return job, None
    import torch

    torch.set_num_threads(job.threads or cluster.share_of_cores(job.cpus))
    return job, job.state()


def _run_shard(handles: list[ray.ObjectRef], shard: Shard) -> ShardRecord:
    try:
        job, state = _load(handles[0])
    except UserError as error:
        return ShardRecord(shard.name, shard.items, user_error=str(error))
    except Exception:
        return ShardRecord(shard.name, shard.items, failure=traceback.format_exc())
    return make_shard(job, state, shard)


def _outcome(ref: ray.ObjectRef, attempt: Attempt) -> ShardRecord | None:
    """The record of an ended task; None when its node is gone."""
    try:
        record: ShardRecord = ray.get(ref)
        return record
    except NodeDiedError:
        log.warning("shard %s was lost with its node, trying again", attempt.shard.name)
        return None
    except RayError as error:
        return ShardRecord(attempt.shard.name, attempt.shard.items, failure=str(error))


def _keep_finished(shards: Sequence[Shard], target: Location, key: str) -> list[ShardRecord]:
    there = {name for name in target.list() if name.endswith(".parquet")}
    for name in there - {shard.name for shard in shards}:
        log.warning("removing %s/%s, which is not part of this plan", target.uri, name)
        target.delete(name)
    with ThreadPoolExecutor(max_workers=16) as pool:
        found = pool.map(
            lambda shard: read_record(target, shard, key), [s for s in shards if s.name in there]
        )
        return [record for record in found if record]


def _shuffled(shards: list[Shard]) -> list[Shard]:
    """Large shards first, in an order of this driver's own, so that a second driver starts elsewhere."""
    order = random.SystemRandom()
    return sorted(shards, key=lambda shard: (-shard.items, order.random()))


def _slots(cpus: float, gpus: float) -> int:
    """Tasks that the cluster as it is now can run at once, at least 1."""
    have = ray.cluster_resources()
    limits = [have.get(name, 0.0) // need for name, need in (("CPU", cpus), ("GPU", gpus)) if need]
    return max(1, int(min(limits, default=1)))


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def _full(target: Location, record: ShardRecord, finished: int, shards: int) -> str:
    return (
        f"The storage of {target.uri} is full ({_last_line(record.failure)}).\n"
        f"{finished} of {shards} shards are finished and kept. Free some space and rerun the same command."
    )


def _given_up(target: Location, failures: dict[str, str], finished: int, shards: int) -> str:
    name, text = next(iter(failures.items()))
    return (
        f"{len(failures)} shards of {target.uri} failed every time, the first was {name}:\n{text.strip()}\n"
        f"{finished} of {shards} shards are finished and kept; the same command makes only the others."
    )
