"""`pip install .` into an empty environment: what the wheel holds, and that it works far from the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.jobs_cli import FORGOTTEN, ROOT
from tests.runs import weights, write_run
from tests.venvs import checked

pytestmark = pytest.mark.slow

Command = Callable[..., str]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git tracks: a build writes into its tree, and a file that was not added must be missed here."""
    if not (ROOT / ".git").exists():
        pytest.skip("the wheel is built from what git tracks, and this is no checkout")
    copy = tmp_path_factory.mktemp("tree") / "midiscover"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # what is deleted but not yet committed is still listed
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out)]
    checked([sys.executable, "-m", "pip", "wheel", *flags, str(tree)])
    (built,) = out.glob("midiscover-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Runs the `midiscover` script of a fresh environment, in an empty folder, as somebody without a checkout."""
    folder = tmp_path_factory.mktemp("env")
    python = folder / "env" / "bin" / "python"
    checked([sys.executable, "-m", "venv", str(folder / "env")])
    checked([str(python), "-m", "pip", "install", "--no-deps", "--no-index", str(wheel)])
    site = json.loads(checked([str(python), "-c", "import json, site; print(json.dumps(site.getsitepackages()[0]))"]))
    # Dependencies come from the environment of the tests: a path file puts them after what is installed here.
    ours = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (Path(site) / "dependencies.pth").write_text("\n".join(ours) + "\n")
    (folder / "elsewhere").mkdir()
    env = {name: value for name, value in os.environ.items() if name not in (*FORGOTTEN, "PYTHONPATH", "PYTHONHOME")}

    def run(*arguments: str, program: str = "midiscover") -> str:
        command = [str(python.with_name(program)), *arguments]
        return checked(command, cwd=folder / "elsewhere", env=env | {"COLUMNS": "120"}, timeout=280)

    return run


def test_the_wheel_holds_everything_that_is_not_a_test(tree: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    packages = ("midiscover", "jobs", "serve")
    files = [path for package in packages for path in (tree / package).rglob("*") if path.is_file()]
    sources = {str(path.relative_to(tree)) for path in files}
    assert names == sources
    assert {name.partition("/")[0] for name in names} == set(packages)
    for name in ("demo", "quick", "research", "high", "phi2_layers_by_l1"):
        assert f"jobs/configs/{name}.yaml" in names
    assert {"midiscover/templates/report.html.j2", "midiscover/py.typed"} <= names
    assert "midiscover/tracking/migrations/versions/0001_first_tables.py" in names


def test_it_is_the_installed_package_that_runs(installed: Command) -> None:
    program = "import jobs.sweep, midiscover, serve; print(midiscover.__file__, jobs.__file__, serve.__file__)"
    files = installed("-c", program, program="python").split()
    assert len(files) == 3
    for file in files:
        assert "site-packages" in file
        assert not Path(file).is_relative_to(ROOT)
        assert not Path(file).is_relative_to(sysconfig.get_path("purelib"))


def test_help_and_shipped_configs_from_any_folder(installed: Command, tmp_path: Path) -> None:
    text = installed("--help")
    for verb in ("inspect", "config", "harvest", "sweep", "train", "runs"):
        assert verb in text
    # A config that ships, with a model that needs no download.
    write_run(tmp_path)
    hook = "model.layers.0.mlp.down_proj"
    shown = installed(
        *("config", "quick", "--model.id", str(tmp_path / "model-llama"), "--harvest.hooks", hook),
        *("--store", str(tmp_path / "store")),
    )
    assert hook in shown


def test_a_whole_sweep_from_any_folder(installed: Command, tmp_path: Path) -> None:
    run = write_run(tmp_path, harvest={"hooks": "model.layers.1.mlp.down_proj", "block_tokens": 1024})
    out = installed("sweep", str(run), "--store", str(tmp_path / "store"))
    assert out.strip().endswith("report.html")
    assert len(weights(str(tmp_path / "store"))) == 2
    (report,) = (tmp_path / "store").glob("sweeps/*/report.html")
    assert "<html" in report.read_text()
    (listed,) = json.loads(installed("runs", "list", "--store", str(tmp_path / "store"), "--json"))
    assert listed["name"] == "tiny"
