"""llama.cpp as a model of lm-eval, in this process: GGUF files answer the very same tasks as all others.

Importing this module registers it:

    lm_eval.simple_evaluate(model="zoo-gguf", model_args="path=model-Q4_0.gguf", tasks=["..."])

(lm-eval's own `gguf` asks a server over HTTP, one request at a time, for text rather than tokens.)
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from numpy.typing import NDArray
from tqdm import tqdm  # type: ignore[import-untyped]

from pipelines.zoo_sparse import CALL, Score, fitted, prompted, rolling
from zoo.errors import FormatError, UsageError
from zoo.formats import check_gguf
from zoo.runner.sample import Options, sample

CELLS = 1024  # positions in the cache at a time: every token is compared with all of them
SEQUENCES = 16  # in the cache at a time
SLOTS = 8  # texts that are generated at once


@register_model("zoo-gguf")
class ZooGguf(TemplateLM):  # type: ignore[misc]
    """lm-eval's interface to llama.cpp. Raises FormatError for what is no GGUF that llama.cpp runs."""

    def __init__(
        self, path: str, max_length: int | None = None, threads: int | None = None, **_: Any
    ) -> None:
        """threads: None means one for every two logical cores, as llama-cpp-python has it."""
        super().__init__()
        check_gguf(Path(path))
        try:
            # This object reads the file and tokenizes; its own context is never used.
            self.llama = llama_cpp.Llama(path, n_ctx=8, n_threads=threads, verbose=False)
        except ValueError as error:
            raise FormatError(f"llama.cpp cannot load {path}", saw=str(error)) from error
        trained = llama_cpp.llama_model_n_ctx_train(self.llama.model)
        self.max_length = min(max_length or trained, trained)
        self._context: _Context | None = None

    @property
    def file_type(self) -> int:
        return int(self.llama.metadata.get("general.file_type", -1))

    # --- tokens ---

    @property
    def eot_token_id(self) -> int:
        return int(self.llama.token_eos())

    @property
    def prefix_token_id(self) -> int:
        bos = int(self.llama.token_bos())
        return self.eot_token_id if bos < 0 else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids: list[int] = self.llama.tokenize(
            string.encode(), add_bos=add_special_tokens is not False, special=True
        )
        return ids

    # --- requests ---

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[Score]:
        pairs = [fitted(context, continuation, self.max_length) for _, context, continuation in requests]
        bar = tqdm(total=len(pairs), disable=disable_tqdm, desc="log-likelihoods")
        longest = max((len(context) + len(continuation) for context, continuation in pairs), default=1)
        scores = self._scores(pairs, max(CELLS, longest), bar.update)
        bar.close()
        return scores

    def mean_loss(self, window: Sequence[int]) -> float:
        """Mean negative log-likelihood in nats of all tokens but the first, as `evaluate.mean_losses`."""
        pair = list(window[:1]), list(window[1:])
        ((total, _),) = self._scores([pair], len(window), lambda _: None)
        return -total / (len(window) - 1)

    def _scores(
        self, pairs: Sequence[tuple[list[int], list[int]]], cells: int, tell: Callable[[int], object]
    ) -> list[Score]:
        """Of each (context, continuation), in a cache of `cells`; `tell` is told of pairs that are done."""
        sums, greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)
        for pack in _packs(pairs):
            running = self._open(cells)
            for at in range(0, len(pack.tokens), CALL):
                tokens = pack.tokens[at : at + CALL]
                _add_scores(sums, greedy, running.decode(tokens), [t for t in tokens if t.asked])
            running.clear()
            tell(pack.requests)
        return [(float(value), bool(best)) for value, best in zip(sums, greedy, strict=True)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        return rolling(self, requests, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts, options = prompted(self, requests)
        answers = [""] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="answers")
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        for at in range(0, len(order), SLOTS):
            some = order[at : at + SLOTS]
            found = self._answers([prompts[i] for i in some], [options[i] for i in some])
            for index, answer in zip(some, found, strict=True):
                answers[index] = answer
                bar.update()
        bar.close()
        return answers

    def _answers(self, prompts: Sequence[list[int]], options: Sequence[Options]) -> list[str]:
        """Go on with several prompts at once."""
        cells = sum(len(ids) + o.max_tokens for ids, o in zip(prompts, options, strict=True))
        running = self._open(max(CELLS, cells))
        vocabulary = llama_cpp.llama_model_get_vocab(self.llama.model)
        random = [np.random.default_rng(o.seed) for o in options]
        texts, answers = [list(ids) for ids in prompts], [""] * len(prompts)
        new = [
            _Token(token, at, [sequence], [(sequence, 0)] if at == len(ids) - 1 else [])
            for sequence, ids in enumerate(prompts)
            for at, token in enumerate(ids)
        ]
        while new:
            asked: list[tuple[_Token, NDArray[np.float32]]] = []
            for at in range(0, len(new), CALL):
                tokens = new[at : at + CALL]
                asked += zip([t for t in tokens if t.asked], running.decode(tokens), strict=True)
            new = []
            for token, logits in asked:
                (s,) = token.sequences
                chosen = sample(logits, options[s], random[s], texts[s])
                texts[s].append(chosen)
                own = texts[s][len(prompts[s]) :]
                text = _text(vocabulary, own)
                stops = [at for at in map(text.find, options[s].stop) if at >= 0]
                answers[s] = text[: min(stops, default=len(text))]
                ended = llama_cpp.llama_vocab_is_eog(vocabulary, chosen)
                if not (ended or stops or len(own) == options[s].max_tokens):
                    new.append(_Token(chosen, len(texts[s]) - 1, [s], [(s, 0)]))
        running.clear()
        return answers

    def _open(self, cells: int) -> _Context:
        if self._context is None or self._context.cells != cells:  # results depend on this request alone
            self._context = None  # its memory is free before the next takes some
            self._context = _Context(self.llama, cells)
        return self._context


@dataclass
class _Token:
    """A token in llama.cpp's cache; texts that begin alike share it."""

    id: int
    position: int
    sequences: list[int]
    asked: list[tuple[int, int]] = field(default_factory=list)  # (request, the token it has next)


@dataclass
class _Pack:
    """Texts that are in the cache together, as a tree: every token once, those before it first."""

    tokens: list[_Token]
    requests: int


def _packs(pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[_Pack]:
    """All (context, continuation) pairs, in packs that fit into CELLS; a longer text has its own.

    The answers to a question share its context, and questions after the same examples share those.
    """
    texts = [context + continuation[:-1] for context, continuation in pairs]
    pack, path = _Pack([], 0), list[_Token]()
    for index in sorted(range(len(pairs)), key=texts.__getitem__):
        text, (context, continuation) = texts[index], pairs[index]
        shared = _common([token.id for token in path], text)
        if pack.requests and (pack.requests == SEQUENCES or len(pack.tokens) + len(text) - shared > CELLS):
            yield pack
            pack, path, shared = _Pack([], 0), [], 0
        for token in path[:shared]:
            token.sequences.append(pack.requests)
        new = [_Token(text[at], at, [pack.requests]) for at in range(shared, len(text))]
        path = path[:shared] + new
        pack.tokens += new
        pack.requests += 1
        for token, target in zip(path[len(context) - 1 :], continuation, strict=True):
            token.asked.append((index, target))
    if pack.requests:
        yield pack


def _text(vocabulary: Any, ids: Sequence[int]) -> str:
    """Text of ids, without special tokens and characters that are not whole."""
    tokens = (llama_cpp.llama_token * len(ids))(*ids)
    size = -llama_cpp.llama_detokenize(vocabulary, tokens, len(ids), None, 0, True, False)
    buffer = ctypes.create_string_buffer(max(size, 1))
    size = llama_cpp.llama_detokenize(vocabulary, tokens, len(ids), buffer, size, True, False)
    return buffer.raw[: max(size, 0)].decode(errors="ignore")


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for at, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return at
    return min(len(one), len(other))


def _add_scores(
    sums: NDArray[np.float64],
    greedy: NDArray[np.bool_],
    logits: NDArray[np.float32],
    tokens: Sequence[_Token],
) -> None:
    """Add what each token says of those that were asked. logits (tokens, vocabulary)."""
    if not tokens:
        return
    best = logits.argmax(axis=1)
    most = logits[np.arange(len(tokens)), best]
    total = np.log(np.exp(logits - most[:, None]).sum(axis=1, dtype=np.float64))
    for row, token in enumerate(tokens):
        for request, target in token.asked:
            sums[request] += float(logits[row, target]) - float(most[row]) - total[row]
            greedy[request] &= bool(best[row] == target)


def _free(context: Any, batch: Any) -> None:
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)


class _Context:
    """llama.cpp's cache and batch. Every sequence shares one buffer, so that a token can be of several."""

    def __init__(self, llama: llama_cpp.Llama, cells: int) -> None:
        self.cells = cells
        self._vocabulary = llama.n_vocab()
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = cells
        parameters.n_batch = parameters.n_ubatch = CALL
        parameters.n_seq_max = SEQUENCES
        parameters.kv_unified = True
        parameters.n_threads = parameters.n_threads_batch = llama.n_threads
        self._llama = llama  # the model must live as long
        self._context = llama_cpp.llama_init_from_model(llama.model, parameters)
        if not self._context:
            raise UsageError(
                f"llama.cpp cannot make a context of {cells} tokens", try_="a smaller max_length"
            )
        self._batch = llama_cpp.llama_batch_init(CALL, 0, SEQUENCES)
        self._close = weakref.finalize(self, _free, self._context, self._batch)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)

    def decode(self, tokens: Sequence[_Token]) -> NDArray[np.float32]:
        """Run at most CALL tokens; logits after each that is asked anything: (asked, vocabulary)."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for row, token in enumerate(tokens):
            batch.token[row], batch.pos[row] = token.id, token.position
            batch.n_seq_id[row] = len(token.sequences)
            for at, sequence in enumerate(token.sequences):
                batch.seq_id[row][at] = sequence
            batch.logits[row] = bool(token.asked)
        code = llama_cpp.llama_decode(self._context, batch)
        if code != 0:
            raise FormatError(f"llama.cpp failed with code {code} on {len(tokens)} tokens")
        rows = [row for row, token in enumerate(tokens) if token.asked]
        found = np.empty((len(rows), self._vocabulary), np.float32)
        for at, row in enumerate(rows):
            pointer = llama_cpp.llama_get_logits_ith(self._context, row)
            ctypes.memmove(found[at].ctypes.data, pointer, found[at].nbytes)
        return found
