"""The calibration windows: token ids that the solvers see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pipelines.continuation import continued
from pipelines.evaluate import load_model
from pipelines.recipe import Calibration
from pipelines.text import Ids, load_tokenizer, read_text, token_ids, windows
from zoo.errors import CalibrationError
from zoo.files import atomic_file

FILE = "windows.npy"
BATCH = 64


def calibrate(setting: Calibration, base: Path, out: Path) -> None:
    """Write the windows (count, length) int64 to `out`/windows.npy.

    Raises CalibrationError when the text has too few tokens.
    """
    if setting.source == "self":
        ids = self_generated(setting, base)
    else:
        tokenizer = load_tokenizer(base)
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
    written = [
        continued(model, batch, setting.length, f"the base model writes {len(batch)} windows to calibrate on")
        for batch in batches
    ]
    ids: Ids = torch.cat(written).numpy()
    return ids
