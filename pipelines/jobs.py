"""`zoo jobs`: find out what is stale, and run it: several at once, each in a process of its own, each under a
lease, again after transient failures, and to be stopped at any moment.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TypeVar

from pydantic import ValidationError

from pipelines import keys, sources
from pipelines.executors import Executor, Handle, is_event
from pipelines.recipe import Recipe, load
from pipelines.worker import Ended, Task
from zoo import logs
from zoo.entry import Entry
from zoo.errors import FormatError, ZooError
from zoo.files import Store
from zoo.hub import client
from zoo.jobs.joblist import Job, Target, Tolerance
from zoo.jobs.plan import Facts, Planned, planned
from zoo.jobs.summary import JobResult, JobsSummary, deltas, figures
from zoo.jobs.transient import transient
from zoo.progress import job_log_path, say
from zoo.registry import Registry
from zoo.registry.job_runs import Figure, JobRun, JobStatus, finish, history, start
from zoo.registry.leases import Heartbeat, Lease, LeaseLost, Seen, Watch, held, this_process
from zoo.safe_yaml import safe_yaml
from zoo.shared_store import SharedStore

TICK_S = 0.05
FIRST_BACKOFF_S = 1.0  # doubled for every attempt
LONGEST_BACKOFF_S = 300.0
T = TypeVar("T")


# --- what is stale ------------------------------------------------------------------------------------


def plan(jobs: Sequence[Job], registry: Registry, store: Store) -> list[Planned]:
    """The state of every job. Fetches no model; asks the Hub for revisions that are not pinned."""
    peeked: dict[str, sources.Version | ZooError] = {}
    holders = {name: seen.holder for name, seen in held(registry).items()}
    runs = _newest(history(registry))
    return [
        planned(job, _facts(job, registry, store, peeked, runs.get(job.name), holders.get(job.name)))
        for job in jobs
    ]


def _newest(runs: Sequence[JobRun]) -> dict[str, JobRun]:
    """The last run of each job that was not stopped from outside."""
    return {run.job: run for run in reversed(runs) if run.status != "interrupted"}


def _facts(
    job: Job,
    registry: Registry,
    store: Store,
    peeked: dict[str, sources.Version | ZooError],
    last: JobRun | None,
    holder: str | None,
) -> Facts:
    entry = registry.find(job.name)
    now = datetime.now(UTC)

    def sha256_of(source: str) -> str | None:
        return _peek(source, peeked, store).sha256

    try:
        recipe = load(Path(job.recipe), job.overrides)
        base = _peek(recipe.base, peeked, store)
        known = entry is not None and entry.base_revision == base.revision and base.revision != "local"
        sha256 = base.sha256 or (entry.base_sha256 if entry is not None and known else None)
        return Facts(
            entry=entry,
            recipe_changed=entry is not None and not _is_by(entry, recipe),
            base_revision=base.revision,
            base_sha256=sha256,
            versions=keys.library_versions(),
            stages=keys.expected(recipe, sha256, sha256_of) if sha256 else [],
            missing=[] if entry is None else _missing(entry, store),
            unpublished=None if entry is None else _unpublished(entry, job.publish),
            last_started=None if last is None else last.started,
            now=now,
            holder=holder,
        )
    except ZooError as error:
        words = error.what.splitlines()
        reason = " ".join(words[:2]) + (f" ({error.saw})" if error.saw else "")
        return Facts(problem=logs.redact(reason), entry=entry, now=now, holder=holder)


def _is_by(entry: Entry, recipe: Recipe) -> bool:
    """Whether an entry was made by this recipe. A key that recipes did not have then counts as left out."""
    try:
        said = Recipe.model_validate(safe_yaml(entry.recipe, "its recipe"))
    except (FormatError, ValidationError):  # no recipe, or not one any more
        return False
    return said.to_yaml() == recipe.to_yaml()


def _peek(source: str, peeked: dict[str, sources.Version | ZooError], store: Store) -> sources.Version:
    if source not in peeked:
        try:
            peeked[source] = sources.peek(source, store)
        except ZooError as error:
            peeked[source] = error
    found = peeked[source]
    if isinstance(found, ZooError):
        raise found
    return found


def _missing(entry: Entry, store: Store) -> list[str]:
    if entry.publications:
        return []  # `zoo pull` has them
    folder = store.root / "entries" / entry.id
    missing = [a.path for a in entry.artifacts if not _is_there(folder / a.path, a.size)]
    if missing and isinstance(store, SharedStore) and store.remote.holds(entry):
        return []  # `zoo run` brings them
    return missing


def _is_there(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _unpublished(entry: Entry, target: Target | None) -> str | None:
    if target is None or entry.status == "failed":
        return None
    endpoint = client.connect(target.endpoint).endpoint
    there = [p.repository for p in entry.publications if p.endpoint == endpoint]
    if any(target.to is None or name.startswith(f"{target.to}/") for name in there):
        return None
    return f"{endpoint}{'/' + target.to if target.to else ''} has no {entry.id}"


# --- running it ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    max_parallel: int = 1
    deadline_s: float | None = None  # then running jobs are stopped, and go on in the next call
    keep_going: bool = False  # start further jobs after one failed
    patience_s: float = 30.0  # of the leases


@dataclass
class _Work:
    """A job on its way."""

    job: Job
    reasons: list[str]
    before: int  # the newest run of it, by any scheduler, that had ended when this one looked
    look_at: float = 0.0  # when to try for the lease again
    told: bool = False  # that another scheduler runs it
    lease: Lease | None = None
    run_id: int = 0
    attempts: int = 0
    began: float = 0.0
    retry_at: float | None = None
    handle: Handle | None = None
    stopping: str | None = None  # why it is being stopped
    last_figures: list[Figure] = field(default_factory=list)


class Stop:
    """Set by SIGTERM or Ctrl-C."""

    asked = False


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """SIGTERM and Ctrl-C ask for an end instead of making one."""
    stop = Stop()

    def ask(_: int, __: FrameType | None) -> None:
        stop.asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_jobs(
    jobs: Sequence[Job],
    tolerance: Tolerance,
    registry: Registry,
    store: Store,
    executor: Executor,
    settings: Settings,
    stop: Stop,
    *,
    now: bool = False,
) -> JobsSummary:
    """Run the jobs that are stale, and wait for those that another scheduler runs; `now`: waiting ones too.

    Failures are in the summary; ZooError is raised only if the registry does not answer any more.
    """
    try:
        return _Scheduler(jobs, tolerance, registry, store, executor, settings, stop).run(now)
    finally:
        executor.close()


class _Scheduler:
    def __init__(
        self,
        jobs: Sequence[Job],
        tolerance: Tolerance,
        registry: Registry,
        store: Store,
        executor: Executor,
        settings: Settings,
        stop: Stop,
    ) -> None:
        self.jobs = {job.name: job for job in jobs}
        self.tolerance = tolerance
        self.registry = registry
        self.store = store
        self.executor = executor
        self.settings = settings
        self.stop = stop
        self.began = time.monotonic()
        self.pending: list[_Work] = []
        self.active: list[_Work] = []
        self.results: dict[str, JobResult] = {}
        self.watch = Watch(registry, this_process(), settings.patience_s)
        self.heart = Heartbeat(registry, settings.patience_s)

    def run(self, now: bool) -> JobsSummary:
        started = datetime.now(UTC)
        ended = [run for run in history(self.registry) if run.finished is not None]  # before the plan is made
        newest = {run.job: run.id for run in reversed(ended)}
        plans = plan(list(self.jobs.values()), self.registry, self.store)
        for planned_ in plans:
            job = self.jobs[planned_.job]
            if planned_.state == "broken":
                self._result(job.name, "failed", planned_.reasons, failure=planned_.reasons[0])
            elif planned_.state == "stale" or (now and planned_.state == "waiting"):
                self.pending.append(_Work(job, planned_.reasons, newest.get(job.name, 0)))
        with self.heart:
            try:
                while self.pending or self.active:
                    self._tick()
                    time.sleep(TICK_S)
            finally:
                for work in self.active:
                    if work.handle is not None:
                        work.handle.kill()
                    if work.lease is not None:
                        self.heart.drop(work.lease)
        states = [planned_.state for planned_ in plans]
        return JobsSummary(
            started=started,
            seconds=time.monotonic() - self.began,
            fresh=states.count("fresh"),
            waiting=0 if now else states.count("waiting"),
            results=[self.results[name] for name in self.jobs if name in self.results],
        )

    def _tick(self) -> None:
        for work in list(self.active):
            self._watch_over(work)
        if (reason := self._no_more()) is not None:
            for work in self.pending:
                self._result(work.job.name, "unstarted", work.reasons, failure=reason)
            self.pending.clear()
        for work in list(self.pending):
            if len(self.active) >= self.settings.max_parallel:
                return
            if time.monotonic() >= work.look_at:
                self._try_to_begin(work)

    def _no_more(self) -> str | None:
        """Why no further job is to be started."""
        if self.stop.asked:
            return "stopped before it began"
        if self._is_late():
            return "the deadline came before it began"
        ran = [r for r in self.results.values() if r.attempts]  # a broken one does not stop the rest
        if not self.settings.keep_going and any(r.outcome == "failed" for r in ran):
            return "another job failed before it began; --keep-going goes on"
        return None

    def _is_late(self) -> bool:
        deadline = self.settings.deadline_s
        return deadline is not None and time.monotonic() - self.began > deadline

    def _try_to_begin(self, work: _Work) -> None:
        """Take the job's lease, look whether it is stale still, and start its worker."""
        name = work.job.name
        work.look_at = time.monotonic() + min(1.0, self.settings.patience_s / 10)
        found = self._patiently(lambda: self.watch.take(name))
        if isinstance(found, Seen):
            if not work.told:
                work.told = True
                say(f"{name}: runs elsewhere ({found.holder})", event="job-elsewhere", job=name)
            return
        self.pending.remove(work)
        self.heart.keep(found)
        work.lease = found
        if self._is_done_elsewhere(work):
            self.heart.drop(found)
            return
        runs = self._patiently(lambda: history(self.registry, name))
        done = next((run for run in runs if run.status == "done" and run.figures), None)
        entry = self.registry.find(name)
        work.last_figures = done.figures if done else figures(entry) if entry else []
        work.run_id = self._patiently(lambda: start(self.registry, found, name, work.reasons))
        work.began = time.monotonic()
        self.active.append(work)
        say(f"{name}: {'; '.join(work.reasons)}", event="job-started", job=name, token=found.token)
        self._attempt(work)

    def _is_done_elsewhere(self, work: _Work) -> bool:
        """Whether another scheduler has run it since this one looked."""
        name = work.job.name
        runs = self._patiently(lambda: history(self.registry, name))
        latest = runs[0] if runs else None
        if latest is None or latest.id <= work.before or latest.status in ("running", "interrupted"):
            return False
        failed = latest.failure if latest.status == "failed" else None
        self._result(name, "elsewhere", work.reasons, failure=failed)
        return True

    def _attempt(self, work: _Work) -> None:
        assert work.lease is not None
        work.attempts += 1
        work.retry_at = None
        name = work.job.name
        task = Task(
            job=name,
            recipe=str(Path(work.job.recipe).absolute()),
            overrides=work.job.overrides,
            store=str(self.store.root),
            shared=self.store.remote.url if isinstance(self.store, SharedStore) else None,
            registry=self.registry.url,
            lease_token=work.lease.token,
            lease_holder=work.lease.holder,
            needs=work.job.needs,
        )
        work.handle = self.executor.start(task, self._log(work), lambda line: _tell(name, line))

    def _watch_over(self, work: _Work) -> None:
        assert work.lease is not None
        if self.heart.lost(work.lease):
            if work.handle is not None:
                work.handle.kill()  # at once: someone else may have begun
            self._settle(work, Ended(status="interrupted", failure="its lease was lost"))
            return
        if work.stopping is None:
            work.stopping = self._why_stop(work)
        if work.handle is None:
            if work.stopping is not None:
                self._settle(work, Ended(status="interrupted", failure=work.stopping))
            elif work.retry_at is not None and time.monotonic() >= work.retry_at:
                self._attempt(work)
            return
        if work.stopping is not None:
            work.handle.stop()
        ended = work.handle.poll()
        if ended is None:
            return
        work.handle = None
        again = work.stopping is None and (ended.transient or ended.status == "interrupted")
        if not again or work.attempts > work.job.retries:
            self._settle(work, ended)
            return
        wait = min(FIRST_BACKOFF_S * 2 ** (work.attempts - 1), LONGEST_BACKOFF_S)
        work.retry_at = time.monotonic() + wait
        say(
            f"{work.job.name}: {ended.failure}; again in {wait:.0f} s",
            event="job-retry",
            job=work.job.name,
            attempt=work.attempts,
        )

    def _why_stop(self, work: _Work) -> str | None:
        if self.stop.asked:
            return "stopped; goes on from its last finished stage the next time"
        if self._is_late():
            return "stopped at the deadline; goes on from its last finished stage the next time"
        budget = work.job.budget_s
        if budget is not None and time.monotonic() - work.began > budget:
            return f"stopped: over its budget of {budget:.0f} s"
        return None

    def _settle(self, work: _Work, ended: Ended) -> None:
        """Record how a job ended, give its lease back, and say so."""
        assert work.lease is not None
        lease, name = work.lease, work.job.name
        self.active.remove(work)
        seconds = time.monotonic() - work.began
        failure = ended.failure
        outcome: JobStatus = ended.status
        if ended.status == "interrupted" and work.stopping is not None:
            failure = work.stopping
            outcome = "failed" if "budget" in work.stopping else "interrupted"
        elif ended.status == "interrupted":
            failure = failure or "its worker was stopped from outside"
        entry = self._patiently(lambda: self.registry.find(name)) if outcome == "done" else None
        found = figures(entry) if entry is not None else []
        try:
            self._patiently(
                lambda: finish(
                    self.registry,
                    lease,
                    work.run_id,
                    outcome,
                    attempts=work.attempts,
                    seconds=seconds,
                    failure=failure,
                    figures=found,
                )
            )
        except LeaseLost:
            outcome, failure = "interrupted", "its lease was lost: another scheduler has the job"
        self.heart.drop(lease)
        say(
            f"{name}: {outcome}{f': {failure}' if failure else ''} ({seconds:.0f} s)",
            event="job",
            job=name,
            status=outcome,
            seconds=seconds,
            attempts=work.attempts,
            level="error" if outcome == "failed" else "info",
        )
        self._result(
            name,
            outcome if outcome != "running" else "interrupted",
            work.reasons,
            attempts=work.attempts,
            seconds=seconds,
            failure=failure,
            links=[] if entry is None else links(entry),
            figures=found,
            deltas=deltas(work.last_figures, found, self.tolerance),
            log=str(self._log(work)),
        )

    def _result(self, name: str, outcome: str, reasons: list[str], **fields: object) -> None:
        self.results[name] = JobResult.model_validate(
            {"job": name, "outcome": outcome, "reasons": reasons, **fields}
        )

    def _log(self, work: _Work) -> Path:
        return job_log_path(self.store.root, work.job.name, work.lease.token if work.lease else 0)

    def _patiently(self, ask: Callable[[], T]) -> T:
        """Ask the registry; again for a while if the connection is lost."""
        began = time.monotonic()
        while True:
            try:
                return ask()
            except ZooError as error:
                waited = time.monotonic() - began
                if not transient(error) or waited > self.settings.patience_s or self.stop.asked:
                    raise
                time.sleep(min(1.0, 0.1 + waited))


def links(entry: Entry) -> list[str]:
    """Where an entry was published."""
    return [f"{p.endpoint}/{p.repository}/tree/{p.tag}" for p in entry.publications]


def _tell(name: str, line: str) -> None:
    """Pass a worker's line on."""
    if not logs.is_json():
        logs.tell("output", f"  {name}: {line}")
    elif is_event(line):
        logs.pass_on(line)
    else:
        logs.write("output", line, job=name)
