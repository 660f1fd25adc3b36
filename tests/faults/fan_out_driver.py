"""A driver to kill: fans small deterministic shards out on a local Ray, or on the cluster at an address.

fan_out_driver.py FOLDER [ADDRESS]: publishes FOLDER/table, leaves its workers' process ids in FOLDER/pids and
FOLDER/summary: items kept, retries, items.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray

from evatok.artifacts import Location
from evatok.distributed.fanout import ShardOutput, fan_out
from evatok.distributed.schedule import Shard, shard_ranges

CLIPS = 90


def score(spec, pids):
    (Path(pids) / str(os.getpid())).touch()
    clips = np.arange(*spec)
    time.sleep(0.03 * len(clips))
    values = [np.random.default_rng(clip).random(25, dtype=np.float32) for clip in clips]
    return ShardOutput(pa.table({"clip": clips, "quality": list(values)}))


def plan():
    return [Shard(f"{i:04d}-{j:04d}.parquet", j - i, (i, j)) for i, j in shard_ranges(CLIPS, 4)]


class Pids:
    """Where the workers leave their process ids; built in each of them."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self):
        return self.folder


def main(folder, address=None):
    (Path(folder) / "pids").mkdir(exist_ok=True)
    if address:
        ray.init(address, log_to_driver=False)
    else:
        ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=80 << 20)
    target = Location.parse(folder) / "table"
    summary = fan_out(plan(), score, target, key="k", state=Pids(f"{folder}/pids"))
    (Path(folder) / "summary").write_text(f"{summary.kept} {summary.retries} {summary.items}")


if __name__ == "__main__":
    main(*sys.argv[1:])
