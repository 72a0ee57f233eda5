"""Is this file what its name says? Headers of GGUF and safetensors files, checked before anything reads them.

A model file comes from outside, so every length and offset in it is a claim. These checks read the
header once, believe no claim beyond the file's own size, and hold no more than the header in memory.
What passes can be opened by `gguf.GGUFReader` and `safetensors.safe_open`.

Sources: the GGUF specification (ggml, docs/gguf.md) and the safetensors format (huggingface/safetensors).
"""

from __future__ import annotations

import json
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from zoo.errors import FormatError

GGUF_VERSIONS = (2, 3)
GGUF_MAX_DIMENSIONS = 4
GGUF_MAX_NAME = 63  # ggml keeps a tensor's name in 64 bytes
GGUF_DEFAULT_ALIGNMENT = 32
SAFETENSORS_MAX_HEADER = 100_000_000
# What may stand beside a model's weights: the scales behind them, and the same weights for the sparse runner.
SIDE_FILES = ("grid.safetensors", "packed.safetensors")
# What a model folder has beside its weights, and the terms it comes under.
COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer*.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
TERMS = ("LICENSE*", "NOTICE*", "USE_POLICY*")
MAX_ELEMENTS = 2**63 - 1

SAFETENSORS_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_GGUF_SCALAR_BYTES = {
    GGUFValueType.UINT8: 1, GGUFValueType.INT8: 1, GGUFValueType.BOOL: 1,
    GGUFValueType.UINT16: 2, GGUFValueType.INT16: 2,
    GGUFValueType.UINT32: 4, GGUFValueType.INT32: 4, GGUFValueType.FLOAT32: 4,
    GGUFValueType.UINT64: 8, GGUFValueType.INT64: 8, GGUFValueType.FLOAT64: 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies in its file. `shape` has the rows first, whatever the file's own order."""

    name: str
    dtype: str  # safetensors dtype ("BF16") or GGUF type ("Q4_K")
    shape: tuple[int, ...]
    offset: int  # of the first byte, from the start of the file
    size: int  # bytes


def _open(path: Path) -> mmap.mmap:
    """Map a regular, non-empty file for reading: only the pages that are looked at get read."""
    if not path.is_file():
        raise FormatError(f"there is no file {path}", try_="check the path")
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError as error:
        raise FormatError(f"{path} is empty", try_="download or make it again") from error


class _Cursor:
    """Reads little-endian values and moves on; never past the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.path = path
        self.at = 0

    def fail(self, what: str, *, saw: str, expected: str) -> FormatError:
        return FormatError(f"{self.path} is not a sound GGUF file: {what}", saw=saw, expected=expected)

    def skip(self, size: int, what: str) -> int:
        """Pass over `size` bytes; returns where they began."""
        start, left = self.at, len(self.data) - self.at
        if size > left:
            raise self.fail(
                f"{what} at byte {start} runs past the end of the file",
                saw=f"a length of {size} bytes",
                expected=f"at most the {left} bytes that are left",
            )
        self.at += size
        return start

    def u32(self, what: str) -> int:
        return int(struct.unpack_from("<I", self.data, self.skip(4, what))[0])

    def u64(self, what: str) -> int:
        return int(struct.unpack_from("<Q", self.data, self.skip(8, what))[0])

    def text(self, what: str) -> str:
        length = self.u64(f"the length of {what}")
        start = self.skip(length, what)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError as error:
            raise self.fail(
                f"{what} at byte {start} is not UTF-8", saw=str(error), expected="UTF-8 text"
            ) from error

    def value_type(self, what: str) -> GGUFValueType:
        number = self.u32(f"the type of {what}")
        try:
            return GGUFValueType(number)
        except ValueError as error:
            raise self.fail(
                f"{what} has an unknown type", saw=f"type {number}", expected="a type from 0 to 12"
            ) from error

    def booleans(self, count: int, what: str) -> None:
        start = self.skip(count, what)
        # A byte that is neither 0 nor 1 is undefined behaviour in a reader that views it as a bool.
        if self.data[start : self.at].strip(b"\0\1"):
            raise self.fail(
                f"{what} at byte {start} holds a bad boolean", saw="a byte > 1", expected="0 or 1"
            )

    def value(self, kind: GGUFValueType, what: str) -> None:
        """Pass over one metadata value."""
        if kind == GGUFValueType.STRING:
            self.text(what)
        elif kind == GGUFValueType.BOOL:
            self.booleans(1, what)
        elif kind != GGUFValueType.ARRAY:
            self.skip(_GGUF_SCALAR_BYTES[kind], what)
        else:
            self.array(what)

    def array(self, what: str) -> None:
        kind = self.value_type(f"the elements of {what}")
        count = self.u64(f"the length of {what}")
        if kind == GGUFValueType.ARRAY:
            raise self.fail(f"{what} is an array of arrays", saw="nesting", expected="a flat array")
        if kind == GGUFValueType.BOOL:
            self.booleans(count, what)
        elif kind != GGUFValueType.STRING:
            self.skip(count * _GGUF_SCALAR_BYTES[kind], what)
        else:
            self.must_fit(count, 8, f"{what}")
            for _ in range(count):
                self.text(what)

    def must_fit(self, count: int, least: int, what: str) -> None:
        """Refuse a count that the rest of the file could not hold, at `least` bytes apiece."""
        left = len(self.data) - self.at
        if count * least > left:
            raise self.fail(
                f"the count of {what} cannot be true",
                saw=f"{count}, so at least {count * least} bytes",
                expected=f"at most the {left} bytes that are left",
            )


def check_gguf(path: Path) -> list[TensorInfo]:
    """Check the whole header of a GGUF file (version 2 or 3, little endian) and list its tensors.

    Raises FormatError that says what was found where. Time is linear in the header, and nothing
    larger than one string of the header is copied.
    """
    with _open(path) as data:
        at = _Cursor(data, path)
        if (magic := data[at.skip(4, "the magic number") : 4]) != b"GGUF":
            raise at.fail("it does not begin as one", saw=repr(magic), expected="b'GGUF'")
        if (version := at.u32("the version")) not in GGUF_VERSIONS:
            raise at.fail("its version cannot be read", saw=str(version), expected="2 or 3, little endian")
        tensor_count, key_count = at.u64("the tensor count"), at.u64("the metadata count")
        at.must_fit(tensor_count, 24, "tensors")
        at.must_fit(key_count, 13, "metadata keys")
        alignment = _gguf_metadata(at, key_count)
        claims = _gguf_tensor_claims(at, tensor_count)
        start = -(-at.at // alignment) * alignment
        return _gguf_tensors(at, claims, start, alignment)


def _gguf_metadata(at: _Cursor, count: int) -> int:
    """Pass over the metadata; returns the alignment of the tensor data."""
    # The reader's own names for the three fields before the metadata.
    seen = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}
    alignment = GGUF_DEFAULT_ALIGNMENT
    for _ in range(count):
        key = at.text("a metadata key")
        if key in seen:
            raise at.fail(f"metadata key {key!r} is there twice", saw="a duplicate", expected="unique keys")
        seen.add(key)
        kind = at.value_type(f"metadata {key!r}")
        if key != "general.alignment":
            at.value(kind, f"metadata {key!r}")
            continue
        if kind != GGUFValueType.UINT32:
            raise at.fail("general.alignment has the wrong type", saw=kind.name, expected="UINT32")
        alignment = at.u32(key)
        if alignment == 0 or alignment & (alignment - 1):
            raise at.fail("general.alignment is wrong", saw=str(alignment), expected="a power of two")
    return alignment


def _gguf_tensor_claims(at: _Cursor, count: int) -> list[TensorInfo]:
    """The tensor table as the file states it, `offset` still relative to the data."""
    seen: set[str] = set()
    claims = []
    for _ in range(count):
        name = at.text("a tensor name")
        if name in seen:
            raise at.fail(f"tensor {name!r} is there twice", saw="a duplicate", expected="unique names")
        if len(name.encode()) > GGUF_MAX_NAME:
            raise at.fail(
                "a tensor name is too long", saw=f"{name[:80]!r}", expected=f"{GGUF_MAX_NAME} bytes at most"
            )
        seen.add(name)
        if not 1 <= (dimensions := at.u32(f"the dimensions of {name!r}")) <= GGUF_MAX_DIMENSIONS:
            raise at.fail(f"tensor {name!r}", saw=f"{dimensions} dimensions", expected="1 to 4")
        sizes = [at.u64(f"dimension {i} of {name!r}") for i in range(dimensions)]
        number = at.u32(f"the type of {name!r}")
        offset = at.u64(f"the offset of {name!r}")
        try:
            kind = GGMLQuantizationType(number)
            block, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise at.fail(
                f"tensor {name!r} has an unknown type", saw=f"type {number}", expected="a GGML tensor type"
            ) from error
        elements = 1
        for size in sizes:
            elements *= size
        if not 0 < elements <= MAX_ELEMENTS:
            raise at.fail(
                f"tensor {name!r}", saw=f"dimensions {sizes}", expected="between 1 and 2^63 elements"
            )
        if sizes[0] % block:
            raise at.fail(
                f"tensor {name!r} of type {kind.name}",
                saw=f"rows of {sizes[0]}",
                expected=f"a multiple of the block of {block}",
            )
        claims.append(
            TensorInfo(name, kind.name, tuple(reversed(sizes)), offset, elements // block * block_bytes)
        )
    return claims


def _gguf_tensors(at: _Cursor, claims: list[TensorInfo], start: int, alignment: int) -> list[TensorInfo]:
    end_of_file, end, last = len(at.data), 0, "the header"
    for claim in sorted(claims, key=lambda claim: claim.offset):
        if claim.offset % alignment:
            raise at.fail(
                f"tensor {claim.name!r} is not aligned",
                saw=f"offset {claim.offset}",
                expected=f"a multiple of {alignment}",
            )
        if start + claim.offset + claim.size > end_of_file:
            raise at.fail(
                f"tensor {claim.name!r} runs past the end of the file",
                saw=f"bytes {start + claim.offset} to {start + claim.offset + claim.size}",
                expected=f"within the {end_of_file} bytes of the file",
            )
        if claim.offset < end:
            raise at.fail(
                f"tensors {last!r} and {claim.name!r} overlap",
                saw=f"offset {claim.offset}",
                expected=f"{end} or more",
            )
        end, last = claim.offset + claim.size, claim.name
    return [
        TensorInfo(claim.name, claim.dtype, claim.shape, start + claim.offset, claim.size) for claim in claims
    ]


def weight_files(folder: Path) -> list[Path]:
    """The *.safetensors of a model folder that hold its weights, sorted: those that its index names, else
    model.safetensors, else all there are. Others may hold the same weights in another form.

    Raises FormatError for an index that is none.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(
                f"{index} is no index", saw=str(error), expected='{"weight_map": ...}'
            ) from error
        if any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise FormatError(f"{index} names files outside its folder", saw=str(names)[:200])
        return [folder / name for name in names]
    if (whole := folder / "model.safetensors").is_file():
        return [whole]
    return sorted(path for path in folder.glob("*.safetensors") if path.name not in SIDE_FILES)


def check_safetensors(path: Path) -> list[TensorInfo]:
    """The tensors of a safetensors file whose header is sound, in the order of their data."""
    return check_safetensors_header(path)[0]


def check_safetensors_header(path: Path) -> tuple[list[TensorInfo], dict[str, str]]:
    """Check the header of a safetensors file: its tensors, in the order of their data, and its metadata.

    Raises FormatError that says what was found where. The header may be 100 MB, as in the
    format's own library; only it is read.
    """

    def fail(what: str, *, saw: str, expected: str) -> FormatError:
        return FormatError(f"{path} is not a sound safetensors file: {what}", saw=saw, expected=expected)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise fail(f"{name[:80]!r} is there twice", saw="a duplicate key", expected="unique names")
            found[name] = value
        return found

    def natural(text: str) -> int:
        if text.startswith("-") or len(text) > 20:
            raise fail("a number is out of range", saw=text[:40], expected="0 to 2^63")
        return int(text)

    with _open(path) as data:
        left = len(data) - 8
        length = int.from_bytes(data[:8], "little")
        if not 2 <= length <= min(left, SAFETENSORS_MAX_HEADER):
            raise fail(
                "the header's length, in bytes 0 to 8, cannot be true",
                saw=f"{length} bytes",
                expected=f"2 to {max(min(left, SAFETENSORS_MAX_HEADER), 2)} bytes",
            )
        if data[8:9] != b"{":
            raise fail("the header is not a JSON object", saw=repr(data[8:9]), expected="b'{'")
        try:
            header = json.loads(
                data[8 : 8 + length].decode(),
                object_pairs_hook=unique,
                parse_int=natural,
                parse_constant=float,
            )
        except (ValueError, RecursionError) as error:
            raise fail("the header is not JSON", saw=str(error)[:200], expected="a JSON object") from error

    metadata = header.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise fail("__metadata__ is wrong", saw=repr(metadata)[:80], expected="an object of strings")
    for text in (*header, *metadata, *metadata.values()):
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise fail("a name is not Unicode", saw=ascii(text)[:80], expected="no lone surrogates")

    tensors = [_safetensors_tensor(path, name, entry) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.size))
    end = 0
    for tensor in tensors:
        if tensor.offset != end:
            raise fail(
                f"tensor {tensor.name!r} leaves a hole or overlaps another",
                saw=f"offset {tensor.offset}",
                expected=f"{end}, where the one before ends",
            )
        end += tensor.size
    if end != left - length:
        raise fail("its data is cut short or too long", saw=f"{left - length} bytes", expected=f"{end} bytes")
    start = 8 + length
    return [TensorInfo(t.name, t.dtype, t.shape, start + t.offset, t.size) for t in tensors], metadata


def _safetensors_tensor(path: Path, name: str, entry: Any) -> TensorInfo:
    def fail(saw: str, expected: str) -> FormatError:
        what = f"{path} is not a sound safetensors file: tensor {name!r}"
        return FormatError(what, saw=saw[:200], expected=expected)

    if not (isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}):
        raise fail(repr(entry), "dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(dtype, str) and dtype in SAFETENSORS_BITS):
        raise fail(f"dtype {dtype!r}", ", ".join(SAFETENSORS_BITS))
    if not (isinstance(shape, list) and all(type(size) is int for size in shape)):
        raise fail(f"shape {shape!r}", "a list of natural numbers")
    if not (isinstance(offsets, list) and [type(offset) for offset in offsets] == [int, int]):
        raise fail(f"data_offsets {offsets!r}", "two natural numbers")
    elements = 1
    for size in shape:
        elements *= size
        if elements > MAX_ELEMENTS or size > MAX_ELEMENTS:
            raise fail(f"shape {shape}", "fewer than 2^63 elements")
    begin, end = offsets
    if (size := elements * SAFETENSORS_BITS[dtype] // 8) != end - begin:
        raise fail(f"bytes {begin} to {end}", f"{size} bytes for shape {shape} of {dtype}")
    return TensorInfo(name, dtype, tuple(shape), begin, size)
