"""Fixtures for everyone, and the order of the suite: tests marked ``alone`` run last."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import pytest
from pydantic import Field

from evatok import experiment as experiments
from evatok.artifacts import Location
from evatok.config import OPERATIONAL, Config
from evatok.stages.stage import Description, Stage, StageContext

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("RAY_worker_niceness", "0")

_scratch = tempfile.TemporaryDirectory(prefix="evatok-tests-")
os.environ["RAY_AUTH_MODE"] = "token"
_token = Path(_scratch.name) / "ray_token"
_token.write_text(secrets.token_hex(32))
_token.chmod(0o600)
os.environ["RAY_AUTH_TOKEN_PATH"] = str(_token)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("alone") is not None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("alone"):
        _end_shared_cluster()


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder with real ``clips/`` and ``weights/``."""
    named = os.environ.get("EVATOK_TEST_DATA")
    if not named or not Path(named).is_dir():
        pytest.skip("EVATOK_TEST_DATA names no folder with clips/ and weights/")
    return Path(named).resolve()


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[str]:
    """A local Ray with 4 logical CPUs; yields its address.

    One per module: what a killed stream had reserved would otherwise stay reserved for the modules after it.
    """
    import ray

    _end_shared_cluster()  # Ray starts by itself where a test before used it without asking
    context = ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=400 * 2**20,
        log_to_driver=True,
        configure_logging=False,
    )
    yield str(context.address_info["gcs_address"])
    _end_shared_cluster()


def _end_shared_cluster() -> None:
    if "ray" in sys.modules:
        import ray

        ray.shutdown()


class ToyChain:
    """Three stages without Ray or torch in place of the real chain: index -> router -> evaluate.

    ``ran`` lists the stages as they run; a stage named in ``broken`` raises what is given there.
    """

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.broken: dict[str, BaseException] = {}

    def stage(self, name: str, config: type[Config], **extra: Any) -> Stage:
        def run(context: StageContext) -> dict[str, Any]:
            self.ran.append(name)
            attempts = context.location.list("attempts")
            context.location.write_bytes(f"attempts/{len(attempts)}", b"")
            context.progress(1, 2, "steps", loss=0.5)
            if name in self.broken:
                raise self.broken.pop(name)
            context.location.write_json("out.json", {"inputs": sorted(context.inputs)})
            return {"attempts": len(attempts) + 1}

        return Stage(name, config, run, outputs=("out.json",), **extra)


class ToyIndex(Config):
    videos: int = Field(default=3, ge=1)
    log_every: Annotated[int, OPERATIONAL] = 1
    reward: Annotated[float, OPERATIONAL] = 1.0


class ToyRouter(Config):
    lr: float = Field(default=0.1, gt=0, description="learning rate")
    batch: int = 4


class ToyEvaluate(Config):
    policies: tuple[str, ...] = ("uniform",)


def _divisible(config: ToyRouter, experiment: Any) -> Iterator[tuple[str, str]]:
    if config.batch % max(experiment.resources.workers, 1):
        yield "router.batch", f"{config.batch} cannot be split over {experiment.resources.workers} workers."


@pytest.fixture
def toy_chain(monkeypatch: pytest.MonkeyPatch) -> Iterator[ToyChain]:
    """Replaces the real stages; nothing connects to Ray and the report is one word."""
    chain = ToyChain()
    stages = [
        chain.stage("index", ToyIndex),
        chain.stage(
            "router",
            ToyRouter,
            inputs=("index",),
            reads=("index.reward",),
            check=_divisible,
            describe=lambda config, experiment: Description(models={"router": 1234}, compute=5e9),
        ),
        chain.stage("evaluate", ToyEvaluate, inputs=("router",)),
    ]
    monkeypatch.setattr(experiments, "CHAIN", tuple(stage.name for stage in stages))
    for stage in stages:
        monkeypatch.setitem(sys.modules, f"evatok.stages.{stage.name}", SimpleNamespace(STAGE=stage))
    monkeypatch.setattr(experiments, "_connect", lambda *_: None)
    monkeypatch.setattr("evatok.report.page.write_report", _write_toy_report)
    experiments.experiment_type.cache_clear()
    yield chain
    experiments.experiment_type.cache_clear()


def _write_toy_report(run: Location) -> str:
    run.write_bytes("report.html", b"report")
    return f"{run.uri}/report.html"


@dataclass(frozen=True)
class Head:
    """A head node of the test's own: its address, its job server, and the folder of its logs."""

    address: str
    dashboard: str
    metrics_port: int
    folder: str
    start_node: Callable[..., None]


@pytest.fixture
def start_ray(tmp_path: Path) -> Iterator[Callable[..., Head]]:
    """``start_ray("--num-cpus=0")`` is ``ray start --head``; ends with the test, and nothing else does.

    ``head.start_node("--num-cpus=4")`` adds a node. Every port is a free one: other clusters
    stay as they are.
    """
    folder = tempfile.mkdtemp(prefix="evr-", dir="/tmp")  # Ray's socket paths must be short
    processes: list[subprocess.Popen[bytes]] = []

    def start(*options: str, env: dict[str, str]) -> dict[str, int]:
        names = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")
        ports = {name: free_port() for name in (*names, "runtime-env-agent-port")}
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"]
        command += [f"--{name}={port}" for name, port in ports.items()]
        command += ["--object-store-memory=300000000", *options]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        log = open(f"{folder}/ray-start-{len(processes)}.log", "wb")  # noqa: SIM115 (the child's)
        processes.append(
            subprocess.Popen(
                command, env=os.environ | {"PATH": path} | env, stdout=log, stderr=log, start_new_session=True
            )
        )
        return ports

    def start_head(*options: str, autoscaling: Callable[[str], dict[str, Any]] | None = None) -> Head:
        port, dashboard = free_port(), free_port()
        env = {"RAY_raylet_start_wait_time_s": "300"}  # this machine may be busy
        if autoscaling is not None:
            from ray.util import get_node_ip_address

            launcher = autoscaling(f"{get_node_ip_address()}:{port}")
            Path(f"{folder}/launcher.json").write_text(json.dumps(launcher))
            options = (*options, f"--autoscaling-config={folder}/launcher.json")
            head_id = launcher["provider"]["head_node_id"]
            env |= dict.fromkeys(("RAY_CLOUD_INSTANCE_ID", "RAY_OVERRIDE_NODE_ID_FOR_TESTING"), head_id)
            env |= {
                "RAY_enable_autoscaler_v2": "1",
                "RAY_FAKE_CLUSTER": "1",
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            }
        own = ["--head", f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
        ports = start(
            *own, f"--temp-dir={folder}", f"--ray-client-server-port={free_port()}", *options, env=env
        )
        address = f"127.0.0.1:{port}"
        agent = ports["dashboard-agent-listen-port"]  # what starts jobs; comes up last
        for url in (f"{dashboard}/api/gcs_healthz", f"{agent}/api/local_raylet_healthz"):
            _wait_for(f"http://127.0.0.1:{url}", processes[0], folder)

        def start_node(*options: str) -> None:
            # In one folder, nodes of one machine would unpack a job's files over each other.
            start(f"--address={address}", f"--temp-dir={folder}-{len(processes)}", *options, env=env)

        return Head(
            address, f"http://127.0.0.1:{dashboard}", ports["metrics-export-port"], folder, start_node
        )

    yield start_head
    for log in sorted(Path(folder).glob("ray-start-*.log")):
        print(log.read_text())  # pytest shows it when the test has failed
    _end_processes_of(folder, processes)
    for path in Path(folder).parent.glob(f"{Path(folder).name}*"):
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of experiments/tiny.yaml, made by the command line."""
    storage = tmp_path_factory.mktemp("tiny")
    experiment = Path(__file__).parents[1] / "experiments" / "tiny.yaml"
    words = ["run", str(experiment), "--set", f"storage={storage}"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "evatok.cli", *words], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return storage / "tiny"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(url: str, process: subprocess.Popen[bytes], folder: str) -> None:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {_token.read_text()}"})
    for _ in range(600):
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except OSError:
            assert process.poll() is None, Path(f"{folder}/ray-start-0.log").read_text()
            time.sleep(0.5)
    pytest.fail(f"{url} does not answer: {Path(f'{folder}/ray-start-0.log').read_text()}")


def _end_processes_of(folder: str, started: list[subprocess.Popen[bytes]]) -> None:
    """End what was started here and every process of that cluster, told by its folder or process group."""
    import psutil

    groups = {process.pid for process in started}
    ours = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            words = process.info["cmdline"] or []
            if os.getpgid(process.pid) in groups or any(folder in word for word in words):
                ours.append(process)
    for process in ours:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(ours, timeout=30)
