"""A search of the registry: what is asked, and the SQL for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from pydantic import Field
from sqlalchemy import ColumnElement, false, func, or_, select, sql

from zoo.entry import Record, Status
from zoo.registry.models import IndexRow, SpeedRow

Sort = Literal["newest", "id", "accuracy", "perplexity", "speed", "size", "bits", "sparsity"]
# The column that a sort goes by, and whether its best value is the largest. A test compares the keys.
_SORTS: dict[str, tuple[Any, bool]] = {
    "newest": (IndexRow.created, True),
    "id": (IndexRow.entry_id, False),
    "accuracy": (IndexRow.accuracy, True),
    "perplexity": (IndexRow.perplexity, False),
    "speed": (IndexRow.speed, True),
    "size": (IndexRow.size, False),
    "bits": (IndexRow.bits_per_weight, False),
    "sparsity": (IndexRow.sparsity, True),
}
MOST_COUNTED = 10_000  # matches of a query: beyond, counting costs more than it tells
MOST_WALKED = 10_000  # entries that a short walk passes; reading more costs as much as sorting the matches
TRIGRAM = 3  # characters: shorter words are not in the databases' trigram indexes


class Query(Record):
    """What to look for. Filters of different kinds all hold; of the values of one kind, any may."""

    text: str | None = (
        None  # each of its words is a part of the id, base, origin, family, method, pattern or a format
    )
    families: tuple[str, ...] = ()
    bases: tuple[str, ...] = ()  # by source or by repository
    methods: tuple[str, ...] = ()  # as in Figures: "sparsegpt+gptq", "unknown" ...
    patterns: tuple[str, ...] = ()  # as in Figures: "8:16", "unstructured", "dense" ...
    licenses: tuple[str, ...] = ()  # "unknown" where none is recorded
    statuses: tuple[Status, ...] = ()  # empty: all but "failed"
    min_sparsity: float | None = None
    max_sparsity: float | None = None
    min_bits: float | None = None  # per weight
    max_bits: float | None = None
    min_size: int | None = None  # bytes, as in Figures; an entry without files has none
    max_size: int | None = None
    machine: str | None = None  # measured there: the beginning of a fingerprint, or a part of the CPU's name
    # Best first, as the figure has it; entries without it come last. Of accuracies those over the most tasks
    # come first, and only such over the same tasks are ranked among each other.
    sort: Sort = "newest"
    reverse: bool = False  # worst first, and all else as it is
    limit: int | None = Field(default=50, ge=0)
    offset: int = Field(default=0, ge=0)


class Facets(Record):
    """How many entries have each value, commonest first; failed ones are counted in `statuses` only."""

    families: dict[str, int]
    bases: dict[str, int]
    methods: dict[str, int]
    patterns: dict[str, int]
    licenses: dict[str, int]
    statuses: dict[str, int]


_NOTHING = Query().model_dump(exclude={"sort", "reverse", "limit", "offset"})


def largest_first(query: Query) -> bool:
    return _SORTS[query.sort][1] != query.reverse


def is_broad(query: Query) -> bool:
    """Whether nothing is asked for but an order: then nearly all match."""
    return query.model_dump(exclude={"sort", "reverse", "limit", "offset"}) == _NOTHING


def matching(query: Query, database: str, machines: Sequence[str] | None) -> Any:
    """SELECT the ids of all that match."""
    found, _, _ = _found(query, machines)
    return found.where(*_conditions(query, database))


def count(query: Query, database: str, machines: Sequence[str] | None) -> Any:
    """SELECT how many match, at most MOST_COUNTED + 1."""
    matches = matching(query, database, machines).limit(MOST_COUNTED + 1).subquery()
    return select(func.count()).select_from(matches)


def all_sorted(query: Query, database: str, machines: Sequence[str] | None, most: int | None = None) -> Any:
    """SELECT the page of ids, each with its decode speed and how many match, by sorting all that match.

    One pass over what matches, wherever it lies. With `most` it ends after so many: where there are as many,
    the page is not the right one. `database` is SQLAlchemy's name of the dialect; `machines` the fingerprints
    that `query.machine` means.
    """
    found, figure, speed = _found(query, machines)
    alike = (IndexRow.task_count, IndexRow.tasks) if query.sort == "accuracy" else ()
    found = found.add_columns(figure.label("figure"), speed.label("speed"), *alike)
    chosen = found.where(*_conditions(query, database)).limit(most)
    matches = chosen.cte("matches").prefix_with("MATERIALIZED")
    total = select(func.count()).select_from(matches)
    page = select(matches.c.entry_id, matches.c.speed, total.scalar_subquery())
    return _page(page.order_by(*_order(query, matches.c.figure, matches.c)), query)


def in_order(query: Query, database: str, machines: Sequence[str] | None, most: int | None = None) -> Any:
    """SELECT the page of ids, each with its decode speed, by walking an index of the figure sorted by.

    The way to the first of many matches; where few match, it passes all others. With `most` the walk ends
    after so many entries, matching or not: a page that is not full is then not the right one.
    """
    found, figure, speed = _found(query, machines)
    conditions = _conditions(query, database, walking=True)
    page = _page(found.add_columns(speed).where(*conditions).order_by(*_order(query, figure)), query)
    if most is None:
        return page
    passed = select(*IndexRow.__table__.c).order_by(*_order(query, _SORTS[query.sort][0])).limit(most)
    return page.add_cte(passed.cte(IndexRow.__tablename__))  # which the page reads in place of the table


def _found(query: Query, machines: Sequence[str] | None) -> tuple[Any, Any, Any]:
    """SELECT ids, without any condition; the column to sort by; and that of the speed."""
    found = select(IndexRow.entry_id)
    speed: Any = IndexRow.speed
    if machines is not None:
        there = _speeds(machines)
        found = found.join(there, there.c.key == IndexRow.key)
        speed = there.c.speed
    return found, speed if query.sort == "speed" else _SORTS[query.sort][0], speed


def _order(query: Query, figure: Any, of: Any = IndexRow) -> tuple[Any, ...]:
    """`of`: what has the other columns."""
    if query.sort == "id":
        return (of.entry_id.desc() if largest_first(query) else of.entry_id.asc(),)
    alike = (of.task_count.desc(), of.tasks.asc()) if query.sort == "accuracy" else ()
    direction = figure.desc() if largest_first(query) else figure.asc()
    return *alike, direction.nulls_last(), of.entry_id


def _page(select_: Any, query: Query) -> Any:
    return select_.limit(query.limit).offset(query.offset)


_FACETS = {
    "families": IndexRow.family,
    "bases": IndexRow.base,
    "methods": IndexRow.method,
    "patterns": IndexRow.pattern,
    "licenses": IndexRow.license,
    "statuses": IndexRow.status,
}


def combinations() -> Any:
    """SELECT how many entries there are of each combination of facets."""
    columns = _FACETS.values()
    return select(*columns, func.count()).group_by(*columns)


def counted(rows: Iterable[Sequence[Any]]) -> Facets:
    """The facets from the rows of `combinations`."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in _FACETS}
    for *values, count in rows:
        found = dict(zip(_FACETS, values, strict=True))
        for name, value in found.items():
            if name == "statuses" or found["statuses"] != "failed":
                counts[name][value] += count
    return Facets(**{name: dict(counter.most_common()) for name, counter in counts.items()})


def _choices(query: Query) -> Iterator[ColumnElement[bool]]:
    """The filters by a facet."""
    for name, column in _FACETS.items():
        wanted = getattr(query, name)
        if name == "bases" and wanted:
            yield or_(column.in_(wanted), IndexRow.base_model.in_(wanted))
        elif wanted:
            yield column.in_(wanted)
        elif name == "statuses":
            yield column != "failed"


def _conditions(query: Query, database: str, *, walking: bool = False) -> Iterator[ColumnElement[bool]]:
    """All filters, the dearest last; `walking`: for a walk along the index of a figure."""
    yield from _choices(query)
    column: Any
    for column, least, most in (
        (IndexRow.sparsity, query.min_sparsity, query.max_sparsity),
        (IndexRow.bits_per_weight, query.min_bits, query.max_bits),
        (IndexRow.size, query.min_size, query.max_size),
    ):
        if database == "sqlite" and not walking:
            # It thinks that any range leaves little, and would read most rows one by one by an index of it.
            column = _without_index(column)
        if least is not None:
            yield column >= least
        if most is not None:
            yield column <= most
    if query.text is not None:
        yield from _contains(query.text.lower().split(), database, walking)


def _without_index(column: Any) -> Any:
    """The column for SQLite: the unary + means that no index serves."""
    return sql.literal_column(f"+{IndexRow.__tablename__}.{column.key}", column.type)


# SQLite's text index; see migration 0002.
_TEXT = sql.table("entry_text", sql.column("rowid"), sql.column("entry_text"))


def _contains(words: Sequence[str], database: str, walking: bool) -> Iterator[ColumnElement[bool]]:
    if any("\0" in word for word in words):  # which no text in a database has
        yield false()
    elif database == "sqlite":
        indexed = [word for word in words if len(word) >= TRIGRAM]
        if indexed:
            quoted = " ".join('"' + word.replace('"', '""') + '"' for word in indexed)
            matches = _TEXT.c.entry_text.op("MATCH")(quoted)
            if walking:  # a set of all that match, which the walk asks
                yield _without_index(IndexRow.key).in_(select(_TEXT.c.rowid).where(matches))
            else:
                yield _TEXT.c.rowid == IndexRow.key
                yield matches
        for word in words:
            if word not in indexed:
                yield func.instr(IndexRow.text, word) > 0
    else:
        for word in words:
            yield IndexRow.text.contains(word, autoescape=True)


def _speeds(machines: Sequence[str]) -> Any:
    """Each entry's best decode on these machines."""
    there = SpeedRow.machine_fingerprint.in_(machines)
    if len(machines) == 1:
        return select(SpeedRow.key, SpeedRow.speed).where(there).subquery()
    best = func.max(SpeedRow.speed).label("speed")
    return select(SpeedRow.key, best).where(there).group_by(SpeedRow.key).subquery()
