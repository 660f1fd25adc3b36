"""``evatok``: the command line. Imports what a command needs when the command runs, not before."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from evatok.cli.console import Console
from evatok.cli.parser import parser
from evatok.errors import UserError

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 the input is wrong, 1 a fault (traceback in a log file), 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(words)
    args.again = _again(words)
    module, _, function = args.command.partition(":")
    with contextlib.suppress(ValueError):  # not the main thread: whoever runs us handles signals
        signal.signal(signal.SIGTERM, _interrupt)
    with Console(people=sys.stderr if args.json else sys.stdout) as console:
        try:
            command: Callable[[argparse.Namespace, Console], dict[str, Any]]
            command = getattr(importlib.import_module(f"evatok.cli.{module}"), function)
            result = command(args, console)
        except UserError as error:
            print(f"evatok: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            console.end()
            print(f"\nInterrupted; what was finished is kept. To go on:\n  {args.again}", file=sys.stderr)
            return INTERRUPTED
        except Exception as error:
            console.end()
            print(f"evatok: {type(error).__name__}: {error}", file=sys.stderr)
            print(f"This is a fault of evatok or of the machine. Traceback: {_log(console)}", file=sys.stderr)
            return 1
    if args.json:
        print(json.dumps(result), flush=True)
    return 0


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _again(words: Sequence[str]) -> str:
    """The same command, without ``--redo``: what it deletes is deleted already."""
    kept, skip = [], False
    for word in words:
        if not skip and word != "--redo" and not word.startswith("--redo="):
            kept.append(word)
        skip = word == "--redo"
    return shlex.join(["evatok", *kept])


def _log(console: Console) -> str:
    """Write the traceback where the run lives, or where that fails into the temporary folder."""
    name = f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    text = traceback.format_exc()
    if console.run is not None:
        with contextlib.suppress(Exception):
            console.run.write_bytes(f"logs/{name}", text.encode())
            return f"{console.run.uri}/logs/{name}"
    path = os.path.join(tempfile.gettempdir(), f"evatok-{name}")
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    return path
