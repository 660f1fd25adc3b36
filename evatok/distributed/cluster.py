"""Start a local Ray or join a cluster, the same way for every command.

Which one: ``address`` if given, else ``RAY_ADDRESS`` (``ray job submit`` sets it for its entrypoint), else a
local Ray that ends with the process. A local Ray has token authentication on and no dashboard; its
token lives in a private temporary file, never in ``~/.ray``.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from evatok.errors import UserError

_MIB = 2**20
DATA_CPUS = 2  # logical CPUs of a local Ray that are left for decoding beside the training workers


@dataclass(frozen=True)
class Cluster:
    """The Ray we are connected to: its address and what it has in all.

    ``local``: it is ours and ends with us.
    """

    address: str
    local: bool
    nodes: int
    cpus: float
    gpus: float


@contextlib.contextmanager
def connected(address: str | None = None, *, cpus: float = 0) -> Iterator[Cluster]:
    """``connect`` for the time of a block; a connection that was there before is used and left alone."""
    import ray

    if ray.is_initialized():
        yield describe()
        return
    cluster = connect(address, cpus=cpus)
    try:
        yield cluster
    finally:
        shutdown()


def connect(address: str | None = None, *, cpus: float = 0) -> Cluster:
    """Join the cluster at ``address`` or ``RAY_ADDRESS``, or start a local Ray.

    ``cpus``: logical CPUs that the work needs at once; a local Ray gets at least those and the machine's
    cores. Raises UserError when the cluster cannot be reached or refuses the token.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths mean the same in every process
    if address in (None, "local"):
        return _start(cpus)
    assert address is not None
    return _join(address)


def shutdown() -> None:
    """Leave the cluster; a local Ray ends."""
    import ray

    ray.shutdown()


def _start(cpus: float) -> Cluster:
    if "RAY_AUTH_TOKEN" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(_private_token())
    os.environ.setdefault("RAY_worker_niceness", "0")  # else whatever else the machine does comes first
    _authenticate()
    import ray

    ray.init(
        address="local",
        num_cpus=max(len(os.sched_getaffinity(0)), round(cpus)),
        object_store_memory=_object_store_bytes(),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    _mute()
    return describe()


def _mute() -> None:
    """Keep the warnings of our own raylet (slow starts, many workers) off the screen; they are in its log.

    Ray prints them to stderr from a thread that no setting turns off.
    """
    from ray._private.worker import global_worker

    global_worker.threads_stopped.set()
    global_worker.gcs_error_subscriber.close()


def _join(address: str) -> Cluster:
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"{address} is the address of a job server. Use `evatok submit EXPERIMENT --address {address}`, "
            "or give `--address HOST:6379` on a machine of the cluster."
        )
    use_token()
    import ray
    from ray.exceptions import AuthenticationError

    try:
        ray.init(
            address=address,
            runtime_env=None if inside_job() else {"py_modules": [str(Path(__file__).parents[1])]},
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except AuthenticationError as error:
        raise UserError(
            f"The cluster at {address} refused us: {error}\n"
            "Put its token into RAY_AUTH_TOKEN, or the path of a file with it into RAY_AUTH_TOKEN_PATH."
        ) from error
    except (ConnectionError, ValueError) as error:
        raise UserError(f"No Ray cluster answers at {address}: {error}") from error
    return describe()


def use_token() -> None:
    """Send the token with every call if there is one: Ray itself does so only once it is told the mode."""
    given = any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if given or (Path.home() / ".ray" / "auth_token").exists():
        _authenticate()


def inside_job() -> bool:
    """Whether this process is the entrypoint of a Ray job, whose code and environment Ray already ships."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def share_of_cores(cpus: float) -> int:
    """Threads for a task that holds ``cpus`` logical CPUs of the node it runs on, at least 1.

    Its share of the cores there: Ray itself would give it a thread per logical CPU, of which a node may have
    more than cores, and threads that outnumber the cores wait for each other.
    """
    import ray

    here = ray.get_runtime_context().get_node_id()
    logical = next(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["NodeID"] == here)
    return max(1, int(len(os.sched_getaffinity(0)) * cpus / max(logical, cpus)))


def describe() -> Cluster:
    """The cluster that this process is connected to, as it is now; it may grow and shrink."""
    import ray
    from ray._private.worker import _global_node

    total = ray.cluster_resources()
    return Cluster(
        address=ray.get_runtime_context().gcs_address,
        local=_global_node.is_head(),
        nodes=sum(node["Alive"] for node in ray.nodes()),
        cpus=total.get("CPU", 0.0),
        gpus=total.get("GPU", 0.0),
    )


def _authenticate() -> None:
    """Turn token authentication on for this process and what it starts, unless the user chose a mode."""
    if "RAY_AUTH_MODE" in os.environ:
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    if "ray" in sys.modules:
        from ray._raylet import Config

        Config.initialize("")  # ray read the environment when it was imported


def _private_token() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="evatok-ray-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    token = folder / "auth_token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    return token


def _object_store_bytes() -> int:
    """A tenth of the memory: clips pass through, nothing stays.

    Ray puts the store on disk by itself where /dev/shm is smaller than this.
    """
    from ray._common.utils import get_system_memory

    return int(min(max(get_system_memory() // 10, 256 * _MIB), 16384 * _MIB))
