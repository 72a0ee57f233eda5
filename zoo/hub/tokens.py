"""Tokens of the zoo's server: shown once when they are made, kept as hashes."""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import string
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from zoo.errors import UsageError
from zoo.hub.store import HubStore, Refused, check_name

Scope = Literal["read", "write"]
_ALPHABET = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Token:
    name: str  # whose it is; also the namespace of repositories that are created without one
    scope: Scope


def create_token(store: HubStore, name: str, scope: Scope) -> str:
    """Make a token and return it: `hf_` and 37 letters and digits, as the Hub's look. UsageError if taken."""
    try:
        check_name(f"{name}/x")
    except Refused as error:
        raise UsageError(
            f"{name!r} cannot be a token's name", expected="letters, digits, '-', '_' and '.'"
        ) from error
    token = "hf_" + "".join(secrets.choice(_ALPHABET) for _ in range(37))
    try:
        with store.writing() as db:
            db.execute(
                "INSERT INTO tokens VALUES (?, ?, ?, ?)",
                (name, _hash(token), scope, datetime.now(UTC).isoformat()),
            )
    except sqlite3.IntegrityError as error:
        raise UsageError(f"there is a token {name!r} already", try_="another --name") from error
    return token


def find_token(store: HubStore, token: str) -> Token | None:
    """Whose token this is; None if it is not one of the store's."""
    with store.reading() as db:
        row = db.execute("SELECT name, scope FROM tokens WHERE sha256 = ?", (_hash(token),)).fetchone()
    return None if row is None else Token(row["name"], row["scope"])


def any_token(store: HubStore) -> bool:
    with store.reading() as db:
        return db.execute("SELECT 1 FROM tokens").fetchone() is not None


def _hash(token: str) -> str:
    # 220 random bits cannot be guessed, so a fast hash is as good as a slow one.
    return hashlib.sha256(token.encode(errors="replace")).hexdigest()
