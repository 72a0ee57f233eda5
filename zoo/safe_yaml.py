"""YAML that anybody may have written: nothing in it may cost more time or memory than its size allows."""

from __future__ import annotations

import math
from typing import Any

import yaml

from zoo.errors import FormatError

MAX_TEXT = 256 * 1024  # characters
MAX_VALUES = 50_000  # after aliases are expanded, which JSON does
MAX_DEPTH = 32


def safe_yaml(text: str, what: str) -> Any:
    """The values of a YAML document as JSON has them; what JSON does not have becomes text.

    `what` names the document in messages. Raises FormatError if it is not YAML, merges mappings (`<<`), or is
    too long, too deep, or too large once its aliases are expanded.
    """
    if len(text) > MAX_TEXT:
        raise FormatError(
            f"{what} is too long", saw=f"{len(text)}", expected=f"at most {MAX_TEXT} characters"
        )
    try:
        loaded = yaml.load(text, _Loader)
    except RecursionError as error:
        raise FormatError(f"{what} is nested too deeply", expected=f"at most {MAX_DEPTH} levels") from error
    except Exception as error:  # beside YAMLError, of impossible dates and numbers, whatever PyYAML runs into
        raise FormatError(f"{what} cannot be read as YAML", saw=" ".join(str(error).split())) from error
    return _plain(loaded, what, [MAX_VALUES], MAX_DEPTH)


class _Loader(yaml.SafeLoader):
    """PyYAML's, but for merge keys: it copies what they merge, so few lines that merge each other's mappings
    take all memory. Aliases alone share what they name.
    """

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                problem = "mappings are not merged (<<) here: write out what it means"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        super().flatten_mapping(node)


def _plain(value: Any, what: str, left: list[int], depth: int) -> Any:
    """`value` with nothing in it that JSON does not have; `left` values may still be met."""
    left[0] -= 1
    if left[0] < 0 or depth < 0:
        raise FormatError(
            f"{what} is too large when written out",
            expected=f"at most {MAX_VALUES} values and {MAX_DEPTH} levels",
        )
    if isinstance(value, dict):
        return {
            str(_plain(key, what, left, depth)): _plain(inner, what, left, depth - 1)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple | set):
        return [_plain(inner, what, left, depth - 1) for inner in value]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        if abs(value) >= 2**63:
            raise FormatError(f"{what} has a number out of range", expected="at most 64 bits")
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return str(value)  # dates, bytes
