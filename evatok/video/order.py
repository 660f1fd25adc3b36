"""The order of clips: which row of the index stands at every global sample position, without end.

Every epoch is a permutation of all rows, drawn by (seed, epoch) alone. The permutation is a keyed cipher
over the row numbers, so any stretch of any epoch is computed on its own: nothing is shuffled or kept, and the
order is the same on every machine and with every version of numpy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_TURNS = 1000  # positions over which a mixture keeps its weights exactly
_STRETCH = 1 << 16  # positions computed at once: small enough for the processor's cache


@dataclass(frozen=True)
class ClipOrder:
    """The endless order of `clips` rows under `seed`."""

    clips: int
    seed: int

    def __post_init__(self) -> None:
        if self.clips < 1:
            raise ValueError(f"an order needs at least one clip, got {self.clips}")

    def rows(self, start: int, count: int) -> NDArray[np.int64]:
        """The rows at positions start, ..., start + count - 1: int64 [count]. May cross epochs."""
        return self.at(np.arange(start, start + count, dtype=np.int64))

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows at any positions: int64 [n]."""
        rows = np.empty(len(positions), np.int64)
        for low in range(0, len(positions), _STRETCH):
            rows[low : low + _STRETCH] = self._permuted(positions[low : low + _STRETCH].astype(np.uint64))
        return rows

    def _permuted(self, positions: NDArray[np.uint64]) -> NDArray[np.int64]:
        clips = np.uint64(self.clips)
        epochs, rows = np.divmod(positions, clips)
        keys = _mixed(epochs + _mixed(np.full(1, self.seed % 2**64, np.uint64)))
        rows = self._encrypted(rows, keys)
        # The cipher's domain is slightly larger than the rows: walk on until back among them.
        outside = np.flatnonzero(rows >= clips)
        while outside.size:
            rows[outside] = self._encrypted(rows[outside], keys[outside])
            outside = outside[rows[outside] >= clips]
        return rows.astype(np.int64)

    def _encrypted(self, rows: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """An alternating Feistel network over pairs (high, low) of two moduli near sqrt(clips)."""
        width = np.uint64(int(np.ceil(np.sqrt(self.clips))))
        height = np.uint64(-(-self.clips // int(width)))
        high, low = np.divmod(rows, width)
        for number in range(_ROUNDS):
            high = (high + _mixed(low ^ keys + np.uint64(2 * number)) % height) % height
            low = (low + _mixed(high ^ keys + np.uint64(2 * number + 1)) % width) % width
        return high * width + low


@dataclass(frozen=True)
class MixedOrder:
    """Several sources in one endless order, each in an order of its own, mixed by weight.

    `parts`: clips of each source; its rows follow those of the source before. `weights`: how often a source's
    turn comes, relative to the others, to a precision of 1 / 1000 of all turns. Every 1000 turns hold each
    source equally often. `run`: positions that one turn takes up.
    """

    parts: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int
    run: int = 1

    def __post_init__(self) -> None:
        if not self.parts or len(self.parts) != len(self.weights) or min(self.weights) <= 0:
            raise ValueError(f"one positive weight per source is needed, got {self.weights} for {self.parts}")
        if not all(np.diff(turn_edges(self.weights))):
            raise ValueError(f"a weight of {self.weights} is below 1 / {_TURNS} of their sum")

    @property
    def clips(self) -> int:
        """All clips of all sources."""
        return sum(self.parts)

    def rows(self, start: int, count: int) -> NDArray[np.int64]:
        """The rows at positions start, ..., start + count - 1: int64 [count]."""
        edges = turn_edges(self.weights)
        firsts, edges = edges[:-1], edges[1:]
        turn, within = np.divmod(np.arange(start, start + count, dtype=np.int64), self.run)
        turns = ClipOrder(_TURNS, self.seed).at(turn)
        sources = np.searchsorted(edges, turns, side="right")
        period = turn // _TURNS
        rows = np.empty(count, np.int64)
        offset = 0
        for number, clips in enumerate(self.parts):
            mine = np.flatnonzero(sources == number)
            before = period[mine] * (edges - firsts)[number] + turns[mine] - firsts[number]
            positions = before * self.run + within[mine]
            rows[mine] = offset + ClipOrder(clips, self.seed + 1 + number).at(positions)
            offset += clips
        return rows


def turn_edges(weights: Sequence[float]) -> NDArray[np.int64]:
    """Where the turns of each source begin among 1000, and 1000: int64 [sources + 1]."""
    shares = np.cumsum(weights) / sum(weights)
    return np.concatenate([[0], np.round(shares * _TURNS)]).astype(np.int64)


Order = ClipOrder | MixedOrder


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64: every bit of the input changes every bit of the output."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
