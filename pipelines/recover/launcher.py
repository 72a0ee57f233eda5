"""`python -m pipelines.recover.launcher`: `accelerate launch`, whose failures are told as ours.

What a training ended with stands beside its job, for whoever started it; the launcher's own traceback would
tell of the launcher only.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from zoo.errors import Lost, ZooError, last_line
from zoo.files import atomic_file

ERROR = "error.pickle"
PARTED = os.EX_TEMPFAIL  # exit code of a process whose connection to another broke
_AGAIN = "run it again: it goes on from its last state"


def tell(job: Path, error: ZooError) -> None:
    """Leave what a training ended with beside its job."""
    with atomic_file(job.with_name(ERROR)) as out:
        out.write_bytes(pickle.dumps(error))


def told(job: Path) -> ZooError | None:
    """What a training ended with, if it did with an error."""
    found = job.with_name(ERROR)
    if not found.is_file():
        return None
    error = pickle.loads(found.read_bytes())
    assert isinstance(error, ZooError)
    return error


def main() -> None:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    options = launch_command_parser().parse_args()
    job = Path(options.training_script_args[-1])
    try:
        launch_command(options)
    except ChildFailedError as error:
        reason = _reason(error.failures.values())
        if reason is not None and told(job) is None:
            tell(job, reason)
        sys.exit(1)
    except (DistError, RendezvousError) as error:
        tell(job, Lost("the machines of the training did not meet", saw=last_line(error), try_=_AGAIN))
        sys.exit(1)


def _reason(failures: Iterable[Any]) -> ZooError | None:
    """Why processes (torch's ProcessFailure) failed, of which the launcher has ended the others by SIGTERM.

    None if the first one has said it itself.
    """
    consequences = (-signal.SIGTERM, PARTED)
    first = min(failures, key=lambda failure: (failure.exitcode in consequences, failure.timestamp))
    if first.exitcode == PARTED:
        return Lost("the processes of the training lost each other", try_=_AGAIN)
    if -first.exitcode in (signal.SIGKILL, signal.SIGTERM):
        ended = f"process {first.pid} was ended by {first.signal_name()}"
        return Lost("the training lost one of its processes", saw=ended, try_=_AGAIN)
    if first.exitcode < 0:
        return ZooError(f"a process of the training was ended by {first.signal_name()}")
    return None


if __name__ == "__main__":
    main()
