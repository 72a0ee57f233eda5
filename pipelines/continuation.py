"""Text that a model writes itself: sampled continuations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from zoo.errors import NumericsError
from zoo.progress import track

TEMPERATURE = 1.0
TOP_K = 50


@torch.no_grad()
def continued(model: Any, start: Tensor, length: int, what: str, temperature: float = TEMPERATURE) -> Tensor:
    """Sampled continuations of `start` (batch, tokens) up to `length` tokens, none ending before that.

    Every next token is drawn from the TOP_K likeliest. Returns (batch, length) int64, on the CPU. Raises
    NumericsError if the model's logits are not finite.

    transformers' own `generate` copies the whole cache for every token, and draws from the whole vocabulary:
    2 to 3 times slower for a small model and a large batch.
    """
    head = model.get_output_embeddings().weight
    ends = torch.as_tensor(_ends(model), dtype=torch.int64, device=head.device)
    cache = Cache(layers=[_Preallocated(length) for _ in range(model.config.num_hidden_layers)])
    ids = torch.empty(len(start), length, dtype=torch.int64, device=head.device)
    ids[:, : start.shape[1]] = start
    new, finite = ids[:, : start.shape[1]], torch.ones((), dtype=torch.bool, device=head.device)
    for at in track(range(start.shape[1], length), what):
        hidden = model.base_model(input_ids=new, past_key_values=cache, use_cache=True).last_hidden_state
        logits = hidden[:, -1] @ head.t()
        finite &= logits.isfinite().all()
        logits[:, ends] = -torch.inf
        likeliest, tokens = logits.topk(min(TOP_K, logits.shape[1]))
        odds = (likeliest.float() / temperature).softmax(-1)
        # the largest p / e, e exponentially distributed, is one drawn by p; unlike multinomial, on a GPU it
        # neither waits for its numbers nor dies of NaN
        chosen = (odds / torch.empty_like(odds).exponential_()).argmax(-1, keepdim=True)
        new = tokens.gather(1, chosen)
        ids[:, at : at + 1] = new
    if not finite:
        raise NumericsError(
            "the model cannot write: its logits are NaN or infinite",
            try_="check it with `zoo analyze`; it overflows where all its weights are finite",
        )
    return ids.cpu()


def _ends(model: Any) -> list[int]:
    """The tokens that end a text."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


class _Preallocated(DynamicLayer):  # type: ignore[misc]
    """A layer's keys and values in memory for all tokens that there will be."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append (batch, heads, tokens, width) keys and values; returns all there are."""
        new = key_states, value_states
        if not self.is_initialized:
            self.lazy_initialization(*new)
            self.room = [x.new_empty(*x.shape[:2], self.length, x.shape[3]) for x in new]
        begin = self.get_seq_length()
        end = begin + key_states.shape[2]
        for room, states in zip(self.room, new, strict=True):
            room[:, :, begin:end] = states
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values
