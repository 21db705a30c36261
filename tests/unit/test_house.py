"""The rules of the house that no linter checks."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from midiscover.config import RunConfig
from midiscover.configio import load_config
from tests.jobs_cli import ROOT, environment

PACKAGES = ("midiscover", "jobs", "serve", "tests")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAX_LINES, MAX_FUNCTION_LINES = 400, 60


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a statement loads in a fresh interpreter."""
    program = f"import sys\n{code}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment(), timeout=60
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import midiscover",
        "from midiscover.cli import main; main(['--help'])",
        "import midiscover.tracking, midiscover.tables",
        "import midiscover.launch, midiscover.resolve",
    ],
)
def test_reading_and_listing_load_neither_torch_nor_ray(code: str) -> None:
    assert not loaded_by(code) & {"torch", "ray", "transformers", "datasets"}


def test_the_library_loads_no_ray() -> None:
    assert "ray" not in loaded_by("import midiscover.saes, midiscover.train, midiscover.harvest, midiscover.evaluate")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MAX_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < MAX_FUNCTION_LINES, f"{node.name} is too long"


def test_nothing_that_is_loaded_can_run_code() -> None:
    """No pickle: neither by name, nor through numpy, nor through torch.load but in importers, of tensors alone."""
    for path in FILES:
        if path.is_relative_to(ROOT / "tests"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pickle", "cloudpickle", "joblib", "dill"} & {name.split(".")[0] for name in names}, path
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "numpy.load", "np.load"):
                if path.name == "importers.py" and "weights_only=True" in ast.unparse(node):
                    continue
                raise AssertionError(f"{path} loads what may run code")


@pytest.mark.parametrize("name", ["demo", "quick", "research", "high", "phi2_layers_by_l1"])
def test_shipped_configs_are_valid(name: str) -> None:
    config = load_config(ROOT / "jobs" / "configs" / f"{name}.yaml")
    assert isinstance(config, RunConfig)
    assert config.harvest.hooks
