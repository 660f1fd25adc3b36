"""Calls into media libraries that may crash, hang or eat memory, made in a child process that can be lost.

The child is started at the first call and kept: a call then costs a round trip over a pipe. Only our own two
processes speak over that pipe.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from evatok.video.decode import DecodeError

P = ParamSpec("P")
R = TypeVar("R")

GRACE = 5.0
"""Seconds on top of a call's own time limit before the process that hangs in it is ended."""


class Guard:
    """Runs one call at a time in a child process; use as a context manager or call `close`."""

    def __init__(self, time_limit: float, memory: int = 4 << 30) -> None:
        """`time_limit`: seconds a call may take; `memory`: bytes of address space the child may hold."""
        self._time_limit = time_limit
        self._memory = memory
        self._child: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def __call__(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """What `function(*args)` returns or raises. The function is importable, all values picklable.

        Raises DecodeError `crash` when the child dies of the call and `timeout` when it does not come back.
        """
        pipe = self._asked((function, args, kwargs))
        if not pipe.poll(self._time_limit + GRACE):
            self.close()
            raise DecodeError("timeout", f"{args[0]}: no answer within {self._time_limit:g} s")
        try:
            value, error = pipe.recv()
        except (EOFError, OSError):
            raise DecodeError("crash", f"{args[0]}: the decoder died of it ({self._cause()})") from None
        if error is not None:
            raise error
        returned: R = value
        return returned

    def __enter__(self) -> Guard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child; the next call starts another."""
        if self._child is not None and self._pipe is not None:
            self._child.kill()
            self._child.wait()
            self._pipe.close()
        self._child = self._pipe = None

    def _asked(self, call: tuple[Any, ...]) -> Connection:
        """The pipe, with the call sent into it; to another child where the last one died while idle."""
        try:
            self._started().send(call)
        except ConnectionError:
            self.close()
            self._started().send(call)
        return self._started()

    def _started(self) -> Connection:
        if self._pipe is None:
            self._pipe, theirs = Pipe()
            self._child = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), str(self._memory)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            theirs.close()
        return self._pipe

    def _cause(self) -> str:
        assert self._child is not None
        code = self._child.wait()
        self.close()
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def serve(pipe: Connection, memory: int) -> None:
    """Answer calls until the other side is gone."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            return
        answer: tuple[Any, BaseException | None]
        try:
            answer = function(*args, **kwargs), None
        except Exception as error:
            answer = None, error
        pipe.send(answer)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
