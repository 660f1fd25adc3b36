"""Which shard runs next: order, retries and copies of stragglers.

Knows neither Ray nor the time, so that the simulated cluster of ``evatok bench fanout`` drives the same code.
"""

from __future__ import annotations

import itertools
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

QUEUED = 2.0  # attempts submitted per slot: keeps workers busy and shows an autoscaler what waits
STRAGGLER = 3.0  # times the expected seconds since submission after which a shard gets a second attempt
SHORTEST_STRAGGLER = 20.0  # seconds below which nobody is a straggler: a worker process takes some to start
TAIL = 8  # the last 1/TAIL of the items ...
TAIL_CUT = 4  # ... is cut into shards of 1/TAIL_CUT of the size
PAUSES = (2.0, 12.0, 60.0)  # seconds before a shard is tried again that needs others to recover
MEMORY = 512  # finished shards that the expected seconds are taken from


@dataclass(frozen=True)
class Shard:
    """A unit of work: some seconds of it.

    ``name``: of the file it becomes; ``items``: how many clips (videos, ...) it holds, for progress;
    ``spec``: what ``work`` needs to know, small and picklable.
    """

    name: str
    items: int
    spec: Any


@dataclass(frozen=True, eq=False)
class Attempt:
    """One submission of a shard. ``submitted``: seconds on the caller's clock."""

    shard: Shard
    submitted: float
    copy: bool


def shard_ranges(count: int, size: int) -> list[tuple[int, int]]:
    """Cut ``count`` items into ranges [start, stop) of ``size``, smaller ones at the end.

    The small ones run last and even out when the workers end. A function of both numbers alone: the ranges
    of a rerun on another cluster are the same.
    """
    small = max(1, size // TAIL_CUT)
    tail = count - count // TAIL if count > size else count
    edges = [*range(0, tail, size), *range(tail, count, small), count]
    return list(itertools.pairwise(edges))


class Schedule:
    """The state of a fan-out, fed with what happened to each attempt."""

    def __init__(self, shards: Sequence[Shard], retries: int):
        self.retried = 0
        self.copied = 0
        self.finished: set[str] = set()
        self._waiting = deque(shards)
        self._resting: list[tuple[float, Shard]] = []  # not before that time
        self._retries = retries
        self._running: dict[str, list[Attempt]] = {}
        self._failures: dict[str, int] = {}
        self._pace: deque[float] = deque(maxlen=MEMORY)  # seconds per item

    @property
    def open(self) -> bool:
        """Whether anything is still to be started or waited for."""
        return bool(self._waiting or self._running or self._resting)

    def start(self, now: float, slots: int) -> Attempt | None:
        """The next attempt to submit when ``slots`` tasks can run at once; None when it is time to wait."""
        self._waiting.extendleft(shard for moment, shard in self._resting if moment <= now)
        self._resting = [(moment, shard) for moment, shard in self._resting if moment > now]
        running = sum(map(len, self._running.values()))
        if self._waiting and running < QUEUED * slots:
            attempt = Attempt(self._waiting.popleft(), now, copy=False)
        elif not self._waiting and running < slots and (slow := self._straggler(now)):
            attempt = Attempt(slow, now, copy=True)
            self.copied += 1
        else:
            return None
        self._running.setdefault(attempt.shard.name, []).append(attempt)
        return attempt

    def done(self, attempt: Attempt, seconds: float) -> bool:
        """A shard is published; ``seconds`` it took. False when a copy of it was first."""
        self._running.pop(attempt.shard.name, None)
        if attempt.shard.name in self.finished:
            return False
        self.finished.add(attempt.shard.name)
        self._pace.append(seconds / max(1, attempt.shard.items))
        return True

    def failed(self, attempt: Attempt, rest_from: float | None = None) -> bool:
        """An attempt failed by its own fault; False when the shard is given up.

        ``rest_from``: the time now, if what it failed of may pass: the next try is then put off, ever longer.
        """
        name = attempt.shard.name
        self._failures[name] = failures = self._failures.get(name, 0) + 1
        if failures > self._retries:
            self._ended(attempt)
            return name in self._running
        pause = PAUSES[min(failures, len(PAUSES)) - 1]
        self.lost(attempt, None if rest_from is None else rest_from + pause)
        return True

    def lost(self, attempt: Attempt, not_before: float | None = None) -> None:
        """An attempt ended without a result: it is tried again first of all, once it is time."""
        self._ended(attempt)
        if attempt.shard.name not in self._running and attempt.shard.name not in self.finished:
            if not_before is None:
                self._waiting.appendleft(attempt.shard)
            else:
                self._resting.append((not_before, attempt.shard))
            self.retried += 1

    def _ended(self, attempt: Attempt) -> None:
        others = [other for other in self._running.get(attempt.shard.name, ()) if other is not attempt]
        if others:
            self._running[attempt.shard.name] = others
        else:
            self._running.pop(attempt.shard.name, None)

    def _straggler(self, now: float) -> Shard | None:
        """The shard that is longest overdue and has one attempt only."""
        if not self._pace:
            return None
        pace = statistics.median(self._pace)
        overdue = {
            now
            - attempts[0].submitted
            - max(SHORTEST_STRAGGLER, STRAGGLER * pace * attempts[0].shard.items): name
            for name, attempts in self._running.items()
            if len(attempts) == 1
        }
        latest = max(overdue, default=-1.0)
        return self._running[overdue[latest]][0].shard if latest > 0 else None
