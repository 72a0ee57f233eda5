"""What several pages need: the registry, links between pages, messages."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import streamlit as st

from app.text import REASON_LIMIT, escape
from zoo.compare import perplexity_of as perplexity_of
from zoo.entry import Status
from zoo.errors import ZooError
from zoo.logs import redact
from zoo.registry import Page, Registry, open_registry
from zoo.registry.registry import HEAD

REPOSITORY = Path(__file__).parents[1]
MOST_COMPARED = 6
STATUS_BADGES = {
    "verified": ":green-badge[:material/check: verified]",
    "published": ":green-badge[:material/cloud_done: published]",
    "failed": ":red-badge[:material/close: failed]",
}
LIVE_S, IDLE_S = 2.0, 10.0  # seconds between looks while something runs, and while nothing does
LOG_LINES = 30
RUN_BADGES = {
    "running": ":blue-badge[:material/progress_activity: running]",
    "done": ":green-badge[:material/check: done]",
    "failed": ":red-badge[:material/close: failed]",
    "interrupted": ":orange-badge[:material/pause: interrupted]",
}


def registry() -> Registry:
    """The registry that ZOO_REGISTRY names, or the repository's own. RegistryError if it cannot be read."""
    url = os.environ.get("ZOO_REGISTRY") or str(REPOSITORY / "registry.db")
    if "://" not in url or url.startswith("sqlite"):  # a file is quick to open, and may come and go
        return _open(url)
    # A server's connections are kept, and shared by all who look.
    kept: Registry = st.cache_resource(
        _open, validate=lambda opened: opened.revision() == HEAD, show_spinner=False
    )(url)
    return kept


def _open(url: str) -> Registry:
    return open_registry(url, create=False)


def store_folder() -> Path:
    """The folder that ZOO_STORE names, or the one where `zoo run` puts what it makes."""
    return Path(os.environ.get("ZOO_STORE") or "~/.cache/sparse-zoo").expanduser()


@contextmanager
def kept_view(page: str, widgets: Collection[str], others: Collection[str] = ()) -> Iterator[None]:
    """Remember the view that a page shows, and take it up again after the browser's Back.

    Streamlit then opens the page with the URL's parameters of the one that was left. page: its file; widgets:
    keys of those bound to the URL; others: further parameters of this page's URL.
    """
    name = f"view of {page}"
    strange = any(key not in widgets and key not in others for key in st.query_params)
    if strange and name in st.session_state:
        st.switch_page(page, query_params=st.session_state[name])
    yield
    view = {key: _spelt(st.session_state[key]) for key in widgets if key in st.session_state}
    view |= {key: st.query_params.get_all(key) for key in others}
    st.session_state[name] = {key: values for key, values in view.items() if values}


def _spelt(value: object) -> list[str]:
    """A widget's value as Streamlit writes it into a URL."""
    values = value if isinstance(value, list | tuple) else [value]
    return [
        str(one).lower() if isinstance(one, bool) else str(one) for one in values if one not in (None, "")
    ]


def show_error(error: ZooError) -> None:
    """What was found, what was expected, and what to try, as the command line says it."""
    lines = [f"**{escape(redact(error.what), REASON_LIMIT)}**"]
    for name, said in (("Found", error.saw), ("Expected", error.expected), ("Try", error.try_)):
        if said:
            lines.append(f"{name}: {escape(redact(said), REASON_LIMIT)}")
    st.error("\n\n".join(lines), icon=":material/error:")


def no_entries() -> None:
    st.info(
        "**No entries yet.** Run `make demo` to make the first one, or `zoo run RECIPE` for another recipe. "
        "A registry elsewhere: `zoo app --registry URL`.",
        icon=":material/inventory_2:",
    )


def counted(found: Page, but: int = 0) -> str:
    """How many entries a search found, `but` of them aside; it counts so far only."""
    return f"more than {found.total:,}" if found.more else f"{found.total - but:,}"


def entry_link(entry_id: str, *, icon: str | None = None) -> None:
    st.page_link("entry.py", label=f"**{escape(entry_id)}**", icon=icon, query_params={"id": entry_id})


def compare_link(entry_ids: Sequence[str], label: str) -> None:
    st.page_link(
        "compare.py", label=label, icon=":material/balance:", query_params={"entry": list(entry_ids)}
    )


def ink() -> str:
    """The colour of words in charts, by the theme that is on."""
    return "#fafafa" if st.context.theme.type == "dark" else "#262730"


def status_badge(status: Status) -> str:
    return STATUS_BADGES[status]


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def log_tail(path: Path) -> None:
    """The last lines of a log file."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 200 * LOG_LINES))
        lines = file.read(400 * LOG_LINES).decode(errors="replace").splitlines()
    st.code("\n".join(lines[-LOG_LINES:]) or "(empty)", language=None, wrap_lines=True)
