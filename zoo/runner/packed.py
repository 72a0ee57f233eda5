"""The packed file: one model in a .safetensors container, all that is needed to run it included.

Besides the tensors of `zoo.runner.format` it holds the norms and biases in float32 and, as bytes, the
model's own `tokenizer.json`. Its metadata says how every matrix is packed, so that a reader can check
each size before it touches a byte:

    format          "zoo-packed"          format_version  "1"
    architecture    JSON of Architecture
    layouts         JSON, matrix name -> Layout
    text            JSON of Text

Matrices are called embed, head (absent when tied), layers.{i}.q k v o gate up down (gate: only where
`gated`); their parts are `<matrix>.values`, `.scales`, `.minima`, `.mask`, and perhaps a `<matrix>.bias`.
Norms are norm, layers.{i}.attention_norm and layers.{i}.mlp_norm, with a `.weight` and perhaps a `.bias`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from zoo.errors import FormatError
from zoo.files import atomic_file
from zoo.formats import SAFETENSORS_BITS, TensorInfo, check_safetensors_header
from zoo.runner.format import Layout

FILE = "packed.safetensors"
VERSION = "1"
TOKENIZER = "tokenizer.json"
_DTYPES = {"U8": np.uint8, "U64": np.uint64, "F16": np.float16, "F32": np.float32}
_HEADER_ROOM = 512  # bytes of header per tensor, at most


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Architecture(_Strict):
    """What the engine has to know to run the model; sizes as in transformers' configuration."""

    family: Literal["llama", "mistral", "mpt"]
    vocabulary: int = Field(gt=0, le=1 << 24)
    hidden: int = Field(gt=0, le=1 << 20)
    intermediate: int = Field(gt=0, le=1 << 22)
    layers: int = Field(gt=0, le=1 << 12)
    heads: int = Field(gt=0, le=1 << 12)
    kv_heads: int = Field(gt=0, le=1 << 12)
    head_dim: int = Field(gt=0, le=1 << 12)
    context: int = Field(gt=0, le=1 << 28)  # positions the model was made for
    norm: Literal["rms", "layer"]
    norm_eps: float = Field(gt=0, lt=1)
    activation: Literal["silu", "gelu"]  # gelu is the exact one, with erf
    gated: bool  # down(activation(gate(x)) * up(x)) instead of down(activation(up(x)))
    tied: bool  # the head is the embedding matrix
    rope: dict[str, Any] | None = None  # transformers' rope_parameters; None: no rotation
    alibi_bias_max: float | None = None  # ALiBi with slopes as in MPT; None: no bias
    sliding_window: int | None = Field(default=None, gt=0, le=1 << 28)  # positions seen, its own included
    clip_qkv: float | None = Field(default=None, gt=0)
    softmax_scale: float = Field(gt=0)  # of q . k
    logit_scale: float = 1.0

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} key-value heads")
        if self.rope is not None and self.head_dim % 2:
            raise ValueError(f"heads of {self.head_dim} cannot be rotated")
        return self

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Name -> (rows, columns) of every matrix."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        found = {"embed": (self.vocabulary, self.hidden)}
        if not self.tied:
            found["head"] = (self.vocabulary, self.hidden)
        for i in range(self.layers):
            inner = {
                "q": (q, self.hidden),
                "k": (kv, self.hidden),
                "v": (kv, self.hidden),
                "o": (self.hidden, q),
            }
            if self.gated:
                inner["gate"] = (self.intermediate, self.hidden)
            inner |= {"up": (self.intermediate, self.hidden), "down": (self.hidden, self.intermediate)}
            found |= {f"layers.{i}.{name}": shape for name, shape in inner.items()}
        return found

    @property
    def norms(self) -> list[str]:
        inner = [f"layers.{i}.{name}" for i in range(self.layers) for name in ("attention_norm", "mlp_norm")]
        return [*inner, "norm"]


class Text(_Strict):
    """What belongs to text rather than to arithmetic."""

    eos: list[int] = []  # tokens that end a generation
    bos: int | None = None
    chat_template: str | None = None  # Jinja, as in tokenizer_config.json
    special: dict[str, str] = {}  # bos_token, eos_token ... as the template may name them


class Packed:
    """A packed file whose header has been checked: every tensor is there, of the right type and size."""

    def __init__(self, path: Path) -> None:
        """Raises FormatError for anything that is not a sound packed file of this version."""
        self.path = path
        tensors, metadata = check_safetensors_header(path)
        self.tensors: dict[str, TensorInfo] = {tensor.name: tensor for tensor in tensors}
        if metadata.get("format") != "zoo-packed":
            raise FormatError(
                f"{path} is a safetensors file, but not a packed one",
                try_="zoo pack FOLDER makes one of a model",
            )
        if metadata.get("format_version") != VERSION:
            raise FormatError(
                f"{path} is packed in another version of the format",
                saw=f"version {metadata.get('format_version', '(none)')[:20]!r}",
                expected=f"version {VERSION}",
                try_="update zoo, or pack the model again with zoo pack",
            )
        try:
            self.architecture = Architecture.model_validate_json(metadata["architecture"])
            self.text = Text.model_validate_json(metadata["text"])
            layouts = json.loads(metadata["layouts"])
            self.layouts = {str(name): _layout(fields) for name, fields in layouts.items()}
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "JSON"
            raise FormatError(
                f"{path} does not describe its model", saw=f"{where}: {first['msg']}"[:200]
            ) from error
        except FormatError as error:
            raise FormatError(f"{path}: {error.what}", saw=error.saw, expected=error.expected) from error
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise FormatError(
                f"{path} does not describe its model", saw=str(error).splitlines()[0][:200]
            ) from error
        self._check()

    def _fail(self, what: str, saw: object, expected: object) -> FormatError:
        return FormatError(f"{self.path}: {what}", saw=str(saw)[:200], expected=str(expected)[:200])

    def _check(self) -> None:
        wanted = self.architecture.matrices
        if (names := set(self.layouts)) != set(wanted):
            odd = sorted(names ^ set(wanted))
            raise self._fail("its matrices are not those of its architecture", odd[:3], "one layout for each")
        known = {TOKENIZER}
        for name, layout in self.layouts.items():
            if (layout.rows, layout.columns) != wanted[name]:
                raise self._fail(f"{name} has the wrong size", (layout.rows, layout.columns), wanted[name])
            for part, (dtype, shape) in layout.shapes.items():
                tensor = self._tensor(f"{name}.{part}", dtype)
                if (shape is not None and tensor.shape != shape) or len(tensor.shape) != len(shape or (0,)):
                    raise self._fail(f"{tensor.name} has the wrong size", tensor.shape, shape or "(bytes,)")
                known.add(tensor.name)
            known |= self._vector(f"{name}.bias", layout.rows, required=False)
        for name in self.architecture.norms:
            known |= self._vector(f"{name}.weight", self.architecture.hidden, required=True)
            known |= self._vector(f"{name}.bias", self.architecture.hidden, required=False)
        if unknown := sorted(set(self.tensors) - known):
            raise self._fail("it holds tensors that no layout names", unknown[:3], "none")
        if TOKENIZER in self.tensors:
            self._tensor(TOKENIZER, "U8")

    def _tensor(self, name: str, dtype: str) -> TensorInfo:
        tensor = self.tensors.get(name)
        if tensor is None or tensor.dtype != dtype:
            raise self._fail(f"{name} is missing or of another type", tensor and tensor.dtype, dtype)
        return tensor

    def _vector(self, name: str, length: int, *, required: bool) -> set[str]:
        if name not in self.tensors and not required:
            return set()
        if (tensor := self._tensor(name, "F32")).shape != (length,):
            raise self._fail(f"{name} has the wrong size", tensor.shape, (length,))
        return {name}

    def read(self, name: str) -> NDArray[Any]:
        """One tensor, mapped from the file."""
        tensor = self.tensors[name]
        dtype = _DTYPES[tensor.dtype]
        if not tensor.size:
            return np.zeros(tensor.shape, dtype)
        raw = np.memmap(self.path, np.uint8, "r", tensor.offset, tensor.size)
        return np.frombuffer(raw, dtype).reshape(tensor.shape)

    def parts(self, matrix: str) -> dict[str, NDArray[Any]]:
        """The parts of one matrix, for `zoo.runner.format`."""
        return {part: self.read(f"{matrix}.{part}") for part in self.layouts[matrix].shapes}

    @property
    def tokenizer_json(self) -> bytes | None:
        return self.read(TOKENIZER).tobytes() if TOKENIZER in self.tensors else None


def _layout(fields: dict[str, Any]) -> Layout:
    if not all(
        type(fields[key]) is int for key in ("rows", "columns", "bits", "group", "keep", "offset_bits")
    ):
        raise FormatError("a layout's sizes are not integers", saw=str(fields)[:200])
    if type(fields["zeros"]) is not bool:
        raise FormatError("a layout's zeros is not a truth value", saw=str(fields)[:200])
    return Layout(**fields)


@contextmanager
def packed_writer(
    path: Path, architecture: Architecture, layouts: Mapping[str, Layout], text: Text
) -> Iterator[Writer]:
    """Write a packed file tensor by tensor; it appears under its name when complete.

    `layouts` must name every matrix of the architecture. The header's room is reserved first and filled
    in last, so that no more than one tensor is in memory.
    """
    metadata = {
        "format": "zoo-packed",
        "format_version": VERSION,
        "architecture": architecture.model_dump_json(),
        "layouts": json.dumps({name: asdict(layout) for name, layout in layouts.items()}),
        "text": text.model_dump_json(),
    }
    tensors = 4 * len(layouts) + 2 * len(architecture.norms) + 1
    room = len(json.dumps({"__metadata__": metadata})) + tensors * _HEADER_ROOM
    room += -(room + 8) % 64  # the data begins on a cache line
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        file.write(room.to_bytes(8, "little") + b" " * room)
        writer = Writer(file)
        yield writer
        header = json.dumps({"__metadata__": metadata} | writer.table).encode()
        if len(header) > room:
            raise FormatError(f"the header of {path} outgrew its room", saw=f"{len(header)} of {room} bytes")
        file.seek(8)
        file.write(header)


class Writer:
    """Takes the tensors of one packed file, in any order."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._end = 0
        self.table: dict[str, Any] = {}

    def matrix(self, name: str, parts: Mapping[str, NDArray[Any]]) -> None:
        for part, array in parts.items():
            self.tensor(f"{name}.{part}", array)

    def tensor(self, name: str, array: NDArray[Any]) -> None:
        dtype = next(key for key, value in _DTYPES.items() if value == array.dtype)
        data = np.ascontiguousarray(array)
        begin, self._end = self._end, self._end + data.nbytes
        self._file.write(data.reshape(-1).view(np.uint8).data)
        self.table[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [begin, self._end]}
        assert math.prod(array.shape) * SAFETENSORS_BITS[dtype] == 8 * data.nbytes

    def tokenizer(self, tokenizer_json: bytes) -> None:
        self.tensor(TOKENIZER, np.frombuffer(tokenizer_json, np.uint8))

    def vectors(self, vectors: Iterable[tuple[str, NDArray[Any]]]) -> None:
        for name, vector in vectors:
            self.tensor(name, vector.astype(np.float32))
