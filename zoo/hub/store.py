"""Repositories on disk: content-addressed files, and their history in one SQLite database.

    ROOT/blobs/ab/abcdef...   files, named by their sha256, written once and never changed
    ROOT/hub.db               repositories, commits, branches, tags, tokens, the secret that signs upload URLs

A file is whole and on disk before a commit names it, and a branch moves in the transaction that adds its
commit; so whenever the process or the machine stops, every branch and tag names complete content. What a
broken push leaves behind is files without a name, which `collect` removes. Several processes may use one
store.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import sqlite3
import stat
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from zoo.errors import FormatError, StoreError, ZooError
from zoo.files import atomic_file, told_plainly
from zoo.hub import front_matter

KINDS = ("models", "datasets", "spaces")
VERSION = 1  # of the tables
MAX_FILES = 100_000  # of a repository
MAX_README = 2_000_000  # bytes that are looked at for card data
GRACE_S = 24 * 3600.0  # an upload may take so long until its commit names it

_TABLES = """
CREATE TABLE repos (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    private INTEGER NOT NULL,
    gated TEXT,
    created TEXT NOT NULL,
    UNIQUE (kind, name)
);
CREATE TABLE commits (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    repo_id INTEGER NOT NULL REFERENCES repos ON DELETE CASCADE,
    parent_id INTEGER REFERENCES commits,
    oid TEXT NOT NULL,
    title TEXT NOT NULL,
    message TEXT NOT NULL,
    author TEXT NOT NULL,
    created TEXT NOT NULL,
    card TEXT NOT NULL,
    tags TEXT NOT NULL,
    UNIQUE (repo_id, oid)
);
CREATE INDEX commits_by_parent ON commits (parent_id);
CREATE TABLE files (
    commit_id INTEGER NOT NULL REFERENCES commits ON DELETE CASCADE,
    path TEXT NOT NULL,
    oid TEXT NOT NULL,
    size INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    lfs INTEGER NOT NULL,
    changed_id INTEGER NOT NULL,
    PRIMARY KEY (commit_id, path)
) WITHOUT ROWID;
CREATE INDEX files_by_sha256 ON files (sha256);
CREATE TABLE refs (
    repo_id INTEGER NOT NULL REFERENCES repos ON DELETE CASCADE,
    kind TEXT NOT NULL CHECK (kind IN ('branch', 'tag')),
    name TEXT NOT NULL,
    commit_id INTEGER NOT NULL REFERENCES commits,
    PRIMARY KEY (repo_id, kind, name)
) WITHOUT ROWID;
CREATE INDEX refs_by_commit ON refs (commit_id);
CREATE TABLE tokens (
    name TEXT PRIMARY KEY,
    sha256 TEXT NOT NULL UNIQUE,
    scope TEXT NOT NULL CHECK (scope IN ('read', 'write')),
    created TEXT NOT NULL
);
CREATE TABLE secrets (value BLOB NOT NULL);
"""


class Refused(ZooError):
    """A request that cannot be right, whatever the store holds."""


class Missing(ZooError):
    """Something the store does not have."""


class RepoNotFound(Missing):
    pass


class RevisionNotFound(Missing):
    pass


class EntryNotFound(Missing):
    pass


class Exists(ZooError):
    """A name that is taken."""


class Stale(ZooError):
    """A branch that has moved since the client looked at it."""


@dataclass(frozen=True)
class Repo:
    id: int
    kind: str  # models, datasets, spaces
    name: str  # namespace/name
    private: bool
    gated: str | None  # auto, manual
    created: str


@dataclass(frozen=True)
class Commit:
    id: int
    oid: str  # 40 hexadecimal digits, as git would number it
    title: str
    message: str
    author: str
    created: str
    card: dict[str, Any]
    tags: list[str]


@dataclass(frozen=True)
class File:
    path: str
    oid: str  # of the git blob: of the content, or of the pointer to it
    size: int  # of the content
    sha256: str  # of the content
    lfs: bool
    changed_id: int = field(default=0, compare=False)  # the commit that put it there


@dataclass(frozen=True)
class Removal:
    path: str
    folder: bool = False


@dataclass(frozen=True)
class Ref:
    kind: str  # branch, tag
    name: str
    oid: str


class HubStore:
    """Every method may be called from any thread; each is one transaction."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self._local = threading.local()
        with told_plainly(self.root):
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(self.root / "hub.db", os.O_CREAT | os.O_RDWR, 0o600))
        with _told(self.root), contextlib.suppress(sqlite3.OperationalError):  # another process does it
            self._db().execute("PRAGMA journal_mode = WAL")
        with self.writing() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                for statement in _TABLES.split(";"):
                    db.execute(statement)
                db.execute("INSERT INTO secrets VALUES (?)", (secrets.token_bytes(32),))
                db.execute(f"PRAGMA user_version = {VERSION}")
            elif version != VERSION:
                raise StoreError(
                    f"{self.root} was written by another version of the zoo",
                    saw=f"tables of version {version}",
                    expected=f"version {VERSION}",
                    try_="git pull, pip install '.[serve]', or name another folder with --store",
                )
            self.secret: bytes = db.execute("SELECT value FROM secrets").fetchone()["value"]

    def _db(self) -> sqlite3.Connection:
        if not hasattr(self._local, "db"):
            db = sqlite3.connect(self.root / "hub.db", timeout=30, isolation_level=None)
            db.row_factory = sqlite3.Row
            for pragma in ("foreign_keys = ON", "synchronous = FULL", "cache_size = -512"):
                db.execute(f"PRAGMA {pragma}")
            self._local.db = db
        found: sqlite3.Connection = self._local.db
        return found

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One state of the database, whatever others write meanwhile."""
        with _told(self.root), self._transaction("BEGIN") as db:
            yield db

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """The only writer; all of the block is on disk when it ends, or nothing of it."""
        with _told(self.root), self._transaction("BEGIN IMMEDIATE") as db:
            yield db

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        db = self._db()
        db.execute(begin)
        try:
            yield db
            db.execute("COMMIT")
        finally:
            if db.in_transaction:
                db.execute("ROLLBACK")

    # --- repositories ---

    def create(self, kind: str, name: str, *, private: bool = False, author: str = "zoo") -> Repo:
        """An empty repository with one commit. Exists if there is one of this name."""
        check_name(name)
        if kind not in KINDS:
            raise Refused(f"{kind!r} is no kind of repository", expected=", ".join(KINDS))
        with self.writing() as db:
            try:
                row = db.execute(
                    "INSERT INTO repos (kind, name, private, created) VALUES (?, ?, ?, ?) RETURNING *",
                    (kind, name, private, _now()),
                ).fetchone()
            except sqlite3.IntegrityError as error:
                raise Exists(f"there is a repository {name} already") from error
            repo = _repo(row)
            first = _add_commit(db, repo, None, {}, "initial commit", "", author, ({}, []))
            db.execute("INSERT INTO refs VALUES (?, 'branch', 'main', ?)", (repo.id, first.id))
            return repo

    def repo(self, kind: str, name: str) -> Repo:
        with self.reading() as db:
            row = db.execute("SELECT * FROM repos WHERE kind = ? AND name = ?", (kind, name)).fetchone()
        if row is None:
            raise RepoNotFound("Repository not found")
        return _repo(row)

    def update(self, repo: Repo, *, private: bool, gated: str | None) -> None:
        with self.writing() as db:
            db.execute("UPDATE repos SET private = ?, gated = ? WHERE id = ?", (private, gated, repo.id))

    def delete(self, repo: Repo) -> None:
        """Forget a repository; its files stay until `collect`."""
        with self.writing() as db:
            db.execute("DELETE FROM refs WHERE repo_id = ?", (repo.id,))
            db.execute("DELETE FROM repos WHERE id = ?", (repo.id,))

    def repos(
        self,
        kind: str,
        *,
        private: bool,
        tags: Sequence[str] = (),
        search: str | None = None,
        author: str | None = None,
        gated: bool | None = None,
        by: str = "lastModified",
        after: tuple[str, int] | None = None,
        limit: int = 100,
    ) -> list[tuple[Repo, Commit]]:
        """Repositories with the newest commit of `main`, newest first, those after (moment, id) `after`.

        `private`: the private ones too. `tags`: all of them. `by`: lastModified or createdAt.
        """
        moment = {"lastModified": "c.created", "createdAt": "r.created"}[by]
        where, values = ["r.kind = ?"], [kind]
        if not private:
            where.append("NOT r.private")
        if search:
            where.append("instr(lower(r.name), lower(?))")
            values.append(search)
        if author:
            where.append("substr(r.name, 1, length(?) + 1) = ? || '/'")
            values += [author, author]
        if gated is not None:
            where.append("r.gated IS NOT NULL" if gated else "r.gated IS NULL")
        for tag in tags:
            where.append("EXISTS (SELECT 1 FROM json_each(c.tags) WHERE value = ?)")
            values.append(tag)
        if after is not None:
            where.append(f"({moment}, r.id) < (?, ?)")
            values += [after[0], after[1]]  # type: ignore[list-item]
        query = (
            "SELECT r.id AS repo_id, r.kind, r.name, r.private, r.gated, r.created AS repo_created, c.* "
            "FROM repos r JOIN refs ON refs.repo_id = r.id AND refs.kind = 'branch' AND refs.name = 'main' "
            f"JOIN commits c ON c.id = refs.commit_id WHERE {' AND '.join(where)} "
            f"ORDER BY {moment} DESC, r.id DESC LIMIT ?"
        )
        with self.reading() as db:
            rows = db.execute(query, (*values, limit)).fetchall()
        return [
            (
                Repo(r["repo_id"], r["kind"], r["name"], bool(r["private"]), r["gated"], r["repo_created"]),
                _commit(r),
            )
            for r in rows
        ]

    def commits_in(self, kind: str, names: Iterable[str], *, private: bool) -> set[tuple[str, str]]:
        """(name, commit) of all commits of the repositories of these names; `private`: private ones too."""
        query = (
            "SELECT r.name, c.oid FROM repos r JOIN commits c ON c.repo_id = r.id "
            "WHERE r.kind = ? AND r.private <= ? AND r.name IN (SELECT value FROM json_each(?))"
        )
        with self.reading() as db:
            return {(r["name"], r["oid"]) for r in db.execute(query, (kind, private, json.dumps([*names])))}

    def names(self, kind: str, *, private: bool) -> set[str]:
        with self.reading() as db:
            rows = db.execute("SELECT name FROM repos WHERE kind = ? AND private <= ?", (kind, private))
            return {row["name"] for row in rows}

    # --- branches, tags, commits ---

    def commit_of(self, repo: Repo, revision: str) -> Commit:
        """The commit that a branch, a tag or a commit's own number means. RevisionNotFound."""
        with self.reading() as db:
            return _resolve(db, repo, revision)

    def commits(self, repo: Repo, revision: str, skip: int = 0, limit: int = 100) -> list[Commit]:
        """The history of a revision, newest first."""
        with self.reading() as db:
            head = _resolve(db, repo, revision)
            rows = db.execute(
                "WITH RECURSIVE line (id, depth) AS (SELECT ?, 0 UNION ALL SELECT c.parent_id, depth + 1 "
                "FROM commits c JOIN line ON c.id = line.id WHERE c.parent_id IS NOT NULL) "
                "SELECT c.* FROM line JOIN commits c ON c.id = line.id ORDER BY depth LIMIT ? OFFSET ?",
                (head.id, limit, skip),
            ).fetchall()
        return [_commit(row) for row in rows]

    def refs(self, repo: Repo) -> list[Ref]:
        with self.reading() as db:
            rows = db.execute(
                "SELECT refs.kind, refs.name, c.oid FROM refs JOIN commits c ON c.id = commit_id "
                "WHERE refs.repo_id = ? ORDER BY refs.name",
                (repo.id,),
            ).fetchall()
        return [Ref(*row) for row in rows]

    def create_ref(self, repo: Repo, kind: str, name: str, revision: str) -> None:
        """A branch or tag at a revision. Exists if there is one of this kind and name."""
        check_ref(name)
        with self.writing() as db:
            commit = _resolve(db, repo, revision)
            try:
                db.execute("INSERT INTO refs VALUES (?, ?, ?, ?)", (repo.id, kind, name, commit.id))
            except sqlite3.IntegrityError as error:
                raise Exists(f"there is a {kind} {name} already") from error

    def delete_ref(self, repo: Repo, kind: str, name: str) -> None:
        if (kind, name) == ("branch", "main"):
            raise Refused("the branch main stays")
        with self.writing() as db:
            gone = db.execute(
                "DELETE FROM refs WHERE repo_id = ? AND kind = ? AND name = ?", (repo.id, kind, name)
            )
            if not gone.rowcount:
                raise RevisionNotFound(f"there is no {kind} {name}")

    def commit(
        self,
        repo: Repo,
        branch: str,
        changes: Sequence[File | Removal],
        *,
        title: str,
        message: str = "",
        author: str = "zoo",
        parent: str | None = None,
    ) -> Commit:
        """Put one commit on a branch; all of it or nothing.

        `parent`: what the branch must point to, or the beginning of it; Stale if it does not. The files must
        be stored already, as `put` and `receive` do; Refused if one is not.
        """
        with self.writing() as db:
            row = db.execute(
                "SELECT c.* FROM refs JOIN commits c ON c.id = commit_id "
                "WHERE refs.repo_id = ? AND refs.kind = 'branch' AND refs.name = ?",
                (repo.id, branch.removeprefix("refs/heads/")),
            ).fetchone()
            if row is None:
                raise RevisionNotFound(f"there is no branch {branch}")
            head = _commit(row)
            if parent is not None and not (len(parent) >= 5 and head.oid.startswith(parent.lower())):
                raise Stale(
                    f"{branch} has moved since; look at it again, then commit on top of it",
                    saw=head.oid,
                    expected=parent,
                )
            files = apply(_files(db, head.id), changes)
            for file in files.values():
                if not file.changed_id and self.stored(file.sha256) != file.size:
                    raise Refused(f"the content of {file.path} has not been uploaded", saw=file.sha256)
            commit = _add_commit(db, repo, head, files, title, message, author, self._describe(files))
            db.execute(
                "UPDATE refs SET commit_id = ? WHERE repo_id = ? AND kind = 'branch' AND name = ?",
                (commit.id, repo.id, branch.removeprefix("refs/heads/")),
            )
            return commit

    def _describe(self, files: Mapping[str, File]) -> tuple[dict[str, Any], list[str]]:
        data: dict[str, Any] = {}
        if readme := files.get("README.md"):
            with contextlib.suppress(FormatError), self.blob(readme.sha256).open("rb") as file:
                data = front_matter.card_data(file.read(MAX_README).decode(errors="replace"))
        return data, front_matter.tags(data, files)

    # --- files ---

    def files(self, commit: Commit) -> dict[str, File]:
        """Every file of a commit, by path, in order."""
        with self.reading() as db:
            return _files(db, commit.id)

    def files_of(self, commits: Iterable[Commit]) -> dict[int, dict[str, File]]:
        """The same of several commits, by their ids, in one query."""
        found: dict[int, dict[str, File]] = {commit.id: {} for commit in commits}
        with self.reading() as db:
            rows = db.execute(
                "SELECT commit_id, path, oid, size, sha256, lfs, changed_id FROM files "
                "WHERE commit_id IN (SELECT value FROM json_each(?)) ORDER BY commit_id, path",
                (json.dumps([*found]),),
            )
            for row in rows:
                found[row["commit_id"]][row["path"]] = _file(row)
        return found

    def file(self, commit: Commit, path: str) -> File:
        with self.reading() as db:
            row = db.execute(
                "SELECT path, oid, size, sha256, lfs, changed_id FROM files WHERE commit_id = ? AND path = ?",
                (commit.id, path),
            ).fetchone()
        if row is None:
            raise EntryNotFound("Entry not found")
        return _file(row)

    def changed_by(self, files: Iterable[File]) -> dict[int, Commit]:
        """The commits that put these files where they are."""
        wanted = json.dumps(sorted({file.changed_id for file in files}))
        with self.reading() as db:
            rows = db.execute(
                "SELECT * FROM commits WHERE id IN (SELECT value FROM json_each(?))", (wanted,)
            ).fetchall()
        return {row["id"]: _commit(row) for row in rows}

    # --- content ---

    def blob(self, sha256: str) -> Path:
        """Where content of this sha256 is, or would be."""
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise Refused("not a sha256", saw=sha256[:80], expected="64 hexadecimal digits")
        return self.root / "blobs" / sha256[:2] / sha256

    def stored(self, sha256: str) -> int | None:
        """The size of stored content; None if there is none."""
        try:
            status = self.blob(sha256).lstat()
        except FileNotFoundError:
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def claim(self, contents: Iterable[str]) -> dict[str, int | None]:
        """The sizes of stored contents, which `collect` then leaves for another `GRACE_S`."""
        sizes = {}
        with self.writing():  # `collect` is not between our look and our touch
            for sha256 in contents:
                sizes[sha256] = self.stored(sha256)
                if sizes[sha256] is not None:
                    os.utime(self.blob(sha256))
        return sizes

    def put(self, path: str, content: bytes) -> File:
        """Store the content of a regular file, to be committed at `path`."""
        sha256 = hashlib.sha256(content).hexdigest()
        if self.claim([sha256])[sha256] is None:
            with atomic_file(self.blob(sha256)) as temporary:
                temporary.write_bytes(content)
        return File(path, git_oid("blob", content), len(content), sha256, lfs=False)

    def receive(self, sha256: str, size: int, chunks: Iterable[bytes]) -> None:
        """Store content as it arrives. Refused, and nothing kept, unless size and sha256 are right."""
        digest, left = hashlib.sha256(), size
        with atomic_file(self.blob(sha256)) as temporary:
            with temporary.open("xb") as file:
                for chunk in chunks:
                    left -= len(chunk)
                    if left < 0:
                        raise Refused("more content than was announced", expected=f"{size} bytes")
                    digest.update(chunk)
                    file.write(chunk)
            if left:
                raise Refused(
                    "less content than was announced", saw=f"{size - left} bytes", expected=f"{size}"
                )
            if digest.hexdigest() != sha256:
                raise Refused("content of another sha256", saw=digest.hexdigest(), expected=sha256)

    def collect(self, older_than_s: float = GRACE_S) -> tuple[int, int]:
        """Remove commits that no branch or tag leads to, then files of no commit; how many files, and bytes.

        What was uploaded or claimed in the last `older_than_s` seconds stays, as its commit may be on its
        way; a commit whose file has gone all the same is refused, so nothing ever names a missing file.
        """
        with self.writing() as db:
            db.execute(
                "WITH RECURSIVE kept (id) AS (SELECT commit_id FROM refs UNION SELECT c.parent_id "
                "FROM commits c JOIN kept ON c.id = kept.id WHERE c.parent_id IS NOT NULL) "
                "DELETE FROM commits WHERE id NOT IN (SELECT id FROM kept)"
            )
        removed = freed = 0
        for path in (self.root / "blobs").glob("*/*"):
            arriving = path.name.startswith(".")  # a file that is being written, or was when its process died
            oldest = time.time() - (max(older_than_s, GRACE_S) if arriving else older_than_s)
            with contextlib.suppress(FileNotFoundError):
                if path.lstat().st_mtime > oldest:
                    continue
                with self.writing() as db:
                    named = db.execute("SELECT 1 FROM files WHERE sha256 = ?", (path.name,)).fetchone()
                    status = path.lstat()
                    if named is None and status.st_mtime <= oldest:
                        path.unlink()
                        removed, freed = removed + 1, freed + status.st_size
        return removed, freed


# --- what a commit is, apart from any disk ---


def git_oid(kind: str, content: bytes) -> str:
    """git's number of an object: sha1 of its kind, its length and itself."""
    return hashlib.sha1(b"%s %d\0%s" % (kind.encode(), len(content), content)).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    """What git keeps in the place of a large file. Source: git-lfs, docs/spec.md."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def lfs_file(path: str, sha256: str, size: int) -> File:
    return File(path, git_oid("blob", lfs_pointer(sha256, size)), size, sha256, lfs=True)


def folders(files: Iterable[File]) -> dict[str, str]:
    """Every folder of a tree, "" for all of it, and git's number of it."""
    entries: dict[str, list[tuple[bytes, bytes]]] = defaultdict(list)  # folder -> (sort key, line)
    entries[""] = []
    for file in files:
        folder, _, name = file.path.rpartition("/")
        entries[folder].append((name.encode(), b"100644 %s\0%s" % (name.encode(), bytes.fromhex(file.oid))))
        while folder:
            folder = folder.rpartition("/")[0]
            entries[folder]  # it exists, if only for the folder in it
    found = {}
    for folder in sorted(entries, key=lambda f: f.count("/") + bool(f), reverse=True):
        found[folder] = git_oid("tree", b"".join(line for _, line in sorted(entries[folder])))
        if folder:
            outer, _, name = folder.rpartition("/")
            line = b"40000 %s\0%s" % (name.encode(), bytes.fromhex(found[folder]))
            entries[outer].append((name.encode() + b"/", line))  # git sorts a folder as if it ended so
    return found


def apply(files: Mapping[str, File], changes: Iterable[File | Removal]) -> dict[str, File]:
    """The files after the changes, in order; those put anew have no `changed_id`.

    EntryNotFound if what is to be removed is not there; Refused if a path cannot be, beside the others.
    """
    after = dict(files)
    for change in changes:
        if isinstance(change, File):
            check_path(change.path)
            if after.get(change.path) != change:
                after[change.path] = change
            continue
        path = change.path.strip("/")
        gone = (
            [one for one in after if one.startswith(path + "/")]
            if change.folder
            else [path] * (path in after)
        )
        if not gone:
            kind = "folder" if change.folder else "file"
            raise EntryNotFound(f"A file with this name doesn't exist: no {kind} {path}")
        for one in gone:
            del after[one]
    if len(after) > MAX_FILES:
        raise Refused("too many files for one repository", saw=str(len(after)), expected=str(MAX_FILES))
    for path in after:
        folder = path.rpartition("/")[0]
        while folder:
            if folder in after:
                raise Refused(f"{folder} cannot be a file and a folder")
            folder = folder.rpartition("/")[0]
    return {path: after[path] for path in sorted(after)}


def check_name(name: str) -> None:
    """Refused unless the Hub's clients accept `name` (namespace/name) as a repository's."""
    part = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
    namespace = name.partition("/")[0]
    if (
        not re.fullmatch(f"{part}/{part}", name)
        or len(name) > 96
        or "--" in name
        or ".." in name
        or name.endswith(".git")
        or namespace in ("api", "lfs", *KINDS)
    ):
        raise Refused(
            "not a repository's name",
            saw=repr(name[:100]),
            expected="namespace/name of letters, digits, '-', '_' and '.', at most 96",
        )


def check_ref(name: str) -> None:
    """Refused unless `name` can be a branch or a tag and is no commit's number."""
    if (
        not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+/-]{0,199}", name)
        or re.search(r"\.\.|//|/\.|\.(lock)?(/|$)|/$", name)
        or re.fullmatch(r"[0-9a-fA-F]{40}", name)
        or name.startswith("refs/")
    ):
        raise Refused("not a name for a branch or tag", saw=repr(name[:100]), expected="such as v1.0")


def check_path(path: str) -> None:
    """Refused unless `path` is relative, stays below its root and can be written by every client."""
    parts = path.split("/")
    encoded = path.encode(errors="replace")
    if (
        len(encoded) > 1024
        or any(
            part in ("", ".", "..") or part.lower() == ".git" or len(part.encode()) > 255 for part in parts
        )
        or re.search(r"[\x00-\x1f\x7f\\]", path)
    ):
        raise Refused("not a path of a file in a repository", saw=repr(path[:100]))


# --- rows ---


def _add_commit(
    db: sqlite3.Connection,
    repo: Repo,
    parent: Commit | None,
    files: Mapping[str, File],
    title: str,
    message: str,
    author: str,
    described: tuple[dict[str, Any], list[str]],
) -> Commit:
    seconds = int(time.time())
    while True:  # the same change twice in one second still makes two commits
        person = f"{author} <{author}@zoo> {seconds} +0000"
        lines = [f"tree {folders(files.values())['']}", *([f"parent {parent.oid}"] if parent else [])]
        text = "\n".join([*lines, f"author {person}", f"committer {person}", "", title, "", message])
        oid = git_oid("commit", text.encode())
        taken = db.execute("SELECT 1 FROM commits WHERE repo_id = ? AND oid = ?", (repo.id, oid)).fetchone()
        if taken is None:
            break
        seconds += 1
    card, tags = map(json.dumps, described)
    row = db.execute(
        "INSERT INTO commits (repo_id, parent_id, oid, title, message, author, created, card, tags) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING *",
        (repo.id, parent and parent.id, oid, title, message, author, _now(), card, tags),
    ).fetchone()
    db.executemany(
        "INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            (row["id"], f.path, f.oid, f.size, f.sha256, f.lfs, f.changed_id or row["id"])
            for f in files.values()
        ),
    )
    return _commit(row)


def _resolve(db: sqlite3.Connection, repo: Repo, revision: str) -> Commit:
    for kind, prefix in (("branch", "refs/heads/"), ("tag", "refs/tags/")):
        row = db.execute(
            "SELECT c.* FROM refs JOIN commits c ON c.id = commit_id "
            "WHERE refs.repo_id = ? AND refs.kind = ? AND refs.name = ?",
            (repo.id, kind, revision.removeprefix(prefix)),
        ).fetchone()
        if row is not None:
            return _commit(row)
    row = db.execute(
        "SELECT * FROM commits WHERE repo_id = ? AND oid = ?", (repo.id, revision.lower())
    ).fetchone()
    if row is None:
        raise RevisionNotFound(f"Invalid rev id: {revision[:100]}")
    return _commit(row)


def _files(db: sqlite3.Connection, commit_id: int) -> dict[str, File]:
    rows = db.execute(
        "SELECT path, oid, size, sha256, lfs, changed_id FROM files WHERE commit_id = ? ORDER BY path",
        (commit_id,),
    )
    return {row["path"]: _file(row) for row in rows}


def _file(row: sqlite3.Row) -> File:
    return File(row["path"], row["oid"], row["size"], row["sha256"], bool(row["lfs"]), row["changed_id"])


def _repo(row: sqlite3.Row) -> Repo:
    return Repo(row["id"], row["kind"], row["name"], bool(row["private"]), row["gated"], row["created"])


def _commit(row: sqlite3.Row) -> Commit:
    texts = (row["oid"], row["title"], row["message"], row["author"], row["created"])
    return Commit(row["id"], *texts, card=json.loads(row["card"]), tags=json.loads(row["tags"]))


def _now() -> str:
    """The moment as the Hub spells it: 2026-01-31T12:00:00.000Z."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@contextmanager
def _told(root: Path) -> Iterator[None]:
    """Turn the database's errors into a StoreError that says what to do. IntegrityError is the caller's."""
    try:
        yield
    except sqlite3.IntegrityError:
        raise
    except sqlite3.Error as error:
        raise StoreError(
            f"the store {root} does not answer",
            saw=str(error),
            try_="see that its disk has room and that you may write there; no commit is lost",
        ) from error
