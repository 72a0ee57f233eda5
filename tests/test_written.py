"""Text that a model writes for training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines import keys
from pipelines.continuation import TOP_K
from pipelines.recipe import Recover, Written, load
from pipelines.recover import written as recover_written
from pipelines.recover.__main__ import main
from pipelines.recover.data import tokenized
from pipelines.recover.written import written_tokens
from pipelines.text import PROSE
from tests.process import Zoo
from tests.test_recover_command import PRUNE, RECOVER, recipe
from tests.tiny import tiny_llama
from zoo.errors import CalibrationError
from zoo.files import Store
from zoo.registry import open_registry

SETTING = Written(source=str(PROSE), tokens=500, prompt=4, length=16, batch=8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny_llama(tmp_path_factory.mktemp("base") / "base", num_hidden_layers=2)


def test_pieces_begin_with_the_text_and_go_on_as_the_model_would(base: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    ids = np.load(written_tokens(SETTING, base, "writer", base, store)).astype(np.int64)
    assert len(ids) == 500
    pieces = ids[: 500 // 16 * 16].reshape(-1, 16)
    text = np.load(tokenized(str(PROSE), "text", None, base, store))
    places = {tuple(text[at : at + 4].tolist()) for at in range(len(text) - 3)}
    assert all(tuple(piece[:4]) in places for piece in pieces.tolist())
    assert len({tuple(piece[:4]) for piece in pieces.tolist()}) > 20, "drawn from the whole text"
    end = AutoTokenizer.from_pretrained(base).eos_token_id
    assert (pieces[:, -1] == end).all()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.from_numpy(pieces)).logits[:, 3:-2]
    logits[..., end] = -torch.inf  # a piece does not end early
    chosen = logits.gather(-1, torch.from_numpy(pieces)[:, 4:-1, None])
    assert (chosen >= logits.topk(TOP_K).values[..., -1:] - 1e-4).all()
    assert (chosen < logits.topk(5).values[..., -1:]).any(), "sampled, not the likeliest"
    other = np.load(written_tokens(SETTING.model_copy(update={"seed": 1}), base, "writer", base, store))
    assert other.tolist() != ids.tolist()


def test_pieces_may_begin_where_lines_do(base: Path, tmp_path: Path) -> None:
    lines = [
        "How to mend a net.",
        "No.",
        "Ada looked up and said nothing.",
        "The last line, which ends nothing",
    ]
    text = tmp_path / "lines.txt"
    text.write_text("\n".join([*lines, "Five."]))
    setting = SETTING.model_copy(
        update={"source": str(text), "begin": "lines", "prompt": 6, "temperature": 1e-4}
    )
    ids = np.load(written_tokens(setting, base, "writer", base, Store(tmp_path / "store"))).astype(np.int64)
    pieces = {tuple(piece) for piece in ids[: 500 // 16 * 16].reshape(-1, 16).tolist()}
    tokenizer = AutoTokenizer.from_pretrained(base)
    begun = {
        tuple(tokenizer(line, add_special_tokens=False)["input_ids"][:6]) for line in lines if line != "No."
    }
    assert {piece[:6] for piece in pieces} == begun, "lines shorter than the prompt are left out"
    assert len(pieces) == len(begun), "at next to no temperature it writes the likeliest, always the same"


def test_a_batch_is_written_once_though_the_process_is_killed(base: Path, tmp_path: Path) -> None:
    """After `kill -9` in the third batch, the same command writes what one that was not killed writes."""
    setting = SETTING.model_copy(update={"tokens": 16 * 8 * 5})
    whole = np.load(written_tokens(setting, base, "writer", base, Store(tmp_path / "whole"))).tolist()
    store = tmp_path / "store"
    code = f"""
import time, torch
from pathlib import Path
from pipelines.recipe import Written
from pipelines.recover import written
from zoo.files import Store
torch.set_num_threads(1)
go_on, count = written.continued, []
def slow(*arguments):
    count.append(0)
    if len(count) == 3:
        time.sleep(600)
    return go_on(*arguments)
written.continued = slow
setting = Written.model_validate_json({setting.model_dump_json()!r})
base = Path({str(base)!r})
written.written_tokens(setting, base, "writer", base, Store(Path({str(store)!r})))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        size = 16 * 8 * 4
        deadline = time.monotonic() + 120
        while not any(path.stat().st_size >= 2 * size for path in (store / "training").glob("*.pieces")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    (pieces,) = (store / "training").glob("*.pieces")
    with pieces.open("ab") as file:
        file.write(b"\0" * 100)  # and half a batch
    written = []
    go_on = recover_written.continued
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recover_written, "continued", lambda *a: written.append(a[3]) or go_on(*a))
        ids = np.load(written_tokens(setting, base, "writer", base, Store(store)))
    assert written == ["batch 3 of 5", "batch 4 of 5", "batch 5 of 5"]
    assert ids.tolist() == whole
    assert not list((store / "training").iterdir())


def test_a_text_too_short_to_begin_from_is_told(base: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a b")
    setting = SETTING.model_copy(update={"source": str(short), "prompt": 12})
    with pytest.raises(CalibrationError, match="too short to begin from"):
        written_tokens(setting, base, "writer", base, Store(tmp_path / "store"))
    setting = SETTING.model_copy(update={"prompt": 999, "length": 1100, "begin": "lines"})
    with pytest.raises(CalibrationError, match="in its longest line"):
        written_tokens(setting, base, "writer", base, Store(tmp_path / "store"))


def test_impossible_settings_of_the_command_are_told_in_a_line(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = ["written", str(PROSE), "--model", str(base), "--out", str(tmp_path / "w.npy"), "--tokens", "99"]
    monkeypatch.setattr(sys, "argv", [*wrong, "--begin", "somewhere"])
    with pytest.raises(SystemExit, match=r"begin somewhere: .*'anywhere' or 'lines'"):
        recover_written.main()
    monkeypatch.setattr(sys, "argv", [*wrong, "--prompt", "255"])
    with pytest.raises(SystemExit, match=r"^zoo: `length` must leave room after the `prompt`"):
        recover_written.main()


def test_the_command_lets_another_model_write(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its folder must be given; or what it wrote, by the command that does that alone."""
    other = tiny_llama(tmp_path / "other", num_hidden_layers=1, seed=3)
    written = {**SETTING.model_dump(), "model": "pypi:another", "tokens": 700}
    path = recipe(tmp_path, steps=[{**RECOVER, "written": [written], "budget": {"tokens": 1280}}])
    command = ["--model", str(base), "--recipe", str(path), "--out"]
    with pytest.raises(SystemExit, match="--named pypi:another=DIR"):
        main([*command, str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    main([*command, str(tmp_path / "out"), "--named", f"pypi:another={other}"])
    assert "700 tokens that other wrote" in capsys.readouterr().err
    ids = written_tokens(Written(**written), other, "writer", base, Store(tmp_path / "apart"))
    main([*command, str(tmp_path / "same"), "--written", str(ids)])
    models = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("out", "same")]
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())


def test_a_training_depends_on_who_writes(base: Path, tmp_path: Path) -> None:
    text = {"source": str(PROSE), "tokens": 500, "model": "x"}
    made = load(recipe(tmp_path, base, steps=[{**RECOVER, "written": [text]}]))
    (step,) = made.steps
    assert isinstance(step, Recover) and step.models == [None, "x"]
    one, same, other = (keys.steps(made, "base", "", {"x": sha256}.get) for sha256 in ("one", "one", "other"))
    assert one == same != other
    assert keys.steps(made, "base", "", lambda _: None) == []


@pytest.mark.real
def test_zoo_run_trains_on_what_the_base_writes(base: Path, tmp_path: Path) -> None:
    text = SETTING.model_dump()
    path = recipe(
        tmp_path,
        base,
        steps=[PRUNE, {**RECOVER, "data": [], "written": [text]}],
        evaluation={"perplexity": [{"windows": 4, "length": 64}], "fidelity": {"windows": 2, "length": 64},
                    "tasks": []},
        exports=[{"kind": "packed"}],
        verification={"threads": 1},
    )  # fmt: skip
    zoo = Zoo(tmp_path)
    store, registry = tmp_path / "store", tmp_path / "registry.db"
    done = zoo("run", path, "--store", store, "--registry", registry)
    assert done.returncode == 0, done.stderr
    assert "500 tokens that base wrote" in done.stderr
    entry = open_registry(str(registry), create=False).get("tiny-recovered")
    assert entry.status == "verified", entry.failure
    assert yaml.safe_load(entry.recipe)["steps"][1]["written"] == [text]
    assert not any((store / "training").iterdir())
