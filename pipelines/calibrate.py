"""The calibration windows: token ids that the solvers see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.evaluate import load_model
from pipelines.recipe import Calibration
from pipelines.text import Ids, read_text, token_ids, windows
from zoo.errors import CalibrationError, NumericsError
from zoo.files import atomic_file
from zoo.progress import track

FILE = "windows.npy"
TEMPERATURE = 1.0
TOP_K = 50
BATCH = 64


def calibrate(setting: Calibration, base: Path, out: Path) -> None:
    """Write the windows (count, length) int64 to `out`/windows.npy.

    Raises CalibrationError when the text has too few tokens.
    """
    if setting.source == "self":
        ids = self_generated(setting, base)
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False)
        enough = setting.windows * setting.length * 16  # bytes; more than any tokenizer needs
        text = read_text(setting.source, column=setting.column, limit_bytes=enough)
        ids = windows(token_ids(tokenizer, text), setting.windows, setting.length)
    with atomic_file(out / FILE) as temporary, temporary.open("wb") as file:
        np.save(file, ids.astype(np.int64))


def load_windows(folder: Path) -> torch.Tensor:
    """(count, length) int64."""
    return torch.from_numpy(np.load(folder / FILE, allow_pickle=False))


def self_generated(setting: Calibration, base: Path) -> Ids:
    """Windows that the base model writes itself: one random token each, then sampled.

    No text has to be at hand, and it is what the model was trained to expect.
    Source: LLM-QAT, arXiv:2305.17888, section 3.1.
    """
    model, tokenizer = load_model(base)
    context = getattr(model.config, "max_position_embeddings", None) or model.config.max_seq_len
    if setting.length > context:
        raise CalibrationError(
            f"the model cannot write windows of {setting.length} tokens",
            saw=f"a context of {context} tokens",
            try_=f"--set calibration.length={context}",
        )
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([i for i in range(len(tokenizer)) if i not in special])
    generator = torch.Generator().manual_seed(setting.seed)
    first = ordinary[torch.randint(len(ordinary), (setting.windows, 1), generator=generator)]
    torch.manual_seed(setting.seed)
    batches = torch.split(first, BATCH)
    written = [_continued(model, batch.to(model.device), setting.length) for batch in batches]
    ids: Ids = torch.cat(written).numpy()
    return ids


def _continued(model: Any, start: torch.Tensor, length: int) -> torch.Tensor:
    """Sampled continuations of `start` (batch, 1), as (batch, length)."""
    progress = track(range(length - 1), f"the base model writes {len(start)} windows to calibrate on")

    def tick(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        next(progress, None)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)  # never stop for this

    try:
        ids: torch.Tensor = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=TOP_K,
            min_new_tokens=length - 1,
            max_new_tokens=length - 1,
            pad_token_id=0,
            stopping_criteria=[tick],
        )
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise NumericsError(
            "the base model cannot write: its logits are NaN or infinite",
            try_="check the base model with `zoo analyze`; it overflows where all its weights are finite",
        ) from error
    finally:
        progress.close()
    return ids.cpu()
