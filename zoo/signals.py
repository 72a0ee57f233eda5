"""Ctrl-C and SIGTERM end a command in order if they can, and in any case within ten seconds."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import psutil

from zoo.errors import Stopped

GRACE_S = 6.0  # for ending in order; a computation outside Python may not hear of the signal for so long
LAST_WORDS_S = 2.0
DYING_S = 1.0
NAMES: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


@contextmanager
def stoppable(last_words: Callable[[Stopped], None]) -> Iterator[None]:
    """In the block, the first of these signals raises KeyboardInterrupt; `Stopped` is what leaves the block.

    If it has not been left after `GRACE_S`, `last_words` is called, by another thread. Then at the latest the
    process ends, with the signal's exit code, and with it all that it started. For the main thread only.
    """
    stopped: list[Stopped] = []
    left = threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def ask(number: int, _: FrameType | None) -> None:
        if not stopped:  # else it is ending already, which a second signal would only disturb
            stopped.append(_stopped(number))
            raise KeyboardInterrupt(f"interrupted by {NAMES[number]}")

    def watch() -> None:
        while (told := os.read(reader, 1)) and told[0] not in NAMES:
            pass
        os.close(reader)
        if told:
            time.sleep(GRACE_S)
            _end(_stopped(told[0]), None if left.is_set() else last_words)

    threading.Thread(target=watch, name="signals", daemon=True).start()
    before = {number: signal.signal(number, ask) for number in NAMES}
    # Written to when a signal comes; the handlers are called when the main thread is in Python again.
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    except BaseException as error:  # what became of KeyboardInterrupt on its way, too
        if stopped:
            raise stopped[0] from error
        raise
    finally:
        left.set()
        signal.set_wakeup_fd(wakeup)
        os.close(writer)
        if not stopped:
            for number, handler in before.items():
                signal.signal(number, handler)


def _stopped(number: int) -> Stopped:
    what = f"interrupted by {NAMES[number]}; what was finished is kept: the same command goes on from it"
    return Stopped(what, number)


def _end(stopped: Stopped, last_words: Callable[[Stopped], None] | None) -> None:
    if last_words is not None:
        speaking = threading.Thread(target=last_words, args=(stopped,), daemon=True)
        speaking.start()
        speaking.join(LAST_WORDS_S)
    ours = psutil.Process().children(recursive=True)
    for process in ours:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(ours, timeout=DYING_S)  # who runs the command again must not meet them
    os._exit(128 + stopped.signal)
