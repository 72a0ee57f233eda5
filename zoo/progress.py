"""Progress on the terminal, and one plain line now and then everywhere else."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from zoo import logs
from zoo.files import told_plainly

console = Console(stderr=True, highlight=False, soft_wrap=True)
T = TypeVar("T")
QUIET_INTERVAL_S = 15.0
_logs: list[TextIO] = []  # that are being written


def say(message: str, event: str = "said", **fields: Any) -> None:
    """One line of news for a person, on standard error; with `--log-json`, as an event with these fields."""
    if logs.is_json():
        logs.write(event, message, **fields)
    else:
        console.print(logs.shown(message), markup=False)
    _log(message)


def log_path(store: Path, run_id: int, recipe_sha256: str) -> Path:
    """Where the log of a run lies. Registries number runs alike, so the recipe's hash is in its name."""
    return store.expanduser() / "runs" / f"{recipe_sha256[:16]}-{run_id}.log"


def job_log_path(store: Path, job: str, token: int) -> Path:
    """Where the log of a run of a job lies; `token`: of the lease that it is under."""
    return store.expanduser() / "jobs" / f"{job}-{token}.log"


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Meanwhile, what is said and how far things are also goes to this file, which others may read."""
    with told_plainly(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("a", encoding="utf-8", errors="replace")
    with opened as file:
        _logs.append(file)
        try:
            yield
        finally:
            _logs.remove(file)


def _log(line: str) -> None:
    for file in _logs:
        with suppress(OSError):  # a full disk: the work itself may need no more of it
            print(time.strftime("%H:%M:%S"), logs.shown(line), file=file, flush=True)


def track(items: Iterable[T], description: str, total: int | None = None) -> Generator[T, None, None]:
    """Iterate with a bar and the time left on a terminal; elsewhere a line every 15 seconds."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    description = logs.shown(description)
    if console.is_terminal and not logs.is_json():
        columns = (
            TextColumn("  {task.description}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            yield from _lines(
                bar.track(items, total=total, description=description), description, total, _log
            )
        return

    def show(line: str) -> None:
        _print(line)
        _log(line)

    yield from _lines(items, description, total, show)


@contextmanager
def counting(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """As `track`, for what is done elsewhere: yield what is called with how many more of `total` are done."""
    steps = track(range(total), description, total)

    def advance(count: int) -> None:
        for _ in islice(steps, count):
            pass

    try:
        yield advance
        advance(total)
    finally:
        steps.close()


def _print(line: str) -> None:
    if logs.is_json():
        logs.write("progress", line.strip())
    else:
        print(logs.shown(line), file=sys.stderr, flush=True)


def _lines(
    items: Iterable[T], description: str, total: int | None, show: Callable[[str], None]
) -> Generator[T, None, None]:
    """Iterate; a line every 15 seconds."""
    start = last = time.monotonic()
    for done, item in enumerate(items):
        yield item
        now = time.monotonic()
        if now - last >= QUIET_INTERVAL_S:
            last = now
            left = f", {(now - start) / (done + 1) * (total - done - 1):.0f} s left" if total else ""
            show(f"  {description}: {done + 1}/{total or '?'}{left}")


@contextmanager
def transfer(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield what threads call with bytes done (or, negative, undone): a bar with speed and time left."""
    description = logs.shown(description)
    if console.is_terminal and not logs.is_json():
        columns = (
            TextColumn("  {task.description}", markup=False),
            BarColumn(bar_width=28),
            DownloadColumn(),
            TransferSpeedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(description, total=total)
            yield lambda count: bar.advance(task, count)
        return
    start = last = time.monotonic()
    done = 0
    turn = threading.Lock()

    def advance(count: int) -> None:
        nonlocal done, last
        with turn:
            done += count
            now = time.monotonic()
            if now - last < QUIET_INTERVAL_S:
                return
            last = now
            speed = max(done, 1) / (now - start)
            _print(
                f"  {description}: {done / 1e6:.0f}/{total / 1e6:.0f} MB, {speed / 1e6:.1f} MB/s, "
                f"{(total - done) / speed:.0f} s left"
            )

    yield advance
