"""The registry's state as Prometheus text: https://prometheus.io/docs/instrumenting/exposition_formats/."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from zoo.registry import Registry
from zoo.registry.job_runs import JobRun, history
from zoo.registry.leases import held

Labels = dict[str, str]
Samples = list[tuple[Labels, float]]


def metrics(registry: Registry) -> str:
    """Runs, times and figures of every job, leases, entries and stages."""
    runs = history(registry)
    entries = registry.facets().statuses
    leases = held(registry)
    ended = [run for run in runs if run.finished is not None]
    newest: dict[str, JobRun] = {run.job: run for run in reversed(ended)}
    good: dict[str, JobRun] = {run.job: run for run in reversed(ended) if run.status == "done"}
    counts = Counter((run.job, run.status) for run in runs)
    stages = Counter[tuple[str, str]]()
    seconds: dict[tuple[str, str], float] = {}
    for run in registry.runs():
        for stage in run.stages:
            stages[stage.name, stage.status] += 1
            seconds[stage.name, stage.status] = seconds.get((stage.name, stage.status), 0.0) + stage.seconds
    found: list[tuple[str, str, str, Samples]] = [
        ("entries", "gauge", "Entries by status.", [({"status": s}, n) for s, n in entries.items()]),
        (
            "job_runs_total",
            "counter",
            "Runs of a job by how they ended.",
            [({"job": j, "status": s}, n) for (j, s), n in counts.items()],
        ),
        (
            "job_attempts",
            "gauge",
            "Attempts of a job's last run.",
            [({"job": j}, run.attempts) for j, run in newest.items()],
        ),
        ("job_last_run_timestamp_seconds", "gauge", "When a job's last run ended.", _ends(newest)),
        ("job_last_success_timestamp_seconds", "gauge", "When a job was last done.", _ends(good)),
        (
            "job_last_duration_seconds",
            "gauge",
            "How long a job's last run took.",
            [({"job": j}, run.seconds or 0.0) for j, run in newest.items()],
        ),
        (
            "job_figure",
            "gauge",
            "A figure of a job's last good run.",
            [
                ({"job": j, "kind": f.kind, "figure": f.name}, f.value)
                for j, run in good.items()
                for f in run.figures
            ],
        ),
        (
            "job_leased",
            "gauge",
            "1 while a scheduler has the job's lease.",
            [({"job": name, "holder": seen.holder}, 1) for name, seen in leases.items()],
        ),
        (
            "stages_total",
            "counter",
            "Stages of runs by how they ended.",
            [({"stage": n, "status": s}, count) for (n, s), count in stages.items()],
        ),
        (
            "stage_seconds_total",
            "counter",
            "Time spent in stages.",
            [({"stage": n, "status": s}, spent) for (n, s), spent in seconds.items()],
        ),
    ]
    return "".join(line for one in found for line in _metric(*one))


def _ends(runs: dict[str, JobRun]) -> Samples:
    return [({"job": job}, run.finished.timestamp()) for job, run in runs.items() if run.finished]


def _metric(name: str, kind: str, help_: str, samples: Sequence[tuple[Labels, float]]) -> Iterator[str]:
    yield f"# HELP zoo_{name} {help_}\n# TYPE zoo_{name} {kind}\n"
    for labels, value in sorted(samples, key=lambda sample: sorted(sample[0].items())):
        inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        yield f"zoo_{name}{{{inside}}} {value!r}\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
