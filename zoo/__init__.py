"""The open zoo of sparse, quantized language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.runner import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`zoo.load`, imported when it is asked for: commands that run no model start faster."""
    if name == "load":
        from zoo.runner import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
