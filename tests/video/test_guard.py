"""A guarded call returns or raises as usual, and a child that is lost becomes a reason."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest

from evatok.video.decode import ClipFormat, DecodeError, decode_clip, probe
from evatok.video.guard import Guard


@pytest.fixture
def guard():
    with Guard(time_limit=60) as guarded:
        yield guarded


def test_results_and_errors_come_through(guard, tmp_path, write, moving):
    path = str(write(tmp_path / "video.mp4", moving(20)))
    shape = ClipFormat(frames=8, size=48)
    np.testing.assert_array_equal(guard(decode_clip, path, 0.25, shape), decode_clip(path, 0.25, shape))
    with pytest.raises(DecodeError) as raised:
        guard(probe, str(tmp_path / "absent.mp4"))
    assert raised.value.code == "missing"


def test_a_crash_is_told_from_the_next_call(guard):
    assert guard(os.path.basename, "/a/b") == "b"
    with pytest.raises(DecodeError, match="SIGSEGV") as raised:
        guard(_die_of, "video.mp4")
    assert raised.value.code == "crash"
    assert guard(os.path.basename, "/a/b") == "b"


def test_a_child_that_died_between_two_calls_is_replaced(guard):
    child = guard(_own_id, "video.mp4")
    os.kill(child, signal.SIGKILL)
    guard._child.wait()
    assert guard(_own_id, "video.mp4") != child


def _own_id(name: str) -> int:
    return os.getpid()


def _die_of(name: str) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_call_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr("evatok.video.guard.GRACE", 0.0)
    with Guard(time_limit=20) as guard:
        guard(os.path.basename, "/a/b")  # the start of the child takes its time
        guard._time_limit = 0.3
        started = time.monotonic()
        with pytest.raises(DecodeError) as raised:
            guard(time.sleep, 100)
        assert raised.value.code == "timeout"
        assert time.monotonic() - started < 10


def test_a_call_cannot_take_all_the_memory():
    with Guard(time_limit=60, memory=2 << 30) as guard, pytest.raises(MemoryError):
        guard(bytearray, 3 << 30)
