"""Figures of an entry's GGUF files: shown as theirs, and never taken for the entry's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cards import render
from cards.render import limitations, metadata
from pipelines import keys
from pipelines.evaluate import lm_eval_tasks
from pipelines.recipe import load
from pipelines.worker import Task, parts
from tests.example import ARC, PERPLEXITY, entry, measured
from tests.process import Zoo, program
from tests.test_run import Place, stages
from tests.tiny import tiny_llama
from zoo.best import best
from zoo.compare import compare, gguf_files, own, pairs
from zoo.entry import Entry
from zoo.errors import RecipeError
from zoo.hub.eval_results import eval_results
from zoo.jobs import summary
from zoo.jobs.joblist import Needs, StageNeeds
from zoo.registry import Query, open_registry
from zoo.registry.figures import figures

FILE = "gguf/model-Q4_0.gguf"
WHOLE = {**ARC, "limit": None}
HELLASWAG = {**ARC, "task": "hellaswag"}
# Measured exactly as the entry was, and far better.
OF_FILE = [
    measured("entry", "perplexity", 2.5, 0.1, **PERPLEXITY, artifact=FILE),
    measured("entry", "accuracy", 0.9, 0.01, **ARC, artifact=FILE),
    measured("entry", "accuracy_norm", 0.7, 0.01, **HELLASWAG, artifact=FILE),
    measured("entry", "accuracy_norm", 0.8, 0.01, **WHOLE, artifact=FILE),
    measured("entry", "perplexity", 9.0, None, **{**ARC, "sample_unit": "documents"}, artifact=FILE),
]
WITHOUT = entry(measurements=[*entry().measurements, measured("entry", "accuracy_norm", 0.3, 0.01, **WHOLE)])
WITH = WITHOUT.model_copy(update={"measurements": [*OF_FILE, *WITHOUT.measurements]})


def of_registry(one: Entry, folder: Path) -> Any:
    """What searches, lists and choices make of an entry."""
    opened = open_registry(str(folder / f"{len(one.measurements)}.db"))
    opened.put(one)
    assert opened.get(one.id) == one
    (listed,) = opened.search(Query(limit=None)).entries
    assert listed.measurements == one.measurements
    chosen = best("x", [listed], "accuracy", [])
    line = Zoo(folder)("list", "--registry", opened.url).stdout
    return listed.figures, chosen, line


def of_app(one: Entry, folder: Path) -> Any:
    pytest.importorskip("streamlit", reason="the extra [app] is not installed")
    from app import pareto
    from app.parts import perplexity_of

    opened = open_registry(str(folder / f"{len(one.measurements)}.db"))
    opened.put(one.model_copy(update={"sparsity": 0.0}))  # so that GGUF files are drawn
    (listed,) = opened.search(Query(limit=None)).entries
    metrics = pareto.metrics([listed])
    points = [pareto.points([listed], metric, cost, None) for metric in metrics.values()
              for cost in pareto.COSTS]  # fmt: skip
    return perplexity_of(listed), metrics, points


@pytest.mark.parametrize(
    "of",
    [
        lambda one, _: figures(one),
        lambda one, _: pairs(one.measurements),
        lambda one, _: summary.figures(one),
        lambda one, _: eval_results((m.model_copy(update={"limit": None}) for m in one.measurements), "2026"),
        lambda one, _: metadata(one).to_yaml(),
        lambda one, _: limitations(one),
        of_registry,
        of_app,
    ],
    ids=["index", "pairs", "jobs", "eval results", "front matter", "limitations", "registry", "app"],
)
def test_one_figure_of_an_entry_is_never_a_files(of: Callable[[Entry, Path], Any], tmp_path: Path) -> None:
    expected = of(WITHOUT, tmp_path)
    assert expected
    assert of(WITH, tmp_path) == expected
    # which files of another name, or none, would change
    renamed = [m.model_copy(update={"artifact": None}) for m in OF_FILE]
    assert of(WITHOUT.model_copy(update={"measurements": renamed}), tmp_path) != expected


def test_the_packed_files_figures_are_the_entrys_own() -> None:
    packed = [m.model_copy(update={"artifact": "packed.safetensors"}) for m in WITHOUT.measurements]
    assert own([*packed, *OF_FILE]) == packed
    assert {f.name for f in summary.figures(WITHOUT.model_copy(update={"measurements": packed}))} >= {
        f.name for f in summary.figures(WITHOUT) if f.kind == "accuracy"
    }, "so that deltas go on where an older entry does not name the file"


def test_an_older_measurement_names_no_file() -> None:
    older = entry().model_dump(mode="json")
    for m in older["measurements"]:
        del m["artifact"]
    assert Entry.model_validate(older) == entry()
    assert {m.artifact for m in entry().measurements} == {None}


# --- shown ---


def test_a_table_of_the_files() -> None:
    assert gguf_files(WITHOUT) == []
    large, small = gguf_files(WITH)
    assert (large.file.format, large.perplexity, large.accuracies, large.accuracy) == ("Q8_0", None, {}, None)
    assert (large.decode, small.decode) == (71.25, None)
    assert small.bits_per_weight == pytest.approx(8 * 91_726_048 / 134_515_008)
    assert small.perplexity is not None and small.perplexity.value == 2.5
    assert {task: m.value for task, m in small.accuracies.items()} == {"arc_easy": 0.9, "hellaswag": 0.7}
    assert small.accuracy == pytest.approx(0.8)


def test_the_card_has_the_table() -> None:
    assert "Of the GGUF files" not in render(WITHOUT)
    lines = render(WITH).splitlines()
    at = lines.index("Of the GGUF files, in llama.cpp:")
    assert [cell.strip() for cell in lines[at + 2].split("|")[1:-1]] == [
        "file", "size", "bits per weight", "perplexity ↓", "arc_easy ↑", "hellaswag ↑", "mean accuracy ↑",
        "decode token/s",
    ]  # fmt: skip
    assert len({line.count("|") for line in lines[at + 2 : at + 6]}) == 1
    assert lines[at + 4] == "| `gguf/model-Q8_0.gguf` | 144.8 MB | 8.612 | – | – | – | – | 71.25 |"
    assert lines[at + 5] == (
        f"| `{FILE}` | 91.7 MB | 5.455 | 2.5 ± 0.1 | 0.9 ± 0.01 | 0.7 ± 0.01 | 0.8 | – |"
    )
    one_task = [m for m in WITH.measurements if m.task != "hellaswag"]
    assert "mean accuracy" not in render(WITH.model_copy(update={"measurements": one_task}))


def test_comparisons_have_a_row_for_each_type() -> None:
    before, after = compare([WITHOUT]), compare([WITH, WITHOUT])
    names = [row.name for row in before]
    added = {row.name: row.values for row in after if row.name not in names}
    assert [row.name for row in after if row.name in names] == names
    assert added == {
        "wikitext2_test.tokens perplexity, context 512, 40 windows, gguf Q4_0": [2.5, None],
        "arc_easy accuracy, 200 questions, gguf Q4_0": [0.9, None],
        "hellaswag accuracy_norm, 200 questions, gguf Q4_0": [0.7, None],
    }


def test_the_command_shows_the_table(tmp_path: Path) -> None:
    url = tmp_path / "registry.db"
    open_registry(str(url)).put(WITH)
    lines = Zoo(tmp_path)("show", WITH.id, "--registry", url).stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("of GGUF files"))
    assert lines[at + 1].split() == ["gguf/model-Q8_0.gguf", "144.8", "MB", "8.612", "-", "-", "71.2"]
    assert lines[at + 2].split() == [FILE, "91.7", "MB", "5.455", "2.5", "±", "0.1", "0.8000", "-"]
    printed = json.loads(Zoo(tmp_path)("show", WITH.id, "--registry", url, "--json").stdout)
    assert [m["artifact"] for m in printed["measurements"]][:6] == [FILE] * 5 + [None]


def test_the_page_of_an_entry_has_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("streamlit", reason="the extra [app] is not installed")
    from tests.test_app import said, shown

    monkeypatch.setenv("ZOO_REGISTRY", str(tmp_path / "registry.db"))
    hostile = [m.model_copy(update={"task": "<b>|x\u0000"}) for m in OF_FILE[1:2]]
    open_registry(str(tmp_path / "registry.db")).put(
        WITH.model_copy(update={"measurements": WITH.measurements + hostile})
    )
    page = shown("entry", id=WITH.id, tab="Accuracy")
    assert "Of the GGUF files" in said(page)
    (table,) = [t.value for t in page.dataframe if "perplexity ↓" in t.value.columns]
    assert list(table["file"]) == ["gguf/model-Q8_0.gguf", FILE]
    assert list(table["perplexity ↓"]) == ["–", "2.5 ± 0.1"]
    assert "<b>|x ↑" in table.columns


# --- asked for ---

RECIPE: dict[str, Any] = {
    "name": "a",
    "base": "./base",
    "steps": [],
    "evaluation": {"gguf": True},
    "exports": [{"kind": "gguf", "types": ["F16", "Q8_0"]}, {"kind": "gguf", "types": ["Q4_0", "Q8_0"]}],
}


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "a.yaml"
    path.write_text(yaml.safe_dump(RECIPE | changes))
    return path


def test_quantized_files_are_asked_once(tmp_path: Path) -> None:
    assert load(written(tmp_path)).asked_gguf == {"a-Q8_0.gguf": "Q8_0", "a-Q4_0.gguf": "Q4_0"}
    assert load(written(tmp_path, evaluation={})).asked_gguf == {}
    floats = [{"kind": "gguf", "types": ["F16", "BF16", "F32"]}]
    with pytest.raises(RecipeError, match=r"`evaluation\.gguf` needs an export of a quantized GGUF type"):
        load(written(tmp_path, exports=floats))


@pytest.mark.parametrize(
    ("gguf", "chain"),
    [
        (False, [("evaluate", 4), (None, 1)]),
        (True, [("evaluate", 4), ("export", 1), ("gguf", 4), (None, 1)]),
    ],
)
def test_files_are_asked_by_the_workers_of_evaluations(
    gguf: bool, chain: list[tuple[str | None, float]], tmp_path: Path
) -> None:
    needs = Needs(stages={"evaluate": StageNeeds(cpus=4)})
    path = written(tmp_path, evaluation={"gguf": gguf})
    task = Task(job="a", recipe=str(path), overrides=[], store="s", registry="r", lease_token=1,
                lease_holder="h", needs=needs)  # fmt: skip
    assert [(part.until, part.needs.cpus) for part in parts(task)] == chain


# --- measured ---

ASKED: dict[str, Any] = {
    "steps": [],
    "evaluation": {
        "perplexity": [{"windows": 2, "length": 32}, {"windows": 2, "length": 16}],
        "fidelity": None,
        "tasks": [],
        "gguf": True,
    },
    "exports": [{"kind": "safetensors"}, {"kind": "gguf", "types": ["F16", "Q8_0", "Q4_0"]}],
}


def test_a_run_asks_the_files_once(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    place = Place(tmp_path / "place")
    arguments = place.arguments("a", base, **ASKED)
    done = program(*arguments, folder=place.folder)
    assert done.returncode == 0, done.stderr
    assert "llama_context" not in done.stderr and "n_ctx" not in done.stderr
    entry = place.entry("a")
    found = {(m.subject, m.artifact): m for m in entry.measurements if m.context_length == 32}
    assert set(found) == {("base", None), ("entry", None), ("entry", "a-Q8_0.gguf"), ("entry", "a-Q4_0.gguf")}
    assert {m.artifact for m in entry.measurements if m.context_length == 16} == {None}  # the first text only
    own_ = found["entry", None]
    for kind, near in (("Q8_0", 0.02), ("Q4_0", 0.2)):
        m = found["entry", f"a-{kind}.gguf"]
        assert m.dtype == f"{kind}, llama.cpp"
        assert m.value == pytest.approx(own_.value, rel=near) and m.value != own_.value
        changed = {"artifact": None, "dtype": own_.dtype, "value": own_.value, "stderr": own_.stderr}
        assert m.model_copy(update=changed) == own_
    assert figures(entry).perplexity in {m.value for m in own(entry.measurements)}
    assert [one.file.format for one in gguf_files(entry)] == ["F16", "Q8_0", "Q4_0"]
    assert "Of the GGUF files" in (place.store / "entries" / "a" / "README.md").read_text()

    names = ["perplexity of a-Q8_0.gguf", "perplexity of a-Q4_0.gguf"]
    assert [stage.name for stage in entry.stages][-4:] == ["export", *names, "verify"]
    recipe = load(place.folder / "a.yaml")
    assert entry.base_sha256 is not None
    expected = keys.expected(recipe, entry.base_sha256, lambda _: None)
    assert expected == [(stage.name, stage.key) for stage in entry.stages if stage.name != "verify"]

    again = program(
        *place.arguments("a", base, **ASKED, publish=None, verification={"threads": 2}), folder=place.folder
    )
    assert again.returncode == 0, again.stderr
    became = stages(place.entry("a"))
    assert (became["export"], became["verify"]) == ("cached", "done")  # no file is another
    assert {became[name] for name in names} == {"cached"}
    assert place.entry("a").measurements == entry.measurements


@pytest.mark.real
def test_a_run_asks_packed_file_and_gguf_files_the_same_tasks(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    place = Place(tmp_path / "place")
    evaluation = {**ASKED["evaluation"], "tasks": [{"name": "zoo_choice", "limit": 4, "base": False}]}
    exports = [{"kind": "packed"}, {"kind": "gguf", "types": ["Q4_0"]}]
    arguments = place.arguments("a", base, **{**ASKED, "evaluation": evaluation, "exports": exports})
    done = program(*arguments, folder=place.folder)
    assert done.returncode == 0, done.stderr
    entry = place.entry("a")
    found = {(m.metric, m.artifact): m for m in entry.measurements if m.task == "zoo_choice"}
    files = ["packed.safetensors", "a-Q4_0.gguf"]
    assert set(found) == {(metric, file) for metric in ("accuracy", "accuracy_norm") for file in files}
    folder = place.store / "entries" / "a"
    for file in files:
        for m in lm_eval_tasks(folder / file, ["zoo_choice"], subject="entry", few_shot=0, limit=4):
            assert found[m.metric, file] == m.model_copy(update={"artifact": file})
    assert figures(entry).accuracy == found["accuracy", "packed.safetensors"].value
