"""The packed file: what was written is read, by safetensors too; what is not sound is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from tests.native_fuzz.models import LAYOUTS, LLAMA, MPT, random_model
from tests.process import QUIET, ROOT
from zoo.errors import FormatError
from zoo.runner import native
from zoo.runner.format import Layout, pack, unpack
from zoo.runner.packed import Architecture, Packed, Text, packed_writer

Header = dict[str, Any]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return random_model(tmp_path_factory.mktemp("m") / "m", LLAMA, LAYOUTS["banded 8:16, 5 + 3 bits"])


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return random_model(tmp_path_factory.mktemp("m") / "m", MPT, LAYOUTS["mask 4"])


# --- there and back ---------------------------------------------------------------------------------


def write(path: Path, text: Text, tokenizer: bytes | None) -> dict[str, np.ndarray[Any, Any]]:
    """A model of all kinds of layouts; what was written, by tensor."""
    rng = np.random.default_rng(0)
    architecture = LLAMA.model_copy(
        update={"rope": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}}
    )
    fields = [f for f in LAYOUTS.values() if not f.get("zeros")]
    layouts, written = {}, {}
    for i, (name, (rows, columns)) in enumerate(architecture.matrices.items()):
        layouts[name] = Layout(rows=rows, columns=columns, group=0, **fields[i if i else 0])
    with packed_writer(path, architecture, layouts, text) as writer:
        for name, layout in layouts.items():
            q = np.zeros((layout.rows, layout.columns), int)
            q[:, ::16] = rng.integers(-8, 8, q[:, ::16].shape)
            parts = pack(layout, q, rng.random((layout.rows, 1)))
            writer.matrix(name, parts)
            written |= {f"{name}.{part}": array for part, array in parts.items()}
        vectors = {f"{name}.weight": rng.random(96) for name in architecture.norms}
        writer.vectors(vectors.items())
        written |= {name: vector.astype(np.float32) for name, vector in vectors.items()}
        if tokenizer is not None:
            writer.tokenizer(tokenizer)
    assert Packed(path).architecture == architecture
    assert Packed(path).layouts == layouts
    return written


def test_what_is_written_is_read(tmp_path: Path) -> None:
    text = Text(eos=[2, 7], bos=1, chat_template="{{ 'ä\n\"' }}", special={"bos_token": "<s>"})
    tokenizer = "{tokenizer: ü\0}".encode()
    written = write(tmp_path / "m", text, tokenizer)
    packed = Packed(tmp_path / "m")
    assert packed.text == text
    assert packed.tokenizer_json == tokenizer
    assert packed.tensors.keys() == written.keys() | {"tokenizer.json"}
    for name, array in written.items():
        found = packed.read(name)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
    for name, layout in packed.layouts.items():
        expected = {part: written[f"{name}.{part}"] for part in layout.shapes}
        np.testing.assert_array_equal(unpack(layout, packed.parts(name))[0], unpack(layout, expected)[0])
    assert list(tmp_path.iterdir()) == [tmp_path / "m"]


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    written = write(tmp_path / "m", Text(), None)
    with safe_open(tmp_path / "m", "numpy") as file:
        assert set(file.keys()) == written.keys()
        for name, array in written.items():
            found = file.get_tensor(name)
            assert found.dtype == array.dtype
            np.testing.assert_array_equal(found, array)
        metadata = file.metadata()
    assert metadata["format"] == "zoo-packed" and metadata["format_version"] == "1"
    assert json.loads(metadata["architecture"])["rope"]["factor"] == 2.5
    assert Packed(tmp_path / "m").tokenizer_json is None
    header = int.from_bytes((tmp_path / "m").read_bytes()[:8], "little")
    assert (8 + header) % 64 == 0


def test_a_file_written_by_the_safetensors_library_is_read(packed: Packed, tmp_path: Path) -> None:
    """In its own order, by size of the types."""
    with safe_open(packed.path, "numpy") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors, tmp_path / "m", metadata=metadata)
    other = Packed(tmp_path / "m")
    assert (other.layouts, other.architecture) == (packed.layouts, packed.architecture)
    for name, array in tensors.items():
        np.testing.assert_array_equal(other.read(name), array)


def test_nothing_appears_when_writing_fails(packed: Packed, tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        packed_writer(tmp_path / "m", LLAMA, packed.layouts, Text()) as writer,
    ):
        writer.matrix("embed", packed.parts("embed"))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


# --- what is refused --------------------------------------------------------------------------------


def split(packed: Packed) -> tuple[Header, bytes]:
    data = packed.path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:]


def joined(path: Path, header: Header | str, data: bytes) -> Path:
    encoded = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return path


def refused(path: Path, *words: str) -> None:
    """With a FormatError that names the file, at once and without memory for what the file claims."""
    tracemalloc.start()
    try:
        with pytest.raises(FormatError) as caught:
            Packed(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20e6
    told = str(caught.value)
    assert str(path) in told and len(told) < 2000
    for word in words:
        assert word in told


def test_truncated_anywhere(masked: Packed, tmp_path: Path) -> None:
    data = masked.path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    ends = {0, 1, 7, 8, 9, length // 2, 7 + length, 8 + length, 9 + length, len(data) - 1}
    for tensor in masked.tensors.values():
        ends |= {tensor.offset, tensor.offset + tensor.size // 2, tensor.offset + tensor.size - 1}
    for end in sorted(ends):
        (tmp_path / "m").write_bytes(data[:end])
        refused(tmp_path / "m")
    for more in (b"\0", data):
        (tmp_path / "m").write_bytes(data + more)
        refused(tmp_path / "m")


def test_bits_flipped_in_the_header(masked: Packed, tmp_path: Path) -> None:
    """A number may change into another that is as good; all else is refused."""
    header, data = split(masked)
    joined(tmp_path / "m", header, data)
    Packed(tmp_path / "m")
    sound = (tmp_path / "m").read_bytes()
    length = len(sound) - len(data)
    random.seed(0)
    passed = 0
    for bit in [*range(64), *random.sample(range(64, 8 * length), 1500)]:
        changed = bytearray(sound)
        changed[bit // 8] ^= 1 << bit % 8
        (tmp_path / "m").write_bytes(changed)
        try:
            Packed(tmp_path / "m")
            passed += 1
        except FormatError:
            pass
    assert passed < 75


def edit(key: str, value: object) -> Callable[[Header], None]:
    """Set a.b.c of the header; what is a JSON text is edited inside."""

    def change(header: Header) -> None:
        *path, last = key.split("/")
        steps: list[Any] = [header]
        for name in path:
            inner = steps[-1][name]
            steps.append(json.loads(inner) if isinstance(inner, str) else inner)
        if value is None:
            del steps[-1][last]
        else:
            steps[-1][last] = value
        for i in reversed(range(len(path))):
            if isinstance(steps[i][path[i]], str):
                steps[i][path[i]] = json.dumps(steps[i + 1])

    return change


META = "__metadata__"
SHAPE = f"{META}/architecture"
LAYOUT = f"{META}/layouts/layers.0.q"


@pytest.mark.parametrize(
    "key, value, words",
    [
        (f"{META}/format", "gguf", "packed"),
        (f"{META}/format", None, "packed"),
        (f"{META}/format_version", "2", "update zoo"),
        (f"{META}/format_version", None, "(none)"),
        (f"{META}/architecture", None, "architecture"),
        (f"{META}/architecture", "[]", "describe"),
        (f"{META}/architecture", "{" * 5000, "describe"),
        (f"{META}/layouts", None, "layouts"),
        (f"{META}/layouts", "[1]", "describe"),
        (f"{META}/layouts", "nope", "describe"),
        (f"{META}/layouts", "[" * 100_000, "describe"),
        (f"{META}/text", None, "text"),
        (f"{META}/text", '{"eos": "x"}', "eos"),
        (f"{META}/text", '{"unknown": 1}', "unknown"),
        (f"{SHAPE}/family", "gpt", "family"),
        (f"{SHAPE}/surprise", 1, "surprise"),
        (f"{SHAPE}/layers", 3, "layers.2"),
        (f"{SHAPE}/layers", 1, "layers.1"),
        (f"{SHAPE}/layers", 0, "layers"),
        (f"{SHAPE}/layers", 2**40, "layers"),
        (f"{SHAPE}/layers", 4096, "layers"),
        (f"{SHAPE}/heads", 5, "share"),
        (f"{SHAPE}/kv_heads", 6, "wrong size"),
        (f"{SHAPE}/kv_heads", -2, "kv_heads"),
        (f"{SHAPE}/head_dim", 15, "rotated"),
        (f"{SHAPE}/hidden", 97, "wrong size"),
        (f"{SHAPE}/vocabulary", 1 << 24, "wrong size"),
        (f"{SHAPE}/vocabulary", (1 << 24) + 1, "vocabulary"),
        (f"{SHAPE}/tied", False, "head"),
        (f"{SHAPE}/gated", False, "gate"),
        (f"{SHAPE}/norm_eps", 0, "norm_eps"),
        (f"{SHAPE}/softmax_scale", "x", "softmax_scale"),
        (f"{SHAPE}/context", 2**31, "context"),
        (f"{SHAPE}/sliding_window", 2**31, "sliding_window"),
        (f"{SHAPE}/sliding_window", 0, "sliding_window"),
        (f"{SHAPE}/rope", [1], "rope"),
        (LAYOUT, None, "layers.0.q"),
        (LAYOUT, 7, "describe"),
        (f"{META}/layouts/layers.9.q", {}, "describe"),
        (f"{LAYOUT}/kind", "dense", "layout"),
        (f"{LAYOUT}/kind", ["dense"], "describe"),
        (f"{LAYOUT}/kind", None, "describe"),
        (f"{LAYOUT}/rows", 97, "wrong size"),
        (f"{LAYOUT}/rows", 2**40, "layout"),
        (f"{LAYOUT}/rows", "96", "integers"),
        (f"{LAYOUT}/columns", 95, "wrong size"),
        (f"{LAYOUT}/columns", 96.0, "integers"),
        (f"{LAYOUT}/bits", 4, "layout"),
        (f"{LAYOUT}/group", 64, "layers.0.q.scales"),
        (f"{LAYOUT}/group", 1, "layout"),
        (f"{LAYOUT}/group", True, "integers"),
        (f"{LAYOUT}/keep", 10, "layers.0.q.values"),
        (f"{LAYOUT}/keep", None, "describe"),
        (f"{LAYOUT}/zeros", 1, "truth"),
        (f"{LAYOUT}/zeros", True, "layout"),
        (f"{LAYOUT}/surprise", 1, "describe"),
        ("layers.0.q.values/dtype", "I8", "layers.0.q.values"),
        ("layers.0.q.scales/dtype", "BF16", "layers.0.q.scales"),
        ("layers.0.q.scales/shape", [6, 16, 3], "layers.0.q.scales"),
        ("layers.0.q.scales/shape", [288], "layers.0.q.scales"),
        ("layers.0.q.values/shape", [2**60], "layers.0.q.values"),
        ("layers.0.q.values/shape", [2**40, 2**40], "layers.0.q.values"),
        ("layers.0.q.values/shape", [-1], "range"),
        ("layers.0.q.values/data_offsets", [0, 2**62], "layers.0.q.values"),
        ("layers.0.q.bias/dtype", "I32", "layers.0.q.bias"),
        ("layers.0.q.bias/shape", [2, 48], "layers.0.q.bias"),
        ("norm.weight/shape", [96, 1], "norm.weight"),
        ("norm.weight", None, "norm.weight"),
        ("layers.1.down.scales", None, "layers.1.down.scales"),
    ],
)  # fmt: skip
def test_a_header_that_says_something_else(
    packed: Packed, tmp_path: Path, key: str, value: object, words: str
) -> None:
    header, data = split(packed)
    edit(key, value)(header)
    if value is None and "/" not in key:  # a tensor less, with no hole where it was
        sound, _ = split(packed)
        begin, end = sound[key]["data_offsets"]
        data = data[:begin] + data[end:]
        for name, tensor in header.items():
            if name != META and tensor["data_offsets"][0] >= end:
                tensor["data_offsets"] = [at - end + begin for at in tensor["data_offsets"]]
    refused(joined(tmp_path / "m", header, data), words)


@pytest.mark.parametrize(
    "name, dtype, words",
    [
        ("layers.0.q.minima", "F16", "no layout names"),
        ("layers.2.q.values", "U8", "no layout names"),
        ("norm.scale", "F32", "no layout names"),
        ("tokenizer.json", "F32", "tokenizer.json"),
        ("", "U8", "no layout names"),
        ("embed.mask", "U64", "no layout names"),
    ],
)
def test_a_tensor_more(packed: Packed, tmp_path: Path, name: str, dtype: str, words: str) -> None:
    header, data = split(packed)
    header[name] = {
        "dtype": dtype,
        "shape": [8],
        "data_offsets": [len(data), len(data) + 8 * int(dtype[1:]) // 8],
    }
    refused(joined(tmp_path / "m", header, data + bytes(int(dtype[1:]))), words)


def test_a_mask_of_another_shape(masked: Packed, tmp_path: Path) -> None:
    for part, shape in (("mask", [7, 6, 4]), ("mask", [168]), ("values", [2, None])):
        header, data = split(masked)
        tensor = header[f"layers.0.up.{part}"]
        size = tensor["shape"][-1]
        tensor["shape"] = [n if n else size // 2 for n in shape]
        refused(joined(tmp_path / "m", header, data), f"layers.0.up.{part}")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000])
def test_numbers_that_are_none(packed: Packed, tmp_path: Path, number: str) -> None:
    for key in ("logit_scale", "softmax_scale", "norm_eps", "vocabulary", "alibi_bias_max"):
        header, data = split(packed)
        edit(f"{SHAPE}/{key}", "NUMBER")(header)
        text = header[META]["architecture"].replace('"NUMBER"', number)
        header[META]["architecture"] = text
        refused(joined(tmp_path / "m", header, data), "describe")


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "m"
    refused(path, "no file")
    path.mkdir()
    refused(path)
    path.rmdir()
    for data in (b"", b"GGUF" + bytes(100), bytes(1000), b"\xff" * 1000, b"{}" * 100):
        path.write_bytes(data)
        refused(path)
    save_file({"x": np.zeros(3)}, path)
    refused(path, "zoo pack")
    joined(path, '{"__metadata__": {"format": "zoo-packed"}, "__metadata__": {}}', b"")
    refused(path, "twice")


def test_an_absurd_number_of_layers_is_refused_at_once(tmp_path: Path) -> None:
    """A header of 2 KB that describes a model of 27,000 matrices."""
    metadata = {
        "format": "zoo-packed",
        "format_version": "1",
        "architecture": Architecture(**LLAMA.model_dump() | {"layers": 4096}).model_dump_json(),
        "layouts": "{}",
        "text": "{}",
    }
    refused(joined(tmp_path / "m", {META: metadata}, b""), "matrices")


# --- mutations --------------------------------------------------------------------------------------


def fuzz(
    folder: Path, mutations: int, seed: int, *extension: Path, **environment: str
) -> subprocess.Popen[str]:
    folder = folder / str(seed)
    folder.mkdir()
    return subprocess.Popen(
        [sys.executable, "-m", "tests.native_fuzz", folder, str(mutations), str(seed), *extension],
        cwd=ROOT,
        env=os.environ | QUIET | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def check(process: subprocess.Popen[str], mutations: int) -> None:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-5000:]
    became = json.loads(out)
    assert sum(became.values()) == mutations
    assert became["ran"] > mutations / 10 and became["FormatError"] > mutations / 10


@pytest.mark.skipif(not native.AVAILABLE, reason=native.WHY_NOT)
def test_mutated_files_are_refused_or_run(tmp_path: Path) -> None:
    """Header, data, ends: what comes out is a ZooError or finite logits."""
    check(fuzz(tmp_path, 2000, 1), 2000)


@pytest.mark.real
def test_mutated_files_under_sanitizers(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """10^5 mutations, the extension built with AddressSanitizer and UndefinedBehaviorSanitizer."""
    if not shutil.which("g++"):
        pytest.skip("needs g++ to build with sanitizers")
    libraries = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        found = subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        if not Path(found).is_absolute():
            pytest.skip(f"needs {name} of g++")
        libraries.append(found)
    build = request.config.cache.mkdir("sanitized")  # type: ignore[union-attr]
    cmake = Path(sys.executable).parent / "cmake"
    configure = [cmake, "-S", ROOT, "-B", build, "-DZOO_SANITIZE=ON", "-DCMAKE_CXX_COMPILER=g++"]
    for command in (
        [*configure, f"-DPython_EXECUTABLE={sys.executable}"],
        [cmake, "--build", build, "-j2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (extension,) = build.glob("_native*.so")
    running = [
        # The interpreter is not sanitized, so the library comes first; what it leaks at its end is its own.
        fuzz(tmp_path, 50_000, seed, extension, LD_PRELOAD=" ".join(libraries), ASAN_OPTIONS="detect_leaks=0")
        for seed in (2, 3)
    ]
    for process in running:
        check(process, 50_000)
