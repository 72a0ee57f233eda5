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
    base_sha256: Mapped[str] = mapped_column(String(64), index=True)
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
