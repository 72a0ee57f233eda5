"""Text that a model writes itself: sampled continuations."""

from __future__ import annotations

from typing import Any

import torch

from zoo.errors import NumericsError
from zoo.progress import track

TEMPERATURE = 1.0
TOP_K = 50


def continued(
    model: Any, start: torch.Tensor, length: int, what: str, temperature: float = TEMPERATURE
) -> torch.Tensor:
    """Sampled continuations of `start` (batch, tokens) up to `length` tokens, none ending before that.

    Returns (batch, length) int64, on the CPU. Raises NumericsError if the model's logits are not finite.
    """
    new = length - start.shape[1]
    progress = track(range(new), what)

    def tick(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        next(progress, None)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)  # never stop for this

    start = start.to(model.device)
    try:
        ids: torch.Tensor = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            temperature=temperature,
            top_k=TOP_K,
            min_new_tokens=new,
            max_new_tokens=new,
            pad_token_id=0,
            stopping_criteria=[tick],
        )
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise NumericsError(
            "the model cannot write: its logits are NaN or infinite",
            try_="check it with `zoo analyze`; it overflows where all its weights are finite",
        ) from error
    finally:
        progress.close()
    return ids.cpu()
