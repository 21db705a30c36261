"""Jobs that read activations for no unfinished sweep: they say so in the store, so that nobody removes them."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import Self

from midiscover import lineage
from midiscover.errors import StoreError
from midiscover.store import layout
from midiscover.store.documents import dump
from midiscover.store.storage import Storage


class Reading:
    """Keeps harvests while its body runs; where that is killed, for a day.

    Entered before anybody looks whether they are there: a removal that saw no reader is then seen by the reader.
    """

    def __init__(self, storage: Storage, harvests: Iterable[str]) -> None:
        self.storage, name = storage, uuid.uuid4().hex
        self.keys = [layout.harvest_reader(harvest, name) for harvest in dict.fromkeys(harvests)]
        self.word = dump({"v": 1, "began": lineage.now(), "owner": lineage.owner()})

    def announce(self) -> None:
        """Say it, for a day from now."""
        for key in self.keys:
            self.storage.write(key, self.word)

    def __enter__(self) -> Self:
        self.announce()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with suppress(StoreError):  # what is left keeps them for a day
            for key in self.keys:
                self.storage.delete(key)
