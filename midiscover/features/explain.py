"""Features explained by a language model, and judged by how well each explanation tells where its feature fires.

The model sees some of a feature's contexts with the tokens marked where it fires, and says in a phrase what they have
in common. The explanation alone is then judged on passages that were not shown, as delphi does (Paulo et al. 2024,
arXiv 2410.13928):

    detection   in which of the passages does the feature fire?  half of them do, half are held-out text where it is 0
    fuzz        in which of these contexts are the right tokens marked?  in half of them others are

A score is the balanced accuracy of the answers, 0.5 for guesses. Beside it stand, on the same passages, the same
judge's for another feature's explanation, which tells what the passages give away, and for the tokens at the feature's
peaks, which need no language model.
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

MARK_ABOVE = 0.3
"""Share of a context's maximum above which a token is marked, as in delphi."""
FEWEST = 2
"""Contexts that are shown, and passages of each kind that are judged, at least."""
LONGEST = 300
"""Characters of an explanation; Neuronpedia takes 512."""
_SAID = re.compile(r"^\W*explanation\W*:[\s*]*(.*)$", re.IGNORECASE | re.MULTILINE)

_EXPLAIN = """\
A feature of a language model fires on some tokens of a text and not on others. Below are {count} passages in which it \
fires. The tokens where it fires stand between << and >>; what comes before a token may matter as well.

{passages}

What do the marked tokens, or their contexts, have in common? Be specific, say nothing of the marks, and give no list \
of examples. You may think first. End with one line:
Explanation: <one phrase of at most 20 words>"""

_ABOUT = "A feature of a language model fires on this: {explanation}"
_DETECTION = "the feature fires somewhere in it"
_FUZZ = "the tokens between << and >> are those where the feature fires"


class Passage(NamedTuple):
    """A stretch of text and what a feature does there."""

    tokens: list[str]
    values: list[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainSettings:
    """How features are explained and judged."""

    shown: int = 10
    """Contexts that the model sees."""
    judged: int = 10
    """Passages of each kind that it judges: where the feature fires, and where it does not."""
    seed: int = 0
    """Of the order of the passages, and of the tokens that are marked wrongly."""


def halves(contexts: Sequence[Context], settings: ExplainSettings) -> tuple[list[Passage], list[Passage]]:
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
    shown, judged = ([Passage(c.tokens, c.values) for c in found] for found in chosen)
    return shown, judged


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


def explain(chat: Chat, shown: Sequence[Passage]) -> str | None:
    """What the model says of a feature; None where its answer holds no explanation."""
    passages = "\n".join(f"{number}. {marked(passage)}" for number, passage in enumerate(shown, start=1))
    return said(chat.answer(_EXPLAIN.format(count=len(shown), passages=passages)))


def said(answer: str) -> str | None:
    """The explanation in an answer: what follows the last `Explanation:`, or all of an answer of one line."""
    answer = thought_out(answer)
    named = _SAID.findall(answer)
    lines = [line for line in answer.splitlines() if line.strip()]
    text = named[-1] if named else lines[0] if len(lines) == 1 else ""
    text = "".join(c if c.isprintable() else " " for c in text).strip(" *")
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1].strip()
    return text[:LONGEST].rstrip() or None


class Judge:
    """Asks how well explanations of one feature tell where it fires; all of them on the same passages."""

    def __init__(
        self,
        chat: Chat,
        firing: Sequence[Passage],
        quiet: Sequence[Passage],
        settings: ExplainSettings,
        feature: int,
    ) -> None:
        """firing, quiet: passages in which the feature fires and such in which it is 0 everywhere; as many of the one
        as of the other are asked about."""
        self._chat, random = chat, Random(f"{settings.seed} {feature}")
        count = min(len(firing), len(quiet), settings.judged)
        drawn = random.sample(list(quiet), count)
        self._detection = [(plain(passage), True) for passage in firing[:count]]
        self._detection += [(plain(passage), False) for passage in drawn]
        random.shuffle(self._detection)
        order = list(firing)
        random.shuffle(order)
        wrong = [_misled(passage, random) for passage in order[: len(order) // 2]]
        right = [marked(passage) for passage in order[len(order) // 2 :]]
        pairs = min(len(right), sum(text is not None for text in wrong))
        self._fuzz = [(text, True) for text in right[:pairs]]
        self._fuzz += [(text, False) for text in [text for text in wrong if text is not None][:pairs]]
        random.shuffle(self._fuzz)

    def detection(self, explanation: str) -> dict[str, Any] | None:
        """`score`, the four counts that it is made of, and `unread`, of answers that held no list; None where there are
        too few passages to judge by."""
        return self._asked(_DETECTION, explanation, self._detection)

    def fuzz(self, explanation: str) -> dict[str, Any] | None:
        """The same, of marks."""
        return self._asked(_FUZZ, explanation, self._fuzz)

    def _asked(self, claim: str, explanation: str, passages: Sequence[tuple[str, bool]]) -> dict[str, Any] | None:
        if len(passages) < 2 * FEWEST:
            return None
        about = _ABOUT.format(explanation=explanation)
        return scored([truth for _, truth in passages], self._chat.which(about, claim, [text for text, _ in passages]))


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
    judge: Judge, text: str, row: Mapping[str, Any], other: tuple[int, str] | None, *, baselines: bool = True
) -> dict[str, Any]:
    """Scores of an explanation and, with `baselines`, of what stands beside it.

    row: of features.parquet. other: another feature and its explanation; None where there is none.
    """
    found: dict[str, Any] = {"detection": judge.detection(text), "fuzz": judge.fuzz(text)}
    if not baselines:
        return found
    beside: dict[str, Any] = {"tokens": judge.detection(peaks(row)), "other": None}
    if other is not None:
        scores = judge.detection(other[1])
        beside["other"] = scores and {"feature": other[0], **scores}
    return {**found, "baselines": beside}


def plain(passage: Passage) -> str:
    """A passage on one line."""
    return _line("".join(passage.tokens))


def marked(passage: Passage) -> str:
    """The same with << >> around the tokens whose activation is above `MARK_ABOVE` of the passage's highest."""
    limit = MARK_ABOVE * max(passage.values)
    return _marked(passage.tokens, [value > limit for value in passage.values])


def _misled(passage: Passage, random: Random) -> str | None:
    """As many other tokens marked, where the feature is 0; None where there are not so many."""
    limit = MARK_ABOVE * max(passage.values)
    count = sum(value > limit for value in passage.values)
    silent = [place for place, value in enumerate(passage.values) if value <= 0 and passage.tokens[place].strip()]
    if len(silent) < count:
        return None
    wrong = set(random.sample(silent, count))
    return _marked(passage.tokens, [place in wrong for place in range(len(passage.tokens))])


def _marked(tokens: Sequence[str], marks: Sequence[bool]) -> str:
    """Neighbours that are marked share one pair of marks."""
    pieces: list[str] = []
    before = False
    for token, mark in zip([*tokens, ""], [*marks, False], strict=True):
        if before and not mark:
            pieces.append(">>")
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
    """`detection`, `fuzz`, or of which baseline."""
    mean: float
    error: float | None
    """Standard error; None of one feature."""
    features: int
    apart: float | None
    """Of a baseline: by how much the explanations' detection is above it, on the features that have both."""
    apart_error: float | None


def averages(entries: Iterable[Mapping[str, Any]]) -> list[Average]:
    """Of scores of explanations and of what stands beside them; what nothing has is left out."""
    rows = [
        {name: _score(entry.get(name)) for name in ("detection", "fuzz")}
        | {name: _score((entry.get("baselines") or {}).get(name)) for name in ("tokens", "other")}
        for entry in entries
    ]
    found = []
    for name in ("detection", "fuzz", "tokens", "other"):
        values = [score for row in rows if (score := row[name]) is not None]
        if not values:
            continue
        apart: tuple[float | None, float | None] = (None, None)
        if name in ("tokens", "other"):
            both = [(row["detection"], row[name]) for row in rows]
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
