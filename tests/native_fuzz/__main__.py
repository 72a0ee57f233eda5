"""Load and run mutated packed files: each is refused with a ZooError, or its logits are finite.

    python -m tests.native_fuzz FOLDER MUTATIONS SEED [EXTENSION]

FOLDER is for the files; the one that is being tried stays there if the process dies, and so does one that
raised another error. EXTENSION: the library to try instead of the installed one, as a sanitized build.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from tests.native_fuzz.models import LAYOUTS, LLAMA, MISTRAL, MPT, random_model
from zoo.errors import ZooError
from zoo.runner.packed import Packed

SMALL = {"vocabulary": 20, "hidden": 40, "intermediate": 36, "heads": 2, "kv_heads": 1, "head_dim": 8}
ODD_NUMBERS = (0, 1, -1, 2, 3, 15, 16, 17, 31, 32, 33, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**63, 2**64)
WORDS = ("", "scalar", "U8", "F16", "U64", "dense", "planes", "mask", "dynamic", "yarn", "mpt")
ODD_VALUES = (*ODD_NUMBERS, *WORDS, 1e300, 1e-45, None, True, [], {})


def use(extension: Path) -> None:
    """Let `extension` be the module zoo.runner._native."""
    import zoo.runner

    spec = importlib.util.spec_from_file_location("zoo.runner._native", extension)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["zoo.runner._native"] = module
    spec.loader.exec_module(module)
    zoo.runner._native = module  # type: ignore[attr-defined]


def inside(rng: np.random.Generator, value: Any) -> Any:
    """A JSON value with one thing in it changed; text that is JSON itself is changed inside."""
    if isinstance(value, str) and value.startswith("{"):
        return json.dumps(inside(rng, json.loads(value)))
    if isinstance(value, dict) and value and rng.random() < 0.97:
        keys = list(value)
        one, other = (keys[rng.integers(len(keys))] for _ in range(2))
        match rng.integers(12):
            case 0:
                value[one], value[other] = value[other], value[one]
            case 1:
                del value[one]
            case 2:
                value[one + "x"] = value[one]
            case _:
                value[one] = inside(rng, value[one])
        return value
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.integers(len(value))
        value[at] = inside(rng, value[at])
        return value
    if type(value) in (int, float) and rng.random() < 0.6:
        return value + [-64, -32, -16, -1, 1, 16, 32, 64][rng.integers(8)]
    return ODD_VALUES[rng.integers(len(ODD_VALUES))]


def mutated(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    start = 8 + length
    changed = bytearray(data)
    kind = rng.random()
    if kind < 0.4:  # the header says something else
        header = data[8:start]
        for _ in range(rng.integers(1, 4)):
            header = json.dumps(inside(rng, json.loads(header))).encode()
            if not header.startswith(b"{"):
                break
        return len(header).to_bytes(8, "little") + header + data[start:]
    if kind < 0.5:  # bits of the header
        for at in rng.integers(0, start, rng.integers(1, 4)):
            changed[at] ^= 1 << rng.integers(8)
    elif kind < 0.75:  # bits of the data
        for at in rng.integers(start, len(data), rng.integers(1, 30)):
            changed[at] ^= 1 << rng.integers(8)
    elif kind < 0.9:  # runs of bytes of another file, or of noise
        for _ in range(rng.integers(1, 4)):
            count = int(rng.integers(1, 200))
            to = int(rng.integers(start, len(data)))
            whence = int(rng.integers(0, len(other)))
            piece = other[whence : whence + count] if rng.random() < 0.7 else rng.bytes(count)
            piece = piece[: len(data) - to]
            changed[to : to + len(piece)] = piece
    elif kind < 0.95:  # cut off
        return data[: rng.integers(len(data))]
    else:  # the beginning of one file and the end of another
        at = int(rng.integers(len(data)))
        return data[:at] + other[at if rng.random() < 0.5 else int(rng.integers(len(other))) :]
    return bytes(changed)


def try_file(path: Path, isa: str = "scalar") -> str:
    """What became of it."""
    from zoo.runner import native
    from zoo.runner.engine import open_engine

    native.ISA = isa
    try:
        packed = Packed(path)
        engine = open_engine(packed, context=min(16, packed.architecture.context), threads=1)
        count = min(5, engine.context)
        where = np.arange(count, dtype=np.int32)
        ids = where % engine.architecture.vocabulary
        zeros = np.zeros(count, np.int32)
        logits = engine.forward(ids, zeros, where, where)
        if count < engine.context:
            one = np.array([0], np.int32)
            logits = np.concatenate([logits, engine.forward(one, one, one + count, one)])
    except ZooError as error:
        return type(error).__name__
    assert np.isfinite(logits).all()
    return "ran"


def main(folder: Path, mutations: int, seed: int, extension: Path | None = None) -> int:
    if extension is not None:
        use(extension)
    from tests.native_fuzz.models import instruction_sets

    isas = instruction_sets()
    rng = np.random.default_rng(seed)
    sound = []
    for i, (fields, family) in enumerate((f, a) for f in LAYOUTS.values() for a in (LLAMA, MISTRAL, MPT)):
        small = family.model_validate(family.model_dump() | SMALL | ({"layers": 1} if i % 3 else {}))
        made = random_model(folder / "sound", small, fields, seed=i)
        assert {try_file(made.path, isa) for isa in isas} == {"ran"}
        sound.append(made.path.read_bytes())
    # Half of each header is room for more: without it, more of what is changed means something.
    sound = [squeezed(data) for data in sound]
    path, became = folder / "mutated", Counter[str]()
    for i in range(mutations):
        one, other = (sound[at] for at in rng.integers(0, len(sound), 2))
        path.write_bytes(mutated(rng, one, other))
        try:
            became[try_file(path, isas[i % len(isas)])] += 1
        except Exception:
            path.rename(folder / f"failed-{seed}-{i}")
            traceback.print_exc()
            return 1
    print(json.dumps(became))
    return 0


def squeezed(data: bytes) -> bytes:
    start = 8 + int.from_bytes(data[:8], "little")
    header = data[8:start].rstrip()
    return len(header).to_bytes(8, "little") + header + data[start:]


if __name__ == "__main__":
    sys.exit(
        main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *(Path(path) for path in sys.argv[4:]))
    )
