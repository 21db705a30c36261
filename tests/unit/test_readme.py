"""Every command of the README is one that miDiscover understands, and every path it names is there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from midiscover import cli
from midiscover.cli import VERBS
from midiscover.cli.plan import plan_parser
from midiscover.configio import build_config, expand_grid, find_config, load_config, parse_value, read_yaml
from midiscover.errors import ConfigError
from midiscover.launch import (
    Parser,
    parse_calibrate,
    parse_doctor,
    parse_import,
    parse_job,
    parse_overrides,
    parse_target,
)
from midiscover.serving import parse_serve
from midiscover.submission import parse_submit
from tests.jobs_cli import ROOT

README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
COMMANDS = [
    line.removeprefix("$ ").split("  #")[0].strip()
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 12


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_understood(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    match words:
        case ["make", target]:
            assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)
        case [".", "midiscover-cluster/env"]:
            assert 'ENV = "env"' in (ROOT / "cluster" / "local.py").read_text()
        case ["export", *assignments]:
            known = {"AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MIDISCOVER_DATABASE_URL"}
            known |= {"MIDISCOVER_CLUSTER", "RAY_AUTH_TOKEN"}
            assert {assignment.partition("=")[0] for assignment in assignments} <= known
        case ["python", "-m", module, *arguments]:
            stage = module.removeprefix("jobs.")
            assert (ROOT / "jobs" / f"{stage}.py").is_file()
            _job(stage, arguments)
        case ["midiscover", "sweep" | "harvest" | "pipeline" | "config" as stage, *arguments]:
            _job(stage, arguments)
        case ["midiscover", "train", *arguments]:
            monkeypatch.setattr(cli, "_job", _job)
            VERBS["train"](arguments)
        case ["midiscover", "plan", *arguments]:
            known, rest = plan_parser().parse_known_args(arguments)
            load_config(find_config(known.config), parse_overrides(rest))
        case ["midiscover", "features" | "publish" as stage, *arguments]:
            parse_target(stage, arguments)
        case ["midiscover", "doctor", *arguments]:
            parse_doctor(arguments)
        case ["midiscover", "import", *arguments]:
            parse_import(arguments)
        case ["midiscover", "calibrate", *arguments]:
            parse_calibrate(arguments)
        case ["midiscover", "serve", *arguments]:
            parse_serve(arguments)
        case ["serve", "deploy", path]:
            assert (ROOT / path).is_file()
        case ["curl", *arguments]:  # what they ask is asked by tests/integration/test_serve_api.py
            assert any(word.startswith("localhost:8000/") for word in arguments)
            assert "Authorization: Bearer $KEY" in arguments
        case ["midiscover", "jobs", *arguments]:
            assert parse_submit([*arguments, "--cluster", "http://127.0.0.1:8265"]).action == arguments[0]
        case ["midiscover", verb, *arguments]:
            _parsed(verb, arguments, monkeypatch)
        case _:
            raise AssertionError(f"no rule for {line!r}")


def test_a_flag_that_a_verb_has_not_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for line in COMMANDS:
        match shlex.split(line):
            case ["midiscover", verb, *_] as words if verb != "jobs":
                with pytest.raises(ConfigError), monkeypatch.context() as patched:
                    test_every_command_is_understood(shlex.join([*words, "--no-such-flag"]), patched)


class _Parsed(Exception):
    """A verb has read its words."""


def _parsed(verb: str, arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a verb's arguments as it does itself, and stop there."""
    parse = Parser.parse_args

    def stop(parser: Parser, words: Any) -> None:
        parse(parser, words)
        raise _Parsed

    monkeypatch.setattr(Parser, "parse_args", stop)
    with pytest.raises(_Parsed):
        VERBS[verb](arguments)


def _job(stage: str, arguments: Sequence[str]) -> None:
    args = parse_job(stage, arguments)
    load_config(find_config(args.config), args.overrides)


def test_the_yaml_of_the_readme_is_a_config(tmp_path: object) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    config = build_config(parse_value(text))
    assert len(config.harvest.hooks) == 3
    assert [dict(grid) for grid in config.grid][0]["sae.target_l0"] == (20, 60, 150)
    assert len(expand_grid(config)) == 3 * (2 * 3 * 2 + 3 + 2)


def test_the_python_of_the_readme_runs(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.setenv("MIDISCOVER_STORE", str(finished / "store"))
    (sae,) = (path.name for path in (finished / "store" / "saes").glob("l1.*.l1-0.5.*"))
    named: dict[str, Any] = {}
    exec(text.replace("l15.mlp-down_proj.standard-4608.l1-2", sae), named)
    module, tokens = named["sae"].module, len(named["prompt"])
    x = named["activations"]
    assert x.shape == (1, tokens, module.d_in)
    assert named["features"].shape == (1, tokens, module.d_sae)
    assert named["activations_hat"].shape == x.shape
    # What was edited is what the SAE reads: without its changes, the two texts are one.
    assert [change.mode for change in named["changes"]] == ["add", "ablate"]
    steered = named["last"].token_ids
    assert steered["steered"] != steered["default"]
    *_, same = named["generate"](named["lm"], named["prompt"], {}, [], named["Sampling"](new_tokens=20))
    assert same.token_ids == dict.fromkeys(("steered", "default"), steered["default"])


def test_links_and_the_tree_name_what_is_there() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
    tree = re.findall(r"```\n(midiscover/.*?)```", README, re.DOTALL)[0]
    folder = ""
    for line in tree.splitlines():
        names = line.split("  ")[0 if not line.startswith("  ") else 1].split() if line.strip() else []
        if not line.startswith(" "):
            folder, names = names[0], []
            assert (ROOT / folder).exists(), folder
            assert folder.endswith("/") == (ROOT / folder).is_dir(), folder
        for name in names:
            if name.endswith((".py", "/")):
                assert (ROOT / folder / name).exists(), name


def test_shipped_configs_are_named() -> None:
    for path in (ROOT / "jobs" / "configs").glob("*.yaml"):
        assert path.stem in README
        assert read_yaml(path)["name"].replace("-", "_") == path.stem
