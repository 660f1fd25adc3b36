"""Fixtures for everyone, and the order of the suite: tests marked ``alone`` run last."""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

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
