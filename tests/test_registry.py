"""The registry: lossless, transactional, and at the head of its migrations."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import MetaData, inspect, make_url

from tests.example import MACHINE, entry
from tests.postgres import database
from zoo import entry as records
from zoo.entry import Entry, Machine, Record, Stage
from zoo.errors import RegistryError, UsageError
from zoo.files import sha256_json
from zoo.registry import Figures, Query, models, open_registry, registry
from zoo.registry.figures import figures
from zoo.registry.registry import HEAD, MIGRATIONS, Registry, Run

ROOT = Path(__file__).parents[1]


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database."""
    return database() if request.param == "postgresql" else str(tmp_path / "registry.db")


def url_of(opened: Registry) -> str:
    return opened.engine.url.render_as_string(hide_password=False)


def count(opened: Registry, table: str) -> int:
    with opened.engine.connect() as connection:
        return connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar_one()


def rows(path: Path, query: str) -> list[Any]:
    """What someone else's connection sees in the file."""
    connection = sqlite3.connect(path)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


# --- round trip ---


def test_an_entry_comes_back_as_it_was_put(opened: Registry) -> None:
    one = entry()
    opened.put(one)
    assert opened.get(one.id) == one
    assert opened.get(one.id).model_dump_json() == one.model_dump_json()


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
COUNT = st.integers(0, 2**60)  # so that the sum of a few still fits
HASH = st.text("0123456789abcdef", min_size=64, max_size=64)


def built(cls: type[Record], **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Any valid `cls`: its text, floats, counts and hashes at random, the rest by their types."""
    for name, field in cls.model_fields.items():
        wanted = str(field.annotation)
        if name in fields:
            continue
        if "str" in wanted and field.metadata:
            fields[name] = HASH
        elif field.annotation in (str, str | None):
            fields[name] = TEXT if field.annotation is str else st.none() | TEXT
        elif field.annotation in (float, float | None):
            fields[name] = FINITE if field.annotation is float else st.none() | FINITE
        elif field.annotation in (int, int | None):
            fields[name] = COUNT if field.annotation is int else st.none() | COUNT
    return st.builds(cls, **fields)


MACHINES = built(Machine, fingerprint=HASH).map(
    lambda m: m.model_copy(update={"fingerprint": sha256_json(m.model_dump(exclude={"fingerprint"}))})
)
ENTRIES = st.builds(
    Entry,
    id=st.from_regex(r"\A[a-z0-9]{1,8}(-[a-z0-9]{1,8}){0,3}\Z"),
    failure=st.none() | TEXT,
    base_model=TEXT,
    base_repository=st.none() | TEXT,
    base_revision=TEXT,
    base_sha256=st.none() | HASH,
    origin=st.none() | TEXT,
    license=st.none() | TEXT,
    recipe=TEXT,
    recipe_sha256=HASH,
    created=TEXT,
    parameters=COUNT,
    sparsity=FINITE,
    bits_per_weight=FINITE,
    compression_ratio=FINITE,
    versions=st.dictionaries(TEXT, TEXT, max_size=3),
    layers=st.lists(built(records.Layer), max_size=3),
    artifacts=st.lists(built(records.Artifact, sha256=HASH), max_size=3),
    measurements=st.lists(built(records.Measurement), max_size=3),
    benchmarks=st.lists(built(records.Benchmark, machine=MACHINES), max_size=2),
    verifications=st.lists(built(records.Verification), max_size=2),
    stages=st.lists(built(Stage), max_size=3),
    publications=st.lists(built(records.Publication, commit=HASH.map(lambda h: h[:40])), max_size=2),
    training=st.lists(
        built(records.TrainingPoint, terms=st.dictionaries(TEXT, FINITE, max_size=2)), max_size=3
    ),
    training_runs=st.lists(
        built(records.TrainingRun, versions=st.dictionaries(TEXT, TEXT, max_size=2)), max_size=3
    ),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(one=ENTRIES)
def test_any_entry_comes_back_as_it_was_put(opened: Registry, one: Entry) -> None:
    opened.put(one)
    assert opened.get(one.id) == one


@pytest.mark.parametrize(
    ("record", "row"),
    [
        (Entry, models.EntryRow),
        (Machine, models.MachineRow),
        (Run, models.RunRow),
        (Figures, models.IndexRow),
        *registry._PARTS.values(),
    ],
)
def test_every_field_has_a_column(record: type[Record], row: type[models.Base]) -> None:
    columns = {column.name.removesuffix("_fingerprint") for column in row.__table__.columns}
    assert set(registry._PARTS) < set(Entry.model_fields)
    lists = set(registry._PARTS) if record in (Entry, Run) else set()
    if record is Figures:  # beside copies of the entry's own fields
        assert set(record.model_fields) < columns
        return
    assert columns - {"entry_id", "position"} == set(record.model_fields) - lists - {"entry_id"}


def test_putting_again_replaces(opened: Registry) -> None:
    one = entry()
    opened.put(one)
    fewer = entry(layers=one.layers[:1], stages=[], status="published")
    opened.put(fewer)
    assert opened.get(one.id) == fewer
    assert count(opened, "layers") == 1
    assert count(opened, "entry_index") == 1


def test_a_failed_put_changes_nothing(opened: Registry) -> None:
    one = entry()
    opened.put(one)
    impostor = one.benchmarks[0].model_copy(update={"machine": MACHINE.model_copy(update={"cpu": "another"})})
    with pytest.raises(RegistryError, match="fingerprint"):
        opened.put(entry(license="mit", benchmarks=[impostor]))
    assert opened.get(one.id) == one


@pytest.mark.parametrize("change", [{"parameters": 2**70}, {"license": "a\0b"}])
def test_what_a_database_cannot_hold_is_refused(opened: Registry, change: dict[str, Any]) -> None:
    """But for NUL in SQLite, which holds it."""
    one = entry(**change)
    if "license" in change and opened.engine.dialect.name == "sqlite":
        opened.put(one)
        assert opened.get(one.id) == one
        return
    with pytest.raises(RegistryError, match="cannot hold"):
        opened.put(one)
    assert opened.count() == 0


# --- queries ---


def test_failed_entries_are_not_offered(opened: Registry) -> None:
    opened.put(entry())
    opened.put(entry("broken", status="failed", failure="KL too high"))
    good = "smollm2-135m-instruct-pruned50-w4"
    assert [e.id for e in opened.entries()] == [good]
    assert {e.id for e in opened.entries(include_failed=True)} == {good, "broken"}
    assert [e.id for e in opened.entries(status="failed")] == ["broken"]
    assert opened.get("broken").failure == "KL too high"


def test_filters(opened: Registry) -> None:
    opened.put(entry("llama-a", created="2025-01-01T00:00:00Z"))
    opened.put(entry("mpt-b.1", family="mpt", base_model="hub:org/100%", base_repository=None))
    assert [e.id for e in opened.entries(family="mpt")] == ["mpt-b.1"]
    assert [e.id for e in opened.entries(text="LLAMA-")] == ["llama-a"]
    assert [e.id for e in opened.entries(text="100%")] == ["mpt-b.1"]
    assert [e.id for e in opened.entries(text="l%a")] == []  # no wildcard
    assert [e.id for e in opened.entries(base_model="HuggingFaceTB/SmolLM2-135M-Instruct")] == ["llama-a"]
    assert [e.id for e in opened.entries()] == ["mpt-b.1", "llama-a"]  # newest first
    assert opened.entries(family="mistral") == []


def test_unknown_id_names_the_nearest(opened: Registry) -> None:
    opened.put(entry())
    opened.put(entry("smollm2-broken", status="failed"))
    with pytest.raises(RegistryError) as caught:
        opened.get("smolm2-135m-instruct-pruned50-w4")
    assert caught.value.try_ == "smollm2-135m-instruct-pruned50-w4"


def test_runs(opened: Registry) -> None:
    opened.put(entry())
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    killed = opened.start_run("demo", "a" * 64, dead.pid, "here")
    elsewhere = opened.start_run("demo", "a" * 64, dead.pid, "there")
    run = opened.start_run("demo", "a" * 64, os.getpid(), "here")
    stages = [Stage(name=name, key="k", status="done", seconds=1.5) for name in ("source", "prune")]
    for stage in stages:
        opened.record_stage(run, stage)
    opened.finish_run(run, "done", entry().id)
    known = {r.id: r for r in opened.runs()}
    assert [r.id for r in opened.runs()] == [run, elsewhere, killed]
    assert known[run].stages == stages
    assert (known[run].status, known[run].entry_id) == ("done", entry().id)
    assert known[run].started <= known[run].finished  # type: ignore[operator]
    assert known[run].started.tzinfo is not None
    assert known[killed].status == "interrupted"
    assert known[elsewhere].status == "running"  # this host cannot know
    opened.put(entry())  # replacing an entry keeps the history of its runs
    assert next(r for r in opened.runs() if r.id == run).entry_id == entry().id
    with pytest.raises(RegistryError, match="no run 99"):
        opened.record_stage(99, stages[0])
    with pytest.raises(RegistryError, match="no entry 'ghost'"):
        opened.finish_run(run, "done", "ghost")


# --- the database ---


def test_foreign_keys_are_on(opened: Registry) -> None:
    with pytest.raises(Exception, match=r"(?i)foreign key"), opened.engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO stages (entry_id, position, name, key, status, seconds)"
            " VALUES ('x', 0, '', '', '', 0)"
        )


def test_wal_and_nothing_left_beside_the_file(in_sqlite: Registry, tmp_path: Path) -> None:
    in_sqlite.put(entry())
    assert [p.name for p in tmp_path.iterdir()] == ["registry.db"]
    assert rows(tmp_path / "registry.db", "PRAGMA journal_mode") == [("wal",)]


PUT_MANY = """
import sys
from tests.example import entry
from zoo.registry import open_registry
registry = open_registry(sys.argv[1])
for i in range(10):
    registry.put(entry(f"shared-{i}"))
    registry.put(entry(f"own-{sys.argv[2]}-{i}"))
"""


def test_processes_that_put_at_once(empty: str) -> None:
    """They also create the registry at once."""
    writers = [subprocess.Popen([sys.executable, "-c", PUT_MANY, empty, str(n)], cwd=ROOT) for n in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    opened = open_registry(empty, create=False)
    assert len(opened.entries()) == opened.count() == 10 + 3 * 10
    assert opened.get("shared-3") == entry("shared-3")
    if "://" not in empty:
        assert rows(Path(empty), "PRAGMA integrity_check") == [("ok",)]
        assert rows(Path(empty), "PRAGMA foreign_key_check") == []


# --- migrations ---


def schema_of(opened: Registry) -> dict[str, Any]:
    look = inspect(opened.engine)
    return {
        table: (
            sorted((c["name"], str(c["type"]), c["nullable"]) for c in look.get_columns(table)),
            sorted(str(index["name"]) for index in look.get_indexes(table)),
            sorted(str(key["name"]) for key in look.get_foreign_keys(table)),
        )
        for table in look.get_table_names()
    }


def differences(opened: Registry) -> list[Any]:
    """Between the migrations and the models, but for the indexes that only the migrations describe."""

    def in_both(described: Any, name: str | None, kind: str, *_: object) -> bool:
        if kind == "index":
            return bool(described.table.name != "entry_index")
        return kind != "table" or not str(name).startswith("entry_text")

    with opened.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"include_object": in_both})
        return list(compare_metadata(context, models.Base.metadata))


def test_models_match_the_migrations(opened: Registry) -> None:
    assert differences(opened) == []


def test_upgrade_and_downgrade_from_every_revision(opened: Registry) -> None:
    script = ScriptDirectory.from_config(registry._alembic())
    assert script.get_heads() == [HEAD]
    at_head = schema_of(opened)
    opened.put(entry())
    opened.put(entry("imported", base_sha256=None, origin="hub:org/name@1", recipe=""))
    for revision in script.walk_revisions():
        with opened.engine.execution_options(zoo_begin="migrate").begin() as connection:
            command.downgrade(registry._alembic(connection), revision.down_revision or "base")
        again = open_registry(url_of(opened))
        assert again.revision() == HEAD
        assert schema_of(again) == at_head
        # The first schema cannot hold an entry without a base; what is below that holds nothing.
        kept = {None: set(), "0001": {entry().id}}.get(revision.down_revision, {entry().id, "imported"})  # type: ignore[arg-type]
        assert {e.id for e in again.entries()} == kept
        again.engine.dispose()
    assert differences(opened) == []


def test_figures_of_files_do_not_become_the_entrys_own(opened: Registry) -> None:
    """In an older schema, which cannot say of which file a figure is."""
    own = entry().measurements
    packed = own[1].model_copy(update={"artifact": "packed.safetensors", "task": "another"})
    of_file = own[1].model_copy(update={"artifact": "gguf/model-Q4_0.gguf"})
    opened.put(entry(measurements=[of_file, *own, packed]))
    assert opened.get(entry().id).measurements == [of_file, *own, packed]
    with opened.engine.execution_options(zoo_begin="migrate").begin() as connection:
        command.downgrade(registry._alembic(connection), "0004")
    again = open_registry(url_of(opened))
    kept = packed.model_copy(update={"artifact": None})
    assert again.get(entry().id).measurements == [*own, kept]
    again.engine.dispose()


def test_figures_that_are_made_otherwise_now_are_made_anew(opened: Registry) -> None:
    one = entry()
    opened.put(one)
    with opened.engine.execution_options(zoo_begin="migrate").begin() as connection:
        command.downgrade(registry._alembic(connection), "0005")
        connection.exec_driver_sql(
            "INSERT INTO entry_index (key, entry_id, status, family, base, base_model, license, created,"
            " sparsity, bits_per_weight, size, method, pattern, text) VALUES"
            f" (7, '{one.id}', 'verified', 'llama', 'b', 'b', 'mit', '2025', 0.5, 4, 91726048, 'm', 'p', 't')"
        )
    again = open_registry(url_of(opened))
    (found,) = again.search(Query(text="smollm2", sort="accuracy")).entries
    assert found.figures == figures(one)
    again.engine.dispose()


def test_an_older_registry_is_upgraded_with_its_entries(empty: str) -> None:
    old = [
        entry(),
        entry("mpt-b.1", family="mpt", benchmarks=[], measurements=[]),
        entry("c", status="failed"),
    ]
    engine = registry._engine(make_url(empty if "://" in empty else f"sqlite:///{empty}"))
    with engine.execution_options(zoo_begin="migrate").begin() as connection:
        command.upgrade(registry._alembic(connection), "0001")
    tables = MetaData()
    tables.reflect(engine)
    with engine.begin() as connection:
        connection.execute(tables.tables["machines"].insert(), [MACHINE.model_dump()])
        for one in old:
            lists = set(registry._PARTS)
            values = one.model_dump(exclude={*lists, "origin"})
            connection.execute(tables.tables["entries"].insert(), [values])
            for name in lists & tables.tables.keys():
                parts = [registry._values(part) for part in getattr(one, name)]
                rows_ = [{"entry_id": one.id, "position": i, **part} for i, part in enumerate(parts)]
                columns = set(tables.tables[name].columns.keys())  # some fields came later
                rows_ = [{key: row[key] for key in row.keys() & columns} for row in rows_]
                if rows_:
                    connection.execute(tables.tables[name].insert(), rows_)
    engine.dispose()
    with pytest.raises(RegistryError, match="older zoo"):
        open_registry(empty, create=False)
    opened = open_registry(empty)
    assert [opened.get(one.id) for one in old] == old
    assert opened.count() == 3
    assert {e.id for e in opened.entries()} == {old[0].id, "mpt-b.1"}
    assert [
        e.id for e in opened.search(Query(text="Q4_0", min_size=269_060_552, max_size=269_060_552)).entries
    ]
    assert opened.search(Query(sort="speed")).entries[0].figures.speed == 71.25
    assert differences(opened) == []


def test_migrations_do_not_import_the_live_models() -> None:
    scripts = list((MIGRATIONS / "versions").glob("[0-9]*.py"))
    assert scripts
    for script in scripts:
        assert not re.search(r"^\s*(from|import) zoo", script.read_text(), re.MULTILINE), script


def test_the_committed_registry_is_at_head(tmp_path: Path) -> None:
    committed = ROOT / "registry.db"
    assert not committed.with_name("registry.db-wal").exists()
    before = committed.read_bytes()
    opened = open_registry(str(committed), create=False)
    assert opened.revision() == HEAD
    for summary in opened.entries(include_failed=True):
        assert opened.get(summary.id).status != "failed"
    assert differences(opened) == []
    assert committed.read_bytes() == before  # reading changes nothing


# --- refused, and nothing lost ---


def test_newer_schema_is_refused(in_sqlite: Registry, tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    with in_sqlite.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    before = path.read_bytes()
    with pytest.raises(RegistryError, match="newer zoo") as caught:
        open_registry(str(path))
    assert "9999" in str(caught.value)
    assert "git pull" in str(caught.value)
    assert path.read_bytes() == before


def test_absent_registry_is_not_made_by_reading(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="no registry") as caught:
        open_registry(str(tmp_path / "none.db"), create=False)
    assert "zoo registry migrate" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_reading_does_not_migrate(tmp_path: Path) -> None:
    (tmp_path / "empty.db").touch()
    with pytest.raises(RegistryError, match="no tables"):
        open_registry(str(tmp_path / "empty.db"), create=False)
    assert open_registry(str(tmp_path / "empty.db")).entries() == []


def test_corrupted_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    path.write_bytes(b"this is no database, " * 1000)
    with pytest.raises(RegistryError, match="not a registry, or it is damaged"):
        open_registry(str(path))
    assert path.read_bytes() == b"this is no database, " * 1000


def test_truncated_file_is_refused(in_sqlite: Registry, tmp_path: Path) -> None:
    in_sqlite.put(entry())
    path = tmp_path / "registry.db"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 3)
    with pytest.raises(RegistryError):
        open_registry(str(path)).get(entry().id)


def test_someone_elses_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE songs (title)")
    connection.close()
    with pytest.raises(RegistryError, match="not a registry") as caught:
        open_registry(str(path))
    assert "songs" in str(caught.value)
    assert rows(path, "SELECT name FROM sqlite_master") == [("songs",)]


def test_a_row_that_was_edited_by_hand_is_told(opened: Registry) -> None:
    opened.put(entry())
    with opened.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE entries SET family = 'gpt'")
    with pytest.raises(RegistryError, match="cannot read"):
        opened.get(entry().id)


@pytest.mark.parametrize("url", ["", "sqlite://", "nonsense://", "sqlite:///:memory:"])
def test_what_is_not_a_registry(url: str) -> None:
    with pytest.raises((UsageError, RegistryError)):
        open_registry(url)


def test_a_password_is_not_shown() -> None:
    with pytest.raises(RegistryError) as caught:
        open_registry("nosuchdb://user:hunter2@host/zoo")
    assert "hunter2" not in str(caught.value)


def test_a_path_with_odd_characters(tmp_path: Path) -> None:
    folder = tmp_path / "50% off?#é"
    open_registry(str(folder / "registry.db")).put(entry())
    assert (folder / "registry.db").exists()
    assert len(open_registry(str(folder / "registry.db"), create=False).entries()) == 1


READ_ONLY = """
import os, sys
from pathlib import Path
from zoo.errors import RegistryError
from zoo.registry import open_registry
path, action = Path(sys.argv[1]), sys.argv[2]
open_registry(str(path.with_name("registry.db"))).entries()  # imports all that it needs
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)  # the superuser may write anywhere
assert not os.access(path.parent, os.W_OK)
opened = open_registry(str(path))
if action == "read":
    print(len(opened.entries()))
else:
    try:
        opened.start_run("demo", "a" * 64, 1, "here")
    except RegistryError as error:
        print(error)
"""


def as_another(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A registry in a folder that an ordinary user can read and not write."""
    folder = Path(tempfile.mkdtemp())
    path = folder / "registry.db"
    open_registry(str(path)).put(entry())
    path.chmod(0o444)
    folder.chmod(0o555)
    yield path
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_a_read_only_registry_can_be_read(read_only: Path) -> None:
    done = as_another(READ_ONLY, str(read_only), "read")
    assert (done.stdout, done.returncode) == ("1\n", 0), done.stderr
    assert [p.name for p in read_only.parent.iterdir()] == ["registry.db"]


def test_a_read_only_registry_refuses_to_be_written(read_only: Path) -> None:
    done = as_another(READ_ONLY, str(read_only), "write")
    assert "cannot be written" in done.stdout, done.stderr
    assert "--registry" in done.stdout


def test_an_unwritable_place_is_refused(read_only: Path) -> None:
    new = read_only.with_name("new.db")
    done = as_another(READ_ONLY, str(new), "write")
    assert "cannot be written" in done.stderr + done.stdout
    with pytest.raises(RegistryError, match="cannot be written"):
        open_registry(str(read_only / "below-a-file" / "registry.db"))


def test_a_locked_registry_says_so(
    in_sqlite: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "BUSY_TIMEOUT_S", 0.1)
    holder = sqlite3.connect(tmp_path / "registry.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    try:
        with pytest.raises(RegistryError, match="locked by another process"):
            open_registry(str(tmp_path / "registry.db")).put(entry())
    finally:
        holder.close()
    open_registry(str(tmp_path / "registry.db")).put(entry())
