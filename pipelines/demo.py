"""The second half of `make demo`: an entry goes to a zoo server of its own and comes back elsewhere.

    python -m pipelines.demo ID [PROMPT]

Starts `zoo serve`, pushes the entry to it, pulls it into an empty cache, store and registry, and generates
from what was pulled. All of it lies in a folder below the store that is removed at the end; a copy of the
registry takes the record of so short a publication.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ZOO = (sys.executable, "-m", "zoo.cli")
REGISTRY = Path(os.environ.get("ZOO_REGISTRY") or "registry.db").expanduser()
STORE = Path(os.environ.get("ZOO_STORE") or "~/.cache/sparse-zoo").expanduser()
PROMPT = "The best thing about small language models is"


def show(environment: Mapping[str, str], *arguments: str) -> None:
    """Say a command, then run it; what it prints goes to the terminal."""
    print(f"\n$ zoo {shlex.join(arguments)}", flush=True)
    done = subprocess.run([*ZOO, *arguments], env=os.environ | environment, check=False)
    if done.returncode:
        sys.exit(done.returncode)


@contextmanager
def server(store: Path) -> Iterator[Mapping[str, str]]:
    """A zoo server on a free port; yields the variables by which clients of the Hub use it."""
    create = [*ZOO, "token", "create", "--name", "demo", "--scope", "write", "--store", str(store)]
    token = subprocess.run(create, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[0]
    serve = [*ZOO, "serve", "--port", "0", "--store", str(store)]
    process = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            sys.exit("the server did not start")
        print(f"\n{line.strip()}", flush=True)
        yield {"HF_ENDPOINT": line.split()[2], "HF_TOKEN": token, "HF_HUB_OFFLINE": "0"}
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    entry_id, prompt = (*sys.argv[1:], PROMPT)[:2]
    STORE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="demo-", dir=STORE) as folder, server(Path(folder, "hub")) as hub:
        shutil.copyfile(REGISTRY, f"{folder}/made.db")
        show({**hub, "ZOO_REGISTRY": f"{folder}/made.db"}, "push", entry_id)
        elsewhere = {
            "HF_HOME": f"{folder}/huggingface",
            "ZOO_STORE": f"{folder}/store",
            "ZOO_REGISTRY": f"{folder}/registry.db",
        }
        show({**hub, **elsewhere}, "pull", entry_id)
        show({**hub, **elsewhere}, "generate", entry_id, prompt, "--max-tokens", "48")


if __name__ == "__main__":
    main()
