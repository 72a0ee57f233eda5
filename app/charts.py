"""Charts: data in, an Altair chart out. Each tells its kinds apart by shape, dash or words as well as colour.
`ink` is the colour of words, which Streamlit's themes leave black.

Every text of an entry is data, never a field's name or an expression.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import altair as alt

from app.pareto import AXES, Cost, Point
from app.text import plain
from zoo.compare import Pair
from zoo.entry import Benchmark, Direction, Layer, Measurement, TrainingPoint

# After Okabe and Ito: colours that are told apart with any colour vision, on light and on dark.
BLUE, ORANGE, GREEN = "#1f83b8", "#d55e00", "#009e73"
KINDS = ["entry", "llama.cpp", "base"]
KIND_COLOURS = alt.Scale(domain=KINDS, range=[BLUE, ORANGE, GREEN])
KIND_SHAPES = alt.Scale(domain=KINDS, range=["circle", "square", "diamond"])
PALE, MIDDLE, DEEP = "#eaf2f8", "#5b9bbf", "#0b3c5d"
LAYER = re.compile(r"^.*?\.(\d+)\.(.+)$", re.DOTALL)  # of a module's name: decoder layer, kind

Heat = Literal["sparsity", "bits", "error"]
Phase = Literal["decode", "prefill"]


def heat_map(layers: Sequence[Layer], what: Heat) -> alt.Chart | alt.LayerChart | None:
    """A cell per linear layer of the decoder: down its decoder layer, across its kind. None without any."""
    rows = []
    for layer in layers:
        match = LAYER.match(layer.name)
        value = getattr(layer, what)
        if match is None or value is None:
            continue
        rows.append(
            {
                "depth": int(match[1][:6]),
                "kind": plain(match[2].rpartition(".")[2], 30),
                "value": value,
                "shown": _cell(value, what),
                "name": plain(layer.name),
                "shape": f"{layer.rows} × {layer.columns}",
                "pattern": plain(layer.pattern or "–", 40),
                "method": plain(layer.method or "–", 40),
            }
        )
    if not rows:
        return None
    depth = len({row["depth"] for row in rows})
    top = {"sparsity": 1.0, "bits": 16.0, "error": max(row["value"] for row in rows) or 1.0}[what]
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X(
            "kind:N",
            title=None,
            sort=None,
            axis=alt.Axis(orient="top", labelAngle=-90, labelLimit=90, labelOverlap=False),
        ),
        y=alt.Y("depth:O", title="decoder layer"),
        tooltip=[
            alt.Tooltip("name:N"),
            alt.Tooltip("shown:N", title=what),
            alt.Tooltip("shape:N"),
            alt.Tooltip("pattern:N"),
            alt.Tooltip("method:N"),
        ],
    )
    cells = base.mark_rect(stroke="white", strokeWidth=0.5).encode(
        color=alt.Color(
            "value:Q",
            legend=None,
            scale=alt.Scale(domain=[0, top / 2, top], range=[PALE, MIDDLE, DEEP]),
        )
    )
    words = base.mark_text(fontSize=10).encode(
        text="shown:N",
        color=alt.condition(alt.datum.value > 0.4 * top, alt.value("white"), alt.value("black")),
    )
    return (cells + words).properties(height=max(120, depth * (18 if depth <= 40 else 14)))


def _cell(value: float, what: Heat) -> str:
    if what == "sparsity":
        return f"{100 * value:.0f} %"
    return f"{value:.2g}"


def pair(measured: Pair, ink: str) -> alt.LayerChart:
    """An entry's figure and its base's, with bars of two standard errors each way."""
    rows = [_bar(measured.entry)] + ([_bar(measured.base)] if measured.base else [])
    base = alt.Chart(alt.Data(values=rows)).encode(
        y=alt.Y(
            "who:N",
            title=None,
            sort=["base", "entry"],
            scale=alt.Scale(padding=1.1),
            axis=alt.Axis(ticks=False, domain=False),
        ),
        tooltip=[alt.Tooltip("who:N"), alt.Tooltip("shown:N", title="value"), alt.Tooltip("n:N")],
    )
    axis = alt.Axis(tickCount=5, grid=True)
    bars = base.mark_rule(strokeWidth=2).encode(
        x=alt.X("low:Q", title=None, scale=alt.Scale(zero=False, nice=True), axis=axis),
        x2="high:Q",
        color=alt.Color("kind:N", scale=KIND_COLOURS, legend=None),
    )
    points = base.mark_point(size=110, filled=True, opacity=1).encode(
        x=alt.X("value:Q", scale=alt.Scale(zero=False)),
        color=alt.Color("kind:N", scale=KIND_COLOURS, legend=None),
        shape=alt.Shape("kind:N", scale=KIND_SHAPES, legend=None),
    )
    words = base.mark_text(dy=-13, fontSize=11, color=ink).encode(x="value:Q", text="shown:N")
    return (bars + points + words).properties(height=150)


def _bar(m: Measurement) -> dict[str, Any]:
    spread = 2 * (m.stderr or 0.0)
    return {
        "who": m.subject,
        "kind": m.subject,
        "value": m.value,
        "low": m.value - spread,
        "high": m.value + spread,
        "shown": f"{m.value:.4g}" + (f" ± {m.stderr:.2g}" if m.stderr is not None else ""),
        "n": f"{m.samples} {plain(m.sample_unit, 30)}",
    }


def speed(
    benchmarks: Iterable[Benchmark], name: Callable[[Benchmark], str], phase: Phase, ink: str
) -> alt.LayerChart:
    """Tokens per second as bars, each with its name and figure."""
    rows: list[dict[str, Any]] = [
        {
            "name": plain(name(b), 60),
            "runner": plain(f"{b.runner} {b.runner_version}", 60),
            "value": b.decode_tokens_per_s if phase == "decode" else b.prefill_tokens_per_s,
        }
        for b in benchmarks
    ]
    rows = [{**row, "shown": f"{row['value']:.1f}"} for row in rows]
    top = max((row["value"] for row in rows), default=1.0)
    base = alt.Chart(alt.Data(values=rows)).encode(
        y=alt.Y("name:N", title=None, sort="-x", axis=alt.Axis(labelLimit=150, ticks=False, domain=False)),
        x=alt.X("value:Q", title=f"{phase}, token/s", scale=alt.Scale(domain=[0, 1.18 * top])),
        tooltip=[alt.Tooltip("name:N"), alt.Tooltip("runner:N"), alt.Tooltip("shown:N", title="token/s")],
    )
    bars = base.mark_bar(color=BLUE, height={"band": 0.7})
    words = base.mark_text(align="left", dx=4, color=ink).encode(text="shown:N")
    return (bars + words).properties(height=60 + 30 * len(rows))


def loss(training: Sequence[TrainingPoint]) -> alt.Chart:
    """The curve of a recovery training: the loss whole, and its parts in dashes of their own."""
    rows: list[dict[str, Any]] = []
    for point in training:
        whole = {"tokens": point.tokens, "step": point.step, "minutes": point.seconds / 60}
        rows.append({**whole, "term": "loss", "value": point.loss})
        rows += [{**whole, "term": plain(term, 40), "value": v} for term, v in point.terms.items()]
    terms = list(dict.fromkeys(row["term"] for row in rows))
    return (
        alt.Chart(alt.Data(values=rows))
        .mark_line(strokeWidth=2)
        .encode(
            x=alt.X("tokens:Q", title="tokens trained on", axis=alt.Axis(format="~s")),
            y=alt.Y("value:Q", title="loss", scale=alt.Scale(zero=False)),
            color=alt.Color("term:N", sort=terms, legend=alt.Legend(title=None, orient="bottom")),
            strokeDash=alt.StrokeDash("term:N", sort=terms),
            tooltip=[
                alt.Tooltip("term:N"),
                alt.Tooltip("value:Q", format=".4f"),
                alt.Tooltip("step:Q"),
                alt.Tooltip("tokens:Q", format=","),
                alt.Tooltip("minutes:Q", format=".1f"),
            ],
        )
        .properties(height=320)
    )


def pareto(
    points: Sequence[Point],
    bases: Mapping[str, float],
    cost: Cost,
    quality: str,
    direction: Direction,
    chosen: Sequence[str],
    ink: str,
) -> alt.LayerChart:
    """Quality against cost; a dashed line joins what nothing beats. A click selects the field `id`.

    bases: the base models' quality, each a dotted line across, whatever they cost.
    """
    middle = (min(p.cost for p in points) + max(p.cost for p in points)) / 2
    rows = [
        {
            **p.model_dump(exclude={"best"}),
            "label": plain(p.name, 60),
            "beaten": "no" if p.best else "yes",
            "named": p.id in chosen and p.kind == "entry",
            "right": p.cost <= middle,
            "error": "–" if p.low is None else f"{p.low:.4g} … {p.high:.4g}",
        }
        for p in points
    ]
    better = "higher" if direction == "higher_is_better" else "lower"
    x = alt.X("cost:Q", title=AXES[cost], scale=alt.Scale(zero=False, nice=True, padding=20))
    y = alt.Y("quality:Q", title=f"{quality} ({better} is better)", scale=alt.Scale(zero=False, padding=20))
    chart = alt.Chart(alt.Data(values=rows)).encode(x=x)
    levels = [{"quality": value, "label": f"base: {plain(name, 60)}"} for name, value in bases.items()]
    level = alt.Chart(alt.Data(values=levels)).encode(y=y)
    base_line = level.mark_rule(strokeDash=[2, 3], color=GREEN, strokeWidth=1.5)
    base_name = level.mark_text(align="right", dy=-7, dx=-4, fontSize=11, color=GREEN).encode(
        x=alt.value("width"), text="label:N"
    )
    frontier = (
        chart.mark_line(strokeDash=[6, 4], strokeWidth=1.5, color="gray")
        .encode(y=y, order="cost:Q")
        .transform_filter(alt.datum.beaten == "no")
    )
    errors = (
        chart.mark_rule(opacity=0.35, color=ink)
        .encode(y=alt.Y("low:Q"), y2="high:Q")
        .transform_filter("isValid(datum.low)")
    )
    legend = alt.Legend(title=None, orient="top")
    marks = (
        chart.mark_point(size=120, strokeWidth=2)
        .encode(
            y=y,
            stroke=alt.Stroke("kind:N", scale=KIND_COLOURS, legend=legend),
            fill=alt.Fill("kind:N", scale=KIND_COLOURS, legend=legend),
            shape=alt.Shape("kind:N", scale=KIND_SHAPES, legend=legend),
            fillOpacity=alt.condition(alt.datum.beaten == "no", alt.value(1), alt.value(0)),
            tooltip=[
                alt.Tooltip("label:N", title="model"),
                alt.Tooltip("kind:N"),
                alt.Tooltip("form:N"),
                alt.Tooltip("quality:Q", format=".4g"),
                alt.Tooltip("error:N", title="± 2 standard errors"),
                alt.Tooltip("cost:Q", title=AXES[cost], format=".4g"),
                alt.Tooltip("beaten:N", title="beaten in both"),
            ],
        )
        .add_params(alt.selection_point(name="picked", fields=["id"], on="click", clear=False))
    )
    names = [
        chart.mark_text(align=align, dx=dx, dy=-10, fontSize=11, fontWeight="bold", limit=230, color=ink)
        .encode(y=y, text="label:N")
        .transform_filter(f"datum.named && {side}")
        for align, dx, side in (("left", 8, "datum.right"), ("right", -8, "!datum.right"))
    ]
    return alt.layer(base_line, base_name, frontier, errors, marks, *names).properties(height=460)


def picture(chart: alt.Chart | alt.LayerChart, format_: Literal["png", "svg"]) -> bytes:
    """The chart as a file's bytes, on white. Raises ImportError without vl-convert."""
    import vl_convert  # noqa: F401  (Altair says less clearly that it is missing)

    sized = chart.properties(width=820, height=480, background="white")
    if format_ == "png":
        image = io.BytesIO()
        sized.save(image, format="png", ppi=144)
        return image.getvalue()
    drawn = io.StringIO()
    sized.save(drawn, format="svg")
    return drawn.getvalue().encode()
