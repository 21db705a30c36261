"""Keys that open a deployment's HTTP interface: made, listed, revoked and recognised. The database holds no secret.

A key reads `mdc_<id>_<secret>`: the id finds its row, the secret's SHA-256 must be the row's. The secret has 192 random
bits, so a plain hash is enough: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from sqlalchemy import Connection, select, update

from midiscover import lineage
from midiscover.errors import ConfigError, NotFoundError
from midiscover.tracking.rows import Row
from midiscover.tracking.tables import api_keys
from midiscover.tracking.writes import INSERT

SCOPES = ("read", "steer", "admin")
"""What a key may do, each one that comes after allowing what comes before: look and interpret, steer, train."""
FORM = re.compile(r"mdc_(?P<id>[0-9a-f]{8})_(?P<secret>[0-9a-f]{48})")


class ApiKey(NamedTuple):
    """A key as the database knows it."""

    id: str
    name: str
    scopes: tuple[str, ...]
    secret_sha256: str
    created_at: datetime
    created_by: str | None
    revoked_at: datetime | None

    def allows(self, scope: str) -> bool:
        """Whether the key has this scope, or one that includes it."""
        return any(SCOPES.index(given) >= SCOPES.index(scope) for given in self.scopes)


def new_key(name: str, scopes: Iterable[str]) -> tuple[Row, str]:
    """A key's row, and its text, which is kept nowhere. ConfigError for a wrong name or scope."""
    chosen = tuple(scope for scope in SCOPES if scope in set(scopes))
    unknown = set(scopes) - set(SCOPES)
    if unknown or not chosen:
        raise ConfigError(f"'{', '.join(sorted(unknown))}' is no scope of a key; known are {', '.join(SCOPES)}.")
    name = name.strip()
    if not name or len(name) > 80 or not name.isprintable():
        raise ConfigError(f"'{name}' can't be the name of a key; give one line of at most 80 characters.")
    identifier, secret = secrets.token_hex(4), secrets.token_hex(24)
    row = {
        "id": identifier,
        "name": name,
        "scopes": " ".join(chosen),
        "secret_sha256": _hash(secret),
        "created_at": datetime.now(UTC),
        "created_by": lineage.owner(),
    }
    return row, f"mdc_{identifier}_{secret}"


def put_key(connection: Connection, row: Row) -> None:
    """Keep a key that is new."""
    connection.execute(INSERT[connection.dialect.name](api_keys).values(row).on_conflict_do_nothing())


def list_keys(connection: Connection) -> list[ApiKey]:
    """All keys, oldest first, those that were revoked among them."""
    rows = connection.execute(select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id)).mappings()
    return [ApiKey(**{**row, "scopes": tuple(row["scopes"].split())}) for row in rows]


def find_key(connection: Connection, name: str) -> ApiKey:
    """The one valid key whose id begins so, or that has this name. NotFoundError where none or several fit."""
    known = [key for key in list_keys(connection) if key.revoked_at is None]
    fits = [key for key in known if key.name == name] or [key for key in known if name and key.id.startswith(name)]
    if len(fits) != 1:
        what = f"'{name}' fits {len(fits)} keys" if fits else f"No valid key is called '{name}'"
        listed = ", ".join(f"{key.id} ({key.name})" for key in (fits or known)) or "there are none"
        raise NotFoundError(f"{what}; {listed}.")
    return fits[0]


def revoke_key(connection: Connection, key: ApiKey) -> None:
    """Keep that a key was revoked, and when."""
    connection.execute(update(api_keys).where(api_keys.c.id == key.id).values(revoked_at=key.revoked_at))


def recognised(text: str, keys: Sequence[ApiKey]) -> ApiKey | None:
    """The valid key that this text is, or None. Takes the same time for a wrong secret as for a right one."""
    form = FORM.fullmatch(text)
    if form is None:
        return None
    given = _hash(form["secret"])
    for key in keys:
        if key.id == form["id"]:
            return key if hmac.compare_digest(given, key.secret_sha256) and key.revoked_at is None else None
    return None


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
