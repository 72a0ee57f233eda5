"""Moving entries between registries: `zoo registry export`, `import` and `merge`.

An export is JSON lines: a header, one entry a line in its one JSON form, and an end that counts the entries
and has the sha256 of their lines, so that a file that was cut off or changed is told from a whole one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from pydantic import ValidationError

from zoo.entry import Entry, Record
from zoo.errors import FormatError, ZooError
from zoo.files import canonical_json
from zoo.registry.registry import Registry, batched

FORMAT = 1
MAX_LINE = 64 << 20  # bytes; an entry of a 7B model has some 300 KB
BATCH = 500  # entries written at once
_EXPORT = "`zoo registry export -o FILE` writes what this reads; `zoo registry merge` reads another registry"
Prefer = Literal["ours", "theirs", "newer"]


class Conflict(ZooError):
    """Two registries have different entries of one id."""


class Transferred(Record):
    """What came of an import or a merge."""

    added: int
    replaced: int
    kept: int  # differed, and ours was preferred
    same: int


def export(registry: Registry) -> Iterator[str]:
    """The lines of an export."""
    yield canonical_json({"sparse-zoo": "registry", "format": FORMAT}) + "\n"
    digest, count = hashlib.sha256(), 0
    for entry in registry.every():
        line = canonical_json(entry.model_dump(mode="json")) + "\n"
        digest.update(line.encode())
        count += 1
        yield line
    yield canonical_json({"end": count, "sha256": digest.hexdigest()}) + "\n"


def read(lines: Iterable[bytes], name: str) -> Iterator[Entry]:
    """The entries of an export. Raises FormatError at a line that is wrong, and if the end is missing."""
    digest, count, ended = hashlib.sha256(), 0, False
    for number, line in enumerate(lines, 1):
        if ended:
            raise FormatError(f"{name}, line {number}: there is more after the end")
        value = _parse(line, f"{name}, line {number}")
        if number == 1:
            _check_header(value, name)
        elif "end" in value:
            if (value.get("end"), value.get("sha256")) != (count, digest.hexdigest()):
                raise FormatError(
                    f"{name} was changed",
                    saw=f"{count} entries, sha256 {digest.hexdigest()[:12]}",
                    expected=f"{value.get('end')} entries, sha256 {str(value.get('sha256'))[:12]}",
                    try_="export it again",
                )
            ended = True
        else:
            digest.update(line)
            count += 1
            yield _entry(value, f"{name}, line {number}")
    if not ended:
        raise FormatError(
            f"{name} is not whole", saw=f"{count} entries and no end", try_="export or copy it again"
        )


def _parse(line: bytes, where: str) -> dict[str, Any]:
    if len(line) > MAX_LINE:
        raise FormatError(f"{where}: a line of more than {MAX_LINE} bytes")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not JSON", saw=str(error)[:200], try_=_EXPORT) from error
    if not isinstance(value, dict):
        raise FormatError(f"{where} is not an object", saw=type(value).__name__, try_=_EXPORT)
    return value


def _check_header(value: dict[str, Any], name: str) -> None:
    found = value.get("format")
    if value.get("sparse-zoo") != "registry" or not isinstance(found, int):
        raise FormatError(f"{name} is not an export of a registry", try_=_EXPORT)
    if found > FORMAT:
        raise FormatError(
            f"{name} was written by a newer zoo",
            saw=f"format {found}",
            expected=f"at most {FORMAT}",
            try_="git pull and pip install . in a checkout",
        )


def _entry(value: dict[str, Any], where: str) -> Entry:
    try:
        return Entry.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise FormatError(f"{where} is not an entry", saw=f"{place}: {first['msg']}") from error


def bring_in(entries: Iterable[Entry], registry: Registry, prefer: Prefer | None) -> Transferred:
    """Record entries of elsewhere, all or none.

    Entries of one id that differ go by `prefer`; without it they raise Conflict. Two that differ only in
    where they were published, or their status by that, become one with all places.
    """
    counts = dict.fromkeys(Transferred.model_fields, 0)

    def chosen() -> Iterator[Entry]:
        for batch in batched(entries, BATCH):
            known = registry.known(entry.id for entry in batch)
            for theirs in batch:
                ours = registry.get(theirs.id) if theirs.id in known else None
                kind, entry = _merged(ours, theirs, prefer)
                counts[kind] += 1
                if entry is not None:
                    yield entry

    registry.put_all(chosen())
    return Transferred.model_validate(counts)


def _merged(ours: Entry | None, theirs: Entry, prefer: Prefer | None) -> tuple[str, Entry | None]:
    """What to count, and what to record."""
    if ours is None:
        return "added", theirs
    if ours == theirs:
        return "same", None
    places = [p for p in theirs.publications if p not in ours.publications]
    alone: Callable[[Entry], Entry] = lambda e: e.model_copy(  # noqa: E731
        update={"publications": [], "status": "verified" if e.status == "published" else e.status}
    )
    if alone(ours) == alone(theirs):
        if not places:
            return "same", None
        together = [*ours.publications, *places]
        return "replaced", ours.model_copy(update={"publications": together, "status": "published"})
    if prefer is None:
        raise Conflict(
            f"{theirs.id} is in both, and differs; nothing was recorded",
            saw=f"created {theirs.created}, sha256 of its recipe {theirs.recipe_sha256[:12]}",
            expected=f"created {ours.created}, sha256 of its recipe {ours.recipe_sha256[:12]}, as here",
            try_="--prefer newer, ours or theirs",
        )
    if prefer == "theirs" or (prefer == "newer" and theirs.created > ours.created):
        return "replaced", theirs
    return "kept", None
