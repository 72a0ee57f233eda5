"""`zoo push`: an entry as one commit, tagged, on the Hub or a server like it; recorded in the registry."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]
from pydantic import ValidationError

from zoo.entry import Entry, Publication
from zoo.errors import FormatError, HubError, StoreError, ZooError
from zoo.files import sha256_bytes
from zoo.hub import client, manifest
from zoo.hub.client import Blob, Hub
from zoo.hub.eval_results import eval_results
from zoo.hub.manifest import MANIFEST, File, Manifest, release_tag, with_publication
from zoo.progress import console, say, transfer
from zoo.registry import Registry

CARD = "README.md"
OF_THE_HUB = {".gitattributes"}  # a new repository may begin with it
CHUNK = 1 << 20
# Content of the commit: where it lies, or what it is; with its size and sha256.
Content = dict[str, tuple[Path | bytes, File]]


def push(
    entry_id: str,
    hub: Hub,
    *,
    store: Path,
    registry: Registry,
    card: Callable[[Entry], str],
    to: str | None = None,
    private: bool = False,
) -> Publication:
    """Publish an entry of the registry, whose files are in the store, as `to`/id; `to` None: the token's own.

    What is on the server already is not sent again; if all of it is, nothing is changed there. The
    publication is recorded in the registry. `card` renders the model card. Raises ZooError.
    """
    entry = registry.get(entry_id)
    _check_verified(entry)
    user = client.user(hub)
    files = _checked_files(entry, store / "entries" / entry.id)
    repository = f"{to or user}/{entry.id}"
    with client.told_plainly(hub, repository):
        hub.api.create_repo(repository, private=private or None, exist_ok=True)
    publication = _publish(hub, repository, entry, files, card, private)
    latest = registry.get(entry.id)
    if latest.artifacts != entry.artifacts:  # made anew meanwhile: that one is not published
        return publication
    published = with_publication(latest, publication)
    registry.put(published)
    place = (publication.repository, publication.commit, publication.endpoint)
    return next(p for p in published.publications if (p.repository, p.commit, p.endpoint) == place)


def _publish(
    hub: Hub,
    repository: str,
    entry: Entry,
    files: Mapping[str, Path],
    card: Callable[[Entry], str],
    private: bool,
) -> Publication:
    described, there = _state(hub, repository)
    if private and not described.private:
        raise HubError(
            f"{repository} at {hub.endpoint} is public",
            expected="a private repository",
            try_="make it private there first, or push without --private",
        )
    before = _their_manifest(hub, repository, described.sha, there)
    content = _content(_as_published(entry, before), files, card)
    if _is_there(content, there, before):
        say(f"{repository} at {hub.endpoint} has this already; nothing was sent")
        return _tagged(hub, repository, described.sha or "", entry)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        _addition(path, *found) for path, found in content.items()
    ]
    operations += [CommitOperationDelete(path) for path in _outdated(content, there, before)]
    size = sum(file.size for _, file in content.values())
    say(f"{repository}: {len(content)} files, {size / 1e6:.1f} MB, to {hub.endpoint}")
    if not console.is_terminal:
        disable_progress_bars()
    try:
        with client.told_plainly(hub, repository), _own_cause():
            commit = hub.api.create_commit(
                repository,
                operations,
                commit_message=f"Publish {entry.id}",
                commit_description=f"Recipe {entry.recipe_sha256}",
                parent_commit=described.sha,
            ).oid
    except HubError as error:
        if not _is_stale(error):
            raise
        now, there = _state(hub, repository)
        if not _is_there(content, there, before):  # else it was this very commit, whose answer was lost
            raise HubError(
                f"{repository} at {hub.endpoint} was changed by someone else meanwhile",
                saw=f"commit {now.sha}",
                expected=f"commit {described.sha}, to put this one on",
                try_=f"zoo push {entry.id}, once you have seen what changed: what was sent is not sent again",
            ) from error
        commit = now.sha or ""
    return _tagged(hub, repository, commit, entry)


# --- what must be true of the entry -----------------------------------------------------------------


def _check_verified(entry: Entry) -> None:
    failed = [v.artifact for v in entry.verifications if not v.passed]
    if entry.status == "failed" or failed or not entry.verifications:
        reason = entry.failure or (f"failed: {', '.join(failed)}" if failed else "nothing of it was verified")
        raise ZooError(
            f"{entry.id} is not verified, so it is not published",
            saw=reason,
            expected="an entry whose files the runners loaded, and which agree with the reference",
            try_="zoo run RECIPE, which makes and verifies it again",
        )


def _checked_files(entry: Entry, folder: Path) -> dict[str, Path]:
    """Path in the repository -> file, each read once and held against the registry."""
    files = {artifact.path: folder / artifact.path for artifact in entry.artifacts}
    try:
        manifest.check_paths([*files, CARD, MANIFEST])
    except ValueError as error:
        raise FormatError(f"{entry.id} cannot be published", saw=str(error)) from error
    missing = [path for path, file in files.items() if not file.is_file()]
    if missing:
        raise StoreError(
            f"files of {entry.id} are missing in the store",
            saw=f"no {', '.join(missing[:3])} in {folder}",
            try_=_mend(entry, "zoo run RECIPE puts them there again; or name their --store"),
        )
    with transfer("checking", sum(artifact.size for artifact in entry.artifacts)) as advance:
        for artifact in entry.artifacts:
            digest = hashlib.sha256()
            with files[artifact.path].open("rb", buffering=0) as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
                    advance(len(chunk))
            if digest.hexdigest() != artifact.sha256:
                raise StoreError(
                    f"{files[artifact.path]} is not the file that was verified",
                    saw=f"sha256 {digest.hexdigest()}",
                    expected=f"sha256 {artifact.sha256}, as the registry says",
                    try_=_mend(entry, "zoo run RECIPE --store NEW_FOLDER, which makes it from the start"),
                )
    return files


def _mend(entry: Entry, otherwise: str) -> str:
    return f"zoo pull --force {entry.publications[-1].repository}" if entry.publications else otherwise


# --- what goes into the commit ----------------------------------------------------------------------


def _as_published(entry: Entry, before: Manifest | None) -> Entry:
    """The entry as its manifest has it: without what differs though nothing of its content does.

    Made again from the same recipe, an entry has another date and other times of its stages: then the entry
    that was published before stands for it.
    """
    entry = entry.model_copy(update={"status": "published", "publications": []})
    if before is not None:
        dates = {"created": before.entry.created, "stages": before.entry.stages}
        if entry.model_copy(update=dates) == before.entry:
            return before.entry
    return entry


def _content(entry: Entry, files: Mapping[str, Path], card: Callable[[Entry], str]) -> Content:
    """Every file of the commit."""
    content: Content = {
        a.path: (files[a.path], File(path=a.path, size=a.size, sha256=a.sha256)) for a in entry.artifacts
    }
    made = {CARD: card(entry).encode(), **eval_results(entry.measurements, entry.created)}
    content |= {path: (data, _file(path, data)) for path, data in made.items()}
    listed = sorted((file for _, file in content.values()), key=lambda file: file.path)
    try:
        data = Manifest(files=listed, entry=entry).to_bytes()
    except ValidationError as error:
        raise FormatError(
            f"{entry.id} cannot be published: no zoo would accept its manifest",
            saw=error.errors(include_url=False, include_input=False)[0]["msg"],
            try_=_mend(entry, "make it again: zoo run RECIPE"),
        ) from error
    content[MANIFEST] = (data, _file(MANIFEST, data))
    return content


def _file(path: str, data: bytes) -> File:
    return File(path=path, size=len(data), sha256=sha256_bytes(data))


def _addition(path: str, source: Path | bytes, file: File) -> CommitOperationAdd:
    added = CommitOperationAdd(path, source)
    added.upload_info.sha256 = bytes.fromhex(file.sha256)  # else it would read the file once more
    return added


# --- what is there already --------------------------------------------------------------------------


def _state(hub: Hub, repository: str) -> tuple[ModelInfo, dict[str, Blob]]:
    described = client.describe(hub, repository, constants.DEFAULT_REVISION)
    return described, client.files_at(hub, repository, described.sha) if described.sha else {}


def _their_manifest(
    hub: Hub, repository: str, commit: str | None, there: Mapping[str, Blob]
) -> Manifest | None:
    """The manifest of what is published there; None if nothing is. HubError if that is something else."""
    if commit is None or not set(there) - OF_THE_HUB:
        return None
    saw = "no manifest among its files"
    if MANIFEST in there:
        data = client.read(hub, repository, commit, there[MANIFEST], manifest.MAX_BYTES)
        found = manifest.parse(data, f"{MANIFEST} of {repository}")
        if found.entry.id == repository.rpartition("/")[2]:
            return found
        saw = f"the entry {found.entry.id}"
    raise HubError(
        f"{repository} at {hub.endpoint} holds something else",
        saw=saw,
        expected="an empty repository, or an earlier release of the entry",
        try_="another namespace: --to NAMESPACE",
    )


def _is_there(content: Content, there: Mapping[str, Blob], before: Manifest | None) -> bool:
    return not _outdated(content, there, before) and all(
        path in there and _is_same(source, file, there[path]) for path, (source, file) in content.items()
    )


def _is_same(source: Path | bytes, file: File, blob: Blob) -> bool:
    if blob.size != file.size or blob.sha256 is not None:
        return blob.size == file.size and blob.sha256 == file.sha256
    data = source.read_bytes() if isinstance(source, Path) else source
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == blob.git_sha1


def _outdated(content: Content, there: Mapping[str, Blob], before: Manifest | None) -> list[str]:
    """Files of the earlier release that this one has no more. What others put beside it stays."""
    listed = [file.path for file in before.files] if before is not None else []
    return [path for path in listed if path in there and path not in content]


# --- the commit's tag -------------------------------------------------------------------------------


def _tagged(hub: Hub, repository: str, commit: str, entry: Entry) -> Publication:
    """Tag the commit by its recipe; a later commit of the same recipe gets a number too."""
    first = release_tag(entry)
    with client.told_plainly(hub, repository):
        for number in count(1):
            name = first if number == 1 else f"{first}-{number}"
            tags = {tag.name: tag.target_commit for tag in hub.api.list_repo_refs(repository).tags}
            if name not in tags:
                try:
                    hub.api.create_tag(repository, tag=name, revision=commit)
                except HfHubHTTPError as error:
                    if error.response.status_code != 409:
                        raise
                    continue  # someone else took it just now
            elif tags[name] != commit:
                continue
            break
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Publication(endpoint=hub.endpoint, repository=repository, commit=commit, tag=name, published=now)


def _is_stale(error: HubError) -> bool:
    cause = error.__cause__
    return isinstance(cause, HfHubHTTPError) and cause.response.status_code == 412


@contextmanager
def _own_cause() -> Iterator[None]:
    """Raise what huggingface_hub wraps in a RuntimeError, as it does in its uploading threads."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__cause__, httpx2.HTTPError | OSError):
            raise error.__cause__ from None
        raise
