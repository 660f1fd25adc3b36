"""Experiments as jobs of a cluster that ``ray start`` made: the documented commands, for real."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.job_submission import JobStatus

from evatok.artifacts import Location, read_manifest
from evatok.cli import main

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def command(*words: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500, check=False)


def test_job_runs_the_first_stage_and_submitted_again_it_skips_what_is_done(start_ray, tmp_path, capsys):
    head = start_ray("--num-cpus=0")
    head.start_node("--num-cpus=4")
    experiment = ["experiments/tiny.yaml", "--set", f"storage={tmp_path}", "--until", "index"]
    first = command(
        *("ray", "job", "submit", "--address", head.dashboard, "--working-dir", "."),
        *("--", "evatok", "run", *experiment),
    )
    log = first.stdout + first.stderr
    assert first.returncode == 0, log
    assert "succeeded" in log
    assert "index     done in" in log
    run = Location.parse(tmp_path) / "tiny"
    made = read_manifest(run / "index")
    assert made.state == "done"

    assert main(["submit", *experiment, "--address", head.dashboard, "--json"]) == 0
    captured = capsys.readouterr()
    assert "index     done already" in captured.err
    result = json.loads(captured.out.splitlines()[-1])
    assert (result["run"], result["status"]) == (run.uri, "SUCCEEDED")
    assert read_manifest(run / "index") == made

    assert main(["submit", *experiment, "--address", head.dashboard, "--set", "seed=7"]) == 2
    captured = capsys.readouterr()
    assert "seed: was 0, is 7" in captured.out
    assert "its input is wrong" in captured.err


@pytest.mark.slow
def test_job_runs_the_whole_chain(start_ray, tmp_path):
    head = start_ray("--num-cpus=4")
    done = command(
        *("ray", "job", "submit", "--address", head.dashboard, "--working-dir", "."),
        *("--", "evatok", "run", "experiments/tiny.yaml", "--set", f"storage={tmp_path}"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "tiny" / "report.html").is_file()


def test_storage_inside_the_job_is_refused(capsys):
    assert main(["submit", "experiments/tiny.yaml"]) == 2
    assert "--set storage=" in capsys.readouterr().err


def test_server_that_does_not_answer_is_named(capsys, tmp_path):
    words = [
        "submit",
        "experiments/tiny.yaml",
        "--set",
        f"storage={tmp_path}",
        "--address",
        "http://127.0.0.1:9",
    ]
    assert main(words) == 2
    assert "http://127.0.0.1:9" in capsys.readouterr().err


class Server:
    """A job server with one ended job and whatever is submitted to it; jobs run until somebody stops them."""

    def __init__(self) -> None:
        self.jobs = [self._job("ended", {"evatok_run": "elsewhere"}, JobStatus.FAILED)]

    def _job(self, name, metadata, status):
        return SimpleNamespace(submission_id=name, metadata=metadata, status=status)

    def list_jobs(self):
        return self.jobs

    def submit_job(self, *, entrypoint, submission_id, runtime_env, metadata):
        self.jobs.append(self._job(submission_id, metadata, JobStatus.RUNNING))
        self.entrypoint = entrypoint
        return submission_id

    def get_job_status(self, name):
        return JobStatus.RUNNING


@pytest.mark.parametrize(
    ("again", "code"),
    [([], 0), (["--redo=router"], 0), (["--redo=index"], 2), (["--until=proxy"], 2), (["--set=seed=7"], 2)],
)
def test_job_that_does_the_same_is_followed_also_without_its_redo(monkeypatch, tmp_path, capsys, again, code):
    server = Server()
    monkeypatch.setattr("evatok.distributed.jobs._client", lambda address: server)
    words = ["submit", "experiments/tiny.yaml", "--set", f"storage={tmp_path}", "--no-follow"]
    assert main([*words, "--redo", "router"]) == 0
    assert server.entrypoint.endswith("run experiment.yaml --redo=router")
    assert f"to go on: evatok {' '.join(words)}\n" in capsys.readouterr().err
    assert main([*words, *again]) == code
    assert len(server.jobs) == 2
    job = server.jobs[-1].submission_id
    assert (f"ray job stop {job}" if code else f"{job} is working on") in capsys.readouterr().err
