"""What the YAML at the head of a README says: card data, the tags by which a repository is found, its faults.

A README comes from whoever may push; nothing in it may cost more time or memory than its size allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from zoo.errors import FormatError
from zoo.safe_yaml import safe_yaml

_WHAT = "the YAML at the head of the README"

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
        raise FormatError(f"{_WHAT} has no end", expected="a line ---")
    loaded = safe_yaml("\n".join(lines[1:end]), _WHAT)
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise FormatError(f"{_WHAT} is not a mapping", saw=type(loaded).__name__)
    return loaded


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
