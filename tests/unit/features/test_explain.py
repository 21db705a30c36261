"""Features explained by a model whose words and judgement are known, on contexts made by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from midiscover.config import ModelConfig
from midiscover.errors import CorpusError, CorruptError, StageError
from midiscover.features import explainer
from midiscover.features.explain import (
    ExplainSettings,
    Judge,
    Passage,
    averages,
    halves,
    marked,
    said,
    scored,
    unread_answers,
)
from midiscover.features.explainer import Explainer, Outcome
from midiscover.features.explanations import Explanations, newest
from midiscover.features.quiet import Quiet, held_out_passages
from midiscover.features.records import Context
from midiscover.lm import LanguageModel
from midiscover.models import resolve_model
from midiscover.packing import Windows
from midiscover.saeconfig import StandardConfig
from midiscover.store import layout
from midiscover.store.storage import Storage, open_store
from tests.llm import answer
from tests.tiny import make_tiny_model
from tests.unit.test_interpret import FIRST, sae

SETTINGS = ExplainSettings(shown=6, judged=6)
WORDS = ["rain", "sun", "wind", "snow", "fog", "hail"]


class Scripted:
    """Answers as the stand-in for a server does, and fails when it is told to."""

    name, at_once = "scripted", 3

    def __init__(self, fails_after: int | None = None) -> None:
        self.identity: dict[str, str] = {}
        self.questions: list[str] = []
        self.fails_after = fails_after
        self._lock = threading.Lock()

    def answer(self, question: str) -> str:
        with self._lock:
            self.questions.append(question)
            if self.fails_after is not None and len(self.questions) > self.fails_after:
                raise StageError("gone")
        return answer(question)

    def which(self, about: str, claim: str, passages: Sequence[str]) -> list[bool | None]:
        listed = "\n".join(f"{number}. {text}" for number, text in enumerate(passages, start=1))
        said = self.answer(f"{about}\n\nOf which is it true that {claim}?\n\n{listed}")
        return [one == "1" for one in said if one in "01"]

    @property
    def used(self) -> dict[str, int]:
        return {"questions": len(self.questions), "asked": 0, "answered": 0}


def context(kind: str, window: int, word: str, value: float, rank: int = 0) -> Context:
    tokens = [f" a{window}", f" {word}", f" b{window}", " c"]
    values = [0.0, value, 0.1 * value, 0.0]
    bins = (None, None, None) if kind == "random" else (0.0, value, 0.1)
    return Context(kind, rank, *bins, value, window, 1, 0, 0, [1, 2, 3, 4], tokens, values)


def contexts(word: str, first: int = 0) -> list[Context]:
    """Ten of the highest and twelve of intervals; the first interval's windows are those of the highest."""
    found = [context("top", first + i, word, 9.0 - i / 10, i) for i in range(10)]
    found += [context("interval", first + i, word, 8.0 - i / 10, i) for i in range(2)]
    return [*found, *(context("interval", first + 20 + i, word, 5.0 - i / 4, i) for i in range(10))]


QUIET_TEXTS = [[" the", f" {word}", " was", f" q{number}"] for number in range(4) for word in WORDS]


class Records:
    """Six features, each of a word."""

    sae_id, features_id, d_sae = "sae", "f.test", 6

    def contexts(self, feature: int) -> list[Context]:
        return contexts(WORDS[feature], 100 * feature)

    def feature(self, feature: int) -> dict[str, Any]:
        return {"index": feature, "count": 9, "top_tokens": [f" {WORDS[feature]}"], "pos_tokens": []}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def quiet() -> Quiet:
    """Every word stands in four of 24 passages; its feature fires there."""
    fires = torch.tensor([[f" {word}" in tokens for word in WORDS] for tokens in QUIET_TEXTS])
    return Quiet(QUIET_TEXTS, fires)


def stored(storage: Storage, **settings: Any) -> Explanations:
    return Explanations(storage, "sae", "f.test", "scripted", settings)


def made(chat: Scripted, storage: Storage, quiet: Quiet | None, **given: Any) -> Explainer:
    records: Any = Records()
    return Explainer(chat=chat, records=records, stored=stored(storage), settings=SETTINGS, quiet=quiet, **given)


def test_what_is_shown_and_what_is_judged_share_no_window() -> None:
    found = contexts("rain")
    shown, judged = halves(found, SETTINGS)
    assert (len(shown), len(judged)) == (6, 6)
    window = {id(c.tokens): c.window for c in found}
    kinds = {id(c.tokens): c.kind for c in found}
    windows = [[window[id(passage.tokens)] for passage in side] for side in (shown, judged)]
    assert not set(windows[0]) & set(windows[1])
    assert all(len(set(side)) == len(side) for side in windows)
    for side in (shown, judged):
        assert sorted(kinds[id(passage.tokens)] for passage in side) == ["interval"] * 3 + ["top"] * 3
        lowest = min(max(passage.values) for passage in side)
        assert lowest < 4.0, "intervals from high to low"
    few = [context("top", i, "rain", 1.0, i) for i in range(5)]
    shown, judged = halves(few, SETTINGS)
    assert (len(shown), len(judged)) == (3, 2), "the highest make up for intervals that are not there"
    assert halves([context("random", 1, "rain", 1.0), context("top", 2, "rain", 0.0)], SETTINGS) == ([], [])


def test_tokens_that_fire_are_marked() -> None:
    tokens = [" It", " ra", "ined", "\n", " hard", "."]
    assert marked(Passage(tokens, [0, 4.0, 2.0, 0.1, 1.3, 5.0])) == "It <<rained>> hard<<.>>"
    assert marked(Passage(tokens, [0, 4.0, 1.0, 0, 0, 0])) == "It <<ra>>ined hard."
    assert marked(Passage([" é", "\u2028", "x"], [1.0, 0, 0])) == "<<é>> x"


@pytest.mark.parametrize(
    ("text", "explanation"),
    [
        ("Explanation: words about rain", "words about rain"),
        ('I think.\n\n**Explanation:** "Rain."\n', "Rain."),
        ("Explanation: first\nno: Explanation: x\nEXPLANATION : second", "second"),
        ("words about rain", "words about rain"),
        ("<think>Explanation: no</think>\nExplanation: a\tb\0c", "a b c"),
        ("Some thoughts.\nAnd more of them.", None),
        ("Explanation:", None),
        ("", None),
        ("Explanation: " + "x" * 400, "x" * 300),
    ],
)
def test_an_explanation_is_read_out_of_what_is_said(text: str, explanation: str | None) -> None:
    assert said(text) == explanation


def test_scores_are_balanced_accuracies() -> None:
    found = scored([True] * 4 + [False] * 2, [True, True, True, False, False, True])
    assert found == {"score": (3 / 4 + 1 / 2) / 2, "found": 3, "missed": 1, "rejected": 1, "mistaken": 1, "unread": 0}
    assert scored([True, True, False], [True, None, False])["score"] == 1.0
    assert scored([True, True, False], [True, None, False])["unread"] == 1
    assert scored([True, False], [True, None])["score"] is None


def test_a_judge_that_knows_is_right_and_one_that_does_not_guesses(quiet: Quiet) -> None:
    _, hidden = halves(contexts("rain"), SETTINGS)

    def score(which: Callable[[Sequence[str]], list[bool | None]], explanation: str = "x") -> tuple[Any, Any]:
        chat: Any = SimpleNamespace(which=lambda _about, _claim, passages: which(passages))
        judge = Judge(chat, hidden, quiet.of(0), SETTINGS, 0)
        return judge.detection(explanation), judge.fuzz(explanation)

    detection, fuzz = score(lambda texts: [" rain" in f" {t}" if "<<" not in t else "<<rain>>" in t for t in texts])
    assert (detection["score"], detection["found"], detection["rejected"]) == (1.0, 6, 6)
    assert (fuzz["score"], fuzz["found"], fuzz["rejected"]) == (1.0, 3, 3)
    assert [found["score"] for found in score(lambda texts: [True] * len(texts))] == [0.5, 0.5]
    assert [found["score"] for found in score(lambda texts: [None] * len(texts))] == [None, None]
    asked: list[list[str]] = []
    score(lambda texts: asked.append(list(texts)) or [True] * len(texts), "one")
    score(lambda texts: asked.append(list(texts)) or [True] * len(texts), "another")
    assert asked[:2] == asked[2:], "the same passages for every explanation"
    assert all("rain" not in t for t in asked[0] if " q" in t), "nothing that fires is taken for quiet"


def test_a_feature_that_is_nowhere_quiet_is_not_judged(quiet: Quiet) -> None:
    chat: Any = SimpleNamespace()
    everywhere = Quiet(quiet.tokens, torch.ones_like(quiet.fires))
    _, hidden = halves(contexts("rain"), SETTINGS)
    assert Judge(chat, hidden, everywhere.of(0), SETTINGS, 0).detection("x") is None


def test_features_are_explained_and_judged_beside_baselines(storage: Storage, quiet: Quiet) -> None:
    chat = Scripted()
    outcome = made(chat, storage, quiet).run([0, 2, 4])
    assert [entry["text"] for entry in outcome.entries.values()] == [f'the word "{WORDS[i]}"' for i in (0, 2, 4)]
    for entry in outcome.entries.values():
        beside = entry["baselines"]
        assert entry["detection"]["score"] == entry["fuzz"]["score"] == beside["tokens"]["score"] == 1.0
        assert beside["other"]["score"] < 0.6, "another feature's word is in none of its passages"
    assert [entry["baselines"]["other"]["feature"] for entry in outcome.entries.values()] == [2, 4, 0]
    assert len(chat.questions) == 3 * 5
    means = {average.name: average for average in averages(outcome.entries.values())}
    assert means["detection"].mean == means["tokens"].mean == 1.0
    others = [entry["baselines"]["other"]["score"] for entry in outcome.entries.values()]
    assert means["other"].apart == pytest.approx(1 - np.mean(others))
    assert means["other"].error == pytest.approx(np.std(others, ddof=1) / np.sqrt(3))
    assert unread_answers(list(outcome.entries.values())) == (0, 3 * (12 * 3 + 6))


def test_a_run_goes_on_where_it_was(storage: Storage, quiet: Quiet, tmp_path: Path) -> None:
    whole = made(Scripted(), open_store(str(tmp_path / "other")), quiet).run(range(6))
    for fails_after in (2, 4, 9):
        chat = Scripted(fails_after)
        with pytest.raises(StageError, match="gone"):
            made(chat, storage, quiet).run(range(6))
    assert 0 < len(stored(storage).read()) <= 6
    last = Scripted()
    again = made(last, storage, quiet).run(range(6))
    assert _without_times(again) == _without_times(whole)
    assert len(last.questions) < 6 * 5
    assert made(last, storage, quiet).run(range(6)) == again
    before = len(last.questions)
    made(last, storage, quiet).run([3], force=True)
    assert len(last.questions) == before + 4, "nothing else is explained in this run, so no other's explanation"
    assert len(stored(storage).read()) == 6


def _without_times(outcome: Outcome) -> dict[int, dict[str, Any]]:
    return {f: {name: v for name, v in entry.items() if name != "made"} for f, entry in outcome.entries.items()}


def test_scores_and_baselines_are_made_up_for(storage: Storage, quiet: Quiet) -> None:
    chat = Scripted()
    bare = made(chat, storage, None).run([1, 2])
    assert [set(entry) for entry in bare.entries.values()] == [{"text", "made"}] * 2
    alone = made(chat, storage, quiet, baselines=False).run([1, 2])
    assert [set(entry) for entry in alone.entries.values()] == [{"text", "made", "detection", "fuzz"}] * 2
    assert len(chat.questions) == 2 + 4
    beside = made(chat, storage, quiet).run([1, 2])
    assert all("baselines" in entry for entry in beside.entries.values())


def test_features_that_fire_too_seldom_and_answers_without_words_are_named(storage: Storage, quiet: Quiet) -> None:
    chat = Scripted()
    chat.answer = lambda question: (
        "Hm.\nWell." if "<<sun>>" in question and "Of which" not in question else answer(question)
    )  # type: ignore[method-assign]
    run = made(chat, storage, quiet)
    run.records.contexts = lambda feature: contexts(WORDS[feature], 100 * feature)[: 3 if feature == 2 else None]  # type: ignore[method-assign]
    outcome = run.run([0, 1, 2])
    assert (list(outcome.entries), outcome.seldom, outcome.silent) == ([0], [2], [1])


def test_what_is_done_is_kept_while_the_rest_goes_on(
    storage: Storage, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explainer, "SAVE_SECONDS", -1.0)
    kept: list[int] = []

    def look(what: str, done: int, total: int) -> None:
        assert total == 4
        kept.append(len(stored(storage).read()))

    made(Scripted(), storage, quiet, progress=look).run([0, 1, 2, 3])
    assert kept[:4] == [1, 2, 3, 4]


def test_two_who_write_at_once_both_stay(storage: Storage) -> None:
    ready = threading.Barrier(4)

    def write(first: int) -> None:
        mine = stored(storage)
        ready.wait()
        for feature in range(first, 40, 4):
            mine.add({feature: {"text": f"t{feature}", "made": "2026"}})

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {feature: entry["text"] for feature, entry in stored(storage).read().items()} == {
        feature: f"t{feature}" for feature in range(40)
    }


def test_the_newest_stands_for_a_feature(storage: Storage) -> None:
    def entry(text: str, made: str, score: float | None = None) -> Mapping[str, Any]:
        return {"text": text, "made": made} | ({} if score is None else {"detection": {"score": score}})

    first, second = stored(storage, seed=0), stored(storage, seed=1)
    assert first.key != second.key
    first.add({1: dict(entry("old", "2026-01-01T00:00:00+00:00")), 2: dict(entry("new", "2026-01-03T00:00:00+00:00"))})
    second.add({1: dict(entry("newer", "2026-01-02T00:00:00+00:00", 0.75)), 2: dict(entry("older", "2026-01-02"))})
    found = newest(storage, [first.key, second.key, "saes/sae/features/f.test/explanations/gone.json"])
    assert {feature: one.text for feature, one in found.items()} == {1: "newer", 2: "new"}
    assert (found[1].detection, found[1].fuzz, found[1].llm) == (0.75, None, "scripted")
    storage.write(first.key, b'{"v": 1, "features": {"1": {}}}')
    with pytest.raises(CorruptError, match=r"is not readable as explanations .*; remove it and explain again"):
        newest(storage, [first.key])
    assert first.key.startswith(layout.explanations_folder("sae", "f.test") + "/scripted-")


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = make_tiny_model("llama", tmp_path_factory.mktemp("explain") / "model")
    return LanguageModel.load(resolve_model(ModelConfig(id=str(folder))), dtype="float32")


def test_held_out_passages_fire_as_a_pass_by_hand_says(lm: LanguageModel) -> None:
    size, train, held_out = 32, 3, 7
    ids = np.random.default_rng(0).integers(5, 300, (train + held_out, size), dtype=np.int32)
    doc = np.zeros_like(ids)
    doc[train + 1, 20:] = -1  # padding from there on
    special = int(lm.tokenizer.eos_token_id)  # type: ignore[arg-type]
    ids[train + 2, 12] = special
    corpus: Any = SimpleNamespace(
        manifest=SimpleNamespace(id="c.test", context_size=size, windows={"train": train, "held_out": held_out}),
        windows=lambda start, stop: Windows(ids[start:stop], doc[start:stop]),
    )
    mine = sae(FIRST, StandardConfig(l1_coefficient=1.0))
    mine.module.b_enc.data.sub_(0.8)
    quiet = held_out_passages(lm, "mine", mine, corpus, 10)
    expected: list[list[bool]] = []
    for window in range(train, train + held_out):
        seen: list[torch.Tensor] = []
        handle = lm.model.get_submodule(FIRST).register_forward_hook(lambda *args: seen.append(args[2]))  # noqa: B023
        with torch.no_grad():
            lm.model(torch.from_numpy(ids[window : window + 1]).long())
        handle.remove()
        codes = mine.encode(seen[0][0])
        for start in (1, 11, 21):
            stretch = slice(start, start + 10)
            if (doc[window, stretch] >= 0).all() and special not in ids[window, stretch]:
                expected.append((codes[stretch] > 0).any(0).tolist())
    assert quiet.fires.tolist() == expected
    assert len(quiet.tokens) == len(expected) == 3 * held_out - 2 - 1
    assert 0.1 < quiet.fires.float().mean() < 0.9, "some fire and some do not"
    feature = int(quiet.fires.float().mean(0).sub(0.5).abs().argmin())
    assert len(quiet.of(feature)) == int((~quiet.fires[:, feature]).sum())
    assert len(held_out_passages(lm, "mine", mine, corpus, 10, most=4).tokens) == 4
    doc[:] = -1
    with pytest.raises(CorpusError, match="has no passage of 10 tokens"):
        held_out_passages(lm, "mine", mine, corpus, 10)
