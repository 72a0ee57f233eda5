"""Choosing the next token from logits: a pure function, and the options it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zoo.errors import NumericsError, UsageError


@dataclass(frozen=True)
class Options:
    """How to generate. The defaults are greedy and repeatable. Raises UsageError for values out of range."""

    max_tokens: int = 256
    temperature: float = 0.0  # 0: always the likeliest token
    top_k: int = 0  # likeliest tokens to choose from; 0: all
    top_p: float = 1.0  # the likeliest tokens that together have this probability
    min_p: float = 0.0  # tokens at least this likely, as a fraction of the likeliest one's probability
    repetition_penalty: float = 1.0  # above 1: tokens seen before become less likely
    seed: int | None = 0  # None: another text every time
    stop: tuple[str, ...] = ()  # the text ends before any of these

    def __post_init__(self) -> None:
        right = {
            "max_tokens": (self.max_tokens >= 1, "1 or more"),
            "temperature": (0 <= self.temperature < math.inf, "0 or more"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0, at most 1"),
            "min_p": (0 <= self.min_p <= 1, "0 to 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "more than 0"),
            "seed": (self.seed is None or self.seed >= 0, "0 or more"),
            "stop": (all(self.stop), "strings that are not empty"),
        }
        for name, (fine, expected) in right.items():
            if not fine:
                raise UsageError(f"{name} cannot be {getattr(self, name)!r}", expected=expected)


def sample(
    logits: NDArray[np.float32], options: Options, rng: np.random.Generator, previous: Sequence[int]
) -> int:
    """The next token's id. logits (vocabulary,); previous: all ids before it, of the prompt too.

    In this order, as transformers has it: repetition penalty (CTRL, arXiv:1909.05858: logits of earlier
    tokens are divided by it, or multiplied if negative), then greedy choice if the temperature is 0; else
    temperature, top-k, top-p (nucleus, arXiv:1904.09751), min-p (arXiv:2407.01082), each on what the one
    before it left. One draw of `rng` per token. Raises NumericsError for logits that are not finite.
    """
    scores = logits.astype(np.float64)
    if not np.isfinite(scores).all():
        raise NumericsError("the model's logits are not finite")
    if options.repetition_penalty != 1 and len(previous):
        seen = np.unique(np.asarray(previous, np.int64))
        penalty = options.repetition_penalty
        scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
    if options.temperature == 0:
        return int(scores.argmax())
    order = np.argsort(-scores, kind="stable")
    with np.errstate(over="ignore", under="ignore"):  # a temperature near 0 leaves the best alone
        probabilities = np.exp((scores[order] - scores[order[0]]) / options.temperature)
    kept = _kept(probabilities, options)
    cumulative = np.cumsum(probabilities[:kept])
    drawn = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
    return int(order[min(int(drawn), kept - 1)])


def _kept(probabilities: NDArray[np.float64], options: Options) -> int:
    """How many of the likeliest tokens stay. probabilities (vocabulary,): descending, not normalized."""
    kept = len(probabilities)
    if options.top_k:  # ties with the last one stay
        last = probabilities[min(options.top_k, kept) - 1]
        kept = int(np.count_nonzero(probabilities >= last))
    if options.top_p < 1:
        cumulative = np.cumsum(probabilities[:kept])
        # Up to and with the token that reaches top_p.
        kept = min(kept, int(np.count_nonzero(cumulative < options.top_p * cumulative[-1])) + 1)
    if options.min_p > 0:
        kept = int(np.count_nonzero(probabilities[:kept] >= options.min_p * probabilities[0]))
    return kept
