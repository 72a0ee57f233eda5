"""A benchmark as a picture: bars of decode and prefill, and how fast the memory would allow."""

from __future__ import annotations

from pathlib import Path

from zoo.errors import UsageError
from zoo.files import atomic_file
from zoo.runner.bench import Bench

FORMATS = (".png", ".svg")


def check_plot(path: Path) -> None:
    """Raise UsageError, before anything is measured, if `draw` could not write `path`."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"cannot draw {path.name!r}", expected="a name that ends in .png or .svg")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "a chart needs matplotlib", saw=str(error), try_="pip install '.[bench]' in a checkout"
        ) from error


def draw(bench: Bench, path: Path) -> None:
    """Write the chart to `path`, PNG or SVG by its suffix."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = bench.rows
    several = len({row.model for row in rows}) > 1
    names = [f"{row.engine} {row.format}\n{row.bits_per_weight:.3g} bits per weight" for row in rows]
    if several:
        names = [f"{row.model}: {name}" for row, name in zip(rows, names, strict=True)]
    figure = Figure(figsize=(11, 1.6 + 0.55 * len(rows)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    figures = (
        ("decode", [(row.decode_tok_s, row.spread) for row in rows]),
        (
            f"prefill of {bench.prompt_tokens} tokens",
            [(row.prefill_tok_s, row.prefill_spread) for row in rows],
        ),
    )
    for panel, (title, values) in zip(panels, figures, strict=True):
        speeds = [speed for speed, _ in values]
        bars = panel.barh(
            range(len(rows)),
            speeds,
            xerr=[speed * spread / 2 for speed, spread in values],
            capsize=3,
            height=0.7,
        )
        for bar, row in zip(bars, rows, strict=True):  # told apart without colour too
            ours = row.engine == "zoo"
            bar.set(facecolor="#2f6f8f" if ours else "#e0d8c8", edgecolor="black", hatch="" if ours else "//")
        for position, speed in enumerate(speeds):  # at the foot, where no other mark can be
            panel.annotate(
                f"{speed:.1f}",
                (0, position),
                xytext=(6, 0),
                textcoords="offset points",
                verticalalignment="center",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 2},
            )
        panel.set_title(title)
        panel.set_xlabel("tokens per second")
        panel.spines[["top", "right"]].set_visible(False)
    limits = [1e9 * bench.roofline_gb_s / row.bytes_per_token for row in rows]
    panels[0].plot(
        limits,
        range(len(rows)),
        linestyle="none",
        marker="|",
        markersize=18,
        color="black",
        label=f"limit at {bench.roofline_gb_s:.1f} GB/s",
    )
    panels[0].set_xlim(left=0)
    figure.legend(loc="outside lower left", frameon=False)
    panels[0].set_yticks(range(len(rows)), names)
    panels[0].invert_yaxis()
    model = "" if several else f"{rows[0].model}, "
    figure.suptitle(
        f"{model}threads: {bench.threads}, {bench.machine.cpu}; context {bench.context_tokens}, "
        f"medians of {bench.repeats}, bars: interquartile range",
        fontsize="medium",
    )
    with atomic_file(path) as temporary, rc_context({"svg.fonttype": "none"}):  # text stays text
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150)
