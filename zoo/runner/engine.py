"""What runs a packed model: the C++ engine, or NumPy where that is not there."""

from __future__ import annotations

from functools import cache
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from zoo.errors import UsageError
from zoo.progress import say
from zoo.runner.packed import Architecture, Packed

CONTEXT = 4096  # positions per sequence unless asked for: a cache that fits into memory


class Engine(Protocol):
    """Runs tokens of several sequences at once and keeps their keys and values, each sequence in a slot."""

    @property
    def architecture(self) -> Architecture: ...

    @property
    def slots(self) -> int:
        """Sequences it can hold."""

    @property
    def context(self) -> int:
        """Positions per sequence."""

    def forward(
        self,
        tokens: NDArray[np.int32],
        slots: NDArray[np.int32],
        positions: NDArray[np.int32],
        wanted: NDArray[np.int32],
    ) -> NDArray[np.float32]:
        """Run T tokens, any mix of sequences, and return logits (len(wanted), vocabulary).

        tokens, slots, positions (T,): token t is at positions[t] of the sequence in slots[t]. Within one
        call the positions of a slot follow each other. wanted: indices into the call, after whose tokens
        logits are wanted. Keys and values stay in the slot; a position may be overwritten, by which those
        behind it are forgotten, but never skipped. Raises UsageError for ids, slots or positions out of
        range, NumericsError where the logits are not finite.
        """


def open_engine(
    packed: Packed,
    *,
    slots: int = 1,
    context: int | None = None,
    threads: int | None = None,
    kv: Literal["f16", "int8"] = "f16",
) -> Engine:
    """The fastest engine of this machine. Raises UsageError for options out of range.

    slots: sequences at once. context: positions per sequence; None: the model's, at most 4096. threads: None:
    all cores. kv: how keys and values are kept (NumPy keeps them in float32).
    """
    made_for = packed.architecture.context
    if slots < 1 or (threads is not None and threads < 1):
        raise UsageError("slots and threads must be 1 at least", saw=f"{slots} slots, {threads} threads")
    if kv not in ("f16", "int8"):
        raise UsageError(f"keys and values cannot be kept as {kv!r}", expected="f16 or int8")
    if context is None:
        context = min(made_for, CONTEXT)
    if context < 1 or (context > made_for and not _extrapolates(packed.architecture)):
        raise UsageError(
            f"the context cannot be {context} tokens", expected=f"1 to {made_for} for this model"
        )

    from zoo.runner import native

    if native.AVAILABLE:
        return native.NativeEngine(packed, slots=slots, context=context, threads=threads, kv=kv)
    _say_once(f"running in NumPy, which is slow: {native.WHY_NOT}")

    from zoo.runner.numpy_engine import NumpyEngine

    return NumpyEngine(packed, slots=slots, context=context)


def check_call(
    engine: Engine,
    filled: NDArray[np.int64],
    tokens: NDArray[np.int32],
    slots: NDArray[np.int32],
    positions: NDArray[np.int32],
    wanted: NDArray[np.int32],
) -> None:
    """Raise UsageError for what `Engine.forward` must refuse. filled (slots,): positions held so far."""
    if tokens.ndim != 1 or not tokens.shape == slots.shape == positions.shape or wanted.ndim != 1:
        raise UsageError(
            "tokens, slots and positions must be as many",
            saw=f"shapes {tokens.shape}, {slots.shape}, {positions.shape}, wanted {wanted.shape}",
        )
    ranges = (
        ("token", tokens, engine.architecture.vocabulary),
        ("slot", slots, engine.slots),
        ("position", positions, engine.context),
        ("wanted", wanted, len(tokens)),
    )
    for name, values, end in ranges:
        if values.size and (values.min() < 0 or values.max() >= end):
            odd = values[(values < 0) | (values >= end)][0]
            raise UsageError(f"{name} {odd} is out of range", expected=f"0 to {end - 1}")
    for slot in np.unique(slots):
        of_slot = positions[slots == slot]
        if of_slot[0] > filled[slot] or (np.diff(of_slot) != 1).any():
            raise UsageError(
                f"positions of slot {slot} are skipped or out of order",
                saw=f"{of_slot[:8].tolist()} after {filled[slot]} positions",
            )


def _extrapolates(architecture: Architecture) -> bool:
    """Whether the model is meant to run beyond the length that it was trained for."""
    rope = architecture.rope or {}
    return architecture.alibi_bias_max is not None or rope.get("rope_type") == "dynamic"


@cache
def _say_once(message: str) -> None:
    say(message)
