"""The benchmark of a training's memory and time, on tiny shapes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.recover_memory import STEPS, training, write_model
from tests.scheduler import ROOT
from zoo.errors import UsageError
from zoo.runner.config import architecture_of
from zoo.runner.shapes import shape

RECIPE = ROOT / "pipelines" / "recipes" / "mpt-7b-8of16-w5-recovered.yaml"
SMALL = ["length=16", "batch=2", "micro_batch=2", "optimizer.kind=adamw", "weights=float32"]


def test_a_training_is_measured() -> None:
    changes = [word for change in SMALL for word in ("--set", f"steps.1.{change}")]
    module = [sys.executable, "-m", "benchmarks.recover_memory"]
    done = subprocess.run(
        [*module, RECIPE, "--shape", "tiny-mpt", "--layers", "1", *changes],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"step {STEPS}, 100.0%" in done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith(f"| {RECIPE.stem} |"))
    tensors, whole, plain, rounded = (cell.strip() for cell in row.split("|")[3:7])
    assert (tensors == "-") == (not torch.cuda.is_available())
    assert 0.1 < float(whole.removesuffix(" GB")) < 10
    assert all(re.fullmatch(r"\d+\.\d\d s", cell) for cell in (plain, rounded))
    assert f"2 blocks of 16 tokens a step; {STEPS} steps" in done.stdout


@pytest.mark.parametrize("name", ["tiny", "tiny-mpt", "mistral-7b"])
def test_a_random_model_has_its_shape(name: str, tmp_path: Path) -> None:
    """As our engine understands its config.json."""
    wanted = shape(name, 1)
    if name == "mistral-7b":
        wanted = wanted.model_copy(
            update={"vocabulary": 64, "hidden": 256, "intermediate": 64, "head_dim": 8}
        )
    write_model(wanted, tmp_path)
    found, _ = architecture_of(json.loads((tmp_path / "config.json").read_text()))
    same = {"softmax_scale", "norm_eps"}
    assert found.model_dump(exclude=same) == wanted.model_dump(exclude=same)


def test_it_prunes_and_rounds_what_the_recipe_does() -> None:
    step = training(RECIPE, [])
    assert step.prune is not None and (step.prune.pattern.keep, step.prune.pattern.group) == (8, 16)
    assert step.quantize is not None and (step.quantize.grid.bits, step.quantize.start) == (5, 0.5)
    assert step.budget.tokens == STEPS * step.batch * step.length and not step.written


def test_a_recipe_that_trains_nothing_is_refused(tmp_path: Path) -> None:
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe["steps"] = recipe["steps"][:1]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UsageError, match="trains nothing"):
        training(tmp_path / "recipe.yaml", [])
