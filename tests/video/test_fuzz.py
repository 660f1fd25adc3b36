"""Damaged media files end in a reason or in a clip: never in a crash, a hang or a swollen process."""

from __future__ import annotations

import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from evatok.artifacts import Location
from evatok.video.decode import REASONS, ClipFormat, DecodeError, MediaLimits, decode_clip, probe
from evatok.video.guard import Guard
from evatok.video.index import ClipIndex

LIMITS = MediaLimits(time_limit=10)
SHORT = ClipFormat(frames=8, size=32)


def damaged(data: bytes, other: bytes, draw: np.random.Generator) -> bytes:
    """One of the ways in which files go bad."""
    out = bytearray(data)
    size = len(out)

    def place() -> int:
        # Headers are short and matter most.
        return int(draw.integers(0, min(size, 400) if draw.random() < 0.5 else size))

    match draw.integers(0, 9):
        case 0:  # flipped bits
            for _ in range(int(draw.integers(1, 60))):
                out[place()] ^= 1 << int(draw.integers(0, 8))
        case 1:  # cut short
            del out[int(size * draw.random()) :]
        case 2:  # the front of another file
            front = int(draw.integers(8, 600))
            out[:front] = other[:front]
        case 3:  # a hole
            start = place()
            length = min(int(draw.integers(1, 4000)), size - start)
            out[start : start + length] = bytes(length)
        case 4:  # huge claimed sizes
            for _ in range(4):
                start = min(place(), size - 4)
                out[start : start + 4] = struct.pack(">I", int(draw.choice([2**32 - 1, 2**31 - 1, 2**30])))
        case 5:  # a piece is missing
            start = place()
            del out[start : start + int(draw.integers(1, 2000))]
        case 6:  # a piece comes twice
            start = place()
            out[start:start] = out[start : start + int(draw.integers(1, 2000))]
        case 7:  # noise
            start = place()
            out[start : start + 300] = draw.bytes(300)
        case _:  # nothing but a bit of it
            start = place()
            out = out[start : start + int(draw.integers(0, 200))]
    return bytes(out)


@pytest.fixture
def damage(tmp_path, write, moving):
    """Writes `count` damaged files of every container into a folder."""

    def make(count: int) -> Path:
        frames = moving(40)
        sound = [
            write(tmp_path / "a.mp4", frames, options={"bf": "2", "g": "12"}),
            write(tmp_path / "b.mkv", frames, options={"g": "12"}),
            write(tmp_path / "c.avi", frames, codec="mpeg4", options={"g": "12"}),
            write(tmp_path / "d.webm", frames, codec="libvpx", options={"g": "12", "cpu-used": "8"}),
            write(tmp_path / "e.mov", frames, codec="mjpeg", pix_fmt="yuvj420p"),
            write(tmp_path / "f.gif", frames[:12], codec="gif", pix_fmt="rgb8"),
            write(tmp_path / "g.ts", frames),
        ]
        folder = tmp_path / "damaged"
        folder.mkdir()
        draw = np.random.default_rng(1)
        for number in range(count):
            path, other = sound[number % len(sound)], sound[int(draw.integers(len(sound)))]
            name = f"{number:04d}{(path if number % 10 else other).suffix}"
            (folder / name).write_bytes(damaged(path.read_bytes(), other.read_bytes(), draw))
        return folder

    return make


def outcome(guard: Guard, path: Path) -> str:
    try:
        info = guard(probe, str(path), LIMITS)
        clip = guard(decode_clip, str(path), float(info.times[len(info.times) // 3]), SHORT, None, LIMITS)
    except DecodeError as error:
        return error.code if str(path) in error.detail else "nameless"
    assert clip.shape == (3, 8, 32, 32)
    return "clip"


def test_damaged_files_end_in_a_clip_or_a_reason(damage):
    files = sorted(damage(140).iterdir())
    outcomes = Counter()
    with Guard(LIMITS.time_limit) as guard:
        for path in files:
            started = time.monotonic()
            outcomes[outcome(guard, path)] += 1
            assert time.monotonic() - started < 4 * LIMITS.time_limit
    assert sum(outcomes.values()) == 140
    assert set(outcomes) <= {"clip", *REASONS}
    assert outcomes["clip"] > 30
    assert outcomes["unreadable"] > 10
    assert outcomes["crash"] == outcomes["timeout"] == 0, outcomes


@contextmanager
def largest_decoder() -> Iterator[Callable[[], int]]:
    """Gives the most bytes that any process of Ray's workers, or a child of one, was seen to hold."""
    import psutil

    most, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if "ray::" in process.name() or "evatok.video.guard" in process.cmdline():
                        most[0] = max(most[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: most[0]
    finally:
        ended.set()
        watcher.join()


def test_a_thousand_damaged_files_go_through_the_index_and_the_stream(ray_cluster, damage, tmp_path):
    from evatok.distributed.stream import clip_stream
    from evatok.stages.index import IndexConfig, build_index
    from evatok.video.sources import FolderSource

    folder = damage(1000)
    location = Location.parse(tmp_path / "index")
    config = IndexConfig(source=FolderSource(path=str(folder)), frames=8, stride=8, limits=LIMITS)
    with largest_decoder() as peak:
        counts = build_index(config, location, seed=0)
        index = ClipIndex.open(location)
        dataset = clip_stream(
            index, index.order(0), SHORT, start=0, count=len(index), rows_per_block=8, seed=0
        )
        seen = replaced = 0
        for batch in dataset.iter_batches(batch_size=8, batch_format="numpy"):
            seen += len(batch["row"])
            replaced += int(batch["replaced"].sum())
    assert counts["videos"] + counts["rejected"] == 1000
    named = location.read_table("rejected.parquet")["uri"].to_pylist()
    usable = set(index.column("uri").to_pylist())
    assert len(set(named)) == len(named)
    assert {str(path) for path in folder.iterdir()} == usable | set(named)
    assert seen == len(index)
    print(f"{seen} clips, {replaced} replaced, largest {peak() / 2**20:.0f} MiB")
    assert 0 < peak() < 1.5 * 2**30
