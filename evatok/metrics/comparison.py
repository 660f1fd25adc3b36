"""Policies against each other on the same clips: curves, reward percentiles, token savings, intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evatok.metrics.curves import Floats, Interval, bootstrap, resamples, token_saving

RESAMPLES = 1000
REFERENCES = ("uniform", "static")


@dataclass(frozen=True)
class Point:
    """One setting of a policy, measured on N clips in the same order for all points.

    ``label``: the setting for people, ``knob``: its value; ``headline``: the setting the policy is known by.
    ``deployable``: decides without having seen every assignment's result. ``assignment``: int64 [N, T];
    ``quality``: per metric float64 [N] with the final tokenizer; ``proxy``: the same with the proxy;
    ``reward``: float64 [N], the proxy reward.
    """

    policy: str
    label: str
    knob: float | None
    headline: bool
    deployable: bool
    assignment: NDArray[np.int64]
    quality: dict[str, Floats]
    proxy: dict[str, Floats]
    reward: Floats

    @property
    def tokens(self) -> Floats:
        total: Floats = self.assignment.sum(1).astype(np.float64)
        return total


@dataclass(frozen=True)
class Comparison:
    """Points of all policies; ``best`` and ``worst`` [N]: each clip's rewards over all assignments (eq. 8).

    ``metric``: the quality that savings are measured at.
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
                    "proxy": {name: float(values.mean()) for name, values in point.proxy.items()},
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
        policies: dict[str, Any] = {}
        for point in self.points:
            if point.headline:
                percentile = bootstrap(partial(self.percentile, point), weights)
                policies[point.policy] = {
                    "reward_percentile": percentile.value if percentile else None,
                    "reward_percentile_interval": _json(percentile),
                    "mean_tokens": float(point.tokens.mean()),
                    **{name: float(values.mean()) for name, values in point.quality.items()},
                    **{
                        f"token_saving_vs_{reference}": _json(self.saving(point.policy, reference, weights))
                        for reference in REFERENCES
                    },
                }
        return {
            "clips": self.clips,
            "metric": self.metric,
            "policies": policies,
            "headline": self._headline(),
        }

    def percentile(self, point: Point, weights: Floats) -> float:
        """Eq. 8 under clip weights [N], in percent."""
        return float(100 * (weights @ (point.reward - self.worst)) / (weights @ (self.best - self.worst)))

    def saving(self, policy: str, reference: str, weights: Floats) -> Interval | None:
        """Token saving of a policy's curve against a reference policy's; both see the same resampled clips."""
        if reference == policy or not self._curve(reference):
            return None
        our_tokens, our_quality = self._means(policy)
        their_tokens, their_quality = self._means(reference)
        return bootstrap(
            lambda w: token_saving(our_tokens @ w, our_quality @ w, their_tokens @ w, their_quality @ w),
            weights,
        )

    def _means(self, policy: str) -> tuple[Floats, Floats]:
        """Tokens and quality (higher is better) of a policy's points: [K, N] each."""
        sign = 1.0 if self.higher_is_better else -1.0
        points = self._curve(policy)
        quality = [sign * point.quality[self.metric] for point in points]
        return np.stack([point.tokens for point in points]), np.stack(quality)

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

    def _single_point(self, router: Point, uniform: Sequence[Point]) -> dict[str, Any]:
        """The paper's figure (Tab. 1): tokens against the uniform policy whose quality is nearest."""
        quality = float(router.quality[self.metric].mean())
        nearest = min(uniform, key=lambda point: abs(float(point.quality[self.metric].mean()) - quality))
        return {
            "reference": nearest.label,
            "tokens_percent": float(100 * (router.tokens.mean() / nearest.tokens.mean() - 1)),
            "quality": quality,
            "reference_quality": float(nearest.quality[self.metric].mean()),
        }


def _json(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else asdict(interval)
