"""What lists of entries are filtered and sorted by: a few figures of each, computed once when it is put."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from zoo.compare import WEIGHTS, Pair, pairs
from zoo.entry import Artifact, Entry, Record

UNKNOWN = "unknown"  # stands for a method or licence that is not recorded
DENSE = "dense"  # the pattern of an entry without one


class Figures(Record):
    """An entry in a line. Means and bests serve to find entries; `zoo.compare` says what may be compared."""

    size: int | None  # bytes of the smallest complete set of weights: the files of one kind and format
    accuracy: float | None  # mean of the metric `accuracy` over the tasks, 0 ... 1
    accuracy_delta: float | None  # mean of entry - base over the tasks that both were measured on alike
    perplexity: float | None  # at the longest context; of those that the base has too, if any
    base_perplexity: float | None  # measured in the same way
    speed: float | None  # best decode, tokens/s, of any file and machine (of the machine that a query names)
    method: str  # of the most weights, e.g. "sparsegpt+gptq", or UNKNOWN
    pattern: str  # of the most weights: "unstructured", "8:16" ..., or DENSE


def figures(entry: Entry) -> Figures:
    """Pure: the same entry gives the same figures."""
    measured = pairs(entry.measurements)
    by_task = {pair.entry.task: pair for pair in reversed(measured) if pair.entry.metric == "accuracy"}
    differences = [p.difference for p in by_task.values() if p.difference is not None]
    perplexities = [pair for pair in measured if pair.entry.metric == "perplexity"]
    perplexity = max(perplexities, key=_preference, default=None)
    base = perplexity and perplexity.base
    return Figures(
        size=smallest_size(entry.artifacts),
        accuracy=_mean([pair.entry.value for pair in by_task.values()]),
        accuracy_delta=_mean(differences),
        perplexity=None if perplexity is None else perplexity.entry.value,
        base_perplexity=None if base is None else base.value,
        speed=max(best_speeds(entry).values(), default=None),
        method=_commonest((layer.method, layer.rows * layer.columns) for layer in entry.layers) or UNKNOWN,
        pattern=_commonest((layer.pattern, layer.rows * layer.columns) for layer in entry.layers) or DENSE,
    )


def best_speeds(entry: Entry) -> dict[str, float]:
    """The best decode, tokens/s, on each machine, by its fingerprint."""
    found: dict[str, float] = {}
    for b in entry.benchmarks:
        machine = b.machine.fingerprint
        found[machine] = max(b.decode_tokens_per_s, found.get(machine, b.decode_tokens_per_s))
    return found


def smallest_size(artifacts: Iterable[Artifact]) -> int | None:
    """Bytes of the smallest set of files that holds the whole model; None if there is none."""
    sizes: Counter[tuple[str, str | None]] = Counter()
    for artifact in artifacts:
        if artifact.kind in WEIGHTS:
            sizes[artifact.kind, artifact.format] += artifact.size
    return min(sizes.values(), default=None)


def document(entry: Entry, found: Figures) -> str:
    """What a text search looks at, in lower case, one part per line; a word never spans two parts."""
    formats = dict.fromkeys(a.format for a in entry.artifacts if a.format and a.kind in WEIGHTS)
    names = (entry.id, entry.base_model, entry.base_repository, entry.origin, entry.family)
    parts = (*names, found.method, found.pattern, *formats)
    return "\n".join(part.lower() for part in parts if part)


def _preference(pair: Pair) -> tuple[bool, int]:
    return pair.base is not None, pair.entry.context_length or 0


def _mean(values: Sequence[float]) -> float | None:
    mean = sum(values) / len(values) if values else math.nan
    return mean if math.isfinite(mean) else None


def _commonest(named: Iterable[tuple[str | None, int]]) -> str | None:
    weights: Counter[str] = Counter()
    for name, count in named:
        if name:
            weights[name] += count
    return weights.most_common(1)[0][0] if weights else None
