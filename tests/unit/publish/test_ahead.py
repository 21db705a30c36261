"""What `publish` in a config can't mean is said before the sweep of a pipeline begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import pipeline
from midiscover.configio import load_config
from midiscover.errors import UserError
from midiscover.publish.ahead import require_publishable
from midiscover.resolve import resolve
from tests.jobs_cli import refused
from tests.runs import write_run

TWICE = {"sae.l1_coefficient": [1], "train.lr": [1e-3, 2e-3]}
"""A grid of two SAEs a hook that differ in what makes no name."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "")
    return tmp_path


def ahead(folder: Path, publish: dict[str, object], grid: object = None) -> None:
    changes = {} if grid is None else {"grid": grid}
    require_publishable(resolve(load_config(write_run(folder, publish=publish, **changes))))


@pytest.mark.parametrize(
    ("publish", "grid", "sentence"),
    [
        ({"saes": "bst"}, None, "publish.saes is 'bst', which fits none of the sweep's 4 SAEs; give all, frontier"),
        ({"push": "hf://nonsense"}, None, "'hf://nonsense' is no repository of a hub"),
        ({"push": "hf://lab/saes"}, None, "A push needs a token of the hub: set HF_TOKEN"),
        ({"out": "ftp://x"}, None, "unknown scheme 'ftp'"),
        ({"neuronpedia": {"source_set": "a.b"}}, None, "'a.b' can't be a source set of Neuronpedia"),
        ({"neuronpedia": {"model": "Phi 2!"}}, None, "'Phi 2!' can't be a model of Neuronpedia"),
        ({"saes": "all", "neuronpedia": {"source_set": "one"}}, None, r"l0.* and l0.* would both be .*/0-one on"),
        ({"formats": ["saelens"], "neuronpedia": {"source_set": "a.b"}}, None, "'a.b' can't be a source set"),
        ({"saes": "all"}, TWICE, r"l0.* and l0.* would both be .*/0-mdc-mlp-.*-l1-1 on Neuronpedia"),
    ],
)
def test_what_can_not_be(folder: Path, publish: dict[str, object], grid: object, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        ahead(folder, publish, grid)


def test_what_can_be_and_what_only_the_sweep_can_tell_passes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead(folder, {"saes": "best", "neuronpedia": {"source_set": "one"}})  # of each hook one
    ahead(folder, {"saes": "frontier"}, TWICE)
    ahead(folder, {"saes": "all", "formats": ["saelens", "bundle"]}, TWICE)  # their folders have the ids for names
    ahead(folder, {"saes": "l1.mlp", "out": str(folder / "out")})
    assert (folder / "out").is_dir()
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    ahead(folder, {"saes": "all", "push": "hf://lab/saes"})


def test_a_pipeline_runs_no_sweep_for_exports_that_can_not_be(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[list[str]] = []
    for stage in (pipeline.sweep, pipeline.features, pipeline.publish):
        monkeypatch.setattr(stage, "main", lambda argv: begun.append(argv) or 0)
    words = [str(write_run(folder)), "--store", str(folder / "store"), "--publish.saes"]
    with pytest.raises(UserError, match="fits none of the sweep's 4 SAEs"):
        pipeline.main([*words, "bst"])
    done = refused("pipeline", *words, "bst")
    assert (done.code, "fits none of the sweep's 4 SAEs" in done.err) == (2, True), done.err
    assert not (folder / "store").exists()
    assert begun == []
    assert (pipeline.main([*words, "best"]), len(begun)) == (0, 3)
