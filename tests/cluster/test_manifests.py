"""What ``cluster/`` ships agrees with itself, with the pinned versions and with the commands there are."""

import json
import re
import shlex
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

from evatok.cli.parser import parser
from evatok.config import load
from evatok.distributed.metrics import METRICS
from evatok.experiment import read_experiment
from evatok.stages.stage import LABEL
from evatok.sweep import SweepConfig

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
LAUNCHER = ("aws.yaml", "gcp.yaml")
GROUPS = {"cpu-decode", "gpu-train", "gpu-curate"}


def read(name: str):
    return yaml.safe_load((CLUSTER / name).read_text())


RAY_VERSION = re.search(r"^ray\[.*\]==(\S+)", (CLUSTER / "requirements.txt").read_text(), re.M)[1]
IMAGE = f"evatok:{RAY_VERSION}-py311-gpu"


def images(node) -> list[str]:
    """Every value of a key ``image`` in a manifest."""
    if isinstance(node, dict):
        own = [node["image"]] if isinstance(node.get("image"), str) else []
        return own + [found for value in node.values() for found in images(value)]
    return [found for value in node for found in images(value)] if isinstance(node, list) else []


def test_versions_agree_everywhere():
    assert ray.__version__ == RAY_VERSION
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    assert f"FROM rayproject/ray:{RAY_VERSION}-py311-gpu\n" in dockerfile
    assert f"-t {IMAGE} ." in dockerfile
    assert f"-t {IMAGE} ." in (CLUSTER / "README.md").read_text()
    for name in (*LAUNCHER, "kuberay/cluster.yaml", "kuberay/job.yaml"):
        assert set(images(read(name))) == {IMAGE}, name
    assert read("kuberay/cluster.yaml")["spec"]["rayVersion"] == RAY_VERSION


def test_pinned_versions_lie_in_the_ranges_of_the_package():
    from packaging.requirements import Requirement

    ranges = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)[1]
    wanted = {r.name.lower(): r for r in map(Requirement, re.findall(r'"([^"]+)"', ranges))}
    pinned = {
        r.name.lower(): r
        for line in (CLUSTER / "requirements.txt").read_text().splitlines()
        if line.strip() and not line.startswith("#")
        for r in [Requirement(line)]
    }
    assert wanted.keys() <= pinned.keys()
    for name, requirement in pinned.items():
        for exact in requirement.specifier:
            assert name not in wanted or wanted[name].specifier.contains(exact.version), name


@pytest.mark.parametrize("name", LAUNCHER)
def test_launcher_config_is_valid_for_this_ray(name):
    config = read(name)
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(config, json.loads(schema.read_text()))
    types = config["available_node_types"]
    assert types.keys() - {config["head_node_type"]} == GROUPS
    assert types["head"]["resources"] == {"CPU": 0}
    for group in GROUPS:
        assert types[group]["labels"] == {LABEL: group}
        assert types[group]["min_workers"] == 0
        assert ("GPU" in types[group]["resources"]) == group.startswith("gpu")


@pytest.mark.parametrize("name", LAUNCHER)
def test_launched_cluster_has_a_token_and_a_private_dashboard(name):
    config = read(name)
    assert "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    (head,) = (line for line in config["head_start_ray_commands"] if "ray start" in line)
    assert "--dashboard-host=127.0.0.1" in head
    assert "--num-cpus=0" in head


def test_kuberay_cluster_scales_from_zero_with_a_token():
    manifest = read("kuberay/cluster.yaml")
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayCluster")
    spec = manifest["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"]
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert {group["groupName"] for group in spec["workerGroupSpecs"]} == GROUPS
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert group["minReplicas"] == 0
        assert group["labels"] == pod["nodeSelector"] == {LABEL: group["groupName"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == group["groupName"].startswith("gpu")


def test_job_runs_on_the_same_cluster():
    job = read("kuberay/job.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["spec"]["rayClusterSpec"] == read("kuberay/cluster.yaml")["spec"]
    assert job["spec"]["shutdownAfterJobFinishes"]


def commands() -> list[str]:
    """Every evatok command in the manifests and in the cluster's README."""
    texts = [read("kuberay/job.yaml")["spec"]["entrypoint"]]
    readme = (CLUSTER / "README.md").read_text()
    for block in re.findall(r"```bash\n(.*?)```", readme, re.S):
        texts += [line.partition(" -- ")[2] or line for line in block.splitlines()]
    return [text for text in texts if text.startswith("evatok ")]


@pytest.mark.parametrize("text", commands())
def test_command_exists_and_so_does_its_file(text):
    args = parser().parse_args(shlex.split(text)[1:])
    file = getattr(args, "experiment", None) or args.sweep
    assert (ROOT / file).is_file()


def gpus(group: str) -> set[int]:
    """The most GPUs that a node group may have, by each manifest."""
    found = {
        types[group]["max_workers"] * types[group]["resources"]["GPU"]
        for types in (read(name)["available_node_types"] for name in LAUNCHER)
    }
    (pods,) = (g for g in read("kuberay/cluster.yaml")["spec"]["workerGroupSpecs"] if g["groupName"] == group)
    (container,) = pods["template"]["spec"]["containers"]
    return found | {pods["maxReplicas"] * container["resources"]["limits"]["nvidia.com/gpu"]}


@pytest.mark.parametrize("text", commands())
def test_command_asks_for_groups_that_exist_and_no_more_gpus_than_they_may_have(text):
    args = parser().parse_args(shlex.split(text)[1:])
    if "sweep" in args:
        sweep = load(ROOT / args.sweep, SweepConfig, args.overrides)
        shared = read_experiment(
            ROOT / "experiments/sweeps" / sweep.experiment,
            [f"{key}={json.dumps(value)}" for key, value in sweep.set.items()],
        ).resources
        asked, needed = [sweep.resources, shared], [sweep.concurrency * sweep.resources.workers]
    else:
        asked, needed = [read_experiment(ROOT / args.experiment, args.overrides).resources], []
    for resources in asked:
        assert resources.use_gpu
        assert set(resources.groups.model_dump().values()) == GROUPS
        assert max(resources.workers, *needed, 0) <= min(gpus(resources.groups.train))


def test_pods_are_reached_by_ray_the_operator_and_submitters_and_for_metrics_alone():
    policy = read("kuberay/networkpolicy.yaml")
    assert (policy["apiVersion"], policy["kind"]) == ("networking.k8s.io/v1", "NetworkPolicy")
    nodes = read("kuberay/podmonitor.yaml")["spec"]["selector"]
    assert policy["spec"]["podSelector"] == nodes
    peers, metrics = policy["spec"]["ingress"]
    assert len(peers["from"]) == 3
    assert all(peer["podSelector"] for peer in peers["from"])
    head = read("kuberay/cluster.yaml")["spec"]["headGroupSpec"]["rayStartParams"]
    assert metrics == {"ports": [{"port": int(head["metrics-export-port"])}]}


def test_dashboard_draws_metrics_that_exist_and_all_of_them():
    dashboard = json.loads((CLUSTER / "monitoring/grafana-dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    drawn = {name for query in queries for name in re.findall(r"ray_(evatok_\w+)", query)}
    assert drawn == METRICS


def test_node_groups_of_the_readme_are_those_of_the_manifests():
    readme = (CLUSTER / "README.md").read_text()
    (example,) = re.findall(r"```yaml\nresources:\n(.*?)```", readme, re.S)
    assert set(yaml.safe_load(example)["groups"].values()) == GROUPS


def test_working_dir_of_a_job_is_small_and_has_what_a_run_needs(tmp_path):
    from zipfile import ZipFile

    from ray._private.runtime_env.packaging import create_package

    create_package(str(ROOT), tmp_path / "job.zip", include_gitignore=True)
    with ZipFile(tmp_path / "job.zip") as package:
        names = package.namelist()
    assert {"evatok/cli/__main__.py", "experiments/quickstart.yaml"} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", ".git/", ".venv/", "runs/"))]
    assert (tmp_path / "job.zip").stat().st_size < 5 * 2**20
