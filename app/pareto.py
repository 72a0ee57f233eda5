"""The points of the chart of accuracy against cost, and which of them nothing else beats. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

from zoo.compare import FAITHFUL, WEIGHTS, describe, own, own_forms, protocol
from zoo.entry import Artifact, Benchmark, Direction, Measurement, Record
from zoo.registry import Summary

Cost = Literal["size", "bits", "speed"]
Kind = Literal["entry", "llama.cpp", "base"]
COSTS: tuple[Cost, ...] = ("size", "bits", "speed")
AXES: dict[Cost, str] = {
    "size": "size of the files, MB",
    "bits": "bits per weight, all files' bytes included",
    "speed": "decode, token/s",
}
BASE_BITS = 16
UNPRUNED = 0.01  # of zeros; quantization makes a few


class Setting(Record):
    """What two speeds must share to be compared."""

    machine: str  # fingerprint
    cpu: str
    threads: int
    prompt_tokens: int
    generated_tokens: int

    @property
    def name(self) -> str:
        tokens = f"{self.prompt_tokens} + {self.generated_tokens} tokens"
        return f"{self.cpu}, {self.threads} threads, {tokens} ({self.machine[:8]})"


class Point(Record):
    """A model in one form: what it costs and how good it is."""

    id: str  # of the entry; of the base: of an entry that names it
    name: str
    form: str  # the files' format, or the runner and it
    kind: Kind
    cost: float
    quality: float
    low: float | None  # quality minus and plus two standard errors
    high: float | None
    best: bool = False  # nothing is both better and cheaper


def setting(benchmark: Benchmark) -> Setting:
    b = benchmark
    return Setting(
        machine=b.machine.fingerprint,
        cpu=b.machine.cpu,
        threads=b.threads,
        prompt_tokens=b.prompt_tokens,
        generated_tokens=b.generated_tokens,
    )


def settings(summaries: Iterable[Summary]) -> list[Setting]:
    """Those of all benchmarks, the commonest first."""
    counts: dict[str, int] = {}
    known: dict[str, Setting] = {}
    for found in (setting(b) for s in summaries for b in s.benchmarks):
        known.setdefault(found.name, found)
        counts[found.name] = counts.get(found.name, 0) + 1
    return [known[name] for name in sorted(counts, key=lambda name: -counts[name])]


def metrics(summaries: Iterable[Summary]) -> dict[str, Measurement]:
    """Every way in which entries were measured, the commonest first, by a name that no other has."""
    counts: dict[tuple[object, ...], int] = {}
    examples: dict[tuple[object, ...], Measurement] = {}
    for m in (m for s in summaries for m in own(s.measurements) if m.subject == "entry"):
        counts[protocol(m)] = counts.get(protocol(m), 0) + 1
        examples.setdefault(protocol(m), m)
    named: dict[str, Measurement] = {}
    for key in sorted(counts, key=lambda key: -counts[key]):
        name = describe(examples[key])
        if name in named:  # alike in words, not in all that matters
            name += f", {examples[key].harness}, data {(examples[key].data_revision or '?')[:8]}"
        named.setdefault(name, examples[key])
    return named


def points(summaries: Sequence[Summary], metric: Measurement, cost: Cost, at: Setting | None) -> list[Point]:
    """What was measured just as `metric` was, and for the cost "speed" in the setting `at`.

    Of an entry the form that its figures are of; GGUF files only of entries that are not pruned, as
    llama.cpp's quantizations: they store zeros as they store any weight. The base model in float16, but for
    its speed, which no entry records.
    """
    found: list[Point] = []
    bases: dict[str, Point] = {}
    for summary in summaries:
        measured = _measured(summary, metric, "entry")
        if measured is not None:
            found += [
                _point(summary, summary.id, form, kind, value, measured)
                for form, kind, value in _forms(summary, cost, at)
            ]
        base = _measured(summary, metric, "base")
        if base is not None and cost != "speed":
            bits = {"bits": float(BASE_BITS), "size": BASE_BITS / 8 * summary.parameters / 1e6}[cost]
            name = summary.base_repository or summary.base_model
            bases.setdefault(name, _point(summary, name, "float16", "base", bits, base))
    found += bases.values()
    better = _frontier(found, metric.direction, cost)
    return [p.model_copy(update={"best": i in better}) for i, p in enumerate(found)]


def base_quality(summaries: Iterable[Summary], metric: Measurement) -> dict[str, float]:
    """What the base models reach in the same measurement, by their names."""
    return {
        s.base_repository or s.base_model: base.value
        for s in summaries
        if (base := _measured(s, metric, "base")) is not None
    }


def _point(summary: Summary, name: str, form: str, kind: Kind, cost: float, measured: Measurement) -> Point:
    error = measured.stderr
    return Point(
        id=summary.id,
        name=name,
        form=form,
        kind=kind,
        cost=cost,
        quality=measured.value,
        low=None if error is None else measured.value - 2 * error,
        high=None if error is None else measured.value + 2 * error,
    )


def _measured(summary: Summary, like: Measurement, subject: str) -> Measurement | None:
    alike = protocol(like)
    measured = own(summary.measurements)
    return next((m for m in measured if m.subject == subject and protocol(m) == alike), None)


def _forms(summary: Summary, cost: Cost, at: Setting | None) -> list[tuple[str, Kind, float]]:
    """(form, kind, cost) of an entry, as `points` says."""
    if cost == "speed":
        forms = {a.path: a for a in summary.artifacts}
        return [
            (
                f"{b.runner} {forms[b.artifact].format or ''}".strip(),
                _kind(forms[b.artifact]),
                b.decode_tokens_per_s,
            )
            for b in summary.benchmarks
            if at is not None
            and setting(b) == at
            and b.artifact in forms
            and _holds(summary, forms[b.artifact])
        ]
    sizes: dict[tuple[str, str], int] = {}
    kinds: dict[tuple[str, str], Kind] = {}
    for a in summary.artifacts:
        if a.kind in WEIGHTS and _holds(summary, a):
            key = _form(a)
            sizes[key] = sizes.get(key, 0) + a.size
            kinds[key] = _kind(a)
    first = next((files[0] for files in own_forms(summary.artifacts)), None)
    shown = [key for key in sizes if kinds[key] == "llama.cpp" or (first and key == _form(first))]
    scale = 1e6 if cost == "size" else summary.parameters / 8
    found: list[tuple[str, Kind, float]] = [(key[1], kinds[key], sizes[key] / scale) for key in shown]
    if cost == "bits":  # the entry's own figure is that of its smallest exact encoding
        found = [one for one in found if one[1] == "llama.cpp"]
        found.append(("smallest exact encoding", "entry", summary.bits_per_weight))
    return found


def _form(artifact: Artifact) -> tuple[str, str]:
    return artifact.kind, artifact.format or artifact.kind


def _kind(artifact: Artifact) -> Kind:
    return "llama.cpp" if artifact.kind == "gguf" else "entry"


def _holds(summary: Summary, artifact: Artifact) -> bool:
    """Whether the file is drawn: it gives what was measured of the model, which not every GGUF type does."""
    return artifact.kind != "gguf" or (artifact.format in FAITHFUL and summary.sparsity < UNPRUNED)


def _frontier(found: Sequence[Point], direction: Direction, cost: Cost) -> set[int]:
    """Positions of the points that no other beats in both."""
    sign = -1 if direction == "higher_is_better" else 1
    dear = -1 if cost == "speed" else 1
    best, frontier = math.inf, set()
    for i in sorted(range(len(found)), key=lambda i: (dear * found[i].cost, sign * found[i].quality)):
        if sign * found[i].quality < best:
            best = sign * found[i].quality
            frontier.add(i)
    return frontier
