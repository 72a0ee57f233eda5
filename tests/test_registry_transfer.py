"""Entries move between registries without loss: export, import, merge; SQLite and PostgreSQL, both ways."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.example import entry
from tests.many import many
from tests.postgres import database
from zoo.entry import Entry, Publication
from zoo.errors import FormatError
from zoo.registry import Registry, open_registry
from zoo.registry.transfer import Conflict, Transferred, bring_in, export, read

ROOT = Path(__file__).parents[1]
HERE, THERE = (
    Publication(
        endpoint="https://h",
        repository=f"{who}/one",
        commit=40 * "0",
        tag="t",
        published="2026-01-01T00:00:00Z",
    )
    for who in ("me", "you")
)


def lines(*entries: Entry, fresh: Path, folder: Path) -> list[bytes]:
    return [line.encode() for line in export(filled(folder / "from.db", fresh, *entries))]


def filled(path: Path, fresh: Path, *entries: Entry) -> Registry:
    shutil.copy(fresh, path)
    registry = open_registry(str(path))
    registry.put_all(entries)
    return registry


def counts(**changes: int) -> Transferred:
    return Transferred.model_validate(dict.fromkeys(Transferred.model_fields, 0) | changes)


def test_there_and_back_again(tmp_path: Path, fresh: Path) -> None:
    """SQLite to PostgreSQL to SQLite: the same entries, and the same bytes."""
    entries = sorted([*many(60), entry("whole")], key=lambda e: e.id)
    first = filled(tmp_path / "a.db", fresh, *entries)
    second = open_registry(database())
    third = filled(tmp_path / "c.db", fresh)
    said = list(export(first))
    assert bring_in(read((x.encode() for x in said), "x"), second, None) == counts(added=61)
    assert bring_in(second.every(), third, None) == counts(added=61)
    assert list(second.every()) == list(third.every()) == entries
    assert list(export(third)) == said
    assert bring_in(first.every(), third, None) == counts(same=61)
    assert {s.id for s in third.entries(text="whole", include_failed=True)} == {"whole"}
    second.engine.dispose()


def test_what_differs_is_refused_or_chosen(tmp_path: Path, fresh: Path) -> None:
    old = entry("one", created="2026-01-01T00:00:00+00:00", sparsity=0.5)
    new = old.model_copy(update={"created": "2026-02-01T00:00:00+00:00", "sparsity": 0.6})
    registry = filled(tmp_path / "r.db", fresh, old)
    with pytest.raises(Conflict, match="one is in both, and differs"):
        bring_in([entry("another"), new], registry, None)
    assert [e.id for e in registry.every()] == ["one"]  # all or none
    assert bring_in([new], registry, "ours") == counts(kept=1)
    assert registry.get("one") == old
    assert bring_in([new], registry, "newer") == counts(replaced=1)
    assert bring_in([old], registry, "newer") == counts(kept=1)
    assert registry.get("one") == new
    assert bring_in([old], registry, "theirs") == counts(replaced=1)
    assert registry.get("one") == old


def test_published_here_and_there(tmp_path: Path, fresh: Path) -> None:
    verified = entry("one", status="verified", publications=[])
    mine = verified.model_copy(update={"status": "published", "publications": [HERE]})
    yours = verified.model_copy(update={"status": "published", "publications": [THERE]})
    registry = filled(tmp_path / "r.db", fresh, mine)
    assert bring_in([verified], registry, None) == counts(same=1)
    assert bring_in([yours], registry, None) == counts(replaced=1)
    assert registry.get("one") == mine.model_copy(update={"publications": [HERE, THERE]})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda x: x[:-1], "is not whole"),
        (lambda x: x[:2] + x[3:], "was changed"),
        (lambda x: [x[0], x[1].replace(b"llama", b"lllama", 1), *x[2:]], "is not an entry|was changed"),
        (lambda x: [*x[:1], x[1][: len(x[1]) // 2] + b"\n", *x[2:]], "line 2 is not JSON"),
        (lambda x: x[1:], "is not an export"),
        (lambda x: [b'{"sparse-zoo":"registry","format":99}\n', *x[1:]], "newer zoo"),
        (lambda x: [*x, x[1]], "more after the end"),
        (lambda x: [x[0], b"[1]\n"], "is not an object"),
        (lambda x: [x[0], b"[" * 100_000 + b"\n"], "is not JSON"),
        (lambda x: [], "is not whole"),
    ],
)
def test_a_damaged_export_changes_nothing(tmp_path: Path, fresh: Path, damage: object, words: str) -> None:
    sound = lines(entry("one"), entry("two"), fresh=fresh, folder=tmp_path)
    registry = filled(tmp_path / "r.db", fresh, entry("kept"))
    with pytest.raises(FormatError, match=words):
        bring_in(read(damage(sound), "x"), registry, None)  # type: ignore[operator]
    assert [e.id for e in registry.every()] == ["kept"]


def zoo(*arguments: str | Path, given: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "zoo.cli", "registry", *arguments],
        cwd=ROOT, input=given, capture_output=True, check=False,
    )  # fmt: skip


def test_the_commands(tmp_path: Path, fresh: Path) -> None:
    filled(tmp_path / "a.db", fresh, entry("one"), entry("two"))
    filled(tmp_path / "b.db", fresh, entry("two"), entry("three"))
    printed = zoo("export", "--registry", tmp_path / "a.db")
    assert zoo("export", "--registry", tmp_path / "a.db", "-o", tmp_path / "a.jsonl").returncode == 0
    assert (tmp_path / "a.jsonl").read_bytes() == printed.stdout
    done = zoo("import", "-", "--registry", tmp_path / "b.db", "--json", given=printed.stdout)
    assert json.loads(done.stdout) == counts(added=1, same=1).model_dump()
    done = zoo("merge", tmp_path / "b.db", "--registry", tmp_path / "a.db")
    assert done.stdout == b"1 added, 0 replaced, 0 kept, 2 the same\n"
    assert (
        zoo("export", "--registry", tmp_path / "a.db").stdout
        == zoo("export", "--registry", tmp_path / "b.db").stdout
    )
    for arguments in (
        ["import", tmp_path / "none"],
        ["import", ROOT / "README.md"],
        ["merge", tmp_path / "none"],
    ):
        refused = zoo(*arguments, "--registry", tmp_path / "a.db")
        assert refused.returncode == 1 and refused.stderr.startswith(b"zoo: "), refused.stderr
        assert b"Traceback" not in refused.stderr


def test_an_import_that_is_killed_leaves_nothing(tmp_path: Path, fresh: Path) -> None:
    """kill -9 in the middle of 400 entries."""
    shutil.copy(fresh, tmp_path / "r.db")
    read_end, write_end = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "zoo.cli", "registry", "import", "-", "--registry", tmp_path / "r.db"],
        cwd=ROOT, stdin=read_end,
    )  # fmt: skip
    os.close(read_end)
    sound = list(export(filled(tmp_path / "from.db", fresh, *many(400))))
    with os.fdopen(write_end, "w") as pipe:
        pipe.writelines(sound[:-1])
        pipe.flush()
        time.sleep(1.0)
        process.kill()
        process.wait()
    assert list(open_registry(str(tmp_path / "r.db")).every()) == []
