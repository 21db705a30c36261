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

from sqlalchemy import Connection, insert, select, update

from midiscover import lineage
from midiscover.errors import ConfigError, NotFoundError
from midiscover.tracking.tables import api_keys

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


def create_key(connection: Connection, name: str, scopes: Iterable[str]) -> str:
    """Make a key; the text that is returned is kept nowhere. ConfigError for a scope that is none."""
    chosen = tuple(scope for scope in SCOPES if scope in set(scopes))
    unknown = set(scopes) - set(SCOPES)
    if unknown or not chosen:
        raise ConfigError(f"'{', '.join(sorted(unknown))}' is no scope of a key; known are {', '.join(SCOPES)}.")
    name = name.strip()
    if not name or len(name) > 80 or not name.isprintable():
        raise ConfigError(f"'{name}' can't be the name of a key; give one line of at most 80 characters.")
    identifier, secret = secrets.token_hex(4), secrets.token_hex(24)
    connection.execute(
        insert(api_keys).values(
            id=identifier,
            name=name,
            scopes=" ".join(chosen),
            secret_sha256=_hash(secret),
            created_at=datetime.now(UTC),
            created_by=lineage.owner(),
        )
    )
    return f"mdc_{identifier}_{secret}"


def list_keys(connection: Connection) -> list[ApiKey]:
    """All keys, oldest first, those that were revoked among them."""
    rows = connection.execute(select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id)).mappings()
    return [ApiKey(**{**row, "scopes": tuple(row["scopes"].split())}) for row in rows]


def revoke_key(connection: Connection, name: str) -> ApiKey:
    """Revoke the one key whose id begins so, or that has this name. NotFoundError where none or several fit."""
    known = [key for key in list_keys(connection) if key.revoked_at is None]
    fits = [key for key in known if key.name == name] or [key for key in known if name and key.id.startswith(name)]
    if len(fits) != 1:
        what = f"'{name}' fits {len(fits)} keys" if fits else f"No valid key is called '{name}'"
        listed = ", ".join(f"{key.id} ({key.name})" for key in (fits or known)) or "there are none"
        raise NotFoundError(f"{what}; {listed}.")
    now = datetime.now(UTC)
    connection.execute(update(api_keys).where(api_keys.c.id == fits[0].id).values(revoked_at=now))
    return fits[0]._replace(revoked_at=now)


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
