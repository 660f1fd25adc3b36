"""Every command of the README does what it says: run on the tiny experiment, in the README's order."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evatok.video.synthetic import write_videos

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

# Commands that need more than a finished run, and the tests that run them.
ELSEWHERE = {
    "evatok submit": "tests/distributed/test_jobs.py",
    "evatok tune": "tests/cli/test_tune.py",
    "make quickstart": "tests/test_makefile.py",
    "make test": "tests/test_makefile.py",
    "source .venv/bin/activate": "tests/test_makefile.py",
}
BIN = Path(sys.executable).parent  # what `source .venv/bin/activate` puts on the path


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.mark.parametrize("command", commands())
def test_readme_command_works(command: str, tiny_run: Path, tmp_path: Path) -> None:
    for begin, test in ELSEWHERE.items():
        if command.startswith(begin):
            assert (ROOT / test).exists(), test
            return
    words = shlex.split(command)
    assert words[0] == "evatok", command
    video = tmp_path / "video.mp4"
    shutil.copy(tmp_path / write_videos(tmp_path, 1, seed=3)[0].name, video)
    if "decode" in words:
        encode = next(other for other in commands() if other.startswith("evatok encode"))
        assert run(encode, tiny_run, tmp_path).returncode == 0
    done = run(command, tiny_run, tmp_path)
    assert done.returncode == 0, done.stderr
    if "--json" in words:
        assert isinstance(json.loads(done.stdout.splitlines()[-1]), dict)
    if "--output" in words:
        assert (tmp_path / words[words.index("--output") + 1]).stat().st_size > 0


def run(command: str, tiny_run: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a README command as a shell would, with the tiny run in place of the quickstart's."""
    words = shlex.split(command)
    if "experiments/quickstart.yaml" in words:
        words[words.index("experiments/quickstart.yaml")] = str(ROOT / "experiments" / "tiny.yaml")
        words += ["--set", f"storage={tiny_run.parent}"]
        if "--redo" in words:
            words += ["--set", "resources.workers=0"]  # the run itself was trained by workers
    words = [str(tiny_run) if word == "runs/quickstart" else word for word in words]
    path = f"{BIN}:{os.environ['PATH']}"
    words[0] = shutil.which(words[0], path=path) or words[0]
    return subprocess.run(
        words, cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=600
    )


def test_readme_puts_evatok_on_the_path_before_it_is_called() -> None:
    assert commands().index("source .venv/bin/activate") < min(
        at for at, command in enumerate(commands()) if command.startswith("evatok")
    )


def test_readme_names_only_files_that_exist() -> None:
    named = set(re.findall(r"`((?:experiments|cluster|evatok|tests)/[^`]*)`", README))
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_readme_lists_every_shipped_experiment() -> None:
    for file in (ROOT / "experiments").glob("*.yaml"):
        assert f"experiments/{file.name}" in README
