"""Hostile and damaged headers are refused; what is let through opens in other people's readers."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from zoo.errors import FormatError
from zoo.formats import check_gguf, check_safetensors

GENERATOR = np.random.default_rng(0)


def small_gguf(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.add_uint64("some.number", 2**40)
    writer.add_bool("some.flag", True)
    writer.add_array("some.flags", [True, False])
    writer.add_array("some.floats", [0.5, 1.5])
    writer.add_token_list([f"token{i}" for i in range(12)])
    writer.add_tensor("a.weight", GENERATOR.normal(size=(4, 32)).astype(np.float32))
    writer.add_tensor("b.weight", GENERATOR.normal(size=(2, 64)).astype(np.float16))
    quantized = gguf.quantize(
        GENERATOR.normal(size=(3, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0
    )
    writer.add_tensor("c.weight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def small_safetensors(path: Path) -> Path:
    tensors = {
        "a.weight": GENERATOR.normal(size=(4, 8)).astype(np.float32),
        "b.weight": GENERATOR.normal(size=(3, 2)).astype(np.float16),
        "c": np.arange(5, dtype=np.int64),
        "nothing": np.zeros((0, 7), np.float32),
    }
    save_file(tensors, path, metadata={"format": "pt", "made": "here"})
    return path


def test_lists_what_the_other_readers_list(tmp_path: Path) -> None:
    path = small_gguf(tmp_path / "small.gguf")
    tensors = {t.name: (t.data_offset, t.n_bytes, t.tensor_type.name) for t in gguf.GGUFReader(path).tensors}
    assert {t.name: (t.offset, t.size, t.dtype) for t in check_gguf(path)} == tensors
    assert [t.shape for t in check_gguf(path)] == [(4, 32), (2, 64), (3, 64)]

    path = small_safetensors(tmp_path / "small.safetensors")
    data = path.read_bytes()
    with safe_open(path, "numpy") as file:
        assert {t.name for t in check_safetensors(path)} == set(file.keys())
        for tensor in check_safetensors(path):
            stored = file.get_tensor(tensor.name)
            assert stored.shape == tensor.shape
            assert stored.tobytes() == data[tensor.offset : tensor.offset + tensor.size]


def open_gguf(path: Path) -> None:
    for tensor in gguf.GGUFReader(path).tensors:
        tensor.data.sum(dtype=np.float64)


def open_safetensors(path: Path) -> None:
    with safe_open(path, "numpy") as file:
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            file.get_slice(name).get_shape()


def mutations(whole: bytes, header: int, count: int) -> list[bytes]:
    """Flipped bytes, cuts, and length fields made huge; mostly in the header, where lengths are."""
    bombs = [struct.pack("<Q", n) for n in (0, 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)]
    found = []
    for i in range(count):
        data = bytearray(whole)
        at = int(GENERATOR.integers(header if i % 10 else len(whole)))
        match i % 4:
            case 0:
                data[at] ^= 1 << int(GENERATOR.integers(8))
            case 1:
                data[at] = int(GENERATOR.integers(256))
            case 2:
                data[at : at + 8] = bombs[int(GENERATOR.integers(len(bombs)))]
            case 3 if i % 8 == 3:
                del data[at:]
            case _:
                del data[at : at + int(GENERATOR.integers(1, 16))]
        found.append(bytes(data))
    return found


@pytest.mark.parametrize(
    ("make", "check", "open_elsewhere"),
    [(small_gguf, check_gguf, open_gguf), (small_safetensors, check_safetensors, open_safetensors)],
    ids=["gguf", "safetensors"],
)
def test_fuzz(
    tmp_path: Path,
    make: Callable[[Path], Path],
    check: Callable[[Path], list[object]],
    open_elsewhere: Callable[[Path], None],
) -> None:
    """Every mutation is refused with FormatError, or is sound for the other reader too."""
    whole = make(tmp_path / "whole").read_bytes()
    header = min(getattr(tensor, "offset") for tensor in check(tmp_path / "whole"))  # noqa: B009
    path = tmp_path / "mutation"
    passed = 0
    for data in mutations(whole, header, 3000):
        path.write_bytes(data)
        began = time.perf_counter()
        try:
            check(path)
        except FormatError as error:
            assert str(error)
        else:
            passed += 1
            open_elsewhere(path)
        assert time.perf_counter() - began < 5
    assert 50 < passed < 2700  # the test saw both outcomes


def header(value: object, data: bytes = b"") -> bytes:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text + data


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"\x08", "length"),
        ((2**63).to_bytes(8, "little") + b"{}", "length"),
        (header(b"[]"), "not a JSON object"),
        (header(b'{"a": ' + b"[" * 100_000 + b"}"), "not JSON"),
        (header(b'{"a":1,"a":2}'), "twice"),
        (header({"a": ONE | {"dtype": "F31"}}, b"1234"), "dtype"),
        (header({"a": ONE | {"shape": [2]}}, b"1234"), "8 bytes"),
        (header({"a": ONE | {"shape": [2**62, 4]}}, b"1234"), "2\\^63"),
        (header({"a": ONE | {"shape": [1.0]}}, b"1234"), "shape"),
        (header({"a": ONE, "b": ONE}, b"1234"), "overlaps"),
        (header({"a": ONE | {"data_offsets": [4, 8]}}, b"12345678"), "hole"),
        (header({"a": ONE}, b"123"), "cut short"),
        (header({"a": ONE}, b"12345"), "too long"),
        (header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', b"1234"), "out of range"),
        (header(b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"), "Unicode"),
    ],
)
def test_safetensors_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=says):
        check_safetensors(path)


def gguf_bytes(
    *, keys: bytes = b"", key_count: int = 0, tensors: bytes = b"", tensor_count: int = 0
) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensor_count, key_count) + keys + tensors


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def tensor(name: str, dimensions: list[int], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<{len(dimensions)}Q", *dimensions)
    return text(name) + struct.pack("<I", len(dimensions)) + sizes + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"GGML" + bytes(20), "begin"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version"),
        (gguf_bytes(tensor_count=2**60), "count"),
        (gguf_bytes(key_count=2**64 - 1), "count"),
        (gguf_bytes(keys=text("k") + struct.pack("<IIQ", 9, 8, 2**61), key_count=1), "count"),
        (gguf_bytes(keys=text("k") + struct.pack("<IIQ", 9, 4, 2**62), key_count=1), "past the end"),
        (gguf_bytes(keys=text("k") + struct.pack("<IIQ", 9, 9, 1), key_count=1), "array of arrays"),
        (gguf_bytes(keys=text("k") + struct.pack("<II", 99, 0), key_count=1), "unknown type"),
        (gguf_bytes(keys=2 * (text("k") + struct.pack("<II", 4, 0)), key_count=2), "twice"),
        (gguf_bytes(keys=text("general.alignment") + struct.pack("<II", 4, 24), key_count=1), "power of two"),
        (gguf_bytes(tensors=tensor("t", [2**32, 2**32]) + bytes(64), tensor_count=1), "2\\^63"),
        (gguf_bytes(tensors=tensor("t", [0]) + bytes(64), tensor_count=1), "2\\^63"),
        (gguf_bytes(tensors=tensor("t", [8] * 5) + bytes(64), tensor_count=1), "dimensions"),
        (gguf_bytes(tensors=tensor("t", [4], kind=999) + bytes(64), tensor_count=1), "unknown type"),
        (gguf_bytes(tensors=tensor("t", [33], kind=8) + bytes(64), tensor_count=1), "block of 32"),
        (gguf_bytes(tensors=tensor("t", [4], offset=7) + bytes(64), tensor_count=1), "aligned"),
        (gguf_bytes(tensors=tensor("t", [99]) + bytes(64), tensor_count=1), "past the end"),
        (gguf_bytes(tensors=2 * tensor("t", [4]) + bytes(64), tensor_count=2), "twice"),
        (gguf_bytes(tensors=tensor("t", [4]) + tensor("u", [4]) + bytes(64), tensor_count=2), "overlap"),
    ],
)
def test_gguf_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=says):
        check_gguf(path)


def test_a_long_header_takes_linear_time(tmp_path: Path) -> None:
    """Two hundred thousand names, the last one twice: refused in seconds, not hours."""
    names = [f"t{i}" for i in range(200_000)]
    entries = ",".join(f'"{name}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for name in names)
    path = tmp_path / "long.safetensors"
    path.write_bytes(header(f'{{{entries},"t199999":0}}'.encode()))
    began = time.perf_counter()
    with pytest.raises(FormatError, match="twice"):
        check_safetensors(path)
    assert time.perf_counter() - began < 20


def test_missing_file(tmp_path: Path) -> None:
    for check in (check_gguf, check_safetensors):
        with pytest.raises(FormatError, match="no file"):
            check(tmp_path / "absent")
