"""`python -m pipelines.recover`, skill distillation, and recovery as a step of `zoo run`."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines.recipe import Skill, load
from pipelines.recover import skill as recover_skill
from pipelines.recover import train
from pipelines.recover.__main__ import main
from pipelines.recover.skill import skill_tokens
from pipelines.recover.state import Progress
from pipelines.text import PROSE
from tests.process import PATIENCE_S, QUIET, ROOT, Zoo
from tests.tiny import tiny_llama
from zoo.entry import Entry
from zoo.errors import RecipeError, SourceError
from zoo.files import Store
from zoo.machine import this_machine
from zoo.registry import open_registry

RECOVER: dict[str, Any] = {
    "kind": "recover",
    "data": [{"source": str(PROSE)}],
    "budget": {"tokens": 128 * 30},
    "optimizer": {"learning_rate": 2e-3},
    "quantize": {"grid": {"bits": 5, "group": 32}, "start": 0.5},
    "length": 32,
    "batch": 4,
    "micro_batch": 4,
}
PRUNE: dict[str, Any] = {
    "kind": "prune", "method": "wanda", "pattern": {"keep": 8, "group": 16, "window": 8},
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny_llama(tmp_path_factory.mktemp("base") / "base", num_hidden_layers=2)


def recipe(place: Path, base: Path | str = "given by --model", **changes: Any) -> Path:
    path = place / "recipe.yaml"
    whole = {
        "name": "tiny-recovered",
        "base": str(base),
        "calibration": {"windows": 4, "length": 32, "source": str(PROSE)},
        "steps": [PRUNE, RECOVER],
        **changes,
    }
    path.write_text(json.dumps(whole))  # which is YAML, and has no aliases
    return path


def run_here(place: Path, path: Path) -> Entry:
    """The verified entry that `zoo run` makes, in `place`."""
    registry = place / "registry.db"
    done = Zoo(place)("run", path, "--store", place / "store", "--registry", registry)
    assert done.returncode == 0, done.stderr
    entry = open_registry(str(registry), create=False).get("tiny-recovered")
    assert entry.status == "verified", entry.failure
    return entry


# --- the command ------------------------------------------------------------------------------------


def test_the_command_stops_in_time_and_goes_on(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["--model", str(base), "--recipe", str(recipe(tmp_path)), "--out", str(out)]
    main([*command, "--seconds", "0.05"])
    assert "--resume to go on" in capsys.readouterr().err
    unfinished = json.loads((out / "model" / "training.json").read_text())["training"]
    assert len(unfinished) < 3 and len(finished(out)) == 1, "it is pruned"
    for words, options in (
        ("holds this run already", []),
        ("another recipe", ["--resume", "--set", "steps.1.seed=1"]),
        ("no such file|cannot read", ["--recipe", "absent.yaml"]),
        ("not a model folder", ["--model", str(tmp_path)]),
    ):
        with pytest.raises(SystemExit, match=words):
            main([*command, *options])
    rounds = 0
    while len(finished(out)) < 2:
        main([*command, "--seconds", "0.4", "--resume"])
        rounds += 1
        assert rounds < 30
    whole = tmp_path / "whole"
    main([*command[:-1], str(whole), "--evaluate", str(PROSE)])
    measured = json.loads(capsys.readouterr().out)
    assert (measured["samples"], measured["context_length"], measured["dtype"]) == (40, 512, "float32")
    assert measured["value"] == pytest.approx(_perplexity(whole / "model"), rel=1e-4)
    assert not any((out / "store" / "training").iterdir())
    mine, theirs = (load_file(place / "model" / "model.safetensors") for place in (out, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs), "in pieces or not, the same model"
    assert (whole / "model" / "grid.safetensors").is_file()


def finished(store: Path) -> list[Path]:
    """The steps that are done."""
    return sorted((store / "store" / "objects").glob("*/*/model.safetensors"))


def test_runs_that_share_a_store_make_once_what_their_recipes_share(base: Path, tmp_path: Path) -> None:
    """One after the other, and one that waits for the other's step."""
    store = tmp_path / "store"
    command = ["--model", str(base), "--store", str(store)]
    short = {**RECOVER, "budget": {"tokens": 1280}}
    steps = [PRUNE, {**short, "quantize": None}, short]
    main([*command, "--out", str(tmp_path / "one"), "--recipe", str(recipe(tmp_path, steps=steps))])
    one = finished(tmp_path)
    assert len(one) == 3
    before = [path.stat().st_mtime_ns for path in one]
    eight = {**short, "quantize": {"grid": {"bits": 8, "group": 32}, "start": 0.5}}
    other = recipe(tmp_path, steps=[*steps[:2], eight])
    arguments = [sys.executable, "-m", "pipelines.recover", *command, "--recipe", str(other), "--out"]
    environment = os.environ | QUIET | {"OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [*arguments, str(tmp_path / name)], env=environment, cwd=ROOT, stderr=subprocess.PIPE
        )
        for name in ("two", "three")
    ]
    told = [process.communicate(timeout=PATIENCE_S)[1].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert len(finished(tmp_path)) == 4 and [path.stat().st_mtime_ns for path in one] == before
    two, three = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("two", "three"))
    assert two == three != (tmp_path / "one" / "model" / "model.safetensors").read_bytes()
    assert sum("recover: step" in text for text in told) == 1, "the other waited"


MISSING = """
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in "datasets lm_eval llama_cpp sqlalchemy alembic typer streamlit".split():
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
from pipelines.recover.__main__ import main
main(sys.argv[1:])
"""


def test_it_needs_nothing_but_what_trains(base: Path, tmp_path: Path) -> None:
    written = {"source": "builtin:seed", "tokens": 200, "prompt": 4, "length": 32, "batch": 4}
    steps = [PRUNE, {**RECOVER, "written": [written], "budget": {"tokens": 1280}}]
    arguments = ["--model", base, "--recipe", recipe(tmp_path, steps=steps), "--out", tmp_path / "out"]
    command = [sys.executable, "-c", MISSING, *map(str, arguments)]
    environment = os.environ | QUIET | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model" / "grid.safetensors").is_file()


def test_a_store_keeps_apart_what_differs(base: Path, tmp_path: Path) -> None:
    """Other windows of the same tokens, and the same weights with another configuration, are something else;
    the same content in another folder is the same."""
    command = ["--store", str(tmp_path / "store")]

    def run(name: str, model: Path, **calibration: int) -> dict[str, Any]:
        made = recipe(tmp_path, steps=[PRUNE], calibration={"source": str(PROSE), **calibration})
        main([*command, "--model", str(model), "--recipe", str(made), "--out", str(tmp_path / name)])
        return {path.name: path.read_bytes() for path in (tmp_path / name / "model").iterdir()}

    one = run("one", base, windows=4, length=32)
    copy, other = tmp_path / "copy", tmp_path / "other"
    for folder in (copy, other):
        shutil.copytree(base, folder)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert run("same", copy, windows=4, length=32) == one
    assert len(finished(tmp_path)) == 1
    assert run("windows", base, windows=8, length=16)["model.safetensors"] != one["model.safetensors"]
    assert json.loads(run("config", other, windows=4, length=32)["config.json"])["rms_norm_eps"] == 0.5
    assert len(finished(tmp_path)) == 3
    (tmp_path / "one" / "model" / "config.json").write_text("{}")  # it is the user's to change


def test_a_run_is_not_begun_anew_unnoticed(base: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(PROSE.read_text())
    made = recipe(tmp_path, steps=[{**RECOVER, "data": [{"source": str(text)}]}])
    command = ["--model", str(base), "--recipe", str(made), "--out", str(tmp_path / "out")]
    main([*command, "--seconds", "0"])
    text.write_text(PROSE.read_text() + "And more.")
    with pytest.raises(SystemExit, match="begun with another text"):
        main([*command, "--seconds", "0", "--resume"])
    text.write_text(PROSE.read_text())
    main([*command, "--resume", "--set", "steps.0.micro_batch=2"])
    assert len(finished(tmp_path / "out")) == 1


def test_waiting_for_another_run_ends_in_time(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(tmp_path, steps=[PRUNE])
    command = ["--model", str(base), "--recipe", str(made), "--store", str(tmp_path / "store"), "--out"]
    main([*command, str(tmp_path / "one")])
    (key,) = (path.parent.name for path in finished(tmp_path))
    with Store(tmp_path / "store").locked(key):
        main([*command, str(tmp_path / "two"), "--seconds", "0"])
    told = capsys.readouterr().err
    assert "another run does this step" in told and "--resume to go on" in told
    assert not (tmp_path / "two" / "model").exists()


def test_all_trainings_of_a_call_share_its_seconds(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []

    def trained(job: train.Job) -> Progress:
        assert job.stop_after is not None
        given.append(job.stop_after)
        time.sleep(0.3)
        return train.train(job)

    monkeypatch.setattr(train, "recover", trained)
    short = {**RECOVER, "budget": {"tokens": 1280}}
    made = recipe(tmp_path, steps=[short, {**short, "seed": 1}])
    main(["--model", str(base), "--recipe", str(made), "--out", str(tmp_path / "o"), "--seconds", "60"])
    assert len(given) == 2 and given[0] <= 60 and given[1] <= given[0] - 0.3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "RECIPE", "--model", "BASE"], "needs --model and --out"),
        (["--recipe", "RECIPE", "--model", "BASE", "--out", "OUT", "--named", "name"], None),
        (["--evaluate", "TEXT"], "--evaluate needs"),
    ],
    ids=["no out", "no folder of a name", "nothing to evaluate"],
)
def test_what_is_missing_is_told(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str | None
) -> None:
    names = {
        "RECIPE": str(recipe(tmp_path)),
        "BASE": str(base),
        "OUT": str(tmp_path / "o"),
        "TEXT": str(PROSE),
    }
    with pytest.raises(SystemExit, match=words):
        main([names.get(argument, argument) for argument in arguments])
    if words is None:
        assert "name is not NAME=DIR" in capsys.readouterr().err


def _perplexity(folder: Path) -> float:
    """design.md's protocol, with transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(PROSE.read_text())["input_ids"][: 40 * 512])
    with torch.no_grad():
        losses = [model(window[None], labels=window[None]).loss.item() for window in ids.view(40, 512)]
    return math.exp(sum(losses) / len(losses))


def test_token_ids_can_be_given(base: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(3, 300, 4000).astype(np.uint16))
    out = tmp_path / "out"
    main(["--model", str(base), "--out", str(out), "--data", str(tmp_path / "ids.npy"),
          "--recipe", str(recipe(tmp_path, steps=[{**RECOVER, "budget": {"tokens": 1280}}]))])  # fmt: skip
    assert len(Store(out / "store").keys()) == 1, "nothing was tokenized"
    assert (out / "model" / "model.safetensors").is_file()


# --- skill distillation -----------------------------------------------------------------------------


def test_a_teacher_answers_and_no_answer_is_asked_twice(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is a fox?\n\nCount to three.\nWho sells shells?\n")
    skill = Skill(prompts=str(prompts), samples=2, new_tokens=6, batch=2)
    path = skill_tokens(skill, base, "teacher", base, Store(tmp_path / "store"))
    ids = np.load(path).tolist()
    tokenizer = AutoTokenizer.from_pretrained(base)
    told = tokenizer.decode(ids)
    for prompt in ("What is a fox?", "Count to three.", "Who sells shells?"):
        assert told.count(f"<|start|>user\n{prompt}<|end|>") == 2
    assert told.count("<|start|>assistant\n") == 6
    (written,) = (tmp_path / "store" / "training").glob("*.jsonl")
    lines = written.read_bytes().splitlines(keepends=True)
    assert len(lines) == 6

    # killed while the third line was being written: the pair it belongs to is asked again, with its seed
    other = Store(tmp_path / "other")
    (other.root / "training").mkdir(parents=True)
    (other.root / "training" / written.name).write_bytes(b"".join(lines[:2]) + lines[2][:9])
    asked: list[str] = []
    local = recover_skill._local

    def counted(skill: Skill, teacher: Path) -> recover_skill.Answers:
        answer = local(skill, teacher)

        def answers(prompts: list[str], seed: int) -> list[str]:
            asked.extend(prompts)
            return answer(prompts, seed)

        return answers

    monkeypatch.setattr(recover_skill, "_local", counted)
    again = skill_tokens(skill, base, "teacher", base, other)
    assert len(asked) == 4
    assert np.load(again).tolist() == ids


@pytest.fixture
def endpoint() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server of OpenAI's chat completions, down when first asked for an owl, and what it was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({"path": self.path, "key": self.headers["Authorization"], **body})
            text = body["messages"][-1]["content"].upper()
            down = text == "OWL" and sum(one["messages"] == body["messages"] for one in asked) == 1
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            answer = {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"],
                      "choices": [choice],
                      "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}  # fmt: skip
            data = json.dumps(answer).encode()
            self.send_response(404 if body["model"] != "big" else 400 if down else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_endpoint_answers(
    base: Path, tmp_path: Path, endpoint: tuple[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, asked = endpoint
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("fox\ndog\n")
    skill = Skill(
        prompts=str(prompts), templates=["a {}"], endpoint=url, model="big", temperature=0.5, new_tokens=9
    )
    path = skill_tokens(skill, base, "", base, Store(tmp_path / "store"))
    told = AutoTokenizer.from_pretrained(base).decode(np.load(path).tolist())
    assert "A FOX" in told and "A DOG" in told
    assert [one["path"] for one in asked] == ["/v1/chat/completions"] * 2
    assert [one["seed"] for one in asked] == [0, 1]
    assert {(one["key"], one["model"], one["temperature"], one["max_tokens"]) for one in asked} == {
        ("Bearer secret", "big", 0.5, 9)
    }
    wrong = skill.model_copy(update={"model": "none"})
    with pytest.raises(SourceError, match="did not answer") as caught:
        skill_tokens(wrong, base, "", base, Store(tmp_path / "wrong"))
    assert "secret" not in str(caught.value)


def test_no_answer_that_came_is_asked_for_again(
    base: Path, tmp_path: Path, endpoint: tuple[str, list[dict[str, Any]]]
) -> None:
    url, asked = endpoint
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("fox\ndog\nowl\ncat\n")
    skill, store = Skill(prompts=str(prompts), endpoint=url, model="big"), Store(tmp_path / "store")
    with pytest.raises(SourceError, match="did not answer"):
        skill_tokens(skill, base, "", base, store)
    skill_tokens(skill, base, "", base, store)
    assert [one["messages"][0]["content"] for one in asked] == ["fox", "dog", "owl", "owl", "cat"]
    assert [one["seed"] for one in asked] == [0, 1, 2, 2, 3]


# --- in a recipe ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("steps.1.budget={}", "say `tokens`, `seconds` or both"),
        ("steps.1.batch=6", "multiple of `micro_batch`"),
        ("steps.1.data=[]", "say what to train on"),
        ("steps.1.losses={logits: 0}", "at least one loss"),
        ("steps.1.stored=bfloat16", "does not hold integers times a scale"),
        ("steps.1.weights=bfloat16", "take adamw-8bit"),
        ("steps.1.quantize.grid={bits: 8, per: tensor, group: null}", "not per tensor"),
        ("steps.1.prune={method: snip, pattern: {sparsity: 0.5}, schedule: cubic}", "prunes before"),
        ("steps.1.prune={method: rigl, pattern: {keep: 4, group: 16}, stages: [8, 4]}", "goes with"),
        ("steps.1.prune={method: rigl, pattern: {keep: 4, group: 16}, schedule: stages, stages: [8, 6]}",
         "must fall to the pattern's keep, 4"),
        ("steps.1.prune={method: rigl, pattern: {keep: 4, group: 16}, decay: 1}", "may bring weights back"),
        ("steps.1.prune={method: wanda, pattern: {keep: 4, group: 16}, decay: 1, until: 0.6}",
         "must not come before"),
        ("steps.1.skills=[{prompts: x, endpoint: http://y}]", "go together"),
        ("steps.1.skills=[{prompts: x, templates: ['why']}]", "needs a {} for the prompt"),
        ("steps.1.written=[{source: x, tokens: 9, prompt: 15, length: 16}]", "leave room after the `prompt`"),
        ("steps.1.optimizer.learning_rates=1", "did you mean `learning_rate`"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(tmp_path: Path, change: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load(recipe(tmp_path), [change])


@pytest.mark.real
def test_zoo_run_recovers_and_records_the_curve(base: Path, tmp_path: Path) -> None:
    path = recipe(
        tmp_path,
        base,
        evaluation={"perplexity": [{"windows": 4, "length": 64}], "fidelity": {"windows": 2, "length": 64},
                    "tasks": []},
        exports=[{"kind": "safetensors"}, {"kind": "packed"}],
        verification={"threads": 1},
    )  # fmt: skip
    entry = run_here(tmp_path, path)
    zoo, store, registry = Zoo(tmp_path), tmp_path / "store", tmp_path / "registry.db"
    assert [point.step for point in entry.training] == [10, 20, 30]
    assert entry.training[-1].tokens == 128 * 30
    (run,) = entry.training_runs
    assert (run.tokens, run.processes, run.versions["torch"]) == (128 * 30, 1, torch.__version__)
    assert run.device == this_machine().cpu and run.ended <= entry.created
    assert {layer.method for layer in entry.layers} == {"wanda+recover+qat"}
    assert {(layer.bits, layer.group, layer.window) for layer in entry.layers} == {(5, 32, 8)}
    assert not any((store / "training").iterdir()), "no state is left of a training that is done"
    card = (store / "entries" / "tiny-recovered" / "README.md").read_text()
    assert "## Training" in card and "loss over 3,840 tokens" in card
    assert re.search(rf"^Trained on .* torch {re.escape(torch.__version__)}, .*; it ended", card, re.M)
    bad = zoo(
        "run", path, "--store", store, "--registry", registry, "--set", "steps.1.data.0.source=absent.txt"
    )
    assert bad.returncode == 1 and "absent.txt" in bad.stderr and "Traceback" not in bad.stderr
