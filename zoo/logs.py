"""Structured logs, and keeping secrets out of whatever is written.

With `zoo --log-json` (or ZOO_LOG_JSON=1, which child processes inherit) everything that is said on standard
error is one JSON object a line: `time` (UTC), `level`, `event`, `message`, and `job`, `stage`, `seconds`
where they apply. Everything said or recorded goes through `redact`, what a person sees through `shown`.
"""

from __future__ import annotations

import json
import os
import re
import sys
import unicodedata
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote, urlsplit

ENVIRONMENT = "ZOO_LOG_JSON"
JOB = "ZOO_JOB"  # the job that a worker's lines belong to
HIDDEN = "[secret]"
SHORTEST = 8  # a shorter value, such as `false`, would hide words that are none
_SECRET_NAMES = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|PGPASSWORD|CREDENTIALS?|(API_|ACCESS_)?KEY)$")
_SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}"
    r"|\b(?:gh[oprsu]_|github_pat_)\w{16,}"
    r"|\bsk-[\w-]{20,}"  # of OpenAI and those who copy it
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"  # the id of an AWS key
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"  # a JSON web token
    r"|(?<=://)[^\s/@]*:[^\s/]+(?=@)"  # user:password in a URL
    r"|(?i:(?<=bearer )|(?<=basic ))[\w.~+/=-]{16,}"  # of an Authorization header
)
# A value after a name that says what it is: of a setting, a header, JSON, or a URL's query.
_NAMED = re.compile(
    r"(?i)((?:passw(?:or)?d|secret|api.?key|access.?key|signature|credentials?|[_-]token|[?&]token)"
    r"""["']?\s*[=:]\s*["']?)[\w.~+/%=-]{16,}|(?<=password=)[^\s&;'"]+"""
)
_known: set[str] = set()


def is_json() -> bool:
    return os.environ.get(ENVIRONMENT) == "1"


def hide(secret: str | None) -> None:
    """Keep this value out of all that is written from now on."""
    if secret and len(secret) >= SHORTEST:
        _known.add(secret)


def redact(text: str) -> str:
    """The text without secrets: tokens and keys of known shapes, passwords in URLs, values that are named as
    such, what `hide` was told of, and the values of environment variables named like secrets."""
    text = _NAMED.sub(lambda found: (found[1] or "") + HIDDEN, _SHAPES.sub(HIDDEN, text))
    for secret in sorted(_known | _of_environment(), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def without_controls(text: str) -> str:
    """The text without what would steer a terminal: all control characters but newline and tab."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def shown(text: str) -> str:
    """The text as it may be shown to a person: without control characters, and without secrets."""
    return redact(without_controls(text))


def line_of_secret(text: str) -> int | None:
    """The number of the first line that holds a secret; None if none does."""
    lines = enumerate(text.splitlines(), 1)
    return next((number for number, line in lines if redact(line) != line), None)


def _of_environment() -> set[str]:
    named = {value for name, value in os.environ.items() if _SECRET_NAMES.search(name)}
    in_urls = {part for value in os.environ.values() for part in _passwords(value)}
    return {secret for secret in named | in_urls if len(secret) >= SHORTEST}


def _passwords(url: str) -> set[str]:
    """The password in a URL, as it is written and as it is meant."""
    if "://" not in url or "@" not in url:
        return set()
    try:
        password = urlsplit(url).password or ""
    except ValueError:
        return set()
    return {password, unquote(password)}


def line(event: str, message: str, *, level: str = "info", **fields: Any) -> str:
    """One event as JSON; `fields` that are None are left out."""
    said = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "level": level,
        "event": event,
        "message": message,
        "job": os.environ.get(JOB),
    } | fields
    kept = {
        name: redact(value) if isinstance(value, str) else value
        for name, value in said.items()
        if value is not None
    }
    return json.dumps(kept, ensure_ascii=False)


def write(event: str, message: str, *, level: str = "info", **fields: Any) -> None:
    """One event, as a line of JSON on standard error."""
    print(line(event, message, level=level, **fields), file=sys.stderr, flush=True)


def tell(event: str, message: str, *, level: str = "info", **fields: Any) -> None:
    """One event: as JSON if that is asked for, else its message alone."""
    if is_json():
        write(event, message, level=level, **fields)
    else:
        print(shown(message), file=sys.stderr, flush=True)


def pass_on(line: str) -> None:
    """A line that another process of ours wrote."""
    print(shown(line), file=sys.stderr, flush=True)
