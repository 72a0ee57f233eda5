"""Training in several processes, of this machine and of others, by `accelerate launch` on each of them.

The others are the workers that the Ray executor reserved for the stage. All form one process group, of which
the first process, here, is the one that writes. Machines that share the folder of the store share the
training's state too; on others every call begins anew, as each would have a part of the state only.
"""

from __future__ import annotations

import gc
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch

from pipelines import cluster, lifeline
from pipelines.cluster import Reserved
from pipelines.recover.launcher import PARTED, tell, told
from pipelines.recover.state import Progress, newest, read_progress
from pipelines.recover.train import Job, recover, shares
from zoo.entry import Record
from zoo.errors import Lost, ZooError, last_line
from zoo.progress import say

JOB = "job.json"
POLL_S = 0.1
PATIENCE_S = 60.0  # until the cluster knows of a lost machine, which the others notice at once


class Group(Record):
    """The process group of a training."""

    machines: int
    processes: int  # of each machine
    ip: str = "127.0.0.1"  # of the first machine, where all meet
    port: int = 0  # 0: any that is free, if there is one machine only


def launched(job: Job, processes: int) -> Progress:
    """As `train`, in so many processes of each machine. Raises ZooError; transient if one was lost."""
    if torch.cuda.is_available():  # what this process took, to write text or to prune, is for the training
        gc.collect()
        torch.cuda.empty_cache()
    with cluster.others(Machine) as others, tempfile.TemporaryDirectory(prefix="zoo-recover-") as scratch:
        group = Group(machines=1 + len(others), processes=processes)
        shares(job.step, group.machines * processes)
        job.state.mkdir(parents=True, exist_ok=True)
        if others:
            ip, port = _meeting_point()
            group = group.model_copy(update={"ip": ip, "port": port})
            _forget_parts(job, others)
        own = _start(job, Path(scratch), group, rank=0, log=subprocess.PIPE)
        words = threading.Thread(target=_pass_on, args=(own.stdout, Path(scratch)))
        words.start()
        theirs: ZooError | None = None
        code = 1
        try:
            said = group.model_dump_json()
            asked = [m.train.remote(job.model_dump_json(), said, rank) for rank, m in enumerate(others, 1)]
            code = _watched(own, asked)
        except ZooError as error:
            theirs = error
        finally:
            lifeline.end(own)
            words.join()
        errors = [error for error in (told(Path(scratch, JOB)), theirs) if error is not None]
        if errors:  # that a machine lost another tells less than why the other went
            raise min(errors, key=lambda error: isinstance(error, Lost))
    state = newest(job.state)
    if code or state is None:
        raise ZooError(f"training in {group.machines * processes} processes ended with code {code}")
    return read_progress(state, job.identity)


def work(description: Path) -> int:
    """Be one process of a training: its exit code. If it fails, why stands beside the job."""
    try:
        recover(Job.model_validate_json(description.read_text()))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # else NCCL warns of it
    except ZooError as error:
        tell(description, error)
        return 1
    except RuntimeError as error:
        if not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise
        say(f"  recover: a process lost another: {last_line(error)}")
        return PARTED
    return 0


def _pass_on(words: IO[bytes], scratch: Path) -> None:
    """Say what the processes say, up to an error: what launchers say of it then tells no more."""
    for line in words:
        if told(scratch / JOB) is None:
            sys.stderr.write(line.decode(errors="replace"))


class Machine:
    """The actor: another machine of a training."""

    def __init__(self, reserved: str) -> None:
        cluster.hide_gpus_of_others()
        self._theirs = Reserved.model_validate_json(reserved)

    def sees(self, folder: str) -> bool:
        """Whether this folder, whose name nothing else has, is the first machine's."""
        return Path(folder).is_dir()

    def train(self, job: str, group: str, rank: int) -> tuple[int, str]:
        """Be the machine of this rank; returns the exit code, and the last words if it is not 0.

        Raises the ZooError of a process that ended with one.
        """
        with tempfile.TemporaryDirectory(prefix="zoo-recover-") as scratch:
            folder = Path(scratch)
            said = folder / "log"
            with said.open("wb") as log:
                mine = self._mine(Job.model_validate_json(job), folder)
                process = _start(mine, folder, Group.model_validate_json(group), rank, log)
                try:
                    code = process.wait()
                finally:
                    lifeline.end(process)
            if (error := told(folder / JOB)) is not None:
                raise error
            words = said.read_text(errors="replace").strip().splitlines()
            lines = [line for line in words if "torch/distributed/elastic" not in line]  # the launcher's own
            return code, lines[-1][:300] if code and lines else ""

    def _mine(self, job: Job, scratch: Path) -> Job:
        """The job with this machine's paths. What it would write, where that is not shared, nobody needs."""
        if self.sees(str(job.out)):
            return job
        out = scratch / "out"
        out.mkdir()
        return job.model_copy(
            update={
                "student": cluster.here(job.student, self._theirs),
                "teacher": cluster.here(job.teacher, self._theirs),
                "tokens": [cluster.here(path, self._theirs) for path in job.tokens],
                "alternatives": [cluster.here(path, self._theirs) for path in job.alternatives],
                "out": out,
                "state": scratch / "state",
            }
        )


def _meeting_point() -> tuple[str, int]:
    """An address and a free port of this machine, by which the others reach it."""
    import ray

    with socket.socket() as free:
        free.bind(("", 0))
        return ray.util.get_node_ip_address(), free.getsockname()[1]


def _forget_parts(job: Job, others: Sequence[Any]) -> None:
    """Remove a state that the other machines do not see."""
    together = cluster.answers([other.sees.remote(str(job.out)) for other in others], PATIENCE_S)
    if not all(together) and newest(job.state) is not None:
        say("  recover: begins anew, as the machines share no folder with the state of the training")
        shutil.rmtree(job.state)


def _start(job: Job, scratch: Path, group: Group, rank: int, log: IO[bytes] | int) -> subprocess.Popen[bytes]:
    """Start this machine's processes."""
    description = scratch / JOB
    description.write_text(job.model_dump_json())
    options = {
        "num_processes": group.machines * group.processes,
        "num_machines": group.machines,
        "machine_rank": rank,
        "main_process_ip": group.ip,
        "main_process_port": group.port,
        "log_dir": scratch / "launcher",  # else it leaves a temporary folder behind
        # The training itself says what these are; a machine's own configuration is not to.
        "mixed_precision": "no",
        "dynamo_backend": "no",
    }
    command = [sys.executable, "-m", "pipelines.recover.launcher", "--multi_gpu"]  # by gloo on CPUs
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return lifeline.start([*command, "-m", "pipelines.recover", "--job", str(description)], log)


def _watched(own: subprocess.Popen[bytes], asked: Sequence[Any]) -> int:
    """The exit code of the training: 0, or that of a machine where it failed."""
    while (code := own.poll()) is None:
        ended = cluster.answers(asked, POLL_S) if asked else []
        failed = [(number, words) for number, words in ended if number]
        if failed:
            (code, words), *_ = failed
            say(f"  recover: another machine ended with code {code}: {words}")
            break
        if not asked:
            time.sleep(POLL_S)
    if code and asked:
        cluster.answers(asked, PATIENCE_S)  # raises if what failed was that one was lost
    return code
