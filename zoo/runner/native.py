"""The C++ engine, where it was built and this processor runs it.

`ZOO_ISA` (avx512, avx2, neon, scalar) forces an instruction set instead of the best one.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
from numpy.typing import NDArray

from zoo.errors import FormatError, NumericsError, StoreError, UsageError, ZooError
from zoo.machine import this_machine
from zoo.runner.engine import check_call
from zoo.runner.format import PAIR, window_starts
from zoo.runner.numpy_engine import alibi_slopes
from zoo.runner.packed import Packed
from zoo.runner.rope import depends_on_length, tables

_native: Any = None
try:
    _native = import_module("zoo.runner._native")
except ImportError as error:
    WHY_NOT = f"its C++ extension is not built ({error}); install a C++17 compiler and zoo again"
else:
    WHY_NOT = ""

AVAILABLE = _native is not None
EXTENSION = Path(_native.__file__) if AVAILABLE else None  # the compiled file that runs
MOST_THREADS = 1024
ISA = os.environ.get("ZOO_ISA") or (_native.best_isa() if AVAILABLE else "numpy")


def read_bandwidth(size: int, threads: int) -> float:
    """GB/s at which `threads` threads read `size` bytes of memory, best of five."""
    if _native is None:
        raise UsageError("the read bandwidth is measured by the C++ extension", saw=WHY_NOT)
    return float(_native.read_bandwidth(size, threads))


class NativeEngine:
    """`zoo.runner.engine.Engine` in C++. The weights are copied into huge pages, in parallel."""

    def __init__(
        self,
        packed: Packed,
        *,
        slots: int = 1,
        context: int,
        threads: int | None = None,
        kv: Literal["f16", "int8"] = "f16",
    ) -> None:
        """Raises FormatError for a file whose contents are not sound, UsageError for an unknown ZOO_ISA, or
        for more slots, positions or threads than there can be."""
        a = self.architecture = packed.architecture
        self.slots = slots
        self.context = context
        self.threads = threads or this_machine().cores
        self._table_for = 0  # length whose rotation table is set
        if self.threads > MOST_THREADS:
            raise UsageError(f"{self.threads} threads are too many", expected=f"at most {MOST_THREADS}")
        per_position = 4 * a.head_dim if kv == "f16" else 2 * a.head_dim + 8
        needed = a.layers * a.kv_heads * slots * context * per_position
        no_memory = UsageError(
            f"no memory for the keys and values of {slots} x {context} positions",
            saw=f"{needed / 1e9:.1f} GB",
            try_="a smaller context, or kv int8",
        )
        if needed > psutil.virtual_memory().total:
            raise no_memory
        self._filled = np.zeros(slots, np.int64)
        try:
            self._model: Any = _native.Model(
                vocabulary=a.vocabulary,
                hidden=a.hidden,
                intermediate=a.intermediate,
                layers=a.layers,
                heads=a.heads,
                kv_heads=a.kv_heads,
                head_dim=a.head_dim,
                rms=a.norm == "rms",
                silu=a.activation == "silu",
                gated=a.gated,
                tied=a.tied,
                norm_eps=a.norm_eps,
                softmax_scale=a.softmax_scale,
                logit_scale=a.logit_scale,
                sliding_window=a.sliding_window or 0,
                clip_qkv=a.clip_qkv or 0.0,
                slots=slots,
                context=context,
                threads=self.threads,
                int8_cache=kv == "int8",
                isa=ISA,
            )
        except ValueError as error:
            raise UsageError(str(error), expected="ZOO_ISA unset, or avx512, avx2, neon or scalar") from error
        except MemoryError as error:
            raise no_memory from error
        except RuntimeError as error:
            raise UsageError(
                "the system refuses so many threads", saw=f"{self.threads} ({error})", try_="fewer --threads"
            ) from error
        try:
            self._describe(packed)
            self._model.load(str(packed.path))
        except MemoryError as error:
            raise ZooError(f"{packed.path} does not fit into memory") from error
        except ValueError as error:
            raise FormatError(f"{packed.path} cannot be run: {error}") from error
        except RuntimeError as error:
            raise StoreError(f"{packed.path} cannot be read: {error}") from error
        if a.alibi_bias_max is not None:
            self._model.set_slopes(alibi_slopes(a.heads, a.alibi_bias_max).tolist())
        if a.rope is not None:
            self._set_rope(1)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all matrices with their scales."""
        return int(self._model.weight_bytes)

    def _describe(self, packed: Packed) -> None:
        def span(name: str) -> tuple[int, int]:
            tensor = packed.tensors.get(name)
            return (tensor.offset, tensor.size) if tensor else (0, 0)

        for name, layout in packed.layouts.items():
            self._model.add_matrix(
                name=name,
                kind=layout.kind,
                rows=layout.rows,
                columns=layout.columns,
                bits=layout.bits,
                keep=layout.keep,
                offset_bits=layout.offset_bits,
                row_blocks=layout.row_blocks,
                pairs=layout.pairs,
                groups=layout.groups,
                pairs_per_group=layout.group // PAIR or layout.pairs,
                pairs_per_chunk=layout.pairs_per_chunk,
                window_starts=window_starts(layout.keep, layout.window) if layout.keep else [],
                **{part: span(f"{name}.{part}") for part in ("values", "scales", "minima", "mask", "bias")},
            )
        for name in packed.architecture.norms:
            self._model.add_norm(name, span(f"{name}.weight"), span(f"{name}.bias"))

    def _set_rope(self, length: int) -> None:
        """Set the rotation table of a sequence of `length` tokens, if it is another one."""
        if self._table_for and not (depends_on_length(self.architecture) and length != self._table_for):
            return
        cos, sin = tables(self.architecture, length, self.context)
        self._model.set_rope(np.ascontiguousarray(cos), np.ascontiguousarray(sin))
        self._table_for = length

    def forward(
        self,
        tokens: NDArray[np.int32],
        slots: NDArray[np.int32],
        positions: NDArray[np.int32],
        wanted: NDArray[np.int32],
    ) -> NDArray[np.float32]:
        """See `zoo.runner.engine.Engine`."""
        check_call(self, self._filled, tokens, slots, positions, wanted)
        if self.architecture.rope is not None:
            self._set_rope(int(positions.max(initial=0)) + 1)
        ascending, where = np.unique(wanted, return_inverse=True)
        logits = np.empty((len(ascending), self.architecture.vocabulary), np.float32)
        ids, of, at = (np.ascontiguousarray(a, np.int32) for a in (tokens, slots, positions))
        try:
            self._model.forward(ids, of, at, ascending.astype(np.int32), logits)
        except RuntimeError as error:
            raise UsageError(f"the model cannot run here: {error}", try_="load it in this process") from error
        self._filled[slots] = positions + 1
        if not np.isfinite(logits).all():
            raise NumericsError("the model's logits are NaN or infinite", try_="check its weights")
        return logits if len(where) == len(ascending) and (where[:-1] < where[1:]).all() else logits[where]
