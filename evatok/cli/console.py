"""What a person sees while a command runs: bars on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from evatok.artifacts import Location

LINE_SECONDS = 10.0


class Console:
    """The command line's ``Listener``. Progress goes to stderr, a command's own text to ``people``.

    ``run``: the folder that the command works on, once it is known; a traceback is left there.
    """

    def __init__(self, people: TextIO) -> None:
        self.run: Location | None = None
        self._people = people
        self._bars = _bars() if sys.stderr.isatty() else None
        self._tasks: dict[str, TaskID] = {}
        self._since: dict[str, tuple[float, int]] = {}
        self._printed: dict[str, float] = {}

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def end(self) -> None:
        """Take the bars off the screen."""
        if self._bars is not None:
            self._bars.stop()

    def show(self, text: str) -> None:
        """Print the text that the command was asked for."""
        print(text, file=self._people, flush=True)

    def log(self, stage: str, message: str) -> None:
        line = f"{stage:<9} {message}"
        if self._bars is not None and self._bars.live.is_started:
            self._bars.console.print(line, highlight=False, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def progress(self, stage: str, done: int, total: int, unit: str, figures: Mapping[str, float]) -> None:
        text = " ".join(f"{name} {value:.4g}" for name, value in figures.items())
        if self._bars is not None:
            self._draw(stage, done, total, unit, text)
            return
        now = time.monotonic()
        began, first = self._since.setdefault(stage, (now, done))
        if done < total and now - self._printed.get(stage, began - LINE_SECONDS) < LINE_SECONDS:
            return
        self._printed[stage] = now
        left = ""
        if done > first:
            left = f", {duration((total - done) * (now - began) / (done - first))} left"
        self.log(stage, f"{done}/{total} {unit}{left}{', ' if text else ''}{text}")

    def _draw(self, stage: str, done: int, total: int, unit: str, text: str) -> None:
        assert self._bars is not None
        self._bars.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, unit=unit, figures="")
        self._bars.update(self._tasks[stage], completed=done, total=total, unit=unit, figures=text)


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _bars() -> Progress:
    from rich.console import Console as Terminal
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description:<9}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=Terminal(stderr=True),
    )
