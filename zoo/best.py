"""`zoo best`: of a base model's entries, the one to take for a target, and the Pareto front it is on.

Only figures that were measured in the same way meet: the protocol that most entries share decides, and
who was measured otherwise is left out, and named. Size, bits and sparsity need no measuring.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Literal, TypeVar

from zoo.compare import describe, is_accuracy, is_perplexity, own, own_benchmarks, protocol
from zoo.entry import Benchmark, Measurement, Record
from zoo.errors import UsageError, ZooError
from zoo.registry import Summary

Figure = Literal["accuracy", "ppl", "speed", "size", "bits", "sparsity"]
# Whether the largest is the best, in the order in which ties are broken.
LARGEST: dict[Figure, bool] = {
    "accuracy": True, "ppl": False, "speed": True, "size": False, "bits": False, "sparsity": True,
}  # fmt: skip
OPTIMIZED: tuple[Figure, ...] = ("accuracy", "speed", "size", "ppl")
# What a front needs besides the figure that is optimized: there is always a price.
_PRICE: dict[Figure, Figure] = {"accuracy": "size", "ppl": "size", "size": "accuracy", "speed": "accuracy"}
_UNITS: dict[Figure, dict[str, float]] = {
    "accuracy": {"": 1, "%": 0.01},
    "ppl": {"": 1},
    "speed": {"": 1, "tok/s": 1},
    "size": {"": 1, "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
    "bits": {"": 1},
    "sparsity": {"": 1, "%": 0.01},
}
_OF_BASE: tuple[Figure, ...] = ("accuracy", "ppl")
_CONSTRAINT = re.compile(r"(?P<figure>\w+)\s*(?P<operator>[<>=!]+)\s*(?P<value>.*)", re.ASCII)
_AMOUNT = re.compile(r"(?P<number>\d+(?:\.\d+)?|\.\d+)\s*(?P<unit>.*)", re.ASCII)
_SHARE = re.compile(r"(?:(\d+(?:\.\d+)?|\.\d+)\s*\*\s*)?base", re.ASCII)
T = TypeVar("T")


class Constraint(Record):
    """One part of --within: `figure` is at least (or at most) `value`, or `value` times the base's."""

    figure: Figure
    at_least: bool
    value: float
    of_base: bool

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{self.figure}{sign}" + (f"{self.value:g}*base" if self.of_base else self.show(self.value))

    def show(self, value: float) -> str:
        """A value of this figure as one writes it."""
        return f"{value / 1e6:.4g}MB" if self.figure == "size" else f"{value:.4g}"


class Candidate(Record):
    """An entry's figures, each measured as those of the other candidates; None: not known in that way."""

    id: str
    accuracy: float | None  # mean over the shared tasks
    ppl: float | None
    speed: float | None  # decode, tokens/s, of the fastest of its own files
    size: int | None  # bytes of its own files
    bits: float
    sparsity: float
    base_accuracy: float | None
    base_ppl: float | None


class LeftOut(Record):
    id: str
    reason: str


class Best(Record):
    """`front` is in the order of the optimized figure, best first; `front[0]` is the best entry."""

    base: str
    optimize: Figure
    within: list[Constraint]
    axes: list[Figure]  # of the Pareto front
    measured: dict[str, str]  # how the figures that had to be measured were measured
    considered: int  # entries of the base model
    front: list[Candidate]
    outside: int  # entries that do not meet the constraints
    left_out: list[LeftOut]  # entries of which a figure that matters is not known


def parse_within(text: str) -> list[Constraint]:
    """The constraints of e.g. "ppl<=1.1*base,size<=200MB". UsageError says which part is not one."""
    if not text.strip():
        return []
    return [_constraint(part.strip(), text) for part in text.split(",")]


def _constraint(part: str, whole: str) -> Constraint:
    def refuse(what: str, expected: str) -> UsageError:
        return UsageError(f"--within {whole!r}: {what}", saw=part or "nothing", expected=expected)

    example = 'such as "ppl<=1.1*base,size<=200MB"'
    if (found := _CONSTRAINT.fullmatch(part)) is None:
        raise refuse("a part is no constraint", f"FIGURE>=VALUE or FIGURE<=VALUE, {example}")
    name = {"perplexity": "ppl"}.get(found["figure"], found["figure"])
    figure = next((known for known in LARGEST if known == name), None)
    if figure is None:
        raise refuse(f"no figure {name!r}", ", ".join(LARGEST))
    if found["operator"] not in (">=", "<="):
        raise refuse(f"no comparison {found['operator']!r}", ">= or <=")
    share = _SHARE.fullmatch(found["value"])
    if share is not None and figure not in _OF_BASE:
        raise refuse(f"the base's {figure} is not recorded", f"*base after {' or '.join(_OF_BASE)} only")
    try:
        value = float(share[1] or 1) if share is not None else amount(found["value"], figure)
    except ValueError as error:
        expected = f"{error}, or a number and *base" if figure in _OF_BASE else str(error)
        raise refuse(f"{found['value']!r} is no value of {figure}", expected) from error
    return Constraint(
        figure=figure, at_least=found["operator"] == ">=", value=value, of_base=share is not None
    )


def amount(text: str, figure: Figure) -> float:
    """ "200MB" of size in bytes, "50%" of sparsity as a fraction ... ValueError says what is expected."""
    units = _UNITS[figure]
    found = _AMOUNT.fullmatch(text.strip())
    if found is None or found["unit"] not in units:
        named = [unit for unit in units if unit]
        raise ValueError("a number" + (f", in {', '.join(named)} or plain" if named else ""))
    value = float(found["number"]) * units[found["unit"]]
    if "%" in units and value > 1:
        raise ValueError("a share of all: 0 to 1, or 0% to 100%")
    return value


def best(
    base: str,
    entries: Sequence[Summary],
    optimize: Figure,
    within: Sequence[Constraint],
    machine: str | None = None,
) -> Best:
    """Choose among `entries`, all of the base model `base`.

    `machine`: a fingerprint; speed counts only there. Without it, where most entries were measured.
    Raises ZooError, which says what comes nearest, if no entry meets the constraints.
    """
    candidates, measured, settings = _candidates(entries, machine)
    limited = dict.fromkeys(constraint.figure for constraint in within)
    wanted = dict.fromkeys((optimize, *limited))
    if len(wanted) == 1:
        price = _PRICE[optimize]
        known = any(candidate.accuracy is not None for candidate in candidates)
        wanted |= dict.fromkeys(["ppl" if price == "accuracy" and not known else price])
    axes = list(wanted)
    left_out, complete = [], []
    for candidate in candidates:
        missing = _missing(candidate, axes, within, measured, settings[candidate.id])
        if missing:
            left_out.append(LeftOut(id=candidate.id, reason=missing))
        else:
            complete.append(candidate)
    fitting = [c for c in complete if all(_holds(constraint, c) for constraint in within)]
    if not fitting:
        raise _nothing(base, within, complete, left_out)
    return Best(
        base=base,
        optimize=optimize,
        within=list(within),
        axes=axes,
        measured={figure: how for figure, how in measured.items() if figure in axes},
        considered=len(entries),
        front=pareto_front(fitting, axes),
        outside=len(complete) - len(fitting),
        left_out=left_out,
    )


def pareto_front(candidates: Iterable[Candidate], axes: Sequence[Figure]) -> list[Candidate]:
    """Those that no other is at least as good as on every axis and better on one; best first by the axes.

    Every candidate has a figure on every axis.
    """

    def costs(candidate: Candidate) -> tuple[float, ...]:
        """Lower is better, on every axis."""
        values = ((getattr(candidate, axis), LARGEST[axis]) for axis in axes)
        return tuple(-value if largest else value for value, largest in values)

    front: list[tuple[tuple[float, ...], Candidate]] = []
    # Whoever dominates another sorts before it, and is on the front or dominated by one that is.
    for cost, _, candidate in sorted((costs(c), c.id, c) for c in candidates):
        if not any(
            other != cost and all(a <= b for a, b in zip(other, cost, strict=True)) for other, _ in front
        ):
            front.append((cost, candidate))
    return [candidate for _, candidate in front]


def _candidates(
    entries: Sequence[Summary], machine: str | None
) -> tuple[list[Candidate], dict[Figure, str], dict[str, dict[Protocol, Benchmark]]]:
    """Every entry with the figures that were measured as most were, how that is, and its `_settings`."""
    tasks = _commonest(frozenset(_own(entry, is_accuracy)) for entry in entries)
    text = _commonest_of_each(_own(entry, is_perplexity) for entry in entries)
    settings = {entry.id: _settings(entry) for entry in entries}
    setting = _commonest_of_each(
        {at: b for at, b in known.items() if machine in (None, b.machine.fingerprint)}
        for known in settings.values()
    )
    measured: dict[Figure, str] = {}
    found = []
    for entry in entries:
        accuracy, base_accuracy = _own(entry, is_accuracy), _own(entry, is_accuracy, "base")
        ppl, base_ppl = _own(entry, is_perplexity), _own(entry, is_perplexity, "base")
        fastest = None if setting is None else settings[entry.id].get(setting)
        if tasks and tasks <= accuracy.keys():
            measured["accuracy"] = "; ".join(sorted(describe(accuracy[task]) for task in tasks))
        if text in ppl:
            measured["ppl"] = describe(ppl[text])
        if fastest is not None:
            measured["speed"] = _describe(fastest)
        found.append(
            Candidate(
                id=entry.id,
                accuracy=_mean(accuracy, tasks),
                ppl=ppl[text].value if text in ppl else None,
                speed=None if fastest is None else fastest.decode_tokens_per_s,
                size=entry.figures.size,
                bits=entry.bits_per_weight,
                sparsity=entry.sparsity,
                base_accuracy=_mean(base_accuracy, tasks),
                base_ppl=base_ppl[text].value if text in base_ppl else None,
            )
        )
    return found, measured, settings


Protocol = tuple[object, ...]


def _own(
    entry: Summary, is_one: Callable[[Measurement], bool], subject: str = "entry"
) -> dict[Protocol, Measurement]:
    """The measurements of one kind, by how they were made."""
    return {protocol(m): m for m in own(entry.measurements) if m.subject == subject and is_one(m)}


def _settings(entry: Summary) -> dict[Protocol, Benchmark]:
    """Its fastest decode by what speeds must share; runner and file may differ, as part of the choice."""
    found: dict[Protocol, Benchmark] = {}
    for b in own_benchmarks(entry.artifacts, entry.benchmarks):
        at = (b.machine.fingerprint, b.threads, b.prompt_tokens, b.generated_tokens)
        if at not in found or b.decode_tokens_per_s > found[at].decode_tokens_per_s:
            found[at] = b
    return found


def _describe(b: Benchmark) -> str:
    tokens = f"{b.prompt_tokens}+{b.generated_tokens} tokens"
    return f"{b.threads} threads, {tokens}, {b.machine.cpu} ({b.machine.fingerprint[:8]})"


def _mean(measured: Mapping[Protocol, Measurement], tasks: frozenset[Protocol] | None) -> float | None:
    if not tasks or not tasks <= measured.keys():
        return None
    return fmean(measured[task].value for task in tasks)


def _commonest(values: Iterable[frozenset[Protocol]]) -> frozenset[Protocol] | None:
    """The commonest of the sets that are not empty; of equally common ones the largest."""
    return _first(Counter(value for value in values if value), len)


def _commonest_of_each(keys: Iterable[Mapping[Protocol, object]]) -> Protocol | None:
    """The protocol that occurs in most of the mappings."""
    return _first(Counter(key for mapping in keys for key in mapping), lambda _: 0)


def _first(counts: Counter[T], size: Callable[[T], int]) -> T | None:
    return max(counts, key=lambda value: (counts[value], size(value), _spelled(value)), default=None)


def _spelled(value: object) -> str:
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _missing(
    candidate: Candidate,
    axes: Sequence[Figure],
    within: Sequence[Constraint],
    measured: Mapping[Figure, str],
    settings: Mapping[Protocol, Benchmark],
) -> str | None:
    """Why an entry cannot be judged, and how it could be."""
    for axis in axes:
        if getattr(candidate, axis) is None:
            reason = f"its {axis} was not measured" + (f" as {measured[axis]}" if axis in measured else "")
            if axis != "speed" or not settings:
                return reason
            other = next(iter(settings.values()))
            machine = other.machine.fingerprint[:8]
            elsewhere = f"({machine})" not in measured.get("speed", "")
            seen = f"see --for {machine}, or measure it here: zoo bench ID --record"
            return f"{reason}; it was as {_describe(other)}" + (f": {seen}" if elsewhere else "")
    for constraint in within:
        if constraint.of_base and getattr(candidate, f"base_{constraint.figure}") is None:
            figure = constraint.figure
            return (
                f"its base's {figure} was not measured in the same way, as for the {figure} of a packed file "
                "it never is: give a number instead"
            )
    return None


def _limit(constraint: Constraint, candidate: Candidate) -> float:
    if not constraint.of_base:
        return constraint.value
    return constraint.value * float(getattr(candidate, f"base_{constraint.figure}"))


def _holds(constraint: Constraint, candidate: Candidate) -> bool:
    value, limit = getattr(candidate, constraint.figure), _limit(constraint, candidate)
    return bool(value >= limit if constraint.at_least else value <= limit)


def _nothing(
    base: str, within: Sequence[Constraint], complete: Sequence[Candidate], left_out: Sequence[LeftOut]
) -> ZooError:
    if not complete:
        return ZooError(
            f"no entry of {base} has all the figures that this needs",
            saw=f"{left_out[0].id}: {left_out[0].reason}" if left_out else "no entries",
            try_=f"zoo search --base {base}",
        )
    return ZooError(
        f"no entry of {base} is within {', '.join(map(str, within))}",
        saw="; ".join(_nearest(within, complete)),
        try_="ask for less, or see all with `zoo search --base " + base + "`",
    )


def _nearest(within: Sequence[Constraint], complete: Sequence[Candidate]) -> Iterator[str]:
    """Of each constraint alone, what comes nearest to it."""
    for constraint in within:
        found = [
            (float(getattr(c, constraint.figure)) / (_limit(constraint, c) or 1), c.id) for c in complete
        ]
        _, nearest = max(found) if constraint.at_least else min(found)
        value = next(getattr(c, constraint.figure) for c in complete if c.id == nearest)
        yield f"{constraint.figure} {constraint.show(value)} of {nearest} is nearest to {constraint}"
