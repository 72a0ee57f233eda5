"""`zoo search`: the local registry, and what zoos published to a Hub, in one list."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.entry import Entry, Machine, Record, Status
from zoo.errors import UsageError, ZooError
from zoo.progress import say
from zoo.registry import Figures, Query, Registry, Summary, open_registry
from zoo.registry.figures import task_count
from zoo.registry.query import largest_first

if TYPE_CHECKING:  # importing these takes longer than a local search
    from huggingface_hub.hf_api import ModelInfo

    from zoo.hub.client import Hub

LOCAL = "local"
MAX_REPOSITORIES = 1000  # looked at on a Hub
AT_ONCE = 8  # manifests
# Behind the id of an entry, once for each other entry of that id before it; no text that is searched has it.
ANOTHER = "\x1f"

Same = tuple[str, frozenset[tuple[str, str]]]  # of one id and the same files: what is one entry


class Place(Record):
    """Where an entry is: in the local registry, or in a repository."""

    endpoint: str  # "local", or a URL
    repository: str | None  # None: local


class Hit(Record):
    """An entry that was found. What the local registry has of it goes before what was published.

    Of several entries of one id, which differ in their files, each is a hit of its own.
    """

    id: str
    places: list[Place]
    status: Status
    family: str
    base: str  # its repository if known, else its source
    license: str | None
    created: str
    parameters: int
    sparsity: float
    bits_per_weight: float
    figures: Figures


class Found(Record):
    """The hits that the query's limit and offset leave, best first, and how many there are in all."""

    total: int  # at most MOST_COUNTED are counted
    more: bool  # there are more than `total`
    hits: list[Hit]


def search(query: Query, registry: Registry | None, hub: Hub | None = None) -> Found:
    """Search the local registry, a Hub, or both. Raises RegistryError, HubError, UsageError."""
    end = None if query.limit is None else query.offset + query.limit
    first = query.model_copy(update={"limit": end, "offset": 0})  # who is not among these comes later in both
    published = _published(hub, query) if hub is not None else {}
    with nullcontext() if hub is None else tempfile.TemporaryDirectory(prefix="zoo-search-") as folder:
        registries = [] if registry is None else [registry]
        if folder is not None:
            # The same query, in a registry of what is published only: every filter has one meaning.
            remote = open_registry(str(Path(folder) / "registry.db"))
            known = _recorded(registry, {entry_id for entry_id, _ in published}) if registry else set()
            _put_all(remote, [entry for same, (entry, _) in published.items() if same not in known])
            registries.append(remote)
        if query.machine is not None:
            first = first.model_copy(update={"machine": check_machine(query.machine, registries).fingerprint})
        pages = [(one is registry, one.search(first)) for one in registries]
    hits = []
    for is_local, page in pages:
        here = [Place(endpoint=LOCAL, repository=None)] if is_local else []
        for summary in page.entries:
            one = summary.model_copy(update={"id": summary.id.rstrip(ANOTHER)})
            _, there = published.get(_same(one), (None, [])) if one.status != "failed" else (None, [])
            hits.append(_hit(one, [*here, *there]))
    return Found(
        total=sum(page.total for _, page in pages),
        more=any(page.more for _, page in pages),
        hits=_sorted(hits, query)[query.offset : end],
    )


def check_machine(name: str, registries: Sequence[Registry]) -> Machine:
    """The one machine that `name` means: the beginning of its fingerprint, or a part of its CPU's name.

    UsageError if nothing was measured on such a one, or on several: their speeds do not compare.
    """
    found = _machines(registries, name)
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError(
            f"nothing in the registry was measured on a machine {name!r}",
            expected="; ".join(map(_called, _machines(registries))) or "entries with measured speed",
            try_="`zoo bench ID --record` on it, which measures an entry there",
        )
    raise UsageError(
        f"{name!r} may be any of {len(found)} machines, whose speeds do not compare",
        saw="; ".join(map(_called, found)),
        expected="one of them",
        try_=f"--for {found[0].fingerprint[:8]}",
    )


def _machines(registries: Sequence[Registry], name: str | None = None) -> list[Machine]:
    return list({m.fingerprint: m for one in registries for m in one.machines(name)}.values())


def _called(machine: Machine) -> str:
    return f"{machine.cpu} ({machine.fingerprint[:8]})"


def _same(one: Entry | Summary) -> Same:
    return one.id, frozenset((artifact.path, artifact.sha256) for artifact in one.artifacts)


def _recorded(registry: Registry, ids: Iterable[str]) -> set[Same]:
    """Of the entries of these ids, those that the registry offers: a failed one hides none."""
    found = map(registry.find, registry.known(ids))
    return {_same(entry) for entry in found if entry is not None and entry.status != "failed"}


def _put_all(remote: Registry, entries: Iterable[Entry]) -> None:
    """Put entries, of one id too, into a registry; which it does not take are said."""
    taken: Counter[str] = Counter()
    for entry in entries:
        try:
            remote.put(entry.model_copy(update={"id": entry.id + ANOTHER * taken[entry.id]}))
        except ZooError as error:
            say(f"left out: {'; '.join(filter(None, (error.what, error.saw)))}")
        else:
            taken[entry.id] += 1


def _published(hub: Hub, query: Query) -> dict[Same, tuple[Entry, list[Place]]]:
    """The entries that zoos published to the Hub, and their repositories; unreadable ones are said."""
    from zoo.hub import client

    models = client.published(hub, MAX_REPOSITORIES)
    if len(models) > MAX_REPOSITORIES:
        say(f"{hub.endpoint} has more than {MAX_REPOSITORIES} entries; only so many are looked at")
        models.pop()
    if query.families:  # the cards' tags say it, which saves looking
        models = [model for model in models if not model.tags or {*query.families} & {*model.tags}]
    found: dict[Same, tuple[Entry, list[Place]]] = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for model, entry in zip(models, pool.map(lambda model: _entry(hub, model), models), strict=True):
            if isinstance(entry, str):
                say(f"left out: {entry}")
            elif entry.status != "failed":
                place = Place(endpoint=hub.endpoint, repository=model.id)
                found.setdefault(_same(entry), (entry, []))[1].append(place)
    return found


def _entry(hub: Hub, model: ModelInfo) -> Entry | str:
    """The entry of a repository's manifest, or in words why there is none."""
    from zoo.hub import client
    from zoo.hub.client import Blob
    from zoo.hub.manifest import MANIFEST, MAX_BYTES, parse

    try:
        manifest = Blob(MANIFEST, size=0, oid="", sha256=None)
        data = client.read(hub, model.id, model.sha or "main", manifest, MAX_BYTES)
        entry = parse(data, f"{MANIFEST} of {model.id}").entry
    except ZooError as error:
        return "; ".join(filter(None, (error.what, error.saw)))
    if entry.id != model.id.rpartition("/")[2]:
        return f"{model.id}, whose manifest is of {entry.id}"
    return entry


def _hit(summary: Summary, places: list[Place]) -> Hit:
    shared = {name: getattr(summary, name) for name in Hit.model_fields if name not in ("places", "base")}
    return Hit(**shared, places=places, base=summary.base_repository or summary.base_model)


def _sorted(hits: Iterable[Hit], query: Query) -> list[Hit]:
    """As the registry sorts: best first, who lacks the figure last, then by id; accuracies task by task."""

    def value(hit: Hit) -> Any:
        plain = {"newest": "created", "id": "id", "bits": "bits_per_weight", "sparsity": "sparsity"}
        if query.sort in plain:
            return getattr(hit, plain[query.sort])
        return getattr(hit.figures, query.sort)

    by_id = sorted(hits, key=lambda hit: hit.id)
    known = [hit for hit in by_id if value(hit) is not None]
    known.sort(key=value, reverse=largest_first(query))
    if query.sort == "accuracy":
        known.sort(key=lambda hit: (-task_count(hit.figures), hit.figures.tasks or ""))
    return known + [hit for hit in by_id if value(hit) is None]
