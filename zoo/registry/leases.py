"""Leases: who works on what, so that two schedulers never run one job.

A holder raises the lease's count, its heartbeat, again and again. Who wants the lease watches the count: if
it stands still for as long as the holder promised to raise it, by the watcher's own monotonic clock, the
holder is gone and the watcher may take over. No time of day is ever read and no two clocks are compared, so a
clock that jumps, of a machine or of the database, changes nothing.

Everyone who takes a lease raises its token. What is done under a lease is recorded in a transaction that
confirms the token first (fencing): a holder that slept through its lease can record nothing.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from zoo.errors import RegistryError
from zoo.files import sha256_bytes
from zoo.registry.models import LeaseRow

if TYPE_CHECKING:
    from zoo.registry.registry import Registry

PATIENCE_S = 30.0
BEATS = 5  # within a holder's patience
LATEST = 0.7  # of its patience without a heartbeat, a holder stops: before anyone else may begin


class LeaseLost(RegistryError):
    """What was done under a lease cannot be recorded: someone else has it now."""


@dataclass(frozen=True)
class Lease:
    name: str
    holder: str
    token: int


@dataclass(frozen=True)
class Seen:
    """A lease that someone else has."""

    holder: str
    token: int
    beat: int
    patience_s: float


def this_process() -> str:
    """A holder's name: host, process id, and what tells it from others with the same two."""
    return f"{socket.gethostname()}:{os.getpid()}:{_kernel()}:{_began(os.getpid())}"


def is_gone(holder: str) -> bool:
    """Whether a holder is certainly dead: a process of this very kernel that is not there any more."""
    _, _, rest = holder.partition(":")
    pid, _, rest = rest.partition(":")
    kernel, _, began = rest.partition(":")
    return bool(began) and kernel == _kernel() and _began(int(pid)) != began


def _kernel() -> str:
    """The boot and the container that process ids belong to; hosts may share a name. "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return sha256_bytes((boot + str(Path("/proc/self/ns/pid").readlink())).encode())[:8]
    except OSError:
        return ""


def _began(pid: int) -> str:
    """When a process began, in ticks since boot, which no clock's jump changes; "" if it is gone."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]


def take(
    registry: Registry,
    name: str,
    holder: str,
    *,
    patience_s: float = PATIENCE_S,
    instead_of: Seen | None = None,
) -> Lease | Seen:
    """Take a lease that is free, or that still is exactly as it was when it was seen; else say who has it."""
    while True:
        try:
            with registry.transaction() as session:
                row = session.get(LeaseRow, name, with_for_update=True)
                if row is None:
                    session.add(LeaseRow(name=name, holder=holder, token=1, beat=0, patience_s=patience_s))
                    return Lease(name, holder, 1)
                if row.holder is not None:
                    seen = Seen(row.holder, row.token, row.beat, row.patience_s)
                    if seen != instead_of:
                        return seen
                row.holder, row.token, row.beat, row.patience_s = holder, row.token + 1, 0, patience_s
                return Lease(name, holder, row.token)
        except IntegrityError:  # someone else took it for the first time, just now
            continue


def renew(registry: Registry, lease: Lease) -> bool:
    """A heartbeat; False if someone else has the lease now."""
    mine = (LeaseRow.name == lease.name) & (LeaseRow.token == lease.token) & LeaseRow.holder.is_not(None)
    with registry.transaction() as session:
        done = session.execute(update(LeaseRow).where(mine).values(beat=LeaseRow.beat + 1))
        return bool(done.rowcount)  # type: ignore[attr-defined]


def release(registry: Registry, lease: Lease) -> None:
    """Give a lease back; nothing happens if someone else has it by now."""
    mine = (LeaseRow.name == lease.name) & (LeaseRow.token == lease.token)
    with registry.transaction() as session:
        session.execute(update(LeaseRow).where(mine).values(holder=None))


def confirm(session: Session, lease: Lease) -> None:
    """Raise LeaseLost unless the lease is held; it cannot be taken before the transaction ends."""
    row = session.get(LeaseRow, lease.name, with_for_update=True, populate_existing=True)
    if row is None or row.token != lease.token or row.holder is None:
        raise LeaseLost(
            f"{lease.name} cannot be recorded: its lease is lost",
            saw=f"token {row.token if row else None}, held by {(row.holder if row else None) or 'nobody'}",
            expected=f"token {lease.token}",
            try_="nothing: who has the lease now does the work",
        )


def held(registry: Registry) -> dict[str, Seen]:
    """The leases that someone has, or had when it died."""
    with registry.reading() as session:
        rows = session.scalars(select(LeaseRow).where(LeaseRow.holder.is_not(None))).all()
        return {row.name: Seen(row.holder or "", row.token, row.beat, row.patience_s) for row in rows}


class Watch:
    """Takes leases for one holder, those of dead holders too: call `take` again and again."""

    def __init__(self, registry: Registry, holder: str, patience_s: float = PATIENCE_S) -> None:
        self.registry = registry
        self.holder = holder
        self.patience_s = patience_s
        self._since: dict[str, tuple[Seen, float]] = {}

    def take(self, name: str) -> Lease | Seen:
        dead = None
        if name in self._since:
            seen, since = self._since[name]
            if time.monotonic() - since >= seen.patience_s or is_gone(seen.holder):
                dead = seen
        found = take(self.registry, name, self.holder, patience_s=self.patience_s, instead_of=dead)
        if isinstance(found, Lease):
            self._since.pop(name, None)
        elif name not in self._since or self._since[name][0] != found:
            self._since[name] = (found, time.monotonic())
        return found


class Heartbeat:
    """A thread that renews leases until they are dropped, or lost."""

    def __init__(self, registry: Registry, patience_s: float = PATIENCE_S) -> None:
        self.registry = registry
        self.patience_s = patience_s
        self._renewed: dict[Lease, float] = {}
        self._lost: set[Lease] = set()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(self.patience_s)

    def keep(self, lease: Lease) -> None:
        """Renew a lease that was taken just now."""
        self._renewed[lease] = time.monotonic()

    def drop(self, lease: Lease) -> None:
        """Renew it no more, and give it back."""
        self._renewed.pop(lease, None)
        self._lost.discard(lease)
        with suppress(RegistryError):  # then it ends when others lose patience
            release(self.registry, lease)

    def lost(self, lease: Lease) -> bool:
        """Whether the work under it must stop: taken by others, or about to be."""
        renewed = self._renewed.get(lease)
        return lease in self._lost or renewed is None or time.monotonic() - renewed > LATEST * self.patience_s

    def _beat(self) -> None:
        while not self._end.wait(self.patience_s / BEATS):
            self._renew(list(self._renewed))

    def _renew(self, leases: Iterable[Lease]) -> None:
        for lease in leases:
            began = time.monotonic()
            with suppress(RegistryError):  # the database may be back for the next one
                if not renew(self.registry, lease):
                    self._lost.add(lease)
                elif lease in self._renewed:
                    self._renewed[lease] = began
