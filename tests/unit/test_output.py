"""Standard output that takes nothing, or not every letter: a full disk is told, a reader who has gone is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.jobs_cli import environment
from tests.runs import write_run
from tests.tiny import make_tiny_model

COMMAND = (sys.executable, "-m", "midiscover.cli")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model("llama", tmp_path_factory.mktemp("output") / "model"))


@pytest.mark.parametrize("arguments", [("--help",), ("inspect",), ("inspect", "--json")])
def test_a_full_disk_is_one_sentence(arguments: tuple[str, ...], model: str) -> None:
    arguments = (*arguments, model) if arguments[0] == "inspect" else arguments
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), timeout=60
        )
    assert done.returncode == 1
    assert done.stderr == "error: the output can't be written: No space left on device.\n"


@pytest.mark.parametrize("arguments", [("--help",), ("inspect",)])
def test_a_reader_who_has_gone_is_no_error(arguments: tuple[str, ...], model: str) -> None:
    arguments = (*arguments, model) if arguments[0] == "inspect" else arguments
    with subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as command:
        assert command.stdout is not None
        assert command.stderr is not None
        command.stdout.close()
        assert command.stderr.read() == b""
        assert command.wait(60) == 0


def test_no_output_at_all_is_no_error(model: str) -> None:
    words = [*COMMAND, "inspect", model]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *words], stderr=subprocess.PIPE, text=True, env=environment(), timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_another_failure_is_none_of_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    from midiscover import cli

    def fail(_: object) -> None:
        raise OSError(28, "No space left on device", "a file")

    monkeypatch.setitem(cli.VERBS, "runs", fail)
    with pytest.raises(OSError, match="a file"):
        cli.main(["runs"])


@pytest.mark.parametrize(("encoding", "shown"), [("utf-8", "sünnet"), ("latin-1", r"s\xFCnnet")])
def test_a_config_is_shown_in_the_letters_that_the_output_has(encoding: str, shown: str, tmp_path: Path) -> None:
    config = write_run(tmp_path, publish={"neuronpedia": {"creator_name": "sünnet"}})
    done = subprocess.run(
        [*COMMAND, "config", str(config), "--store", str(tmp_path)],
        capture_output=True,
        env=environment() | {"PYTHONIOENCODING": encoding},
        timeout=120,
        check=True,
    )
    told = done.stdout.decode(encoding)
    assert shown in told
    assert yaml.safe_load(told)["publish"]["neuronpedia"]["creator_name"] == "sünnet"
