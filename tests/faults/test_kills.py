"""SIGKILL a worker, a node, the driver at random moments: the table is as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from ray.cluster_utils import Cluster

DRIVER = Path(__file__).parent / "fan_out_driver.py"
CLIPS = 90
KINDS = ("worker", "node", "driver")

pytestmark = pytest.mark.alone


def start(folder, *address):
    return subprocess.Popen(
        [sys.executable, str(DRIVER), str(folder), *address],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_shards(folder, count, driver):
    deadline = time.monotonic() + 300
    while len(list(folder.glob("table/*.parquet"))) < count:
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.02)


def finish(driver, folder):
    """What a driver that ended well reports: items kept, retries, items."""
    out, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, out
    return [int(number) for number in (folder / "summary").read_text().split()]


def assert_undisturbed(folder):
    table = pq.read_table(folder / "table").sort_by("clip")
    assert table["clip"].to_pylist() == list(range(CLIPS))
    for clip, quality in zip(range(CLIPS), table["quality"].to_pylist()):
        assert np.array_equal(np.float32(quality), np.random.default_rng(clip).random(25, dtype=np.float32))


def kill_worker(folder, moment):
    driver = start(folder)
    wait_for_shards(folder, moment, driver)
    pid = random.Random(moment).choice([int(path.name) for path in (folder / "pids").iterdir()])
    os.kill(pid, signal.SIGKILL)
    kept, retries, items = finish(driver, folder)
    assert (kept, items) == (0, CLIPS)
    assert retries <= 1


def kill_driver(folder, moment):
    driver = start(folder)
    wait_for_shards(folder, moment, driver)
    driver.kill()
    driver.communicate()
    finished = len(list(folder.glob("table/*.parquet")))
    kept, _, items = finish(start(folder), folder)
    assert items == CLIPS
    assert finished >= moment
    assert kept > 0


def kill_node(folder, moment):
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=2, object_store_memory=80 << 20) for _ in range(2)]
        driver = start(folder, cluster.address)
        wait_for_shards(folder, moment, driver)
        cluster.remove_node(nodes[0], allow_graceful=False)
        kept, _, items = finish(driver, folder)
        assert (kept, items) == (0, CLIPS)
    finally:
        ray.shutdown()
        cluster.shutdown()


def kill(kind, folder, moment):
    {"worker": kill_worker, "node": kill_node, "driver": kill_driver}[kind](folder, moment)
    assert_undisturbed(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_leaves_the_table_of_an_undisturbed_run(kind, tmp_path):
    kill(kind, tmp_path, moment=7)


@pytest.mark.slow
@pytest.mark.parametrize("run", range(20))
def test_kills_at_random_moments_leave_the_table_of_an_undisturbed_run(run, tmp_path):
    kill(KINDS[run % 3], tmp_path, moment=random.Random(run).randint(1, 22))


def test_two_drivers_on_one_target_do_no_harm_and_share_the_work(tmp_path):
    first, second = start(tmp_path), start(tmp_path)
    assert finish(first, tmp_path)[2] == finish(second, tmp_path)[2] == CLIPS
    assert_undisturbed(tmp_path)
