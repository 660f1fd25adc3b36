"""Ray metrics of our work: exported by every node for Prometheus, drawn by ``cluster/monitoring``.

Ray puts ``ray_`` before each name. ``METRICS`` is all there is; the dashboard may use nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Gauge

from evatok.distributed.fanout import Progress

TRAINING = {
    "loss": ("evatok_train_loss", "Training loss, mean over ranks and over the steps since the last row."),
    "samples": ("evatok_train_samples", "Clips that the training has seen."),
    "clips_per_second": ("evatok_train_clips_per_second", "Clips per second, all workers together."),
    "tokens_per_second": ("evatok_train_tokens_per_second", "Tokens per second, all workers together."),
    "time_data": ("evatok_train_data_wait_share", "Share of the time that a step waits for clips (0-1)."),
    "reward_percentile": ("evatok_reward_percentile", "Reward percentile of the router (0-100)."),
}
FANOUT = {
    "items": ("evatok_fanout_items", "Items finished: videos of the index, clips elsewhere."),
    "total": ("evatok_fanout_items_total", "Items there are."),
    "rate": ("evatok_fanout_items_per_second", "Items per second, all tasks together."),
    "assignments": ("evatok_fanout_assignments_per_second", "Assignments scored per second."),
    "left": ("evatok_fanout_seconds_left", "Estimated seconds to the end."),
    "retries": ("evatok_fanout_retries", "Tasks that were tried again."),
    "rejected": ("evatok_fanout_rejected", "Items that could not be read."),
    "running": ("evatok_fanout_running", "Tasks in flight."),
}
METRICS = {name for name, _ in (*TRAINING.values(), *FANOUT.values())}


class TrainingMetrics:
    """A sink of training curves: the latest row's figures as gauges, by run and split."""

    def __init__(self, run: str) -> None:
        self._gauges = _gauges(TRAINING, run, tags=("split",))

    def write(self, row: Mapping[str, Any]) -> None:
        if {"tokens", "clips_per_second"} <= row.keys():
            row = {**row, "tokens_per_second": row["tokens"] * row["clips_per_second"]}
        for key, gauge in self._gauges.items():
            if key in row:
                gauge.set(row[key], tags={"split": row["split"]})

    def flush(self) -> None:
        """Nothing is held back."""


class FanOutMetrics:
    """Shows how far a fan-out is. ``assignments``: scored for each item, 0 where none are."""

    def __init__(self, run: str, assignments: int = 0) -> None:
        self._gauges = _gauges(FANOUT, run)
        self._assignments = assignments

    def __call__(self, progress: Progress) -> None:
        for key, gauge in self._gauges.items():
            if key != "assignments":
                gauge.set(getattr(progress, key))
        if self._assignments:
            self._gauges["assignments"].set(progress.rate * self._assignments)


def _gauges(names: Mapping[str, tuple[str, str]], run: str, tags: tuple[str, ...] = ()) -> dict[str, Gauge]:
    made = {}
    for key, (name, description) in names.items():
        made[key] = Gauge(name, description=description, tag_keys=("run", *tags))
        made[key].set_default_tags({"run": run})
    return made
