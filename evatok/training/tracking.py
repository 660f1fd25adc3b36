"""Curves for TensorBoard and Weights & Biases, beside our own. Their packages load only when asked for."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from evatok.artifacts import Location
from evatok.training.curves import ROW_KEYS, Sink

Tracker = Literal["tensorboard", "wandb"]


@contextmanager
def trackers(names: Sequence[Tracker], location: Location, run_id: str) -> Iterator[list[Sink]]:
    """The sinks of these names, which are finished and published at the block's end, also after an error.

    They write below ``location``, under ``tensorboard/`` and ``wandb/``. An attempt that goes on adds files
    to those of the one before.
    """
    made: dict[Tracker, Any] = {"tensorboard": _TensorBoard, "wandb": _Wandb}
    with ExitStack() as stack:
        sinks: list[Sink] = []
        for name in names:
            sink = made[name](_Folder(location, name), run_id)
            stack.callback(sink.close)
            sinks.append(sink)
        yield sinks


class _Folder:
    """A local folder for a package that can write to no other; copied to the storage at every flush."""

    def __init__(self, location: Location, name: str):
        self._location, self._name = location, name
        local = location.local()
        self._temporary = None if local else tempfile.TemporaryDirectory()
        self.path = local / name if local else Path(self._temporary.name)  # type: ignore[union-attr]
        self.path.mkdir(parents=True, exist_ok=True)
        if self._temporary and location.exists(name):  # an earlier attempt's
            location.download(name, self.path)

    def publish(self) -> None:
        if self._temporary:
            self._location.upload(self.path, self._name)


class _TensorBoard:
    def __init__(self, folder: _Folder, run_id: str):
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._writer = SummaryWriter(str(folder.path))  # type: ignore[no-untyped-call]

    def write(self, row: Mapping[str, Any]) -> None:
        for name, value in _figures(row).items():
            self._writer.add_scalar(name, value, row["step"], row["time"])  # type: ignore[no-untyped-call]

    def flush(self) -> None:
        self._writer.flush()  # type: ignore[no-untyped-call]
        self._folder.publish()

    def close(self) -> None:
        self._writer.close()  # type: ignore[no-untyped-call]
        self._folder.publish()


class _Wandb:
    """Offline unless WANDB_MODE says otherwise; ``wandb sync`` sends an offline run later.

    Rows are sure to be in its file when it is closed. Every attempt leaves a file of its own, all of the same
    run: ``wandb sync --append`` sends those after the first.
    """

    def __init__(self, folder: _Folder, run_id: str):
        import wandb

        self._folder = folder
        self._run = wandb.init(
            project="evatok",
            id=run_id,
            dir=str(folder.path),
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
            resume="allow",
        )

    def write(self, row: Mapping[str, Any]) -> None:
        self._run.log(_figures(row), step=row["step"])

    def flush(self) -> None:
        self._folder.publish()

    def close(self) -> None:
        self._run.finish()
        self._folder.publish()


def _figures(row: Mapping[str, Any]) -> dict[str, float]:
    return {f"{row['split']}/{name}": value for name, value in row.items() if name not in ROW_KEYS}
