"""Every query on the registry, and opening it: created if absent, migrated if older, refused if newer."""

from __future__ import annotations

import difflib
import logging
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args
from urllib.parse import quote

import psutil
from pydantic import ValidationError
from sqlalchemy import (
    URL,
    Connection,
    Engine,
    NullPool,
    bindparam,
    create_engine,
    delete,
    event,
    func,
    insert,
    inspect,
    make_url,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    NoSuchModuleError,
    OperationalError,
)
from sqlalchemy.orm import Session, selectinload

from zoo import logs
from zoo.entry import (
    Artifact,
    Benchmark,
    Entry,
    Layer,
    Machine,
    Measurement,
    Publication,
    Record,
    Stage,
    Status,
    TrainingPoint,
    TrainingRun,
    Verification,
)
from zoo.errors import RegistryError, UsageError
from zoo.registry.figures import UNKNOWN, Figures, best_speeds, document, figures, task_count
from zoo.registry.leases import Lease, confirm
from zoo.registry.models import (
    ArtifactRow,
    BenchmarkRow,
    EntryRow,
    IndexRow,
    LayerRow,
    MachineRow,
    MeasurementRow,
    PublicationRow,
    RunRow,
    RunStageRow,
    SpeedRow,
    StageRow,
    TrainingRow,
    TrainingRunRow,
    VerificationRow,
)
from zoo.registry.query import (
    MOST_COUNTED,
    MOST_WALKED,
    Facets,
    Query,
    all_sorted,
    combinations,
    count,
    counted,
    in_order,
    is_broad,
    matching,
)

HEAD = "0007"  # the newest revision in migrations/versions; named here so that reading needs no Alembic
MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_TIMEOUT_S = 30.0
_TRIES = 10  # of a put that meets others: each may insert one row first, a machine or the entry
_MIGRATION_LOCK = 0x5A6F6F  # any number, the same for all

RunStatus = Literal["running", "done", "failed", "interrupted"]
R = TypeVar("R", bound=Record)
V = TypeVar("V")

# The lists of an entry, each a table of its own.
_PARTS: Mapping[str, tuple[type[Record], Any]] = {
    "layers": (Layer, LayerRow),
    "artifacts": (Artifact, ArtifactRow),
    "measurements": (Measurement, MeasurementRow),
    "benchmarks": (Benchmark, BenchmarkRow),
    "verifications": (Verification, VerificationRow),
    "stages": (Stage, StageRow),
    "publications": (Publication, PublicationRow),
    "training": (TrainingPoint, TrainingRow),
    "training_runs": (TrainingRun, TrainingRunRow),
}
# The records of one row.
_SINGLE: Mapping[str, type[Record]] = {"machine": Machine, "figures": Figures}
_BATCH = 500  # entries read at once, where a search gives all


class Summary(Record):
    """What a list of entries shows: an `Entry` without its recipe, versions, layers, checks and stages,
    and its `figures`."""

    id: str
    status: Status
    failure: str | None
    family: str
    base_model: str
    base_repository: str | None
    origin: str | None
    license: str | None
    created: str
    parameters: int
    sparsity: float
    bits_per_weight: float
    compression_ratio: float
    artifacts: list[Artifact]
    measurements: list[Measurement]
    benchmarks: list[Benchmark]
    figures: Figures


class Page(Record):
    """What a search found: how many entries, and those of the page that was asked for."""

    total: int  # at most MOST_COUNTED are counted
    more: bool  # there are more than `total`
    entries: list[Summary]


class Run(Record):
    """One call of `zoo run`. `interrupted`: stopped by a signal, or its process ended without a word."""

    id: int
    recipe_name: str
    recipe_sha256: str
    pid: int
    host: str
    status: RunStatus
    started: datetime
    finished: datetime | None
    entry_id: str | None
    failure: str | None
    stages: list[Stage]


def open_registry(url: str, *, create: bool = True) -> Registry:
    """The registry at a SQLAlchemy URL or a plain path of an SQLite file.

    With `create` it is created when absent and migrated when older. Without, it is left exactly as it is:
    absent or older is an error. A registry that cannot be written is opened for reading.
    Raises RegistryError: absent, older, newer, not writable, not a registry; UsageError: not a URL.
    """
    target = _parse(url)
    for password in (target.password, *target.normalized_query.get("password", ())):
        logs.hide(password)  # which a driver's message may quote
    name = logs.redact(target.render_as_string(hide_password=True))
    if target.get_backend_name() == "sqlite":
        path = Path(target.database or "")
        name = str(path)
        if not path.exists():
            if not create:
                raise RegistryError(
                    f"there is no registry at {path}",
                    try_="`zoo registry migrate` makes one, `zoo run RECIPE` fills it; --registry or "
                    "ZOO_REGISTRY name another",
                )
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise _unwritable(name, str(error)) from error
        target = _sqlite_url(path)
    try:
        engine = _engine(target)
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise RegistryError(
            f"no driver for the registry {name}", saw=str(error), try_="pip install its driver, e.g. psycopg"
        ) from error
    registry = Registry(engine, name)
    revision = registry.revision()
    if revision == HEAD:
        return registry
    if revision is not None and revision not in _known_revisions():
        raise RegistryError(
            f"the registry {name} was written by a newer zoo",
            saw=f"schema revision {revision}",
            expected=f"at most {HEAD}",
            try_="git pull and pip install . in a checkout",
        )
    if not create:
        raise RegistryError(
            f"the registry {name} has {'no tables' if revision is None else 'the tables of an older zoo'}",
            saw=f"schema revision {revision}",
            expected=HEAD,
            try_="zoo registry migrate",
        )
    registry.migrate()
    return registry


class Registry:
    """An open registry; every method is one transaction. Made by `open_registry`."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self.name = name  # for messages: a path, or a URL without its password
        self.fence: Lease | None = None  # without it, nothing is written any more
        self._database = engine.dialect.name

    @property
    def url(self) -> str:
        """What `open_registry` opens it by, its password included."""
        if self._database == "sqlite":
            return str(Path(self.name).absolute())
        return self.engine.url.render_as_string(hide_password=False)

    def revision(self) -> str | None:
        """The schema revision; None for an empty database. RegistryError if it is someone else's."""
        with _told_plainly(self.name), self.engine.connect() as connection:
            tables = inspect(connection).get_table_names()
            if "alembic_version" in tables:
                revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
                return revision
            if tables:
                raise RegistryError(
                    f"{self.name} is a database, but not a registry",
                    saw=f"tables {', '.join(sorted(tables)[:5])}",
                    try_="name another with --registry or ZOO_REGISTRY",
                )
            return None

    def migrate(self) -> None:
        """Bring the tables to `HEAD`, in one transaction."""
        from alembic import command

        with _told_plainly(self.name):
            if self._database == "sqlite":
                _use_wal(self.engine)
            with self.engine.execution_options(zoo_begin="migrate").begin() as connection:
                if self._database == "postgresql":  # others wait here, then find it done
                    connection.execute(select(func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
                command.upgrade(_alembic(connection), "head")
                with Session(connection) as session:
                    self._fill_index(session)
                    session.flush()
                if self._database == "sqlite":
                    broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
                    if broken:
                        raise RegistryError(
                            f"the registry {self.name} refers to rows that it does not have; left as it was",
                            saw=f"{len(broken)}, the first in {broken[0][0]}",
                        )

    def _fill_index(self, session: Session) -> None:
        """Index the entries that a migration left without: their figures are new, or made otherwise."""
        missing = select(EntryRow.id).outerjoin(IndexRow, IndexRow.entry_id == EntryRow.id)
        for ids in batched(session.scalars(missing.where(IndexRow.key.is_(None))).all(), _BATCH):
            rows = session.scalars(_with_parts(Entry).where(EntryRow.id.in_(ids)))
            add_to_index(session, [self._read(Entry, row) for row in rows])
            session.expunge_all()

    def put(self, entry: Entry) -> None:
        """Insert the entry, or replace the one with its id."""
        for attempt in range(_TRIES):
            try:
                with self._writing() as session:
                    _put(session, entry)
                return
            except IntegrityError as error:  # someone else inserted it, or its machine, just now
                if attempt == _TRIES - 1:
                    raise RegistryError(f"cannot record {entry.id}", saw=str(error.orig)) from error

    def put_all(self, entries: Iterable[Entry]) -> None:
        """`put` each, all or none of them."""
        try:
            with self._writing() as session:
                for entry in entries:
                    _put(session, entry)
                    session.expunge_all()
        except IntegrityError as error:
            raise RegistryError(
                "someone else recorded one of these entries meanwhile",
                saw=str(error.orig).splitlines()[0],
                try_="the same again; nothing of it was recorded",
            ) from error

    def every(self) -> Iterator[Entry]:
        """All entries in full, by their ids. What others put meanwhile may or may not be among them."""
        last = ""
        while True:
            following = _with_parts(Entry).where(EntryRow.id > last).order_by(EntryRow.id).limit(_BATCH)
            with self.reading() as session:
                entries = [self._read(Entry, row) for row in session.scalars(following)]
            if not entries:
                return
            yield from entries
            last = entries[-1].id

    def get(self, entry_id: str) -> Entry:
        """The entry, failed or not. RegistryError naming the nearest ids if there is none."""
        found = self.find(entry_id)
        if found is not None:
            return found
        with self.reading() as session:
            offered = session.scalars(select(EntryRow.id).where(EntryRow.status != "failed")).all()
        near = difflib.get_close_matches(entry_id, offered, n=3, cutoff=0.5)
        near += [i for i in offered if entry_id and entry_id in i and i not in near][: 3 - len(near)]
        raise RegistryError(
            f"no entry {entry_id!r} in the registry {self.name}",
            expected=f"one of its {len(offered)} entries, as `zoo list` shows them",
            try_=", or ".join(near) if near else "zoo list",
        )

    def entries(
        self,
        *,
        family: str | None = None,
        base_model: str | None = None,
        status: Status | None = None,
        text: str | None = None,
        include_failed: bool = False,
    ) -> list[Summary]:
        """All the entries, newest first; `text` and the rest as in a `Query`.

        Failed entries are not offered: only `include_failed` or `status="failed"` shows them.
        """
        every: tuple[Status, ...] = get_args(Status) if include_failed else ()
        query = Query(
            text=text,
            families=() if family is None else (family,),
            bases=() if base_model is None else (base_model,),
            statuses=every if status is None else (status,),
            limit=None,
        )
        return self.search(query).entries

    def search(self, query: Query) -> Page:
        """The page of entries that a query asks for, and how many it finds in all.

        With `query.machine`, the speed in an entry's figures is that on this machine.
        """
        machines = self._fingerprints(query)
        with _told_plainly(self.name), self.engine.connect() as connection:
            total, speeds = _found(connection, query, machines)
            return Page(
                total=min(total, MOST_COUNTED),
                more=total > MOST_COUNTED,
                entries=self._summaries(connection, speeds),
            )

    def facets(self) -> Facets:
        """What there is to choose from, and how many entries each choice would find."""
        with self.reading() as session:
            return counted(session.execute(combinations()).tuples())

    def find(self, entry_id: str) -> Entry | None:
        """As `get`, but None if there is none."""
        with self.reading() as session:
            row = session.scalar(_with_parts(Entry).where(EntryRow.id == entry_id))
            return None if row is None else self._read(Entry, row)

    def known(self, ids: Iterable[str]) -> set[str]:
        """Which of these ids are in the registry."""
        with self.reading() as session:
            batches = batched(ids, _BATCH)
            return {
                i
                for some in batches
                for i in session.scalars(select(EntryRow.id).where(EntryRow.id.in_(some)))
            }

    def machines(self, name: str | None = None) -> list[Machine]:
        """The machines that speed was measured on; those that a query's `machine` means, if it is given."""
        query = select(MachineRow).order_by(MachineRow.cpu, MachineRow.fingerprint)
        if name is not None:
            query = query.where(
                or_(
                    MachineRow.fingerprint.startswith(name, autoescape=True),
                    MachineRow.cpu.icontains(name, autoescape=True),
                )
            )
        with self.reading() as session:
            return [Machine.model_validate(_fields(Machine, row)) for row in session.scalars(query)]

    def count(self) -> int:
        """How many entries there are, failed ones included."""
        with self.reading() as session:
            return session.scalar(select(func.count(IndexRow.key))) or 0

    def _fingerprints(self, query: Query) -> list[str] | None:
        if query.machine is None:
            return None
        return [machine.fingerprint for machine in self.machines(query.machine)]

    def _summaries(self, connection: Connection, speeds: Mapping[str, float | None]) -> list[Summary]:
        """The entries of these ids, in their order, with these speeds."""
        found = []
        for ids in batched(speeds, _BATCH):
            rows = _rows_of_summaries(connection, ids)
            for entry_id in ids:
                values = rows[entry_id]
                values["figures"]["speed"] = speeds[entry_id]
                found.append(self._valid(Summary, values, entry_id))
        return found

    def start_run(self, recipe_name: str, recipe_sha256: str, pid: int, host: str) -> int:
        """Record that a run began and return its id. Runs of this host whose process is gone are closed."""
        with self._writing() as session:
            for run in _dead_runs(session, host, pid):
                run.status = "interrupted"
                run.finished = datetime.now(UTC)
            row = RunRow(
                recipe_name=recipe_name,
                recipe_sha256=recipe_sha256,
                pid=pid,
                host=host,
                status="running",
                started=datetime.now(UTC),
            )
            session.add(row)
            session.flush()
            return row.id

    def dead_runs(self) -> list[tuple[int, str]]:
        """(id, recipe's name) of this host's runs that are recorded as running and whose process is gone."""
        with self.reading() as session:
            return [(run.id, run.recipe_name) for run in _dead_runs(session, socket.gethostname())]

    def close_dead_runs(self, pid: int | None = None) -> None:
        """Record those as interrupted, and those of process `pid`, which is about to end."""
        with self._writing() as session:
            for run in _dead_runs(session, socket.gethostname(), pid):
                run.status = "interrupted"
                run.finished = datetime.now(UTC)

    def record_stage(self, run_id: int, stage: Stage) -> None:
        with self._writing() as session:
            self._run(session, run_id)
            count = session.scalar(select(func.count()).where(RunStageRow.run_id == run_id))
            session.add(RunStageRow(run_id=run_id, position=count, **stage.model_dump()))

    def finish_run(
        self, run_id: int, status: RunStatus, entry_id: str | None = None, failure: str | None = None
    ) -> None:
        """Record how a run ended; `entry_id` is an entry that was put before."""
        with self._writing() as session:
            self._run(session, run_id)
            if entry_id is not None and session.get(EntryRow, entry_id) is None:
                raise RegistryError(f"no entry {entry_id!r} in the registry {self.name}")
            ended = {"status": status, "entry_id": entry_id, "failure": failure}
            session.execute(
                update(RunRow).where(RunRow.id == run_id).values(finished=datetime.now(UTC), **ended)
            )

    def runs(self) -> list[Run]:
        """Every run, newest first."""
        query = select(RunRow).options(selectinload(RunRow.stages)).order_by(RunRow.id.desc())
        with self.reading() as session:
            return [self._read(Run, row) for row in session.scalars(query)]

    def _run(self, session: Session, run_id: int) -> RunRow:
        row = session.get(RunRow, run_id)
        if row is None:
            raise RegistryError(f"no run {run_id} in the registry {self.name}")
        return row

    def _read(self, cls: type[R], row: Any) -> R:
        return self._valid(cls, _fields(cls, row), row.id)

    def _valid(self, cls: type[R], values: Mapping[str, Any], record_id: object) -> R:
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            name = f"{cls.__name__} {record_id}"
            raise RegistryError(
                f"the registry {self.name} holds a record that this zoo cannot read: {name}",
                saw=str(error.errors()[0]["msg"]),
                try_="restore registry.db from version control, or put the entry again with `zoo run`",
            ) from error

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session that reads, for the modules beside this one; the database's errors told plainly."""
        with _told_plainly(self.name), Session(self.engine) as session:
            yield session

    @contextmanager
    def _writing(self) -> Iterator[Session]:
        with self.transaction() as session:
            if self.fence is not None:
                confirm(session, self.fence)
            yield session

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """A transaction that writes, for the modules beside this one; the database's errors told plainly."""
        engine = self.engine.execution_options(zoo_begin="write")
        with _told_plainly(self.name), Session(engine) as session, session.begin():
            yield session


def _dead_runs(session: Session, host: str, pid: int | None = None) -> list[RunRow]:
    """Runs of a host that never ended; those of process `pid`, which begins a new one, among them."""
    running = select(RunRow).where(RunRow.status == "running", RunRow.host == host)
    return [r for r in session.scalars(running) if r.pid == pid or not psutil.pid_exists(r.pid)]


def _put(session: Session, entry: Entry) -> None:
    session.get(EntryRow, entry.id, with_for_update=True)  # others that replace it wait here
    for benchmark in entry.benchmarks:
        machine = benchmark.machine
        known = session.get(MachineRow, machine.fingerprint)
        if known is None:
            session.add(MachineRow(**machine.model_dump()))
            session.flush()
        elif Machine.model_validate(_fields(Machine, known)) != machine:
            raise RegistryError(
                f"{entry.id} was measured on a machine whose fingerprint the registry has for another",
                saw=f"{machine.cpu}, fingerprint {machine.fingerprint[:12]}",
                expected=known.cpu,
            )
    session.merge(EntryRow(**entry.model_dump(exclude=set(_PARTS))))
    session.flush()
    for name, (_, row) in _PARTS.items():
        session.execute(delete(row).where(row.entry_id == entry.id))
        records = [
            {"entry_id": entry.id, "position": position, **_values(record)}
            for position, record in enumerate(getattr(entry, name))
        ]
        if records:
            session.execute(insert(row), records)
    session.execute(delete(IndexRow).where(IndexRow.entry_id == entry.id))
    add_to_index(session, [entry])


def add_to_index(session: Session | Connection, entries: Sequence[Entry]) -> None:
    """Make entries, their parts being there, findable; none of them is in the index yet."""
    session.execute(insert(IndexRow), [index_values(entry) for entry in entries])
    ids = [entry.id for entry in entries]
    rows = session.execute(select(IndexRow.entry_id, IndexRow.key).where(IndexRow.entry_id.in_(ids)))
    keys = dict(rows.tuples().all())
    speeds = [
        {"key": keys[entry.id], "machine_fingerprint": machine, "speed": speed}
        for entry in entries
        for machine, speed in best_speeds(entry).items()
    ]
    if speeds:
        session.execute(insert(SpeedRow), speeds)


def index_values(entry: Entry) -> dict[str, Any]:
    """The columns of an entry's `IndexRow`."""
    found = figures(entry)
    return {
        "entry_id": entry.id,
        "status": entry.status,
        "family": entry.family,
        "base": entry.base_repository or entry.base_model,
        "base_model": entry.base_model,
        "license": entry.license or UNKNOWN,
        "created": entry.created,
        "sparsity": entry.sparsity,
        "bits_per_weight": entry.bits_per_weight,
        "text": document(entry, found),
        "task_count": task_count(found),
        **found.model_dump(),
    }


def _values(record: Record) -> dict[str, Any]:
    values = record.model_dump()
    if isinstance(record, Benchmark):
        values["machine_fingerprint"] = values.pop("machine")["fingerprint"]
    return values


def _fields(cls: type[Record], row: Any) -> dict[str, Any]:
    """The fields of `cls` from a row and the rows that belong to it."""
    values: dict[str, Any] = {}
    for name in cls.model_fields:
        value = getattr(row, name)
        if name in _SINGLE:
            value = _fields(_SINGLE[name], value)
        elif name in _PARTS:
            value = [_fields(_PARTS[name][0], part) for part in value]
        values[name] = value
    return values


def _with_parts(cls: type[Record]) -> Any:
    """Select entries together with the lists that `cls` shows."""
    lists = {*_PARTS, *_SINGLE}
    parts = [selectinload(getattr(EntryRow, name)) for name in cls.model_fields if name in lists]
    return select(EntryRow).options(
        *parts, selectinload(EntryRow.benchmarks).selectinload(BenchmarkRow.machine)
    )


def _plain(cls: type[Record], row: Any) -> list[Any]:
    """The columns that are fields of `cls` as they are."""
    return [getattr(row, name) for name in cls.model_fields if name not in (*_PARTS, *_SINGLE)]


def _found(
    connection: Connection, query: Query, machines: Sequence[str] | None
) -> tuple[int, dict[str, float | None]]:
    """How many match, exact up to MOST_COUNTED; and the ids of the page, each with its speed.

    To sort all that match, or to walk an index of the sort until the page is full? The one is slow where
    many match, the other where those that match come late. SQLite walks fast, as its text index gives the
    set of all that match; PostgreSQL has to read every entry that it passes, so there a walk is kept short.
    """
    asked = (query, connection.dialect.name, machines)

    def total() -> int:
        return connection.scalar(count(*asked)) or 0

    def sorted_(most: int | None) -> tuple[int, dict[str, float | None]]:
        rows = connection.execute(all_sorted(*asked, most=most)).tuples().all()
        found = rows[0][2] if rows else total() if query.offset else 0  # they may all be on earlier pages
        return found, {entry_id: speed for entry_id, speed, _ in rows}

    def walked(most: int | None) -> dict[str, float | None]:
        return dict(connection.execute(in_order(*asked, most=most)).tuples().all())

    if query.limit == 0:
        return total(), {}
    if connection.dialect.name == "postgresql":
        # Speeds on one machine lie apart from the entries: nothing to walk along.
        walkable = query.limit is not None and (machines is None or query.sort != "speed")
        if walkable and _expected(connection, matching(*asked)) > MOST_COUNTED:
            page = walked(MOST_WALKED)
            if len(page) == query.limit:
                return total(), page
        return sorted_(None)
    if not is_broad(query) or total() <= MOST_COUNTED:
        found, page = sorted_(MOST_COUNTED + 1)
        if found <= MOST_COUNTED:
            return found, page
    return MOST_COUNTED + 1, walked(None)


def _expected(connection: Connection, statement: Any) -> int:
    """How many rows PostgreSQL's planner expects, by its statistics."""
    compiled = statement.compile(connection, compile_kwargs={"render_postcompile": True})
    plan = connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {compiled}", compiled.params).scalar_one()
    return int(plan[0]["Plan"]["Plan Rows"])


# What a page of a search shows, as plain rows: objects of the ORM take four times as long, and building these
# statements as long as running them.
_SHOWN = ("artifacts", "measurements", "benchmarks")
_IDS: Any = bindparam("ids", expanding=True)
_SUMMARY_ROWS = (
    select(*_plain(Summary, EntryRow), *_plain(Figures, IndexRow))
    .join(IndexRow, IndexRow.entry_id == EntryRow.id)
    .where(EntryRow.id.in_(_IDS))
)
_SHOWN_ROWS = {
    name: select(
        row.entry_id, *_plain(record, row), *([row.machine_fingerprint] if name == "benchmarks" else [])
    )
    .where(row.entry_id.in_(_IDS))
    .order_by(row.entry_id, row.position)
    for name, (record, row) in _PARTS.items()
    if name in _SHOWN
}
_MACHINE_ROWS = select(*_plain(Machine, MachineRow)).where(
    MachineRow.fingerprint.in_(bindparam("fingerprints", expanding=True))
)


def _rows_of_summaries(connection: Connection, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The fields of each entry's Summary, by id."""
    asked = {"ids": ids}
    found: dict[str, dict[str, Any]] = {}
    for row in _dicts(connection, _SUMMARY_ROWS, asked):
        figures_ = {name: row.pop(name) for name in Figures.model_fields}
        found[row["id"]] = {**row, "figures": figures_, **{name: [] for name in _SHOWN}}
    for name in _SHOWN:
        rows = _dicts(connection, _SHOWN_ROWS[name], asked)
        if name == "benchmarks" and rows:
            fingerprints = {"fingerprints": sorted({row["machine_fingerprint"] for row in rows})}
            machines = {m["fingerprint"]: m for m in _dicts(connection, _MACHINE_ROWS, fingerprints)}
            for row in rows:
                row["machine"] = machines[row.pop("machine_fingerprint")]
        for row in rows:
            found[row.pop("entry_id")][name].append(row)
    return found


def _dicts(connection: Connection, statement: Any, asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows as dicts, in a fraction of the time of `mappings()`."""
    result = connection.execute(statement, asked)
    names = list(result.keys())
    return [dict(zip(names, row, strict=True)) for row in result]


def batched(values: Iterable[V], size: int) -> Iterator[list[V]]:
    """The values in lists of at most `size`, in order."""
    iterator = iter(values)
    while batch := list(islice(iterator, size)):
        yield batch


def _parse(url: str) -> URL:
    if any("\ud800" <= c <= "\udfff" for c in url):  # bytes of an argument that are no UTF-8
        raise UsageError("the registry's name is not UTF-8", saw=ascii(url), expected="a path or URL that is")
    if "://" not in url:
        url_ = URL.create("sqlite", database=str(Path(url).expanduser()))
    else:
        try:
            url_ = make_url(url)
        except (ArgumentError, ValueError) as error:
            raise UsageError(
                f"{url!r} is not a registry", expected="a path, or a URL such as sqlite:///registry.db"
            ) from error
    if url_.get_backend_name() == "sqlite" and url_.database in (None, "", ".", ":memory:"):
        raise UsageError("a registry needs a file", saw=url or "nothing", try_="--registry registry.db")
    return url_


def _sqlite_url(path: Path) -> URL:
    """The URL by which SQLite opens a file: for writing where this process may, else as it lies there."""
    path = path.absolute()
    if not path.exists() or (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)):
        return URL.create("sqlite", database=str(path))
    # In a folder where SQLite cannot make the shared memory of its log, only `immutable` can be read.
    log = path.with_name(path.name + "-wal")
    immutable = "0" if log.exists() and log.stat().st_size else "1"
    query = {"uri": "true", "mode": "ro", "immutable": immutable}
    return URL.create("sqlite", database="file:" + quote(str(path)), query=query)


def _engine(url: URL) -> Engine:
    if url.get_backend_name() != "sqlite":
        engine = create_engine(url, pool_pre_ping=True)  # a server that was restarted is asked anew
        _keep_quiet_when_stopped(engine)
        if url.get_backend_name() == "postgresql":
            event.listen(engine, "connect", _set_planner)
        return engine
    # No pool: the last connection to close folds the log into the file, so nothing lies beside it.
    engine = create_engine(url, poolclass=NullPool, connect_args={"timeout": BUSY_TIMEOUT_S})
    _keep_quiet_when_stopped(engine)

    @event.listens_for(engine, "connect")
    def _(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves, below
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def _(connection: Connection) -> None:
        kind = connection.get_execution_options().get("zoo_begin")
        if kind == "migrate":  # a table altered by copying must not take what refers to it along
            connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
        # A reader that turns into a writer can fail at once; one that begins as a writer waits its turn.
        connection.exec_driver_sql("BEGIN IMMEDIATE" if kind else "BEGIN")

    return engine


def _keep_quiet_when_stopped(engine: Engine) -> None:
    """SQLAlchemy logs what interrupts the closing of a connection, with a traceback, and raises it too."""
    logging.getLogger(f"{type(engine.pool).__module__}.{type(engine.pool).__name__}").addFilter(_not_stopped)


def _not_stopped(record: logging.LogRecord) -> bool:
    return not record.exc_info or isinstance(record.exc_info[1], Exception)


def _set_planner(connection: Any, _record: object) -> None:
    """Have PostgreSQL plan each search for its own words, and for an index in memory, not on a disk."""
    cursor = connection.cursor()
    cursor.execute("SET plan_cache_mode = force_custom_plan")
    cursor.execute("SET random_page_cost = 1.1")
    connection.commit()  # else the first rollback takes them back


def _use_wal(engine: Engine) -> None:
    """Readers and the writer do not wait for each other; the file remembers it."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        connection = engine.raw_connection()
        try:
            connection.cursor().execute("PRAGMA journal_mode = WAL")
            return
        except Exception as error:  # SQLite's timeout does not cover this pragma
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise OperationalError("PRAGMA journal_mode = WAL", None, error) from error
        finally:
            connection.close()
        time.sleep(0.02)


def _alembic(connection: Connection | None = None) -> Any:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _known_revisions() -> set[str]:
    from alembic.script import ScriptDirectory

    return {script.revision for script in ScriptDirectory.from_config(_alembic()).walk_revisions()}


@contextmanager
def _told_plainly(name: str) -> Iterator[None]:
    """Turn the database's errors into RegistryErrors that say what to do. IntegrityError is the caller's."""
    try:
        yield
    except IntegrityError:
        raise
    except (OverflowError, UnicodeEncodeError, DataError) as error:  # the last: of others than SQLite
        raise RegistryError(
            f"the registry {name} cannot hold this",
            saw=str(error.orig if isinstance(error, DataError) else error).splitlines()[0],
            expected="UTF-8 without NUL, integers of 64 bits",
        ) from error
    except DBAPIError as error:
        saw = str(error.orig)
        if "locked" in saw:
            raise RegistryError(
                f"the registry {name} is locked by another process",
                saw=f"no turn within {BUSY_TIMEOUT_S:.0f} s",
                try_="run again when it has finished (kill -CONT one that is stopped); nothing is lost",
            ) from error
        if "pg_trgm" in saw:
            raise RegistryError(
                f"the registry {name} needs PostgreSQL's extension pg_trgm",
                saw=saw.splitlines()[0],
                try_="install postgresql-contrib; have the database's owner say CREATE EXTENSION pg_trgm",
            ) from error
        if "readonly" in saw or "unable to open" in saw:
            raise _unwritable(name, saw) from error
        if "full" in saw or "disk I/O" in saw:
            raise RegistryError(
                f"no space left to write the registry {name}", saw=saw, try_="free some space and run again"
            ) from error
        if "not a database" in saw or "malformed" in saw:
            raise RegistryError(
                f"{name} is not a registry, or it is damaged",
                saw=saw,
                expected="an SQLite database",
                try_="restore it from version control, or name another with --registry",
            ) from error
        raise RegistryError(f"the registry {name} does not answer", saw=saw.splitlines()[0]) from error


def _unwritable(name: str, saw: str) -> RegistryError:
    return RegistryError(
        f"the registry {name} cannot be written",
        saw=saw,
        try_="name one in a folder you may write to with --registry or ZOO_REGISTRY",
    )
