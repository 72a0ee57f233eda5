"""A Hugging Face model folder, read a few rows at a time and without torch.

Weights are dense float16, bfloat16 or float32 shards, or compressed-tensors int4 and int8. A folder of
our own pipeline also says on which grid its dense weights lie (`grid.safetensors`), so that the integers
come back exactly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.compressed_tensors import CompressedMatrix, compressed_names, open_matrix, stored_bits
from zoo.errors import FormatError, NumericsError, SourceError
from zoo.formats import TensorInfo, check_safetensors, weight_files
from zoo.runner.grid import Quantized

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GRID = "grid.safetensors"
_FLOATS = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Matrix:
    """One weight matrix; `start` and `stop` are rows. Both readers raise NumericsError for NaN."""

    name: str
    rows: int
    columns: int
    rounding: float  # of its weights' type: half a unit in the last place
    weights: Callable[[int, int], Floats]  # (start, stop) -> (stop - start, columns)
    quantized: Callable[[int, int], Quantized] | None  # the same rows on the grid that the folder records


class Checkpoint:
    """The tensors of a model folder by their names in transformers."""

    def __init__(self, folder: Path) -> None:
        """Raises SourceError if there is no model in `folder`, FormatError if its files are not sound."""
        self.folder = folder
        self.config = read_json(folder / "config.json")
        if not self.config:
            raise SourceError(
                f"{folder} is not a model folder", expected="config.json and *.safetensors in it"
            )
        self.tensors: dict[str, tuple[Path, TensorInfo]] = {}
        for shard in self._shards():
            for tensor in check_safetensors(shard):
                if tensor.name in self.tensors:
                    raise FormatError(f"{folder} holds {tensor.name} twice", expected="each tensor once")
                self.tensors[tensor.name] = (shard, tensor)
        self._compressed = compressed_names(self.tensors)
        self._widths = stored_bits(folder) if self._compressed else set()
        grid = folder / GRID
        self._grids = {t.name: (grid, t) for t in check_safetensors(grid)} if grid.is_file() else {}

    def _shards(self) -> list[Path]:
        table = read_json(self.folder / INDEX).get("weight_map")
        if isinstance(table, dict):
            names = {str(shard) for shard in table.values()}
        elif (self.folder / WEIGHTS).is_file():
            names = {WEIGHTS}
        else:
            names = {path.name for path in weight_files(self.folder)}
        shards = [self.folder / name for name in sorted(names)]
        if missing := [path.name for path in shards if Path(path.name) != path.relative_to(self.folder)
                       or not path.is_file()]:  # fmt: skip
            raise SourceError(f"{self.folder} lacks its weights", expected=f"a file {missing[0]}")
        if not shards:
            raise SourceError(
                f"{self.folder} holds no *.safetensors", try_="convert the model to safetensors first"
            )
        return shards

    def __contains__(self, name: str) -> bool:
        return name in self.tensors or name in self._compressed

    def vector(self, name: str, length: int) -> Floats:
        """A norm or bias, float32 (length,)."""
        file, tensor = self._found(name)
        if tensor.shape != (length,):
            raise FormatError(f"{name} has the wrong size", saw=str(tensor.shape), expected=str((length,)))
        return _floats(file, tensor, 0, length)

    def matrix(
        self, module: str, rows: int, columns: int, *, first: int = 0, of: int | None = None
    ) -> Matrix:
        """`rows` rows of `<module>.weight` from row `first`; the whole has `of` rows (none given: `rows`)."""
        name = f"{module}.weight"
        whole = (rows if of is None else of, columns)
        if name in self._compressed:
            return self._of_compressed(open_matrix(name, self.tensors, self._widths), whole, first, rows)
        file, tensor = self._found(name)
        if tensor.shape != whole:
            raise FormatError(
                f"{name} has the wrong size",
                saw=str(tensor.shape),
                expected=f"{whole}, as config.json says",
            )

        def weights(start: int, stop: int) -> Floats:
            return _floats(file, tensor, first + start, first + stop)

        recorded = self._recorded(module, whole, first, weights)
        return Matrix(name, rows, columns, _rounding(tensor), weights, recorded)

    def _found(self, name: str) -> tuple[Path, TensorInfo]:
        if name not in self.tensors:
            close = [other for other in self.tensors if other.startswith(name.removesuffix("weight"))]
            raise FormatError(
                f"{self.folder} lacks the tensor {name}",
                saw=", ".join(close[:3]) or None,
                expected="dense weights, or compressed-tensors of kind pack-quantized or int-quantized",
            )
        return self.tensors[name]

    def _recorded(
        self, module: str, whole: tuple[int, int], first: int, weights: Callable[[int, int], Floats]
    ) -> Callable[[int, int], Quantized] | None:
        """The nearest integers on the grid of `grid.safetensors`, near or not."""
        scale = self._grids.get(f"{module}.scale")
        if scale is None:
            return None
        zero = self._grids.get(f"{module}.zero_point")
        shape = scale[1].shape
        if len(shape) != 2 or shape[0] != whole[0] or not shape[1] or whole[1] % shape[1]:
            raise FormatError(f"{GRID} does not fit its layer {module}", saw=f"{shape} scales for {whole}")
        if zero is not None and zero[1].shape != shape:
            raise FormatError(f"{GRID} does not fit its layer {module}", saw=f"{zero[1].shape} zero points")
        width = whole[1] // shape[1]

        def quantized(start: int, stop: int) -> Quantized:
            rows = (first + start, first + stop)
            own = _floats(*scale, *rows)
            shift = None if zero is None else _floats(*zero, *rows, integers=True)
            groups = weights(start, stop).reshape(len(own), -1, width)
            with np.errstate(divide="ignore", invalid="ignore"):
                q = np.nan_to_num(groups / own[:, :, None])
            if shift is None or np.array_equal(shift, np.rint(shift)):
                return Quantized.of(np.rint(q).reshape(len(own), -1), own, None, width)
            q = np.rint(q + shift[:, :, None]).reshape(len(own), -1)
            return Quantized.of(q, own, -own * shift, width)

        return quantized

    def _of_compressed(
        self, matrix: CompressedMatrix, whole: tuple[int, int], first: int, rows: int
    ) -> Matrix:
        name, columns = matrix.name, matrix.columns
        if (matrix.rows, columns) != whole:
            raise FormatError(
                f"{name} has the wrong size", saw=str((matrix.rows, columns)), expected=str(whole)
            )
        file, scale = self._found(f"{name}_scale")
        by_row = math.prod(scale.shape) != 1  # otherwise one scale for the whole matrix
        groups = scale.shape[1] if len(scale.shape) == 2 else 1
        if by_row and scale.shape not in ((matrix.rows, groups), (matrix.rows,)):
            raise FormatError(f"{name}_scale has the wrong size", saw=str(scale.shape))
        if not groups or columns % groups:
            raise FormatError(f"{name}_scale has the wrong size", saw=str(scale.shape))

        def parts(start: int, stop: int) -> tuple[NDArray[np.int16], Floats]:
            """Integers less their zero points, and scales (rows, groups)."""
            if by_row:
                scales = _floats(file, scale, start, stop).reshape(stop - start, groups)
            else:
                scales = np.full((stop - start, 1), _floats(file, scale, 0, 1).ravel()[0], np.float32)
            q, zero = matrix.integers(start, stop), matrix.zero_points(start, stop)
            return (q if zero is None else q - matrix.by_column(zero)), scales

        def weights(start: int, stop: int) -> Floats:
            q, scales = parts(first + start, first + stop)
            return np.asarray(q * matrix.by_column(scales), np.float32)

        def quantized(start: int, stop: int) -> Quantized:
            q, scales = parts(first + start, first + stop)
            return Quantized.of(q, scales, None, columns // scales.shape[1])

        in_order = matrix.group_of is None
        return Matrix(name, rows, columns, _rounding(scale), weights, quantized if in_order else None)


def read_json(path: Path) -> dict[str, Any]:
    """An object from a file of the folder; empty if there is none. Raises FormatError if it is not one."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON", saw=str(error)[:200]) from error
    if not isinstance(found, dict):
        raise FormatError(f"{path} is not what it should be", expected="a JSON object")
    return found


def _rounding(tensor: TensorInfo) -> float:
    return 2.0**-8 if tensor.dtype == "BF16" else 2.0**-11  # float32 was perhaps float16 before


def _floats(file: Path, tensor: TensorInfo, start: int, stop: int, *, integers: bool = False) -> Floats:
    """Rows of a tensor in float32. Raises NumericsError for what is not finite."""
    if integers and tensor.dtype == "I32":
        dtype = "<i4"
    elif tensor.dtype in _FLOATS:
        dtype = _FLOATS[tensor.dtype]
    else:
        raise FormatError(
            f"{tensor.name} is of a type that cannot be packed", saw=tensor.dtype, expected=", ".join(_FLOATS)
        )
    inner = tensor.shape[1:]
    row = np.dtype(dtype).itemsize * math.prod(inner)
    stop = min(stop, tensor.shape[0] if tensor.shape else 1)
    if row == 0 or stop <= start:
        return np.zeros((max(stop - start, 0), *inner), np.float32)
    raw = np.memmap(file, np.uint8, "r", tensor.offset + start * row, (stop - start) * row)
    values = np.frombuffer(raw, dtype)
    if tensor.dtype == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        found = values.astype(np.float32).reshape(stop - start, *inner)
    if not np.isfinite(found).all():
        bad = int((~np.isfinite(found)).sum())
        raise NumericsError(f"{tensor.name} holds NaN or infinity", saw=f"{bad} of {found.size} values there")
    return found
