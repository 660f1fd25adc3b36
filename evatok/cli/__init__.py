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

from evatok import __version__
from evatok.cli.console import Console
from evatok.errors import UserError

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 the input is wrong, 1 a fault (traceback in a log file), 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(words)
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
            print(f"\nInterrupted; what was finished is kept. To go on:\n  {_again(words)}", file=sys.stderr)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="evatok", description="Adaptive-length video tokenizers on Ray.")
    parser.add_argument("--version", action="version", version=f"evatok {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, function: str, about: str, keys: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=about,
            description=about[0].upper() + about[1:] + ".",
            epilog=f"With --json the last line of stdout is one JSON object: {keys}.",
        )
        added.add_argument("--json", action="store_true", help="print the result as one line of JSON")
        added.set_defaults(command=function)
        return added

    stages = "stages [{name, skipped, seconds, metrics}]"
    run = command("run", "runs:run", "run an experiment's stages", f"{{run, report, {stages}}}")
    _experiment(run)
    _address(run)
    run.add_argument("--until", metavar="STAGE", help="stop after this stage")
    run.add_argument(
        "--redo", metavar="STAGE", help="delete this stage's result and what depends on it first"
    )

    plan = command(
        "plan",
        "runs:plan",
        "show what a run would do, and start nothing",
        "{run, stages [{name, done, state, drift, inputs, outputs, models {name: {parameters}}, compute}]}",
    )
    _experiment(plan)
    status = command(
        "status",
        "runs:status",
        "show how far a run is",
        "{run, stages [{name, state, step, seconds, metrics}]}",
    )
    _experiment(status)

    index = command("index", "runs:index", "index an experiment's videos", f"{{run, report, {stages}}}")
    _experiment(index)
    _address(index)

    report = command("report", "runs:report", "write a run's HTML report", "{run, report}")
    _experiment(report)

    tune = command(
        "tune",
        "runs:tune",
        "search over an experiment's settings",
        "{sweep, trials [{name, settings, metrics, state}], best [name], export}",
    )
    tune.add_argument("sweep", metavar="SWEEP", help="sweep file (*.yaml)")
    tune.add_argument("--set", **_SET)
    _address(tune)

    bench = command("bench", "runs:bench", "measure this machine", "the benchmark's figures")
    bench.add_argument("name", metavar="NAME", nargs="?", help="which benchmark; without it, they are listed")
    bench.add_argument("--set", **_SET)
    return parser


_SET: dict[str, Any] = {
    "action": "append",
    "default": [],
    "metavar": "KEY=VALUE",
    "dest": "overrides",
    "help": "change one setting (dotted key, value as in YAML); may be given again",
}


def _experiment(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", metavar="EXPERIMENT", help="experiment file (*.yaml) or a run's folder")
    parser.add_argument("--set", **_SET)


def _address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", help="Ray cluster (HOST:PORT); else RAY_ADDRESS, else a local Ray")
