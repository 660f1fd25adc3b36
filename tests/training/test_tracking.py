"""TensorBoard and Weights & Biases get the rows of the curves."""

import json
import struct
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

    with trackers(["tensorboard"], Location.parse(tmp_path), "run") as (sink,):
        for row in ROWS:
            sink.write(row)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "eval/loss"}
    assert [(e.step, e.wall_time) for e in events.Scalars("train/loss")] == [(1, 1001), (2, 1002), (3, 1003)]
    assert [e.value for e in events.Scalars("eval/loss")] == pytest.approx([1, 1 / 2, 1 / 3])


@pytest.mark.slow
def test_wandb_keeps_the_rows_of_an_offline_run_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)

    def diverge() -> None:
        with trackers(["wandb"], Location.parse(tmp_path), "run7") as (sink,):
            for row in ROWS:
                sink.write(row)
            raise RuntimeError("diverged")

    with pytest.raises(RuntimeError, match="diverged"):
        diverge()
    (file,) = (tmp_path / "wandb").rglob("*run7.wandb")
    assert [row["_step"] for row in history(file)] == [1, 2, 3]
    assert [row["eval/loss"] for row in history(file)] == pytest.approx([1, 1 / 2, 1 / 3])


def history(file: Path) -> list[dict[str, float]]:
    """The rows of an offline run: a LevelDB log of protobuf records after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts, rows = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            if record.HasField("history"):
                items = record.history.item
                rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
    return rows
