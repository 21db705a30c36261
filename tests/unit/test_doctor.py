"""What the doctor finds on machines that lack something, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from midiscover.cli import main
from midiscover.config import CorpusConfig, ModelConfig, RunConfig
from midiscover.doctor import examine
from midiscover.sae import pattern
from midiscover.store.local import LocalStorage
from midiscover.tracking import Tracker
from tests.s3 import s3_server
from tests.tiny import make_tiny_model
from tests.unit.tracking import samples


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MIDISCOVER_STORE", "MIDISCOVER_DATABASE_URL", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: os.environ.get("HF_TOKEN"))


def found(store: str, config: RunConfig | None = None) -> dict[str, tuple[str, str]]:
    return {one.what: (one.status, one.told) for one in examine(store, config)}


def test_a_machine_that_has_everything(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path / "tiny")
    (tmp_path / "text.txt").write_text("words " * 1000)
    store = LocalStorage(tmp_path / "store")
    (tmp_path / "store").mkdir()
    Tracker.for_store(store).close()
    before = {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and ".db" not in path.name
    }
    config = RunConfig(
        model=ModelConfig(id=str(tmp_path / "tiny")),
        corpus=CorpusConfig(source=str(tmp_path / "text.txt"), context_size=32),
    )
    seen = found(str(tmp_path / "store"), config)
    assert {what for what, (status, _) in seen.items() if status != "ok"} <= {"GPUs", "kernels", "hub token"}
    assert seen["model"][1].startswith("tiny: 3 layers, d_model 24, digest ")
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and ".db" not in path.name}
    assert set(after) == set(before), "nothing is left behind"
    assert all(after[path] == time for path, time in before.items())


@pytest.mark.parametrize(("made", "told"), [(0, "0 sweeps"), (1, "1 sweep"), (2, "2 sweeps")])
def test_the_sweeps_of_a_database_are_counted(tmp_path: Path, made: int, told: str) -> None:
    with Tracker.for_store(LocalStorage(tmp_path)) as tracker:
        for number in range(made):
            tracker.start_sweep(samples.sweep() | {"id": f"made.{number}"}, [])
    assert found(str(tmp_path))["database"][1].endswith(f"its tables are current; {told}")


def test_what_is_not_there_yet_is_no_fault(tmp_path: Path) -> None:
    seen = found(str(tmp_path / "none"))
    assert seen["store"] == ("none", f"{tmp_path / 'none'} is not there yet; the first run makes it")
    assert seen["database"][0] == "none"
    assert not (tmp_path / "none").exists()


def test_a_gpu_on_a_machine_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretended; the error is Triton's own."""
    store = str(tmp_path / "none")
    if not torch.cuda.is_available():
        assert found(store)["kernels"][0] == "none"
    tried: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(pattern, "suits_kernels", lambda _: True)
    monkeypatch.setattr(pattern, "try_kernel", tried.append)
    assert found(store)["kernels"] == ("ok", "Triton builds them")
    assert tried == [torch.device("cuda")]

    def fails(_: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setattr(pattern, "try_kernel", fails)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    status, told = found(store)["kernels"]
    assert status == "none", "steps are only slower"
    assert "(Failed to find C compiler. Please specify via CC environment variable.)" in told
    assert "install a C compiler and the headers of this Python" in told


@pytest.mark.parametrize("message", ["out of memory", "an illegal memory access was encountered"])
def test_a_gpu_that_is_full_or_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    """Pretended; no compiler would help."""

    def fails(_: torch.device | None = None) -> None:
        raise torch.AcceleratorError(f"CUDA error: {message}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", fails if "illegal" in message else lambda: None)
    monkeypatch.setattr(pattern, "suits_kernels", lambda _: True)
    monkeypatch.setattr(pattern, "try_kernel", fails)
    assert found(str(tmp_path / "none"))["kernels"] == ("fails", f"AcceleratorError: CUDA error: {message}")


class IgnoresConditions(LocalStorage):
    """As an old S3 server does."""

    def create(self, key: str, data: Any) -> bool:
        self.write(key, data)
        return True


class NeverCompares(LocalStorage):
    def replace(self, key: str, old: Any, new: Any) -> bool:
        self.write(key, new)
        return True


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (IgnoresConditions, "the server ignores If-None-Match, so two runs could overwrite each other"),
        (NeverCompares, "does not compare before it replaces: the server ignores If-Match"),
    ],
)
def test_a_store_without_conditional_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[LocalStorage], sentence: str
) -> None:
    monkeypatch.setattr("midiscover.doctor.open_store", lambda uri, create: kind(tmp_path))
    status, told = found(str(tmp_path))["store"]
    assert (status, sentence in told) == ("fails", True), told
    assert not list(tmp_path.glob("doctor-*"))


def test_a_database_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIDISCOVER_DATABASE_URL", "postgresql://ada:s3cret@127.0.0.1:1/midiscover")
    status, told = found(str(tmp_path))["database"]
    assert (status, "does not answer" in told, "s3cret" in told) == ("fails", True, False), told


def test_a_model_and_a_text_that_are_not_there(tmp_path: Path) -> None:
    config = RunConfig(model=ModelConfig(id="./no/model"), corpus=CorpusConfig(source="./no/text.txt"))
    seen = found(str(tmp_path), config)
    assert (seen["model"][0], seen["text"][0]) == ("fails", "fails")
    assert "no/model" in seen["model"][1]
    assert "no/text.txt" in seen["text"][1]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["doctor", "--store", str(tmp_path / "new"), "--json"]) == 0
    assert {row["what"] for row in json.loads(capsys.readouterr().out)} >= {"versions", "store", "database", "memory"}
    monkeypatch.setenv("MIDISCOVER_DATABASE_URL", "postgresql://ada:s3cret@127.0.0.1:1/midiscover")
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--store", str(tmp_path)])
    assert (ended.value.code, "fails" in capsys.readouterr().out) == (1, True)
    assert main(["doctor", "--surprise", "1"]) == 2
    assert main(["doctor", "absent.yaml"]) == 2


@pytest.mark.s3
def test_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        seen = found(f"s3://{server.bucket}/store")
        assert seen["store"][0] == "ok", seen["store"]
        assert (seen["database"][0], "needs a database" in seen["database"][1]) == ("fails", True)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        status, told = found(f"s3://{server.bucket}/store")["store"]
        assert (status, "wrong" in told) == ("fails", False), told
