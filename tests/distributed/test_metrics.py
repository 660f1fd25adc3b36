"""Our metrics arrive where Prometheus looks for them."""

import json
import re
import subprocess
import sys
import time
import urllib.request

import pytest

from evatok.distributed.metrics import METRICS

# A process of its own: Ray ties a process's metrics to the first cluster that it was connected to.
DRIVER = """
import sys
import ray
from evatok.distributed.fanout import Progress
from evatok.distributed.metrics import FanOutMetrics, TrainingMetrics

ray.init(address=sys.argv[1], log_to_driver=False)
row = {"step": 5, "samples": 80, "split": "train", "loss": 0.25, "clips_per_second": 3.0}
row |= {"tokens_per_second": 900.0, "time_data": 0.1, "reward_percentile": 91.0}
training = TrainingMetrics("quickstart-proxy")
training.write(row)
fanout = FanOutMetrics("quickstart-curate", assignments=625)
fanout(Progress(items=3, total=10, rate=2.0, left=3.5, retries=1, rejected=2, running=4))
sys.stdin.read()
"""


def test_every_metric_is_scraped_from_a_running_cluster(start_ray):
    head = start_ray("--num-cpus=1")
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, head.address], stdin=subprocess.PIPE)
    try:
        found = scrape(head)
    finally:
        driver.communicate()
    assert {f"ray_{name}" for name in METRICS} <= found.keys()
    assert found["ray_evatok_train_loss"] == ("quickstart-proxy", 0.25)
    assert found["ray_evatok_fanout_assignments_per_second"] == ("quickstart-curate", 1250.0)


def scrape(head) -> dict[str, tuple[str, float]]:
    """Name -> (run, value), from the targets that Ray's own discovery file names."""
    found: dict[str, tuple[str, float]] = {}
    for _ in range(120):
        time.sleep(1)
        try:
            with open(f"{head.folder}/prom_metrics_service_discovery.json") as file:
                targets = [target for group in json.load(file) for target in group["targets"]]
            for target in targets:
                with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                    text = answer.read().decode()
                for name, labels, value in re.findall(r"^(ray_evatok_\w+)\{(.*)\} (\S+)$", text, re.M):
                    found[name] = (re.search(r'run="([^"]*)"', labels)[1], float(value))
        except (OSError, json.JSONDecodeError):
            continue
        if len(found) >= len(METRICS):
            return found
    pytest.fail(f"only {sorted(found)} were exported")
