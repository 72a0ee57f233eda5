"""The C++ engine: against the NumPy one, on every instruction set here; its limits, threads and signals."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from textwrap import dedent
from typing import Any, Literal

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from tests.native_fuzz.models import (
    LAYOUTS,
    LLAMA,
    MISTRAL,
    MPT,
    instruction_sets,
    random_model,
    random_product,
)
from tests.process import QUIET, ROOT
from zoo.errors import FormatError, NumericsError, StoreError, UsageError
from zoo.runner import native
from zoo.runner.native import NativeEngine
from zoo.runner.numpy_engine import NumpyEngine
from zoo.runner.packed import Architecture, Packed

if not native.AVAILABLE:
    pytest.skip(native.WHY_NOT, allow_module_level=True)

Floats = NDArray[np.float32]
ARCHITECTURES = {"llama": LLAMA, "mistral": MISTRAL, "mpt": MPT}
TOLERANCE = 0.03  # of the range of the logits: random weights do not forgive 8-bit activations much
CONTEXT = 400
IDS = np.random.default_rng(1).integers(0, LLAMA.vocabulary, CONTEXT).astype(np.int32)


ISAS = instruction_sets()


def test_the_fast_instruction_sets_are_there() -> None:
    """Or the tests below would pass without them."""
    assert "scalar" in ISAS and native._native.best_isa() in ISAS
    cpu = Path("/proc/cpuinfo")
    flags = set(cpu.read_text().split()) if cpu.exists() else set()
    assert ("avx2" in ISAS) == ({"avx2", "fma", "f16c", "popcnt"} <= flags)
    if "avx512" in ISAS:
        assert {"avx512_vnni", "avx512_vbmi2"} <= flags
    if "asimddp" in flags:
        assert "neon" in ISAS


def forward(
    engine: NativeEngine | NumpyEngine,
    ids: Sequence[int] | NDArray[np.int32],
    start: int = 0,
    slot: int = 0,
    last: int | None = None,
) -> Floats:
    """Logits after every token, or after the `last` few."""
    count = len(ids)
    return engine.forward(
        np.array(ids, np.int32),
        np.full(count, slot, np.int32),
        np.arange(start, start + count, dtype=np.int32),
        np.arange(0 if last is None else count - last, count, dtype=np.int32),
    )


def close(found: Floats, expected: Floats, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.ptp(expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def model(folder: Path, family: str = "llama", layout: str = "banded 8:16, 5 + 3 bits") -> Packed:
    path = folder / f"{family} {layout}".replace(":", "-").replace(" ", "_")
    if not path.exists():
        random_model(path, ARCHITECTURES[family], LAYOUTS[layout])
    return Packed(path)


# --- one product ------------------------------------------------------------------------------------

OUTLIER = 3.5  # times the root mean square: beyond it, what rounding leaves of 32 activations is kept too


def rounded(x: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Activations (tokens, columns) as the kernels have them, and the largest step between two."""
    padded = np.zeros((len(x), -(-x.shape[1] // 32), 32))
    padded.reshape(len(x), -1)[:, : x.shape[1]] = x
    largest = np.abs(padded).max(2, keepdims=True)
    step = np.maximum(largest / 127, 1e-30)
    first = np.rint(padded / step) * step
    fine = step / 254
    second = np.rint((padded - first) / fine) * fine
    outlier = largest > OUTLIER * np.sqrt(np.square(x).mean(1))[:, None, None]
    both = first + np.where(outlier, second, 0)
    return both.reshape(len(x), -1)[:, : x.shape[1]], float(np.where(outlier, fine, step).max())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_against_float64(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes around every edge of rows, columns, groups and tokens."""
    shapes = ((1, 1), (16, 32), (17, 33), (15, 31), (31, 63), (40, 64), (33, 97), (64, 160), (50, 576))
    for seed, (rows, columns) in enumerate(shapes):
        group = (32, 64, 128, 0)[seed % 4]
        packed, normed, head = random_product(
            tmp_path / "m", rows, columns, LAYOUTS[layout], group=group, seed=seed
        )
        x, step = rounded(normed)
        expected = x @ head.T
        ids = np.random.default_rng(seed).integers(0, rows, 140)
        for isa in ISAS:
            monkeypatch.setattr(native, "ISA", isa)
            engine = NativeEngine(packed, context=140, threads=1 + seed % 3)
            for tokens in (1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 64, 140):
                off = np.abs(forward(engine, ids[:tokens]) - expected[ids[:tokens]])
                # Float32 may round a few activations the other way.
                assert off.max() <= 2 * step * np.abs(head).max() + 1e-5, (isa, rows, columns, tokens)
                root = np.sqrt(np.square(off).mean())
                assert root <= 1e-4 * np.abs(expected).max() + 1e-5, (isa, rows, columns, tokens)


# --- the same as NumPy ------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [0, 32, 64, 128])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_on_every_instruction_set(
    tmp_path: Path, layout: str, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt at once, then token by token: kernels for many tokens and for one."""
    packed = random_model(tmp_path / "m", LLAMA, LAYOUTS[layout], group=group, seed=group)
    expected = forward(NumpyEngine(packed, context=40), IDS[:36])
    for isa in ISAS:
        monkeypatch.setattr(native, "ISA", isa)
        engine = NativeEngine(packed, context=40, threads=2)
        assert engine._model.isa == isa
        close(forward(engine, IDS[:33]), expected[:33])
        single = np.concatenate([forward(engine, IDS[at : at + 1], at) for at in range(33, 36)])
        close(single, expected[33:])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("kv", ["f16", "int8"])
def test_every_family(
    folder: Path, family: str, isa: str, kv: Literal["f16", "int8"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 positions: several tiles of a prompt, and far more than a sliding window."""
    packed = model(folder, family, "dense 8")
    expected = forward(NumpyEngine(packed, context=CONTEXT), IDS[:300])
    monkeypatch.setattr(native, "ISA", isa)
    engine = NativeEngine(packed, context=CONTEXT, threads=2, kv=kv)
    close(forward(engine, IDS[:290]), expected[:290])
    close(forward(engine, IDS[290:300], 290), expected[290:])
    for start in (100, 31, 0):  # going back forgets what came behind
        close(forward(engine, IDS[start : start + 7], start), expected[start : start + 7])


@pytest.mark.parametrize("isa", ISAS)
def test_bits_that_pack_would_not_write(tmp_path: Path, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any byte but -128 is a weight, and where two slots name one column, it has their sum."""
    for layout in LAYOUTS:
        if layout.startswith("mask") or layout.endswith("8 + 4 bits"):
            continue  # of these some bytes are errors: more or fewer values, sums beyond 8 bits
        packed = random_model(tmp_path / "m", LLAMA, LAYOUTS[layout])
        data = bytearray(packed.path.read_bytes())
        rng = np.random.default_rng(2)
        for name, tensor in packed.tensors.items():
            if name.endswith(".values"):
                noise = rng.bytes(tensor.size)
                if packed.layouts[name.removesuffix(".values")].bits == 8:
                    noise = noise.replace(b"\x80", b"\x81")
                data[tensor.offset : tensor.offset + tensor.size] = noise
        packed.path.write_bytes(data)
        monkeypatch.setattr(native, "ISA", isa)
        engine = NativeEngine(packed, context=20, threads=1)
        expected = forward(NumpyEngine(packed, context=20), IDS[:9])
        close(forward(engine, IDS[:8]), expected[:8])
        close(forward(engine, IDS[8:9], 8), expected[8:])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("outer", ["dense 4", "dense 4 with zeros", "dense 6"])
def test_embeddings_and_head(tmp_path: Path, outer: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "ISA", isa)
    packed = random_model(tmp_path / "m", LLAMA, LAYOUTS["dense 8"], outer=LAYOUTS[outer])
    expected = forward(NumpyEngine(packed, context=20), IDS[:9])
    close(forward(NativeEngine(packed, context=20, threads=1), IDS[:9]), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "layout", ["dense 4", "dense 6", "banded 8:16, 5 + 3 bits", "planes 6:16, 4 + 2 bits", "mask 4"]
)
def test_awkward_sizes(tmp_path: Path, layout: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and columns that fill no block, heads that fill no vector, one of everything."""
    monkeypatch.setattr(native, "ISA", isa)
    for seed, changes in enumerate(
        (
            {"vocabulary": 17, "hidden": 33, "intermediate": 1, "heads": 3, "kv_heads": 3, "head_dim": 2},
            {"vocabulary": 1, "hidden": 1, "intermediate": 31, "heads": 1, "kv_heads": 1, "head_dim": 6},
            {"vocabulary": 100, "hidden": 170, "intermediate": 97, "heads": 4, "kv_heads": 1, "head_dim": 22},
            {"hidden": 64, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 160, "rope": None},
            {"hidden": 64, "layers": 1, "heads": 7, "kv_heads": 1, "head_dim": 5, "rope": None},
        )
    ):
        architecture = Architecture.model_validate(LLAMA.model_dump() | changes)
        packed = random_model(tmp_path / "m", architecture, LAYOUTS[layout], seed=seed)
        ids = IDS[:12] % architecture.vocabulary
        expected = forward(NumpyEngine(packed, context=12), ids)
        engine = NativeEngine(packed, context=12, threads=3)
        found = np.concatenate([forward(engine, ids[:11]), forward(engine, ids[11:], 11)])
        assert np.abs(found - expected).max() <= TOLERANCE * max(np.ptp(expected), np.abs(expected).max())


@pytest.mark.parametrize("isa", ISAS)
def test_slots_do_not_mix(folder: Path, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of different lengths in one call, chunks of prompts between single tokens."""
    monkeypatch.setattr(native, "ISA", isa)
    packed = model(folder, "mistral")
    rng = np.random.default_rng(3)
    texts = [rng.integers(0, 211, 120).astype(np.int32) for _ in range(4)]
    expected = [forward(NumpyEngine(packed, context=120), text) for text in texts]
    engine = NativeEngine(packed, slots=4, context=120, threads=2)
    done = [0] * 4
    while min(done) < 120:
        tokens, slots, positions = [], [], []
        for slot in rng.permutation(4):
            count = min(int(rng.choice([0, 1, 1, 40])), 120 - done[slot])
            tokens += texts[slot][done[slot] : done[slot] + count].tolist()
            slots += [int(slot)] * count
            positions += range(done[slot], done[slot] + count)
            done[slot] += count
        order = np.arange(len(tokens))[::-1]  # logits in the order that they are asked for, any
        wanted = rng.permutation(order)[: len(tokens) // 2 + 1]
        found = engine.forward(*(np.array(x, np.int32) for x in (tokens, slots, positions, wanted)))
        for at, row in zip(wanted, found, strict=True):
            full = expected[slots[at]]
            assert np.abs(row - full[positions[at]]).max() <= TOLERANCE * np.ptp(full)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_threads_change_nothing(folder: Path, family: str) -> None:
    packed = model(folder, family)
    results = []
    for threads in (1, 2, 3, 7):
        engine = NativeEngine(packed, context=200, threads=threads)
        results.append(np.concatenate([forward(engine, IDS[:150]), forward(engine, IDS[150:151], 150)]))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_what_is_wanted_may_repeat_or_be_nothing(folder: Path) -> None:
    engine = NativeEngine(model(folder), context=50)
    tokens, positions = IDS[:5], np.arange(5, dtype=np.int32)
    zeros = np.zeros(5, np.int32)
    full = forward(engine, tokens)
    found = engine.forward(tokens, zeros, positions, np.array([4, 0, 4], np.int32))
    close(found, full[[4, 0, 4]], 1e-6)
    assert engine.forward(tokens, zeros, positions, zeros[:0]).shape == (0, 211)
    nothing = zeros[:0]
    assert engine.forward(nothing, nothing, nothing, nothing).shape == (0, 211)


def test_rotations_that_grow_with_the_text(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}
    architecture = LLAMA.model_copy(update={"context": 20, "rope": rope})
    packed = random_model(tmp_path / "m", architecture, LAYOUTS["dense 8"])
    engine, reference = NativeEngine(packed, context=60, threads=1), NumpyEngine(packed, context=60)
    for start, end in ((0, 12), (12, 40), (40, 41), (41, 42)):
        close(forward(engine, IDS[start:end], start), forward(reference, IDS[start:end], start))


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens, slots, positions, wanted, word",
    [
        ([211], [0], [0], [0], "token 211"),
        ([-1], [0], [0], [0], "token -1"),
        ([2**31 - 1], [0], [0], [0], "token 2147483647"),
        ([5], [2], [0], [0], "slot 2"),
        ([5], [-1], [0], [0], "slot -1"),
        ([5], [0], [1], [0], "skipped"),
        ([5], [0], [-1], [0], "position -1"),
        ([5, 6], [0, 0], [0, 2], [0], "skipped"),
        ([5, 6], [0, 0], [0, 0], [0], "skipped"),
        ([5] * 17, [0] * 17, list(range(17)), [0], "position 16"),
        ([5], [0], [0], [1], "wanted 1"),
        ([5], [0], [0], [-1], "wanted -1"),
        ([5, 6], [0], [0], [0], "as many"),
        ([[5]], [[0]], [[0]], [0], "as many"),
    ],
)
def test_a_wrong_call_is_refused_and_harms_nothing(
    folder: Path, tokens: list[int], slots: list[int], positions: list[int], wanted: list[int], word: str
) -> None:
    engine = NativeEngine(model(folder), slots=2, context=16, threads=1)
    before = forward(engine, IDS[:4], slot=1)
    with pytest.raises(UsageError, match=word):
        engine.forward(*(np.array(x, np.int32) for x in (tokens, slots, positions, wanted)))
    np.testing.assert_array_equal(forward(engine, IDS[3:4], 3, slot=1).argmax(1), before[3:].argmax(1))
    np.testing.assert_array_equal(forward(engine, IDS[:4]), before)


def test_an_unknown_instruction_set_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for isa in ("avx9000", "", "neon" if "neon" not in ISAS else "avx2"):
        monkeypatch.setattr(native, "ISA", isa)
        if not isa:
            assert NativeEngine(model(folder), context=8)._model.isa == native._native.best_isa()
            continue
        with pytest.raises(UsageError, match=isa) as caught:
            NativeEngine(model(folder), context=8)
        assert "ZOO_ISA" in str(caught.value)


def test_the_instruction_set_is_forced_by_the_environment() -> None:
    for isa in ISAS:
        found = python("from zoo.runner import native; print(native.ISA)", environment={"ZOO_ISA": isa})
        assert found.split() == [isa]


@pytest.mark.parametrize(
    "options, word",
    [
        ({"slots": 2**31}, "memory"),
        ({"context": 2**40}, "memory"),
        ({"slots": 2**20, "context": 2**28, "kv": "int8"}, "memory"),
        ({"threads": 1025}, "threads"),
        ({"threads": 2**40}, "threads"),
        ({"threads": 1000}, "threads"),
    ],
)
def test_more_than_there_can_be_is_refused(folder: Path, options: dict[str, Any], word: str) -> None:
    """In a process of its own, which has no room for the stacks of 1,000 threads."""
    code = """
        import psutil, resource, sys
        from pathlib import Path
        from zoo.errors import UsageError
        from zoo.runner.native import NativeEngine
        from zoo.runner.packed import Packed

        room = psutil.Process().memory_info().vms + 2**30
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
        packed = Packed(Path(sys.argv[1]))
        try:
            NativeEngine(packed, **({"context": 16} | eval(sys.argv[2])))
        except UsageError as error:
            print(error)
        NativeEngine(packed, context=16, threads=2)
        """
    assert word in python(code, str(model(folder).path), repr(options))


def changed(packed: Packed, tensor: str, at: int, data: bytes, path: Path) -> Packed:
    """A copy with other bytes, `at` bytes into a tensor."""
    content = bytearray(packed.path.read_bytes())
    start = packed.tensors[tensor].offset + at
    content[start : start + len(data)] = data
    path.write_bytes(content)
    return Packed(path)


@pytest.mark.parametrize("half", [b"\x00\x7c", b"\x00\xfc", b"\x01\x7e"], ids=["inf", "-inf", "nan"])
@pytest.mark.parametrize("tensor", ["embed.scales", "layers.1.down.scales", "layers.0.q.minima"])
def test_scales_that_are_no_numbers_are_refused(
    folder: Path, tmp_path: Path, tensor: str, half: bytes
) -> None:
    packed = model(folder, layout="dense 4 with zeros")
    for at in (0, packed.tensors[tensor].size - 2):
        with pytest.raises(FormatError, match=tensor.rpartition(".")[0]):
            NativeEngine(changed(packed, tensor, at, half, tmp_path / "x"), context=8)


@pytest.mark.parametrize("tensor", ["layers.0.q.bias", "norm.weight", "layers.1.mlp_norm.bias"])
def test_vectors_that_are_no_numbers_are_refused(folder: Path, tmp_path: Path, tensor: str) -> None:
    packed = model(folder, "mpt")
    nan = np.array([np.nan], np.float32).tobytes()
    for at in (0, packed.tensors[tensor].size - 4):
        with pytest.raises(FormatError, match=r"norm|bias"):
            NativeEngine(changed(packed, tensor, at, nan, tmp_path / "x"), context=8)


@pytest.mark.parametrize("layout", ["mask 4", "mask 8"])
def test_masks_that_select_another_number_of_values_are_refused(
    folder: Path, tmp_path: Path, layout: str
) -> None:
    packed = model(folder, layout=layout)
    size = packed.tensors["layers.1.up.mask"].size
    for at, data in ((0, b"\xff" * size), (0, b"\0" * size), (size - 8, b"\xff" * 8)):
        with pytest.raises(FormatError, match=r"layers\.1\.up"):
            NativeEngine(changed(packed, "layers.1.up.mask", at, data, tmp_path / "x"), context=8)


def test_embeddings_that_are_not_dense_are_refused(tmp_path: Path) -> None:
    from zoo.runner.format import Layout, pack
    from zoo.runner.packed import Text, packed_writer

    layouts = {
        name: Layout("mask" if name == "embed" else "dense", *shape, bits=8, group=32)
        for name, shape in LLAMA.matrices.items()
    }
    with packed_writer(tmp_path / "m", LLAMA, layouts, Text()) as writer:
        for name, layout in layouts.items():
            q = np.ones((layout.rows, layout.columns), int)
            writer.matrix(name, pack(layout, q, np.ones((layout.rows, layout.groups))))
        writer.vectors((f"{name}.weight", np.ones(96)) for name in LLAMA.norms)
    with pytest.raises(FormatError, match="embeddings"):
        NativeEngine(Packed(tmp_path / "m"), context=8)


def test_logits_that_overflow_are_refused(folder: Path, tmp_path: Path) -> None:
    packed = model(folder)
    huge = np.full(96, 3e38, np.float32).tobytes()
    engine = NativeEngine(changed(packed, "norm.weight", 0, huge, tmp_path / "x"), context=8)
    with pytest.raises(NumericsError, match="NaN"):
        forward(engine, IDS[:3])


def test_a_file_that_was_cut_or_went_away_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(model(folder).path.read_bytes())
    packed = Packed(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(StoreError, match="shorter"):
        NativeEngine(packed, context=8)
    path.unlink()
    with pytest.raises(StoreError, match="cannot open"):
        NativeEngine(packed, context=8)


def test_a_file_is_not_kept_open(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(model(folder).path.read_bytes())
    engine = NativeEngine(Packed(path), context=8)
    gc.collect()
    process = psutil.Process()
    assert not [f for f in process.open_files() if f.path == str(path)]
    assert not [m for m in process.memory_maps() if m.path == str(path)]
    path.unlink()
    forward(engine, IDS[:3])


# --- threads, processes and signals -----------------------------------------------------------------

BUSY = """
import os, signal, sys, threading, time
from pathlib import Path
import numpy as np
from zoo.errors import UsageError
from zoo.runner.native import NativeEngine
from zoo.runner.packed import Packed

signal.signal(signal.SIGINT, signal.default_int_handler)
packed = Packed(Path(sys.argv[1]))

def forward(engine, count, start=0):
    where = np.arange(start, start + count, dtype=np.int32)
    last = np.array([count - 1], np.int32)
    return engine.forward(where * 7 % 211, np.zeros(count, np.int32), where, last)
"""


def python(code: str, *arguments: str, environment: dict[str, str] | None = None, timeout: float = 60) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", dedent(code), *arguments],
        cwd=ROOT,
        env=os.environ | QUIET | (environment or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_others_run_while_it_computes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "ISA", "scalar")
    engine = NativeEngine(model(folder, "mpt"), context=2000, threads=1)
    ticks: list[float] = []
    over = threading.Event()

    def tick() -> None:
        while not over.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    ticking = threading.Thread(target=tick)
    ticking.start()
    # So few tokens that it asks for signals in the end only: the lock is not given back to be taken again.
    begin = time.perf_counter()
    for at in range(40):
        forward(engine, IDS[at * 8 : at * 8 + 8], at * 8)
    seconds = time.perf_counter() - begin
    over.set()
    ticking.join()
    inside = [t for t in ticks if begin < t < begin + seconds]
    assert len(inside) > 20 * seconds and np.diff(inside).max() < seconds / 3


def test_two_models_in_two_threads(folder: Path) -> None:
    packed = [model(folder, "llama"), model(folder, "mpt", "mask 4")]
    alone = [forward(NativeEngine(p, context=CONTEXT, threads=2), IDS[:300]) for p in packed]
    engines = [NativeEngine(p, context=CONTEXT, threads=2) for p in packed]
    wrong: list[int] = []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(5) if not np.array_equal(forward(engines[i], IDS[:300]), alone[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_one_model_in_two_threads(folder: Path) -> None:
    """Each has a slot of its own; calls wait for one another."""
    engine = NativeEngine(model(folder), slots=2, context=CONTEXT, threads=2)
    alone = forward(engine, IDS[:200])
    wrong: list[int] = []

    def work(slot: int) -> None:
        for _ in range(5):
            wrong.extend([slot] * (not np.array_equal(forward(engine, IDS[:200], slot=slot), alone)))

    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_ctrl_c_ends_a_long_prompt_at_once(folder: Path, tmp_path: Path) -> None:
    architecture = LLAMA.model_copy(update={"hidden": 512, "intermediate": 2048, "layers": 6})
    packed = random_model(tmp_path / "m", architecture, LAYOUTS["dense 8"])
    code = (
        BUSY
        + """
engine = NativeEngine(packed, context=4096, threads=2)
expected = forward(NativeEngine(packed, context=4096, threads=2), 50)
print("ready", flush=True)
try:
    while True:
        forward(engine, 4096)
        print("not interrupted in time", flush=True)
except KeyboardInterrupt:
    print("ended", time.monotonic(), flush=True)
assert np.array_equal(forward(engine, 50), expected)
assert np.array_equal(forward(engine, 1, 50), forward(engine, 1, 50))
print("works", flush=True)
"""
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(packed.path)],
        cwd=ROOT,
        env=os.environ | QUIET | {"ZOO_ISA": "scalar"},
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.3)
        sent = time.monotonic()
        child.send_signal(signal.SIGINT)
        word, _, when = child.stdout.readline().partition(" ")
        assert word == "ended"
        assert float(when) - sent < 1.0
        assert child.stdout.readline() == "works\n"
        assert child.wait(30) == 0


def test_a_forked_process_neither_hangs_nor_computes(folder: Path) -> None:
    """A process has none of its parent's threads."""
    code = (
        BUSY
        + """
engine = NativeEngine(packed, context=64, threads=3)
expected = forward(engine, 20)
for use in (False, True):
    pid = os.fork()
    if pid == 0:
        if use:
            try:
                forward(engine, 20)
                print("it ran")
            except UsageError as error:
                print("refused:", error, flush=True)
            own = NativeEngine(packed, context=64, threads=3)
            print(np.array_equal(forward(own, 20), expected), flush=True)
        del engine
        sys.exit(3)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
print(np.array_equal(forward(engine, 20), expected))
"""
    )
    lines = python(code, str(model(folder).path)).splitlines()
    assert lines[0] == "3"
    assert lines[1].startswith("refused: ") and "process" in lines[1]
    assert lines[-3:] == ["True", "3", "True"]


def test_nothing_leaks(folder: Path) -> None:
    """1,000 generations, then 150 models."""
    code = (
        BUSY
        + """
import psutil
def resident():
    return psutil.Process().memory_info().rss
engine = NativeEngine(packed, context=64, threads=2)
def generate():
    forward(engine, 20)
    for at in range(20, 25):
        forward(engine, 1, at)
def load():
    forward(NativeEngine(packed, context=64, threads=2), 5)
for what, times in ((generate, 1000), (load, 150)):
    for _ in range(times // 10):
        what()
    before = resident()
    for _ in range(times):
        what()
    print(resident() - before)
print(len(os.listdir("/proc/self/fd")), threading.active_count(), len(os.listdir("/proc/self/task")))
"""
    )
    generated, loaded, rest = python(code, str(model(folder).path)).splitlines()
    assert int(generated) < 500_000
    assert int(loaded) < 1_000_000
    files, _, tasks = map(int, rest.split())
    assert files < 10 and tasks <= 2
