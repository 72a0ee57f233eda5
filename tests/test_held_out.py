"""How near models are to their teacher, by the benchmark's command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from benchmarks import held_out
from tests.tiny import VOCABULARY, tiny_llama


def told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> list[list[str]]:
    monkeypatch.setattr("sys.argv", ["held_out", *map(str, arguments)])
    held_out.main()
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in capsys.readouterr().out.splitlines()]


def test_it_is_the_divergence_of_windows_that_no_recipe_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mean over windows of KL(p || q), p and q the softmax of teacher's and model's logits, in float64."""
    teacher, model = (tiny_llama(tmp_path / str(seed), num_hidden_layers=1, seed=seed) for seed in (0, 1))
    draw = np.random.default_rng(0)
    for name in ("one", "two"):
        np.save(tmp_path / f"{name}.npy", draw.integers(3, VOCABULARY, 24 * 32).astype(np.uint16))
    title, _, same, other = told(
        capsys, monkeypatch, "--teacher", teacher, teacher, model, "--windows", 4, "--length", 32,
        "--text", tmp_path / "one.npy", "--text", tmp_path / "two.npy",
    )  # fmt: skip
    assert title[1].endswith("one.npy, 4 windows") and title[2].endswith("two.npy, 4 windows")
    assert same[1:] == ["0.0000 ± 0.0000, 100.0%"] * 2
    for name, cell in zip(("one", "two"), other[1:], strict=True):
        ids = torch.from_numpy(np.load(tmp_path / f"{name}.npy").astype(np.int64)).view(24, 32)[16:20]
        with torch.no_grad():
            p, q = (
                F.log_softmax(
                    AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(ids).logits.double(), -1
                )
                for f in (teacher, model)
            )
        assert float(cell.split()[0]) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=2e-4)


def test_what_is_no_text_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_llama(tmp_path / "teacher", num_hidden_layers=1)
    np.save(tmp_path / "other.npy", np.full(24 * 32, VOCABULARY))
    np.save(tmp_path / "short.npy", np.ones(100, np.int64))
    for name, words in (
        ("other.npy", "another vocabulary"),
        ("short.npy", "too short"),
        ("no.txt", "no text at"),
    ):
        arguments = ["--teacher", teacher, teacher, "--length", 32, "--text", tmp_path / name]
        monkeypatch.setattr("sys.argv", ["held_out", *map(str, arguments)])
        with pytest.raises(SystemExit, match=f"held_out: .*{words}"):
            held_out.main()
