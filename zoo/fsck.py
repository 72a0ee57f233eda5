"""`zoo fsck`: whether registry, stores and what was published agree, and mending what can be mended.

Findings name the thing, what is wrong, and what mends it. Nothing is ever removed that is not known to be
worthless: half-written outputs, or damaged ones, which are made again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import ValidationError
from sqlalchemy import text

from zoo.entry import Artifact, Entry, Record
from zoo.errors import HubError, ZooError
from zoo.files import Store, atomic_file, file_table, sha256_bytes, sha256_file, write_json
from zoo.hub import client, manifest
from zoo.hub.client import Hub
from zoo.hub.manifest import MANIFEST
from zoo.logs import redact
from zoo.progress import track
from zoo.registry import Registry
from zoo.registry.leases import Lease, held, is_gone, release
from zoo.shared_store import Damaged, Remote, SharedStore, Table

CARD, RECORD = "README.md", "entry.json"
Where = Literal["registry", "store", "shared", "published"]


class Finding(Record):
    """One inconsistency. `repaired`: None: nobody tried; else whether it is gone now."""

    where: Where
    subject: str  # an entry, a key of the store, a lease, an address
    problem: str
    repair: str | None  # what mends it; None: nothing here can
    repaired: bool | None = None


@dataclass(frozen=True)
class _Found:
    finding: Finding
    mend: Callable[[], None] | None = None


def fsck(
    registry: Registry,
    store: Store | None,
    hub_of: Callable[[str], Hub] | None = None,
    *,
    repair: bool = False,
    render: Callable[[Entry], str] | None = None,
    fetch: Callable[[Entry], None] | None = None,
) -> list[Finding]:
    """Every inconsistency, repaired where that was asked for and is possible. `store` None: not of the store.

    `hub_of` connects to an endpoint, which may stand in an entry that came from others, so with no token that
    is not for it: with it, publications are checked too. `render` makes a card, `fetch` puts what was
    published of an entry in place of its folder, once it has come; without them nothing is repaired that way.
    """
    findings = []
    for found in _checks(registry, store, hub_of, render, fetch):
        done: bool | None = None
        if repair and found.mend is not None:
            try:
                found.mend()
                done = True
            except (ZooError, OSError):
                done = False
        findings.append(found.finding.model_copy(update={"repaired": done}))
    return findings


def _checks(
    registry: Registry,
    store: Store | None,
    hub_of: Callable[[str], Hub] | None,
    render: Callable[[Entry], str] | None,
    fetch: Callable[[Entry], None] | None,
) -> Iterator[_Found]:
    yield from _database(registry)
    yield from _leases(registry)
    yield from _runs(registry)
    if store is not None:
        yield from _half_written(store)
        yield from _objects(store)
        for entry in track(registry.every(), "entries", registry.count()):
            yield from _entry_files(entry, store, render, fetch)
        yield from _strangers(registry, store)
    if isinstance(store, SharedStore):
        yield from _shared(store.remote)
    if hub_of is not None:
        for entry in track(registry.every(), "published entries", registry.count()):
            yield from _publications(entry, hub_of)


def _finding(where: Where, subject: str, problem: str, repair: str | None) -> Finding:
    return Finding(where=where, subject=subject, problem=redact(problem), repair=repair)


# --- the registry -------------------------------------------------------------------------------------


def _database(registry: Registry) -> Iterator[_Found]:
    """What the database says of its own file, references to rows that are not there, and the search index."""
    with registry.reading() as session:
        if registry.engine.dialect.name == "sqlite":
            said = [row[0] for row in session.execute(text("PRAGMA integrity_check")) if row[0] != "ok"]
            broken = session.execute(text("PRAGMA foreign_key_check")).all()
        else:
            said, broken = [], []
        lost = session.scalars(
            text("SELECT id FROM entries WHERE id NOT IN (SELECT entry_id FROM entry_index) ORDER BY id")
        ).all()
    for line in said[:20]:
        yield _Found(_finding("registry", registry.name, line, None))
    for row in broken[:20]:
        problem = f"row {row[1]} of {row[0]} refers to a row of {row[2]} that is not there"
        yield _Found(_finding("registry", registry.name, problem, None))
    for entry_id in lost:
        yield _Found(
            _finding("registry", entry_id, "is not in the search index", "index it"),
            partial(_index, registry, entry_id),
        )


def _index(registry: Registry, entry_id: str) -> None:
    registry.put(registry.get(entry_id))


def _leases(registry: Registry) -> Iterator[_Found]:
    for name, seen in held(registry).items():
        if is_gone(seen.holder):
            lease = Lease(name, seen.holder, seen.token)
            yield _Found(
                _finding(
                    "registry", name, f"its lease is held by {seen.holder}, which is gone", "release it"
                ),
                partial(release, registry, lease),
            )


def _runs(registry: Registry) -> Iterator[_Found]:
    for run_id, name in registry.dead_runs():
        yield _Found(
            _finding(
                "registry", name, f"run {run_id} is recorded as running; its process is gone", "close it"
            ),
            registry.close_dead_runs,
        )


# --- the store ----------------------------------------------------------------------------------------


def _half_written(store: Store) -> Iterator[_Found]:
    for left in sorted((store.root / "partial").glob("*")):
        if not store.is_locked(left.name.partition(".")[0]):
            yield _Found(
                _finding("store", left.name, "was left half-written by a process that is gone", "remove it"),
                partial(shutil.rmtree, left),
            )
    for left in sorted((store.root / "entries").glob(".*.*")):
        entry_id = left.name[1:-4]
        if left.name.endswith((".new", ".old")) and not store.is_locked(f"entry-{entry_id}"):
            lost = left.name.endswith(".old") and not left.with_name(entry_id).exists()
            repair = f"put it back as {entry_id}" if lost else "remove it"
            yield _Found(
                _finding("store", left.name, "was left by a process that is gone", repair),
                partial(_put_back if lost else _remove_left, store, entry_id, left),
            )


def _put_back(store: Store, entry_id: str, left: Path) -> None:
    """Give an entry its folder again, which was moved aside for a new one that never came."""
    with store.locked(f"entry-{entry_id}"):
        left.rename(left.with_name(entry_id))


def _remove_left(store: Store, entry_id: str, left: Path) -> None:
    with store.locked(f"entry-{entry_id}"):
        shutil.rmtree(left)


def _objects(store: Store) -> Iterator[_Found]:
    for key in track(store.keys(), "outputs of stages"):
        if not store.is_locked(key) and (damaged := store.damage(key)):
            yield _Found(
                _finding(
                    "store", key, f"is damaged: {', '.join(damaged[:3])}", "remove it: it is made again"
                ),
                partial(_discard, store, key),
            )


def _discard(store: Store, key: str) -> None:
    with store.locked(key):
        if store.damage(key):  # still
            store.discard(key)


def _entry_files(
    entry: Entry,
    store: Store,
    render: Callable[[Entry], str] | None,
    fetch: Callable[[Entry], None] | None,
) -> Iterator[_Found]:
    """The folder of an entry against the registry."""
    folder = store.root / "entries" / entry.id
    if not folder.is_dir():
        if entry.publications:
            return  # it can be pulled
        if isinstance(store, SharedStore) and store.remote.holds(entry):
            return  # another machine made it
        yield from _absent(entry, store)
        if not folder.is_dir():  # else it is there by now, as a repair
            return
    pulled = (folder / MANIFEST).is_symlink()  # perhaps in part only
    here = [a for a in entry.artifacts if not pulled or (folder / a.path).is_symlink()]
    wrong = [found for a in here if (found := _wrong(folder / a.path, a)) is not None]
    for artifact, problem in wrong:
        mend = _mend_file(entry, artifact, store)
        how = "copy it from the stage that made it" if mend else None
        if mend is None and entry.publications and fetch is not None:
            how = f"pull it from {entry.publications[-1].repository}"
            mend = partial(_fetch, entry, folder / artifact.path, artifact, fetch)
        if mend is None:
            how = f"zoo pull --force {entry.id}" if entry.publications else _again(entry)
        yield _Found(_finding("store", f"{entry.id}/{artifact.path}", problem, how), mend)
    pulled = (folder / MANIFEST).is_symlink()  # by now, perhaps, as a repair
    known = {a.path for a in entry.artifacts} | {CARD, RECORD}
    there = [] if pulled else sorted(p for p in folder.rglob("*") if p.is_file())
    for path in (p.relative_to(folder).as_posix() for p in there):
        if path not in known:
            problem = "is in the entry's folder, and no file of it"
            yield _Found(_finding("store", f"{entry.id}/{path}", problem, None))
    if not _same_record(folder / RECORD, entry):
        yield _Found(
            _finding("store", f"{entry.id}/{RECORD}", "is not what the registry says", "write it again"),
            partial(write_json, folder / RECORD, entry.model_dump(mode="json")),
        )
    if not pulled and not (folder / CARD).is_file():
        mend_card = None if render is None else partial(_write_card, folder / CARD, render, entry)
        yield _Found(_finding("store", f"{entry.id}/{CARD}", "is missing", "render it"), mend_card)


def _absent(entry: Entry, store: Store) -> Iterator[_Found]:
    """An entry of which nothing is in the store: lost, or made elsewhere."""
    mends = [mend for artifact in entry.artifacts if (mend := _mend_file(entry, artifact, store))]
    whole = len(mends) == len(entry.artifacts)
    how = "copy them from the stage that made them" if whole else _again(entry)
    problem = "was not published, and its files are not in this store"
    if entry.artifacts:
        yield _Found(_finding("store", entry.id, problem, how), partial(_all, mends) if whole else None)


def _all(mends: Sequence[Callable[[], None]]) -> None:
    for mend in mends:
        mend()


def _again(entry: Entry) -> str:
    return f"zoo import {entry.origin}" if entry.origin else "zoo run RECIPE"


def _write_card(path: Path, render: Callable[[Entry], str], entry: Entry) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(render(entry), encoding="utf-8")


def _wrong(path: Path, artifact: Artifact) -> tuple[Artifact, str] | None:
    try:
        size = path.stat().st_size
        if size != artifact.size:
            return artifact, f"is {size} bytes, the registry says {artifact.size}"
        sha256 = sha256_file(path)
    except OSError as error:
        return artifact, "is missing" if isinstance(error, FileNotFoundError) else str(error.strerror)
    if sha256 != artifact.sha256:
        return artifact, f"is damaged: sha256 {sha256[:12]}, the registry says {artifact.sha256[:12]}"
    return None


def _mend_file(entry: Entry, artifact: Artifact, store: Store) -> Callable[[], None] | None:
    """Copy a file from the export stage's output, if that is sound; the recipe stands in the entry."""
    target = store.root / "entries" / entry.id / artifact.path
    if artifact.kind == "recipe" and sha256_bytes(entry.recipe.encode()) == artifact.sha256:
        return partial(_write, entry.recipe, target)
    for stage in entry.stages:
        source = store.path(stage.key) / artifact.path
        if stage.name == "export" and _wrong(source, artifact) is None:
            return partial(_copy, source, target)
    return None


def _fetch(entry: Entry, path: Path, artifact: Artifact, fetch: Callable[[Entry], None]) -> None:
    if _wrong(path, artifact) is not None:  # else another file's repair brought it
        fetch(entry)


def _write(said: str, target: Path) -> None:
    with atomic_file(target) as temporary:
        temporary.write_text(said)


def _copy(source: Path, target: Path) -> None:
    with atomic_file(target) as temporary:
        shutil.copyfile(source, temporary)


def _same_record(path: Path, entry: Entry) -> bool:
    """Whether an entry's own record is the registry's; it is written before the entry is published."""
    try:
        said = Entry.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return not entry.stages  # `zoo pull` writes none
    except (OSError, ValidationError):
        return False
    later = {"status", "publications", "benchmarks"}
    return said.model_dump(exclude=later) == entry.model_dump(exclude=later)


def _strangers(registry: Registry, store: Store) -> Iterator[_Found]:
    """Folders of entries that the registry does not know."""
    folders = [f for f in sorted((store.root / "entries").glob("[!.]*")) if f.is_dir()]
    known = registry.known(folder.name for folder in folders)
    for folder in folders:
        if folder.name in known:
            continue
        entry = _whole_entry(folder)
        yield _Found(
            _finding(
                "store",
                folder.name,
                "is an entry that the registry does not have",
                "record it" if entry else "zoo registry import, or remove the folder",
            ),
            None if entry is None else (partial(registry.put, entry)),
        )


def _whole_entry(folder: Path) -> Entry | None:
    """The entry that a folder holds, if all its files are what its record says."""
    try:
        entry = Entry.model_validate_json((folder / RECORD).read_bytes())
    except (OSError, ValidationError):
        return None
    table = file_table(folder)
    sound = all(table.get(a.path) == (a.size, a.sha256) for a in entry.artifacts)
    return entry if sound and entry.id == folder.name else None


# --- the store that machines share ---------------------------------------------------------------------


def _shared(remote: Remote) -> Iterator[_Found]:
    """Its outputs, every file against its sha256, and files that no output has."""
    tables: dict[str, Table | str] = {}  # an output that is finished meanwhile is not looked at
    for key in remote.outputs():
        try:
            tables[key] = remote.table(key) or {}
        except Damaged as damage:
            tables[key] = str(damage)
    files = remote.files()
    sound = {name for name in track(files, "files of the shared store") if remote.is_sound(name)}
    mend = "remove it: it is made again"
    for key, table in tables.items():
        if isinstance(table, str):
            yield _Found(_finding("shared", key, table, mend), partial(remote.discard, key, []))
            continue
        wrong = {name: sha256 for name, (_, sha256) in table.items() if sha256 not in sound}
        if wrong:
            problem = f"is damaged: {', '.join([*wrong][:3])}"
            yield _Found(_finding("shared", key, problem, mend), partial(remote.discard, key, wrong.values()))
    used = {sha256 for table in tables.values() if not isinstance(table, str) for _, sha256 in table.values()}
    for name in files:
        if name not in used and remote.is_old(name):
            problem = "belongs to no output: an upload was killed, or the output removed"
            yield _Found(
                _finding("shared", name, problem, "remove it"), partial(remote.discard, None, [name])
            )


# --- what was published -------------------------------------------------------------------------------


def _publications(entry: Entry, hub_of: Callable[[str], Hub]) -> Iterator[_Found]:
    for place in entry.publications:
        where = f"{place.endpoint}/{place.repository}@{place.commit[:12]}"
        again = f"zoo push {entry.id}"
        try:
            hub = hub_of(place.endpoint)
            files = client.files_at(hub, place.repository, place.commit)
            if MANIFEST not in files:
                yield _Found(_finding("published", where, f"has no {MANIFEST}", again))
                continue
            data = client.read(hub, place.repository, place.commit, files[MANIFEST], manifest.MAX_BYTES)
            said = manifest.parse(data, where)
        except (HubError, ZooError) as error:
            problem = error.what + (f" ({error.saw})" if error.saw else "")
            yield _Found(_finding("published", where, problem, again))
            continue
        for file in said.files:
            blob = files.get(file.path)
            if blob is None:
                problem = f"lacks {file.path}, which its manifest lists"
            elif blob.size != file.size or (blob.sha256 is not None and blob.sha256 != file.sha256):
                problem = f"{file.path} is not the file that its manifest lists"
            else:
                continue
            yield _Found(_finding("published", where, problem, again))
        if place == entry.publications[-1] and said.entry.artifacts != entry.artifacts:
            problem = "publishes other files than the registry has"
            yield _Found(_finding("published", where, problem, again))


def as_lines(findings: list[Finding]) -> list[list[str]]:
    """where, what, problem, repair: for a table."""
    words = {True: "repaired", False: "could not be repaired", None: ""}
    return [[f.where, f.subject, f.problem, words[f.repaired] or f.repair or "-"] for f in findings]


def clean(findings: list[Finding]) -> bool:
    """Whether nothing is left that is wrong."""
    return all(finding.repaired for finding in findings)
