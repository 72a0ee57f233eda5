"""The web app's pages, run by Streamlit's own test driver."""

from __future__ import annotations

import csv
import io
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from tests.example import RECIPE, entry
from tests.many import fill
from tests.postgres import database
from tests.tiny import tiny_llama
from zoo.entry import Stage, TrainingPoint
from zoo.importing import UNKNOWN
from zoo.progress import job_log_path, log_path, logged, say
from zoo.registry import Query, Registry, open_registry, query
from zoo.registry import registry as registry_
from zoo.registry.job_runs import Figure, finish, start
from zoo.registry.leases import Lease, release, take, this_process
from zoo.runner.pack import Settings, pack_folder

pytest.importorskip("streamlit", reason="the extra [app] is not installed")
import streamlit as st
from streamlit.testing.v1 import AppTest

from app import charts, lineage, pareto, parts, text
from cards import render

APP = Path(__file__).parents[1] / "app"
HOSTILE = (
    "<script>alert(1)</script> <img src=x onerror=alert(1)> [x](javascript:alert(1)) "
    "![y](http://h.invalid/i.png) # **bold** `code` $\\frac{1}{2}$ :red[red] | cell | --- "
    "~~struck~~ \u202eright to left\u0000"
)


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    url = str(tmp_path / "registry.db")
    monkeypatch.setenv("ZOO_REGISTRY", url)
    monkeypatch.setenv("ZOO_STORE", str(tmp_path / "store"))
    return url


def shown(page: str = "", /, **parameters: str | list[str]) -> AppTest:
    """A page after its first run, opened by a URL with these query parameters."""
    test = AppTest.from_file(str(APP / "main.py"), default_timeout=30)
    if page:
        test = test.run().switch_page(f"{page}.py")
    for name, value in parameters.items():
        test.query_params[name] = value
    test.run()
    assert not test.exception, test.exception
    return test


def said(test: AppTest) -> str:
    """All the words on a page."""
    kinds = (
        test.title,
        test.header,
        test.markdown,
        test.caption,
        test.info,
        test.error,
        test.warning,
        test.text,
    )
    return "\n".join(element.value for kind in kinds for element in kind)


def links(test: AppTest) -> list[str]:
    return [re.sub(r"[\\*]", "", link.label) for link in test.get("page_link")]


def filled(url: str) -> Registry:
    registry = open_registry(url)
    registry.put(entry("a-llama"))
    registry.put(entry("a-mistral", family="mistral", sparsity=0.0, license="mit"))
    registry.put(entry("an-mpt", family="mpt", bits_per_weight=3.0))
    registry.put(entry("a-failure", status="failed", failure="it broke"))
    return registry


# --- browse ---


def test_no_registry_is_told(url: str) -> None:
    assert "there is no registry" in text_of(shown().error[0].value)
    assert not Path(url).exists()


def test_a_newer_registry_is_told(url: str) -> None:
    from sqlalchemy import text as sql

    registry = open_registry(url)
    with registry.engine.begin() as connection:
        connection.execute(sql("UPDATE alembic_version SET version_num = '9999'"))
    assert "newer" in text_of(shown().error[0].value)


def test_a_server_s_connections_are_kept(fresh_postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not past what an opening checks."""
    from sqlalchemy import text as sql

    url = database(template=fresh_postgres)
    monkeypatch.setenv("ZOO_REGISTRY", url)
    open_registry(url).put(entry("a-llama"))
    opened = parts.registry()
    assert parts.registry() is opened
    assert links(shown()) == ["a-llama"]
    with opened.engine.begin() as connection:
        connection.execute(sql("UPDATE alembic_version SET version_num = '9999'"))
    assert "newer" in text_of(shown().error[0].value)
    st.cache_resource.clear()
    opened.engine.dispose()


@pytest.mark.parametrize("page", ["", "compare"])
def test_an_empty_registry_says_what_to_run(url: str, page: str) -> None:
    open_registry(url)
    assert "make demo" in shown(page).info[0].value


def test_failed_entries_are_shown_only_when_asked_for(url: str) -> None:
    filled(url)
    assert set(links(shown())) == {"a-llama", "a-mistral", "an-mpt"}
    assert links(shown(status="failed")) == ["a-failure"]


def test_a_url_restores_filters_and_sorting(url: str) -> None:
    filled(url)
    assert links(shown(family="mpt")) == ["an-mpt"]
    assert links(shown(q="mistral")) == ["a-mistral"]
    assert links(shown(licence="mit")) == ["a-mistral"]
    assert links(shown(bits=["0.0", "3.5"])) == ["an-mpt"]
    assert links(shown(sparsity=["20", "100"], sort="bits")) == ["an-mpt", "a-llama"]
    assert links(shown(sparsity=["20", "100"], sort="bits", worst="true")) == ["a-llama", "an-mpt"]


def test_choices_hold_together(url: str) -> None:
    filled(url)
    test = shown()
    test.multiselect(key="family").set_value(["mpt", "llama"]).run()
    assert set(links(test)) == {"an-mpt", "a-llama"}
    test.text_input(key="q").set_value("llama").run()
    assert links(test) == ["a-llama"]
    test.checkbox(key="pick a-llama").check().run()
    assert test.multiselect(key="pick").value == ["a-llama"]
    test.text_input(key="q").set_value("").run()
    test.checkbox(key="pick an-mpt").check().run()
    assert test.multiselect(key="pick").value == ["a-llama", "an-mpt"]  # what no page shows stays picked
    assert "Compare 2" in links(test)
    test.checkbox(key="pick a-llama").uncheck().run()
    assert test.multiselect(key="pick").value == ["an-mpt"]


def test_values_of_a_url_that_cannot_be_are_ignored(url: str) -> None:
    filled(url)
    test = shown(family="<b>", sort="DROP TABLE", page="-7", size="x", bits=["a", "b"], view="none")
    assert len(links(test)) == 3


def test_nothing_found_offers_to_clear_the_filters(url: str) -> None:
    filled(url)
    test = shown(q="no such entry", family="mpt")
    assert "Nothing matches" in said(test)
    test.button(key="clear-here").click().run()
    assert len(links(test)) == 3


def test_pages_of_many_entries(url: str) -> None:
    fill(url, 60)
    first, second = shown(sort="id"), shown(sort="id", page="2")
    assert len(links(first)) == len(links(second)) == 24
    assert max(links(first)) < min(links(second))
    second.multiselect(key="family").set_value(["mpt"]).run()
    assert second.session_state["page"] == 1  # a filter leads back to the first page


def test_more_entries_than_are_counted_are_not_said_to_be_all(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (query, registry_):
        monkeypatch.setattr(module, "MOST_COUNTED", 30)
    fill(url, 60)
    assert "25–48 of more than 30 entries: sort or filter to see others" in said(shown(page="2"))
    assert "Of the same base** (2 others)" in said(siblings(url, 3))
    assert "Of the same base** (more than 30 others)" in said(siblings(url, 32))


def test_browse_searches_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(url, 60)
    asked = []
    search = Registry.search
    monkeypatch.setattr(Registry, "search", lambda self, of: (asked.append(of), search(self, of))[1])
    test = shown(sort="id")
    assert len(asked) == 1
    first = links(test)
    test.session_state["page"] = 2
    test.run()
    assert len(asked) == 2 and not set(links(test)) & set(first)


def test_the_table_has_a_line_per_entry(url: str) -> None:
    filled(url)
    table = shown(view="Table").dataframe[0].value
    assert set(table["id"]) == {"a-llama", "a-mistral", "an-mpt"}
    assert set(table["context"]) == {512}  # no perplexity without it


# --- an entry ---


def text_of(markdown: str) -> str:
    """The words that Markdown shows."""
    tokens = MarkdownIt("commonmark", {"html": False}).enable("table").parse(markdown)
    return " ".join(t.content for token in tokens for t in token.children or [] if t.content)


@pytest.mark.parametrize(
    ("tab", "expected"),
    [
        ("Run it", ["zoo pull", "from_pretrained", "llama-cli"]),
        ("Compression", ["smaller"]),
        ("Accuracy", ["arc_easy", "context 512", "two standard errors"]),
        ("Speed", ["AMD EPYC 7B13", "one machine"]),
        ("Files", ["within tolerance", "passed", "98.4"]),
        ("Recipe", ["pruned", "base model", "sha256"]),
        ("Card", ["Limitations", "Reproduce"]),
    ],
)
def test_an_entry_s_tabs(url: str, tab: str, expected: list[str]) -> None:
    open_registry(url).put(entry("a-llama"))
    test = shown("entry", id="a-llama", tab=tab)
    words = text_of(said(test)) + "\n".join(code.value for code in test.code)
    for word in expected:
        assert word in words, words


def test_every_training_has_a_curve_of_its_own(url: str) -> None:
    """Each counts its tokens anew: drawn as one, the line would go back."""
    points = [
        TrainingPoint(step=n, tokens=tokens, seconds=60.0, loss=2.0, learning_rate=1e-4, terms={})
        for n, tokens in enumerate((1000, 2000, 500, 3000))
    ]
    open_registry(url).put(entry("a-llama", recipe="steps: [{kind: recover}]", training=points))
    words = said(shown("entry", id="a-llama", tab="Accuracy"))
    assert "the base model's own: 2,000 tokens" in words
    assert "step 1 of the recipe: 3,000 tokens" in words


def test_a_rounded_file_lends_an_entry_no_size(url: str) -> None:
    """Nor a point in the chart, as neither the size of Q4_0 goes with the quality of the weights."""
    open_registry(url).put(entry("a-llama", sparsity=0.0))
    words = said(shown()).replace("\u00a0", " ")
    assert "269.1 MB" in words and "91.7 MB" not in words
    assert "(1 task, -13.5 to base)" in words
    summaries = open_registry(url).search(Query(limit=None)).entries
    (metric,) = [m for name, m in pareto.metrics(summaries).items() if "arc_easy" in name]
    points = pareto.points(summaries, metric, "size", None)
    assert {(p.form, p.cost) for p in points if p.kind != "base"} == {
        ("float16", 269.060552),
        ("Q8_0", 144.811072),
    }


def test_files_are_listed_with_their_whole_sha256(url: str) -> None:
    one = entry("a-llama")
    open_registry(url).put(one)
    table = shown("entry", id="a-llama", tab="Files").dataframe[0].value
    assert list(table["sha256"]) == [artifact.sha256 for artifact in one.artifacts]


def siblings(url: str, count: int, **changes: Any) -> AppTest:
    """The lineage of the first of so many entries of one base, of which the others are newer."""
    registry = open_registry(url)
    created = "2025-11-21T13:00:00Z"  # before the others
    registry.put(
        entry("first", base_model="hub:a/base", base_repository="a/base", created=created, **changes)
    )
    registry.put_all(
        entry(f"other-{n}", base_model="hub:a/base", base_repository="a/base") for n in range(count - 1)
    )
    return shown("entry", id="first", tab="Recipe")


@pytest.mark.parametrize(("status", "failure"), [("verified", None), ("failed", "it broke")])
def test_others_of_the_same_base_are_counted(url: str, status: str, failure: str | None) -> None:
    """However many are newer, and whether or not the entry itself would be found."""
    assert "Of the same base** (1 other)" in said(siblings(url, 2, status=status, failure=failure))
    assert "Of the same base** (10 others)" in said(siblings(url, 11, status=status, failure=failure))


def test_an_unknown_base_is_nothing_in_common(url: str) -> None:
    registry = open_registry(url)
    for name in ("one", "two"):
        registry.put(entry(name, base_model=UNKNOWN, base_repository=None))
    assert "Of the same base" not in said(shown("entry", id="one", tab="Recipe"))


def test_an_unknown_entry_names_the_nearest(url: str) -> None:
    filled(url)
    assert "a-llama" in text_of(shown("entry", id="a-lama").error[0].value)
    assert "No entry chosen" in said(shown("entry"))


# --- compare ---


def test_the_best_is_marked_by_the_metric_s_direction(url: str) -> None:
    registry = open_registry(url)
    registry.put(entry("a-llama", bits_per_weight=4.25))
    registry.put(entry("b-llama", bits_per_weight=3.0))
    test = shown("compare", entry=["a-llama", "b-llama"])
    table = next(m.value for m in test.markdown if "bits per weight" in m.value)
    row = next(line for line in table.splitlines() if "bits per weight" in line)
    assert row.split("|")[2].strip() == "4.25"
    assert "★ 3" in row.split("|")[3]


def test_figures_measured_differently_do_not_stand_in_one_row(url: str) -> None:
    registry = open_registry(url)
    one = entry("a-llama")
    registry.put(one)
    longer = [m.model_copy(update={"context_length": 2048}) for m in one.measurements if m.context_length]
    registry.put(entry("b-llama", measurements=longer))
    table = next(
        m.value for m in shown("compare", entry=["a-llama", "b-llama"]).markdown if "perplexity" in m.value
    )
    rows = [line.split("|") for line in table.splitlines() if "perplexity" in line]
    assert [(row[2].strip(), row[3].strip()) for row in rows] == [("41.6", "–"), ("–", "41.6")]


def test_one_entry_is_not_compared(url: str) -> None:
    filled(url)
    assert "Choose two" in said(shown("compare", entry="a-llama"))


def test_an_id_that_is_not_there_is_told(url: str) -> None:
    filled(url)
    assert "no entry" in text_of(shown("compare", entry=["a-llama", "b-lama"]).error[0].value)


def test_the_pareto_chart_s_choices_come_from_the_url(url: str) -> None:
    fill(url, 300)
    test = shown("compare", show="Pareto", of="meta-llama/llama-2-7b", x="bits")
    assert test.session_state["of"] == "meta-llama/llama-2-7b"
    assert test.session_state["x"] == "bits"
    table = test.dataframe[0].value
    assert {"entry", "llama.cpp", "base"} == set(table["kind"])
    for parameters in ({"x": "size"}, {"x": "speed"}):
        assert len(shown("compare", show="Pareto", **parameters).dataframe[0].value)


# --- runs ---


def test_runs_and_their_log(url: str, tmp_path: Path) -> None:
    registry = open_registry(url)
    assert "No runs yet" in said(shown("runs"))
    run_id = registry.start_run("a-recipe", "ab" * 32, os.getpid(), socket.gethostname())
    registry.record_stage(run_id, Stage(name="calibrate", key="k", status="done", seconds=3.0))
    with logged(log_path(tmp_path / "store", run_id, "ab" * 32)):
        say("1. prune (sparsegpt) ...")
    test = shown("runs")
    assert "running" in said(test)
    assert "calibrate" in said(test)
    assert "prune (sparsegpt) ..." in test.code[0].value
    registry.finish_run(run_id, "failed", failure="no space left")
    assert "no space left" in said(shown("runs", state="failed"))
    assert "No run has this status" in said(shown("runs", state="done"))


# --- jobs ---


def test_jobs_and_their_figures(url: str, tmp_path: Path) -> None:
    registry = open_registry(url)
    assert "No job has run yet" in said(shown("jobs"))
    registry.put(entry("one"))
    for value in (20.0, 18.0):
        lease = take(registry, "one", this_process())
        assert isinstance(lease, Lease)
        run_id = start(registry, lease, "one", ["never made"])
        better = Figure(name="perplexity [ab]", kind="perplexity", direction="lower_is_better", value=value)
        finish(registry, lease, run_id, "done", attempts=1, seconds=3.0, figures=[better])
        release(registry, lease)
    lease = take(registry, "two", this_process())
    assert isinstance(lease, Lease)
    run_id = start(registry, lease, "two", ["the recipe changed"])
    path = job_log_path(tmp_path / "store", "two", lease.token)
    path.parent.mkdir(parents=True)
    path.write_text("1. prune (admm) ...\n")
    test = shown("jobs")
    assert "2 jobs by their last run: 1 running, 1 done" in said(test)
    assert "| perplexity | **18** (20) :green[▲ +10.00%] |" in said(test)
    assert "the recipe changed" in said(test) and "is gone" not in said(test)
    assert "prune (admm) ..." in test.code[0].value
    assert links(test) == ["one"]
    finish(registry, lease, run_id, "failed", attempts=2, seconds=3.0, failure="no space left")
    failed = said(shown("jobs", last="failed"))
    assert "no space left" in failed and "2 attempts" in failed and "perplexity" not in failed
    assert "No job has this status" in said(shown("jobs", last="interrupted"))


def test_a_job_whose_scheduler_died_is_told(url: str) -> None:
    registry = open_registry(url)
    host, pid, kernel, _ = this_process().split(":")
    lease = take(registry, "one", f"{host}:{pid}:{kernel}:1")
    assert isinstance(lease, Lease)
    start(registry, lease, "one", [])
    assert "Its scheduler is gone" in shown("jobs").warning[0].value


# --- try it ---


def test_an_entry_that_is_not_here_says_how_to_get_it(url: str) -> None:
    filled(url)
    test = shown("try_it", model="a-llama")
    assert "not on this machine" in said(test)
    assert test.code[0].value == "zoo pull a-llama"


def test_a_conversation_with_a_model_that_is_here(url: str, tmp_path: Path) -> None:
    folder = tmp_path / "store" / "entries" / "a-llama"
    folder.mkdir(parents=True)
    pack_folder(tiny_llama(tmp_path / "model"), folder / "packed.safetensors", Settings())
    test = shown("try_it", model="a-llama", max="16")
    test.chat_input[0].set_value("Hello").run()
    assert not test.exception
    assert "tokens/s" in said(test)
    st.cache_resource.clear()  # the model is not to outlive the test


# --- untrusted text ---


def hostile(entry_id: str = "a-llama") -> Any:
    one = entry(entry_id)
    return entry(
        entry_id,
        base_model=HOSTILE,
        base_repository=HOSTILE * 20,
        base_revision=HOSTILE,
        license=HOSTILE,
        recipe=f"name: {HOSTILE!r}\n" + "steps: " + "[" * 2000,
        created=HOSTILE,
        versions={HOSTILE: HOSTILE},
        layers=[
            layer.model_copy(update={"name": f"</details> {HOSTILE}", "method": HOSTILE, "pattern": HOSTILE})
            for layer in one.layers
        ],
        artifacts=[
            artifact.model_copy(update={"path": HOSTILE + str(n), "format": HOSTILE})
            for n, artifact in enumerate(one.artifacts)
        ],
        measurements=[m.model_copy(update={"task": HOSTILE, "harness": HOSTILE}) for m in one.measurements],
        benchmarks=[
            b.model_copy(
                update={
                    "runner": HOSTILE,
                    "artifact": HOSTILE,
                    "machine": b.machine.model_copy(update={"cpu": HOSTILE, "fingerprint": "0" * 64}),
                }
            )
            for b in one.benchmarks
        ],
        verifications=[
            v.model_copy(update={"reason": HOSTILE, "sample": HOSTILE}) for v in one.verifications
        ],
        stages=[stage.model_copy(update={"name": HOSTILE, "reason": HOSTILE}) for stage in one.stages],
    )


def fail_a_job(registry: Registry, words: str) -> None:
    """A job of this name, that failed for this reason, after a run that was done."""
    figure = Figure(name=words, kind="size", direction="lower_is_better", value=1.0)
    lease = take(registry, words, words)
    assert isinstance(lease, Lease)
    for status in ("done", "done", "failed"):
        run_id = start(registry, lease, words, [words])
        finish(registry, lease, run_id, status, attempts=1, seconds=1.0, failure=words, figures=[figure])


@pytest.mark.parametrize("escaped", [text.escape, text.code])
def test_escaped_text_is_nothing_but_text(escaped: Any) -> None:
    parser = MarkdownIt("gfm-like", {"html": True, "linkify": False})
    tokens = parser.parseInline(escaped(HOSTILE, 1000))[0].children or []
    assert {token.type for token in tokens} <= {"text", "code_inline", "text_special"}
    assert "<script>alert(1)</script>" in "".join(token.content for token in tokens)


def test_no_name_of_a_layer_or_text_of_a_model_ends_what_the_card_leaves_out() -> None:
    one = entry()
    names = ["</details>", "[click](http://h.invalid) ![](http://h.invalid/x.png)"]
    layers = [layer.model_copy(update={"name": name}) for layer, name in zip(one.layers, names, strict=False)]
    samples = ["<details>", "````\n</details>\n```\n[click](http://h.invalid)"]
    checks = [one.verifications[0].model_copy(update={"sample": sample}) for sample in samples]
    for changes in ({"layers": layers}, {"layers": [], "verifications": checks}):
        markdown = text.card(render(entry(**changes), details=False))
        for token in MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(markdown):
            for child in [token, *(token.children or [])]:
                assert child.type not in ("html_block", "html_inline", "image")
                assert child.attrs.get("href", "#reproduce") == "#reproduce"
    assert "Every layer" not in text.card(render(one, details=False))


def test_long_text_is_cut() -> None:
    assert len(text.plain("x" * 10**7)) == text.NAME_LIMIT


def test_pieces_may_be_escaped_one_by_one() -> None:
    whole = "a **b** [c](d)\n# e"
    assert "".join(map(text.escape_lines, whole)) == text.escape_lines(whole)


@pytest.mark.parametrize("page", ["", "entry", "compare", "runs", "jobs"])
def test_a_hostile_entry_breaks_no_page(url: str, page: str) -> None:
    registry = open_registry(url)
    registry.put(hostile())
    registry.put(entry("b-llama"))
    run_id = registry.start_run(HOSTILE, "ab" * 32, 1, HOSTILE)
    registry.record_stage(run_id, Stage(name=HOSTILE, key="k", status="failed", seconds=3.0, reason=HOSTILE))
    registry.finish_run(run_id, "failed", failure=HOSTILE)
    fail_a_job(registry, HOSTILE)
    tabs = {
        "entry": ("Run it", "Compression", "Accuracy", "Speed", "Files", "Recipe", "Card"),
        "compare": ("Pareto", "Recipes", "Side by side"),
    }
    for tab in tabs.get(page, ("",)):
        parameters: dict[str, Any] = (
            {"id": ["a-llama", "b-llama"] if page == "compare" else "a-llama"} if tab else {}
        )
        test = shown(page, **parameters, **({"tab": tab} if tab else {}))
        for element in [*test.markdown, *test.caption, *test.error, *test.header]:
            assert not element.proto.allow_html if hasattr(element.proto, "allow_html") else True
            for token in MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(element.value):
                for child in [token, *(token.children or [])]:
                    assert child.type not in ("html_block", "html_inline", "image"), element.value
                    assert not str(child.attrs.get("href", "#")).startswith(("javascript", "http://h.")), (
                        child
                    )


# --- pure parts ---


def test_steps_of_a_recipe() -> None:
    assert lineage.steps(RECIPE)[0].what == "pruned"
    step = "steps: [{kind: prune, pattern: {sparsity: %s}}]"
    assert lineage.steps(step % 0.5)[0].how == "50% unstructured"
    merged = "a: &a {kind: prune}\nsteps: [{<<: *a}]"
    for wrong in ("", "a", "[1]", "steps: 3", "steps: [1, x]", "a: [", "[" * 10_000, "d: 2024-13-45",
                  "steps:\n- kind: [1]\n", step % ("9" * 400), step % ".inf", merged):  # fmt: skip
        assert all(isinstance(made.what, str) for made in lineage.steps(wrong))


def test_the_frontier_is_what_nothing_beats(url: str) -> None:
    fill(url, 400)
    summaries = open_registry(url).entries(base_model="mosaicml/mpt-7b")
    metrics = pareto.metrics(summaries)
    for metric in metrics.values():
        for cost in pareto.COSTS:
            points = pareto.points(summaries, metric, cost, pareto.settings(summaries)[0])
            assert points
            for point in points:  # by the definition, over all pairs
                beaten = any(
                    _at_least(other, point, metric.direction, cost)
                    and not _at_least(point, other, metric.direction, cost)
                    for other in points
                )
                assert point.best != beaten or not beaten


def _at_least(one: pareto.Point, other: pareto.Point, direction: str, cost: str) -> bool:
    better = one.quality >= other.quality if direction == "higher_is_better" else one.quality <= other.quality
    return better and (one.cost >= other.cost if cost == "speed" else one.cost <= other.cost)


def test_speeds_of_different_settings_do_not_meet(url: str) -> None:
    fill(url, 200)
    summaries = open_registry(url).entries()
    metric = next(iter(pareto.metrics(summaries).values()))
    for at in pareto.settings(summaries)[:3]:
        points = pareto.points(summaries, metric, "speed", at)
        costs = {b.decode_tokens_per_s for s in summaries for b in s.benchmarks if pareto.setting(b) == at}
        assert points
        assert {point.cost for point in points} <= costs


def test_charts_become_pictures(url: str) -> None:
    pytest.importorskip("vl_convert", reason="the extra [app] is not installed")
    fill(url, 100)
    summaries = open_registry(url).entries()
    name, metric = next(iter(pareto.metrics(summaries).items()))
    points = pareto.points(summaries, metric, "size", None)
    bases = pareto.base_quality(summaries, metric)
    chart = charts.pareto(points, bases, "size", name, metric.direction, [summaries[0].id], "black")
    assert charts.picture(chart, "png").startswith(b"\x89PNG")
    assert b"<svg" in charts.picture(chart, "svg")


def test_a_csv_cell_is_no_formula() -> None:
    cells = next(csv.reader(io.StringIO(text.spreadsheet([["=1+1", "@x", -1.5, "a"]]))))
    assert cells == ["'=1+1", "'@x", "-1.5", "a"]


def test_the_app_imports_nothing_heavy(url: str) -> None:
    filled(url)
    program = (
        "import sys\nfrom streamlit.testing.v1 import AppTest\n"
        f"test = AppTest.from_file({str(APP / 'main.py')!r}, default_timeout=60).run()\n"
        "assert not test.exception\n"
        "for page in ('compare', 'runs', 'try_it', 'entry'):\n"
        "    test.switch_page(page + '.py').run()\n"
        "    assert not test.exception\n"
        "print([m for m in ('torch', 'transformers', 'pipelines', 'lm_eval') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
