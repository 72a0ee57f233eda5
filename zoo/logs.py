"""Structured logs, and keeping secrets out of whatever is written.

With `zoo --log-json` (or ZOO_LOG_JSON=1, which child processes inherit) everything that is said on standard
error is one JSON object a line: `time` (UTC), `level`, `event`, `message`, and `job`, `stage`, `seconds`
where they apply. Everything said or recorded goes through `redact`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote, urlsplit

ENVIRONMENT = "ZOO_LOG_JSON"
JOB = "ZOO_JOB"  # the job that a worker's lines belong to
HIDDEN = "[secret]"
SHORTEST = 8  # a shorter value, such as `false`, would hide words that are none
_SECRET_NAMES = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|PGPASSWORD|CREDENTIALS?|(API_|ACCESS_)?KEY)$")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_IN_URL = re.compile(r"(?<=://)[^\s/@]*:[^\s/@]+(?=@)")  # user:password
_known: set[str] = set()


def is_json() -> bool:
    return os.environ.get(ENVIRONMENT) == "1"


def hide(secret: str | None) -> None:
    """Keep this value out of all that is written from now on."""
    if secret and len(secret) >= SHORTEST:
        _known.add(secret)


def redact(text: str) -> str:
    """The text without secrets: tokens of the Hub's form, passwords in URLs, what `hide` was told of, and the
    values of environment variables named like secrets."""
    text = _IN_URL.sub(HIDDEN, _TOKEN.sub(HIDDEN, text))
    for secret in sorted(_known | _of_environment(), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def _of_environment() -> set[str]:
    found = {v for k, v in os.environ.items() if _SECRET_NAMES.search(k) and len(v) >= SHORTEST}
    for name in ("ZOO_REGISTRY", "HF_ENDPOINT"):
        try:
            password = urlsplit(os.environ.get(name, "")).password
        except ValueError:
            continue
        if password and len(password) >= SHORTEST:
            found |= {password, unquote(password)}
    return found


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
        print(redact(message), file=sys.stderr, flush=True)


def pass_on(line: str) -> None:
    """A line that another process of ours wrote."""
    print(redact(line), file=sys.stderr, flush=True)
