"""The tables. A column is named as the field of `zoo.entry` that it holds; a test compares the two."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    TypeDecorator,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class UtcDateTime(TypeDecorator[datetime]):
    """A moment with its time zone, also where the database (SQLite) keeps none: stored as UTC."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value and value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value and (value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC))


# Compared byte by byte in every database, so that all sort alike.
PLAIN_TEXT = Text().with_variant(Text(collation="C"), "postgresql")


class Base(DeclarativeBase):
    # Every constraint has a name, without which SQLite's batch migrations cannot drop it.
    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012  (SQLAlchemy reads it so)
        str: Text,
        int: BigInteger,
        float: Double,
        datetime: UtcDateTime,
        dict[str, str]: JSON,
        dict[str, float]: JSON,
        list[str]: JSON,
    }


class EntryRow(Base):
    __tablename__ = "entries"

    id: Mapped[str] = mapped_column(String(96), primary_key=True)
    status: Mapped[str] = mapped_column(String(16), index=True)
    failure: Mapped[str | None]
    family: Mapped[str] = mapped_column(String(16), index=True)
    base_model: Mapped[str]
    base_repository: Mapped[str | None]
    base_revision: Mapped[str]
    base_sha256: Mapped[str | None] = mapped_column(String(64), index=True)
    origin: Mapped[str | None]
    license: Mapped[str | None]
    recipe: Mapped[str]
    recipe_sha256: Mapped[str] = mapped_column(String(64), index=True)
    created: Mapped[str]  # the entry's own spelling of the moment: what is read is what was put
    parameters: Mapped[int]
    sparsity: Mapped[float]
    bits_per_weight: Mapped[float]
    compression_ratio: Mapped[float]
    versions: Mapped[dict[str, str]]

    # Written by plain inserts and read only where a query asks for them.
    layers: Mapped[list[LayerRow]] = relationship(order_by="LayerRow.position", lazy="raise", viewonly=True)
    artifacts: Mapped[list[ArtifactRow]] = relationship(
        order_by="ArtifactRow.position", lazy="raise", viewonly=True
    )
    measurements: Mapped[list[MeasurementRow]] = relationship(
        order_by="MeasurementRow.position", lazy="raise", viewonly=True
    )
    benchmarks: Mapped[list[BenchmarkRow]] = relationship(
        order_by="BenchmarkRow.position", lazy="raise", viewonly=True
    )
    verifications: Mapped[list[VerificationRow]] = relationship(
        order_by="VerificationRow.position", lazy="raise", viewonly=True
    )
    stages: Mapped[list[StageRow]] = relationship(order_by="StageRow.position", lazy="raise", viewonly=True)
    publications: Mapped[list[PublicationRow]] = relationship(
        order_by="PublicationRow.position", lazy="raise", viewonly=True
    )
    training: Mapped[list[TrainingRow]] = relationship(
        order_by="TrainingRow.position", lazy="raise", viewonly=True
    )
    training_runs: Mapped[list[TrainingRunRow]] = relationship(
        order_by="TrainingRunRow.position", lazy="raise", viewonly=True
    )
    figures: Mapped[IndexRow] = relationship(lazy="raise", viewonly=True, uselist=False)


class IndexRow(Base):
    """What entries are searched by: a narrow copy of their facts, and `zoo.registry.figures` of each.

    A search at 100,000 entries reads these rows only; `entries` with its recipes is twenty times as wide.
    Migration 0002 has the indexes, which differ from database to database: one for each sort, and one of the
    trigrams of `text`, on PostgreSQL pg_trgm's, on SQLite the table `entry_text` of its FTS5, which is why
    `key` is an integer. Migration 0004 has one of what filters look at, 0006 that of the accuracies.
    """

    __tablename__ = "entry_index"
    key: Mapped[int] = mapped_column(Integer, primary_key=True)
    entry_id: Mapped[str] = mapped_column(
        PLAIN_TEXT, ForeignKey("entries.id", ondelete="CASCADE"), unique=True
    )
    status: Mapped[str] = mapped_column(String(16))
    family: Mapped[str] = mapped_column(String(16))
    base: Mapped[str]  # its repository if known, else its source
    base_model: Mapped[str]
    license: Mapped[str]
    created: Mapped[str] = mapped_column(PLAIN_TEXT)
    sparsity: Mapped[float]
    bits_per_weight: Mapped[float]
    size: Mapped[int | None]
    accuracy: Mapped[float | None]
    tasks: Mapped[str | None] = mapped_column(PLAIN_TEXT)
    task_count: Mapped[int] = mapped_column(Integer, server_default="0")
    accuracy_delta: Mapped[float | None]
    perplexity: Mapped[float | None]
    base_perplexity: Mapped[float | None]
    speed: Mapped[float | None]
    method: Mapped[str]
    pattern: Mapped[str]
    text: Mapped[str] = mapped_column(PLAIN_TEXT)


class SpeedRow(Base):
    """The best decode of an entry on a machine."""

    __tablename__ = "entry_speed"
    __table_args__ = (Index("ix_entry_speed_machine", "machine_fingerprint", "key", "speed"),)

    key: Mapped[int] = mapped_column(
        Integer, ForeignKey("entry_index.key", ondelete="CASCADE"), primary_key=True
    )
    machine_fingerprint: Mapped[str] = mapped_column(ForeignKey("machines.fingerprint"), primary_key=True)
    speed: Mapped[float]


class OfEntry:
    """Mixin: the `position`-th record of its kind in an entry; it goes when the entry goes."""

    entry_id: Mapped[str] = mapped_column(
        ForeignKey("entries.id", ondelete="CASCADE"), primary_key=True, sort_order=-2
    )
    position: Mapped[int] = mapped_column(Integer, primary_key=True, sort_order=-1)


class ArtifactRow(OfEntry, Base):
    __tablename__ = "artifacts"

    path: Mapped[str]
    kind: Mapped[str]
    format: Mapped[str | None]
    size: Mapped[int]
    sha256: Mapped[str] = mapped_column(String(64), index=True)


class LayerRow(OfEntry, Base):
    __tablename__ = "layers"

    name: Mapped[str]
    rows: Mapped[int]
    columns: Mapped[int]
    sparsity: Mapped[float]
    pattern: Mapped[str | None]
    window: Mapped[int | None]
    bits: Mapped[float]
    group: Mapped[int | None]
    symmetric: Mapped[bool | None]
    zero_point: Mapped[str | None]
    method: Mapped[str | None]
    error: Mapped[float | None]


class MeasurementRow(OfEntry, Base):
    __tablename__ = "measurements"

    subject: Mapped[str]
    artifact: Mapped[str | None]
    metric: Mapped[str]
    value: Mapped[float]
    stderr: Mapped[float | None]
    unit: Mapped[str]
    direction: Mapped[str]
    task: Mapped[str]
    task_version: Mapped[str | None]
    data_revision: Mapped[str | None]
    context_length: Mapped[int | None]
    stride: Mapped[int | None]
    samples: Mapped[int]
    sample_unit: Mapped[str]
    few_shot: Mapped[int | None]
    limit: Mapped[int | None]
    harness: Mapped[str]
    dtype: Mapped[str]


class MachineRow(Base):
    __tablename__ = "machines"

    fingerprint: Mapped[str] = mapped_column(String(64), primary_key=True)
    cpu: Mapped[str]
    cores: Mapped[int]
    threads_per_core: Mapped[int]
    isa: Mapped[list[str]]
    memory_bytes: Mapped[int]
    system: Mapped[str]


class BenchmarkRow(OfEntry, Base):
    __tablename__ = "benchmarks"

    runner: Mapped[str]
    runner_version: Mapped[str]
    artifact: Mapped[str]
    threads: Mapped[int]
    prompt_tokens: Mapped[int]
    generated_tokens: Mapped[int]
    repeats: Mapped[int]
    prefill_tokens_per_s: Mapped[float]
    decode_tokens_per_s: Mapped[float]
    load_s: Mapped[float]
    peak_memory_bytes: Mapped[int]
    machine_fingerprint: Mapped[str] = mapped_column(ForeignKey("machines.fingerprint"), index=True)
    machine: Mapped[MachineRow] = relationship(lazy="raise", viewonly=True)


class VerificationRow(OfEntry, Base):
    __tablename__ = "verifications"

    runner: Mapped[str]
    runner_version: Mapped[str]
    artifact: Mapped[str]
    passed: Mapped[bool]
    reason: Mapped[str]
    top1_agreement: Mapped[float | None]
    kl_divergence: Mapped[float | None]
    min_top1_agreement: Mapped[float | None]
    max_kl_divergence: Mapped[float | None]
    positions: Mapped[int]
    sample: Mapped[str | None]


class StageColumns:
    """Mixin: the fields of `zoo.entry.Stage`."""

    name: Mapped[str]
    key: Mapped[str]
    status: Mapped[str]
    seconds: Mapped[float]
    reason: Mapped[str | None]


class StageRow(OfEntry, StageColumns, Base):
    """A stage that made an entry."""

    __tablename__ = "stages"


class PublicationRow(OfEntry, Base):
    __tablename__ = "publications"

    endpoint: Mapped[str]
    repository: Mapped[str]
    commit: Mapped[str]
    tag: Mapped[str]
    published: Mapped[str]


class TrainingRow(OfEntry, Base):
    """A point on the curve of an entry's training."""

    __tablename__ = "training"

    step: Mapped[int]
    tokens: Mapped[int]
    seconds: Mapped[float]
    loss: Mapped[float]
    learning_rate: Mapped[float]
    terms: Mapped[dict[str, float]]


class TrainingRunRow(OfEntry, Base):
    """On what a training of an entry ran."""

    __tablename__ = "training_runs"

    device: Mapped[str]
    processes: Mapped[int]
    versions: Mapped[dict[str, str]]
    tokens: Mapped[int]
    seconds: Mapped[float]
    ended: Mapped[str]


class RunRow(Base):
    """One call of `zoo run`, finished or not."""

    __tablename__ = "runs"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    recipe_name: Mapped[str]
    recipe_sha256: Mapped[str] = mapped_column(String(64), index=True)
    pid: Mapped[int]
    host: Mapped[str]
    status: Mapped[str] = mapped_column(String(16), index=True)
    started: Mapped[datetime]
    finished: Mapped[datetime | None]
    entry_id: Mapped[str | None] = mapped_column(ForeignKey("entries.id", ondelete="SET NULL"), index=True)
    failure: Mapped[str | None]

    stages: Mapped[list[RunStageRow]] = relationship(
        order_by="RunStageRow.position", lazy="raise", viewonly=True
    )


class RunStageRow(StageColumns, Base):
    """A stage of a run, recorded as it ended."""

    __tablename__ = "run_stages"

    run_id: Mapped[int] = mapped_column(Integer, ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(Integer, primary_key=True)


class LeaseRow(Base):
    """Who works on what; see `zoo.registry.leases`."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(primary_key=True)
    holder: Mapped[str | None]  # None: free
    token: Mapped[int]  # raised by everyone who takes it
    beat: Mapped[int]  # raised by the holder, again and again
    patience_s: Mapped[float]  # the holder promises to raise it within this time


class JobRunRow(Base):
    """One run of a job by a scheduler, its repetitions after transient failures included."""

    __tablename__ = "job_runs"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    job: Mapped[str] = mapped_column(index=True)
    token: Mapped[int]  # of the lease it ran under
    holder: Mapped[str]
    status: Mapped[str] = mapped_column(String(16))
    reasons: Mapped[list[str]]
    attempts: Mapped[int]
    started: Mapped[datetime]
    finished: Mapped[datetime | None]
    seconds: Mapped[float | None]
    failure: Mapped[str | None]
    figures: Mapped[list[dict[str, str | float | None]]] = mapped_column(JSON)
