"""What the YAML at the head of a README says: card data, the tags by which a repository is found, its faults.

A README comes from whoever may push; nothing in it may cost more time or memory than its size allows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from zoo.errors import FormatError

MAX_YAML = 256 * 1024  # bytes
MAX_VALUES = 50_000  # after aliases are expanded, which JSON does
MAX_DEPTH = 32

# key -> may it be a list too
_TEXTS = {
    "license": True,
    "license_name": False,
    "language": True,
    "library_name": False,
    "pipeline_tag": False,
    "base_model": True,
    "base_model_relation": False,
    "datasets": True,
}


def card_data(readme: str) -> dict[str, Any]:
    """The YAML between the two `---` lines as JSON values, if any. FormatError if it is not right."""
    lines = readme.lstrip("\ufeff \t\r\n").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return {}
    end = next((i for i, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), None)
    if end is None:
        raise FormatError("the YAML at the head of the README has no end", expected="a line ---")
    text = "\n".join(lines[1:end])
    if len(text) > MAX_YAML:
        raise FormatError("the YAML at the head of the README is too long", expected=f"{MAX_YAML} bytes")
    try:
        loaded = yaml.safe_load(text)
    except RecursionError as error:
        raise FormatError("the YAML at the head of the README is nested too deeply") from error
    except Exception as error:  # beside YAMLError, of impossible dates and numbers, whatever PyYAML runs into
        raise FormatError("the README does not begin with YAML", saw=" ".join(str(error).split())) from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise FormatError("the YAML at the head of the README is not a mapping", saw=type(loaded).__name__)
    plain: dict[str, Any] = _plain(loaded, [MAX_VALUES], MAX_DEPTH)
    return plain


def _plain(value: Any, left: list[int], depth: int) -> Any:
    """`value` with nothing in it that JSON does not have; `left` values may still be met."""
    left[0] -= 1
    if left[0] < 0 or depth < 0:
        raise FormatError("the YAML at the head of the README is too large when written out")
    if isinstance(value, dict):
        return {str(key): _plain(inner, left, depth - 1) for key, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(inner, left, depth - 1) for inner in value]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        if abs(value) >= 2**63:
            raise FormatError("the YAML at the head of the README has a number out of range")
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return str(value)  # dates, bytes


def faults(data: Mapping[str, Any]) -> list[str]:
    """Why the Hub's clients could not read this card data; empty if they can."""
    found = []
    for key, many in _TEXTS.items():
        value = data.get(key)
        right = value is None or isinstance(value, str) or (many and _is_texts(value))
        if not right:
            found.append(f'"{key}" must be a string' + (" or a list of strings" if many else ""))
    if data.get("tags") is not None and not _is_texts(data["tags"]):
        found.append('"tags" must be a list of strings')
    index = data.get("model-index")
    if index is not None and not (
        isinstance(index, list)
        and all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in index)
    ):
        found.append('"model-index" must be a list of models, each with a "name"')
    return found


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _texts(value: Any) -> list[str]:
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]


def tags(data: Mapping[str, Any], paths: Iterable[str]) -> list[str]:
    """The tags the Hub would give: the card's own, and those that its other keys and the files imply."""
    endings = {path.rpartition(".")[2] for path in paths}
    relation = data.get("base_model_relation")
    bases = _texts(data.get("base_model"))
    found = [
        *_texts(data.get("library_name")),
        *(one for one in ("safetensors", "gguf", "onnx") if one in endings),
        *_texts(data.get("tags")),
        *_texts(data.get("language")),
        *_texts(data.get("pipeline_tag")),
        *(f"dataset:{one}" for one in _texts(data.get("datasets"))),
        *(f"base_model:{one}" for one in bases),
        *(f"base_model:{relation}:{one}" for one in bases if isinstance(relation, str)),
        *(f"license:{one}" for one in _texts(data.get("license"))),
    ]
    return list(dict.fromkeys(found))
