"""Policies against each other on the same clips: curves, reward percentiles, token savings, intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evatok.metrics.curves import Curve, Floats, Interval, interval, resamples, token_saving

RESAMPLES = 1000  # bootstrap draws
REFERENCES = ("uniform", "static")
# Over the quality that two curves share, and at the quality of the one setting that a policy is quoted at.
SAVINGS = tuple(f"{name}_vs_{r}" for name in ("token_saving", "token_saving_at_setting") for r in REFERENCES)
BACKBONES = ("quality", "final")  # the fields of a point that hold what a tokenizer made of it


@dataclass(frozen=True)
class Point:
    """One setting of a policy, measured on N clips in the same order for all points.

    ``label``: the setting for people, ``knob``: its value; ``headline``: the setting the policy is known by.
    ``deployable``: decides without having seen every assignment's result. ``assignment``: int64 [N, T];
    ``quality``: per metric float64 [N] with the proxy, ``final``: with the final tokenizer; ``reward``:
    float64 [N], the proxy reward.
    """

    policy: str
    label: str
    knob: float | None
    headline: bool
    deployable: bool
    assignment: NDArray[np.int64]
    quality: dict[str, Floats]
    final: dict[str, Floats]
    reward: Floats

    @cached_property
    def tokens(self) -> Floats:
        total: Floats = self.assignment.sum(1).astype(np.float64)
        return total


@dataclass(frozen=True)
class Comparison:
    """Points of all policies; ``best`` and ``worst`` [N]: each clip's rewards over all assignments (eq. 8).

    ``metric``: the quality that savings are measured at. Policies are compared on the proxy first: it was
    trained under random assignments and favours none, as the final tokenizer favours the router's.
    """

    points: Sequence[Point]
    best: Floats
    worst: Floats
    metric: str
    higher_is_better: bool
    seed: int

    @property
    def clips(self) -> int:
        return len(self.best)

    def policies(self) -> dict[str, Any]:
        """Per policy {"deployable", "points": [...]}, JSON-ready: every point's means and 95 % intervals."""
        weights = resamples(self.clips, RESAMPLES, self.seed)
        found: dict[str, Any] = {}
        for point in self.points:
            entry = found.setdefault(point.policy, {"deployable": point.deployable, "points": []})
            entry["points"].append(
                {
                    "label": point.label,
                    "knob": point.knob,
                    "headline": point.headline,
                    "mean_tokens": float(point.tokens.mean()),
                    **{name: float(values.mean()) for name, values in point.quality.items()},
                    "final": {name: float(values.mean()) for name, values in point.final.items()},
                    "reward": float(point.reward.mean()),
                    "reward_percentile": self.percentile(point, np.full(self.clips, 1 / self.clips)),
                    "intervals": {
                        name: np.quantile(weights @ values, [0.025, 0.975]).tolist()
                        for name, values in {**point.quality, "tokens": point.tokens}.items()
                    },
                }
            )
        return found

    def summary(self) -> dict[str, Any]:
        """Per policy what ``evatok eval --json`` prints, and the headline comparisons under "headline"."""
        weights = resamples(self.clips, RESAMPLES, self.seed)
        even = np.full(self.clips, 1 / self.clips)
        measured = {backbone: self._savings(backbone, even) for backbone in BACKBONES}
        drawn = {backbone: [self._savings(backbone, row) for row in weights] for backbone in BACKBONES}

        def entry(backbone: str, point: Point) -> dict[str, Any]:
            found: dict[str, Any] = {
                metric: float(values.mean()) for metric, values in getattr(point, backbone).items()
            }
            for name in SAVINGS:
                key = (point.policy, name)
                draws = [row.get(key, math.nan) for row in drawn[backbone]]
                found[name] = _json(interval(measured[backbone].get(key, math.nan), draws))
            return found

        policies = {}
        for point in self.points:
            if point.headline:
                percentile = self.percentile(point, even)
                spread = interval(percentile, [self.percentile(point, row) for row in weights])
                policies[point.policy] = {
                    "reward_percentile": percentile,
                    "reward_percentile_interval": _json(spread),
                    "mean_tokens": float(point.tokens.mean()),
                    "regret": {
                        name: float(np.quantile(self.best - point.reward, share))
                        for name, share in (("median", 0.5), ("90", 0.9))
                    },
                    **entry("quality", point),
                    "final": entry("final", point),
                }
        headline = self._headline()
        return {"clips": self.clips, "metric": self.metric, "policies": policies, "headline": headline}

    def percentile(self, point: Point, weights: Floats) -> float:
        """Eq. 8 under clip weights [N], in percent."""
        return float(100 * (weights @ (point.reward - self.worst)) / (weights @ (self.best - self.worst)))

    def _savings(self, backbone: str, weights: Floats) -> dict[tuple[str, str], float]:
        """Percent of every (policy, one of SAVINGS) under clip weights [N], the same for all."""
        sign = 1.0 if self.higher_is_better else -1.0

        def curve(points: Sequence[Point]) -> Curve:
            tokens = np.array([point.tokens @ weights for point in points])
            quality = np.array([getattr(point, backbone)[self.metric] @ weights for point in points])
            return Curve(tokens, sign * quality)

        curves = {
            policy: curve(self._curve(policy)) for policy in dict.fromkeys(p.policy for p in self.points)
        }
        quoted = {point.policy: curve([point]) for point in self.points if point.headline}
        return {
            (policy, f"{name}_vs_{reference}"): token_saving(found, curves[reference])
            for name, compared in (("token_saving", curves), ("token_saving_at_setting", quoted))
            for policy, found in compared.items()
            for reference in REFERENCES
            if reference in curves and reference != policy
        }

    def _curve(self, policy: str) -> list[Point]:
        return [point for point in self.points if point.policy == policy]

    def _headline(self) -> dict[str, Any]:
        uniform = sorted(self._curve("uniform"), key=lambda point: point.tokens.mean())
        best = max(uniform, key=lambda point: point.reward.mean())
        qualities = [float(point.quality[self.metric].mean()) for point in uniform]
        sign = 1 if self.higher_is_better else -1
        headline: dict[str, Any] = {
            "best_uniform": {
                "label": best.label,
                "tokens": float(best.tokens.mean()),
                "reward": float(best.reward.mean()),
                "reward_percentile": self.percentile(best, np.full(self.clips, 1 / self.clips)),
            },
            "quality_by_tokens": [
                {"tokens": float(point.tokens.mean()), self.metric: quality}
                for point, quality in zip(uniform, qualities)
            ],
            "rises_with_tokens": bool((sign * np.diff(qualities) > 0).all()),
            "oracle_reward": float(self.best.mean()),
            "oracle_beats_uniforms": bool(self.best.mean() > best.reward.mean()),
            "single_point": None,
        }
        if router := next((p for p in self._curve("router") if p.headline), None):
            headline["single_point"] = self._single_point(router, uniform)
        return headline

    def _single_point(self, router: Point, uniform: Sequence[Point]) -> dict[str, Any] | None:
        """The paper's figure (Tab. 1): tokens against the uniform policy of the nearest quality that is no
        better than the router's; None where all are better.
        """
        quality = float(router.quality[self.metric].mean())
        sign = 1 if self.higher_is_better else -1

        def ahead(point: Point) -> float:
            return sign * (quality - float(point.quality[self.metric].mean()))

        nearest = min((point for point in uniform if ahead(point) >= 0), key=ahead, default=None)
        if nearest is None:
            return None
        return {
            "reference": nearest.label,
            "tokens_percent": float(100 * (router.tokens.mean() / nearest.tokens.mean() - 1)),
            "quality": quality,
            "reference_quality": float(nearest.quality[self.metric].mean()),
        }


def _json(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else asdict(interval)
