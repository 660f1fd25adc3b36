"""Comparing quality-against-tokens curves: Bjontegaard deltas and bootstrap intervals over clips."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate and its central bootstrap interval, all in the estimate's unit."""

    value: float
    low: float
    high: float


def rising_part(tokens: Floats, quality: Floats) -> tuple[Floats, Floats]:
    """The points of a curve that beat every point with fewer tokens, by tokens; quality: higher is better.

    What is left out would spend tokens for nothing; what stays can be read as tokens over quality.
    """
    order = np.lexsort((-quality, tokens))
    tokens, quality = tokens[order], quality[order]
    before = np.maximum.accumulate(np.concatenate([[-np.inf], quality[:-1]]))
    kept = quality > before
    return tokens[kept], quality[kept]


def token_saving(
    tokens: Floats, quality: Floats, reference_tokens: Floats, reference_quality: Floats
) -> float:
    """Mean percentage of tokens that a curve saves against a reference at equal quality; negative: a loss.

    Bjontegaard's delta rate (VCEG-M33) with the shape-preserving cubic of its later practice in place of
    one polynomial: log tokens as a function of quality, averaged over the range of quality that both curves
    cover. Points in any order, [K] each; quality: higher is better (negate LPIPS). Where one of them has a
    single rising point the range is that point's quality. NaN where the curves share no quality.
    """
    ours, reference = rising_part(tokens, quality), rising_part(reference_tokens, reference_quality)
    low, high = max(ours[1][0], reference[1][0]), min(ours[1][-1], reference[1][-1])
    if high < low:
        return float("nan")
    gap = _mean_log_tokens(*ours, low, high) - _mean_log_tokens(*reference, low, high)
    return float(100 * (1 - np.exp(gap)))


def _mean_log_tokens(tokens: Floats, quality: Floats, low: float, high: float) -> float:
    logs = np.log(tokens)
    if len(logs) == 1:
        return float(logs[0])
    curve = PchipInterpolator(quality, logs)
    return float(curve(low) if high == low else curve.integrate(low, high) / (high - low))


def resamples(clips: int, count: int, seed: int) -> Floats:
    """Bootstrap draws of ``clips`` clips with replacement as weights [count, clips]; each row sums to 1."""
    draws = np.random.default_rng(seed).multinomial(clips, np.full(clips, 1 / clips), size=count)
    return np.asarray(draws, dtype=np.float64) / clips


def bootstrap(estimate: Callable[[Floats], float], weights: Floats, level: float = 0.95) -> Interval | None:
    """Percentile interval of ``estimate``, a function of clip weights [clips] that sum to 1.

    weights: [R, clips] of ``resamples``; the same ones for all estimates keep comparisons paired. Draws
    for which the estimate is NaN are left out; None where it is itself, or for more than half of the draws.
    """
    value = estimate(np.full(weights.shape[1], 1 / weights.shape[1]))
    drawn = np.array([estimate(row) for row in weights])
    drawn = drawn[np.isfinite(drawn)]
    if not np.isfinite(value) or 2 * len(drawn) < len(weights):
        return None
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))
