"""The connection to a Hub: its endpoint, the token, time limits, and its errors told plainly."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from urllib.parse import quote, urlsplit

import httpx2
from huggingface_hub import HfApi, constants, get_session, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo, RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

from zoo.errors import HubError, UsageError
from zoo.hub.manifest import MAX_FILES, check_paths

PUBLIC = "https://huggingface.co"
TAG = "sparse-zoo"  # of every card this zoo renders, so of every repository it publishes
TIME_LIMITS = httpx2.Timeout(60, connect=10, read=120)  # seconds without any progress


@dataclass(frozen=True)
class Hub:
    """A Hub, or a server that speaks like one."""

    endpoint: str
    api: HfApi

    @property
    def headers(self) -> dict[str, str]:
        headers: dict[str, str] = build_hf_headers(token=self.api.token)
        return headers

    @property
    def has_token(self) -> bool:
        return bool(self.api.token)

    def file_url(self, repository: str, commit: str, path: str) -> str:
        return f"{self.endpoint}/{repository}/resolve/{commit}/{quote(path)}"


@dataclass(frozen=True)
class Blob:
    """A file at a commit, as the Hub lists it."""

    path: str
    size: int
    oid: str  # git's: of the file, or of the pointer that stands for an LFS file
    sha256: str | None  # of an LFS file

    @property
    def git_sha1(self) -> str | None:
        """Hash of a regular file."""
        return None if self.sha256 else self.oid

    @property
    def etag(self) -> str:
        """What the Hub's caches name it by."""
        return self.sha256 or self.oid


def connect(endpoint: str | None = None, *, trusted: bool = True) -> Hub:
    """The Hub at `endpoint`; None takes HF_ENDPOINT, or the public Hub. Sends nothing yet.

    The token is HF_TOKEN. That which `hf auth login` kept is sent only to the endpoint it was kept for: the
    configured one. To an endpoint that is not `trusted`, as it stands in data that came from others, no other
    token is sent either. Raises UsageError for what is no endpoint or no token.
    """
    configured = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    endpoint = (endpoint or configured).rstrip("/")
    try:
        parts = urlsplit(endpoint)
        right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        right = False
    if not right or "@" in parts.netloc or parts.query or parts.fragment or not endpoint.isprintable():
        raise UsageError(
            f"{endpoint!a} is not an endpoint",
            expected=f"a URL such as {PUBLIC} or http://127.0.0.1:8000",
        )
    token = get_token() if endpoint == configured else _given_token() if trusted else None
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise UsageError(
            "the token is not one", saw="spaces or characters that no token has", try_="set HF_TOKEN anew"
        )
    if endpoint != PUBLIC:  # the client would ask other servers for Xet tokens, and fail
        constants.HF_HUB_DISABLE_XET = True
    session = get_session()
    if session.timeout == httpx2.Timeout(None):
        session.timeout = TIME_LIMITS
    return Hub(endpoint, HfApi(endpoint=endpoint, token=token or False, library_name="sparse-zoo"))


def _given_token() -> str | None:
    return (os.environ.get("HF_TOKEN") or "").strip() or None


@contextmanager
def told_plainly(
    hub: Hub, repository: str | None = None, revision: str | None = None, *, resumes: bool = True
) -> Iterator[None]:
    """Turn what huggingface_hub raises in the block into a HubError that says what to do.

    resumes: whether the same command, run again, goes on where it was.
    """
    what = f"{repository} at {hub.endpoint}" if repository else hub.endpoint
    again = ": it goes on from here" if resumes else ""
    try:
        yield
    except HFValidationError as error:
        raise UsageError(f"{repository or ''!a} is not a repository", saw=_line(str(error))) from error
    except OfflineModeIsEnabled as error:
        raise HubError(
            f"cannot ask {hub.endpoint}",
            saw="HF_HUB_OFFLINE is set",
            try_="unset HF_HUB_OFFLINE, and run again",
        ) from error
    except GatedRepoError as error:
        raise HubError(
            f"{what} is gated: its owner decides who may have it",
            saw=_told(error),
            try_=f"ask for access at {hub.endpoint}/{repository}, {_token_advice(hub)}, and run again",
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(
            f"{what} has no revision {revision or 'main'}",
            expected="a branch, a tag or a commit",
            try_="the same without --revision",
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"there is no {what}, or it is private",
            saw=_told(error),
            try_=f"zoo search; or, if it is private, {_token_advice(hub)}",
        ) from error
    except EntryNotFoundError as error:
        raise HubError(f"{what} lacks a file that it lists", saw=_line(str(error))) from error
    except HfHubHTTPError as error:
        raise _of_status(error, hub, what, again) from error
    except httpx2.TransportError as error:
        raise HubError(
            f"cannot reach {hub.endpoint}",
            saw=_line(str(error)) or type(error).__name__,
            try_="check the connection, and --endpoint or HF_ENDPOINT, and run the same command again"
            + again,
        ) from error
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, KeyError, TypeError) as error:
        raise HubError(
            f"{hub.endpoint} does not answer as a Hub does",
            saw=_line(f"{type(error).__name__}: {error}"),
            try_="check --endpoint and HF_ENDPOINT",
        ) from error


def user(hub: Hub) -> str:
    """Whose token it is. HubError if there is none, or it is not accepted."""
    if not hub.has_token:
        raise HubError(f"{hub.endpoint} asks for a token", try_=f"{_token_advice(hub)}, and run again")
    with told_plainly(hub, resumes=False):
        return str(hub.api.whoami()["name"])


def repositories(hub: Hub, text: str) -> list[str]:
    """Names, sorted, of the first repositories that a zoo published and whose name holds `text`."""
    with told_plainly(hub, resumes=False):
        return sorted({model.id for model in next(_pages(hub, {"search": text, "limit": "1000"}))})


def published(hub: Hub, most: int) -> list[ModelInfo]:
    """The repositories that zoos published, `most` and one more where there are more: id, sha and tags.

    Raises HubError.
    """
    found: list[ModelInfo] = []
    with told_plainly(hub, resumes=False):
        for page in _pages(hub, {"expand": ["sha", "tags"]}):
            found += page
            if len(found) > most or not page:
                break
    return found[: most + 1]


def _pages(hub: Hub, asked: Mapping[str, str | list[str]]) -> Iterator[list[ModelInfo]]:
    """What a zoo published, page by page, one at least.

    HfApi.list_models would try for 23 seconds to reach a server that is not there, and say so line by line.
    """
    url: str | None = f"{hub.endpoint}/api/models"
    params: dict[str, str | list[str]] | None = {"filter": TAG, **asked}  # which the next pages' URLs hold
    while url:
        response = get_session().get(url, params=params, headers=hub.headers)
        hf_raise_for_status(response)
        yield [ModelInfo(**{"siblings": None, **model}) for model in response.json()]  # type: ignore[no-untyped-call]
        url, params = response.links.get("next", {}).get("url"), None


def describe(hub: Hub, repository: str, revision: str) -> ModelInfo:
    """What the Hub says of a repository at a revision. Raises HubError."""
    with told_plainly(hub, repository, revision):
        return hub.api.model_info(repository, revision=revision)


def files_at(hub: Hub, repository: str, commit: str) -> dict[str, Blob]:
    """Every file at a commit by its path; names, sizes and hashes are checked. Raises HubError."""
    with told_plainly(hub, repository, commit):
        listed = hub.api.list_repo_tree(repository, recursive=True, revision=commit)
        entries = list(islice(listed, 2 * MAX_FILES))
        blobs = [_blob(entry) for entry in entries if isinstance(entry, RepoFile)]
        check_paths(blob.path for blob in blobs)
    return {blob.path: blob for blob in blobs}


def read(hub: Hub, repository: str, commit: str, blob: Blob, limit: int) -> bytes:
    """A small file's content, at most `limit` bytes; not checked against its hash. Raises HubError."""
    with told_plainly(hub, repository, commit):
        url = hub.file_url(repository, commit, blob.path)
        data = bytearray()
        with get_session().stream("GET", url, headers=hub.headers, timeout=TIME_LIMITS) as response:
            raise_for_status(response)
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > limit:
                    raise ValueError(f"{blob.path} of more than {limit} bytes")
    return bytes(data)


def raise_for_status(response: httpx2.Response) -> None:
    """`hf_raise_for_status` for a stream, whose body is not read yet."""
    if response.is_error and int(response.headers.get("Content-Length", "0")) < 1_000_000:
        response.read()
    hf_raise_for_status(response)


def _blob(entry: RepoFile) -> Blob:
    blob = Blob(entry.path, entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs is not None else None)
    hashes = re.fullmatch(r"[0-9a-f]{40}", blob.oid) and re.fullmatch(
        r"[0-9a-f]{64}", blob.sha256 or 64 * "0"
    )
    if type(blob.size) is not int or blob.size < 0 or not hashes:
        raise ValueError(f"size {blob.size!r} and hash {blob.etag[:80]!r} of {blob.path[:200]!r}")
    return blob


def _of_status(error: HfHubHTTPError, hub: Hub, what: str, again: str) -> HubError:
    status = error.response.status_code
    saw = f"HTTP {status}" + (f": {_told(error)}" if _told(error) else "")
    if status == 401:
        refused = "does not accept the token" if hub.has_token else "asks for a token"
        return HubError(f"{what} {refused}", saw=saw, try_=f"{_token_advice(hub)}, and run again")
    if status == 403:
        return HubError(
            f"{what} refuses this to the token" if hub.has_token else f"{what} refuses this without a token",
            saw=saw,
            try_="a token that may write there" if hub.has_token else _token_advice(hub),
        )
    if status == 429 or status >= 500:
        return HubError(
            f"{hub.endpoint} cannot serve this now",
            saw=saw,
            try_="the same command later" + again,
        )
    return HubError(f"{what} refuses this", saw=saw)


def _token_advice(hub: Hub) -> str:
    if hub.has_token:
        return "set HF_TOKEN to a token that may"
    if _given_token():  # which this endpoint did not get
        return f"set HF_ENDPOINT={hub.endpoint}, if you trust it with your token"
    return "set HF_TOKEN, or `hf auth login`"


def _told(error: HfHubHTTPError) -> str | None:
    """The server's own words, if it has any. Never the request: its URL may be signed."""
    headers: Mapping[str, str] = error.response.headers
    return _line(headers.get("X-Error-Message") or error.server_message or "") or None


def _line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:300]
