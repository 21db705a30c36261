"""Many features explained and judged, several at once; what is done is kept, and found again by the next run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from midiscover import lineage
from midiscover.chat import Chat, RefusedError
from midiscover.features.explain import FEWEST, ExplainSettings, Judge, Passage, Reader, explain, halves, judged
from midiscover.features.explanations import Entry, Explanations
from midiscover.features.quiet import Quiet
from midiscover.features.records import FeatureRecords

SAVE_SECONDS = 30.0
HOPELESS = 3
"""Features that are refused before one is answered: then all would be."""

Progress = Callable[[str, int, int], None]
"""Gets what is being done, how many features are done and how many there are."""
Job = tuple[int, Callable[[Chat], Entry | None]]
"""A feature, and what is asked about it."""


class Outcome(NamedTuple):
    """Of one run."""

    entries: dict[int, Entry]
    """Of the features that were asked for, as far as they are explained."""
    seldom: list[int]
    """Features that fire in too few places to show and to judge by."""
    silent: list[int]
    """Features of which the model's answer held no explanation."""
    refused: dict[int, str]
    """Features about which the model was not willing to say anything, and what it said of that."""


@dataclass(frozen=True, kw_only=True)
class Explainer:
    """Explains features of one SAE."""

    chat: Chat
    records: FeatureRecords
    stored: Explanations
    settings: ExplainSettings
    reader: Reader
    held_out: Callable[[], Quiet] | None
    """Gives what explanations are judged by, where one has to be; None leaves the judging out."""
    baselines: bool = True
    progress: Progress = lambda *_: None

    def run(self, features: Sequence[int], *, force: bool = False) -> Outcome:
        """Explain what is not explained yet, or all with `force`; then judge what is not judged yet.

        An error that is not one feature's alone ends the run, as Ctrl-C does: no further question is asked, and what
        was done by then is kept. CorruptError, before a question, where what is stored can't be read.
        """
        stood = self.stored.read()
        known = {f: entry for f, entry in stood.items() if not force or f not in features}
        seldom: list[int] = []
        todo = [feature for feature in features if feature not in known]

        def unexplained() -> Iterable[Job | None]:
            for feature in todo:
                shown, hidden = self._halves(feature)
                if min(len(shown), len(hidden)) < FEWEST:
                    seldom.append(feature)
                    yield None
                else:
                    yield feature, lambda chat, shown=shown: _texted(chat, shown)

        made, refused = self._each("explained", unexplained(), len(todo))
        known |= {feature: entry for feature, entry in made.items() if entry is not None}
        if self.held_out is not None:
            known = stood | known
            refused |= self._judge(features, known)
        silent = sorted(feature for feature, entry in made.items() if entry is None)
        return Outcome({f: known[f] for f in features if f in known}, sorted(seldom), silent, refused)

    def _halves(self, feature: int) -> tuple[list[Passage], list[Passage]]:
        return halves(self.records.contexts(feature), self.settings, self.reader)

    @cached_property
    def _quiet(self) -> Quiet:
        assert self.held_out is not None
        return self.held_out()

    def _judge(self, features: Sequence[int], known: dict[int, Entry]) -> dict[int, str]:
        """Put the scores of those that lack them into `known`; what was refused, and why."""
        order = sorted(known)
        after = dict(zip(order, [*order[1:], *order[:1]], strict=True)) if len(order) > 1 else {}
        todo = [feature for feature in features if feature in known and self._lacks(known[feature], feature in after)]

        def unjudged() -> Iterable[Job]:
            for feature in todo:
                _, hidden = self._halves(feature)
                judge = Judge(hidden, self._quiet.of(feature), self.settings, feature)
                yield feature, lambda chat, feature=feature, judge=judge: scores(chat, feature, judge)

        def scores(chat: Chat, feature: int, judge: Judge) -> Entry:
            entry, other = known[feature], after.get(feature)
            said = (other, known[other]["text"]) if other is not None else None
            row = self.records.feature(feature) if self.baselines else None
            return entry | judged(chat, judge, entry["text"], row, said)

        made, refused = self._each("judged", unjudged(), len(todo))
        known |= {feature: entry for feature, entry in made.items() if entry is not None}
        return refused

    def _lacks(self, entry: Entry, has_other: bool) -> bool:
        """Whether something of it is still to be judged. Of what there is too little text for, nothing is."""
        if "detection" not in entry:
            return True
        beside = entry.get("baselines")
        if not self.baselines or beside is None:
            return self.baselines
        return has_other and entry["detection"] is not None and beside["other"] is None

    def _each(
        self, what: str, jobs: Iterable[Job | None], total: int
    ) -> tuple[dict[int, Entry | None], dict[int, str]]:
        """What each job made, and which were refused, and why; kept every so often, and at the end whatever ends it."""
        made: dict[int, Entry | None] = {}
        refused: dict[int, str] = {}
        saved: set[int] = set()
        pending: dict[Future[Entry | None], int] = {}
        chat, passed, last = _Stoppable(self.chat), 0, time.monotonic()
        pool = ThreadPoolExecutor(self.chat.at_once, thread_name_prefix="explain")

        def keep() -> None:
            entries = {feature: entry for feature, entry in made.items() if entry is not None and feature not in saved}
            if entries:
                self.stored.add(entries)
            saved.update(entries)

        def collect(most: int) -> None:
            nonlocal last
            while len(pending) > most:
                done = wait(pending, return_when=FIRST_COMPLETED).done
                _take(done, pending, made, refused)
                if time.monotonic() - last > SAVE_SECONDS:
                    keep()
                    last = time.monotonic()
                self.progress(what, passed + len(made) + len(refused), total)

        try:
            for job in jobs:
                if job is None:
                    passed += 1
                    continue
                pending[pool.submit(job[1], chat)] = job[0]
                collect(2 * self.chat.at_once - 1)
            collect(0)
            if refused and not made:
                raise RefusedError(next(iter(refused.values())))
        except BaseException:
            chat.stopped.set()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for future, feature in pending.items():
                if not future.cancelled() and future.exception() is None:
                    made[feature] = future.result()
            keep()
        return made, refused


def _take(
    done: Iterable[Future[Entry | None]],
    pending: dict[Future[Entry | None], int],
    made: dict[int, Entry | None],
    refused: dict[int, str],
) -> None:
    """Put what is done into `made` and `refused`, all of it before an error is raised."""
    wrong: BaseException | None = None
    for future in done:
        feature, error = pending.pop(future), future.exception()
        if error is None:
            made[feature] = future.result()
        elif isinstance(error, RefusedError):
            refused[feature] = str(error)
        else:
            wrong = error
    if wrong is None and len(refused) >= HOPELESS and not made:
        wrong = RefusedError(next(iter(refused.values())))
    if wrong is not None:
        raise wrong


class _Stoppable:
    """A model that is asked nothing more once the run has ended."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self.name, self.at_once, self.identity = chat.name, chat.at_once, chat.identity
        self.stopped = threading.Event()

    def answer(self, question: str) -> str:
        self._go_on()
        return self._chat.answer(question)

    def which(self, about: str, claim: str, passages: Sequence[str]) -> list[bool | None]:
        self._go_on()
        return self._chat.which(about, claim, passages)

    @property
    def used(self) -> dict[str, int]:
        return self._chat.used

    def _go_on(self) -> None:
        if self.stopped.is_set():
            raise InterruptedError("the run has ended")


def _texted(chat: Chat, shown: Sequence[Passage]) -> Entry | None:
    text = explain(chat, shown)
    return None if text is None else {"text": text, "made": lineage.now()}
