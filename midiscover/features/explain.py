"""Features explained by a language model, and judged by how well each explanation tells where its feature fires.

The model sees some of a feature's contexts with the tokens marked where it fires, and says in a phrase what they have
in common. The explanation alone is then judged on passages that were not shown, as delphi does (Paulo et al. 2024,
arXiv 2410.13928):

    detection   in which of the passages does the feature fire?  half of them do, half are held-out text where it is 0
    fuzz        in which of these contexts are the right tokens marked?  in half of them others are

A score is the balanced accuracy of the answers, 0.5 for guesses. Beside it stand, on the same passages, the same
judge's for another feature's explanation, which tells what the passages give away, and, of detection, for the tokens at
the feature's peaks, which need no language model.

So that nothing but the text tells the two kinds of passages apart, both are written alike, without special tokens, and
are as long; and marks, right or wrong, have as much text around them.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

from midiscover.chat import Chat, thought_out
from midiscover.features.labels import peaks
from midiscover.features.records import Context
from midiscover.tokens import TokenStrings, shown

MARK_ABOVE = 0.3
"""Share of a context's maximum above which a token is marked, as in delphi."""
BESIDE = {"tokens": "detection", "other": "detection", "other_fuzz": "fuzz"}
"""The baselines, and the score that each stands beside."""
SPACE = "\u2423"
FEWEST = 2
"""Contexts that are shown, and passages of each kind that are judged, at least."""
LONGEST = 300
"""Characters of an explanation; Neuronpedia takes 512."""
_SAID = re.compile(r"\bexplanation\b[^:\uff1a\n]{0,40}[:\uff1a][\s*]*(.*)$", re.IGNORECASE | re.MULTILINE)
_JOINERS = "\u200c\u200d"
"""Of Persian, of Indian scripts, of emoji: `isprintable` has them as unprintable."""
_PHRASE = "<one phrase of at most 20 words>"

_EXPLAIN = """\
A feature of a language model fires on some tokens of a text and not on others. Below are {count} passages in which it \
fires. The tokens where it fires stand between << and >>; what comes before a token may matter as well.

{passages}

What do the marked tokens, or their contexts, have in common? Be specific, say nothing of the marks, and give no list \
of examples. You may think first. End with one line:
Explanation: {phrase}"""

_ABOUT = "A feature of a language model fires on this: {explanation}"
_DETECTION = "the feature fires somewhere in it"
_FUZZ = "the tokens between << and >> are those where the feature fires"


class Passage(NamedTuple):
    """A stretch of text and what a feature does there."""

    tokens: list[str]
    values: list[float]
    peak: int = 0
    """Place of the token that it is about."""


class Reader:
    """Makes passages of token ids; all texts that a model is shown pass through it."""

    def __init__(self, tokenizer: Any) -> None:
        self._strings = TokenStrings(tokenizer)
        self._special = frozenset(tokenizer.all_special_ids)

    def passage(self, token_ids: Sequence[int], values: Sequence[float], peak: int = 0) -> Passage:
        """Special tokens are left out; a character in several tokens is one, as active as the strongest of them; line
        breaks and tabs are arrows, for they may be what a feature fires on."""
        tokens: list[str] = []
        merged: list[float] = []
        place = 0
        kept = [at for at, token in enumerate(token_ids) if token not in self._special]
        texts = self._strings.in_text([token_ids[at] for at in kept], once=True)
        for at, text in zip(kept, texts, strict=True):
            if text or not tokens:
                tokens.append(shown(text) if text else "")
                merged.append(values[at])
            else:
                merged[-1] = max(merged[-1], values[at])
            if at <= peak:
                place = len(tokens) - 1
        return Passage(tokens, merged, place)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainSettings:
    """How features are explained and judged."""

    shown: int = 10
    """Contexts that the model sees."""
    judged: int = 10
    """Passages of each kind that it judges: where the feature fires, and where it does not."""
    seed: int = 0
    """Of the order of the passages, and of the tokens that are marked wrongly."""


def halves(
    contexts: Sequence[Context], settings: ExplainSettings, reader: Reader
) -> tuple[list[Passage], list[Passage]]:
    """Contexts to show and contexts to judge, of different windows: half of each from the highest, half from intervals
    of activation, as far as there are so many."""
    top = [c for c in contexts if c.kind == "top" and max(c.values) > 0]
    seen = {c.window for c in top}
    kinds = {"top": top, "interval": [c for c in contexts if c.kind == "interval" and c.window not in seen]}
    chosen: list[list[Context]] = [[], []]
    windows: list[set[int]] = [set(), set()]
    for place, most in ((0, settings.shown), (1, settings.judged)):
        mine = [(kind, found[place::2]) for kind, found in kinds.items()]
        for kind, found in mine:
            wanted = most // 2 if kind == "interval" else most - most // 2
            _take(_spread(found, wanted), chosen[place], windows[place], windows[1 - place], most)
        for _, found in mine:
            _take(found, chosen[place], windows[place], windows[1 - place], most)
    first, second = ([reader.passage(c.token_ids, c.values, c.peak) for c in found] for found in chosen)
    return first, second


def _take(found: Sequence[Context], into: list[Context], mine: set[int], others: set[int], most: int) -> None:
    """Add those of windows that are neither there nor on the other side, until there are `most`."""
    for context in found:
        if len(into) < most and context.window not in mine | others:
            into.append(context)
            mine.add(context.window)


def _spread(found: Sequence[Context], most: int) -> list[Context]:
    """At most so many, evenly over what there is."""
    count = min(most, len(found))
    return [found[len(found) * i // count] for i in range(count)]


def explain(chat: Chat, passages_shown: Sequence[Passage]) -> str | None:
    """What the model says of a feature; None where its answer holds no explanation."""
    passages = "\n".join(f"{number}. {marked(passage)}" for number, passage in enumerate(passages_shown, start=1))
    return said(chat.answer(_EXPLAIN.format(count=len(passages_shown), passages=passages, phrase=_PHRASE)))


def said(answer: str) -> str | None:
    """The explanation in an answer: what follows the last `Explanation:`."""
    named = _SAID.findall(thought_out(answer))
    if not named or named[-1].strip() == _PHRASE:
        return None
    text = "".join(c if c.isprintable() or c in _JOINERS else " " for c in named[-1]).strip(" *")
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text[:LONGEST].rstrip() or None


class Judge:
    """The passages by which explanations of one feature are judged; the same ones for all of them."""

    def __init__(
        self, firing: Sequence[Passage], quiet: Sequence[Passage], settings: ExplainSettings, feature: int
    ) -> None:
        """firing, quiet: passages in which the feature fires and such in which it is 0 everywhere; as many of the one
        as of the other are asked about."""
        random = Random(f"{settings.seed} {feature}")
        count = min(len(firing), len(quiet), settings.judged)
        drawn = random.sample(list(quiet), count)
        self._detection = [(plain(passage.tokens), True) for passage in firing[:count]]
        self._detection += [(plain(q.tokens[: len(p.tokens)]), False) for p, q in zip(firing, drawn, strict=False)]
        random.shuffle(self._detection)
        order = list(firing)
        random.shuffle(order)
        wrong = [text for passage in order[: len(order) // 2] if (text := _misled(passage, random)) is not None]
        right = [_trimmed(passage, random) for passage in order[len(order) // 2 :]]
        pairs = min(len(right), len(wrong))
        self._fuzz = [*((text, True) for text in right[:pairs]), *((text, False) for text in wrong[:pairs])]
        random.shuffle(self._fuzz)

    def detection(self, chat: Chat, explanation: str) -> dict[str, Any] | None:
        """`score`, the four counts that it is made of, and `unread`, of answers that held no list; None where there are
        too few passages to judge by."""
        return _asked(chat, _DETECTION, explanation, self._detection)

    def fuzz(self, chat: Chat, explanation: str) -> dict[str, Any] | None:
        """The same, of marks."""
        return _asked(chat, _FUZZ, explanation, self._fuzz)


def _asked(chat: Chat, claim: str, explanation: str, passages: Sequence[tuple[str, bool]]) -> dict[str, Any] | None:
    if len(passages) < 2 * FEWEST:
        return None
    about = _ABOUT.format(explanation=explanation)
    return scored([truth for _, truth in passages], chat.which(about, claim, [text for text, _ in passages]))


def scored(truth: Sequence[bool], answers: Sequence[bool | None]) -> dict[str, Any]:
    """Balanced accuracy: the mean of the share of the ones that were found and of the zeros that were. None where one
    of the two was never answered."""
    pairs = list(zip(truth, answers, strict=True))
    counts = {
        name: sum((fires, told) == kind for fires, told in pairs)
        for name, kind in (
            ("found", (True, True)),
            ("missed", (True, False)),
            ("rejected", (False, False)),
            ("mistaken", (False, True)),
        )
    }
    ones, zeros = counts["found"] + counts["missed"], counts["rejected"] + counts["mistaken"]
    score = (counts["found"] / ones + counts["rejected"] / zeros) / 2 if ones and zeros else None
    return {"score": score, **counts, "unread": len(pairs) - ones - zeros}


def judged(
    chat: Chat, judge: Judge, text: str, row: Mapping[str, Any] | None, other: tuple[int, str] | None
) -> dict[str, Any]:
    """Scores of an explanation and, with the feature's `row` of features.parquet, of what stands beside it.

    other: another feature and its explanation; None where there is none.
    """
    found: dict[str, Any] = {"detection": judge.detection(chat, text), "fuzz": judge.fuzz(chat, text)}
    if row is None:
        return found
    beside: dict[str, Any] = {"tokens": judge.detection(chat, peaks(row)), "other": None, "other_fuzz": None}
    if other is not None:
        beside["other"] = _of(other[0], judge.detection(chat, other[1]))
        beside["other_fuzz"] = _of(other[0], judge.fuzz(chat, other[1]))
    return {**found, "baselines": beside}


def _of(feature: int, found: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if found is None else {"feature": feature, **found}


def plain(tokens: Sequence[str]) -> str:
    """A passage on one line."""
    return _line("".join(tokens))


def marked(passage: Passage) -> str:
    """The same with << >> around the tokens whose activation is above `MARK_ABOVE` of the passage's highest."""
    return _marked(passage.tokens, _marks(passage))


def _marks(passage: Passage) -> list[bool]:
    limit = MARK_ABOVE * max(passage.values)
    return [value > limit for value in passage.values]


def _trimmed(passage: Passage, random: Random) -> str:
    """`marked`, from anywhere before the first mark on: so much text stands before wrong marks."""
    marks = _marks(passage)
    start = random.randint(0, marks.index(True))
    return _marked(passage.tokens[start:], marks[start:])


def _misled(passage: Passage, random: Random) -> str | None:
    """As many other tokens marked, where the feature is 0, the last with as much text after it; None where there are
    not so many."""
    marks = _marks(passage)
    count, after = sum(marks), len(marks) - 1 - passage.peak
    silent = [at for at, value in enumerate(passage.values[: len(marks) - after]) if value <= 0]
    if len(silent) < count:
        return None
    wrong = sorted(random.sample(silent, count))
    stop = wrong[-1] + 1 + after
    return _marked(passage.tokens[:stop], [at in wrong for at in range(stop)])


def _marked(tokens: Sequence[str], marks: Sequence[bool]) -> str:
    """Neighbours that are marked share one pair of marks; a space by itself that is marked is seen."""
    pieces: list[str] = []
    before = False
    for token, mark in zip([*tokens, ""], [*marks, False], strict=True):
        if before and not mark:
            pieces.append(">>")
        if mark and not token.strip():
            token = SPACE
        if mark and not before:
            blank = token[: len(token) - len(token.lstrip())]
            pieces.append(blank + "<<")
            token = token[len(blank) :]
        pieces.append(token)
        before = mark
    return _line("".join(pieces))


def _line(text: str) -> str:
    return " ".join(text.split())


class Average(NamedTuple):
    """Over features."""

    name: str
    """`detection`, `fuzz`, or of which of the baselines."""
    mean: float
    error: float | None
    """Standard error; None of one feature."""
    features: int
    apart: float | None
    """Of a baseline: by how much the explanations' score is above it, on the features that have both."""
    apart_error: float | None


def averages(entries: Iterable[Mapping[str, Any]]) -> list[Average]:
    """Of scores of explanations and of what stands beside them; what nothing has is left out."""
    rows = [
        {name: _score(entry.get(name)) for name in ("detection", "fuzz")}
        | {name: _score((entry.get("baselines") or {}).get(name)) for name in BESIDE}
        for entry in entries
    ]
    found = []
    for name in ("detection", "fuzz", *BESIDE):
        values = [score for row in rows if (score := row[name]) is not None]
        if not values:
            continue
        apart: tuple[float | None, float | None] = (None, None)
        if name in BESIDE:
            both = [(row[BESIDE[name]], row[name]) for row in rows]
            pairs = [mine - beside for mine, beside in both if mine is not None and beside is not None]
            apart = _mean(pairs) if pairs else apart
        found.append(Average(name, statistics.fmean(values), _mean(values)[1], len(values), *apart))
    return found


def unread_answers(entries: Collection[Mapping[str, Any]]) -> tuple[int, int]:
    """Passages whose answer held no list, and all that were asked about."""
    found = [one for entry in entries for one in (entry.get("detection"), entry.get("fuzz"))]
    found += [one for entry in entries for one in (entry.get("baselines") or {}).values()]
    counted = [one for one in found if one is not None]
    names = ("found", "missed", "rejected", "mistaken", "unread")
    return sum(one["unread"] for one in counted), sum(one[name] for one in counted for name in names)


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def _score(found: Mapping[str, Any] | None) -> float | None:
    return None if found is None else found["score"]
