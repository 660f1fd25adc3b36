"""The stream gives the order's clips, whoever reads it, from wherever, whatever happens to its tasks."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evatok.artifacts import Location
from evatok.distributed.stream import Dealing
from evatok.video.decode import ClipFormat, MediaLimits, StorageError, decode_clip, probe
from evatok.video.index import PREPARED, REJECTED_SCHEMA, SCHEMA, ClipIndex, clip_starts, write_index
from evatok.video.order import ClipOrder
from evatok.video.prepared import PreparedClips, file_name
from evatok.video.synthetic import write_videos

FORMAT = ClipFormat(frames=8, size=32)


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> ClipIndex:
    """36 clips of 9 videos."""
    folder = tmp_path_factory.mktemp("stream")
    rows = []
    for video in write_videos(folder, 9, seed=0, blocks=8, size=32):
        uri = str(folder / video.name)
        for number, start in enumerate(clip_starts(probe(uri), FORMAT, stride=8, limit=None)):
            rows.append(
                {"clip_id": f"{video.name}#{number}", "uri": uri, "start": start, "fps": 0.0, "frames": 8}
                | {"label": video.label, "split": "test" if number == 3 else "train"}
            )
    location = Location.parse(folder / "index")
    write_index(location, pa.Table.from_pylist(rows, SCHEMA), REJECTED_SCHEMA.empty_table())
    return ClipIndex.open(location)


def stream(index, *, start, count, rows_per_block, clip_format=FORMAT, seed=0, **extra):
    from evatok.distributed.stream import clip_stream

    return clip_stream(
        index,
        index.order(seed),
        clip_format,
        start=start,
        count=count,
        rows_per_block=rows_per_block,
        seed=seed,
        num_cpus=0.5,
        **extra,
    )


def batches(dataset, size) -> Iterator[dict[str, np.ndarray]]:
    yield from dataset.iter_batches(batch_size=size, batch_format="numpy", prefetch_batches=0)


def ranks_of(dataset, workers: int, size: int) -> list[list[dict[str, np.ndarray]]]:
    """What each of several workers reads, all reading at once."""
    shards = dataset.streaming_split(workers, equal=True)
    read: list[list[dict[str, np.ndarray]]] = [[] for _ in shards]

    def work(rank: int) -> None:
        read[rank].extend(batches(shards[rank], size))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return read


def test_rows_are_the_clips_of_the_order_from_any_position_on(ray_cluster, index):
    train = index.select(split="train")
    labels = train.labels()
    varied = ClipFormat(frames=8, size=24, crop="random", flip=True)
    dataset = stream(train, start=20, count=14, rows_per_block=4, clip_format=varied, seed=5, labels=labels)
    rows = [dict(zip(batch, values)) for batch in batches(dataset, 3) for values in zip(*batch.values())]
    expected = train.take(ClipOrder(27, seed=5).rows(20, 14)).to_pylist()
    assert len(rows) == 14
    for position, (row, clip) in enumerate(zip(rows, expected), start=20):
        assert (row["position"], row["row"], row["replaced"]) == (position, clip["row"], False)
        assert labels[row["label"]] == clip["label"]
        draw = np.random.default_rng((5, position))
        np.testing.assert_array_equal(row["clip"], decode_clip(clip["uri"], clip["start"], varied, draw))


def test_steps_hold_the_same_clips_for_any_number_of_workers(ray_cluster, index):
    global_batch, steps, start = 8, 4, 40
    expected = index.take(index.order(0).rows(start, global_batch * steps))["row"].to_numpy()
    for workers in (1, 2, 4):
        share = global_batch // workers
        dataset = stream(index, start=start, count=global_batch * steps, rows_per_block=share // 2)
        read = ranks_of(dataset, workers, share)
        for step in range(steps):
            union = {
                int(position): int(row)
                for rank in read
                for position, row in zip(rank[step]["position"], rank[step]["row"])
            }
            low = start + step * global_batch
            assert sorted(union) == list(range(low, low + global_batch)), (workers, step)
            assert [union[low + k] for k in range(global_batch)] == expected[
                step * global_batch : (step + 1) * global_batch
            ].tolist()


def test_a_clip_that_cannot_be_decoded_is_replaced_by_its_successor(ray_cluster, index, tmp_path):
    rows = index.take(np.arange(len(index))).drop_columns("row")
    uris = rows["uri"].to_pylist()
    broken = tmp_path / "broken.mp4"
    broken.write_text("no video")
    uris[5] = uris[6] = str(broken)
    location = Location.parse(tmp_path)
    write_index(location, rows.set_column(1, "uri", pa.array(uris)), REJECTED_SCHEMA.empty_table())
    damaged = ClipIndex.open(location)
    seen = {
        int(position): (int(row), bool(replaced))
        for batch in batches(stream(damaged, start=0, count=36, rows_per_block=4), 4)
        for position, row, replaced in zip(batch["position"], batch["row"], batch["replaced"])
    }
    for position, row in enumerate(damaged.order(0).rows(0, 36)):
        assert seen[position] == ((7, True) if row in (5, 6) else (row, False))


def test_the_clips_of_one_long_bad_video_are_replaced_by_those_of_others(index, tmp_path):
    from evatok.distributed.stream import ClipFetch

    broken = tmp_path / "broken.mp4"
    broken.write_text("no video")
    rows = index.take(np.arange(8)).drop_columns("row").to_pylist()
    long = [{**rows[0], "clip_id": f"broken#{number}", "uri": str(broken)} for number in range(300)]
    location = Location.parse(tmp_path)
    table = pa.Table.from_pylist([*rows[:4], *long, *rows[4:]], SCHEMA)
    write_index(location, table, REJECTED_SCHEMA.empty_table())
    fetch = ClipFetch(ClipIndex.open(location), FORMAT, seed=0)
    fetched = fetch(np.arange(3), np.array([4, 100, 303]))
    assert fetched["row"].tolist() == [304] * 3
    assert fetched["replaced"].all()


@pytest.mark.parametrize("code", ["crash", "timeout"])
def test_a_clip_that_kills_or_hangs_its_decoder_is_found_out_named_and_left_alone(
    ray_cluster, index, tmp_path, code
):
    from evatok.distributed.stream import ClipFetch, ordered_stream

    location = Location.parse(tmp_path)
    rows = index.take(np.arange(len(index))).drop_columns("row")
    write_index(location, rows, REJECTED_SCHEMA.empty_table(), limits=MediaLimits(time_limit=4))
    mined = ClipIndex.open(location)
    deadly = mined.take(np.asarray([11])).to_pylist()[0]
    decode = _Deadly(deadly["uri"], deadly["start"], str(tmp_path), hangs=code == "timeout")
    fetch = ClipFetch(mined, FORMAT, seed=0, decode=decode)
    dataset = ordered_stream(mined.order(0), fetch, start=0, count=48, rows_per_block=4, num_cpus=0.5)
    seen = [
        (int(position), int(row), bool(replaced))
        for batch in batches(dataset, 4)
        for position, row, replaced in zip(batch["position"], batch["row"], batch["replaced"])
    ]
    order = mined.order(0).rows(0, 48)
    assert seen == [(k, 12, True) if row == 11 else (k, row, False) for k, row in enumerate(order)]
    assert mined.known_bad() == {11}
    note = location.read_json("bad/11.json")
    assert (note["clip_id"], note["code"]) == (deadly["clip_id"], code)
    # One process of a task and one child that found the clip out; at most as many again where two tasks of
    # neighbouring epochs met the clip before it was known.
    assert 2 <= len(list(tmp_path.glob("death-*"))) <= 4


class _Deadly:
    """Decodes, but dies of one clip, or never returns from it, as a broken codec would."""

    def __init__(self, uri: str, start: float, diary: str, hangs: bool) -> None:
        self.clip, self.diary, self.hangs = (uri, start), diary, hangs

    def __call__(self, uri, start, *rest, **options):
        if (uri, start) == self.clip:
            open(f"{self.diary}/death-{os.getpid()}", "w").close()
            if self.hangs:
                ctypes.PyDLL(None).sleep(3600)  # holds the interpreter's lock, as some bindings do
            os.kill(os.getpid(), signal.SIGSEGV)
        return decode_clip(uri, start, *rest, **options)


def test_a_storage_that_fails_for_a_moment_costs_no_clip(index, monkeypatch):
    from evatok.distributed import stream as module

    monkeypatch.setattr(module, "STORAGE_PATIENCE", (0.01, 0.01))
    failures = iter([True, True, False, False])

    def decode(uri, start, *rest, **options):
        if next(failures):
            raise StorageError(f"{uri}: 503")
        return decode_clip(uri, start, *rest, **options)

    fetched = module.ClipFetch(index, FORMAT, seed=0, decode=decode)(np.array([0, 1]), np.array([3, 4]))
    assert fetched["row"].tolist() == [3, 4]
    assert not fetched["replaced"].any()


def test_clips_prepared_at_one_size_are_made_again_after_an_attempt_at_another(
    ray_cluster, index, tmp_path, monkeypatch
):
    from evatok.stages import materialize as module
    from evatok.video.decode import MediaLimits

    location = Location.parse(tmp_path)
    rows = index.take(np.arange(len(index))).drop_columns("row")
    write_index(location, rows, REJECTED_SCHEMA.empty_table())
    assert module.materialize(location, 8, 32, MediaLimits()) == 0
    with monkeypatch.context() as patch:
        patch.setattr("evatok.distributed.fanout.fan_out", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            module.materialize(location, 8, 24, MediaLimits())
    assert module.materialize(location, 8, 32, MediaLimits()) == 0
    prepared = PreparedClips.open(location / PREPARED)
    assert prepared.clip(0).shape == (3, 8, 32, 32)
    # A file that was cut short since is made again too.
    (file,) = (tmp_path / PREPARED).glob("*.arrow")
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    assert module.materialize(location, 8, 32, MediaLimits()) == 0
    assert file.read_bytes() == whole


def test_prepared_clips_give_the_same_stream(ray_cluster, index, tmp_path):
    from evatok.stages.materialize import materialize
    from evatok.video.decode import MediaLimits

    location = Location.parse(tmp_path)
    rows = index.take(np.arange(len(index))).drop_columns("row")
    write_index(location, rows, REJECTED_SCHEMA.empty_table())
    fresh = ClipIndex.open(location)
    flipped = ClipFormat(frames=8, size=32, flip=True)

    def read() -> list[dict[str, np.ndarray]]:
        return list(batches(stream(fresh, start=5, count=20, rows_per_block=4, clip_format=flipped), 4))

    decoded = read()
    assert materialize(location, 8, 32, MediaLimits()) == 0
    prepared = PreparedClips.open(location / PREPARED)
    assert prepared is not None
    assert not prepared.serve(ClipFormat(frames=8, size=24))
    for one, other in zip(decoded, read(), strict=True):
        for name, column in one.items():
            np.testing.assert_array_equal(column, other[name])


def test_a_prepared_file_that_is_damaged_costs_its_time_and_no_clip(index, tmp_path):
    from evatok.distributed.stream import ClipFetch

    location = Location.parse(tmp_path)
    rows = index.take(np.arange(len(index))).drop_columns("row")
    write_index(location, rows, REJECTED_SCHEMA.empty_table())
    fetch = ClipFetch(ClipIndex.open(location), FORMAT, seed=0)
    positions, clips = np.arange(3), np.array([1, 2, 35])
    decoded = fetch(positions, clips)
    (tmp_path / PREPARED).mkdir()
    (tmp_path / PREPARED / file_name(0)).write_bytes(b"no Arrow file")
    PreparedClips(location / PREPARED, 8, 32).finish()
    fetched = fetch(positions, clips)
    np.testing.assert_array_equal(fetched["clip"], decoded["clip"])
    assert not fetched["replaced"].any()


def test_data_that_moved_away_ends_the_stream_with_a_reason(ray_cluster, index, tmp_path):
    rows = index.take(np.arange(len(index))).drop_columns("row")
    gone = pa.array([f"/gone/{k}.mp4" for k in range(len(index))])
    location = Location.parse(tmp_path)
    write_index(location, rows.set_column(1, "uri", gone), REJECTED_SCHEMA.empty_table())
    with pytest.raises(Exception, match="moved or deleted"):
        list(batches(stream(ClipIndex.open(location), start=0, count=4, rows_per_block=4), 4))


def test_a_long_stream_goes_on_with_every_iteration(ray_cluster, index, monkeypatch):
    monkeypatch.setattr("evatok.distributed.stream._POSITIONS_PER_EXECUTION", 12)
    (shard,) = stream(index, start=30, count=30, rows_per_block=4).streaming_split(1, equal=True)
    for low, high in ((30, 42), (42, 54), (54, 60)):
        read = [int(position) for batch in batches(shard, 4) for position in batch["position"]]
        assert read == list(range(low, high))


def test_a_stream_leaves_the_settings_of_other_datasets_alone(ray_cluster, index):
    import ray.data

    dataset = stream(index, start=0, count=8, rows_per_block=4)
    shared = ray.data.DataContext.get_current()
    assert dataset.name == "clips"
    assert dataset.context.execution_options.preserve_order
    assert dataset.context.execution_no_progress_timeout_s == -1
    assert not shared.execution_options.preserve_order
    assert shared.execution_no_progress_timeout_s != -1


def test_an_order_for_another_index_is_refused(index):
    from evatok.distributed.stream import clip_stream

    with pytest.raises(ValueError, match="order of 3 clips"):
        clip_stream(index, ClipOrder(3, 0), FORMAT, start=0, count=4, rows_per_block=4, seed=0)


class _Trainer:
    """A training worker without the training: notes the clips of every step."""

    def read(self, shard, rank: int, size: int, first_step: int, diary: str) -> None:
        for step, batch in enumerate(batches(shard, size), start=first_step):
            rows = {int(p): int(r) for p, r in zip(batch["position"], batch["row"])}
            partial = Path(diary, f".{step:03d}-{rank}")
            partial.write_text(json.dumps(rows))
            partial.rename(Path(diary, f"{step:03d}-{rank}.json"))


def _steps(diary: Path, workers: int) -> dict[int, dict[int, int]]:
    """position -> row of every step that all workers have finished."""
    files: dict[int, list[Path]] = {}
    for file in diary.glob("*.json"):
        files.setdefault(int(file.name[:3]), []).append(file)
    return {
        step: {int(p): row for file in found for p, row in json.loads(file.read_text()).items()}
        for step, found in files.items()
        if len(found) == workers
    }


def test_a_run_that_is_killed_and_resumed_with_other_workers_sees_the_clips_of_an_undisturbed_one(
    ray_cluster, index, tmp_path
):
    import ray

    global_batch, last_step, checkpoint_every = 8, 15, 3
    seen: dict[int, dict[int, int]] = {}
    step = 0
    for attempt, (workers, killed_after) in enumerate(((2, 4), (4, 9), (1, None))):
        diary = tmp_path / str(attempt)
        diary.mkdir()
        dataset = stream(
            index,
            start=step * global_batch,
            count=(last_step - step) * global_batch,
            rows_per_block=global_batch // workers // 2,
        )
        shards = dataset.streaming_split(workers, equal=True)
        trainers = [ray.remote(num_cpus=0)(_Trainer).remote() for _ in shards]
        running = [
            trainer.read.remote(shard, rank, global_batch // workers, step, str(diary))
            for rank, (trainer, shard) in enumerate(zip(trainers, shards))
        ]
        if killed_after is None:
            ray.get(running)
        else:
            while max(_steps(diary, workers), default=0) < killed_after:
                time.sleep(0.05)
            for trainer in trainers:
                ray.kill(trainer)
        finished = _steps(diary, workers)
        resumed_from = last_step if killed_after is None else (max(finished) + 1) // checkpoint_every * 3
        seen |= {number: rows for number, rows in finished.items() if number < resumed_from}
        step = resumed_from
    undisturbed = index.order(0).rows(0, last_step * global_batch)
    assert sorted(seen) == list(range(last_step))
    for number, rows in seen.items():
        positions = range(number * global_batch, (number + 1) * global_batch)
        assert [rows[position] for position in positions] == undisturbed[positions].tolist(), number


@pytest.mark.slow
def test_memory_stays_flat_over_fifty_thousand_clips(ray_cluster, index):
    """Of every process by itself: Ray starts another worker now and then, which is no leak."""
    import psutil

    tiny = ClipFormat(frames=4, size=16)
    dataset = stream(index, start=0, count=50_000, rows_per_block=50, clip_format=tiny)
    largest: list[float] = []
    for number, _ in enumerate(batches(dataset, 50)):
        if number % 50 == 49:
            family = [psutil.Process(), *psutil.Process().children(recursive=True)]
            workers = [
                process for process in family if "ray::" in process.name() or process.pid == os.getpid()
            ]
            largest.append(max(process.memory_info().rss for process in workers) / 2**20)
    print(f"largest process, MiB every 2,500 clips: {[round(value) for value in largest]}")
    assert len(largest) == 20
    assert max(largest[10:]) < 1.1 * max(largest[2:10])


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(1, 3))
def test_large_blocks_deal_every_worker_the_batches_that_small_ones_would(workers, batch, batches, rounds):
    dealing = Dealing(workers, batch, batch * batches)
    places = dealing.places(np.arange(rounds * dealing.span))
    blocks = places.reshape(-1, dealing.rows)
    small = np.arange(rounds * dealing.span).reshape(-1, batch)
    for worker in range(workers):
        np.testing.assert_array_equal(blocks[worker::workers].reshape(-1, batch), small[worker::workers])
