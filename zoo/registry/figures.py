"""What lists of entries are filtered and sorted by: a few figures of each, computed once when it is put."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from zoo.compare import (
    WEIGHTS,
    Pair,
    is_accuracy,
    is_perplexity,
    mean,
    mean_accuracy,
    own_benchmarks,
    own_forms,
    pairs,
)
from zoo.entry import Entry, Measurement, Record

UNKNOWN = "unknown"  # stands for a method or licence that is not recorded
DENSE = "dense"  # the pattern of an entry without one


class Figures(Record):
    """An entry in a line. Means and bests serve to find entries; `zoo.compare` says what may be compared.

    Quality is that of the entry's own weights or packed file, so size and speed are those of such files.
    """

    size: int | None  # bytes of the first of `own_forms`
    accuracy: float | None  # `mean_accuracy`
    tasks: str | None  # those that it is the mean over, e.g. "arc_easy:500,zoo_choice"; see `_spelled`
    accuracy_delta: float | None  # mean of entry - base over the tasks that both were measured on alike
    perplexity: float | None  # of a text, at the longest context; of those that the base has too, if any
    base_perplexity: float | None  # measured in the same way
    speed: float | None  # best decode, tokens/s, of `own_forms`, on any machine (or that a query names)
    method: str  # of the most weights, e.g. "sparsegpt+gptq", or UNKNOWN
    pattern: str  # of the most weights: "unstructured", "8:16" ..., or DENSE


def figures(entry: Entry) -> Figures:
    """Pure: the same entry gives the same figures."""
    measured = pairs(entry.measurements)
    by_task = {pair.entry.task: pair for pair in reversed(measured) if is_accuracy(pair.entry)}
    differences = [p.difference for p in by_task.values() if p.difference is not None]
    perplexities = [pair for pair in measured if is_perplexity(pair.entry)]
    perplexity = max(perplexities, key=_preference, default=None)
    base = perplexity and perplexity.base
    accuracy = mean_accuracy(pair.entry for pair in measured)
    tasks = ",".join(sorted(_spelled(pair.entry) for pair in by_task.values()))
    forms = own_forms(entry.artifacts)
    return Figures(
        size=sum(a.size for a in forms[0]) if forms else None,
        accuracy=accuracy,
        tasks=None if accuracy is None else tasks,
        accuracy_delta=mean(differences),
        perplexity=None if perplexity is None else perplexity.entry.value,
        base_perplexity=None if base is None else base.value,
        speed=max(best_speeds(entry).values(), default=None),
        method=_commonest((layer.method, layer.rows * layer.columns) for layer in entry.layers) or UNKNOWN,
        pattern=_commonest((layer.pattern, layer.rows * layer.columns) for layer in entry.layers) or DENSE,
    )


def best_speeds(entry: Entry) -> dict[str, float]:
    """The best decode of the entry's own forms, tokens/s, on each machine, by its fingerprint."""
    found: dict[str, float] = {}
    for b in own_benchmarks(entry.artifacts, entry.benchmarks):
        machine = b.machine.fingerprint
        found[machine] = max(b.decode_tokens_per_s, found.get(machine, b.decode_tokens_per_s))
    return found


def task_count(found: Figures) -> int:
    return found.tasks.count(",") + 1 if found.tasks else 0


def document(entry: Entry, found: Figures) -> str:
    """What a text search looks at, in lower case, one part per line; a word never spans two parts."""
    formats = dict.fromkeys(a.format for a in entry.artifacts if a.format and a.kind in WEIGHTS)
    names = (entry.id, entry.base_model, entry.base_repository, entry.origin, entry.family)
    parts = (*names, found.method, found.pattern, *formats)
    return "\n".join(part.lower() for part in parts if part)


def _spelled(m: Measurement) -> str:
    """A task as `benchmarks.accuracy --tasks` takes it: of the first so many questions, with examples."""
    return m.task + (f":{m.limit}" if m.limit is not None else "") + (f"@{m.few_shot}" if m.few_shot else "")


def _preference(pair: Pair) -> tuple[bool, int]:
    return pair.base is not None, pair.entry.context_length or 0


def _commonest(named: Iterable[tuple[str | None, int]]) -> str | None:
    weights: Counter[str] = Counter()
    for name, count in named:
        if name:
            weights[name] += count
    return weights.most_common(1)[0][0] if weights else None
