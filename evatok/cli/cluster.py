"""``evatok submit``: an experiment as a job of a cluster."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from evatok.cli.console import Console
from evatok.errors import UserError


def submit(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    from evatok.config import dump
    from evatok.distributed import jobs
    from evatok.experiment import read_experiment

    experiment = read_experiment(args.experiment, args.overrides)
    if experiment.location.local() and not Path(experiment.storage).is_absolute():
        raise UserError(
            f"{args.experiment}: storage: {experiment.storage!r} would lie in the job's own folder, which "
            "Ray deletes. Give a URI or an absolute path that every node sees: --set storage=..."
        )
    console.log("submit", f"after a failure or Ctrl-C, to go on: {args.again}")
    job = jobs.submit(
        dump(experiment),
        name=experiment.name,
        run=experiment.location.uri,
        until=args.until,
        redo=args.redo,
        address=args.address,
        follow=not args.no_follow,
        log=lambda message: console.log("submit", message),
        show=console.show,
    )
    return {"job": job.id, "run": experiment.location.uri, "status": job.status}
