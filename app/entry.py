"""An entry: how to run it, what was done to it, how good and how fast it is, and how it was made."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import streamlit as st

from app import charts, lineage
from app.commands import commands
from app.pareto import setting
from app.parts import compare_link, counted, entry_link, ink, kept_view, registry, status_badge
from app.text import REASON_LIMIT, card, code, escape, plain
from cards.render import figure, kinds_of_layers, measured, percent, size, trainings
from zoo.compare import describe, gguf_files, gguf_tasks, is_perplexity, pairs
from zoo.entry import Benchmark, Entry
from zoo.importing import UNKNOWN
from zoo.registry import Query, Registry
from zoo.registry.figures import figures

TABS = ("Run it", "Compression", "Accuracy", "Speed", "Files", "Recipe", "Card")
SIBLINGS = 8


def page() -> None:
    entry_id = st.query_params.get("id", "")
    if not entry_id:
        st.info("**No entry chosen.** Choose one on the page Browse.", icon=":material/grid_view:")
        st.page_link("browse.py", label="Browse", icon=":material/grid_view:")
        return
    opened = registry()
    entry = opened.get(entry_id)
    _head(entry)
    shows: tuple[Callable[[Entry, Registry], None], ...] = (
        _run, _compression, _accuracy, _speed, _files, _recipe, _card,
    )  # fmt: skip
    for tab, show in zip(st.tabs(TABS, key="tab", bind="query-params"), shows, strict=True):
        if tab.open:
            with tab:
                show(entry, opened)


def _head(entry: Entry) -> None:
    known = figures(entry)
    st.header(escape(entry.id), anchor=False)
    badges = [
        status_badge(entry.status),
        f":gray-badge[{escape(entry.family)}]",
        f":blue-badge[{escape(known.pattern, 40)}]",
        f":violet-badge[{escape(known.method, 40)}]",
        f":gray-badge[{escape(entry.license or 'licence not recorded', 60)}]",
    ]
    st.markdown(" ".join(badges))
    st.markdown(
        f"from {code(entry.base_repository or entry.base_model)}, revision {code(entry.base_revision, 60)} · "
        f"{entry.parameters:,} parameters · made {escape(entry.created[:10])}"
    )
    if entry.status == "failed":
        reason = escape(entry.failure or "no reason recorded", REASON_LIMIT)
        st.error(f"**This entry failed and is not offered.** {reason}", icon=":material/error:")
    with st.grid(min_column_width=150, gap="small"):
        st.metric("Sparsity", percent(entry.sparsity), help="Zeros in the linear layers of the decoder.")
        st.metric(
            "Bits per weight",
            figure(entry.bits_per_weight),
            help="Of the smallest exact encoding of the whole model.",
        )
        st.metric(
            "Size",
            "–" if known.size is None else size(known.size),
            f"{figure(entry.compression_ratio)} × fewer bits",
            delta_color="off",
            delta_arrow="off",
            help="Of the packed file, or of the smallest other that holds the weights unrounded.",
        )
        if known.perplexity is not None:
            longest = next(
                p
                for p in pairs(entry.measurements)
                if is_perplexity(p.entry) and p.entry.value == known.perplexity
            )
            base = None if known.base_perplexity is None else f"base {figure(known.base_perplexity)}"
            st.metric(
                f"Perplexity at {longest.entry.context_length or '?'}",
                figure(known.perplexity),
                base,
                delta_color="off",
                delta_arrow="off",
                help=escape(describe(longest.entry)),
            )
        if known.accuracy is not None:
            delta = None if known.accuracy_delta is None else f"{100 * known.accuracy_delta:+.1f} to base"
            over = escape((known.tasks or "").replace(",", ", "), REASON_LIMIT)
            st.metric("Accuracy", percent(known.accuracy), delta, help=f"Mean over {over}.")
        if known.speed is not None:
            st.metric(
                "Fastest decode", f"{figure(known.speed)} token/s", help="See the tab Speed: where and how."
            )
    with st.container(horizontal=True):
        compare_link([entry.id], "Compare with others")
        if any(a.kind == "packed" for a in entry.artifacts):
            st.page_link(
                "try_it.py", label="Try it", icon=":material/forum:", query_params={"model": entry.id}
            )


def _run(entry: Entry, _: Registry) -> None:
    for command in commands(entry):
        st.markdown(f"**{command.title}**")
        st.code(command.text, language=command.language, wrap_lines=True)
    for published in entry.publications:
        st.markdown(
            f"Published as {code(published.repository)} at {code(published.endpoint)}, "
            f"tag {code(published.tag, 60)}, commit {code(published.commit[:12])}, "
            f"{escape(published.published[:10])}."
        )


def _compression(entry: Entry, _: Registry) -> None:
    if not entry.layers:
        st.info("What was done to each layer is not recorded of this entry.")
        return
    largest = max((a for a in entry.artifacts if a.kind == "safetensors"), key=lambda a: a.size, default=None)
    ours = figures(entry).size
    if ours is not None:
        dense = 2 * entry.parameters
        st.markdown(
            f"Its own files take **{size(ours)}**, the base model in float16 {size(dense)}: "
            f"**{figure(dense / ours)} ×** smaller."
            + (f" The dense safetensors are {size(largest.size)}." if largest else "")
        )
        st.progress(min(1.0, ours / dense), text=f"{percent(ours / dense)} of the base's bytes")
    whats: list[tuple[charts.Heat, str]] = [
        ("sparsity", "Sparsity per layer"),
        ("bits", "Bits per stored weight"),
        ("error", "Error per layer, ‖X(W − W′)‖² / ‖XW‖²"),
    ]
    with st.grid(min_column_width=330):
        for what, title in whats:
            chart = charts.heat_map(entry.layers, what)
            if chart is None:
                continue
            with st.container():
                st.markdown(f"**{title}**")
                st.altair_chart(chart, key=f"heat-{what}", alt=f"{title}, decoder layers down, kinds across")
    st.markdown("**By kind of layer**")
    st.dataframe(
        [
            {
                "layers": kind.name[:80],
                "count": kind.layers,
                "weights": kind.weights,
                "sparsity": percent(kind.sparsity),
                "pattern": kind.pattern[:80],
                "bits": kind.bits[:40],
                "columns per scale": kind.group[:40],
                "method": kind.method[:80],
                "mean error": figure(kind.error),
            }
            for kind in kinds_of_layers(entry.layers)[:200]
        ],
        hide_index=True,
        height="content",
    )


def _accuracy(entry: Entry, _: Registry) -> None:
    figures_ = pairs(entry.measurements)
    if not figures_:
        st.info("Nothing was measured of this entry.")
        return
    st.caption(
        "● the entry, ◆ its base, measured in the same way; bars are two standard errors each way. "
        "Figures of another text, context length or harness are not comparable."
    )
    with st.grid(min_column_width=330, border=True):
        for number, pair in enumerate(figures_):
            m = pair.entry
            arrow = "↑ higher is better" if m.direction == "higher_is_better" else "↓ lower is better"
            unit = "" if m.unit == "1" else f" ({escape(m.unit, 20)})"
            with st.container():
                st.markdown(f"**{escape(m.task)}** {escape(m.metric.replace('_', ' '))}{unit}")
                st.altair_chart(
                    charts.pair(pair, ink()), key=f"pair-{number}", alt=f"{describe(m)}, entry and base"
                )
                st.caption(
                    f"{arrow} · {escape(describe(m))} · {escape(m.harness, 60)}, {escape(m.dtype, 20)}"
                    + ("" if pair.base else " · the base was not measured so")
                )
    _gguf_files(entry)
    for number, training in enumerate(trainings(entry)):
        what = f"step {training.step} of the recipe" if training.step else "the base model's own"
        st.markdown(
            f"**Training**, {what}: {training.tokens:,} tokens in {training.seconds / 60:.1f} minutes"
        )
        st.altair_chart(
            charts.loss(training.curve), key=f"loss-{number}", alt="Loss over the tokens trained on"
        )
        if (run := training.run) is not None:
            several = f"{run.processes} × " if run.processes > 1 else ""
            library = f"torch {run.versions['torch']}" if "torch" in run.versions else ""
            st.caption(escape(", ".join(filter(None, [several + run.device, library, run.ended])), 120))


def _gguf_files(entry: Entry) -> None:
    files, tasks = gguf_files(entry), gguf_tasks(entry)
    if not files:
        return
    st.markdown("**Of the GGUF files**, in llama.cpp: the same text and tasks, of these the accuracy")
    rows = []
    for one in files:
        row = {
            "file": one.file.path,
            "size": size(one.file.size),
            "bits per weight": figure(one.bits_per_weight),
            "perplexity ↓": measured(one.perplexity),
        }
        row |= {f"{plain(task, 80)} ↑": measured(one.accuracies.get(task)) for task in tasks}
        if len(tasks) > 1:
            row["mean accuracy ↑"] = figure(one.accuracy)
        rows.append({**row, "decode token/s": figure(one.decode)})
    st.dataframe(rows, hide_index=True, height="content")


def _speed(entry: Entry, _: Registry) -> None:
    if not entry.benchmarks:
        st.info(
            "**Its speed was not measured.** `zoo bench` does it on this machine.", icon=":material/speed:"
        )
        return
    for at in dict.fromkeys(setting(b) for b in entry.benchmarks):
        alike = [b for b in entry.benchmarks if setting(b) == at]
        machine = alike[0].machine
        st.markdown(
            f"**{escape(machine.cpu)}** · {machine.cores} cores, {at.threads} threads used · "
            f"{size(machine.memory_bytes)} · {escape(', '.join(machine.isa[:12]))} · {escape(machine.system)}"
        )
        st.caption(
            f"Prompt of {at.prompt_tokens} tokens, {at.generated_tokens} generated; medians of "
            f"{alike[0].repeats}. Speeds compare on one machine and setting only."
        )

        def name(b: Benchmark) -> str:
            return f"{b.runner} {b.artifact.removeprefix(entry.id).lstrip('-')}"

        with st.grid(2, min_column_width=330):
            for phase in get_args(charts.Phase):
                st.altair_chart(
                    charts.speed(alike, name, phase, ink()),
                    key=f"{phase}-{at.name}",
                    alt=f"{phase} in tokens per second of each file",
                )
        st.dataframe(
            [
                {
                    "file": b.artifact,
                    "runner": f"{b.runner} {b.runner_version}",
                    "prefill token/s": round(b.prefill_tokens_per_s, 1),
                    "decode token/s": round(b.decode_tokens_per_s, 1),
                    "load": f"{b.load_s:.2f} s",
                    "memory": size(b.peak_memory_bytes),
                }
                for b in alike
            ],
            hide_index=True,
            height="content",
        )


def _files(entry: Entry, _: Registry) -> None:
    if not entry.artifacts:
        st.info("No files are recorded of this entry.")
        return
    passed: dict[str, bool] = {}
    for v in entry.verifications:
        passed[v.artifact] = passed.get(v.artifact, True) and v.passed
    words = {True: "✓ yes", False: "✗ NO", None: "–"}
    st.dataframe(
        [
            {
                "file": a.path,
                "format": a.format or a.kind,
                "size": size(a.size),
                "verified": words[passed.get(a.path)],
                "sha256": a.sha256,
            }
            for a in entry.artifacts
        ],
        hide_index=True,
        height="content",
    )
    st.caption("`zoo pull` checks every sha256.")
    st.markdown("**Verification**: each file's logits against those of the exported reference")
    if not entry.verifications:
        st.info("Nothing was verified of this entry.")
    for v in entry.verifications:
        passed_ = ":green-badge[✓ passed]" if v.passed else ":red-badge[✗ failed]"
        facts = [f"{v.positions} positions"]
        if v.top1_agreement is not None:
            least = "" if v.min_top1_agreement is None else f" (at least {percent(v.min_top1_agreement)})"
            facts.append(f"same first token {percent(v.top1_agreement)}{least}")
        if v.kl_divergence is not None:
            most = "" if v.max_kl_divergence is None else f" (at most {figure(v.max_kl_divergence)})"
            facts.append(f"KL {figure(v.kl_divergence)} nats{most}")
        with st.container(border=True):
            st.markdown(
                f"{passed_} {code(v.artifact)} in {escape(v.runner)} {escape(v.runner_version, 60)}  \n"
                f"{escape(v.reason, REASON_LIMIT)}  \n" + " · ".join(facts)
            )
            if v.sample:
                with st.expander("What it writes"):
                    st.text(v.sample[:2000])


def _recipe(entry: Entry, opened: Registry) -> None:
    st.markdown("**Lineage**")
    with st.container(horizontal=True, vertical_alignment="center", key="lineage"):
        _step("base model", entry.base_repository or entry.base_model, f"revision {entry.base_revision}")
        for made in lineage.steps(entry.recipe)[:12]:
            _step(f"→ {made.what}", made.how or "–")
        formats = dict.fromkeys(
            a.format or a.kind for a in entry.artifacts if a.kind not in ("config", "tokenizer", "recipe")
        )
        _step("→ this entry", ", ".join(formats) or "no files", entry.status)
    if entry.base_model != UNKNOWN:  # of which nothing says that it is one base
        _siblings(entry, opened)
    st.markdown("**Recipe**, as resolved; `zoo run recipe.yaml` makes the entry again")
    st.code(entry.recipe[:50_000], language="yaml")
    st.download_button(
        "recipe.yaml",
        entry.recipe,
        "recipe.yaml",
        "application/yaml",
        icon=":material/download:",
        on_click="ignore",
    )
    st.caption(f"sha256 of the recipe {code(entry.recipe_sha256)}, of the base {code(entry.base_sha256)}")
    if entry.stages:
        st.markdown("**Stages**")
        st.dataframe(
            [
                {"stage": s.name, "status": s.status, "seconds": round(s.seconds, 1), "reason": s.reason}
                for s in entry.stages
            ],
            hide_index=True,
            height="content",
            placeholder="",
        )
    made_with = ", ".join(f"{escape(n, 40)} {escape(v, 40)}" for n, v in list(entry.versions.items())[:40])
    st.caption(f"Made with {made_with}.")


def _siblings(entry: Entry, opened: Registry) -> None:
    near = opened.search(Query(bases=(entry.base_model,), limit=SIBLINGS + 1))
    others = [summary.id for summary in near.entries if summary.id != entry.id][:SIBLINGS]
    if others:
        count = counted(near, but=entry.status != "failed")  # a failed one is not found itself
        st.markdown(f"**Of the same base** ({count} {'other' if count == '1' else 'others'})")
        with st.container(horizontal=True):
            for other in others:
                entry_link(other)


def _step(what: str, how: str, more: str = "") -> None:
    lines = [f":small[{escape(what, 60)}]", f"**{escape(how, 90)}**"]
    if more:
        lines.append(f":small[{escape(more, 60)}]")
    with st.container(border=True, width=210):
        st.markdown("  \n".join(lines))


def _card(entry: Entry, _: Registry) -> None:
    from cards import render

    rendered = render(entry)
    st.download_button(
        "README.md", rendered, "README.md", "text/markdown", icon=":material/download:", on_click="ignore"
    )
    st.markdown(card(render(entry, details=False)))


with kept_view("entry.py", {"tab"}, {"id"}):
    page()
