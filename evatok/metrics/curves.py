"""Comparing quality-against-tokens curves: Bjontegaard deltas and bootstrap intervals over clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate and its central bootstrap interval, all in the estimate's unit."""

    value: float
    low: float
    high: float


class Curve:
    """Tokens as a function of quality through a policy's points, in any order, [K] each.

    quality: higher is better (negate LPIPS). A point counts if it beats every point with fewer tokens: the
    others spend tokens for nothing. ``low`` and ``high``: the range of quality that is covered.
    """

    def __init__(self, tokens: Floats, quality: Floats) -> None:
        order = np.lexsort((-quality, tokens))
        tokens, quality = tokens[order], quality[order]
        before = np.maximum.accumulate(np.concatenate([[-np.inf], quality[:-1]]))
        self.quality, self.logs = quality[quality > before], np.log(tokens[quality > before])
        self.low, self.high = float(self.quality[0]), float(self.quality[-1])

    def mean_log_tokens(self, low: float, high: float) -> float:
        """Over [low, high], a part of the covered range or a single quality in it."""
        if high == low:
            return float(np.interp(low, self.quality, self.logs))
        inside = self.quality[(self.quality > low) & (self.quality < high)]
        knots = np.concatenate([[low], inside, [high]])
        logs = np.interp(knots, self.quality, self.logs)
        return float(((logs[1:] + logs[:-1]) / 2 * np.diff(knots)).sum() / (high - low))


def token_saving(curve: Curve, reference: Curve) -> float:
    """Mean percentage of tokens that a curve saves against a reference at equal quality; negative: a loss.

    Bjontegaard's delta rate (VCEG-M33): log tokens as a function of quality, averaged over the range of
    quality that both curves cover, which is one quality where one of them has a single point; NaN where they
    share none. Straight between points in place of his polynomial, which overshoots between uneven points.
    """
    low, high = max(curve.low, reference.low), min(curve.high, reference.high)
    if high < low:
        return float("nan")
    gap = curve.mean_log_tokens(low, high) - reference.mean_log_tokens(low, high)
    return float(100 * (1 - np.exp(gap)))


def resamples(clips: int, count: int, seed: int) -> Floats:
    """Bootstrap draws of ``clips`` clips with replacement as weights [count, clips]; each row sums to 1."""
    draws = np.random.default_rng(seed).multinomial(clips, np.full(clips, 1 / clips), size=count)
    return np.asarray(draws, dtype=np.float64) / clips


def interval(value: float, draws: Sequence[float], level: float = 0.95) -> Interval | None:
    """The central percentile interval of an estimate by its bootstrap draws.

    Draws that are NaN are left out; None where the estimate itself, or more than half of the draws, is.
    """
    kept = np.array(draws)[np.isfinite(draws)]
    if not np.isfinite(value) or 2 * len(kept) < len(draws):
        return None
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))
