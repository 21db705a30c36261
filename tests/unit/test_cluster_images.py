"""Compose, the images and the Slurm script, checked without Docker or Slurm: by schema, by linters, with stand-ins."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import stat
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from ray.scripts.scripts import start

from tests.unit.test_cluster_files import CLUSTER, PINNED, ROOT, complaints, read, with_tools

DEBUG = {"postgres-debug": ["127.0.0.1:5432:5432"], "pgadmin": ["127.0.0.1:5050:80"]}
PUBLISHED = {"serve": ["127.0.0.1:8000:8000"], **DEBUG}
"""The only ports that Compose may publish."""


def test_compose_publishes_nothing_but_what_the_debug_profile_says() -> None:
    compose = read(CLUSTER / "compose.yaml")
    assert complaints("compose", compose) == []
    services = compose["services"]
    assert {name: service["ports"] for name, service in services.items() if "ports" in service} == PUBLISHED
    assert all(services[name]["profiles"] == ["debug"] for name in DEBUG)
    for name, service in services.items():
        assert "network_mode" not in service or service["network_mode"] == "none", name


def test_object_stores_fit_into_shared_memory() -> None:
    services = read(CLUSTER / "compose.yaml")["services"]
    nodes = {name: one for name, one in services.items() if one.get("command", [])[:2] == ["ray", "start"]}
    assert nodes.keys() == {"ray-head", "ray-worker", "ray-worker-gpu"}
    for name, service in nodes.items():
        assert service["shm_size"] == "2gb"
        known = start.make_context("start", list(service["command"][2:])).params
        assert 1 * 2**30 < known["object_store_memory"] < 0.95 * 2 * 2**30, name


def test_a_misspelt_key_of_a_service_is_found() -> None:
    compose = read(CLUSTER / "compose.yaml")
    compose["services"]["postgres"]["healthchek"] = {}
    assert any("healthchek" in line for line in complaints("compose", compose))


def test_the_secrets_of_compose_are_random_and_made_once(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    command = ["sh", str(CLUSTER / "secrets.sh"), str(folder), str(os.getuid())]
    subprocess.run(command, check=True)
    first = {path.name: path.read_text() for path in folder.iterdir()}
    subprocess.run(command, check=True)
    assert {path.name: path.read_text() for path in folder.iterdir()} == first
    assert first["pgpass"] == f"postgres:5432:*:midiscover:{first['postgres']}\n"
    assert re.fullmatch("[0-9a-f]{48}", first["ray_token"])
    key = json.loads(first["s3.json"])["identities"][0]["credentials"][0]
    assert f"aws_secret_access_key = {key['secretKey']}\n" in first["aws"]
    for name in ("pgpass", "aws", "ray_token"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600, name
    subprocess.run(["sh", str(CLUSTER / "secrets.sh"), str(tmp_path / "other"), str(os.getuid())], check=True)
    assert (tmp_path / "other" / "postgres").read_text() != first["postgres"]


def test_what_compose_mounts_and_names_is_what_the_script_makes() -> None:
    script, compose = (CLUSTER / "secrets.sh").read_text(), (CLUSTER / "compose.yaml").read_text()
    for name in set(re.findall(r"/secrets/([\w.]+)", compose)):
        assert f'"$folder/{name}"' in script, name


def test_the_dockerfile_passes_hadolint_and_is_no_root() -> None:
    found = subprocess.run(["hadolint", str(CLUSTER / "Dockerfile")], capture_output=True, text=True, env=with_tools())
    assert (found.returncode, found.stdout) == (0, "")
    text = (CLUSTER / "Dockerfile").read_text()
    for target in ("cpu", "gpu"):
        stage = text.partition(f" AS {target}\n")[2].partition("\nFROM ")[0]
        assert "\nUSER 1000\n" in stage
    of_gpus = text.partition(" AS base-gpu\n")[2].partition("\nFROM ")[0]
    assert re.search(r"install .*\bgcc\b", of_gpus), "Triton compiles its launchers"
    # A volume that is mounted where the image has no folder is root's, and so are the folders above it.
    made = re.search(r"install --directory --owner=ray(.+?)\n[A-Z]", text, re.DOTALL)
    assert made is not None
    mounted = [*(CLUSTER / "kuberay").glob("*.yaml"), CLUSTER / "compose.yaml"]
    caches = set(re.findall(r"/home/ray/[\w./-]+", "\n".join(path.read_text() for path in mounted)))
    assert caches
    assert caches <= set(re.findall(r"/home/ray/[\w./-]+", made[1]))
    sent = (CLUSTER / "Dockerfile.dockerignore").read_text().split()
    assert "*" in sent
    for name in ("midiscover", "jobs", "serve", "pyproject.toml", "cluster/requirements.lock", "README.md", "LICENSE"):
        assert f"!{name}" in sent
        assert (ROOT / name).exists()


def test_the_images_install_what_the_tests_ran_with_and_by_hash() -> None:
    blocks = re.split(r"\n(?=[a-zA-Z])", (CLUSTER / "requirements.lock").read_text())[1:]
    locked: dict[str, str] = {}
    for block in blocks:
        first, *hashes = [line.strip().removesuffix("\\").strip() for line in block.strip().splitlines()]
        name, version = first.partition(" ;")[0].split("==")
        assert hashes, name
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", one) for one in hashes), name
        locked[name] = version
    pinned = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in PINNED.items()}
    assert [name for name, version in locked.items() if pinned.get(name, version) != version] == []
    of_gpus = {name for name in locked if re.match("nvidia|cuda|triton", name)}
    assert locked.keys() - pinned.keys() - of_gpus <= {"setuptools"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for needed in project["dependencies"]:
        assert re.match(r"[\w-]+", needed)[0] in locked, needed
    # Nothing else is fetched: torch alone comes without a hash, and what it needs, as what builds ours, is in the lock.
    text = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ")
    installs = re.findall(r"pip install([^&\n]+)", text)
    assert [
        [flag in line for flag in ("--no-deps", "--require-hashes", "--no-build-isolation")] for line in installs
    ] == [
        [True, False, False],
        [True, True, False],
        [True, True, False],
        [True, False, True],
        [True, False, True],
    ]
    assert "^torch==" in installs[0]
    of_torch = [Requirement(line) for line in importlib.metadata.requires("torch") or []]
    here = {one.name for one in of_torch if one.marker is None or one.marker.evaluate({"extra": ""})}
    assert {re.sub(r"[-_.]+", "-", name).lower() for name in here} <= locked.keys() | of_gpus
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
    for needed in map(Requirement, built["requires"]):
        assert needed.specifier.contains(locked[needed.name]), needed
    without_gpus = subprocess.run(
        ["awk", re.search(r"awk '(.+?)'", (CLUSTER / "Dockerfile").read_text())[1], str(CLUSTER / "requirements.lock")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert set(re.findall(r"^([\w-]+)==", without_gpus, re.MULTILINE)) == set(locked) - of_gpus - {"torch"}


# Slurm


def test_the_scripts_pass_shellcheck() -> None:
    scripts = [str(CLUSTER / "slurm.sbatch"), str(CLUSTER / "secrets.sh")]
    found = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, env=with_tools())
    assert (found.returncode, found.stdout) == (0, "")


STAND_INS = {
    "scontrol": 'printf "node1\\nnode2\\nnode3\\n"',
    "srun": 'echo "srun $*" >> "$LOG"; while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "hostname": "echo 192.0.2.1",
    # A node ends as Slurm ends it: by a signal to all its processes, the shell that waits for Ray among them.
    "ray": 'echo "ray $* $RAY_AUTH_MODE $(wc -c < "$RAY_AUTH_TOKEN_PATH")" >> "$LOG"\n'
    'if [ "$1" = start ]; then kill -TERM "$PPID"; fi; exit "${STATUS:-0}"',
    "rm": 'echo "rm $*" >> "$LOG"; case "$*" in *"$PWD"*) command -p rm "$@" ;; esac',
    "python": 'test "${JOINED:-3}" = "$3"',
    "date": 'echo >> "$LOG.dates"; echo $((30 * $(wc -l < "$LOG.dates")))',
    "sleep": 'echo "sleep $*" >> "$LOG"',
    "midiscover": 'echo "midiscover $* $RAY_ADDRESS ${MIDISCOVER_CLUSTER-}" >> "$LOG"\n'
    'until [ "$(grep -c "^ray start" "$LOG")" -eq 2 ]; do command -p sleep 0.1; done; exit "${CODE:-0}"',
}


def run_slurm(folder: Path, **told: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The script run for real, with stand-ins of Slurm's commands and ours; also how they were called."""
    tools, log = folder / ".venv" / "bin", folder / "log"
    tools.mkdir(parents=True)
    for name, body in STAND_INS.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_CPUS_PER_TASK": "8",
    }
    done = subprocess.run(
        ["bash", str(CLUSTER / "slurm.sbatch"), "sweep", "quick", "--store", "s3://b/p"],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "LOG": str(log), "MIDISCOVER_CLUSTER": "http://elsewhere", **told, **slurm},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done, log.read_text().splitlines()


@pytest.mark.parametrize("code", [0, 3])
def test_the_slurm_job_starts_a_node_each_and_ends_as_its_stage_does(tmp_path: Path, code: int) -> None:
    done, said = run_slurm(tmp_path, CODE=str(code))
    assert done.returncode == code
    started = [line.removesuffix(" token 64") for line in said if line.startswith("ray start ")]
    assert len(started) == 2
    for line in started:
        start.make_context("start", shlex.split(line.removeprefix("ray start ")))
    nodes = [line for line in said if line.startswith("srun") and "ray start" in line]
    head, workers = sorted(nodes, key=lambda line: "--exclude" in line)  # they start side by side
    assert "--nodelist=node1 " in head
    assert "--nodes=2 --ntasks-per-node=1 --exclude=node1" in workers
    assert "midiscover sweep quick --store s3://b/p 192.0.2.1:20007 " in said, "and no other cluster is named"
    assert any(line.startswith("ray status token 64") for line in said)
    assert not list(tmp_path.glob(".slurm-*")), "the token goes with the job"
    assert all("--temp-dir=/tmp/ray-7 " in line for line in started)
    assert said.count("rm -rf /tmp/ray-7") == 2, "and so do Ray's files, on each node"


def test_slurm_may_requeue_the_job(tmp_path: Path) -> None:
    """Its number stays, and what stood in the way of its EXIT trap left the folder behind."""
    left = tmp_path / ".slurm-7"
    left.mkdir(mode=0o700)
    (left / "token").write_text("old")
    done, said = run_slurm(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert any(line.startswith("ray status token 64") for line in said), "a token of its own"


@pytest.mark.parametrize(
    ("told", "sentence"),
    [({"STATUS": "1"}, "Ray's head does not answer"), ({"JOINED": "2"}, "Not all nodes have joined Ray")],
)
def test_slurm_does_not_wait_for_ever(tmp_path: Path, told: dict[str, str], sentence: str) -> None:
    done, said = run_slurm(tmp_path, **told)
    assert done.returncode == 1
    assert f"{sentence} within 5 minutes" in done.stderr
    assert said.count("sleep 2") == 9, "of 30 s each, by the stand-in of date"
    assert not [line for line in said if line.startswith("midiscover")]
    assert not list(tmp_path.glob(".slurm-*")), "the token goes with the job"


def test_slurm_without_a_stage_is_told(tmp_path: Path) -> None:
    done = subprocess.run(["bash", str(CLUSTER / "slurm.sbatch")], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Give the verb and its arguments" in done.stderr
