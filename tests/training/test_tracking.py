"""TensorBoard and Weights & Biases get the rows of the curves."""

from pathlib import Path

import pytest

from evatok.artifacts import Location
from evatok.training.tracking import trackers

ROWS = [
    {"step": step, "samples": 8 * step, "time": 1000.0 + step, "split": split, "loss": 1 / step}
    for step in (1, 2, 3)
    for split in ("train", "eval")
]


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (sink,) = trackers(["tensorboard"], Location.parse(tmp_path), "run")
    for row in ROWS:
        sink.write(row)
    sink.flush()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "eval/loss"}
    assert [(e.step, e.wall_time) for e in events.Scalars("train/loss")] == [(1, 1001), (2, 1002), (3, 1003)]
    assert [e.value for e in events.Scalars("eval/loss")] == pytest.approx([1, 1 / 2, 1 / 3])


@pytest.mark.slow
def test_wandb_writes_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    (sink,) = trackers(["wandb"], Location.parse(tmp_path), "run7")
    for row in ROWS:
        sink.write(row)
    sink.flush()
    assert list((tmp_path / "wandb").rglob("*run7.wandb"))
