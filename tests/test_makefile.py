"""The two commands are what the README says they are."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def recipe(*words: str) -> str:
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", *words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_quickstart_installs_once_and_runs_the_shipped_experiment() -> None:
    made = recipe("quickstart")
    assert made.index("-m venv .venv") < made.index("cluster/requirements.txt")
    assert "evatok run experiments/quickstart.yaml" in made


def test_quickstart_takes_a_folder_of_videos() -> None:
    made = recipe("quickstart", "CLIPS=/some/my clips")
    assert "index.source.path=/some/my clips" in made
    assert "index.source.kind=folder" in made


def test_make_test_runs_the_suite() -> None:
    assert "-m pytest" in recipe("test")
