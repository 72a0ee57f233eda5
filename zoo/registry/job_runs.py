"""What became of every run of a job, and the figures of those that were done; written under a lease only."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from sqlalchemy import select, update

from zoo.entry import Direction, Record
from zoo.registry.leases import Lease, confirm
from zoo.registry.models import JobRunRow

if TYPE_CHECKING:
    from zoo.registry.registry import Registry

JobStatus = Literal["running", "done", "failed", "interrupted"]


class Figure(Record):
    """A figure of an entry, under a name that says how it was measured: equal names may be compared."""

    name: str
    kind: Literal["accuracy", "perplexity", "speed", "size"]
    direction: Direction
    value: float


class JobRun(Record):
    """One run of a job by a scheduler. `interrupted`: stopped, or its scheduler ended without a word."""

    id: int
    job: str
    token: int  # of the lease that it is under
    holder: str
    status: JobStatus
    reasons: list[str]
    attempts: int
    started: datetime
    finished: datetime | None
    seconds: float | None
    failure: str | None
    figures: list[Figure]


def start(registry: Registry, lease: Lease, job: str, reasons: Sequence[str]) -> int:
    """Record that a job began; runs of it that never ended are closed. LeaseLost without the lease."""
    with registry.transaction() as session:
        confirm(session, lease)
        session.execute(
            update(JobRunRow)
            .where(JobRunRow.job == job, JobRunRow.status == "running")
            .values(status="interrupted", failure="its scheduler ended without a word")
        )
        row = JobRunRow(
            job=job,
            token=lease.token,
            holder=lease.holder,
            status="running",
            reasons=list(reasons),
            attempts=0,
            started=datetime.now(UTC),
            figures=[],
        )
        session.add(row)
        session.flush()
        return row.id


def finish(
    registry: Registry,
    lease: Lease,
    run_id: int,
    status: JobStatus,
    *,
    attempts: int,
    seconds: float,
    failure: str | None = None,
    figures: Sequence[Figure] = (),
) -> None:
    """Record how it ended. LeaseLost without the lease."""
    with registry.transaction() as session:
        confirm(session, lease)
        session.execute(
            update(JobRunRow)
            .where(JobRunRow.id == run_id)
            .values(
                status=status,
                attempts=attempts,
                seconds=seconds,
                finished=datetime.now(UTC),
                failure=failure,
                figures=[figure.model_dump() for figure in figures],
            )
        )


def history(registry: Registry, job: str | None = None) -> list[JobRun]:
    """The runs of a job, or of all, newest first."""
    query = select(JobRunRow).order_by(JobRunRow.id.desc())
    if job is not None:
        query = query.where(JobRunRow.job == job)
    with registry.reading() as session:
        return [
            JobRun.model_validate({name: getattr(row, name) for name in JobRun.model_fields})
            for row in session.scalars(query)
        ]
