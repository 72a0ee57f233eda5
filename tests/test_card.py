"""The model card, read back by huggingface_hub, a YAML parser and a CommonMark parser."""

from __future__ import annotations

import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from cards import render
from cards.render import figure, kinds_of_layers, limitations, metadata, recipe_steps, size, text, trainings
from tests.example import ARC, PERPLEXITY, entry, layers, measured
from zoo.entry import Artifact, Entry, Record, TrainingPoint, TrainingRun

GOLDEN = Path(__file__).parent / "golden" / "card.md"


def test_golden() -> None:
    assert render(entry()) == GOLDEN.read_text(encoding="utf-8"), (
        "if the new card is meant: python -m tests.test_card > tests/golden/card.md"
    )


def test_the_hub_client_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    one = entry()
    data = ModelCard(render(one)).data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data.to_dict()["base_model_relation"] == "quantized"
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "apache-2.0",
        "transformers",
        "text-generation",
    )
    assert {"sparse-zoo", "llama", "sparsegpt", "gptq", "4-bit", "gguf"} <= set(data.tags or [])
    values = {(r.dataset_type, r.metric_type): r.metric_value for r in data.eval_results or []}
    assert values == {
        ("wikitext2_test.tokens", "perplexity"): 41.6,
        ("wikitext2_test.tokens", "kl_divergence"): 0.4217,
        ("arc_easy", "accuracy"): 0.41,
    }
    by_name = {r.metric_name: r for r in data.eval_results or []}
    assert by_name == {r.metric_name: r for r in metadata(one).eval_results or []}


@pytest.mark.parametrize(
    ("license_", "told"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("llama2", {"license": "llama2"}),
        ("My Own, v2!", {"license": "other", "license_name": "my-own-v2"}),
        (None, {}),
    ],
)
def test_licence_in_the_words_of_the_hub(license_: str | None, told: dict[str, str]) -> None:
    data = metadata(entry(license=license_)).to_dict()
    assert {key: value for key, value in data.items() if key.startswith("license")} == told


def test_unknown_base_is_not_claimed() -> None:
    data = metadata(entry(base_repository=None)).to_dict()
    assert "base_model" not in data
    assert "base_model_relation" not in data


def test_an_entry_with_nothing_but_its_name() -> None:
    empty = {
        name: [] for name in ("layers", "artifacts", "measurements", "benchmarks", "verifications", "stages")
    }
    card = render(entry(**empty, license=None, base_repository=None, versions={}, sparsity=0.0))
    for told in ("Nothing was measured.", "Nothing was verified.", "Not measured.", "Not recorded"):
        assert told in card
    assert ModelCard(card).data.eval_results is None


# --- limitations follow from the data ---


def told(**changes: Any) -> str:
    return "\n".join(limitations(entry(**changes)))


def test_lost_accuracy_respects_direction_and_error() -> None:
    worse = told(
        measurements=[
            measured("base", "accuracy", 0.60, 0.01, **ARC),
            measured("entry", "accuracy", 0.55, 0.01, **ARC),
        ]
    )
    assert "Worse than the base by more than two standard errors: arc_easy" in worse
    noise = told(
        measurements=[
            measured("base", "accuracy", 0.60, 0.03, **ARC),
            measured("entry", "accuracy", 0.55, 0.03, **ARC),
        ]
    )
    assert "Worse than the base" not in noise
    better = told(
        measurements=[
            measured("base", "perplexity", 30.0, 0.1, **PERPLEXITY),
            measured("entry", "perplexity", 25.0, 0.1, **PERPLEXITY),
        ]
    )
    assert "Worse than the base" not in better


def test_another_protocol_is_not_compared() -> None:
    longer = {**PERPLEXITY, "context_length": 2048}
    card = render(
        entry(
            measurements=[
                measured("base", "perplexity", 20.0, 0.1, **longer),
                measured("entry", "perplexity", 25.0, 0.1, **PERPLEXITY),
            ]
        )
    )
    assert "| – | 25 ± 0.1 | – | – |" in card


def test_limitations() -> None:
    assert "rests on 200 questions only: ± 0.06821 at 95 %" in told()  # 1.96 * 0.0348
    assert "first questions only" in told()
    assert "first questions only" not in told(
        measurements=[measured("entry", "accuracy", 0.4, 0.01, **{**ARC, "limit": None})]
    )
    assert "Not verified against the reference: gguf/model-Q4_0.gguf" in told()
    assert "sliding window" not in told()
    assert "sliding window" in told(family="mistral")
    assert "de-quantized from a GGUF" in told()
    assert "de-quantized from a GGUF" in told(base_model="models/x.gguf")
    assert "de-quantized" not in told(base_model="hub:org/name")
    assert "its files store the zeros" in told()
    assert "store the zeros" not in told(sparsity=0.0)
    assert "speed was not measured" in told(benchmarks=[])
    failed = [v.model_copy(update={"passed": False}) for v in entry().verifications]
    assert "do not use: gguf/model-Q8_0.gguf" in told(verifications=failed)
    assert "This entry failed" in told(status="failed", failure="KL 3.2 over 0.01")


def test_only_a_verified_gguf_is_recommended() -> None:
    one = entry()
    assert 'Llama("gguf/model-Q8_0.gguf")' in render(one)
    failed = [v.model_copy(update={"passed": False}) for v in one.verifications]
    assert "llama_cpp" not in render(entry(verifications=failed))


GGUF = {"F16": 270, "Q8_0": 145, "Q4_K_M": 105, "Q4_0": 92, "Q2_K": 88}  # MB


def recommended(*types: str, perplexities: dict[str, float] | None = None) -> str:
    """The type of the GGUF file that the card of an entry with verified files of these types runs."""
    files = [
        Artifact(path=f"m-{t}.gguf", kind="gguf", format=t, size=GGUF[t] * 10**6, sha256="0" * 64)
        for t in types
    ]
    checks = [entry().verifications[0].model_copy(update={"artifact": file.path}) for file in files]
    figures = [
        measured("entry", "perplexity", value, 0.1, artifact=f"m-{t}.gguf", **PERPLEXITY)
        for t, value in (perplexities or {}).items()
    ]
    card = render(entry(artifacts=files, verifications=checks, measurements=figures))
    found = re.search(r"^llama-cli -m m-(.*)\.gguf ", card, re.MULTILINE)
    assert found is not None
    return found[1]


def test_the_best_gguf_is_recommended() -> None:
    assert recommended("Q2_K", "F16", "Q4_0", "Q8_0") == "Q8_0"
    assert recommended("Q2_K", "Q8_0", perplexities={"Q2_K": 25.0, "Q8_0": 25.1}) == "Q8_0"
    perplexities = {"Q2_K": 40.0, "Q4_0": 29.0, "Q4_K_M": 30.0}
    assert recommended(*perplexities, perplexities=perplexities) == "Q4_0"
    assert recommended("Q2_K", "Q4_K_M", "Q4_0") == "Q4_K_M", "the most bits, where none was measured"


def test_a_verified_packed_file_has_its_command() -> None:
    packed = entry().artifacts[0].model_copy(update={"path": "packed.safetensors", "kind": "packed"})
    checked = entry().verifications[0].model_copy(update={"artifact": "packed.safetensors", "runner": "zoo"})
    both = entry(artifacts=[packed], verifications=[checked])
    assert "zoo generate packed.safetensors " in render(both)
    assert "zoo generate" not in render(entry(artifacts=[packed], verifications=[]))


def test_kinds_of_layers_weigh_by_size() -> None:
    made = layers(2)
    made[0] = made[0].model_copy(update={"sparsity": 0.0, "pattern": None, "window": None})
    kinds = {kind.name: kind for kind in kinds_of_layers(made)}
    assert kinds["self_attn.q_proj"].sparsity == 0.25
    assert kinds["self_attn.q_proj"].pattern == "–, 8:16, window 8"
    assert kinds["mlp.down_proj"].layers == 2
    assert kinds["model.embed_tokens"].weights == 49152 * 576


# --- what was done to it ---

RECOVERED = """\
steps:
- {kind: prune, method: admm, pattern: {keep: 8, group: 16}}
- {kind: recover, budget: {tokens: 160000000}}
- {kind: recover, budget: {tokens: 35000000}}
"""


def curve(tokens: int, seconds: float, loss: float, points: int = 4) -> list[TrainingPoint]:
    """A training whose loss falls to `loss`."""
    return [
        TrainingPoint(
            step=10 * n, tokens=tokens * n // points, seconds=seconds * n / points,
            loss=loss + points - n, learning_rate=1e-4, terms={"logits": loss},
        )
        for n in range(1, points + 1)
    ]  # fmt: skip


def test_trainings_are_told_one_after_the_other() -> None:
    of_base, first, second = (
        curve(60_000_000, 233, 3),
        curve(160_000_000, 664, 2),
        curve(35_000_000, 153, 1),
    )
    runs = [
        TrainingRun(
            device=f"GPU {n}", processes=n, versions={"torch": f"{n}.0"}, tokens=tokens, seconds=1, ended="x"
        )
        for n, tokens in ((1, 160_000_000), (2, 35_000_000))
    ]
    one = entry(recipe=RECOVERED, training=of_base + first + second, training_runs=runs)
    assert [(t.step, t.curve) for t in trainings(one)] == [(None, of_base), ("2", first), ("3", second)]
    assert [t.run for t in trainings(one)] == [None, *runs], "the base's was before any was recorded"
    assert re.findall("Trained on (.*) with torch (.*);", render(one)) == [
        ("GPU 1", "1.0"),
        ("2 × GPU 2", "2.0"),
    ]
    card = render(one)
    assert "8 bits and trained on 195 M tokens" in card
    assert "Trained on 195,000,000 tokens in 817 s, in 2 trainings" in card
    told = re.findall(r"^(.*): loss over ([0-9,]+) tokens in (\S+) s: (\S+)$", card, re.MULTILINE)
    assert told == [
        ("The base model's own training", "60,000,000", "233", "█▆▃▁"),
        ("Step 2 of the recipe", "160,000,000", "664", "█▆▃▁"),
        ("Step 3 of the recipe", "35,000,000", "153", "█▆▃▁"),
    ]
    assert card.count("| step | tokens |") == 3


def test_one_training_is_told_once() -> None:
    one = entry(recipe="steps: [{kind: recover}]", training=curve(30_000_000, 119.2, 2))
    card = render(one)
    assert "trained on 30 M tokens" in card
    assert "Step 1 of the recipe: loss over 30,000,000 tokens in 119.2 s" in card
    assert "trainings" not in card and "## Training" not in render(entry())


def test_what_the_base_was_trained_on_is_not_said_of_the_entry() -> None:
    card = render(entry(training=curve(60_000_000, 233, 3)))  # its recipe only prunes
    assert "trained on" not in card
    assert "The base model's own training: loss over 60,000,000 tokens" in card


UNPRUNED = [layer.model_copy(update={"pattern": None, "window": None}) for layer in layers(2)]


def test_only_what_was_pruned_is_called_pruned() -> None:
    recipe = "steps: [{kind: recover, prune: null}]"
    qat = entry("smollm2-w4-qat", recipe=recipe, layers=UNPRUNED, sparsity=0.123)
    card = render(qat)
    assert "pruned" not in card.split("## Compression")[0]
    assert "12.3 % of weights are zero after rounding." in card
    assert not [tag for tag in metadata(qat).tags or [] if re.match("sparse$|sparsity", tag)]
    assert "store the zeros" not in "\n".join(limitations(qat))


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": ""},  # a pattern in the layers
        {"layers": UNPRUNED},  # a step of the recipe
        {"layers": UNPRUNED, "recipe": "steps: [{kind: recover, prune: {method: wanda}}]"},
    ],
)
def test_pruned_by_pattern_or_recipe(changes: dict[str, Any]) -> None:
    one = entry(**changes)
    assert "pruned to 50.0 % zeros" in render(one)
    assert {"sparse", "sparsity-50"} <= set(metadata(one).tags or [])


def test_a_trace_of_zeros_is_not_told() -> None:
    dense = entry(recipe="steps: []", layers=[], sparsity=0.0003, base_repository="org/name")
    assert "\norg/name, unchanged, for plain CPUs.\n" in render(dense)
    rounded = entry(recipe="steps: []", layers=UNPRUNED, sparsity=0.0003)
    assert "zero after rounding" not in render(rounded)


# --- text of an entry is text ---

HOSTILE = (
    "a|b | c\n# heading\n\n<script>alert(1)</script> <img src=x onerror=y> [x](javascript:1) "
    "![i](http://e/p.png) `c` ``` ~~~ **bold** __under__ \\| \\\n---\n| x | y |\n\x1b[31m\u202e "
    "{{ 7*7 }} {% raw %} <!-- \"' $(touch x)"
)
ALLOWED = {
    "h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "code", "pre", "details", "summary",
    "ul", "li", "strong", "a", "blockquote", "em",
}  # fmt: skip


def hostile(record: Record) -> Any:
    """The record with every free text replaced, past validation."""
    changes: dict[str, Any] = {}
    for name, field in type(record).model_fields.items():
        value = getattr(record, name)
        if field.annotation in (str, str | None):
            changes[name] = f"{HOSTILE} {value}"  # as different from each other as they were
        elif isinstance(value, Record):
            changes[name] = hostile(value)
        elif isinstance(value, list):
            changes[name] = [hostile(v) if isinstance(v, Record) else HOSTILE for v in value]
        elif isinstance(value, dict):
            changes[name] = {HOSTILE: HOSTILE}
    return record.model_copy(update=changes)


class Seen(HTMLParser):
    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str | None] = []
        self.cells: list[int] = []
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "a":
            self.links.append(dict(attrs).get("href"))
        if tag == "tr":
            self.cells.append(0)
        if tag in ("td", "th"):
            self.cells[-1] += 1

    def handle_comment(self, data: str) -> None:
        self.tags.append("comment")


def seen(card: str) -> Seen:
    body = card.split("\n---\n", 1)[1]
    return Seen(MarkdownIt("commonmark").enable("table").render(body))


def test_hostile_text_is_text() -> None:
    bad = hostile(entry())
    assert isinstance(bad, Entry)
    assert bad.layers[0].name.startswith(HOSTILE)
    card = render(bad)
    assert "\x1b" not in card
    assert "\u202e" not in card
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["tags"][0] == "sparse-zoo"
    assert len(ModelCard(card).data.eval_results or []) == 3
    good, evil = seen(render(entry())), seen(card)
    assert set(evil.tags) <= ALLOWED
    assert evil.links == ["#reproduce"]
    for tag in ("h1", "h2", "table", "tr", "ul", "details"):
        assert evil.tags.count(tag) == good.tags.count(tag), tag
    assert evil.cells == good.cells


def test_a_recipe_cannot_leave_its_fence() -> None:
    recipe = "name: x\n```\n# heading\n````\n<script>\n"
    after = seen(render(entry(recipe=recipe)))
    assert "script" not in after.tags
    assert after.tags.count("h1") == 1


@pytest.mark.parametrize(
    "recipe",
    [
        "d: 2024-13-45",
        "steps: [",
        "a0: &a0 {x: 1}\n"
        + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 8)),
    ],
)
def test_a_recipe_that_cannot_be_read_has_no_steps(recipe: str) -> None:
    began = time.process_time()
    assert recipe_steps(recipe) == []
    assert recipe in render(entry(recipe=recipe))
    assert time.process_time() - began < 5


def test_every_recipe_of_ours_is_read() -> None:
    recipes = sorted((Path(__file__).parents[1] / "pipelines" / "recipes").glob("*.yaml"))
    for recipe in recipes:
        text = recipe.read_text()
        assert recipe_steps(text) == yaml.safe_load(text)["steps"], recipe
    assert recipes


def test_shell_commands_are_quoted() -> None:
    artifacts = [a.model_copy(update={"path": "a b; rm -rf $HOME.gguf"}) for a in entry().artifacts]
    checks = [v.model_copy(update={"artifact": "a b; rm -rf $HOME.gguf"}) for v in entry().verifications]
    assert "llama-cli -m 'a b; rm -rf $HOME.gguf' -p" in render(
        entry(artifacts=artifacts, verifications=checks)
    )
    assert "pip install '.[pipelines]'\n" in render(entry(versions={"torch; rm": "1", "x": "1; rm"}))


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("self_attn.q_proj", "self_attn.q_proj"),
        ("_x_", r"\_x\_"),
        ("1.0", "1.0"),
        ("1. x", r"1\. x"),
        ("# x", r"\# x"),
        ("a|b", r"a\|b"),
        ("<b>", "&lt;b&gt;"),
        ("a\n\nb", "a b"),
    ],
)
def test_text(raw: str, shown: str) -> None:
    assert text(raw) == shown


def test_figures() -> None:
    assert [figure(x) for x in (None, 25.6123, 0.000912, 41_234.0, 0.0)] == [
        "–",
        "25.61",
        "0.000912",
        "41,234",
        "0",
    ]
    assert figure(15.99, signed=True) == "+15.99"
    assert [size(x) for x in (12, 1_500, 269_060_552, 13e9)] == ["12 B", "1.5 kB", "269.1 MB", "13.0 GB"]


if __name__ == "__main__":
    print(render(entry()), end="")
