"""Runs that explain features: beside baselines, resumed, interrupted, refused; and what is stored of them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from midiscover.chat import RefusedError
from midiscover.errors import CorruptError, StageError
from midiscover.features import explainer
from midiscover.features.explain import (
    averages,
    unread_answers,
)
from midiscover.features.explainer import HOPELESS, Outcome
from midiscover.features.explanations import newest
from midiscover.features.quiet import Quiet
from midiscover.store import layout
from midiscover.store.storage import Storage, open_store
from tests.llm import answer
from tests.unit.features.explained import (
    WORDS,
    Scripted,
    contexts,
    made,
    quiet,
    storage,
    stored,
)

__all__ = ["quiet", "storage"]  # fixtures


def test_features_are_explained_and_judged_beside_baselines(storage: Storage, quiet: Quiet) -> None:
    chat = Scripted()
    outcome = made(chat, storage, quiet).run([0, 2, 4])
    assert [entry["text"] for entry in outcome.entries.values()] == [f'the word "{WORDS[i]}"' for i in (0, 2, 4)]
    for entry in outcome.entries.values():
        beside = entry["baselines"]
        assert entry["detection"]["score"] == entry["fuzz"]["score"] == beside["tokens"]["score"] == 1.0
        assert beside["other"]["score"] < 0.6, "another feature's word is in none of its passages"
        assert beside["other_fuzz"]["score"] == 0.5
    assert [entry["baselines"]["other"]["feature"] for entry in outcome.entries.values()] == [2, 4, 0]
    assert len(chat.questions) == 3 * 6
    means = {average.name: average for average in averages(outcome.entries.values())}
    assert means["detection"].mean == means["tokens"].mean == 1.0
    others = [entry["baselines"]["other"]["score"] for entry in outcome.entries.values()]
    assert means["other"].apart == pytest.approx(1 - np.mean(others))
    assert means["other"].error == pytest.approx(np.std(others, ddof=1) / np.sqrt(3))
    assert (means["other_fuzz"].mean, means["other_fuzz"].apart) == (0.5, 0.5)
    assert unread_answers(list(outcome.entries.values())) == (0, 3 * (12 * 3 + 6 * 2))


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
    assert len(last.questions) < 6 * 6
    assert made(last, storage, quiet).run(range(6)) == again
    before = len(last.questions)
    made(last, storage, quiet).run([3], force=True)
    assert len(last.questions) == before + 6
    assert len(stored(storage).read()) == 6


def test_what_stands_beside_a_feature_is_made_up_for_when_there_is_one(storage: Storage, quiet: Quiet) -> None:
    chat = Scripted()
    alone = made(chat, storage, quiet).run([3])
    assert alone.entries[3]["baselines"]["other"] is None
    made(chat, storage, quiet).run([5])
    both = made(chat, storage, quiet).run([3]).entries[3]["baselines"]
    assert (both["other"]["feature"], both["other_fuzz"]["feature"]) == (5, 5)
    asked = len(chat.questions)
    made(chat, storage, quiet).run([3, 5])
    assert len(chat.questions) == asked


class Gate(Scripted):
    """Answers only when it is let, so that a test knows what is under way."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.go = threading.Semaphore(0), threading.Semaphore(0)

    def answer(self, question: str) -> str:
        self.asked.release()
        assert self.go.acquire(timeout=30)
        return super().answer(question)


@pytest.mark.parametrize("wrong", ["ctrl-c", "gone"])
def test_what_is_under_way_when_a_run_ends_is_kept_and_nothing_more_asked(
    storage: Storage, quiet: Quiet, wrong: str
) -> None:
    chat = Gate()

    def ends(what: str, done: int, _total: int) -> None:
        if what == "explained" and done == 1:
            for _ in range(20):  # the others are under way, and are answered while the run ends
                chat.go.release()
            raise KeyboardInterrupt if wrong == "ctrl-c" else StageError("gone")

    run = made(chat, storage, quiet, progress=ends)
    caught: list[BaseException] = []

    def work() -> None:
        try:
            run.run(range(6))
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(3):
        assert chat.asked.acquire(timeout=30)
    chat.go.release()
    thread.join(60)
    assert isinstance(caught[0], KeyboardInterrupt if wrong == "ctrl-c" else StageError)
    assert 2 <= len(stored(storage).read()) == len(chat.questions) < 6


def test_a_feature_that_is_refused_stops_no_other(storage: Storage, quiet: Quiet) -> None:
    class Prim(Scripted):
        def answer(self, question: str) -> str:
            if f"<<{WORDS[0]}>>" in question or len(self.questions) > 60:
                raise RefusedError("against my rules")
            return super().answer(question)

    outcome = made(Prim(), storage, quiet).run(range(6))
    assert outcome.refused == {0: "against my rules"}
    assert list(outcome.entries) == [1, 2, 3, 4, 5]
    assert all("detection" in entry for entry in outcome.entries.values())


def test_a_model_that_refuses_everything_is_asked_no_further(storage: Storage, quiet: Quiet) -> None:
    chat = Scripted()
    chat.at_once = 1
    chat.answer = lambda question: _refuse(chat, question)  # type: ignore[method-assign]
    with pytest.raises(RefusedError, match="no such setting"):
        made(chat, storage, quiet).run(range(6))
    assert HOPELESS <= len(chat.questions) < 6
    few = Scripted()
    few.answer = lambda question: _refuse(few, question)  # type: ignore[method-assign]
    with pytest.raises(RefusedError, match="no such setting"):
        made(few, storage, quiet).run([2])


def _refuse(chat: Scripted, question: str) -> str:
    chat.questions.append(question)
    raise RefusedError("no such setting")


def test_a_damaged_document_is_told_before_anything_is_asked(storage: Storage, quiet: Quiet) -> None:
    chat = Scripted()
    made(chat, storage, quiet).run([1])
    storage.write(stored(storage).key(1), b"{")
    asked = len(chat.questions)
    for force in (False, True):
        with pytest.raises(CorruptError, match="remove it and explain again"):
            made(chat, storage, quiet).run([1, 2], force=force)
    assert len(chat.questions) == asked


def _without_times(outcome: Outcome) -> dict[int, dict[str, Any]]:
    return {f: {name: v for name, v in entry.items() if name != "made"} for f, entry in outcome.entries.items()}


def test_scores_and_baselines_are_made_up_for(storage: Storage, quiet: Quiet) -> None:
    chat = Scripted()
    bare = made(chat, storage, None).run([1, 2])
    assert [set(entry) for entry in bare.entries.values()] == [{"text", "made"}] * 2
    alone = made(chat, storage, quiet, baselines=False).run([1, 2])
    assert [set(entry) for entry in alone.entries.values()] == [{"text", "made", "detection", "fuzz"}] * 2
    assert [entry["made"] for entry in alone.entries.values()] == [entry["made"] for entry in bare.entries.values()]
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
    assert kept[:4] == sorted(kept[:4])
    assert kept[3] == 4


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
    assert first.key(1) != second.key(1)
    assert first.key(1) == first.key(2) != first.key(5000)
    first.add({1: dict(entry("old", "2026-01-01T00:00:00+00:00")), 2: dict(entry("new", "2026-01-03T00:00:00+00:00"))})
    second.add({1: dict(entry("newer", "2026-01-02T00:00:00+00:00", 0.75)), 2: dict(entry("older", "2026-01-02"))})
    first.add({5000: dict(entry("far", "2026-01-01"))})
    assert {feature: one["text"] for feature, one in first.read().items()} == {1: "old", 2: "new", 5000: "far"}
    keys = [first.key(1), second.key(1)]
    found = newest(storage, [*keys, "saes/sae/features/f.test/explanations/gone.json"])
    assert {feature: one.text for feature, one in found.items()} == {1: "newer", 2: "new"}
    assert (found[1].detection, found[1].fuzz, found[1].llm) == (0.75, None, "scripted")
    assert first.key(1).startswith(layout.explanations_folder("sae", "f.test") + "/scripted-")


@pytest.mark.parametrize(
    "document",
    [
        "{",
        "[]",
        '{"v": 2, "llm": "x", "features": {}}',
        '{"v": 1, "features": {}}',
        '{"v": 1, "llm": "x", "features": {"1": {}}}',
        '{"v": 1, "llm": "x", "features": {"b": {"text": "x", "made": "2026"}}}',
        '{"v": 1, "llm": "x", "features": {"1": {"text": "x", "made": 2026}}}',
        '{"v": 1, "llm": "x", "features": {"1": {"text": "x", "made": "2026", "detection": "good"}}}',
        '{"v": 1, "llm": "x", "features": {"1": {"text": "x", "made": "2026", "fuzz": {"score": "high"}}}}',
    ],
)
def test_a_document_that_is_none_takes_no_other_down(
    storage: Storage, document: str, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = stored(storage, seed=0), stored(storage, seed=1)
    good.add({7: {"text": "fine", "made": "2026"}})
    storage.write(bad.key(7), document.encode())
    found = newest(storage, [good.key(7), bad.key(7)])
    assert {feature: one.text for feature, one in found.items()} == {7: "fine"}
    assert "remove it and explain again" in caplog.text
    with pytest.raises(CorruptError, match="remove it and explain again"):
        bad.read()
    with pytest.raises(CorruptError, match="remove it and explain again"):
        bad.add({8: {"text": "x", "made": "2026"}})
