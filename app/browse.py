"""Browse: find entries by text, filters and sorting. All of it is in the URL."""

from __future__ import annotations

from typing import Any, get_args

import streamlit as st

from app.parts import (
    MOST_COMPARED,
    compare_link,
    counted,
    entry_link,
    kept_view,
    no_entries,
    perplexity_of,
    registry,
    status_badge,
)
from app.text import escape
from cards.render import figure, percent, size
from zoo.registry import Facets, Page, Query, Registry, Sort, Summary
from zoo.registry.figures import task_count

PER_PAGE = 24
MOST_CHOICES = 200  # of a filter; the commonest ones
MOST_BITS = 16.0
SIZES: dict[str, int | None] = {
    "0": None,
    **{f"{n} MB": n * 10**6 for n in (10, 30, 100, 300)},
    **{f"{n} GB": n * 10**9 for n in (1, 3, 10, 30)},
    "any": None,
}
# Of each filter: its key, which is its name in the URL, and the value that filters nothing.
NOTHING: dict[str, Any] = {
    "q": "",
    "family": [],
    "base": [],
    "method": [],
    "pattern": [],
    "licence": [],
    "status": [],
    "sparsity": (0, 100),
    "bits": (0.0, MOST_BITS),
    "size": ("0", "any"),
}


def page() -> None:
    opened = registry()
    st.title("Sparse Zoo")
    if not opened.count():
        no_entries()
        return
    st.caption("Sparse, quantized language models that are small and fast on ordinary CPUs.")
    query = _filters(opened.facets())
    picked = st.container()
    query, view = _order(query)
    guess = st.session_state.get("page", 1)
    there = _at(opened, query, guess)
    if not there.total:
        st.info("**Nothing matches.** Remove a filter, or all of them.", icon=":material/search_off:")
        st.button("Clear filters", on_click=_clear, key="clear-here")
        with picked:
            _picks([])
        return
    results = st.container()
    pages, number = -(-there.total // PER_PAGE), 1
    if pages > 1:
        with st.container(horizontal_alignment="center"):
            number = st.pagination(pages, key="page", bind="query-params")
    if number != guess:  # the URL's, or there are fewer pages now
        there = _at(opened, query, number)
    found = there.entries
    with picked:
        _picks([summary.id for summary in found])
    with results:
        first = PER_PAGE * (number - 1) + 1
        entries = "entry" if there.total == 1 else "entries"
        others = ": sort or filter to see others" if there.more else ""
        st.caption(f"{first:,}–{first + len(found) - 1:,} of {counted(there)} {entries}{others}")
        if view == "Table":
            _table(found)
        else:
            _cards(found)


def _at(opened: Registry, query: Query, number: int) -> Page:
    """The page of this number, from 1."""
    return opened.search(query.model_copy(update={"limit": PER_PAGE, "offset": PER_PAGE * (number - 1)}))


def _filters(facets: Facets) -> Query:
    with st.sidebar:
        text = st.text_input(
            "Search",
            key="q",
            bind="query-params",
            max_chars=200,
            placeholder="id, base, method, 8:16, Q4_0 …",
            on_change=_first_page,
        )
        families = _choice("Family", "family", facets.families)
        bases = _choice("Base model", "base", facets.bases)
        methods = _choice("Method", "method", facets.methods)
        patterns = _choice("Pattern", "pattern", facets.patterns)
        sparsity = _range("Sparsity, %", "sparsity", step=5)
        bits = _range("Bits per weight", "bits", step=0.5)
        sizes = st.select_slider(
            "Size",
            list(SIZES),
            value=NOTHING["size"],
            key="size",
            bind="query-params",
            on_change=_first_page,
            help="Bytes of the packed file, or of the smallest other that holds the weights unrounded.",
        )
        licences = _choice("Licence", "licence", facets.licenses)
        statuses = _choice("Status", "status", facets.statuses, "failed only when chosen")
        st.button("Clear filters", on_click=_clear, width="stretch")
    return Query(
        text=text or None,
        families=families,
        bases=bases,
        methods=methods,
        patterns=patterns,
        licenses=licences,
        statuses=statuses,
        min_sparsity=sparsity[0] / 100 if sparsity[0] > 0 else None,
        max_sparsity=sparsity[1] / 100 if sparsity[1] < 100 else None,
        min_bits=bits[0] if bits[0] > 0 else None,
        max_bits=bits[1] if bits[1] < MOST_BITS else None,
        min_size=SIZES[sizes[0]],
        max_size=SIZES[sizes[1]],
    )


def _choice(label: str, key: str, counts: dict[str, int], placeholder: str = "") -> tuple[Any, ...]:
    options = list(counts)[:MOST_CHOICES]
    commonest = ", ".join(f"{name} {counts[name]:,}" for name in options[:2])
    chosen: list[str] = st.multiselect(
        label,
        options,
        key=key,
        bind="query-params",
        placeholder=placeholder or commonest[:60] or "none",
        on_change=_first_page,
    )
    return tuple(chosen)


def _range(label: str, key: str, step: float) -> tuple[float, float]:
    low, high = NOTHING[key]
    chosen: tuple[float, float] = st.slider(
        label, low, high, (low, high), step, key=key, bind="query-params", on_change=_first_page
    )
    return chosen


def _order(query: Query) -> tuple[Query, str]:
    """The query with its sorting, and how to show what it finds."""
    with st.container(horizontal=True, vertical_alignment="bottom", key="order"):
        sort = st.selectbox(
            "Sort by",
            get_args(Sort),
            key="sort",
            bind="query-params",
            on_change=_first_page,
            width=160,
            help="Best first. Speed is the best on any machine: the entry says which. Accuracies over the "
            "most tasks come first, as only those over the same tasks compare.",
        )
        view = st.segmented_control(
            "View", ["Cards", "Table"], default="Cards", key="view", bind="query-params", required=True
        )
        reverse = st.toggle("Worst first", key="worst", bind="query-params", on_change=_first_page)
    return query.model_copy(update={"sort": sort, "reverse": reverse}), view


def _first_page() -> None:
    if "page" in st.session_state:
        st.session_state["page"] = 1


def _clear() -> None:
    for key, value in NOTHING.items():
        st.session_state[key] = value
    _first_page()


# --- what is picked for comparison --------------------------------------------------------------------


def _picks(offered: list[str]) -> None:
    """The entries chosen to be compared, of this page and of others."""
    before = st.session_state.get("pick", st.query_params.get_all("pick"))
    with st.container(horizontal=True, vertical_alignment="bottom", key="picked"):
        picked: list[str] = st.multiselect(
            "To compare",
            list(dict.fromkeys([*before, *offered])),
            key="pick",
            bind="query-params",
            max_selections=MOST_COMPARED,
            placeholder=f"Choose two to {MOST_COMPARED} entries, here or below",
        )
        if len(picked) > 1:
            compare_link(picked, f"Compare {len(picked)}")


def _pick(ids: list[str]) -> None:
    """Pick what is ticked on this page. All of it, as one tick may come before the answer to another."""
    _set_picks(ids, [entry_id for entry_id in ids if st.session_state[f"pick {entry_id}"]])


def _pick_rows(ids: list[str], key: str) -> None:
    rows = st.session_state[key]["selection"]["rows"]
    _set_picks(ids, [ids[row] for row in rows if row < len(ids)])


def _set_picks(ids: list[str], chosen: list[str]) -> None:
    """`chosen` of the entries of this page, and what was picked on others; the oldest first."""
    kept = [entry_id for entry_id in st.session_state["pick"] if entry_id not in ids or entry_id in chosen]
    st.session_state["pick"] = list(dict.fromkeys([*kept, *chosen]))[:MOST_COMPARED]


# --- results ------------------------------------------------------------------------------------------


def _cards(found: list[Summary]) -> None:
    picked = st.session_state["pick"]
    ids = [summary.id for summary in found]
    grid = st.grid(min_column_width=320, border=True)
    for summary in found:
        with grid.cell():
            with st.container(
                horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"
            ):
                entry_link(summary.id)
                key = f"pick {summary.id}"
                st.session_state[key] = summary.id in picked
                st.checkbox(
                    "Compare",
                    key=key,
                    on_change=_pick,
                    args=(ids,),
                    disabled=len(picked) >= MOST_COMPARED and summary.id not in picked,
                )
            st.markdown(_card(summary))


def _card(summary: Summary) -> str:
    """What a card says below the entry's name; Markdown."""
    known = summary.figures
    badges = [
        status_badge(summary.status),
        f":gray-badge[{escape(summary.family)}]",
        f":blue-badge[{escape(known.pattern, 40)}]",
        f":violet-badge[{escape(known.method, 40)}]",
    ]
    lines = [" ".join(badges)]
    compressed = [f"**{percent(summary.sparsity)}** sparse", f"**{summary.bits_per_weight:.3g}** bits"]
    if known.size is not None:
        compressed.append(f"**{size(known.size)}**")
    lines.append(_joined(compressed))
    perplexity = perplexity_of(summary)
    if perplexity is not None:
        base = "" if known.base_perplexity is None else f"base {figure(known.base_perplexity)}, "
        context = f"context {perplexity.context_length or '?'}"
        lines.append(f"perplexity **{figure(perplexity.value)}** :gray[({base}{context})]")
    measured = []
    if known.accuracy is not None:
        tasks = task_count(known)
        delta = "" if known.accuracy_delta is None else f", {100 * known.accuracy_delta:+.1f} to base"
        over = f":gray[({tasks} {'task' if tasks == 1 else 'tasks'}{delta})]"
        measured.append(f"accuracy **{percent(known.accuracy)}** {over}")
    if known.speed is not None:
        measured.append(f"**{figure(known.speed)}** token/s")
    lines.append(_joined(measured) or ":gray[no accuracy or speed measured]")
    lines.append(f":small[from {escape(summary.base_repository or summary.base_model, 80)}]")
    return "  \n".join(lines)


def _joined(parts: list[str]) -> str:
    """On one line, which breaks between the parts only."""
    return " · ".join(part.replace(" ", "\u00a0") for part in parts)


def _table(found: list[Summary]) -> None:
    ids = [summary.id for summary in found]
    key = "rows of " + " ".join(ids)
    wanted = [row for row, entry_id in enumerate(ids) if entry_id in st.session_state["pick"]]
    state = {"selection": {"rows": wanted}}
    if key in st.session_state and sorted(st.session_state[key]["selection"]["rows"]) != wanted:
        st.session_state[key] = state
    st.dataframe(
        [_row(summary) for summary in found],
        hide_index=True,
        key=key,
        on_select=lambda: _pick_rows(ids, key),
        selection_mode="multi-row",
        selection_default=state,
        height="content",
        placeholder="–",
        alt="The entries that were found, one in a row",
        column_config={
            "open": st.column_config.ButtonColumn(
                "", key="opened", type="tertiary", pinned=True, width=40, help="Open the entry."
            ),
            "id": st.column_config.TextColumn(width=270),
            "sparsity": st.column_config.NumberColumn(format="%.1f %%"),
            "bits": st.column_config.NumberColumn("bits/weight", format="%.3g"),
            "size": st.column_config.NumberColumn(format="%.1f MB"),
            "accuracy": st.column_config.NumberColumn(format="%.1f %%"),
            "to base": st.column_config.NumberColumn(format="%+.1f"),
            "perplexity": st.column_config.NumberColumn(format="%.2f"),
            "speed": st.column_config.NumberColumn("token/s", format="%.1f"),
        },
    )
    clicked = st.session_state.get("opened")
    if clicked is not None:
        st.switch_page("entry.py", query_params={"id": ids[clicked["row"]]})


def _row(summary: Summary) -> dict[str, Any]:
    known, perplexity = summary.figures, perplexity_of(summary)
    return {
        "open": ":material/open_in_new:",
        "id": summary.id,
        "status": summary.status,
        "sparsity": 100 * summary.sparsity,
        "bits": summary.bits_per_weight,
        "size": None if known.size is None else known.size / 1e6,
        "accuracy": None if known.accuracy is None else 100 * known.accuracy,
        "tasks": None if known.tasks is None else task_count(known),
        "to base": None if known.accuracy_delta is None else 100 * known.accuracy_delta,
        "perplexity": known.perplexity,
        "context": None if perplexity is None else perplexity.context_length,
        "speed": known.speed,
        "family": summary.family,
        "pattern": known.pattern,
        "method": known.method,
        "base": summary.base_repository or summary.base_model,
        "licence": summary.license,
        "created": summary.created[:10],
    }


with kept_view("browse.py", {*NOTHING, "sort", "worst", "view", "page", "pick"}):
    page()
