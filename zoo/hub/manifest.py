"""The manifest of a published entry, `zoo.json`: every file with its size and sha256, and the entry itself.

It comes from outside, so nothing of it is used before it is checked: paths that stay below their folder,
sizes, hashes, and an entry whose artifacts are the listed files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from zoo.entry import Entry, Publication, Record, Sha256
from zoo.errors import FormatError
from zoo.files import sha256_json

MANIFEST = "zoo.json"
FORMAT = 1
MAX_BYTES = 32 << 20  # of a manifest; a real one has less than 1 MB
MAX_FILES = 10_000


def check_path(path: str) -> str:
    """`path` as it is, if it names a file below a folder wherever that is; ValueError otherwise."""
    parts = path.split("/")
    if not path or len(path.encode("utf-8", "surrogatepass")) > 1024:
        raise ValueError(f"a path of {len(path)} characters")
    if any(part in ("", ".", "..") or len(part.encode("utf-8", "surrogatepass")) > 255 for part in parts):
        raise ValueError(f"the path {path[:200]!a} could leave its folder")
    if "\\" in path or not path.isprintable():
        raise ValueError(f"the path {path[:200]!a} holds characters that a file name should not")
    if any(part.lower() == ".git" for part in parts):  # as some file systems spell it
        raise ValueError("a path in .git")
    return path


def check_paths(paths: Iterable[str]) -> None:
    """ValueError if a path is not safe, stands twice, or is a file and a folder at once."""
    seen: set[str] = set()
    for path in paths:
        if check_path(path) in seen:
            raise ValueError(f"the path {path!r} stands twice")
        seen.add(path)
    if len(seen) > MAX_FILES:
        raise ValueError(f"{len(seen)} files")
    for path in seen:
        while "/" in path:
            path = path.rpartition("/")[0]
            if path in seen:
                raise ValueError(f"{path!r} is a file and a folder")


class File(Record):
    """A file of a published repository."""

    path: Annotated[str, AfterValidator(check_path)]
    size: int = Field(ge=0)
    sha256: Sha256


def release_tag(entry: Entry) -> str:
    """The tag of a published commit: which recipe made it."""
    return f"recipe-{entry.recipe_sha256[:16]}"


def with_publication(entry: Entry, publication: Publication) -> Entry:
    """The entry as published there too; a commit that it knows of keeps its time."""
    place = (publication.endpoint, publication.repository, publication.commit)
    known = any((p.endpoint, p.repository, p.commit) == place for p in entry.publications)
    publications = entry.publications if known else [*entry.publications, publication]
    return entry.model_copy(update={"status": "published", "publications": publications})


class Manifest(Record):
    """All files of a published commit but the manifest itself, and what they are."""

    format: Literal[1] = 1
    files: list[File]
    entry: Entry

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        check_paths(file.path for file in self.files)
        listed = {file.path: (file.size, file.sha256) for file in self.files}
        if MANIFEST in listed:
            raise ValueError("a manifest does not list itself")
        for artifact in self.entry.artifacts:
            if listed.get(artifact.path) != (artifact.size, artifact.sha256):
                raise ValueError(f"the entry's {artifact.path[:200]!a} is not among the files")
        for machine in (benchmark.machine for benchmark in self.entry.benchmarks):
            if sha256_json(machine.model_dump(exclude={"fingerprint"})) != machine.fingerprint:
                raise ValueError(f"the fingerprint {machine.fingerprint[:12]!a} is not that of its machine")
        _check_storable(self.model_dump())
        return self

    def to_bytes(self) -> bytes:
        text = json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False)
        return (text + "\n").encode()


def _check_storable(value: Any) -> None:
    """ValueError for what no database keeps: integers of more than 64 bits, and NUL in text."""
    if isinstance(value, dict | list):
        for item in [*value.keys(), *value.values()] if isinstance(value, dict) else value:
            _check_storable(item)
    elif (isinstance(value, int) and abs(value) >= 1 << 63) or (isinstance(value, str) and "\0" in value):
        raise ValueError(f"{ascii(value)[:60]} cannot be stored")


def parse(data: bytes, where: str) -> Manifest:
    """The manifest in `data`; `where` names it in messages. Fields that a newer zoo added are left out.

    So is what it says of where it was published: only who fetched it knows from where, and later commands
    connect there. Raises FormatError for whatever is wrong with it.
    """
    try:
        raw: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not JSON", saw=str(error)[:200]) from error
    found = raw.get("format") if isinstance(raw, dict) else None
    if not isinstance(found, int):
        raise FormatError(f"{where} is not a manifest of this zoo", expected="a JSON object with `format`")
    if found > FORMAT:
        raise FormatError(
            f"{where} was written by a newer zoo",
            saw=f"format {found}",
            expected=f"at most {FORMAT}",
            try_="git pull and pip install . in a checkout",
        )
    try:
        said = Manifest.model_validate_json(data, extra="ignore")
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise FormatError(
            f"{where} is not a valid manifest", saw=f"{place}: {first['msg']}" if place else first["msg"]
        ) from error
    return said.model_copy(update={"entry": said.entry.model_copy(update={"publications": []})})
