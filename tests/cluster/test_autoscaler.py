"""A cluster that grows from nothing for a fan-out, loses a node in the middle, and shrinks to nothing."""

import os
import signal
import time

import pyarrow as pa
import pytest
import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from evatok.artifacts import Location
from evatok.distributed.fanout import Shard, ShardOutput, fan_out
from evatok.stages.stage import LABEL, Groups

GROUPS = Groups(curate="gpu-curate")


def config(address: str) -> dict:
    """A launcher config whose nodes are processes of this machine that claim to have a GPU."""
    provider = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    return {
        "cluster_name": "fake",
        "max_workers": 2,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "external",
            "module": provider,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": address,
        },
        "auth": {},
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "gpu-curate": {
                "resources": {"CPU": 1, "GPU": 1, "object_store_memory": 10**8},
                "labels": {LABEL: "gpu-curate"},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 2,
            },
        },
        "head_node_type": "ray.head.default",
        **{f"{who}_start_ray_commands": [] for who in ("head", "worker")},
        **{f"{who}setup_commands": [] for who in ("", "head_", "worker_")},
        "initialization_commands": [],
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
    }


def gpu_nodes() -> list[dict]:
    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]


@pytest.mark.alone
def test_fan_out_scales_gpu_nodes_up_from_zero_survives_a_lost_one_and_back_to_zero(start_ray, tmp_path):
    killed = tmp_path / "killed"

    def work(spec: int, _: None) -> ShardOutput:
        if spec == 5 and not killed.exists():
            killed.touch()
            for lost in (os.getppid(), os.getpid()):  # the raylet and what runs on it: this node is gone
                os.kill(lost, signal.SIGKILL)
        time.sleep(2)
        return ShardOutput(pa.table({"clip": [2 * spec, 2 * spec + 1]}))

    head = start_ray("--num-cpus=0", autoscaling=config)
    ray.init(address=head.address, log_to_driver=False)
    try:
        assert gpu_nodes() == []
        target = Location.parse(tmp_path) / "table"
        shards = [Shard(f"{n:04d}.parquet", 2, n) for n in range(10)]
        seen: list[int] = []
        summary = fan_out(
            shards,
            work,
            target,
            key="k",
            cpus=1,
            gpus=1,
            label_selector=GROUPS.selector("curate"),
            on_progress=lambda progress: seen.append(len(gpu_nodes())),
        )
        assert max(seen) == 2
        assert killed.exists()
        assert summary.retries >= 1
        rows = [row for name in target.list() if name.endswith(".parquet") for row in rows_of(target, name)]
        assert sorted(rows) == list(range(20))
        for _ in range(180):
            if not gpu_nodes():
                break
            time.sleep(1)
        assert gpu_nodes() == []
    finally:
        ray.shutdown()


def rows_of(target: Location, name: str) -> list[int]:
    return target.read_table(name, columns=["clip"])["clip"].to_pylist()
