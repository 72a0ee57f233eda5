"""A machine that finishes outputs and shares them: `python -m tests.store_machine FOLDER URL COUNT FILL`.

It says "ready", and begins when a line comes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from zoo.files import Store
from zoo.shared_store import open_store

BIG = 8_000_000


def finish(store: Store, key: str, weights: bytes) -> Path:
    """What every stage does: the output, made unless it is there."""
    with store.locked(key):
        if store.get(key) is None:
            with store.writing(key) as out:
                (out / "weights").write_bytes(weights)
                (out / "tokenizer").mkdir()
                (out / "tokenizer" / "vocab.json").write_text("{}")
                (out / "empty").touch()
    return store.path(key)


def key_of(number: int) -> str:
    return f"{number:064x}"


if __name__ == "__main__":
    folder, url, count, fill = sys.argv[1:]
    store = open_store(Path(folder), url)
    store.get("f" * 64)  # the connection is made
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(int(count)):
        finish(store, key_of(number), fill.encode() * BIG)
