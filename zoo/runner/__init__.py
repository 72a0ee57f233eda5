"""The sparse runner: the packed format, the engine, and text from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.runner.generate import load as load


def __getattr__(name: str) -> Any:
    """`load`, imported when it is asked for: the format alone needs no tokenizers."""
    if name == "load":
        from zoo.runner.generate import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
