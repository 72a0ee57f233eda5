"""The sparse runner as a model of lm-eval, so that accuracy is measured on the very bytes that are shipped.

Importing this module registers it:

    lm_eval.simple_evaluate(model="zoo-sparse", model_args="path=packed.safetensors", tasks=["..."])
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from numpy.typing import NDArray
from tqdm import tqdm  # type: ignore[import-untyped]

from zoo.errors import UsageError
from zoo.files import sha256_json
from zoo.runner.generate import PROMPT_CHUNK, Model, Part, load
from zoo.runner.rope import depends_on_length
from zoo.runner.sample import Options

SLOTS = 16
CALL = 512  # tokens of one call of the engine, so that their logits stay below 1 GiB
MAX_TOKENS = 256  # of an answer, where the task does not say
Score = tuple[float, bool]  # log-likelihood of a continuation, and whether greedy choice gives it


@register_model("zoo-sparse")
class ZooSparse(TemplateLM):  # type: ignore[misc]
    """lm-eval's interface to `zoo.runner.generate.Model`."""

    def __init__(
        self,
        path: str | Model,
        max_length: int | None = None,
        threads: int | None = None,
        slots: int = SLOTS,
        kv: Literal["f16", "int8"] = "f16",
        add_bos_token: bool | None = None,
        **_: Any,
    ) -> None:
        """path: a packed file, its folder or an entry's id, or a model that is loaded already.

        add_bos_token: None leaves it to the tokenizer. What else lm-eval gives to every model (batch_size,
        device ...) changes nothing: the engine batches by itself and runs on the CPU.
        """
        super().__init__()
        if not isinstance(path, Model):
            path = load(path, context=max_length, threads=threads, slots=slots, kv=kv)
        self.model = path
        self.add_bos_token = add_bos_token

    # --- tokens ---

    @property
    def max_length(self) -> int:
        return self.model.engine.context

    @property
    def eot_token_id(self) -> int:
        text = self.model.packed.text
        if text.eos:
            return text.eos[0]
        if text.bos is not None:
            return text.bos
        raise UsageError(f"{self.model.packed.path} names no end token, which lm-eval needs")

    @property
    def prefix_token_id(self) -> int:
        bos = self.model.packed.text.bos
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        prefix = self.model.tokenizer.id_to_token(self.prefix_token_id)
        if add_special_tokens is None and prefix and string.startswith(prefix):
            special = False  # it is there already, from the chat template
        return self.model.tokens(string, special=True if special is None else special)

    @property
    def tokenizer_name(self) -> str:
        """By which lm-eval caches requests: of what decides how they look."""
        return sha256_json([(self.model.packed.tokenizer_json or b"").hex(), self.chat_template(True)])

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.model.packed.text.chat_template or ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.model.prompt_of(chat_history, add_generation_prompt=add_generation_prompt)

    # --- requests ---

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[Score]:
        pairs = [fitted(context, continuation, self.max_length) for _, context, continuation in requests]
        scores: list[Score | None] = [None] * len(pairs)
        bar = tqdm(total=len(pairs), disable=disable_tqdm, desc="log-likelihoods")
        for index, score in _scored(self.model, pairs):
            scores[index] = score
            bar.update()
        bar.close()
        return [score for score in scores if score is not None]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        return rolling(self, requests, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts, options = prompted(self, requests)
        answers = [""] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="answers")
        for index, _, result in self.model.run(prompts, options):
            if result is not None:
                answers[index] = result.text
                bar.update()
        bar.close()
        return answers


def rolling(lm: TemplateLM, requests: Sequence[Instance], disable_tqdm: bool) -> list[float]:
    """Log-likelihoods of whole texts, in windows of the model's length."""
    windows: list[tuple[None, list[int], list[int]]] = []
    owners: list[int] = []
    for owner, request in enumerate(requests):
        for window in get_rolling_token_windows(
            token_list=lm.tok_encode(request.args[0]),
            prefix_token=lm.prefix_token_id,
            max_seq_len=lm.max_length,
            context_len=1,
        ):
            windows.append((None, *make_disjoint_window(window)))
            owners.append(owner)
    totals = [0.0] * len(requests)
    scores = lm._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
    for owner, (value, _) in zip(owners, scores, strict=True):
        totals[owner] += value
    return totals


def prompted(model: Any, requests: Sequence[Instance]) -> tuple[list[list[int]], list[Options]]:
    """Token ids of prompts, cut on the left so that the answers fit, and how to go on with each."""
    options = [_generation(request.args[1], model.max_length) for request in requests]
    prompts = [
        model.tok_encode(request.args[0])[chosen.max_tokens - model.max_length :]
        for request, chosen in zip(requests, options, strict=True)
    ]
    return prompts, options


def _generation(arguments: dict[str, Any], longest: int) -> Options:
    """Of what a task says of generation, in the words of transformers. longest: the model's context."""
    chosen = normalize_gen_kwargs(arguments, MAX_TOKENS)
    if chosen["max_gen_toks"] >= longest:
        raise UsageError(
            "a task asks for more tokens than the model's context holds",
            saw=f"{chosen['max_gen_toks']} tokens",
            expected=f"less than {longest}",
        )
    until = chosen.get("until") or []
    greedy = not chosen["do_sample"]
    return Options(
        max_tokens=chosen["max_gen_toks"],
        temperature=0.0 if greedy else float(chosen.get("temperature") or 1.0),
        top_k=int(chosen.get("top_k") or 0),
        top_p=float(chosen.get("top_p") or 1.0),
        min_p=float(chosen.get("min_p") or 0.0),
        repetition_penalty=float(chosen.get("repetition_penalty") or 1.0),
        stop=tuple(filter(None, [until] if isinstance(until, str) else until)),
    )


def fitted(context: list[int], continuation: list[int], longest: int) -> tuple[list[int], list[int]]:
    """The end of both that fits; the last token is not read, and something must predict the first."""
    if len(continuation) > longest:
        raise UsageError(
            "a continuation is longer than the model's context",
            saw=f"{len(continuation)} tokens",
            expected=f"at most {longest}",
        )
    return context[-(longest + 1 - len(continuation)) :], continuation


@dataclass(frozen=True)
class _Piece:
    """Consecutive tokens of a slot's work, and what they should predict."""

    start: int
    ids: list[int]
    targets: list[int]  # the tokens that follow the last len(targets) ids
    index: int = -1  # of the request; -1: a context, which predicts nothing
    last: bool = False  # of this request


def _scored(model: Model, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[int, Score]]:
    """(index, score) of every (context, continuation), as they are ready.

    Continuations of one context follow each other in one slot, and the context is read once: the choices of
    a question cost little more than one.
    """
    share = not depends_on_length(model.packed.architecture)
    contexts: dict[tuple[int, ...], list[int]] = {}  # context -> its requests
    for index, (context, _) in enumerate(pairs):
        contexts.setdefault((*context,) if share else (*context, -1 - index), []).append(index)
    longest_first = sorted(contexts.values(), key=lambda indices: -len(pairs[indices[0]][0]))
    work = deque(deque(_pieces(indices, pairs, share)) for indices in longest_first)
    free = deque(range(model.engine.slots if share else 1))  # engines keep one rotation at a time
    running: deque[tuple[int, deque[_Piece]]] = deque()
    sums = [0.0] * len(pairs)
    greedy = [True] * len(pairs)
    while work or running:
        while free and work:
            running.append((free.popleft(), work.popleft()))
        batch: list[tuple[int, _Piece]] = []
        tokens = 0
        for slot, pieces in list(running):
            if batch and tokens + len(pieces[0].ids) > CALL:
                break
            running.popleft()  # and to the end, so that every slot gets its turn
            batch.append((slot, pieces.popleft()))
            tokens += len(batch[-1][1].ids)
            if pieces:
                running.append((slot, pieces))
            else:
                free.append(slot)
        found = model.forward([Part(slot, p.start, p.ids, len(p.targets)) for slot, p in batch])
        for (_, piece), logits in zip(batch, found, strict=True):
            if piece.index < 0:
                continue
            sums[piece.index] += float(_log_probabilities(logits, piece.targets).sum())
            greedy[piece.index] &= bool((logits.argmax(axis=1) == piece.targets).all())
            if piece.last:
                yield piece.index, (sums[piece.index], greedy[piece.index])


def _pieces(
    indices: Sequence[int], pairs: Sequence[tuple[list[int], list[int]]], share: bool
) -> Iterator[_Piece]:
    """One slot's work: the context but for its last token, then that token with each continuation in turn."""
    context = pairs[indices[0]][0]
    begin = len(context) - 1 if share else 0
    for at in range(0, begin, PROMPT_CHUNK):
        yield _Piece(at, context[at : min(at + PROMPT_CHUNK, begin)], [])
    for index in indices:
        targets = pairs[index][1]
        ids = context[begin:] + targets[:-1]
        step = PROMPT_CHUNK if share else len(ids)
        for at in range(0, len(ids), step):
            # Where the context is not shared, its tokens come first and predict nothing that counts.
            wanted = targets[at : at + step] if share else targets
            yield _Piece(begin + at, ids[at : at + step], wanted, index, at + step >= len(ids))


def _log_probabilities(logits: NDArray[np.float32], targets: Sequence[int]) -> NDArray[np.float64]:
    """Log-probability of each target (n,). logits (n, vocabulary)."""
    rows = logits.astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    of_targets = rows[np.arange(len(targets)), targets]
    return np.asarray(of_targets - np.log(np.exp(rows).sum(axis=1)))
