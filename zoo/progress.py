"""Progress on the terminal, and one plain line now and then everywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterable, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True, highlight=False, soft_wrap=True)
T = TypeVar("T")
QUIET_INTERVAL_S = 15.0


def say(message: str) -> None:
    """One line of news for a person, on standard error."""
    console.print(message, markup=False)


def track(items: Iterable[T], description: str, total: int | None = None) -> Generator[T, None, None]:
    """Iterate with a bar and the time left on a terminal; elsewhere a line every 15 seconds."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    if console.is_terminal:
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            yield from bar.track(items, total=total, description=description)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items):
        yield item
        now = time.monotonic()
        if now - last >= QUIET_INTERVAL_S:
            last = now
            left = f", {(now - start) / (done + 1) * (total - done - 1):.0f} s left" if total else ""
            print(f"  {description}: {done + 1}/{total or '?'}{left}", file=sys.stderr, flush=True)
