"""How an entry came to be, read from its recipe."""

from __future__ import annotations

from typing import Any, NamedTuple

from cards.render import branches_of, recipe_steps

DONE = {"prune": "pruned", "quantize": "quantized", "recover": "recovered", "average": "averaged"}


class Made(NamedTuple):
    """One step from the base model to the entry."""

    what: str  # pruned, recovered, quantized ...
    how: str  # method and its settings in a few words


def steps(recipe: str) -> list[Made]:
    """What the steps of a resolved recipe do, in order; empty if it is not one. Nothing in it is trusted."""
    return [_made(step) for step in recipe_steps(recipe)]


def _made(step: dict[str, Any]) -> Made:
    kind, what = str(step.get("kind", "?")), _what(step)
    how = [str(step["method"])] if isinstance(step.get("method"), str) else []
    pattern = step.get("pattern")
    if isinstance(pattern, dict):
        how += _pattern(pattern)
    grid = step.get("quantize")
    if kind == "prune" and isinstance(grid, dict):
        what += " and quantized"
        how += _grid(grid)
    if kind == "quantize":
        how += _grid(step.get("grid") if isinstance(step.get("grid"), dict) else step)
    if kind == "recover" and isinstance(step.get("tokens"), int):
        how.append(f"{step['tokens']:,} tokens")
    how += [" and ".join(map(_what, branch)) or "as it is" for branch in branches_of(step)]
    return Made(what, ", ".join(how))


def _what(step: dict[str, Any]) -> str:
    kind = str(step.get("kind", "?"))
    return DONE.get(kind, kind)


def _pattern(pattern: dict[str, Any]) -> list[str]:
    if pattern.get("keep") and pattern.get("group"):
        window = f" window {pattern['window']}" if pattern.get("window") else ""
        return [f"{pattern['keep']}:{pattern['group']}{window}"]
    sparsity = pattern.get("sparsity")
    return [f"{sparsity:.0%} unstructured"] if isinstance(sparsity, int | float) else []


def _grid(grid: Any) -> list[str]:
    if not isinstance(grid, dict) or not grid.get("bits"):
        return []
    return [f"{grid['bits']} bits" + (f" per {grid['group']}" if grid.get("group") else "")]
