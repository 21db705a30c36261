"""What of a feature is shown and judged, how texts are written and answers read."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from midiscover.config import ModelConfig
from midiscover.errors import CorpusError
from midiscover.features.explain import (
    ExplainSettings,
    Judge,
    Passage,
    Reader,
    halves,
    marked,
    said,
    scored,
)
from midiscover.features.quiet import Quiet, held_out_passages
from midiscover.lm import LanguageModel
from midiscover.models import resolve_model
from midiscover.packing import Windows
from midiscover.saeconfig import StandardConfig
from tests.tiny import make_tiny_model
from tests.unit.features.explained import (
    READER,
    SETTINGS,
    context,
    contexts,
    quiet,
    storage,
)
from tests.unit.test_interpret import FIRST, sae

__all__ = ["quiet", "storage"]  # fixtures


def test_what_is_shown_and_what_is_judged_share_no_window() -> None:
    found = contexts("rain")
    shown, judged = halves(found, SETTINGS, READER)
    assert (len(shown), len(judged)) == (6, 6)
    window = {c.tokens[0]: c.window for c in found}
    kinds = {c.tokens[0]: c.kind for c in found if c.window >= 20 or c.kind == "top"}
    windows = [[window[passage.tokens[0]] for passage in side] for side in (shown, judged)]
    assert not set(windows[0]) & set(windows[1])
    assert all(len(set(side)) == len(side) for side in windows)
    for side in (shown, judged):
        assert sorted(kinds[passage.tokens[0]] for passage in side) == ["interval"] * 3 + ["top"] * 3
        lowest = min(max(passage.values) for passage in side)
        assert lowest < 4.0, "intervals from high to low"
    few = [context("top", i, "rain", 1.0, i) for i in range(5)]
    shown, judged = halves(few, SETTINGS, READER)
    assert (len(shown), len(judged)) == (3, 2), "the highest make up for intervals that are not there"
    assert halves([context("random", 1, "rain", 1.0), context("top", 2, "rain", 0.0)], SETTINGS, READER) == ([], [])


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
        ("words about rain", None),
        ("I'm sorry, I can't help with that.", None),
        ("Final explanation (short): words about rain", "words about rain"),
        ("Explanation\uff1a\u96e8", "\u96e8"),
        ('Explanation: "the" and "a"', '"the" and "a"'),
        (
            "Explanation: \u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
            "\u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        ),
        ("<think>Explanation: they are cut off", None),
        ("Explanation: <one phrase of at most 20 words>", None),
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
    _, hidden = halves(contexts("rain"), SETTINGS, READER)
    judge = Judge(hidden, quiet.of(0), SETTINGS, 0)
    asked: list[list[str]] = []

    def score(which: Callable[[Sequence[str]], list[bool | None]]) -> tuple[Any, Any]:
        def told(_about: str, _claim: str, passages: Sequence[str]) -> list[bool | None]:
            asked.append(list(passages))
            return which(passages)

        chat: Any = SimpleNamespace(which=told)
        return judge.detection(chat, "x"), judge.fuzz(chat, "x")

    detection, fuzz = score(lambda texts: [" rain" in f" {t}" if "<<" not in t else "<<rain>>" in t for t in texts])
    assert (detection["score"], detection["found"], detection["rejected"]) == (1.0, 6, 6)
    assert (fuzz["score"], fuzz["found"], fuzz["rejected"]) == (1.0, 3, 3)
    assert [found["score"] for found in score(lambda texts: [True] * len(texts))] == [0.5, 0.5]
    assert [found["score"] for found in score(lambda texts: [None] * len(texts))] == [None, None]
    assert asked[:2] == asked[2:4] == asked[4:], "the same passages for every explanation"
    assert all("rain" not in t for t in asked[0] if " q" in t), "nothing that fires is taken for quiet"


def test_a_feature_that_is_nowhere_quiet_is_not_judged(quiet: Quiet) -> None:
    chat: Any = SimpleNamespace()
    everywhere = Quiet(quiet.passages, torch.ones_like(quiet.fires))
    _, hidden = halves(contexts("rain"), SETTINGS, READER)
    assert Judge(hidden, everywhere.of(0), SETTINGS, 0).detection(chat, "x") is None


def test_neither_length_nor_place_tells_what_is_right() -> None:
    """Passages like those of records: 24 tokens before the peak and 8 after it, some cut short by their window."""
    chance, firing = random.Random(0), []
    for number in range(400):
        before = 24 if number % 3 else chance.randint(0, 23)
        tokens = [f" w{number}x{i}" for i in range(before + 9)]
        firing.append(Passage(tokens, [0.0] * before + [1.0] + [0.0] * 8, before))
    quiet = [Passage([f" q{number}x{i}" for i in range(33)], [0.0] * 33) for number in range(500)]
    settings = ExplainSettings(judged=400)
    lengths: dict[bool, list[int]] = {True: [], False: []}
    places: dict[bool, list[tuple[int, int]]] = {True: [], False: []}

    def which(_about: str, claim: str, passages: Sequence[str]) -> list[bool | None]:
        for text in passages:
            words = text.split()
            if "<<" not in claim:
                lengths[" w" in f" {text}"].append(len(words))
            else:
                at = next(i for i, word in enumerate(words) if "<<" in word)
                place = int(words[at].strip("<>").partition("x")[2])
                owner = int(words[at].strip("<>w").partition("x")[0])
                places[place == firing[owner].peak].append((at, len(words) - 1 - at))
        return [True] * len(passages)

    chat: Any = SimpleNamespace(which=which)
    judge = Judge(firing, quiet, settings, 0)
    judge.detection(chat, "x")
    judge.fuzz(chat, "x")
    assert sorted(lengths[True]) == sorted(lengths[False])
    assert len(places[True]) == len(places[False]) > 150
    assert {after for _, after in places[True] + places[False]} == {8}
    before = [np.mean([at for at, _ in places[kind]]) for kind in (True, False)]
    assert before[0] == pytest.approx(before[1], abs=1.5), "of at most 24"


def test_texts_are_written_as_they_are_read(lm: LanguageModel) -> None:
    tokenizer: Any = lm.tokenizer
    reader = Reader(tokenizer)
    text = "caf\u00e9 \u2615\n\u96e8\u304c\tit rained"
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    values = [float(i) for i in range(len(ids))]
    passage = reader.passage(ids, values, peak=len(ids) - 2)
    assert "".join(passage.tokens) == "caf\u00e9 \u2615\u21b5\u96e8\u304c\u2192it rained"
    assert len(passage.tokens) == len(passage.values) < len(ids) - 2, "pieces of a character are one token"
    assert passage.values == sorted(passage.values)
    assert passage.values[-1] == len(ids) - 2, "special tokens are left out, with what fires on them"
    assert passage.peak == len(passage.tokens) - 1
    whole = passage.tokens.index(next(token for token in passage.tokens if "\u96e8" in token))
    assert marked(Passage(passage.tokens, [float(i == whole) for i in range(len(passage.tokens))])).count("<<") == 1
    assert marked(Passage([" a", "\u21b5", " b"], [0, 1.0, 0])) == "a<<\u21b5>> b"
    assert marked(Passage([" a", " ", " b"], [0, 1.0, 0])) == "a<<\u2423>> b"


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
    assert len(quiet.passages) == len(expected) == 3 * held_out - 2 - 1
    assert 0.1 < quiet.fires.float().mean() < 0.9, "some fire and some do not"
    feature = int(quiet.fires.float().mean(0).sub(0.5).abs().argmin())
    assert len(quiet.of(feature)) == int((~quiet.fires[:, feature]).sum())
    assert len(held_out_passages(lm, "mine", mine, corpus, 10, most=4).passages) == 4
    doc[:] = -1
    with pytest.raises(CorpusError, match="has no passage of 10 tokens"):
        held_out_passages(lm, "mine", mine, corpus, 10)
