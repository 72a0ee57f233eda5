"""Models that lm-eval asks: a folder (transformers), a GGUF file (llama.cpp), a packed file (our runner)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import LM
from lm_eval.models import huggingface

from pipelines import zoo_gguf, zoo_sparse
from pipelines.evaluate import load_model
from pipelines.export_gguf import TYPES
from zoo.runner import native

CONTEXT = 4096  # tokens at most, so that one sequence's logits stay below 1 GiB
LOGITS_BYTES = 1 << 30
MAX_BATCH = 32


class Model(huggingface.HFLM):  # type: ignore[misc]
    """lm-eval's model, its batches as large as the logits may be; lm-eval itself tries until memory ends."""

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        length = len(requests[pos][1]) + len(requests[pos][2]) if requests else self.max_length
        # float32 logits and their log-softmax
        per_sequence: int = 8 * min(length, self.max_length) * self.model.config.vocab_size
        return max(1, min(MAX_BATCH, LOGITS_BYTES // per_sequence))


def open_lm(path: Path, threads: int | None, batch_size: int | None) -> tuple[LM, str]:
    """The model at `path`, with `max_length` at most CONTEXT, and in what its forward pass computes.

    threads: None means as the engine has it. batch_size: of a folder; None means what fits in LOGITS_BYTES.
    """
    if path.suffix == ".gguf":
        gguf = zoo_gguf.ZooGguf(str(path), max_length=CONTEXT, threads=threads)
        names = {number: name for name, number in TYPES.items()}
        return gguf, f"{names.get(gguf.file_type, 'unknown type')}, llama.cpp"
    if path.suffix == ".safetensors":
        packed = zoo_sparse.ZooSparse(str(path), threads=threads)  # which takes CONTEXT at most by itself
        return packed, f"packed, {native.ISA if native.AVAILABLE else 'NumPy'}"
    if threads is not None:
        torch.set_num_threads(threads)
    model, tokenizer = load_model(path)
    longest = getattr(model.config, "max_position_embeddings", None) or model.config.max_seq_len
    lm = Model(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size or "auto",
        max_length=min(CONTEXT, longest),
    )
    return lm, str(model.dtype).removeprefix("torch.")


def watched(bar: type) -> None:
    """Have all of them draw their progress with `bar` instead of tqdm."""
    huggingface.tqdm = bar
    zoo_sparse.tqdm = zoo_gguf.tqdm = bar  # type: ignore[attr-defined]
