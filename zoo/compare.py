"""Figures side by side: an entry with its base model, and entries with each other."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from zoo.entry import Artifact, Benchmark, Direction, Entry, Measurement, Record

if TYPE_CHECKING:  # the registry's figures are made by this module
    from zoo.registry import Summary

WEIGHTS = ("safetensors", "compressed-tensors", "gguf", "packed")  # kinds of artifact that hold the model
# llama.cpp's types that keep a model's output, so that what was measured of the model holds for the file.
FAITHFUL = ("F32", "BF16", "F16", "Q8_0")
# Tasks of which the field quotes the length-normalised accuracy; of all others it is the plain one.
LENGTH_NORMALISED = ("arc_challenge", "hellaswag")
# What two measurements must share for their values to be compared.
_PROTOCOL = (
    "metric", "unit", "task", "task_version", "data_revision", "context_length", "stride", "samples",
    "sample_unit", "few_shot", "limit", "harness", "dtype",
)  # fmt: skip


def protocol(measurement: Measurement) -> tuple[object, ...]:
    """All that says how a figure was measured, and not of what."""
    return tuple(getattr(measurement, name) for name in _PROTOCOL)


def own(measurements: Iterable[Measurement]) -> list[Measurement]:
    """What was measured of the base, and of the entry itself: its weights or its packed file.

    Wherever one figure stands for the entry it is one of these, and never one of its GGUF files', which are
    llama.cpp's quantizations of it (`gguf_files`).
    """
    return [m for m in measurements if not (m.artifact or "").endswith(".gguf")]


def own_forms(artifacts: Iterable[Artifact]) -> list[list[Artifact]]:
    """The sets of files, of one kind and format each, that are what `own` was measured of.

    The first is the one whose size stands beside these figures: the packed file if there is one, else the
    smallest that holds the entry's weights unrounded, else Q8_0. Other GGUF types are the model rounded
    further: they count only where there is nothing else, as of an imported file.
    """

    def roundings(one: Artifact) -> int:
        if one.kind == "gguf":
            return 3 if one.format not in FAITHFUL else 2 if one.format == "Q8_0" else 1
        return 0 if one.kind == "packed" else 1

    sets: dict[tuple[str, str | None], list[Artifact]] = {}
    for artifact in artifacts:
        if artifact.kind in WEIGHTS:
            sets.setdefault((artifact.kind, artifact.format), []).append(artifact)
    found = sorted(sets.values(), key=lambda files: (roundings(files[0]), sum(a.size for a in files)))
    return [files for files in found if roundings(files[0]) <= max(2, roundings(found[0][0]))]


def own_benchmarks(artifacts: Iterable[Artifact], benchmarks: Iterable[Benchmark]) -> list[Benchmark]:
    """Those of files of `own_forms`."""
    paths = {artifact.path for files in own_forms(artifacts) for artifact in files}
    return [b for b in benchmarks if b.artifact in paths]


def is_accuracy(m: Measurement) -> bool:
    """Whether it is the accuracy that its task is known by, and that enters a mean: one metric of a task."""
    return m.metric == ("accuracy_norm" if m.task in LENGTH_NORMALISED else "accuracy")


def is_perplexity(m: Measurement) -> bool:
    """Whether it is a perplexity of a text; some of lm-eval's tasks have one, too, of their questions."""
    return m.metric == "perplexity" and m.sample_unit == "windows"


def perplexity_of(summary: Summary) -> Measurement | None:
    """The measurement behind the perplexity in an entry's figures; it says at what context."""
    ours = (m for m in own(summary.measurements) if m.subject == "entry" and is_perplexity(m))
    return next((m for m in ours if m.value == summary.figures.perplexity), None)


def accuracies(measurements: Iterable[Measurement]) -> dict[str, Measurement]:
    """Task -> its accuracy (`is_accuracy`), the first if there are several. Of one subject and file."""
    found: dict[str, Measurement] = {}
    for m in filter(is_accuracy, measurements):
        found.setdefault(m.task, m)
    return found


def mean_accuracy(measurements: Iterable[Measurement]) -> float | None:
    """The mean of `accuracies` over the tasks, 0 ... 1. Whatever is called a mean accuracy is this."""
    return mean([m.value for m in accuracies(measurements).values()])


def mean(values: Sequence[float]) -> float | None:
    """None of no values, and where it is not finite."""
    found = sum(values) / len(values) if values else math.nan
    return found if math.isfinite(found) else None


class Pair(NamedTuple):
    """A figure of the entry and, if it was measured in the same way, of its base model."""

    entry: Measurement
    base: Measurement | None

    @property
    def difference(self) -> float | None:
        return None if self.base is None else self.entry.value - self.base.value

    @property
    def loss(self) -> float | None:
        """How much worse the entry is than its base, in the metric's unit; negative: better."""
        if self.difference is None:
            return None
        return self.difference if self.entry.direction == "lower_is_better" else -self.difference

    @property
    def stderr(self) -> float | None:
        """Standard error of the difference, the two taken as independent, which overstates it."""
        if self.base is None or self.entry.stderr is None or self.base.stderr is None:
            return None
        return math.hypot(self.entry.stderr, self.base.stderr)


def pairs(measurements: Iterable[Measurement]) -> list[Pair]:
    """The entry's own figures, each with its base's."""
    found = own(measurements)
    base = {protocol(m): m for m in found if m.subject == "base"}
    return [Pair(m, base.get(protocol(m))) for m in found if m.subject == "entry"]


class GgufFile(NamedTuple):
    """A GGUF file of an entry, with what llama.cpp makes of it."""

    file: Artifact
    bits_per_weight: float  # all of the file's bytes
    perplexity: Measurement | None
    accuracies: dict[str, Measurement]  # by task
    decode: float | None  # best, tokens/s

    @property
    def accuracy(self) -> float | None:
        """Mean over the tasks."""
        return mean_accuracy(self.accuracies.values())


def gguf_files(entry: Entry) -> list[GgufFile]:
    """The GGUF files, largest first; none if none of them was asked anything."""
    files = sorted((a for a in entry.artifacts if a.kind == "gguf"), key=lambda a: -a.size)
    found = []
    for file in files:
        measured = [m for m in entry.measurements if m.artifact == file.path]
        speeds = [b.decode_tokens_per_s for b in entry.benchmarks if b.artifact == file.path]
        found.append(
            GgufFile(
                file=file,
                bits_per_weight=8 * file.size / max(1, entry.parameters),
                perplexity=next(filter(is_perplexity, measured), None),
                accuracies=accuracies(measured),
                decode=max(speeds, default=None),
            )
        )
    return found if any(one.perplexity or one.accuracies for one in found) else []


def gguf_tasks(entry: Entry) -> list[str]:
    """The tasks that any of its GGUF files was asked, for a table of `gguf_files`."""
    return list(dict.fromkeys(task for one in gguf_files(entry) for task in one.accuracies))


class Row(Record):
    """One figure of several entries; `values` are in the order of the entries, None where unknown."""

    name: str
    unit: str
    direction: Direction | None  # None: neither high nor low is better
    base: float | None  # of the base model, where the entries share it
    values: list[float | None]
    best: list[int]  # positions of the best value, empty if there is nothing to choose


def compare(entries: Sequence[Entry]) -> list[Row]:
    """Every figure that any of the entries has: compression, then measurements, then speed.

    Of GGUF files, what their table shows.
    """
    rows = [
        _row("sparsity", "1", None, [e.sparsity for e in entries]),
        _row("bits per weight", "bit", "lower_is_better", [e.bits_per_weight for e in entries]),
        _row("compression ratio", "1", "higher_is_better", [e.compression_ratio for e in entries]),
    ]
    weights = [a for e in entries for a in e.artifacts if a.kind in WEIGHTS]
    for kind, form in dict.fromkeys((a.kind, a.format) for a in weights):
        name = " ".join(filter(None, ("size", kind, form)))
        rows.append(_row(name, "byte", "lower_is_better", [_size(e, kind, form) for e in entries]))
    bases = {entry.base_sha256 for entry in entries}
    shared = len(bases) == 1 and None not in bases
    asked = {protocol(pair.entry): pair.entry for e in entries for pair in pairs(e.measurements)}
    for (key, one), name in zip(asked.items(), descriptions(asked.values()), strict=True):
        measured = [_measured(entry, key, "entry") for entry in entries]
        base = next((m for e in entries if (m := _measured(e, key, "base"))), None) if shared else None
        values = [None if m is None else m.value for m in measured]
        rows.append(_row(name, one.unit, one.direction, values, None if base is None else base.value))
    rows += _rows_of_gguf_files(entries)
    for setting in dict.fromkeys(_setting(e, b) for e in entries for b in e.benchmarks):
        runs = [next((b for b in e.benchmarks if _setting(e, b) == setting), None) for e in entries]
        prefill = [None if run is None else run.prefill_tokens_per_s for run in runs]
        decode = [None if run is None else run.decode_tokens_per_s for run in runs]
        rows.append(_row(f"prefill, {setting}", "token/s", "higher_is_better", prefill))
        rows.append(_row(f"decode, {setting}", "token/s", "higher_is_better", decode))
    return rows


def describe(m: Measurement) -> str:
    """A measurement's task, metric and protocol in a few words; perplexity never without its context."""
    parts = [f"{m.task} {m.metric}"]
    if m.context_length is not None:
        parts.append(f"context {m.context_length}")
    if m.few_shot:
        parts.append(f"{m.few_shot}-shot")
    parts.append(f"{m.samples} {m.sample_unit}")
    return ", ".join(parts)


def descriptions(measurements: Iterable[Measurement]) -> list[str]:
    """`describe` of each, with its arithmetic where several are described alike."""
    described = [(describe(m), m.dtype) for m in measurements]
    count = Counter(name for name, _ in described)
    return [name if count[name] == 1 else f"{name}, {dtype}" for name, dtype in described]


def _row(
    name: str, unit: str, direction: Direction | None, values: list[float | None], base: float | None = None
) -> Row:
    best = _best(values, direction)
    return Row(name=name, unit=unit, direction=direction, base=base, values=values, best=best)


def _best(values: Sequence[float | None], direction: Direction | None) -> list[int]:
    known = [value for value in values if value is not None]
    if direction is None or len(known) < 2 or len(set(known)) == 1:
        return []
    best = max(known) if direction == "higher_is_better" else min(known)
    return [position for position, value in enumerate(values) if value == best]


def _measured(entry: Entry, key: tuple[object, ...], subject: str) -> Measurement | None:
    return next((m for m in own(entry.measurements) if m.subject == subject and protocol(m) == key), None)


def _rows_of_gguf_files(entries: Sequence[Entry]) -> list[Row]:
    """Perplexity and accuracies of the entries' GGUF files, type by type."""
    measured = [
        {
            (one.file.format or one.file.path, protocol(m)): m
            for one in gguf_files(entry)
            for m in (*filter(None, [one.perplexity]), *one.accuracies.values())
        }
        for entry in entries
    ]
    rows = []
    for key in dict.fromkeys(key for figures in measured for key in figures):
        found = [figures.get(key) for figures in measured]
        one = next(m for m in found if m is not None)
        values = [None if m is None else m.value for m in found]
        rows.append(_row(f"{describe(one)}, gguf {key[0]}", one.unit, one.direction, values))
    return rows


def _size(entry: Entry, kind: str, form: str | None) -> float | None:
    return sum(a.size for a in entry.artifacts if (a.kind, a.format) == (kind, form)) or None


def _setting(entry: Entry, benchmark: Benchmark) -> str:
    b = benchmark
    form = next((a.format for a in entry.artifacts if a.path == b.artifact and a.format), b.artifact)
    tokens = f"{b.prompt_tokens}+{b.generated_tokens} tokens"
    return f"{b.runner} {form}, {b.threads} threads, {tokens}, {b.machine.cpu} ({b.machine.fingerprint[:8]})"
