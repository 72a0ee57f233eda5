"""What became of the jobs: for a terminal, a CI's step summary (Markdown), JUnit XML, and JSON."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import Field

from zoo.compare import compare, describe, own, protocol
from zoo.entry import Entry, Record
from zoo.files import atomic_file, sha256_json, told_plainly
from zoo.jobs.joblist import Tolerance
from zoo.registry.job_runs import Figure

Outcome = Literal["done", "failed", "interrupted", "unstarted", "elsewhere"]
MARKS = {"done": "✓", "failed": "✗", "interrupted": "■", "unstarted": "…", "elsewhere": "→"}


class Delta(Record):
    """A figure against the last run's."""

    name: str
    before: float
    after: float
    change: float  # positive: better; absolute of accuracies, else relative
    regression: bool  # worse by more than the tolerance


class JobResult(Record):
    """`unstarted`: the deadline came first, or the run was stopped; `elsewhere`: another scheduler did it."""

    job: str
    outcome: Outcome
    reasons: list[str]
    attempts: int = 0
    seconds: float = 0.0
    failure: str | None = None
    links: list[str] = Field(default_factory=list)
    figures: list[Figure] = Field(default_factory=list)
    deltas: list[Delta] = Field(default_factory=list)
    log: str | None = None


class JobsSummary(Record):
    """One call of `zoo jobs run`."""

    started: datetime
    seconds: float
    fresh: int  # jobs that needed nothing
    waiting: int
    results: list[JobResult]

    @property
    def ok(self) -> bool:
        """Whether nothing failed, and nothing became worse beyond the tolerance."""
        good = ("done", "elsewhere")
        return not self.regressions and all(result.outcome in good for result in self.results)

    @property
    def regressions(self) -> list[tuple[str, Delta]]:
        return [(r.job, delta) for r in self.results for delta in r.deltas if delta.regression]


def figures(entry: Entry) -> list[Figure]:
    """What is compared from run to run: names of figures that were measured alike are equal."""
    found = []
    for m in own(entry.measurements):
        if m.subject == "entry":
            how = sha256_json([str(part) for part in protocol(m)])[:8]
            kind: Literal["accuracy", "perplexity"] = (
                "accuracy" if m.direction == "higher_is_better" else "perplexity"
            )
            found.append(
                Figure(name=f"{describe(m)} [{how}]", kind=kind, direction=m.direction, value=m.value)
            )
    for row in compare([entry]):
        value = row.values[0]
        if value is not None and row.unit in ("token/s", "byte") and row.direction is not None:
            kind_: Literal["speed", "size"] = "speed" if row.unit == "token/s" else "size"
            found.append(Figure(name=row.name, kind=kind_, direction=row.direction, value=value))
    return found


def deltas(before: Sequence[Figure], after: Sequence[Figure], tolerance: Tolerance) -> list[Delta]:
    """Figures of equal names against each other."""
    known = {figure.name: figure for figure in before}
    return [_delta(known[figure.name], figure, tolerance) for figure in after if figure.name in known]


def _delta(before: Figure, after: Figure, tolerance: Tolerance) -> Delta:
    change = after.value - before.value
    if after.kind != "accuracy":
        change /= abs(before.value) or 1.0
    if after.direction == "lower_is_better":
        change = -change
    allowed: float | None = getattr(tolerance, after.kind)
    return Delta(
        name=after.name,
        before=before.value,
        after=after.value,
        change=change,
        regression=allowed is not None and change < -allowed,
    )


def rows(summary: JobsSummary) -> list[list[str]]:
    """job, outcome, time, what: for a table."""
    return [
        [result.job, f"{MARKS[result.outcome]} {result.outcome}", _time(result), _what(result)]
        for result in summary.results
    ]


HEAD = ["job", "outcome", "time", "what"]


def last_line(summary: JobsSummary) -> str:
    counts = {
        outcome: sum(r.outcome == outcome for r in summary.results)
        for outcome in MARKS
        if any(r.outcome == outcome for r in summary.results)
    }
    parts = [f"{count} {outcome}" for outcome, count in counts.items()]
    parts += [f"{summary.fresh} fresh"] if summary.fresh else []
    parts += [f"{summary.waiting} waiting"] if summary.waiting else []
    parts += [f"{len(summary.regressions)} regressions"] if summary.regressions else []
    return f"{', '.join(parts) or 'no jobs'}; {summary.seconds:.1f} s"


def write(summary: JobsSummary, *, markdown_to: Path | None, junit_to: Path | None) -> None:
    """Write the files that were asked for, and GitHub's step summary where there is one."""
    if markdown_to is not None:
        with atomic_file(markdown_to) as temporary:
            temporary.write_text(markdown(summary), encoding="utf-8")
    if junit_to is not None:
        with atomic_file(junit_to) as temporary:
            temporary.write_text(junit(summary), encoding="utf-8")
    if step_summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with told_plainly(Path(step_summary)), Path(step_summary).open("a", encoding="utf-8") as file:
            file.write(markdown(summary))


def markdown(summary: JobsSummary) -> str:
    """For GitHub's step summary."""
    lines = [f"## Zoo jobs: {last_line(summary)}", ""]
    if summary.results:
        lines += ["| job | outcome | time | what |", "|---|---|---|---|"]
        lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows(summary)]
        lines.append("")
    for result in summary.results:
        if result.links:
            lines += [f"- {_cell(result.job)}: " + ", ".join(f"<{link}>" for link in result.links)]
        if result.deltas:
            lines += ["", f"### {_cell(result.job)} against the last run", ""]
            lines += ["| figure | before | now | change |", "|---|---|---|---|"]
            lines += [
                f"| {_cell(d.name)} | {d.before:.4g} | {d.after:.4g} "
                f"| {d.change:+.2%}{' **regression**' if d.regression else ''} |"
                for d in result.deltas
            ]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def junit(summary: JobsSummary) -> str:
    """JUnit XML: a test case for each job, and a failure for each regression."""
    root = ElementTree.Element("testsuites")
    failed = [r for r in summary.results if r.outcome == "failed" or any(d.regression for d in r.deltas)]
    skipped = [r for r in summary.results if r.outcome in ("unstarted", "elsewhere", "interrupted")]
    suite = ElementTree.SubElement(
        root,
        "testsuite",
        name="zoo jobs",
        tests=str(len(summary.results)),
        failures=str(len(failed)),
        errors="0",
        skipped=str(len([r for r in skipped if r not in failed])),
        time=f"{summary.seconds:.3f}",
        timestamp=summary.started.isoformat(timespec="seconds"),
    )
    for result in summary.results:
        case = ElementTree.SubElement(
            suite, "testcase", classname="zoo.jobs", name=_xml(result.job), time=f"{result.seconds:.3f}"
        )
        worse = [f"{d.name}: {d.before:.4g} to {d.after:.4g}" for d in result.deltas if d.regression]
        if result in failed:
            message = "; ".join(filter(None, [result.failure, *worse])) or "failed"
            ElementTree.SubElement(case, "failure", message=_xml(message)).text = _xml(_what(result))
        elif result in skipped:
            ElementTree.SubElement(case, "skipped", message=_xml(_what(result)))
        output = "\n".join([*result.reasons, *result.links])
        if output:
            ElementTree.SubElement(case, "system-out").text = _xml(output)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _what(result: JobResult) -> str:
    parts = [result.failure] if result.failure else []
    worse = sum(delta.regression for delta in result.deltas)
    parts += [f"{worse} regressions"] if worse else []
    parts += [_best_and_worst(result.deltas)] if result.deltas and not worse else []
    parts += result.reasons if not result.failure else []
    parts += [f"{result.attempts} attempts"] if result.attempts > 1 else []
    return "; ".join(part for part in parts if part)


def _best_and_worst(found: Sequence[Delta]) -> str:
    pick: Callable[[Delta], float] = lambda delta: delta.change  # noqa: E731
    low, high = min(found, key=pick), max(found, key=pick)
    if low.change == high.change == 0:
        return "figures as before"
    return f"figures {low.change:+.1%} to {high.change:+.1%}"


def _time(result: JobResult) -> str:
    return f"{result.seconds:.0f} s" if result.attempts else "-"


def _cell(text: str) -> str:
    """Text of unknown origin in a Markdown table."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _xml(text: str) -> str:
    """What XML 1.0 can hold of it."""
    return "".join(c for c in text if c in "\t\n\r" or " " <= c <= "\ud7ff" or "\ue000" <= c <= "\ufffd")
