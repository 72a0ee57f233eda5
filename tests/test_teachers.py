"""What an earlier step of a recipe made, as the teacher of a later one, and as who writes for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from pipelines.recipe import load
from pipelines.recover.__main__ import main
from pipelines.text import PROSE
from tests.process import Zoo
from tests.test_adopt import MEASURED
from tests.test_recover_command import PRUNE, RECOVER, recipe, run_here
from tests.tiny import tiny_llama
from zoo.errors import RecipeError

TEACHER: dict[str, Any] = {**RECOVER, "budget": {"tokens": 1280}, "quantize": None}
STUDENT: dict[str, Any] = {**RECOVER, "budget": {"tokens": 1280}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny_llama(tmp_path_factory.mktemp("base") / "base", num_hidden_layers=2)


def taught_by(teacher: str | None) -> list[dict[str, Any]]:
    written = {"source": str(PROSE), "model": teacher, "tokens": 512, "length": 32, "prompt": 4, "batch": 4}
    return [TEACHER, PRUNE, {**STUDENT, "teacher": teacher, "written": [written]}]


def trained(base: Path, place: Path, steps: list[dict[str, Any]], *options: str) -> dict[str, np.ndarray]:
    """The weights that the command makes; they are in `place`/model."""
    place.mkdir()
    path = recipe(place, steps=steps)
    main(["--model", str(base), "--recipe", str(path), "--out", str(place), *options])
    made: dict[str, np.ndarray] = load_file(place / "model" / "model.safetensors")
    return made


def same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> bool:
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_a_step_teaches_what_the_folder_of_its_model_does(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = trained(base, tmp_path / "step", taught_by("step:1"))
    trained(base, tmp_path / "teacher", [TEACHER])
    named = f"elsewhere={tmp_path / 'teacher' / 'model'}"
    assert same(ours, trained(base, tmp_path / "folder", taught_by("elsewhere"), "--named", named))
    with pytest.raises(SystemExit):
        trained(
            base, tmp_path / "given", taught_by("step:1"), "--named", named.replace("elsewhere", "step:1")
        )
    assert "step:1 is made by the recipe itself" in capsys.readouterr().err


def test_runs_that_share_a_store_keep_teachers_apart(base: Path, tmp_path: Path) -> None:
    store = "--store", str(tmp_path / "store")
    made = [trained(base, tmp_path / str(t), taught_by(t), *store) for t in ("step:1", None)]
    assert not same(*made)


def test_a_branch_learns_from_none_beside_it(base: Path, tmp_path: Path) -> None:
    """As branches do not wait for each other."""
    beside = {**STUDENT, "teacher": "step:1a1"}
    path = recipe(
        tmp_path, base, steps=[{"kind": "average", "branches": [[TEACHER, beside], [TEACHER]]}, beside]
    )
    assert load(path).models == {None}
    path = recipe(tmp_path, base, steps=[{"kind": "average", "branches": [[TEACHER], [TEACHER, beside]]}])
    with pytest.raises(RecipeError, match="step 1b2 learns from step:1a1; the steps before it are: 1b1"):
        load(path)


@pytest.mark.real
def test_zoo_run_needs_the_teacher_only_to_train(base: Path, tmp_path: Path) -> None:
    steps = taught_by("step:1")
    path = recipe(tmp_path, base, steps=steps, **MEASURED)
    made = run_here(tmp_path, path)
    weights = load_file(tmp_path / "store" / "entries" / made.id / "model.safetensors")
    assert same(trained(base, tmp_path / "out", steps), weights)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = Zoo(elsewhere)("adopt", path, tmp_path / "out", "--store", elsewhere / "store")
    assert done.returncode == 0, done.stderr
    adopted = run_here(elsewhere, path)
    trainings = [stage for stage in adopted.stages if "recover" in stage.name]
    assert [(stage.name, stage.status) for stage in trainings] == [("3. recover", "cached")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("steps.0.teacher=step:1", "step 1 learns from step:1; the steps before it are: none"),
        ("steps.2.teacher=step:7", "step 3 learns from step:7; the steps before it are: 1, 2"),
        ("steps.2.written.0.model=step:3", "step 3 learns from step:3; the steps before it are: 1, 2"),
    ],
)
def test_only_what_comes_before_teaches(base: Path, tmp_path: Path, change: str, words: str) -> None:
    path = recipe(tmp_path, base, steps=taught_by("step:1"))
    assert load(path).models == {None}
    with pytest.raises(RecipeError, match=words):
        load(path, [change])
