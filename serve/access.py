"""Who may do what: keys from the tracker, kept in memory, and the cookies that a browser gets for one.

A database that is away locks nobody out: the keys known last go on being good. A cookie holds no key and needs no
secret of its own: it is signed with the hash of the key, which the database has and a browser has not, so it ends with
the key.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import threading
import time
from collections.abc import Callable, Sequence

from midiscover.tracking.keys import ApiKey, recognised

SESSION_SECONDS = 12 * 3600
COOKIE = "midiscover_session"
_FORM = re.compile(r"(?P<id>[0-9a-f]{8})\.(?P<until>\d{10})\.(?P<proof>[0-9a-f]{64})")
log = logging.getLogger("midiscover.serve")


class Access:
    """The keys of a deployment. Safe to use from several threads."""

    def __init__(self, load: Callable[[], Sequence[ApiKey]], clock: Callable[[], float] = time.time) -> None:
        """load: all keys, from the tracker; raises where it is away."""
        self._load, self._clock = load, clock
        self._keys: Sequence[ApiKey] = ()
        self._ended = threading.Event()
        self.away_since: float | None = None

    def refresh(self) -> None:
        """Read the keys."""
        self._keys = self._load()

    def watch(self, seconds: float) -> None:
        """Go on reading them, in a thread of its own, until `close`."""
        threading.Thread(target=self._watch, args=(seconds,), name="access", daemon=True).start()

    def close(self) -> None:
        """Stop reading."""
        self._ended.set()

    def key(self, text: str) -> ApiKey | None:
        """The valid key that this text is."""
        return recognised(text, self._keys)

    def session(self, key: ApiKey) -> str:
        """A cookie's value for a key; good for half a day, or until the key is revoked."""
        until = int(self._clock()) + SESSION_SECONDS
        return f"{key.id}.{until}.{_proof(key, until)}"

    def key_of(self, session: str) -> ApiKey | None:
        """The valid key that a cookie stands for."""
        form = _FORM.fullmatch(session)
        if form is None or int(form["until"]) < self._clock():
            return None
        for key in self._keys:
            if key.id == form["id"] and key.revoked_at is None:
                return key if hmac.compare_digest(_proof(key, int(form["until"])), form["proof"]) else None
        return None

    def _watch(self, seconds: float) -> None:
        while not self._ended.wait(seconds):
            try:
                self.refresh()
                self.away_since = None
            except Exception as error:  # a database that is away must not end the thread
                if self.away_since is None:
                    self.away_since = self._clock()
                    log.warning("database_away", extra={"fields": {"reason": str(error)}})


def _proof(key: ApiKey, until: int) -> str:
    return hmac.new(key.secret_sha256.encode(), f"{key.id}.{until}".encode(), hashlib.sha256).hexdigest()
