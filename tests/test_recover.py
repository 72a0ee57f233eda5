"""Recovery training as a whole, on tiny models: what it learns, keeps, writes, and survives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pipelines.cluster import Reserved
from pipelines.compress import run_step
from pipelines.recipe import Prune, Recover
from pipelines.recover import prune as prune_module
from pipelines.recover import train as recover_module
from pipelines.recover.data import tokenized
from pipelines.recover.launch import Group, Machine, launched
from pipelines.recover.rounding import Rounder
from pipelines.recover.state import newest, read_progress
from pipelines.recover.student import Student, rounders
from pipelines.recover.train import Job, recover
from pipelines.text import PROSE
from tests.process import PATIENCE_S, QUIET, ROOT
from tests.tiny import VOCABULARY, tiny_llama, tiny_mpt
from zoo.entry import TrainingPoint
from zoo.errors import (
    CalibrationError,
    FormatError,
    Lost,
    NumericsError,
    PatternError,
    StoreError,
    UsageError,
)
from zoo.files import Store, sha256_json
from zoo.jobs.joblist import Needs
from zoo.jobs.transient import transient
from zoo.runner.config import modules_of
from zoo.runner.format import unpack
from zoo.runner.numpy_engine import NumpyEngine
from zoo.runner.pack import pack_folder
from zoo.runner.packed import Packed

STEP: dict[str, Any] = {
    "kind": "recover",
    "data": [{"source": "given as token ids"}],
    "budget": {"tokens": 40 * 4 * 32},
    "optimizer": {"learning_rate": 3e-3},
    "length": 32,
    "batch": 4,
    "micro_batch": 2,
}
PRUNE_LATE = {"method": "wanda", "pattern": {"keep": 6, "group": 16}, "until": 0.95, "every": 3, "decay": 1.0}
IDS = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The dense teacher, and what pruning to 8:16 (banded) leaves of it; and tokens of prose."""
    root = tmp_path_factory.mktemp("models")
    teacher = tiny_llama(root / "teacher", num_hidden_layers=2, tie_word_embeddings=True)
    pruned = root / "pruned"
    pruned.mkdir()
    pattern = {"keep": 8, "group": 16, "window": 8}
    run_step(Prune.model_validate({"kind": "prune", "method": "magnitude", "pattern": pattern}),
             teacher, pruned, None)  # fmt: skip
    tokens = tokenized(str(PROSE), "text", None, teacher, Store(root / "store"))
    return {"teacher": teacher, "pruned": pruned, "tokens": tokens}


def step_of(**changes: Any) -> Recover:
    made: Recover = TypeAdapter(Recover).validate_python({**STEP, **changes})
    return made


def job(place: Path, models: dict[str, Path], student: str = "pruned", **changes: Any) -> Job:
    place.mkdir(exist_ok=True)
    out = place / "out"
    out.mkdir(exist_ok=True)
    return Job(
        step=step_of(**changes),
        identity=sha256_json([student, changes]),
        student=models[student],
        teacher=models["teacher"],
        tokens=[models["tokens"]],
        out=out,
        state=place / "state",
    )


def linears(folder: Path) -> dict[str, Tensor]:
    return {n: t.float() for n, t in load_file(folder / "model.safetensors").items() if "proj" in n}


def curve(folder: Path) -> list[TrainingPoint]:
    return [
        TrainingPoint.model_validate(p)
        for p in json.loads((folder / "training.json").read_text())["training"]
    ]


def losses(points: list[TrainingPoint]) -> list[tuple[int, int, float]]:
    return [(p.step, p.tokens, p.loss) for p in points]


# --- what is learned and kept -----------------------------------------------------------------------


def test_the_loss_falls_and_zeros_stay(models: dict[str, Path], tmp_path: Path) -> None:
    task = job(
        tmp_path, models, losses={"logits": 1, "cross_entropy": 0.01, "squarehead": 0.1, "weights": 0.01}
    )
    progress = recover(task)
    points = curve(task.out)
    assert points == progress.curve and [p.step for p in points] == [10, 20, 30, 40]
    assert points[-1].tokens == 40 * 128
    assert points[-1].loss < 0.75 * points[0].loss
    assert points[-1].terms["logits"] < 0.7 * points[0].terms["logits"]
    assert set(points[0].terms) == {"logits", "cross_entropy", "squarehead", "weights"}
    before, after = linears(models["pruned"]), linears(task.out)
    for name, weight in after.items():
        assert int((weight[before[name] == 0] != 0).sum()) == 0
        assert not torch.equal(weight, before[name]), "what is kept has learned"
    record = json.loads((task.out / "compression.json").read_text())["layers"][0]
    assert (record["method"], record["pattern"], record["window"]) == ("magnitude+recover", "8:16", 8)
    assert record["bits"] == 16 and record["sparsity"] == 0.5
    assert json.loads((task.out / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize("log_steps", [1, 10])
def test_a_budget_in_seconds_is_used_up_and_its_curve_reaches_the_end(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_steps: int
) -> None:
    monkeypatch.setattr(recover_module, "LOG_STEPS", log_steps)
    task = job(tmp_path, models, budget={"seconds": 0.5})
    progress = recover(task)
    last = curve(task.out)[-1]
    assert last.seconds >= 0.5 and (last.step, last.tokens) == (progress.step, progress.tokens)
    assert progress.summed == 0 and len({point.step for point in progress.curve}) == len(progress.curve)


def test_a_weight_that_left_zero_is_an_error(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prune_module, "apply_mask", lambda tensor, mask: None)
    monkeypatch.setattr(prune_module, "keep", lambda module, mask, passing: None)
    with pytest.raises(NumericsError, match="no longer zero"):
        recover(job(tmp_path, models, budget={"tokens": 128 * 10}))


def test_with_nothing_pruned_the_dense_model_is_trained(models: dict[str, Path], tmp_path: Path) -> None:
    task = job(tmp_path, models, "teacher", losses={"logits": 0, "cross_entropy": 1}, stored="bfloat16")
    recover(task)
    points = curve(task.out)
    assert points[-1].terms["cross_entropy"] == pytest.approx(points[-1].loss, rel=1e-5)
    assert points[-1].loss < points[0].loss
    assert load_file(task.out / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert all(float((w == 0).float().mean()) < 0.01 for w in linears(task.out).values())


def test_mpt_is_recovered_too(models: dict[str, Path], tmp_path: Path) -> None:
    other = tiny_mpt(tmp_path / "other", seed=1)
    models = {**models, "teacher": tiny_mpt(tmp_path / "mpt"), "pruned": other}
    prune = {"method": "magnitude", "pattern": {"keep": 8, "group": 16}}
    losses = {"logits": 1, "top_k": 50, "squarehead": 0.5}
    task = job(tmp_path, models, losses=losses, prune=prune, recompute=True)
    progress = recover(task)
    assert progress.curve[-1].loss < progress.curve[0].loss
    for name, weight in load_file(task.out / "model.safetensors").items():
        if "proj" in name or "Wqkv" in name:
            assert int((weight != 0).view(-1, 16).sum(dim=1).max()) == 8


@pytest.mark.parametrize(
    ("prune", "kept"),
    [
        ({"method": "magnitude", "pattern": {"sparsity": 0.75}, "schedule": "cubic", "every": 3}, None),
        ({"method": "wanda", "pattern": {"keep": 4, "group": 16, "window": 8}, "schedule": "stages",
          "stages": [12, 8, 4], "every": 2}, 4),
        ({"method": "rigl", "pattern": {"keep": 6, "group": 16}, "schedule": "cubic", "every": 4}, 6),
        ({"method": "snip", "pattern": {"keep": 8, "group": 16, "window": 8}}, 8),
        ({"method": "wanda", "pattern": {"keep": 8, "group": 16, "window": 8}, "schedule": "stages",
          "stages": [12, 8], "every": 2, "decay": 30.0}, 8),
    ],
    ids=["cubic", "stages", "rigl", "snip", "decay"],
)  # fmt: skip
def test_pruning_in_training_reaches_its_target(
    models: dict[str, Path], tmp_path: Path, prune: dict[str, Any], kept: int | None
) -> None:
    task = job(tmp_path, models, "teacher", prune=prune, budget={"tokens": 128 * 24})
    progress = recover(task)
    assert progress.pruned
    for name, weight in linears(task.out).items():
        if kept is None:
            assert int((weight == 0).sum()) == round(weight.numel() * 0.75), name
        else:
            assert int((weight != 0).view(-1, 16).sum(dim=1).max()) == kept, name
    record = json.loads((task.out / "compression.json").read_text())["layers"][0]
    assert record["pattern"] == ("unstructured" if kept is None else f"{kept}:16")
    if prune["pattern"].get("window"):
        report = pack_folder(task.out, tmp_path / "m.zoo")
        assert {m.keep for m in report.matrices if m.name.startswith("layers.")} == {kept}


def begun(place: Path, models: dict[str, Path], **prune: Any) -> Job:
    """A training with weights that decay, after its first step of 24."""
    task = job(place, models, "teacher", budget={"tokens": 128 * 24}, optimizer={"learning_rate": 0.02},
               prune={"method": "magnitude", "pattern": {"keep": 8, "group": 16}, **prune})  # fmt: skip
    recover(task.model_copy(update={"stop_after": 0.0}))
    return task


def test_what_decays_is_no_part_of_the_model(models: dict[str, Path], tmp_path: Path) -> None:
    """Halfway, the file has the pattern's zeros and the state all weights; some of those that were dropped
    at first are in the end kept, and the others zero."""
    task = begun(tmp_path, models, decay=20.0, every=1, until=0.75)
    first = linears(task.out)
    state = newest(task.state)
    assert state is not None and state.name == "step-00000001"
    learning = load_file(next(state.glob("model*.safetensors")))
    for name, weight in first.items():
        assert int((weight != 0).view(-1, 16).sum(dim=1).max()) == 8
        assert int((learning[f"model.{name}"] == 0).sum()) == 0, "all of them go on learning"
    progress = recover(task)
    assert progress.pruned and progress.step == 24
    last = linears(task.out)
    assert all(int((w != 0).view(-1, 16).sum(dim=1).max()) == 8 for w in last.values())
    assert sum(int(((first[n] == 0) & (last[n] != 0)).sum()) for n in last) > 20, "some came back"
    (tmp_path / "whole").mkdir()
    whole = task.model_copy(update={"out": tmp_path / "whole", "state": tmp_path / "whole-state"})
    recover(whole)
    assert losses(curve(whole.out)) == losses(curve(task.out))
    assert all(torch.equal(w, last[n]) for n, w in linears(whole.out).items())


def test_what_comes_back_last_has_what_it_learned(models: dict[str, Path], tmp_path: Path) -> None:
    """Masks are updated before the first step and before the last, whose learning rate is next to nothing."""
    task = begun(tmp_path, models, decay=1.0, every=99, until=0.95)
    first = linears(task.out)
    recover(task)
    back = torch.cat([w[(w != 0) & (first[n] == 0)].abs() for n, w in linears(task.out).items()])
    assert len(back) > 20 and float(back.min()) > 1e-3


def test_the_decay_is_that_of_the_recipe(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every ten steps 1 - 10 lr d min(t / until, 1), t the fraction of the budget; from `until` on, zero."""
    told: list[float] = []
    shrink = prune_module.shrink

    def heard(tensor: Tensor, mask: Tensor, factor: float) -> None:
        before = tensor.detach().clone()
        shrink(tensor, mask, factor)
        told.append(factor)
        assert torch.equal(tensor[mask], before[mask])
        assert torch.allclose(tensor[~mask], before[~mask] * factor)

    monkeypatch.setattr(prune_module, "shrink", heard)
    prune = {
        "method": "magnitude",
        "pattern": {"keep": 8, "group": 16},
        "decay": 3.0,
        "until": 0.6,
        "every": 7,
    }
    task = job(tmp_path, models, "teacher", prune=prune, budget={"tokens": 128 * 50},
               optimizer={"learning_rate": 0.01, "warmup": 0.1})  # fmt: skip
    recover(task)
    expected = [
        1 - 10 * 0.01 * recover_module.schedule((step + 0.5) / 50, 0.1) * 3.0 * min(step / 50 / 0.6, 1.0)
        for step in (0, 10, 20)
    ]
    layers = len(linears(task.out))
    assert told == pytest.approx([factor for factor in expected for _ in range(layers)])


def test_scales_are_searched_for_what_is_kept(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the rounding begins when the pruning ends."""
    seen: list[float] = []
    fit = Rounder.fit

    def watched(self: Rounder, weight: Tensor) -> None:
        if weight.shape[0] != VOCABULARY:
            seen.append(float((weight != 0).view(-1, 16).sum(dim=1).max()))
        fit(self, weight)

    monkeypatch.setattr(Rounder, "fit", watched)
    prune = {"method": "magnitude", "pattern": {"keep": 8, "group": 16}, "decay": 1.0, "until": 0.5}
    quantize = {"grid": {"bits": 5, "group": 32}, "start": 0.5}
    recover(job(tmp_path, models, "teacher", prune=prune, quantize=quantize, budget={"tokens": 128 * 20}))
    assert seen and set(seen) == {8.0}


# --- the exported grid ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantize", "layout"),
    [
        ({"grid": {"bits": 5, "group": 32}, "embeddings": {"bits": 6, "group": 32}}, ("banded", 5)),
        ({"grid": {"bits": 8, "group": 64}, "embeddings": {"bits": 8, "group": 32}, "scales": "searched",
          "every": 5}, ("planes", 8)),
        ({"grid": {"bits": 4, "group": 32, "symmetric": False, "zero_point": "integer"},
          "embeddings": {"bits": 8, "group": 32}}, None),
    ],
    ids=["5 bits learned", "8 bits searched", "4 bits asymmetric"],
)  # fmt: skip
def test_the_packed_file_is_the_model_that_was_trained(
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quantize: dict[str, Any],
    layout: tuple[str, int] | None,
) -> None:
    trained: list[nn.Module] = []
    write = recover_module.write_model

    def seen(step: Recover, model: nn.Module, *rest: Any) -> None:
        trained.append(model)
        write(step, model, *rest)

    monkeypatch.setattr(recover_module, "write_model", seen)
    task = job(tmp_path, models, quantize={**quantize, "start": 0.3}, budget={"tokens": 128 * 30})
    recover(task)
    report = pack_folder(task.out, tmp_path / "m.zoo")
    assert {m.grid for m in report.matrices} == {"recorded"} and all(m.exact for m in report.matrices)
    packed = Packed(tmp_path / "m.zoo")
    grids = rounders(trained[0])
    if quantize.get("scales", "learned") == "learned":
        assert all(float(grid.delta.detach().abs().max()) > 0 for grid in grids.values())
    modules = modules_of(packed.architecture)
    for name, found in packed.layouts.items():
        if layout is not None and name != "embed":
            assert (found.kind, found.bits) == layout
        if name == "embed":
            assert found.bits == quantize["embeddings"]["bits"]
        module = modules[name][0]
        with torch.no_grad():
            q, scale, _ = grids[module].integers(trained[0].get_parameter(f"{module}.weight"))
        integers, scales, minima = unpack(found, packed.parts(name))
        if minima is None:
            floor = grids[module].floor
            shift = 0 if floor is None else floor[..., None]
            assert np.array_equal(integers, (q - shift).view(len(q), -1).numpy()), name
        assert np.array_equal(scales, scale.numpy()), name
    student = Student(trained[0], task.step.losses, False).eval()
    with torch.no_grad():
        expected = trained[0].base_model(input_ids=IDS).last_hidden_state @ student.head().T  # type: ignore[operator]
    engine = NumpyEngine(packed, slots=2, context=24)
    tokens = IDS.numpy().astype(np.int32)
    places = np.arange(24, dtype=np.int32)
    for row in (0, 1):
        logits = engine.forward(tokens[row], np.full(24, row, np.int32), places, places)
        assert np.abs(logits - expected[row].numpy()).max() < 2e-3 * float(expected[row].abs().max())


# --- going on ---------------------------------------------------------------------------------------

# saves at every step, so that a kill comes between two of them
CHILD = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from pipelines.recover import train as recover
recover.SAVE_SECONDS = 0.0
recover.recover(recover.Job.model_validate_json(Path(sys.argv[1]).read_text()))
"""


@pytest.mark.real
def test_killed_training_goes_on_with_the_same_curve(models: dict[str, Path], tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "prune": {"method": "rigl", "pattern": {"keep": 8, "group": 16}, "schedule": "cubic", "every": 4},
        "quantize": {"grid": {"bits": 5, "group": 32}, "start": 0.6},
        "budget": {"tokens": 128 * 36},
    }
    whole = job(tmp_path / "whole", models, "teacher", **changes)
    recover(whole)
    broken = job(tmp_path / "broken", models, "teacher", **changes)
    (tmp_path / "job.json").write_text(broken.model_dump_json())
    command = [sys.executable, "-c", CHILD, str(tmp_path / "job.json")]
    environment = os.environ | QUIET | {"PYTHONPATH": str(ROOT)}
    for least in (7, 25):  # in the middle of pruning, and with weights rounded
        log = tmp_path / "log"
        with log.open("wb") as told:
            child = subprocess.Popen(command, env=environment, stderr=told)
        deadline = time.monotonic() + PATIENCE_S
        while (state := newest(broken.state)) is None or int(state.name[5:]) < least:
            assert child.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        child.wait()
        state = newest(broken.state)
        assert state is not None and least <= int(state.name[5:]) < 36
    progress = recover(broken)
    assert losses(curve(broken.out)) == losses(curve(whole.out))
    for name, tensor in load_file(whole.out / "model.safetensors").items():
        assert torch.equal(tensor, load_file(broken.out / "model.safetensors")[name]), name
    assert progress.step == 36
    assert [path.name for path in broken.state.iterdir()] == ["step-00000036"], "older states are gone"


def test_what_is_not_finite_is_never_a_state(models: dict[str, Path], tmp_path: Path) -> None:
    """The first step, whose losses and gradients are of finite weights, makes weights that overflow."""
    changes: dict[str, Any] = {
        "optimizer": {"learning_rate": 1e30, "warmup": 0.0},
        "budget": {"tokens": 1280},
    }
    task = job(tmp_path, models, stored="float32", **changes)
    recover(task.model_copy(update={"stop_after": 0.0}))
    with pytest.raises(NumericsError, match="not finite at step 2"):
        recover(task.model_copy(update={"stop_after": 0.0}))
    state = newest(task.state)
    assert state is not None and state.name == "step-00000001"
    assert read_progress(state, task.identity).step == 1


def test_a_state_is_not_written_twice(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that ended before its model was written: killed while it replaces that state, it would
    have none."""
    task = job(tmp_path, models, budget={"tokens": 1280}, prune=PRUNE_LATE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recover_module, "write_model", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            recover(task)
    written: list[str] = []
    monkeypatch.setattr(recover_module, "save", lambda *a: written.append("state"))
    recover(task)
    assert not written and (task.out / "model.safetensors").is_file()
    whole = job(tmp_path / "whole", models, budget={"tokens": 1280}, prune=PRUNE_LATE)
    monkeypatch.undo()
    recover(whole)
    for name, tensor in linears(whole.out).items():
        assert torch.equal(tensor, linears(task.out)[name]), name


def test_a_full_disk_is_told(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Path("/dev/full")
    if not full.is_char_device():
        pytest.skip("/dev/full is not a device here")
    task = job(tmp_path, models, budget={"tokens": 1280})
    recover(task.model_copy(update={"stop_after": 0.0}))
    left = task.state / ".step-00000007.partial"  # by one that was killed
    left.mkdir()
    monkeypatch.setattr(Accelerator, "save_state", lambda *_: torch.save(torch.zeros(1 << 20), full))
    with pytest.raises(StoreError, match="no space left"):
        recover(task)
    state = newest(task.state)
    assert state is not None and state.name == "step-00000001" and not left.exists()


def test_another_trainings_state_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    task = job(tmp_path, models, budget={"tokens": 128})
    recover(task)
    other = job(tmp_path, models, budget={"tokens": 128}, optimizer={"learning_rate": 1e-5})
    with pytest.raises(StoreError, match="another training"):
        recover(other)


@pytest.mark.real
@pytest.mark.parametrize(
    ("decay", "how"),
    [(None, {}), (5.0, {}), (None, {"shard": True, "recompute": True})],
    ids=["zero at once", "decaying", "sharded"],
)
def test_two_processes_learn_what_one_does(
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    decay: float | None,
    how: dict[str, Any],
) -> None:
    changes: dict[str, Any] = {
        "prune": {"method": "wanda", "pattern": {"keep": 8, "group": 16}, "schedule": "stages",
                  "stages": [12, 8], "every": 3, "decay": decay},
        "quantize": {"grid": {"bits": 5, "group": 32}, "start": 0.6},
        "budget": {"tokens": 128 * 20},
    }  # fmt: skip
    alone = job(tmp_path / "one", models, "teacher", **changes)
    one = recover(alone)
    both = job(tmp_path / "two", models, "teacher", **changes, **how)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    two = launched(both, 2)
    assert (one.processes, two.processes) == (1, 2)
    assert [p.loss for p in two.curve] == pytest.approx([p.loss for p in one.curve], rel=1e-3)
    ours, theirs = linears(alone.out), linears(both.out)
    same = [float((ours[n] - theirs[n]).norm() / ours[n].norm()) for n in ours]
    assert max(same) < 0.1 and float(np.mean(same)) < 0.02


@pytest.mark.real
def test_an_error_of_several_processes_is_told_as_that_of_one(
    models: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And nothing stays of the launcher."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    prune = {"method": "magnitude", "pattern": {"keep": 4, "group": 100}}
    with pytest.raises(PatternError, match=r"model\.layers\.0.*100") as alone:
        recover(job(tmp_path / "one", models, "teacher", prune=prune))
    capfd.readouterr()
    with pytest.raises(PatternError) as together:
        launched(job(tmp_path / "two", models, "teacher", prune=prune), 2)
    assert str(together.value) == str(alone.value)
    assert "Traceback" not in capfd.readouterr().err
    assert not any(temporary.glob("torchelastic*"))


def kill_one_that_trains() -> None:
    """kill -9 of one of two processes of a training, once they talk to each other."""
    deadline = time.monotonic() + PATIENCE_S
    together: list[psutil.Process] = []
    while len(together) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
        with suppress(psutil.Error):  # one has ended meanwhile
            commands = {p: " ".join(p.cmdline()) for p in psutil.Process().children(recursive=True)}
            found = [p for p, c in commands.items() if "recover --job" in c and "launcher" not in c]
            together = [p for p in found if sum(c.status == "ESTABLISHED" for c in p.net_connections()) > 1]
    time.sleep(1)  # some of its steps
    together[1].kill()


@pytest.mark.real
def test_a_killed_process_of_several_is_told_and_the_training_may_go_on(
    models: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other process fails too, of a lost connection: which of the two ends first is a race."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    killer = threading.Thread(target=kill_one_that_trains)
    killer.start()
    with pytest.raises(Lost, match="lost") as lost:
        launched(job(tmp_path, models, "teacher", budget={"tokens": 128 * 20_000}), 2)
    killer.join()
    assert transient(lost.value) and "run it again" in str(lost.value)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.real
def test_another_machine_says_what_nobody_foresaw(models: dict[str, Path], tmp_path: Path) -> None:
    """The last words of the process that failed, not those of the launcher."""
    ray = pytest.importorskip("ray", reason="needs Ray: pip install '.[ray]' in a checkout")
    environment = {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_MEGATRON_LM": "true"}  # which is not installed
    theirs = Reserved(address="none", group="none", needs=Needs(workers=1), store=tmp_path, shared=None)
    work, group = job(tmp_path, models, "teacher"), Group(machines=1, processes=2)
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        actor = ray.remote(Machine).options(num_cpus=1, runtime_env={"env_vars": environment})
        asked = actor.remote(theirs.model_dump_json()).train.remote(
            work.model_dump_json(), group.model_dump_json(), 0
        )
        code, words = ray.get(asked, timeout=PATIENCE_S)
    finally:
        ray.shutdown()
    assert code == 1 and words.startswith("ImportError: Megatron is not installed")


def test_sharded_weights_are_gathered_as_they_are_exported() -> None:
    """And nothing else is cast. accelerate would have its plugin gather in the type of autocast."""
    plugin = recover_module._fsdp("LlamaDecoderLayer")
    plugin.set_mixed_precision("bf16")
    seen: list[torch.dtype] = []

    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.extend([x.dtype, self.weight.dtype])
            return super().forward(x)

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        layer = fully_shard(Layer(4, 4), mesh=mesh, mp_policy=plugin.mixed_precision_policy)
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(torch.ones(2, 4, dtype=torch.bfloat16))
        out.sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert [*seen, out.dtype] == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32


# --- what is refused --------------------------------------------------------------------------------


def test_what_cannot_be_trained_is_told(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be shared by 3 processes"):
        recover_module.shares(step_of(), 3)
    with pytest.raises(UsageError, match="needs whole matrices"):
        recover_module.shares(step_of(shard=True, losses={"weights": 1.0}), 2)
    assert recover_module.shares(step_of(batch=12, micro_batch=4), 2) == (6, 3)
    other = tiny_llama(tmp_path / "other", vocab_size=400)
    with pytest.raises(FormatError, match="do not share a vocabulary"):
        recover(job(tmp_path, {**models, "teacher": other}))
    deeper = tiny_llama(tmp_path / "deeper", num_hidden_layers=3)
    with pytest.raises(FormatError, match="layer by layer"):
        recover(job(tmp_path, {**models, "teacher": deeper}, losses={"squarehead": 1}))
    np.save(tmp_path / "few.npy", np.arange(20))
    with pytest.raises(CalibrationError, match="too short"):
        recover(job(tmp_path, {**models, "tokens": tmp_path / "few.npy"}))
    sick = tmp_path / "sick"
    sick.mkdir()
    for path in models["pruned"].iterdir():
        (sick / path.name).write_bytes(path.read_bytes())
    tensors = load_file(sick / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 6e4)
    tensors["model.embed_tokens.weight"] *= 1e3
    save_file(tensors, sick / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match="not finite"):
        recover(job(tmp_path, {**models, "pruned": sick}, optimizer={"learning_rate": 1e30, "clip": 1e30}))


@pytest.mark.real
def test_weights_in_bfloat16_learn_with_moments_in_8_bits(models: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="adamw-8bit needs torchao")
    task = job(tmp_path, models, weights="bfloat16", recompute=True,
               optimizer={"kind": "adamw-8bit", "learning_rate": 1e-3},
               quantize={"grid": {"bits": 5, "group": 32}, "start": 0.5})  # fmt: skip
    progress = recover(task)
    assert progress.curve[1].loss < progress.curve[0].loss
    before, after = linears(models["pruned"]), linears(task.out)
    assert all(int((after[name][before[name] == 0] != 0).sum()) == 0 for name in after)
