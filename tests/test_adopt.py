"""A model that was trained elsewhere goes on here: `zoo adopt`, then `zoo run`; and entries as bases."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipelines.adopt import adopt
from pipelines.checkpoint import Checkpoint
from pipelines.recipe import load
from pipelines.recover.__main__ import main
from pipelines.recover.write import history
from tests.process import Zoo
from tests.test_recover_command import PRUNE, RECOVER, recipe
from tests.tiny import tiny_llama
from zoo.errors import UsageError
from zoo.files import Store
from zoo.registry import open_registry

MEASURED = {
    "evaluation": {"perplexity": [{"windows": 4, "length": 64}], "fidelity": {"windows": 2, "length": 64},
                   "tasks": [{"name": "zoo_choice", "limit": 4}]},
    "exports": [{"kind": "safetensors"}, {"kind": "packed"}],
    "verification": {"threads": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny_llama(tmp_path_factory.mktemp("base") / "base", num_hidden_layers=2)


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the other machine left: it has nothing of this one but the base and the recipe."""
    place = tmp_path_factory.mktemp("elsewhere")
    main(["--model", str(base), "--recipe", str(recipe(place)), "--out", str(place / "out")])
    return place / "out"


@pytest.mark.real
def test_an_adopted_model_is_the_entry_and_nothing_is_made_again(
    base: Path, trained: Path, tmp_path: Path
) -> None:
    path = recipe(tmp_path, base, **MEASURED)
    store, registry, zoo = tmp_path / "store", tmp_path / "registry.db", Zoo(tmp_path)
    done = zoo("adopt", path, trained, "--store", store)
    assert done.returncode == 0 and f"zoo run {path}" in done.stderr
    done = zoo("run", path, "--store", store, "--registry", registry)
    assert done.returncode == 0, done.stderr
    entry = open_registry(str(registry), create=False).get("tiny-recovered")
    assert (entry.stages[0].name, entry.stages[0].status) == ("2. recover", "cached")
    assert not any("prune" in stage.name or stage.name == "calibrate" for stage in entry.stages)
    mine, theirs = (
        load_file(folder / "model.safetensors")
        for folder in (store / "entries" / "tiny-recovered", trained / "model")
    )
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs) and mine.keys() == theirs.keys()
    asked = {m.dtype for m in entry.measurements if m.subject == "entry" and m.task == "zoo_choice"}
    assert len(asked) == 1 and asked.pop().startswith("packed"), "tasks are asked of what is shipped"
    assert {m.dtype for m in entry.measurements if m.subject == "base"} == {"float32"}

    # an entry is a base: by its id, with the weights that it ships, and with no steps it stays what it is
    again = tmp_path / "again.yaml"
    whole = {"name": "tiny-copy", "base": "zoo:tiny-recovered", "steps": [], **MEASURED}
    again.write_text(yaml.safe_dump(whole))
    done = zoo("run", again, "--store", store, "--registry", registry)
    assert done.returncode == 0, done.stderr
    copied = store / "entries" / "tiny-copy"
    same = load_file(copied / "model.safetensors")
    assert all(torch.equal(same[name], theirs[name]) for name in theirs)
    ids = torch.arange(3, 40)[None]
    models = [
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (copied, trained / "model")
    ]
    assert torch.equal(*(model(ids).logits for model in models))
    absent = zoo("run", again, "--set", "base=zoo:absent", "--store", store, "--registry", registry)
    assert absent.returncode == 1 and "no such entry" in absent.stderr and "Traceback" not in absent.stderr


@pytest.mark.parametrize(
    "change, words",
    [
        ({"steps": [PRUNE]}, "only what a recover step made"),
        ({"steps": [PRUNE, {**RECOVER, "budget": {"tokens": 128 * 40}}]}, "did not take the recipe's budget"),
        ({"steps": [PRUNE, {**RECOVER, "budget": {"tokens": 128 * 20}}]}, "did not take the recipe's budget"),
        (
            {"steps": [{**PRUNE, "pattern": {"keep": 12, "group": 16, "window": 8}}, RECOVER]},
            "recipe's zeros",
        ),
        ({"steps": [PRUNE, {**RECOVER, "quantize": {"grid": {"bits": 4, "group": 32}}}]}, "recipe's grid"),
        ({"steps": [PRUNE, {**RECOVER, "quantize": {"grid": {"bits": 5, "group": 64}}}]}, "recipe's grid"),
    ],
)
def test_what_the_recipe_would_not_make_is_refused(
    base: Path, trained: Path, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    store = Store(tmp_path / "store")
    with pytest.raises(UsageError, match=words):
        adopt(load(recipe(tmp_path, base, **change)), trained, store)
    assert not any(store.root.glob("objects/*/*"))


def test_changed_weights_and_other_models_are_refused(base: Path, trained: Path, tmp_path: Path) -> None:
    right = load(recipe(tmp_path, base))
    store = Store(tmp_path / "store")
    name = "model.layers.1.mlp.up_proj.weight"
    for value, words in ((0.0123, "recipe's grid"), (None, "recipe's zeros")):
        copied = tmp_path / words
        shutil.copytree(trained / "model", copied)
        tensors = load_file(copied / "model.safetensors")
        weight = tensors[name]
        if value is None:
            weight[0, :16] = weight[weight != 0][0]
        else:
            row, column = weight.nonzero()[0].tolist()
            weight[row, column] = value
        save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UsageError, match=f"up_proj.*{words}"):
            adopt(right, copied, store)
    (tmp_path / "third").mkdir()
    other = load(recipe(tmp_path, tiny_llama(tmp_path / "third" / "base", num_hidden_layers=3)))
    with pytest.raises(UsageError, match="same shapes"):
        adopt(other, trained, store)
    key = adopt(right, trained, store)
    assert adopt(right, trained, store) == key and store.get(key) is not None


def test_what_an_allocation_decided_is_adopted(base: Path, tmp_path: Path) -> None:
    owl = {**PRUNE, "pattern": {"sparsity": 0.5}, "allocation": {"kind": "owl", "threshold": 2.0}}
    path = recipe(tmp_path, base, steps=[owl, RECOVER])
    main(["--model", str(base), "--recipe", str(path), "--out", str(tmp_path / "out")])
    layers = Checkpoint(tmp_path / "out" / "model").compression()
    assert len({round(layer.sparsity, 2) for layer in layers if layer.pattern}) > 1
    adopt(load(path), tmp_path / "out", Store(tmp_path / "store"))


def test_a_budget_in_seconds_is_used_up_to_the_last(base: Path, tmp_path: Path) -> None:
    def timed(seconds: float) -> Path:
        return recipe(tmp_path, base, steps=[{**RECOVER, "budget": {"seconds": seconds}}])

    main(["--model", str(base), "--recipe", str(timed(0.5)), "--out", str(tmp_path / "out")])
    took = history(tmp_path / "out" / "model").training[-1].seconds
    store = Store(tmp_path / "store")
    with pytest.raises(UsageError, match="did not take the recipe's budget"):
        adopt(load(timed(took + 0.001)), tmp_path / "out", store)
    for seconds in (0.5, took):
        assert store.get(adopt(load(timed(seconds)), tmp_path / "out", store)) is not None


@pytest.mark.parametrize("zero_point", ["integer", "float16"])
def test_asymmetric_grids_are_checked_too(base: Path, tmp_path: Path, zero_point: str) -> None:
    def learned(bits: int) -> dict[str, object]:
        grid = {"bits": bits, "group": 32, "symmetric": False, "zero_point": zero_point}
        return {**RECOVER, "budget": {"tokens": 128 * 4}, "quantize": {"grid": grid, "start": 0.0}}

    right = recipe(tmp_path, base, steps=[learned(4)])
    main(["--model", str(base), "--recipe", str(right), "--out", str(tmp_path / "out")])
    store = Store(tmp_path / "store")
    assert store.get(adopt(load(right), tmp_path / "out", store)) is not None
    with pytest.raises(UsageError, match="recipe's grid"):
        adopt(load(recipe(tmp_path, base, steps=[learned(3)])), tmp_path / "out", store)
