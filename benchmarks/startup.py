"""How long a command takes to begin: `python -m benchmarks.startup [--rounds N]`.

Processor time, of processes of their own, one after the other in every round: of a Python that does nothing,
of the imports that `zoo list` cannot do without (Typer, SQLAlchemy, Pydantic), and of commands. Medians, and
the least and the most. Aims: `zoo --help` below half a second, `zoo list` below a second.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys

COMMANDS = {
    "python": ["-c", "pass"],
    "its libraries": ["-c", "import typer, sqlalchemy.orm, pydantic"],
    "zoo --help": ["-m", "zoo.cli", "--help"],
    "zoo list": ["-m", "zoo.cli", "list"],
}


def cpu_seconds(arguments: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    taken = [{name: cpu_seconds(command) for name, command in COMMANDS.items()} for _ in range(rounds + 1)]
    print(f"{'':16}{'median':>8}{'least':>8}{'most':>8}   seconds of a processor")
    for name in COMMANDS:
        found = [one[name] for one in taken[1:]]  # the first round compiles
        print(f"{name:16}{statistics.median(found):8.2f}{min(found):8.2f}{max(found):8.2f}")


if __name__ == "__main__":
    main()
