"""Our metrics arrive where Prometheus looks for them."""

import json
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from evatok.distributed.metrics import METRICS

ROOT = Path(__file__).parents[2]

# A process of its own: Ray ties a process's metrics to the first cluster that it was connected to.
DRIVER = """
import sys
import ray
from evatok.distributed.fanout import Progress
from evatok.distributed.metrics import FanOutMetrics, TrainingMetrics

ray.init(address=sys.argv[1], log_to_driver=False)
row = {"step": 5, "samples": 80, "split": "train", "loss": 0.25, "clips_per_second": 3.0}
row |= {"tokens": 300.0, "time_data": 0.1, "reward_percentile": 91.0}
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
        found = scrape(head, driver)
    finally:
        driver.communicate()
    assert {f"ray_{name}" for name in METRICS} <= found.keys()
    assert found["ray_evatok_train_loss"] == {"quickstart-proxy": 0.25}
    assert found["ray_evatok_train_tokens_per_second"] == {"quickstart-proxy": 900.0}
    assert found["ray_evatok_fanout_assignments_per_second"] == {"quickstart-curate": 1250.0}


@pytest.mark.slow
def test_a_run_exports_what_every_panel_of_the_dashboard_queries(start_ray, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "500")
    head = start_ray("--num-cpus=4")
    sections = ["index.source.count=6", "curate.clips={train: 6, test: 4}", "router.held_out=4"]
    sections += [
        f"{stage}.train={{steps: 40, warmup: 0, global_batch: 4, log_every: 2, eval_every: 4}}"
        for stage in ("proxy", "router")
    ]
    words = ["run", str(ROOT / "experiments/tiny.yaml"), "--until", "router", "--address", head.address]
    for setting in (f"storage={tmp_path}", *sections):
        words += ["--set", setting]
    driver = subprocess.Popen([sys.executable, "-m", "evatok.cli", *words])
    found = scrape(head, driver)
    assert driver.wait() == 0
    dashboard = json.loads((ROOT / "cluster/monitoring/grafana-dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    drawn = {name for query in queries for name in re.findall(r"ray_evatok_\w+", query)}
    assert drawn <= found.keys()
    stages = {name: {run.split("-")[1] for run in values} for name, values in found.items()}
    assert stages["ray_evatok_fanout_assignments_per_second"] == {"curate"}
    assert stages["ray_evatok_fanout_items"] <= {"index", "curate"}
    assert stages["ray_evatok_train_tokens_per_second"] == {"proxy"}
    assert stages["ray_evatok_reward_percentile"] == {"router"}


def scrape(head, driver) -> dict[str, dict[str, float]]:
    """Name -> value by run, from the targets that Ray's own discovery file names, while ``driver`` runs."""
    found: dict[str, dict[str, float]] = {}
    for _ in range(500):
        time.sleep(1)
        over = driver.poll() is not None
        try:
            with open(f"{head.folder}/prom_metrics_service_discovery.json") as file:
                targets = [target for group in json.load(file) for target in group["targets"]]
            for target in targets:
                with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                    text = answer.read().decode()
                for name, labels, value in re.findall(r"^(ray_evatok_\w+)\{(.*)\} (\S+)$", text, re.M):
                    run = re.search(r'run="([^"]*)"', labels)[1]
                    found.setdefault(name, {})[run] = float(value)
        except (OSError, json.JSONDecodeError):
            continue
        if over or len(found) >= len(METRICS):
            return found
    pytest.fail(f"only {sorted(found)} were exported")
