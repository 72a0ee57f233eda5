"""Which failures may be gone the next time: the network, a busy server, a lost process or connection."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from zoo.errors import Lost

_ERRNOS = {
    errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.ETIMEDOUT, errno.EHOSTUNREACH,
    errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET, errno.EPIPE, errno.ESTALE,
}  # fmt: skip
# Of libraries that are not always installed: their classes, by module and name.
_FOREIGN = {
    ("requests.exceptions", "ConnectionError"),
    ("requests.exceptions", "Timeout"),
    ("urllib3.exceptions", "HTTPError"),
    ("httpx", "TransportError"),
    ("aiohttp.client_exceptions", "ClientConnectionError"),
    ("botocore.exceptions", "ConnectionError"),
    ("botocore.exceptions", "HTTPClientError"),
    ("ray.exceptions", "RayActorError"),
}
_CONNECTION_LOST = ("08", "57P")  # SQLSTATE: connection exception, operator intervention
_TRY_AGAIN = ("40", "53300", "55P03")  # serialization, too many connections, lock not available


def transient(error: BaseException) -> bool:
    """Whether the same may succeed a little later, by the error or what caused it."""
    return any(map(_is_transient, _chain(error)))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_busy(status: int) -> bool:
    """Whether a server's answer says that it has no time now."""
    return status in (408, 425, 429) or status >= 500


def _is_transient(error: BaseException) -> bool:
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError
    from sqlalchemy.exc import DBAPIError

    if isinstance(error, HfHubHTTPError):
        return _is_busy(error.response.status_code)
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):  # botocore's
        return _is_busy(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if isinstance(error, httpx2.TransportError | ConnectionError | TimeoutError | Lost):
        return True
    if isinstance(error, DBAPIError):
        state = getattr(error.orig, "sqlstate", None)
        if state is not None:
            return str(state).startswith(_CONNECTION_LOST + _TRY_AGAIN)
        # A connection that ended or never came about has no state; SQLite has none at all.
        from_server = type(error.orig).__module__.partition(".")[0] == "psycopg"
        return error.connection_invalidated or "locked" in str(error.orig) or from_server
    if isinstance(error, OSError) and error.errno in _ERRNOS:
        return True
    names = {(cls.__module__, cls.__name__) for cls in type(error).__mro__}
    return bool(names & _FOREIGN) or type(error).__name__ == "gaierror"
