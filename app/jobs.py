"""Jobs: the last run of each by a scheduler, who has it, its figures against the run before, and its log."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime

import streamlit as st

from app.parts import (
    IDLE_S,
    LIVE_S,
    RUN_BADGES,
    duration,
    entry_link,
    kept_view,
    log_tail,
    registry,
    show_error,
    store_folder,
)
from app.text import REASON_LIMIT, code, escape
from zoo.errors import ZooError
from zoo.jobs.joblist import Tolerance
from zoo.jobs.summary import Delta, deltas
from zoo.progress import job_log_path
from zoo.registry.job_runs import JobRun, history
from zoo.registry.leases import Seen, held, is_gone

PER_PAGE = 20
EARLIER = 10  # runs of a job that are listed
Runs = dict[str, list[JobRun]]  # of each job, the newest first; the job that ran last comes first


def page() -> None:
    st.title("Jobs")
    jobs = _jobs()
    if not jobs:
        st.info(
            "**No job has run yet.** `zoo jobs run` makes every entry of a job list anew that is stale; "
            "`zoo jobs plan` says which are.",
            icon=":material/event_repeat:",
        )
        st.fragment(_wait, run_every=IDLE_S)()
        return
    states: Counter[str] = Counter(runs[0].status for runs in jobs.values())
    count = f"{len(jobs):,} {'job' if len(jobs) == 1 else 'jobs'}"
    st.caption(
        f"{count} by their last run: " + ", ".join(f"{states[s]:,} {s}" for s in RUN_BADGES if states[s])
    )
    statuses: list[str] = st.pills(
        "Status of the last run", list(RUN_BADGES), selection_mode="multi", key="last", bind="query-params"
    )
    shown = [name for name, runs in jobs.items() if not statuses or runs[0].status in statuses]
    if not shown:
        st.info("**No job has this status.** Choose another.", icon=":material/filter_alt_off:")
        return
    number = 1
    if len(shown) > PER_PAGE:
        number = st.pagination(-(-len(shown) // PER_PAGE), key="part", bind="query-params")
    names = shown[PER_PAGE * (number - 1) : PER_PAGE * number]
    st.fragment(_live, run_every=LIVE_S if states["running"] else IDLE_S)(names, _version(jobs))


def _jobs() -> Runs:
    found: Runs = {}
    for run in history(registry()):
        found.setdefault(run.job, []).append(run)
    return found


def _version(jobs: Runs) -> list[tuple[int, str]]:
    """What changes when a run begins or ends."""
    return [(runs[0].id, runs[0].status) for runs in jobs.values()]


def _wait() -> None:
    if _jobs():
        st.rerun()


def _live(names: Sequence[str], known: list[tuple[int, str]]) -> None:
    """These jobs as they are now. The page as a whole begins anew when a run begins or ends."""
    try:
        jobs, leases = _jobs(), held(registry())
    except ZooError as error:
        show_error(error)
        return
    if _version(jobs) != known:
        st.rerun()
    for position, name in enumerate(names):
        _job(jobs[name], leases.get(name), opened=position == 0)


def _job(runs: list[JobRun], lease: Seen | None, opened: bool) -> None:
    run = runs[0]
    now = datetime.now(UTC)
    seconds = (now - run.started).total_seconds() if run.seconds is None else run.seconds
    host, pid = (*run.holder.split(":"), "?")[:2]
    attempts = f", {run.attempts} attempts" if run.attempts > 1 else ""
    with st.container(border=True):
        st.markdown(
            f"{RUN_BADGES[run.status]} **{escape(run.job)}** · {duration(seconds)}  \n"
            f":small[begun {run.started:%Y-%m-%d %H:%M:%S} UTC by the scheduler on {escape(host, 60)}, "
            f"process {escape(pid, 12)}{attempts}]  \n"
            f":small[because: {escape('; '.join(run.reasons) or 'it was asked for', REASON_LIMIT)}]"
        )
        if run.failure:
            st.error(escape(run.failure, REASON_LIMIT), icon=":material/error:")
        if run.status == "running" and (lease is None or is_gone(lease.holder)):
            st.warning(
                "Its scheduler is gone. `zoo jobs run` goes on from the last finished stage.",
                icon=":material/warning:",
            )
        if any(each.status == "done" for each in runs):
            entry_link(run.job, icon=":material/open_in_new:")
        count = f"{len(runs)} {'run' if len(runs) == 1 else 'runs'}"
        with st.expander(f"The log, figures, {count}", expanded=opened or run.status == "running"):
            _log(run, host)
            _figures(runs)
            _earlier(runs)


def _figures(runs: list[JobRun]) -> None:
    """Those of the last run that was done, against the one before it."""
    done = [run for run in runs if run.status == "done" and run.figures]
    if not done:
        return
    if len(done) == 1:
        st.caption("Done once: there are no earlier figures to compare with.")
        return
    changes = deltas(done[1].figures, done[0].figures, Tolerance())
    lines = ["| figure | now (before), better by |", "|---|---|"]
    lines += [f"| {_name(d)} | **{d.after:.4g}** ({d.before:.4g}) {_change(d)} |" for d in changes]
    st.caption(
        f"Figures of {done[0].started:%Y-%m-%d %H:%M} UTC against {done[1].started:%Y-%m-%d %H:%M} UTC"
    )
    st.markdown("\n".join(lines))


def _name(delta: Delta) -> str:
    """The figure's name without the hash of how it was measured."""
    return escape(delta.name.partition(" [")[0])


def _change(delta: Delta) -> str:
    if delta.change == 0:
        return ":gray[as before]"
    mark, colour = ("▲", "green") if delta.change > 0 else ("▼", "red")
    return f":{colour}[{mark} {delta.change:+.2%}]"


def _earlier(runs: list[JobRun]) -> None:
    """The runs before the last one, in words that a phone can break."""
    lines = []
    for run in runs[1 : EARLIER + 1]:
        time = "" if run.seconds is None else f", {duration(run.seconds)}"
        failure = f": {escape(run.failure, REASON_LIMIT)}" if run.failure else ""
        lines.append(f"- {RUN_BADGES[run.status]} {run.started:%Y-%m-%d %H:%M}{time}{failure}")
    if lines:
        st.caption("Before")
        st.markdown("\n".join(lines))


def _log(run: JobRun, host: str) -> None:
    path = job_log_path(store_folder(), run.job, run.token)
    inside = path.parent == store_folder() / "jobs"  # a registry from elsewhere may hold any name
    if host != socket.gethostname() or not inside or not path.is_file():
        st.caption(f"No log here: it lies on {code(host, 60)} in the store of the scheduler.")
        return
    log_tail(path)


with kept_view("jobs.py", {"last", "part"}):
    page()
