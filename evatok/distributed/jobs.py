"""Send an experiment to a cluster as a Ray job and follow it.

The job gets the code and the merged experiment, a few hundred kilobytes; dependencies are the image's. A job
runs once and dies with its cluster; submitted again it goes on, because the run lives on storage.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.job_submission import JobStatus, JobSubmissionClient

from evatok.distributed.cluster import use_token
from evatok.errors import UserError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_STARTING_SECONDS = 120.0
_RUN = "evatok_run"  # in a job's metadata: the run that it works on
_TASK = "evatok_task"  # a digest of its config and its last stage
_REDO = "evatok_redo"  # and the stage that it makes anew


@dataclass(frozen=True)
class Job:
    """A submitted job. ``status``: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""

    id: str
    status: str


def submit(
    experiment: str,
    *,
    name: str,
    run: str,
    until: str | None,
    redo: str | None,
    address: str | None,
    follow: bool,
    log: Callable[[str], None],
    show: Callable[[str], None],
) -> Job:
    """Start ``evatok run`` on the cluster whose job server is at ``address``; with ``follow`` show its log.

    ``experiment``: the merged experiment as YAML; ``run``: its folder's URI; ``until`` and ``redo``: as
    ``evatok run`` has them. When a job is doing the same already, that one is followed and none is started,
    also without the ``redo`` that it was started with.
    Raises UserError when no server answers or it refuses the token, when a job works on this run with another
    config or other options, and when the job ended with exit code 2; RuntimeError when it failed otherwise.
    """
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    client = _client(address)
    options = [f"--{key}={stage}" for key, stage in (("until", until), ("redo", redo)) if stage]
    task = hashlib.sha256(f"{experiment}\0{until}".encode()).hexdigest()[:16]
    found = _working_on(client, run)
    if found is None:
        job = _start(client, experiment, name, options, {_RUN: run, _TASK: task, _REDO: redo or ""})
        log(f"job {job} started; its run: {run}")
    else:
        job, its = found
        if its.get(_TASK) != task or redo not in (None, its.get(_REDO)):
            raise UserError(
                f"job {job} is working on {run} with another config or other options. Stop it first"
                f" (ray job stop {job} --address {address}), or give this experiment another name"
                " (--set name=...)."
            )
        log(f"job {job} is working on {run} already")
    log(f"log: ray job logs --follow {job} --address {address}")
    log(f"stop: ray job stop {job} --address {address}")
    if not follow:
        return Job(job, str(client.get_job_status(job).value))
    asyncio.run(_tail(client, job, show))
    while not (status := client.get_job_status(job)).is_terminal():
        time.sleep(1)
    details = client.get_job_info(job)
    if status == JobStatus.FAILED and details.driver_exit_code == 2:
        raise UserError(f"job {job} ended: its input is wrong, see its log above.")
    if status != JobStatus.SUCCEEDED:
        raise RuntimeError(
            f"job {job} {status.value}: {details.message}\nSubmit again to go on from what is finished."
        )
    return Job(job, str(status.value))


def _client(address: str) -> JobSubmissionClient:
    use_token()
    # These would silently win over the address that was asked for.
    taken = {key: os.environ.pop(key, None) for key in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    try:
        client = JobSubmissionClient(address)
        client.list_jobs()
    except (ConnectionError, RuntimeError) as error:
        raise UserError(
            f"{address}: {error}\nIs the dashboard's port forwarded to here, and is the cluster's token in "
            "RAY_AUTH_TOKEN or in the file that RAY_AUTH_TOKEN_PATH names?"
        ) from error
    finally:
        os.environ.update({key: value for key, value in taken.items() if value is not None})
    return client


def _working_on(client: JobSubmissionClient, run: str) -> tuple[str, dict[str, str]] | None:
    """The job that works on ``run``, and its metadata."""
    jobs: list[JobDetails] = client.list_jobs()
    for job in jobs:
        metadata = job.metadata or {}
        if metadata.get(_RUN) == run and not job.status.is_terminal():
            return str(job.submission_id), metadata
    return None


def _start(
    client: JobSubmissionClient,
    experiment: str,
    name: str,
    options: Sequence[str],
    metadata: dict[str, str],
) -> str:
    with tempfile.TemporaryDirectory(prefix="evatok-job-") as folder:
        package = Path(__file__).parents[1]
        shutil.copytree(package, Path(folder) / package.name, ignore=shutil.ignore_patterns("__pycache__"))
        (Path(folder) / "experiment.yaml").write_text(experiment, encoding="utf-8")
        deadline = time.monotonic() + _STARTING_SECONDS
        while True:
            try:
                return str(
                    client.submit_job(
                        entrypoint=shlex.join(
                            ["python", "-m", "evatok.cli", "run", "experiment.yaml", *options]
                        ),
                        submission_id=f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
                        runtime_env={"working_dir": folder},
                        metadata=metadata,
                    )
                )
            except RuntimeError as error:  # a head node that has just started answers before it takes jobs
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(2)


async def _tail(client: JobSubmissionClient, job: str, show: Callable[[str], None]) -> None:
    async for text in client.tail_job_logs(job):
        show(text.rstrip("\n"))
