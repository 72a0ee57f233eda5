"""Data augmentation: what the teacher might have written in place of each token of a text.

A student that sees a text many times learns the teacher's answers on it by heart, and little of its answers
on other text. So from the second pass on some tokens are replaced by samples from the teacher's distribution
at their place, as TinyBERT did with BERT's (arXiv:1909.10351, section 3.2), drawn once for all passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipelines.recipe import Losses, Recover
from pipelines.recover.data import open_tokens
from pipelines.recover.losses import CHUNK_LOGITS
from pipelines.recover.student import Teacher
from zoo.files import Store, sha256_file, sha256_json
from zoo.progress import track

FILE = "alternatives.npy"
CODE_VERSION = 1
BATCH_TOKENS = 1 << 15


def alternatives(
    step: Recover, tokens: Sequence[Path], teacher: Path, teacher_id: str, store: Store
) -> list[Path]:
    """One file (tokens, samples) of token ids for each file of tokens, made once; none without `resample`.

    The text is read in the blocks of the training; `teacher_id` names the teacher's weights by their content.
    """
    if step.resample is None:
        return []
    samples = step.resample.samples
    loaded: list[Teacher] = []
    found = []
    for path in tokens:
        said = {"alternatives": CODE_VERSION, "tokens": sha256_file(path), "teacher": teacher_id}
        key = sha256_json({**said, "samples": samples, "length": step.length})
        with store.locked(key):
            if (done := store.get(key)) is None:
                if not loaded:
                    loaded.append(Teacher(teacher, Losses(), compiled=torch.cuda.is_available()))
                with store.writing(key) as out:
                    _write(out / FILE, path, step.length, samples, loaded[0])
                done = store.path(key)
        found.append(done / FILE)
    return found


def _write(out: Path, path: Path, length: int, samples: int, teacher: Teacher) -> None:
    head = teacher.model.get_output_embeddings().weight
    ids = open_tokens(path, head.shape[0])
    device = head.device
    draw = torch.Generator(device).manual_seed(0)
    made = np.lib.format.open_memmap(out, "w+", ids.dtype, (len(ids), samples))
    made[:] = ids[:, None]  # what has nothing before it stays, and what fills no block
    blocks = ids[: len(ids) // length * length].reshape(-1, length)
    places = made[: blocks.size].reshape(-1, length, samples)
    count = max(BATCH_TOKENS // length, 1)
    for start in track(range(0, len(blocks), count), f"what the teacher might have written in {path.name}"):
        some = torch.from_numpy(blocks[start : start + count].astype(np.int64)).to(device)
        hidden = teacher(some).hidden[:, :-1].flatten(0, 1)
        drawn = _sampled(hidden, head, samples, draw)
        places[start : start + count, 1:] = drawn.view(-1, length - 1, samples).cpu().numpy()
    made.flush()


@torch.no_grad()
def _sampled(hidden: Tensor, head: Tensor, samples: int, draw: torch.Generator) -> Tensor:
    """(n, samples) tokens from the softmax of hidden (n, width) times head (vocabulary, width)."""
    count = max(CHUNK_LOGITS // head.shape[0], 1)
    pieces = [
        torch.multinomial(
            (some.to(head.dtype) @ head.t()).float().softmax(-1), samples, replacement=True, generator=draw
        )
        for some in torch.split(hidden, count)
    ]
    return torch.cat(pieces)
