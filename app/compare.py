"""Compare: entries side by side, and the chart of accuracy against cost."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import streamlit as st

from app import charts, pareto
from app.parts import MOST_COMPARED, counted, entry_link, ink, kept_view, no_entries, registry
from app.text import escape, plain, spreadsheet
from cards.render import figure, percent, size
from zoo import compare
from zoo.entry import Entry
from zoo.registry import Query, Registry, Summary

SUGGESTED = 100  # newest entries that the list offers; any other may be typed
MOST_POINTS = 300  # entries in the chart


def page() -> None:
    opened = registry()
    st.title("Compare")
    if not opened.count():
        no_entries()
        return
    ids = _chosen(opened)
    tables, chart, recipes = st.tabs(["Side by side", "Pareto", "Recipes"], key="show", bind="query-params")
    entries = [opened.get(entry_id) for entry_id in ids]
    if tables.open:
        with tables:
            _side_by_side(entries)
    if chart.open:
        with chart:
            _pareto(opened, entries)
    if recipes.open:
        with recipes:
            _recipes(entries)


def _chosen(opened: Registry) -> list[str]:
    before = st.session_state.get("entry", st.query_params.get_all("entry"))
    offered = [summary.id for summary in opened.search(Query(limit=SUGGESTED)).entries]
    chosen: list[str] = st.multiselect(
        "Entries",
        list(dict.fromkeys([*before, *offered])),
        key="entry",
        bind="query-params",
        max_selections=MOST_COMPARED,
        accept_new_options=True,
        placeholder=f"Choose two to {MOST_COMPARED}, or type an id",
    )
    return chosen


# --- side by side ---------------------------------------------------------------------------------------


def _side_by_side(entries: Sequence[Entry]) -> None:
    if len(entries) < 2:
        st.info(
            f"**Choose two to {MOST_COMPARED} entries** above, or on the page Browse.",
            icon=":material/balance:",
        )
        st.page_link("browse.py", label="Browse", icon=":material/grid_view:")
        return
    with st.container(horizontal=True):
        for entry in entries:
            entry_link(entry.id, icon=":material/open_in_new:")
    differing = st.toggle("Only what differs", key="differing", bind="query-params")
    st.caption(
        "★ the best of a row, higher ↑ or lower ↓ as the figure has it; what is the same everywhere is grey. "
        "Figures stand in one row only if they were measured in the same way."
    )
    rows = compare.compare(entries)
    lines = _facts(entries) + [_figures(row) for row in rows]
    shown = [cells for cells, differs in lines if differs or not differing]
    if shown:
        head = ["", *(f"**{escape(entry.id)}**" for entry in entries), "base"]
        st.markdown(_markdown([head, *shown]))
    else:
        st.info("They do not differ in anything that is recorded.")
    st.download_button(
        "CSV", _csv(entries, rows), "compare.csv", "text/csv", icon=":material/download:", on_click="ignore"
    )


def _facts(entries: Sequence[Entry]) -> list[tuple[list[str], bool]]:
    """Lines of what is no figure, and whether the entries differ in them."""
    values: dict[str, list[str]] = {
        "status": [e.status for e in entries],
        "family": [e.family for e in entries],
        "base model": [e.base_repository or e.base_model for e in entries],
        "pattern": [
            ", ".join(dict.fromkeys(x.pattern for x in e.layers if x.pattern)) or "–" for e in entries
        ],
        "method": [", ".join(dict.fromkeys(x.method for x in e.layers if x.method)) or "–" for e in entries],
        "licence": [e.license or "–" for e in entries],
        "parameters": [f"{e.parameters:,}" for e in entries],
    }
    lines = []
    for name, said in values.items():
        differs = len(set(said)) > 1
        cells = [escape(value, 80) for value in said]
        lines.append(([name, *(cells if differs else map(_grey, cells)), ""], differs))
    return lines


def _figures(row: compare.Row) -> tuple[list[str], bool]:
    arrow = {"higher_is_better": "\u00a0↑", "lower_is_better": "\u00a0↓", None: ""}[row.direction]
    differs = len(set(row.values)) > 1
    cells = []
    for position, value in enumerate(row.values):
        shown = _shown(value, row)
        cells.append(f":green-background[**★ {shown}**]" if position in row.best else shown)
    if not differs:
        cells = [_grey(cell) for cell in cells]
    return [escape(row.name) + arrow, *cells, _shown(row.base, row)], differs


def _shown(value: float | None, row: compare.Row) -> str:
    if value is None:
        return "–"
    if row.unit == "byte":
        return size(value)
    return percent(value) if row.name == "sparsity" else figure(value)


def _grey(cell: str) -> str:
    return f":gray[{cell}]"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table; the cells are Markdown."""
    head, *rest = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|---" * len(lines[0]) + "|", *rest])


def _csv(entries: Sequence[Entry], rows: Sequence[compare.Row]) -> str:
    lines: list[list[Any]] = [["figure", "unit", "direction", *(entry.id for entry in entries), "base"]]
    lines += [[row.name, row.unit, row.direction or "", *row.values, row.base] for row in rows]
    return spreadsheet(lines)


# --- the Pareto chart -----------------------------------------------------------------------------------


def _pareto(opened: Registry, entries: Sequence[Entry]) -> None:
    chosen = [entry.id for entry in entries]
    bases = list(opened.facets().bases)
    if not bases:
        st.info("**No entry is offered yet.** Failed ones are not drawn.", icon=":material/scatter_plot:")
        return
    first = entries[0].base_repository or entries[0].base_model if entries else bases[0]
    bases = list(dict.fromkeys([first, *bases]))[:200]
    with st.grid(4, min_column_width=220):
        base = st.selectbox("Base model", bases, key="of", bind="query-params")
        page_ = opened.search(Query(bases=(base,), limit=MOST_POINTS))
        summaries = page_.entries
        metrics = pareto.metrics(summaries)
        if not metrics:
            st.info("**Nothing was measured** of the entries of this base.")
            return
        metric_name = st.selectbox("Measured", list(metrics), key="y", bind="query-params")
        cost = st.selectbox("Against", pareto.COSTS, key="x", bind="query-params")
        at = _setting(summaries) if cost == "speed" else None
    metric = metrics[metric_name]
    points = pareto.points(summaries, metric, cost, at)
    if not points:
        st.info("**No entry has both figures.** Choose another pair.", icon=":material/scatter_plot:")
        return
    bases_ = pareto.base_quality(summaries, metric)
    drawing = (points, bases_, cost, plain(f"{metric.task} {metric.metric}", 40), metric.direction, chosen)
    drawn = charts.pareto(*drawing, ink())
    event = st.altair_chart(
        drawn,
        key="pareto",
        on_select="rerun",
        selection_mode="picked",
        alt=f"{metric_name} against {pareto.AXES[cost]}; the points stand in the table below",
    )
    picked = event["selection"].get("picked")
    if picked:
        st.switch_page("entry.py", query_params={"id": str(picked[0]["id"])})
    st.caption(
        "● an entry in the form that its figures are of, ■ an unpruned one in llama.cpp (GGUF types that "
        "keep the model's output only), ◆ the base model in float16, its quality dotted. Filled and joined "
        "by dashes: nothing is better in both. Hover for details, click for the entry."
        + (f" The {MOST_POINTS} newest of {counted(page_)} entries." if page_.total > MOST_POINTS else "")
    )
    _downloads(points, charts.pareto(*drawing, "black"), cost, metric_name)
    best = dict.fromkeys(point.id for point in points if point.best and point.kind != "base")
    if best:
        st.markdown("**Beaten by nothing**")
        with st.container(horizontal=True):
            for entry_id in list(best)[:12]:
                entry_link(entry_id)
    with st.expander("The points as a table"):
        st.dataframe(
            [
                {
                    "model": p.name,
                    "kind": p.kind,
                    "form": p.form,
                    metric.metric: p.quality,
                    cost: p.cost,
                    "beaten in both": not p.best,
                }
                for p in points
            ],
            hide_index=True,
        )


def _setting(summaries: Sequence[Summary]) -> pareto.Setting | None:
    known = {at.name: at for at in pareto.settings(summaries)}
    if not known:
        return None
    chosen = st.selectbox(
        "On",
        list(known),
        key="on",
        bind="query-params",
        help="Speeds compare on one machine and setting only.",
    )
    return known[chosen]


def _downloads(points: Sequence[pareto.Point], drawn: Any, cost: str, metric: str) -> None:
    fields = ["id", "name", "kind", "form", "quality", "low", "high", "cost", "best"]
    head = [*fields[:4], metric, "low", "high", cost, "unbeaten"]
    lines = [head, *([getattr(point, name) for name in fields] for point in points)]
    with st.container(horizontal=True):
        icon = ":material/download:"
        st.download_button("CSV", spreadsheet(lines), "pareto.csv", "text/csv", icon=icon, on_click="ignore")
        try:
            import vl_convert  # noqa: F401
        except ImportError:
            st.caption("PNG and SVG need `pip install '.[app]'` in a checkout.")
            return
        for form, mime in (("png", "image/png"), ("svg", "image/svg+xml")):
            st.download_button(
                form.upper(),
                lambda form=form: charts.picture(drawn, form),
                f"pareto.{form}",
                mime,
                icon=icon,
                on_click="ignore",
            )


# --- recipes --------------------------------------------------------------------------------------------


def _recipes(entries: Sequence[Entry]) -> None:
    if len(entries) < 2:
        st.info(
            "**Choose two entries or more** to see how their recipes differ.", icon=":material/difference:"
        )
        return
    first = entries[0]
    for other in entries[1:]:
        st.markdown(f"{escape(first.id)} → **{escape(other.id)}**")
        lines = difflib.unified_diff(
            first.recipe[:20_000].splitlines(),
            other.recipe[:20_000].splitlines(),
            first.id,
            other.id,
            lineterm="",
        )
        st.code("\n".join(lines) or "the same recipe", language="diff")


with kept_view("compare.py", {"entry", "show", "differing", "of", "y", "x", "on"}):
    page()
