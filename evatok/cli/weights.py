"""``evatok weights``: list the pretrained weights that are found, or fetch some."""

from __future__ import annotations

import argparse
from typing import Any

from evatok.cli.console import Console


def command(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    from evatok import weights

    found = []
    for name in args.names or (*weights.FILES, *weights.MODELS):
        path = weights.fetch(name) if args.names else weights.locate(name)
        console.show(f"{name:<30} {path or 'not found'}")
        found.append({"name": name, "path": str(path) if path else None})
    return {"weights": found}
