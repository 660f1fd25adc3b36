"""The commands that work on runs: run, plan, status, index, eval, report, tune; and bench."""

from __future__ import annotations

import argparse
import importlib
import logging
import pkgutil
from dataclasses import asdict
from typing import Any, get_type_hints

from evatok.cli.console import Console, duration
from evatok.errors import UserError


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    return _run(args, console, until=args.until, redo=args.redo)


def index(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    if args.download:
        args.overrides.append("index.source.download=true")
    if args.materialize is not None:
        args.overrides.append(f"index.materialize={args.materialize}")
    return _run(args, console, until="index", refresh="index")


def _run(args: argparse.Namespace, console: Console, **options: str | None) -> dict[str, Any]:
    from evatok import experiment as experiments

    experiment = experiments.open_experiment(args.experiment, args.overrides)
    console.run = experiment.location
    result = experiments.run(experiment, console, address=args.address, **options)
    console.end()
    for stage in result.stages:
        figures = ", ".join(f"{name} {_figure(value)}" for name, value in stage.metrics.items())
        seconds = "done already" if stage.skipped else duration(stage.seconds)
        console.show(f"{stage.name:<10} {seconds:<13} {figures}".rstrip())
    console.show(f"report: {result.report}")
    return {
        "run": result.location.uri,
        "report": result.report,
        "stages": [asdict(stage) for stage in result.stages],
    }


def plan(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    from evatok import experiment as experiments

    experiment = experiments.open_experiment(args.experiment, args.overrides)
    resources = experiment.resources
    console.show(f"run {experiment.location.uri}, seed {experiment.seed}")
    console.show(
        f"{resources.workers} training workers with {resources.cpus_per_worker:g} CPUs"
        f"{' and 1 GPU' if resources.use_gpu else ''} each"
    )
    stages = []
    for entry in experiments.plan(experiment):
        described = entry.describe(experiment)
        console.show(f"\n{entry.name}: {_STATES[entry.state]}")
        console.show(f"  reads {', '.join(entry.inputs) or 'no other stage'}")
        console.show(f"  leaves {', '.join(entry.stage.outputs)} in {entry.location.uri}")
        for name, parameters in described.models.items():
            console.show(f"  {name}: {parameters:,} parameters")
        if described.compute:
            console.show(f"  compute about {described.compute:.2g} FLOP")
        for line in (*described.notes, *entry.drift):
            console.show(f"  {line}")
        stages.append(
            {
                "name": entry.name,
                "done": entry.state == "done",
                "state": entry.state,
                "drift": list(entry.drift),
                "inputs": list(entry.inputs),
                "outputs": list(entry.stage.outputs),
                "models": {name: {"parameters": count} for name, count in described.models.items()},
                "compute": described.compute,
            }
        )
    return {"run": experiment.location.uri, "stages": stages}


_STATES = {
    "done": "done, will be skipped",
    "partial": "begun, will go on",
    "missing": "will run",
    "drifted": "made from another config, a run would stop here",
}


def status(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    from evatok import experiment as experiments
    from evatok.artifacts import read_curves

    experiment = experiments.open_experiment(args.experiment, args.overrides)
    console.show(f"run {experiment.location.uri}")
    stages = []
    for entry in experiments.plan(experiment):
        manifest = entry.manifest
        curves = read_curves(entry.location)
        step = curves[-1]["step"] if curves else None
        seconds = manifest.seconds if manifest else 0.0
        metrics = manifest.metrics if manifest else {}
        figures = ", ".join(f"{name} {_figure(value)}" for name, value in metrics.items())
        at = "" if step is None else f"step {step}"
        spent = duration(seconds) if entry.state == "done" else ""
        console.show(f"{entry.name:<10} {entry.state:<8} {spent:<11} {at:<11} {figures}".rstrip())
        stages.append(
            {"name": entry.name, "state": entry.state, "step": step, "seconds": seconds, "metrics": metrics}
        )
    return {"run": experiment.location.uri, "stages": stages}


def evaluate(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    from evatok import experiment as experiments
    from evatok.stages.evaluate import evaluation

    experiment = experiments.open_experiment(args.experiment, args.overrides)
    console.run = experiment.location
    result = experiments.run(experiment, console, only="evaluate", redo=args.redo, address=args.address)
    console.end()
    summary = evaluation(experiment.location)
    for name, figures in summary["policies"].items():
        console.show(f"{name:<20} {', '.join(f'{key} {_figure(value)}' for key, value in figures.items())}")
    console.show(f"report: {result.report}")
    return summary


def report(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    from evatok import experiment as experiments
    from evatok.artifacts import Location
    from evatok.report.page import write_report
    from evatok.report.sweep import write_sweep_report

    folder = Location.parse(args.experiment)
    if folder.exists("sweep.json"):
        uri = write_sweep_report(folder)
    else:
        folder = experiments.open_experiment(args.experiment, args.overrides).location
        if not folder.exists("experiment.yaml"):
            raise UserError(f"{folder.uri}: no run is there yet; start it with `evatok run`.")
        uri = write_report(folder)
    console.show(f"report: {uri}")
    return {"run": folder.uri, "report": uri}


def tune(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    from evatok import sweep as sweeps

    sweep = sweeps.open_sweep(args.sweep, args.overrides)
    console.run = sweep.location
    result = sweeps.run(sweep, console, address=args.address)
    console.end()
    for trial in result.trials:
        settings = ", ".join(f"{key} {_figure(value)}" for key, value in trial.settings.items())
        figures = ", ".join(f"{name} {_figure(value)}" for name, value in trial.metrics.items())
        console.show(f"{trial.name} {trial.state:<8} {settings}: {figures}")
    console.show(f"best: {', '.join(result.best)}; to run it whole: evatok run {result.export}")
    console.show(f"report: {result.report}")
    return {
        "sweep": sweep.location.uri,
        "trials": [asdict(trial) for trial in result.trials],
        "best": list(result.best),
        "export": result.export,
        "report": result.report,
    }


def bench(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    import evatok.benchmarks

    names = [module.name for module in pkgutil.iter_modules(evatok.benchmarks.__path__)]
    if args.name is None:
        console.show("\n".join(names))
        return {"benchmarks": names}
    if args.name == "all":
        return {name: _measure(name, args, console) for name in names}
    if args.name not in names:
        raise UserError(f"bench {args.name}: no such benchmark. There are: all, {', '.join(names)}.")
    return _measure(args.name, args, console)


def _measure(name: str, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    from evatok.config import parse

    module = importlib.import_module(f"evatok.benchmarks.{name}")
    (settings,) = (kind for key, kind in get_type_hints(module.run).items() if key != "return")
    overrides = list(args.overrides)
    if args.device is not None and (args.name != "all" or "device" in settings.model_fields):
        overrides.append(f"device={args.device}")
    parsed = parse("{}", settings, f"bench {name}", overrides)
    steps, shown = logging.getLogger(module.__name__), _Shown(name, console)
    steps.setLevel(logging.INFO)
    steps.addHandler(shown)
    try:
        figures = module.run(parsed)
    finally:
        steps.removeHandler(shown)
    for key, value in figures.items():
        console.show(f"{name} {key}: {_figure(value)}")
    return dict(figures)


class _Shown(logging.Handler):
    """Shows what a benchmark has come to."""

    def __init__(self, name: str, console: Console) -> None:
        super().__init__()
        self._name, self._console = name, console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.log(self._name, record.getMessage())


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
