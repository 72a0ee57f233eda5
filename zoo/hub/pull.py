"""`zoo pull`: a published repository into the Hub's cache, checked, and into the registry and the store.

The cache is that of every Hub client: `blobs/` named by hash, `snapshots/COMMIT/` of links to them,
`refs/NAME`. transformers, llama.cpp and huggingface_hub find there what this fetched, and this what they did.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from huggingface_hub import constants
from pydantic import TypeAdapter, ValidationError

from zoo.entry import Entry, EntryId, Publication, Record
from zoo.errors import FormatError, HubError, StoreError, UsageError, ZooError
from zoo.files import Store, atomic_file, told_plainly, write_json
from zoo.hub import client, manifest
from zoo.hub.client import Blob, Hub
from zoo.hub.download import Cancelled, Download, fetch, missing
from zoo.hub.manifest import MANIFEST, Manifest, release_tag, with_publication
from zoo.progress import say, transfer
from zoo.registry import Registry

Only = Literal["gguf", "sparse", "safetensors"]

AT_ONCE = 4  # files
ENTRY = "entry.json"  # in the store: the entry, as the pipeline writes it too
PACKED = "packed.safetensors"
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_SAFETENSORS_FILES = ("tokenizer", "vocab", "merges", "chat_template", "special_tokens", "added_tokens")


class Pulled(Record):
    """What a pull brought."""

    endpoint: str
    repository: str
    commit: str
    folder: str  # holds the files by their paths in the repository
    files: list[str]
    size: int  # bytes
    entry_id: str | None  # None: the repository was not published by a zoo


@dataclass(frozen=True)
class _Source:
    """A commit of a repository, and what is known of it."""

    hub: Hub
    repository: str
    revision: str  # as asked for
    commit: str
    changed: datetime  # when it was, as far as the Hub says
    blobs: Mapping[str, Blob]

    def download(self, blob: Blob, sha256: str | None) -> Download:
        url = self.hub.file_url(self.repository, self.commit, blob.path)
        return Download(url, blob.path, blob.size, sha256 or blob.sha256, blob.git_sha1)


@dataclass(frozen=True)
class _Place:
    """Where files go: the Hub's cache of a repository, or a plain folder."""

    root: Path
    cached: bool
    commit: str

    @property
    def folder(self) -> Path:
        return self.root / "snapshots" / self.commit if self.cached else self.root

    def target(self, blob: Blob) -> Path:
        return self.root / "blobs" / blob.etag if self.cached else self.root / blob.path

    def show(self, blob: Blob) -> None:
        """Give a finished file its name."""
        if self.cached:
            link = self.folder / blob.path
            up = "../" * (blob.path.count("/") + 2)
            _link(link, f"{up}blobs/{blob.etag}")


def pull(
    target: str,
    hub: Hub,
    *,
    store: Path,
    registry: Registry | None,
    revision: str | None = None,
    only: Only | None = None,
    dest: Path | None = None,
    force: bool = False,
    mend: Entry | None = None,
) -> Pulled:
    """Fetch an entry by its id, or any repository by its name, at a branch, tag or commit.

    Into the Hub's cache, or as plain files into `dest`. What is there already is checked and kept, but with
    `force`. A published entry is also put into the registry, and linked below `store`. `mend`: an entry that
    is damaged here; nothing but its own files takes their place. Raises ZooError.
    """
    source = _look(hub, resolve(hub, target), revision)
    place = _place(source, dest)
    with told_plainly(place.root):
        published = _manifest(source, place, force)
        chosen = _choose(source, published, only)
        if mend is not None:
            _refuse_other_files(mend, published, source)
        if published is not None:
            _refuse_other_entry(published.entry, source, store, registry, force)
            publication = _publication(source)
        downloads = _downloads(source, published, chosen, place)
        _check_room(place, downloads, force)
        size = sum(blob.size for blob in chosen)
        say(f"{source.repository} at {source.commit[:12]}: {len(chosen)} files, {size / 1e6:.1f} MB")
        if place.cached:
            _write_tree(source, place.root)
        _fetch_all(hub, downloads, source.repository, force)
        for blob in chosen:
            place.show(blob)
        if place.cached and source.revision != source.commit:
            with atomic_file(place.root / "refs" / source.revision) as temporary:
                temporary.write_text(source.commit)
    if published is not None:
        anew = mend is not None or (force and only is None)  # in place of files that were made here, too
        # A plain folder may hold files of another release beside those that were fetched.
        paths = [blob.path for blob in chosen] if dest is not None else list(source.blobs)
        _record(published.entry, publication, place, paths, store, registry, anew)
    return Pulled(
        endpoint=hub.endpoint,
        repository=source.repository,
        commit=source.commit,
        folder=str(place.folder.absolute()),
        files=[blob.path for blob in chosen],
        size=size,
        entry_id=published.entry.id if published is not None else None,
    )


# --- which repository -------------------------------------------------------------------------------


def resolve(hub: Hub, target: str) -> str:
    """The repository that an entry's id, or a repository's own name, means at this endpoint."""
    if "/" in target:
        if not REPOSITORY.fullmatch(target) or "--" in target or ".." in target:
            raise UsageError(f"{target!a} is not a repository", expected="namespace/name, or an entry's id")
        return target
    try:
        TypeAdapter(EntryId).validate_python(target)
    except ValidationError as error:
        raise UsageError(f"{target!a} is neither an entry's id nor namespace/name") from error
    found = client.repositories(hub, target)
    names = [name for name in found if name.rpartition("/")[2] == target]
    if len(names) == 1:
        return names[0]
    if names:
        raise UsageError(
            f"several entries at {hub.endpoint} have the id {target}",
            saw=", ".join(names[:10]),
            try_=f"zoo pull {names[0]}",
        )
    raise HubError(
        f"there is no entry {target} at {hub.endpoint}",
        saw=f"near it: {', '.join(found[:3])}" if found else None,
        expected=f"a repository NAMESPACE/{target} that a zoo published",
        try_="zoo search TEXT finds entries; zoo pull NAMESPACE/NAME takes any repository",
    )


def _look(hub: Hub, repository: str, revision: str | None) -> _Source:
    asked = revision or constants.DEFAULT_REVISION
    try:
        manifest.check_path(asked)
    except ValueError as error:
        raise UsageError(f"{asked!a} is not a revision", saw=str(error)) from error
    described = client.describe(hub, repository, asked)
    commit = described.sha
    if commit is None or not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise HubError(
            f"{repository} at {hub.endpoint} has no commit yet", try_="push to it first, or name another"
        )
    changed = described.last_modified or datetime.now(UTC)
    return _Source(hub, repository, asked, commit, changed, client.files_at(hub, repository, commit))


def _place(source: _Source, dest: Path | None) -> _Place:
    if dest is not None:
        return _Place(dest, False, source.commit)
    name = f"models--{source.repository.replace('/', '--')}"
    return _Place(Path(constants.HF_HUB_CACHE) / name, True, source.commit)


# --- which files ------------------------------------------------------------------------------------


def _manifest(source: _Source, place: _Place, force: bool) -> Manifest | None:
    """The repository's manifest, fetched to its place; None if no zoo published it."""
    blob = source.blobs.get(MANIFEST)
    if blob is None:
        return None
    where = f"{MANIFEST} of {source.repository}"
    if blob.size > manifest.MAX_BYTES:
        raise FormatError(f"{where} is too large", saw=f"{blob.size} bytes")
    fetch(source.hub, source.download(blob, None), place.target(blob), force=force)
    found = manifest.parse(place.target(blob).read_bytes(), where)
    name = source.repository.rpartition("/")[2]
    if found.entry.id != name:
        raise FormatError(
            f"{where} is of another entry", saw=found.entry.id, expected=f"{name}, the repository's name"
        )
    if found.entry.status == "failed":
        raise FormatError(f"{where} is of an entry that failed verification", saw=found.entry.failure)
    for file in found.files:
        listed = source.blobs.get(file.path)
        if listed is None or listed.size != file.size or listed.sha256 not in (None, file.sha256):
            raise FormatError(
                f"{source.repository} at {source.commit[:12]} is not as it was published: {file.path}",
                saw="it is gone" if listed is None else f"{listed.size} bytes, {listed.etag}",
                expected=f"{file.size} bytes, sha256 {file.sha256}",
                try_=f"zoo pull {source.repository} --revision {release_tag(found.entry)}, the release",
            )
    return found


def _choose(source: _Source, published: Manifest | None, only: Only | None) -> list[Blob]:
    """The files to fetch: all, or those of one use and what describes them."""
    if only is None:
        return list(source.blobs.values())
    kinds = _kinds(published.entry) if published is not None else {}
    uses = {path: kinds.get(path, use_of(path)) for path in source.blobs}
    if only not in uses.values():
        there = [use for use in get_args(Only) if use in uses.values()]
        raise ZooError(
            f"{source.repository} has no {only} files",
            saw=f"files for {', '.join(there)}" if there else f"{len(uses)} files of other kinds",
            try_=f"zoo pull {source.repository}" + (f" --only {there[0]}" if there else ""),
        )
    return [blob for path, blob in source.blobs.items() if uses[path] in (only, None)]


def _kinds(entry: Entry) -> dict[str, str]:
    """Of the artifacts that a published entry names, the use. Plain safetensors go before compressed ones."""
    plain = any(a.kind == "safetensors" for a in entry.artifacts)
    uses = {"gguf": "gguf", "packed": "sparse", "safetensors": "safetensors"}
    uses |= {"config": "safetensors", "tokenizer": "safetensors"}
    uses["compressed-tensors"] = "compressed-tensors" if plain else "safetensors"
    return {a.path: uses[a.kind] for a in entry.artifacts if a.kind in uses}


def use_of(path: str) -> str | None:
    """What a file of any repository is for, by its name; None: a small file that goes with all."""
    name = path.rpartition("/")[2]
    if name.endswith(".gguf"):
        return "gguf"
    if name == PACKED:
        return "sparse"
    if name.endswith((".safetensors", ".safetensors.index.json")):
        return "safetensors"
    if name.endswith("config.json") or name.startswith(_SAFETENSORS_FILES):
        return "safetensors"
    small = name.endswith((".md", ".txt", ".yaml", ".yml", ".gitattributes")) or name in (MANIFEST, "LICENSE")
    return None if small else "other"


def _downloads(
    source: _Source, published: Manifest | None, chosen: Iterable[Blob], place: _Place
) -> dict[Path, Download]:
    """Where each distinct content goes. A file of the manifest must have its hash, any other the Hub's."""
    hashes = {file.path: file.sha256 for file in published.files} if published is not None else {}
    return {place.target(blob): source.download(blob, hashes.get(blob.path)) for blob in chosen}


# --- fetching ---------------------------------------------------------------------------------------


def _check_room(place: _Place, downloads: Mapping[Path, Download], force: bool) -> None:
    needed = sum(missing(download, target, force=force) for target, download in downloads.items())
    where = place.root
    while not where.exists():
        where = where.parent
    free = shutil.disk_usage(where).free
    if needed > free:
        raise StoreError(
            f"no room for {place.root}",
            saw=f"{free / 1e6:.0f} MB free",
            expected=f"{needed / 1e6:.0f} MB",
            try_="free some space; or --only gguf|sparse|safetensors; or --dest or HF_HUB_CACHE elsewhere",
        )


def _fetch_all(hub: Hub, downloads: Mapping[Path, Download], name: str, force: bool) -> None:
    """Fetch several files at once; the first failure ends the others, and what came is kept."""
    stop = threading.Event()
    with (
        transfer(name, sum(download.size for download in downloads.values())) as advance,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        futures = [
            pool.submit(fetch, hub, download, target, force=force, advance=advance, stop=stop)
            for target, download in downloads.items()
        ]
        failure: BaseException | None = None
        try:
            for future in as_completed(futures):
                error = future.exception()
                if error is not None and (failure is None or isinstance(failure, Cancelled)):
                    failure = error
                    stop.set()
                    pool.shutdown(wait=False, cancel_futures=True)
                    break
        except BaseException:  # Ctrl-C: the threads must end first
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        if failure is not None:
            raise failure


def _write_tree(source: _Source, root: Path) -> None:
    """The commit's files as huggingface_hub 2 lists them, by which it tells a part from the whole."""
    files = {
        path: {"size": blob.size, "blob_id": blob.oid}
        | ({"lfs_sha256": blob.sha256, "lfs_size": blob.size} if blob.sha256 else {})
        for path, blob in source.blobs.items()
    }
    path = root / "trees" / f"{source.commit}.json"
    if not path.exists():
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps({"format_version": 1, "files": files}, indent=1))


def _link(link: Path, to: str) -> None:
    """Make a symbolic link, in one step also where there is something."""
    if link.is_symlink() and str(link.readlink()) == to:
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    temporary = link.with_name(f".{uuid.uuid4().hex}")
    temporary.symlink_to(to)
    temporary.replace(link)


# --- the entry --------------------------------------------------------------------------------------


def _refuse_other_entry(
    entry: Entry, source: _Source, store: Path, registry: Registry | None, force: bool
) -> None:
    """An entry made here, or pulled from elsewhere, is not replaced unasked by another of its name."""
    for known in _known(entry.id, store, registry):
        if force or known.artifacts == entry.artifacts or _is_from(known, source):
            continue
        origin = known.publications[-1].repository if known.publications else "made here"
        raise ZooError(
            f"there is another entry {entry.id} here",
            saw=f"{origin}, of {known.created}; that of {source.repository} is of {entry.created}",
            expected="the same files, or an earlier release from the same repository",
            try_="--force replaces it; or name another --registry and --store for this one",
        )


def _refuse_other_files(mend: Entry, published: Manifest | None, source: _Source) -> None:
    there = None if published is None else (published.entry.id, published.entry.artifacts)
    if there != (mend.id, mend.artifacts):
        raise FormatError(
            f"{source.repository} at {source.commit[:12]} does not hold the files of {mend.id}",
            saw=f"no {MANIFEST}" if published is None else f"other files, of {published.entry.id}",
            expected="the sizes and sha256 that the registry says",
            try_="the recipe makes them again: zoo run RECIPE",
        )


def _known(entry_id: str, store: Path, registry: Registry | None) -> Iterator[Entry]:
    """The entry of this id in the registry, and that in the store."""
    if registry is not None and (recorded := registry.find(entry_id)) is not None:
        yield recorded
    path = store / "entries" / entry_id / ENTRY
    with contextlib.suppress(FileNotFoundError, ValidationError):
        yield Entry.model_validate_json(path.read_bytes())


def _is_from(entry: Entry, source: _Source) -> bool:
    return any(
        p.endpoint == source.hub.endpoint and p.repository == source.repository for p in entry.publications
    )


def _publication(source: _Source) -> Publication:
    """Where an entry came from. Its tag is one that names the commit, else the revision asked for."""
    with client.told_plainly(source.hub, source.repository):
        tags = source.hub.api.list_repo_refs(source.repository).tags
    names = [tag.name for tag in tags if tag.target_commit == source.commit]
    return Publication(
        endpoint=source.hub.endpoint,
        repository=source.repository,
        commit=source.commit,
        tag=names[0] if names else source.revision,
        published=source.changed.astimezone(UTC).isoformat(timespec="seconds"),
    )


def _record(
    entry: Entry,
    publication: Publication,
    place: _Place,
    paths: Iterable[str],
    store: Path,
    registry: Registry | None,
    anew: bool,
) -> None:
    """Put the entry into the registry, and links to those of its files that are here into the store, where
    the runner looks.

    Of an entry that was made here, of the same content, the files stay, if they are not to be put `anew`.
    """
    same = (e for e in _known(entry.id, store, registry) if e.artifacts == entry.artifacts)
    known = next((e for e in same if e.status != "failed"), None)
    entry = with_publication(known or entry, publication)  # what was measured here of the same files is kept
    if registry is not None:
        registry.put(entry)
    target = store / "entries" / entry.id
    with Store(store).locked(f"entry-{entry.id}"), told_plainly(target):
        fresh, old = (target.with_name(f".{entry.id}.{word}") for word in ("new", "old"))
        if old.is_dir() and not target.exists():  # by a process that was killed below, between two renames
            old.rename(target)
        if target.is_dir() and not _is_pulled(target) and known is not None and not anew:
            return  # made here, of the same content: real files need no links
        for left in (fresh, old):
            shutil.rmtree(left, ignore_errors=True)
        fresh.mkdir(parents=True)
        for path in paths:
            there = place.folder.absolute() / path
            if there.is_file() and path != ENTRY:
                _link(fresh / path, str(there))
        write_json(fresh / ENTRY, entry.model_dump(mode="json"))
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def _is_pulled(folder: Path) -> bool:
    """Whether an entry's folder in the store is one of links, which a pull made."""
    return (folder / MANIFEST).is_symlink()
