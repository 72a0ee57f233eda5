"""`zoo run` as a whole: what it makes, and what becomes of it run again, killed, raced or interrupted."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.process import Running, Zoo, program, refused
from tests.tiny import tiny_llama, tiny_mistral, tiny_mpt
from zoo.entry import Entry
from zoo.files import file_table
from zoo.registry import open_registry

RECIPE: Mapping[str, Any] = {
    "calibration": {"windows": 8, "length": 32},
    "steps": [
        {
            "kind": "prune",
            "method": "admm",
            "pattern": {"keep": 8, "group": 16, "window": 8},
            "correction": 0.5,
        },
        {"kind": "quantize", "method": "gptq", "grid": {"bits": 4, "group": 32}},
    ],
    "evaluation": {
        "perplexity": [{"windows": 4, "length": 64}],
        "fidelity": {"windows": 2, "length": 64},
        "tasks": [],
    },
    "exports": [
        {"kind": "safetensors"},
        {"kind": "compressed-tensors"},
        {"kind": "packed"},
        {"kind": "gguf", "types": ["F16", "Q8_0"]},
    ],
    "verification": {"threads": 1},
}
STAGES = [
    "calibrate",
    "1. prune (admm)",
    "2. quantize (gptq)",
    "pack",
    "perplexity of the base",
    "perplexity of the entry",
    "fidelity to the base",
    "export",
    "verify",
]


class Place:
    """A folder with a store, a registry and recipes, and `zoo run` in it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.store = folder / "store"
        self.registry = folder / "registry.db"
        self.zoo = Zoo(folder)

    def arguments(self, name: str, base: Path, **changes: Any) -> list[str | Path]:
        recipe = self.folder / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump({"name": name, "base": str(base), **RECIPE, **changes}))
        return ["run", recipe, "--store", self.store, "--registry", self.registry]

    def entry(self, name: str) -> Entry:
        return open_registry(str(self.registry), create=False).get(name)

    @property
    def ids(self) -> list[str]:
        return [e.id for e in open_registry(str(self.registry), create=False).entries(include_failed=True)]

    @property
    def runs(self) -> list[Any]:
        return open_registry(str(self.registry), create=False).runs()

    def artifacts(self, name: str) -> dict[str, tuple[int, str]]:
        """Path -> (size, sha256) of all that the entry ships but its card and record, which bear the date."""
        table = dict(file_table(self.store / "entries" / name))
        return {path: table[path] for path in table if path not in ("README.md", "entry.json")}

    def has_nothing_half_done(self) -> None:
        assert list((self.store / "partial").iterdir()) == []
        hidden = list(self.folder.rglob(".*"))
        assert hidden == []
        assert list(self.folder.glob("registry.db-*")) == []


def stages(entry: Entry) -> dict[str, str]:
    return {stage.name: stage.status for stage in entry.stages}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama(tmp_path_factory.mktemp("models") / "llama")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nThe card of the base.\n")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Place:
    """The entry tiny-llama, made by the program itself, never disturbed."""
    place = Place(tmp_path_factory.mktemp("made"))
    done = program(*place.arguments("tiny-llama", llama), folder=place.folder)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    (place.folder / "told").write_text(done.stderr)
    (place.folder / "printed").write_text(done.stdout)
    return place


# --- what a run makes ---


def check_entry(place: Place, name: str, family: str) -> Entry:
    """Everything an entry promises, held against the files themselves and other people's readers."""
    entry = place.entry(name)
    folder = place.store / "entries" / name
    assert (entry.status, entry.failure, entry.family) == ("verified", None, family)
    assert Entry.model_validate_json((folder / "entry.json").read_bytes()) == entry
    recorded = {a.path: (a.size, a.sha256) for a in entry.artifacts}
    assert recorded == place.artifacts(name)
    assert {a.format for a in entry.artifacts if a.kind == "gguf"} == {"F16", "Q8_0"}
    passed = {v.artifact for v in entry.verifications if v.passed}
    ggufs = {f"{name}-F16.gguf", f"{name}-Q8_0.gguf"}
    assert passed == {"model.safetensors", "compressed-tensors", "packed.safetensors", *ggufs}
    assert {b.artifact for b in entry.benchmarks} == {"packed.safetensors", *ggufs}
    assert [(a.path, a.format) for a in entry.artifacts if a.kind == "packed"] == [
        ("packed.safetensors", "int5 8:16 window 8")
    ]
    assert {(m.subject, m.metric) for m in entry.measurements} >= {
        ("base", "perplexity"),
        ("entry", "perplexity"),
        ("entry", "kl_divergence"),
    }

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder)("A sparse model keeps").input_ids
    theirs = model(torch.tensor([ids])).logits[0]
    assert theirs.isfinite().all()
    zeros = total = 0
    for layer in entry.layers:
        weight = model.get_submodule(layer.name).weight
        assert tuple(weight.shape) == (layer.rows, layer.columns)
        kept = (weight != 0).reshape(layer.rows, -1, 16).sum(-1)
        assert kept.max() <= 8, layer.name
        assert layer.sparsity == pytest.approx(float((weight == 0).float().mean()))
        assert (layer.pattern, layer.window, layer.bits, layer.group) == ("8:16", 8, 4, 32)
        zeros, total = zeros + int((weight == 0).sum()), total + weight.numel()
    assert entry.sparsity == pytest.approx(zeros / total)
    assert entry.parameters == sum(p.numel() for p in model.parameters())

    from llama_cpp import Llama

    runner = Llama(str(folder / f"{name}-F16.gguf"), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    assert runner.tokenize(b"A sparse model keeps", add_bos=True, special=True) == ids
    runner.eval(ids)
    ours = torch.from_numpy(runner.scores[: len(ids)].copy())
    divergence = (theirs.softmax(-1) * (theirs.log_softmax(-1) - ours.log_softmax(-1))).sum(-1).mean()
    assert divergence < 1e-3

    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers" and "sparse" in (card.data.tags or [])
    assert name in card.text
    return entry


def test_llama(made: Place) -> None:
    entry = check_entry(made, "tiny-llama", "llama")
    assert stages(entry) == dict.fromkeys(STAGES, "done")
    assert entry.license == "apache-2.0"
    assert not any("README" in a.path for a in entry.artifacts)
    for path in (made.store / "objects").rglob("README.md"):  # a link to it is not written through
        assert "The card of the base." in path.read_text()
    assert made.ids == ["tiny-llama"]
    (run,) = made.runs
    assert (run.status, run.entry_id, run.failure) == ("done", "tiny-llama", None)
    assert run.stages == entry.stages
    made.has_nothing_half_done()


def test_what_is_told_is_short(made: Place) -> None:
    told = (made.folder / "told").read_text().splitlines()
    assert len(told) <= 2 * len(STAGES) + 8, told
    assert max(map(len, told)) < 160
    printed = (made.folder / "printed").read_text()
    assert printed.startswith("id ") and "tiny-llama-Q8_0.gguf" in printed


@pytest.mark.parametrize("command", ["show", "list", "card", "analyze"])
def test_the_other_commands_know_the_entry(made: Place, command: str) -> None:
    ids = [] if command == "list" else ["tiny-llama"]
    plain = made.zoo(command, *ids, "--registry", made.registry)
    assert (plain.returncode, plain.stderr) == (0, "")
    if command == "card":
        card = (made.store / "entries" / "tiny-llama" / "README.md").read_text()
        assert plain.stdout == card
        return
    found = json.loads(made.zoo(command, *ids, "--registry", made.registry, "--json").stdout)
    entry = made.entry("tiny-llama")
    if command == "show":
        assert Entry.model_validate(found) == entry
    elif command == "list":
        assert [e["id"] for e in found] == ["tiny-llama"]
    elif command == "analyze":
        assert (found["id"], len(found["layers"])) == ("tiny-llama", len(entry.layers))
    assert "tiny-llama" in plain.stdout or command == "analyze"


def test_analyze_sees_in_the_files_what_the_entry_says(made: Place) -> None:
    folder = made.store / "entries" / "tiny-llama"
    entry = made.entry("tiny-llama")
    for path in (folder, folder / "tiny-llama-F16.gguf"):
        found = json.loads(made.zoo("analyze", path, "--json").stdout)
        assert found["sparsity"] == pytest.approx(entry.sparsity)
        assert found["weights"] == entry.parameters


def test_mistral(tmp_path: Path) -> None:
    place = Place(tmp_path / "place")
    done = place.zoo(*place.arguments("tiny-mistral", tiny_mistral(tmp_path / "mistral")), "--json")
    assert done.returncode == 0, done.stderr
    entry = check_entry(place, "tiny-mistral", "mistral")
    assert Entry.model_validate_json(done.stdout) == entry


def test_mpt_killed_in_its_task(tmp_path: Path) -> None:
    place = Place(tmp_path / "place")
    evaluation = {**RECIPE["evaluation"], "tasks": [{"name": "zoo_choice", "limit": 6}]}
    command = place.arguments("tiny-mpt", tiny_mpt(tmp_path / "mpt"), evaluation=evaluation)
    running = place.zoo.start(*command)
    running.until_told("zoo_choice of the base ...")
    running.kill()
    done = place.zoo(*command)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("done before") == 5  # calibrate, two steps, pack, perplexity of the base
    entry = check_entry(place, "tiny-mpt", "mpt")
    accuracies = {m.subject: m for m in entry.measurements if m.metric == "accuracy"}
    assert {subject: m.samples for subject, m in accuracies.items()} == {"base": 6, "entry": 6}
    place.has_nothing_half_done()


def test_gguf_in_and_gguf_out(made: Place, tmp_path: Path) -> None:
    """From a GGUF file, exporting nothing but one: the entry still knows its layers."""
    place = Place(tmp_path)
    base = made.store / "entries" / "tiny-llama" / "tiny-llama-F16.gguf"
    steps = [{"kind": "quantize", "method": "absmax", "grid": {"bits": 8, "per": "channel", "group": None}}]
    exports = [{"kind": "gguf", "types": ["Q8_0"]}]
    done = place.zoo(*place.arguments("tiny-again", base, steps=steps, exports=exports))
    assert done.returncode == 0, done.stderr
    entry, first = place.entry("tiny-again"), made.entry("tiny-llama")
    assert (entry.status, entry.base_sha256) == ("verified", file_table(base.parent)[base.name][1])
    assert {layer.name for layer in entry.layers} == {layer.name for layer in first.layers}
    assert sorted(place.artifacts("tiny-again")) == ["recipe.yaml", "tiny-again-Q8_0.gguf"]
    assert entry.parameters == first.parameters
    assert entry.sparsity >= first.sparsity > 0.5


# --- again ---


def test_the_second_run_does_nothing(made: Place, tmp_path: Path) -> None:
    place = copy(made, tmp_path)
    before = place.artifacts("tiny-llama")
    done = place.zoo(*place.again("tiny-llama"))
    assert done.returncode == 0, done.stderr
    entry = place.entry("tiny-llama")
    assert stages(entry) == dict.fromkeys(STAGES, "cached")
    assert sum(stage.seconds for stage in entry.stages) < 1
    assert place.artifacts("tiny-llama") == before
    assert place.ids == ["tiny-llama"]
    assert [run.status for run in place.runs] == ["done", "done"]
    first = made.entry("tiny-llama")
    same = {"stages", "created"}
    assert entry.model_dump(exclude=same) == first.model_dump(exclude=same)


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ("evaluation.fidelity.windows=3", {"fidelity to the base", "export", "verify"}),  # of another name
        ("exports.3.types=[F16]", {"export", "verify"}),
        ("steps.1.grid.group=64", set(STAGES[2:]) - {"perplexity of the base"}),
        ("calibration.seed=1", {*STAGES} - {"perplexity of the base"}),
    ],
)
def test_a_change_redoes_what_depends_on_it(
    made: Place, tmp_path: Path, change: str, again: set[str]
) -> None:
    place = copy(made, tmp_path)
    done = place.zoo(*place.again("tiny-llama"), "--set", change, "--set", "name=tiny-other")
    assert done.returncode == 0, done.stderr
    redone = {name for name, status in stages(place.entry("tiny-other")).items() if status == "done"}
    assert redone == again
    assert place.ids == ["tiny-other", "tiny-llama"]


def copy(made: Place, to: Path) -> Again:
    shutil.copytree(made.store, to / "store")
    for name in ("registry.db", "tiny-llama.yaml"):
        shutil.copyfile(made.folder / name, to / name)
    return Again(to)


class Again(Place):
    def again(self, name: str) -> list[str | Path]:
        recipe = self.folder / f"{name}.yaml"
        return ["run", recipe, "--store", self.store, "--registry", self.registry]


def test_another_evaluation_makes_no_file_again(made: Place, tmp_path: Path) -> None:
    place = copy(made, tmp_path)
    before = place.artifacts("tiny-llama")
    done = place.zoo(*place.again("tiny-llama"), "--set", "evaluation.fidelity.windows=3")
    assert done.returncode == 0, done.stderr
    entry = place.entry("tiny-llama")
    assert [name for name, status in stages(entry).items() if status == "done"] == ["fidelity to the base"]
    after = place.artifacts("tiny-llama")
    assert [path for path in after if after[path] != before[path]] == ["recipe.yaml"]
    assert {a.path: (a.size, a.sha256) for a in entry.artifacts} == after


def test_a_folder_of_the_user_is_left_as_it_is(tmp_path: Path) -> None:
    """With no steps its files are shipped: by copies, without what is no part of a model, or one twice."""
    base = tiny_llama(tmp_path / "mine", num_hidden_layers=1)
    (base / ".cache").mkdir()
    (base / "pytorch_model.bin").write_bytes(b"pickled")
    shutil.copyfile(base / "model.safetensors", base / "consolidated.safetensors")
    (base / "LICENSE").write_text("as you like")
    before = {path.name: (path.stat().st_ino, path.stat().st_mode) for path in base.iterdir()}
    place = Place(tmp_path / "place")
    done = place.zoo(
        *place.arguments("plain", base, steps=[], exports=[{"kind": "safetensors"}, {"kind": "packed"}])
    )
    assert done.returncode == 0, done.stderr
    assert {path.name: (path.stat().st_ino, path.stat().st_mode) for path in base.iterdir()} == before
    shipped = place.store / "entries" / "plain"
    assert {"model.safetensors", "config.json", "tokenizer.json", "LICENSE", "recipe.yaml"} <= {
        path.name for path in shipped.iterdir()
    }
    assert not {"pytorch_model.bin", "consolidated.safetensors"} & {path.name for path in shipped.iterdir()}
    assert not {path.stat().st_ino for path in shipped.iterdir()} & {inode for inode, _ in before.values()}
    # and an entry that is a base keeps its recipe and its record
    kept = file_table(shipped)
    again = place.arguments("other", "zoo:plain", steps=RECIPE["steps"][1:], exports=[{"kind": "packed"}])  # type: ignore[arg-type]
    done = place.zoo(*again)
    assert done.returncode == 0, done.stderr
    assert file_table(shipped) == kept
    compared = place.zoo("compare", "plain", "other", "--registry", place.registry)
    assert (compared.returncode, compared.stderr) == (0, "") and "perplexity" in compared.stdout
    assert place.zoo("fsck", *again[2:]).returncode == 0


def test_what_would_fail_after_hours_is_refused_at_once(tmp_path: Path) -> None:
    place = Place(tmp_path / "place")
    base = tiny_mpt(tmp_path / "mpt")
    long = {"perplexity": [{"windows": 1, "length": 4096}], "fidelity": None, "tasks": []}
    refused(place.zoo(*place.arguments("long", base, evaluation=long)), 1, "4096 tokens", "a context of")
    odd = tiny_mpt(tmp_path / "odd", attn_config={"alibi_bias_max": 4})
    refused(place.zoo(*place.arguments("odd", odd)), 1, "alibi_bias_max")
    tokenizer = base / "tokenizer.json"
    tokenizer.write_text(
        json.dumps(json.loads(tokenizer.read_text()) | {"pre_tokenizer": {"type": "Whitespace"}})
    )
    refused(place.zoo(*place.arguments("cut", base)), 1, "no name in GGUF")
    for path in base.glob("tokenizer*"):
        path.unlink()
    refused(place.zoo(*place.arguments("mute", base)), 1, "has no tokenizer")
    assert not list((place.store / "objects").glob("*/*")), "nothing was begun"


# --- killed, raced, interrupted ---


def reached(running: Running, place: Place, stage: str, pattern: str | None) -> bool:
    """Whether the run is in the middle of the stage, or past it."""
    told = running.told
    if f"{stage} ..." not in told:
        return f"{stage}: " in told
    return pattern is None or f"{stage}: " in told or any((place.store / "partial").glob(pattern))


def test_killed_at_many_points(made: Place, llama: Path, tmp_path: Path) -> None:
    """kill -9 in one stage after another; then the run ends as if nothing had been."""
    place = Place(tmp_path)
    command = place.arguments("tiny-llama", llama)
    moments = [  # a stage, and what it has half-written by then
        ("calibrate", None),
        ("1. prune (admm)", None),
        ("1. prune (admm)", "*/config.json"),
        ("2. quantize (gptq)", "*/config.json"),
        ("perplexity of the base", None),
        ("perplexity of the entry", None),
        ("fidelity to the base", None),
        ("export", "*/model.safetensors"),
        ("export", "*/*F16.gguf*"),
        ("verify", None),
        ("verify", None),
    ]
    hit = []
    for stage, pattern in moments:
        running = place.zoo.start(*command)
        running.until(partial(reached, running, place, stage, pattern), stage)
        if pattern is None:
            time.sleep(0.1 * len(hit) / len(moments))
        running.kill()
        ended = [name for name in STAGES if f"{name}: " in running.told]
        assert STAGES[: len(ended)] == ended
        hit.append(STAGES[len(ended)])
        assert place.ids == []
        assert not (place.store / "entries").exists()
    assert len(set(hit)) >= 5, hit  # a busy machine may be too late for some
    finished = ended
    (place.store / "entries").mkdir()
    for word in ("new", "old"):  # as if killed while the entry was put in its place
        (place.store / "entries" / f".tiny-llama.{word}").mkdir()
    done = place.zoo(*command)
    assert done.returncode == 0, done.stderr
    entry = place.entry("tiny-llama")
    assert stages(entry) == {name: "cached" if name in finished else "done" for name in STAGES}
    assert place.artifacts("tiny-llama") == made.artifacts("tiny-llama")
    assert entry.measurements == made.entry("tiny-llama").measurements
    assert entry.layers == made.entry("tiny-llama").layers
    assert place.ids == ["tiny-llama"]
    assert [run.status for run in place.runs] == ["done"] + ["interrupted"] * len(moments)
    done_once = [s.name for run in place.runs for s in run.stages if s.status == "done"]
    # a kill between a stage's last rename and its record in the registry leaves it done but not recorded
    assert len(done_once) == len(set(done_once)) and set(done_once) <= set(STAGES)
    assert len(done_once) >= len(STAGES) - len(moments)
    place.has_nothing_half_done()


def test_two_runs_at_once(made: Place, llama: Path, tmp_path: Path) -> None:
    place = Place(tmp_path)
    command = place.arguments("tiny-llama", llama)
    ends = [running.end() for running in [place.zoo.start(*command) for _ in range(2)]]
    assert [end.returncode for end in ends] == [0, 0], [end.stderr for end in ends]
    assert place.ids == ["tiny-llama"]
    assert place.artifacts("tiny-llama") == made.artifacts("tiny-llama")
    on_disk = Entry.model_validate_json((place.store / "entries/tiny-llama/entry.json").read_bytes())
    assert on_disk == place.entry("tiny-llama")
    assert [run.status for run in place.runs] == ["done", "done"]
    done_once = [s.name for run in place.runs for s in run.stages if s.status == "done"]
    assert sorted(done_once) == sorted(STAGES)
    place.has_nothing_half_done()


STOPS = {"Ctrl-C": (Running.interrupt, 130), "SIGTERM": (Running.terminate, 143)}


@pytest.mark.parametrize("by", STOPS)
@pytest.mark.parametrize("words", ["2. quantize (gptq) ...", "verifying tiny-llama-F16.gguf"])
def test_stopped(llama: Path, tmp_path: Path, words: str, by: str) -> None:
    stop, code = STOPS[by]
    place = Place(tmp_path)
    command = place.arguments("tiny-llama", llama)
    running = place.zoo.start(*command)
    running.until_told(words)
    asked = time.monotonic()
    stop(running)
    told = refused(running.end(), code, f"interrupted by {by}", "the same command goes on")
    assert time.monotonic() - asked < 10 and told.count("\n") == 1
    (run,) = place.runs
    assert (run.status, run.entry_id, run.failure) == ("interrupted", None, f"interrupted by {by}")
    assert place.ids == []
    place.has_nothing_half_done()
    finished = [stage.name for stage in run.stages if stage.status == "done"]
    assert finished == STAGES[: len(finished)] and len(finished) >= 2
    if words.startswith("2."):
        again = place.zoo(*command)
        assert again.returncode == 0 and again.stderr.count("done before") == len(finished)


# --- failing well ---


def outliers(folder: Path) -> Path:
    """The same function with one channel of 32 scaled up in the weights and down in the norm before them.

    Eight bits with one scale per 32 columns, which is Q8_0, then keep little but that channel.
    """
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if "layernorm" in name:
            tensor[::32] /= 2048
        elif any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            tensor[:, ::32] *= 2048
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_entry_that_does_not_verify_is_not_offered(tmp_path: Path) -> None:
    place = Place(tmp_path / "place")
    steps = [{"kind": "prune", "method": "magnitude", "pattern": {"sparsity": 0.1}}]
    exports = [{"kind": "safetensors"}, {"kind": "gguf", "types": ["F16", "Q8_0"]}]
    base = outliers(tiny_llama(tmp_path / "base"))
    command = place.arguments("tiny-outliers", base, steps=steps, exports=exports)
    told = refused(
        place.zoo(*command),
        1,
        "tiny-outliers failed",
        "Q8_0.gguf: its logits are not the model's",
        "zoo show",
    )
    assert "F16" not in told
    entry = place.entry("tiny-outliers")
    assert entry.status == "failed" and entry.failure is not None and "top-1 agreement" in entry.failure
    assert {v.artifact: v.passed for v in entry.verifications} == {
        "model.safetensors": True,
        "tiny-outliers-F16.gguf": True,
        "tiny-outliers-Q8_0.gguf": False,
    }
    assert entry.stages[-1].status == "failed"
    assert [(run.status, run.entry_id, run.failure) for run in place.runs] == [
        ("failed", entry.id, entry.failure)
    ]
    listed = place.zoo("list", "--registry", place.registry, "--json")
    assert json.loads(listed.stdout) == []
    every = place.zoo("list", "--all", "--registry", place.registry, "--json")
    assert [e["status"] for e in json.loads(every.stdout)] == ["failed"]

    again = place.zoo(*command)  # a failed check is done again, all else is not
    refused(again, 1, "tiny-outliers failed")
    assert stages(place.entry("tiny-outliers")) == {
        stage.name: "failed" if stage.name == "verify" else "cached" for stage in entry.stages
    }
    place.has_nothing_half_done()


@pytest.mark.parametrize("exports", [[], [{"kind": "compressed-tensors"}]])
def test_few_exports(llama: Path, tmp_path: Path, exports: list[dict[str, str]]) -> None:
    place = Place(tmp_path)
    done = place.zoo(*place.arguments("tiny-few", llama, exports=exports))
    if exports:
        assert done.returncode == 0, done.stderr
        assert place.entry("tiny-few").status == "verified"
    else:
        refused(done, 1, "nothing was verified")
        assert place.entry("tiny-few").status == "failed"
    assert len(place.entry("tiny-few").layers) == 21


@pytest.mark.parametrize(
    ("calibration", "stage", "reason"),
    [
        ("self", "calibrate", "its logits are NaN or infinite"),
        ("builtin:prose", "1. prune (admm)", "not finite"),
    ],
)
def test_a_failing_stage_is_recorded_with_its_reason(
    llama: Path, tmp_path: Path, calibration: str, stage: str, reason: str
) -> None:
    """Weights so large that the activations overflow: finite in the file, infinite in the step."""
    place = Place(tmp_path / "place")
    base = shutil.copytree(llama, tmp_path / "base")
    weights = {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e30
    weights["model.layers.1.mlp.down_proj.weight"] *= 1e30
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    text = {"source": calibration, "windows": 8, "length": 32}
    refused(place.zoo(*place.arguments("tiny-huge", base, calibration=text)), 1, reason)
    (run,) = place.runs
    assert run.status == "failed" and run.failure and reason in run.failure
    failed = run.stages[-1]
    assert (failed.name, failed.status, failed.reason) == (stage, "failed", run.failure)
    assert place.ids == []
    place.has_nothing_half_done()
