"""Every command of the README is one that miDiscover understands, and every path it names is there."""

from __future__ import annotations

import re
import shlex

import pytest

from midiscover.cli import TRAIN_FLAGS, VERBS
from midiscover.cli.plan import plan_parser
from midiscover.configio import build_config, expand_grid, find_config, load_config, parse_value, read_yaml
from midiscover.launch import parse_calibrate, parse_job
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
def test_every_command_is_understood(line: str) -> None:
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
        case ["midiscover", "sweep" | "harvest" | "pipeline" as stage, *arguments]:
            _job(stage, arguments)
        case ["midiscover", "config", *arguments]:
            _job("sweep", arguments)
        case ["midiscover", "train", *arguments]:
            flags = [word for word in arguments if word.startswith("--")]
            assert set(flags) <= set(TRAIN_FLAGS)
            assert "--hook" in flags
        case ["midiscover", "plan", *arguments]:
            known, rest = plan_parser().parse_known_args(arguments)
            assert find_config(known.config)
            assert rest == []
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
        case ["midiscover", verb, *_]:
            assert verb in VERBS
        case _:
            raise AssertionError(f"no rule for {line!r}")


def _job(stage: str, arguments: list[str]) -> None:
    args = parse_job(stage, arguments)
    load_config(find_config(args.config), args.overrides)


def test_the_yaml_of_the_readme_is_a_config(tmp_path: object) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    config = build_config(parse_value(text))
    assert len(config.harvest.hooks) == 3
    assert [dict(grid) for grid in config.grid][0]["sae.target_l0"] == (20, 60, 150)
    assert len(expand_grid(config)) == 3 * (2 * 3 * 2 + 3 + 2)


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
