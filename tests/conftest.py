"""Fixtures for everyone, and the order of the suite: tests marked ``alone`` run last."""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
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


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """The session's one local Ray, 4 logical CPUs; yields its address."""
    import ray

    context = ray.init(
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
