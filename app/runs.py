"""Runs: what the pipeline does and did, with stages, time, the end of the log, and reasons of failures."""

from __future__ import annotations

import socket
from datetime import UTC, datetime

import psutil
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
from zoo.progress import log_path
from zoo.registry import Run

PER_PAGE = 20
STAGE_BADGES = {
    "done": ":green[✓ done]",
    "cached": ":gray[↺ done before]",
    "failed": ":red[✗ failed]",
}


def page() -> None:
    st.title("Runs")
    runs = registry().runs()
    if not runs:
        st.info(
            "**No runs yet.** `make demo` or `zoo run RECIPE` starts one; it shows here while it is on.",
            icon=":material/manufacturing:",
        )
        st.fragment(_wait, run_every=IDLE_S)(0)
        return
    statuses: list[str] = st.pills(
        "Status", list(RUN_BADGES), selection_mode="multi", key="state", bind="query-params"
    )
    shown = [run for run in runs if not statuses or run.status in statuses]
    if not shown:
        st.info("**No run has this status.** Choose another.", icon=":material/filter_alt_off:")
        return
    number = 1
    if len(shown) > PER_PAGE:
        number = st.pagination(-(-len(shown) // PER_PAGE), key="sheet", bind="query-params")
    running = any(run.status == "running" for run in runs)
    ids = [run.id for run in shown[PER_PAGE * (number - 1) : PER_PAGE * number]]
    st.fragment(_live, run_every=LIVE_S if running else IDLE_S)(ids, len(runs), running)


def _wait(known: int) -> None:
    if len(registry().runs()) != known:
        st.rerun()


def _live(ids: list[int], known: int, running: bool) -> None:
    """The runs with these ids as they are now. The page as a whole begins anew when a run starts or ends."""
    try:
        runs = registry().runs()
    except ZooError as error:
        show_error(error)
        return
    if len(runs) != known or any(run.status == "running" for run in runs) != running:
        st.rerun()
    by_id = {run.id: run for run in runs}
    for position, run_id in enumerate(ids):
        if run_id in by_id:
            _run(by_id[run_id], opened=position == 0)


def _run(run: Run, opened: bool) -> None:
    ended = run.finished or datetime.now(UTC)
    seconds = (ended - run.started).total_seconds()
    with st.container(border=True):
        st.markdown(
            f"{RUN_BADGES[run.status]} **{escape(run.recipe_name)}** · {duration(seconds)}  \n"
            f":small[run {run.id}, begun {run.started:%Y-%m-%d %H:%M:%S} UTC on {escape(run.host, 60)}, "
            f"process {run.pid}]"
        )
        if run.failure:
            st.error(escape(run.failure, REASON_LIMIT), icon=":material/error:")
        if run.status == "running" and _gone(run):
            st.warning(
                "Its process is gone. `zoo run` with the same recipe goes on from the last finished stage.",
                icon=":material/warning:",
            )
        if run.entry_id:
            entry_link(run.entry_id, icon=":material/open_in_new:")
        count = f"{len(run.stages)} {'stage' if len(run.stages) == 1 else 'stages'}"
        with st.expander(f"{count} and the log", expanded=opened or run.status == "running"):
            _stages(run, ended)
            _log(run)


def _stages(run: Run, ended: datetime) -> None:
    lines = ["| stage | | time |", "|---|---|---|"]
    for stage in run.stages:
        reason = f" {escape(stage.reason, REASON_LIMIT)}" if stage.reason else ""
        lines.append(
            f"| {escape(stage.name)} | {STAGE_BADGES[stage.status]}{reason} | {duration(stage.seconds)} |"
        )
    if run.status == "running" and not _gone(run):
        spent = (ended - run.started).total_seconds() - sum(stage.seconds for stage in run.stages)
        lines.append(f"| next | :blue[… at work] | {duration(max(0.0, spent))} |")
    if len(lines) > 2:
        st.markdown("\n".join(lines))


def _log(run: Run) -> None:
    path = log_path(store_folder(), run.id, run.recipe_sha256)
    if run.host != socket.gethostname() or not path.is_file():
        st.caption(f"No log here: it lies on {code(run.host, 60)} in the store, where the run took place.")
        return
    log_tail(path)


def _gone(run: Run) -> bool:
    return run.host == socket.gethostname() and not psutil.pid_exists(run.pid)


with kept_view("runs.py", {"state", "sheet"}):
    page()
