"""`midiscover explain` as a user runs it, against a server that stands in for a language model's; without Ray."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from midiscover.features.records import open_features
from midiscover.publish.export import prepare_export, write_export
from midiscover.store.storage import open_store
from tests.jobs_cli import Done, refused
from tests.llm import Llm, llm
from tests.runs import copied_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def store(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explain")
    copied_run(finished, folder)
    return folder / "store"


@pytest.fixture
def server() -> Iterator[Llm]:
    with llm() as state:
        yield state


@pytest.fixture(scope="module")
def one_sae(store: Path) -> str:
    return next(path.name for path in sorted((store / "saes").iterdir()) if path.name.startswith("l0"))


def run(store: Path, sae: str, server: Llm, *flags: str) -> Done:
    return refused("explain", sae, "--llm", "stand-in", *flags, "--store", str(store), env=server.environment())


def test_features_are_explained_and_shown_everywhere(store: Path, one_sae: str, server: Llm) -> None:
    done = run(store, one_sae, server, "--count", "4", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    explained = {int(feature): entry for feature, entry in told["features"].items()}
    assert len(explained) + len(told["seldom"]) == 4
    assert len(explained) >= 2
    assert len(server.questions) == told["used"]["questions"]
    for entry in explained.values():
        assert entry["text"].startswith('the word "')
        for score in (entry["detection"], entry["fuzz"], *entry["baselines"].values()):
            assert score is None or sum(score[n] for n in ("found", "missed", "rejected", "mistaken", "unread")) >= 4
    assert any(entry["detection"] for entry in explained.values())

    asked = len(server.questions)
    again = run(store, one_sae, server, "--count", "4")
    assert again.code == 0, again.err
    assert len(server.questions) == asked, "what is explained is not asked again"
    assert "by stand-in" in again.out
    assert "0 questions" in again.out
    feature, entry = next(iter(explained.items()))
    assert entry["text"] in again.out

    shown = refused("feature", "show", one_sae, str(feature), "--store", str(store))
    assert f"{entry['text']}  by stand-in, detection" in " ".join(shown.out.split("\n"))
    listed = refused("feature", "list", one_sae, "--filter", f"index={feature}", "--store", str(store))
    assert "explanation" in listed.out
    assert "the word" in listed.out

    storage = open_store(str(store))
    records = open_features(storage, one_sae)
    assert records.explanations[feature].text == entry["text"]
    export = prepare_export(storage, one_sae, "neuronpedia")
    rows = {row["index"]: row for row in map(export.neuronpedia.explanation_row, map(records.feature, range(9)))}
    assert all(("the word" in row["description"]) == (int(index) in explained) for index, row in rows.items())
    written = write_export(export, open_store(str(store.parent / "export")))
    assert written.manifest["made_of"] == export.made_of
    storage.delete(records.explained[0][0])
    assert prepare_export(storage, one_sae, "neuronpedia").made_of != export.made_of, "an export follows what is said"


def test_what_ends_a_run_keeps_what_was_done(store: Path, one_sae: str, server: Llm) -> None:
    server.failures = [(200, "")] * 3 + [(402, "your credit is used up")]
    done = run(store, one_sae, server, "--all", "--filter", "firing_rate>0.01", "--no-scores", "--at-once", "1")
    assert done.code == 2
    assert "refused a question to 'stand-in': your credit is used up." in done.err
    assert "reading held-out text" not in done.err, "nothing is judged"
    kept = open_features(open_store(str(store)), one_sae).explanations
    assert 3 <= len(kept) == len(server.questions), "with what was under way when it was refused"
    asked = len(server.questions)
    done = run(store, one_sae, server, "--features", ",".join(map(str, kept)), "--no-scores")
    assert (done.code, len(server.questions)) == (0, asked)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((), "One of the arguments --llm --local-llm is required"),
        (("--llm", "x", "--local-llm", "embedded"), "not allowed with argument --llm"),
        (("--llm", "x", "--features", "1,b"), "--features 1,b: 'b' is no number of a feature; give such as 17,42."),
        (("--llm", "x", "--features", "99999"), "has no feature 99999; its features are 0 to 95."),
        (("--llm", "x", "--features", "1", "--filter", "max>1"), "--filter goes with --count or --all"),
        (("--llm", "x", "--filter", "max>1e9"), "fits --filter 'max>1e9'"),
        (("--llm", "x", "--count", "0"), "--count is 0; it must be a whole number above 0."),
        (("--llm", "x", "--judged", "1"), "--judged is 1; it must be 2 at least."),
        (("--llm", "x"), "OPENAI_API_KEY is not set"),
        (("--local-llm", "/nowhere"), "nowhere"),
    ],
)
def test_wrong_input_is_told_and_nothing_is_written(
    store: Path, one_sae: str, flags: tuple[str, ...], told: str
) -> None:
    before = sorted(store.rglob("explanations/*"))
    done = refused("explain", one_sae, *flags, "--store", str(store), env={"OPENAI_API_KEY": ""})
    assert done.code == 2
    assert told in " ".join(done.err.split())
    assert sorted(store.rglob("explanations/*")) == before


def test_a_model_without_turns_is_refused(store: Path, one_sae: str) -> None:
    done = refused("explain", one_sae, "--local-llm", str(store.parent / "model-llama"), "--store", str(store))
    assert done.code == 2
    assert "has no chat template" in done.err
