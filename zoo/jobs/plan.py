"""What is stale, and why: a pure function of what is known."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Literal

from pydantic import Field

from zoo.entry import Entry, Record
from zoo.jobs.joblist import Job

State = Literal["fresh", "stale", "waiting", "broken"]
NOT_HERE = "it was not published, and its files are not in this store"
MACHINES_OWN = "verify"  # its key holds the machine, so another one's says nothing
STEP = re.compile(r"\d+\. ")  # of the recipe itself, not of a branch: the key holds those of all before it


class Facts(Record):
    """What decides whether a job is stale. Its `entry` is the one recorded; the rest is as of now."""

    problem: str | None = None  # why the rest could not be found out: the recipe, the base model ...
    entry: Entry | None = None
    recipe_changed: bool = False
    base_revision: str = ""
    base_sha256: str | None = None  # None: known by its revision only
    versions: dict[str, str] = Field(default_factory=dict)
    stages: list[tuple[str, str]] = Field(default_factory=list)  # (name, key) of what a run would do
    missing: list[str] = Field(
        default_factory=list
    )  # files of the entry that are neither in the store nor published
    unpublished: str | None = None  # where the entry should be published, and is not
    last_started: datetime | None = None
    now: datetime
    holder: str | None = None  # whose lease it is under


class Planned(Record):
    """A job and its state. `stale`: `zoo jobs run` will do it; `waiting`: stale, but run too recently."""

    job: str
    state: State
    reasons: list[str]
    due: datetime | None  # of a waiting one
    holder: str | None
    recipe: str
    budget_s: float | None


def planned(job: Job, facts: Facts) -> Planned:
    reasons = [facts.problem] if facts.problem else stale(facts)
    state: State = "broken" if facts.problem else "stale" if reasons else "fresh"
    due = None
    if state == "stale" and job.every_s is not None and facts.last_started is not None:
        due = facts.last_started + timedelta(seconds=job.every_s)
        if due > facts.now:
            state = "waiting"
        else:
            due = None
    return Planned(
        job=job.name,
        state=state,
        reasons=reasons,
        due=due,
        holder=facts.holder,
        recipe=job.recipe,
        budget_s=job.budget_s,
    )


def stale(facts: Facts) -> list[str]:
    """Why an entry is to be made again; nothing if it is what a run would make."""
    entry = facts.entry
    if entry is None:
        return ["never made"]
    reasons = []
    if entry.status == "failed":
        reasons.append(f"failed: {entry.failure or 'no reason recorded'}")
    if facts.recipe_changed:
        reasons.append("the recipe changed")
    if entry.base_revision != facts.base_revision:
        reasons.append(f"new base revision: {_short(facts.base_revision)}, was {_short(entry.base_revision)}")
    elif facts.base_sha256 is not None and entry.base_sha256 != facts.base_sha256:
        reasons.append(f"the base model's files changed: sha256 {facts.base_sha256[:12]}")
    reasons += _versions(entry.versions, facts.versions)
    if not reasons and (changed := _changed_stages(entry, facts)):
        reasons.append(f"changed code or text: {', '.join(changed)}")
    if facts.missing and len(facts.missing) == len(entry.artifacts):
        reasons.append(f"missing artifacts: {NOT_HERE}")
    elif facts.missing:
        more = f" and {len(facts.missing) - 3} more" if len(facts.missing) > 3 else ""
        reasons.append(f"missing artifact: {', '.join(facts.missing[:3])}{more}")
    if facts.unpublished:
        reasons.append(f"not published: {facts.unpublished}")
    return reasons


def _versions(recorded: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    changed = [
        f"{name} {now.get(name, 'gone')}, was {recorded.get(name, 'not there')}"
        for name in sorted({*recorded, *now})
        if recorded.get(name) != now.get(name)
    ]
    return [f"changed libraries: {'; '.join(changed)}"] if changed else []


def _changed_stages(entry: Entry, facts: Facts) -> list[str]:
    """Stages that have another key now, though recipe, base and libraries are the same.

    What came before a step that was adopted, or in the store, was never done: that step's key says it all.
    """
    recorded = {stage.key for stage in entry.stages if stage.name != MACHINES_OWN}
    steps = [n for n, (name, key) in enumerate(facts.stages) if STEP.match(name) and key in recorded]
    since = facts.stages[steps[-1] if steps else 0 :]
    return list(dict.fromkeys(name for name, key in since if key not in recorded))


def _short(revision: str) -> str:
    return revision[:12]
