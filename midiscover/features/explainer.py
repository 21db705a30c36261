"""Many features explained and judged, several at once; what is done is kept, and found again by the next run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple

from midiscover import lineage
from midiscover.chat import Chat
from midiscover.features.explain import (
    FEWEST,
    ExplainSettings,
    Judge,
    Passage,
    explain,
    halves,
    judged,
)
from midiscover.features.explanations import Entry, Explanations
from midiscover.features.quiet import Quiet
from midiscover.features.records import FeatureRecords

SAVE_SECONDS = 30.0

Progress = Callable[[str, int, int], None]
"""Gets what is being done, how many features are done and how many there are."""


class Outcome(NamedTuple):
    """Of one run."""

    entries: dict[int, Entry]
    """Of the features that were asked for, as far as they are explained."""
    seldom: list[int]
    """Features that fire in too few places to show and to judge by."""
    silent: list[int]
    """Features of which the model's answer held no explanation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Explainer:
    """Explains features of one SAE."""

    chat: Chat
    records: FeatureRecords
    stored: Explanations
    settings: ExplainSettings
    quiet: Quiet | None
    """What explanations are judged by; None leaves that out."""
    baselines: bool = True
    progress: Progress = lambda *_: None

    def run(self, features: Sequence[int], *, force: bool = False) -> Outcome:
        """Explain what is not explained yet, or all with `force`; then judge what is not judged yet.

        Errors of the model's end the run; what was done by then is kept.
        """
        known = {} if force else self.stored.read()
        seldom: list[int] = []
        silent: list[int] = []

        def unexplained() -> Iterator[tuple[int, list[Passage]]]:
            for feature in features:
                if feature not in known:
                    shown, hidden = halves(self.records.contexts(feature), self.settings)
                    if min(len(shown), len(hidden)) < FEWEST:
                        seldom.append(feature)
                    else:
                        yield feature, shown

        def texted(_feature: int, shown: Sequence[Passage]) -> Entry | None:
            text = explain(self.chat, shown)
            return None if text is None else {"text": text, "made": lineage.now()}

        for feature, entry in self._kept("explained", unexplained(), texted, len(features)):
            if entry is None:
                silent.append(feature)
            else:
                known[feature] = entry
        if self.quiet is not None:
            known |= self._judged(features, known)
        return Outcome({f: known[f] for f in features if f in known}, sorted(seldom), sorted(silent))

    def _judged(self, features: Sequence[int], known: Mapping[int, Entry]) -> dict[int, Entry]:
        quiet = self.quiet
        assert quiet is not None
        order = sorted(known)
        after = dict(zip(order, [*order[1:], order[0]], strict=True)) if len(order) > 1 else {}

        def unjudged() -> Iterator[tuple[int, Judge, Mapping[str, Any]]]:
            for feature in features:
                entry = known.get(feature)
                if entry is not None and ("detection" not in entry or (self.baselines and "baselines" not in entry)):
                    _, hidden = halves(self.records.contexts(feature), self.settings)
                    judge = Judge(self.chat, hidden, quiet.of(feature), self.settings, feature)
                    yield feature, judge, self.records.feature(feature)

        def scores(feature: int, judge: Judge, row: Mapping[str, Any]) -> Entry:
            entry = known[feature]
            other = (after[feature], known[after[feature]]["text"]) if feature in after else None
            found = judged(judge, entry["text"], row, other, baselines=self.baselines)
            return {**entry, **found, "made": lineage.now()}

        return {
            feature: entry
            for feature, entry in self._kept("judged", unjudged(), scores, len(features))
            if entry is not None
        }

    def _kept(
        self, what: str, items: Iterator[tuple[Any, ...]], work: Callable[..., Entry | None], total: int
    ) -> Iterator[tuple[int, Entry | None]]:
        """(feature, its entry) as each is ready. What is ready is written every so often, and at the end whatever
        ends it."""
        waiting: dict[int, Entry] = {}
        saved, done = time.monotonic(), 0
        try:
            for feature, entry in _side_by_side(items, work, self.chat.at_once):
                done += 1
                if entry is not None:
                    waiting[feature] = entry
                if time.monotonic() - saved > SAVE_SECONDS:
                    self.stored.add(waiting)
                    waiting, saved = {}, time.monotonic()
                self.progress(what, done, total)
                yield feature, entry
        finally:
            if waiting:
                self.stored.add(waiting)


def _side_by_side(
    items: Iterator[tuple[Any, ...]], work: Callable[..., Entry | None], at_once: int
) -> Iterator[tuple[int, Entry | None]]:
    """(first of an item, what `work` makes of it), as each is ready. Items are taken as they are needed."""
    pending: dict[Future[Entry | None], int] = {}

    def ready(most: int) -> Iterator[tuple[int, Entry | None]]:
        while len(pending) > most:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                yield pending.pop(future), future.result()

    pool = ThreadPoolExecutor(at_once, thread_name_prefix="explain")
    try:
        for item in items:
            pending[pool.submit(work, *item)] = item[0]
            yield from ready(2 * at_once - 1)
        yield from ready(0)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
