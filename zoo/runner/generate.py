"""Text from a packed model: `load` it, then `.generate`, `.chat`, `.logits`.

Several prompts run at once, each in a slot of the engine. A slot is refilled as soon as its text is
finished (continuous batching); prompts are read in chunks that share a call with the running texts' single
tokens, so that no text stands still for long.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from tokenizers import Tokenizer

from zoo.entry import EntryId
from zoo.errors import FormatError, UsageError, ZooError
from zoo.runner import chat, rope
from zoo.runner.engine import Engine, open_engine
from zoo.runner.packed import FILE, Packed
from zoo.runner.sample import Options, sample
from zoo.runner.streaming import Detokenizer, StopStrings

PROMPT_CHUNK = 256  # tokens of prompts in one call of the engine
STORE = "~/.cache/sparse-zoo"

Events = Generator[tuple[int, str, "Generation | None"], None, None]
FinishReason = Literal["stop", "length", "context"]
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Generation:
    """One finished text."""

    text: str  # whole characters, before a stop string
    ids: list[int]  # all generated tokens, the one that ended the text included
    finish_reason: FinishReason  # end token or stop string; max_tokens; the engine's context is full
    prompt_tokens: int
    generated_tokens: int
    seconds_to_first_token: float  # from when its slot was free
    tokens_per_s: float  # of the tokens after the first, or of the only one


@dataclass(frozen=True)
class Part:
    """Consecutive tokens of one slot's sequence, for one call of the engine."""

    slot: int
    start: int  # position of the first
    ids: Sequence[int]
    wanted: int  # logits are wanted after so many of the last tokens


class Stream:
    """Pieces of one text as they come; `result` once there are no more."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._result: Generation | None = None

    def __iter__(self) -> Iterator[str]:
        for _, piece, result in self._events:
            self._result = result
            if piece:
                yield piece

    def close(self) -> None:
        """End the text here, so that the model is free for another."""
        self._events.close()

    @property
    def result(self) -> Generation:
        if self._result is None:
            raise UsageError("the text is not finished", try_="read the stream to its end first")
        return self._result


class Model:
    """A packed model that is ready to run. One generation at a time; several models may run in threads."""

    def __init__(self, packed: Packed, engine: Engine) -> None:
        self.packed = packed
        self.engine = engine
        self._tokenizer = _tokenizer(packed)
        self._held: list[list[int]] = [[] for _ in range(engine.slots)]  # tokens whose keys are in each slot
        self._busy = threading.Lock()

    # --- text and tokens ---

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises UsageError where the file holds none."""
        if self._tokenizer is None:
            raise UsageError(
                f"{self.packed.path} holds no tokenizer", try_="pack a folder that holds tokenizer.json"
            )
        return self._tokenizer

    def tokens(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a text; with `special`, as a prompt: with the tokens that the model's prompts begin with."""
        try:
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise UsageError("the text is not valid Unicode", saw=ascii(text)[:60]) from error
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids)))

    # --- logits ---

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits after every token of a sequence: (tokens, vocabulary)."""
        ids = list(ids)
        self._check_length(ids)
        step = self._chunk(ids)
        with self._alone():
            parts = [Part(0, at, ids[at : at + step], step) for at in range(0, len(ids), step)]
            return np.concatenate([self._forward([part])[0] for part in parts])

    def forward(self, parts: Sequence[Part]) -> list[NDArray[np.float32]]:
        """One call of the engine: for each part, logits (wanted, vocabulary) after its last tokens."""
        with self._alone():
            return self._forward(parts)

    def _forward(self, parts: Sequence[Part]) -> list[NDArray[np.float32]]:
        for part in parts:
            del self._held[part.slot][part.start :]  # not whole until the call is over
        counts = np.array([len(part.ids) for part in parts])
        ends = np.cumsum(counts)
        wants = np.minimum([part.wanted for part in parts], counts)
        found = self.engine.forward(
            # What is no id must not become one by being cut to 32 bits.
            np.array([min(max(token, -1), 2**31 - 1) for part in parts for token in part.ids], np.int32),
            np.repeat([part.slot for part in parts], counts).astype(np.int32),
            np.concatenate([np.arange(p.start, p.start + len(p.ids)) for p in parts]).astype(np.int32),
            np.concatenate([np.arange(end - n, end) for end, n in zip(ends, wants, strict=True)]).astype(
                np.int32
            ),
        )
        for part in parts:
            self._held[part.slot].extend(part.ids)
        return np.split(found, np.cumsum(wants)[:-1])

    # --- generation ---

    @overload
    def generate(self, prompt: str, *, stream: Literal[False] = False, **options: Any) -> Generation: ...
    @overload
    def generate(
        self, prompt: list[str], *, stream: Literal[False] = False, **options: Any
    ) -> list[Generation]: ...
    @overload
    def generate(self, prompt: str, *, stream: Literal[True], **options: Any) -> Stream: ...
    def generate(
        self, prompt: str | list[str], *, stream: bool = False, **options: Any
    ) -> Generation | list[Generation] | Stream:
        """Go on with a prompt, or with several at once; `options` are those of `Options`, stop one or more.

        Every prompt draws from a generator of its own, begun with `seed`: its text does not depend on the
        others. Raises UsageError for options or prompts that cannot be, NumericsError where a model breaks.
        """
        chosen = _options(options)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if stream and not isinstance(prompt, str):
            raise UsageError("a stream is of one prompt", saw=f"{len(prompts)} prompts")
        ids = [self._prompt(text) for text in prompts]
        if stream:
            return Stream(self.run(ids, [chosen]))
        found = self.generate_ids(ids, [chosen] * len(ids))
        return found[0] if isinstance(prompt, str) else found

    @overload
    def chat(self, messages: Messages, *, stream: Literal[False] = False, **options: Any) -> Generation: ...
    @overload
    def chat(self, messages: Messages, *, stream: Literal[True], **options: Any) -> Stream: ...
    def chat(self, messages: Messages, *, stream: bool = False, **options: Any) -> Generation | Stream:
        """Answer a conversation: [{"role": "user", "content": "..."}, ...], by the model's chat template.

        What the conversation shares with the one before is not read again.
        """
        chosen = _options(options)
        ids = self.tokens(self.prompt_of(messages), special=False)
        events = self.run([ids], [chosen], reuse=True)
        if stream:
            return Stream(events)
        *_, (_, _, result) = events
        assert result is not None
        return result

    def prompt_of(self, messages: Messages, *, add_generation_prompt: bool = True) -> str:
        """A conversation as the text that the model was trained on."""
        text = self.packed.text
        if text.chat_template is None:
            raise UsageError(f"{self.packed.path} has no chat template", try_="zoo generate, with a prompt")
        return chat.render(
            text.chat_template, messages, text.special, add_generation_prompt=add_generation_prompt
        )

    def generate_ids(self, prompts: Sequence[Sequence[int]], options: Sequence[Options]) -> list[Generation]:
        """As `generate`, of prompts that are tokens already, each with its own options."""
        found = {index: result for index, _, result in self.run(prompts, options) if result is not None}
        return [found[index] for index in range(len(prompts))]

    def run(
        self, prompts: Sequence[Sequence[int]], options: Sequence[Options], *, reuse: bool = False
    ) -> Events:
        """Yield (prompt's index, new text, the result with its last piece) as texts grow.

        reuse: what a slot already holds of a prompt is not computed again. Results then depend, within
        rounding, on what ran before.
        """
        for prompt in prompts:
            self._check_length(prompt)
        tokenizer = self.tokenizer
        chosen = enumerate(zip(prompts, options, strict=True))
        return self._run([_Sequence(i, list(ids), o, tokenizer) for i, (ids, o) in chosen], reuse)

    def _run(self, sequences: list[_Sequence], reuse: bool) -> Events:
        with self._alone():
            waiting = deque(sequences)
            # Texts whose rotation depends on their length run alone: engines keep one rotation at a time.
            alone = rope.depends_on_length(self.packed.architecture)
            free = list(range(1 if alone else self.engine.slots))
            running: list[_Sequence] = []
            while waiting or running:
                while free and waiting:
                    running.append(self._placed(waiting.popleft(), free, reuse))
                parts = self._parts(running)
                logits = self._forward([part for _, part in parts])
                for (sequence, part), rows in zip(parts, logits, strict=True):
                    sequence.done += len(part.ids)
                    if not part.wanted:
                        continue
                    piece = sequence.grow(rows[-1], self.packed.text.eos, self.engine.context)
                    if sequence.finished:
                        running.remove(sequence)
                        free.append(sequence.slot)
                        yield sequence.index, piece, sequence.result()
                    elif piece:
                        yield sequence.index, piece, None

    def _placed(self, sequence: _Sequence, free: list[int], reuse: bool) -> _Sequence:
        """Give a sequence one of the free slots."""
        sequence.slot = slot = free[0]
        if reuse and not rope.depends_on_length(self.packed.architecture):
            sequence.slot = slot = max(free, key=lambda s: _common(self._held[s], sequence.ids))
            # The last token has to run, for its logits.
            sequence.done = min(_common(self._held[slot], sequence.ids), len(sequence.ids) - 1)
        free.remove(slot)
        sequence.started = time.perf_counter()
        return sequence

    def _parts(self, running: list[_Sequence]) -> list[tuple[_Sequence, Part]]:
        """What the next call computes: every running text's last token, and chunks of prompts.

        Chunks begin at the same positions whatever else is running, so that rounding is the same too.
        """
        parts, room = [], PROMPT_CHUNK
        for sequence in running:
            left = len(sequence.ids) - sequence.done
            count = min(left, self._chunk(sequence.ids))
            if left > 1:
                if count > room < PROMPT_CHUNK:
                    continue
                room -= count
            ids = sequence.ids[sequence.done : sequence.done + count]
            parts.append((sequence, Part(sequence.slot, sequence.done, ids, int(count == left))))
        return parts

    def _chunk(self, ids: Sequence[int]) -> int:
        """Tokens of a prompt in one call: all, where their rotation depends on how many they are."""
        return len(ids) if rope.depends_on_length(self.packed.architecture) else PROMPT_CHUNK

    def _prompt(self, text: str) -> list[int]:
        ids = self.tokens(text)
        bos = self.packed.text.bos
        return ids if ids or bos is None else [bos]

    def _check_length(self, ids: Sequence[int]) -> None:
        if not len(ids):
            raise UsageError("the prompt is empty", expected="at least one token")
        if len(ids) > self.engine.context:
            made_for = self.packed.architecture.context
            raise UsageError(
                "the prompt is longer than the context",
                saw=f"{len(ids)} tokens",
                expected=f"at most {self.engine.context}",
                try_=f"a larger context; the model was made for {made_for}"
                if made_for > self.engine.context
                else None,
            )

    def _alone(self) -> _Alone:
        return _Alone(self._busy)


class _Alone:
    """Holds the model; refuses, rather than waits, because who waits may be the one who holds it."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise UsageError(
                "the model is generating already",
                try_="read the other stream to its end or close it, or load the model once more",
            )

    def __exit__(self, *_: object) -> None:
        self._lock.release()


@dataclass
class _Sequence:
    """A text that is being made."""

    index: int
    ids: list[int]  # the prompt, then what was generated
    options: Options
    tokenizer: Tokenizer
    slot: int = -1
    done: int = 0  # tokens whose keys are in the slot
    finished: FinishReason | None = None
    started: float = 0.0
    times: list[float] = field(default_factory=list)  # of the first and the latest token
    pieces: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt = len(self.ids)
        self.rng = np.random.default_rng(self.options.seed)
        self.detokenizer = Detokenizer(self.tokenizer, self.ids)
        self.stop = StopStrings(self.options.stop)

    def grow(self, logits: NDArray[np.float32], eos: Sequence[int], context: int) -> str:
        """Add a token; the text that may be shown now. Sets `finished`."""
        token = sample(logits, self.options, self.rng, self.ids)
        self.ids.append(token)
        self.times[1:] = [time.perf_counter()]
        piece = ""
        if token in eos:
            self.finished = "stop"
        else:
            piece = self.stop.add(self.detokenizer.add(token))
            if self.stop.found:
                self.finished = "stop"
            elif len(self.ids) - self.prompt >= self.options.max_tokens:
                self.finished = "length"
            elif len(self.ids) > context:
                self.finished = "context"
        if self.finished and not self.stop.found:
            piece += self.stop.add(self.detokenizer.rest()) + self.stop.rest()
        self.pieces.append(piece)
        return piece

    def result(self) -> Generation:
        assert self.finished
        ids = self.ids[self.prompt :]
        first, last = self.times[0], self.times[-1]
        rate = (len(ids) - 1) / (last - first) if len(ids) > 1 else 1 / (first - self.started)
        return Generation(
            text="".join(self.pieces),
            ids=ids,
            finish_reason=self.finished,
            prompt_tokens=self.prompt,
            generated_tokens=len(ids),
            seconds_to_first_token=first - self.started,
            tokens_per_s=rate,
        )


def load(
    id_or_path: str | Path,
    *,
    threads: int | None = None,
    context: int | None = None,
    kv: Literal["f16", "int8"] = "f16",
    slots: int = 1,
    store: Path | None = None,
) -> Model:
    """A model to run: a packed file, a folder that holds one, or the id of an entry in the store.

    threads: None takes all cores. context: tokens per text, prompt included; None: what the model was made
    for, at most 4096. kv: how keys and values are kept. slots: texts that run at once. store: None takes
    ZOO_STORE, or the usual one. Raises UsageError, FormatError, NumericsError.
    """
    packed = Packed(find(id_or_path, store))
    return Model(packed, open_engine(packed, slots=slots, context=context, threads=threads, kv=kv))


def find(id_or_path: str | Path, store: Path | None = None) -> Path:
    """The packed file of a path or an entry's id. Raises UsageError, ZooError where there is none."""
    path = Path(id_or_path).expanduser()
    if path.is_dir():
        if (path / FILE).is_file():
            return path / FILE
        raise UsageError(f"{path} holds no {FILE}", try_=f"zoo pack {path} makes one of a model's folder")
    if path.exists():
        return path
    try:
        entry_id = TypeAdapter(EntryId).validate_python(str(id_or_path))
    except ValidationError as error:
        raise UsageError(
            f"there is no file {id_or_path}", expected=f"a packed file, a folder with {FILE}, or an id"
        ) from error
    root = (store or Path(os.environ.get("ZOO_STORE") or STORE)).expanduser()
    folder = root / "entries" / entry_id
    if not folder.is_dir():
        raise UsageError(
            f"there is no entry {entry_id} in {root}, nor a file of that name",
            try_="zoo list shows the entries, zoo run RECIPE makes one; --store names another store",
        )
    found = sorted(folder.rglob(FILE))
    if not found:
        raise ZooError(
            f"entry {entry_id} has no packed model",
            saw=f"no {FILE} in {folder}",
            try_="a recipe that exports the packed format, or zoo pack of the entry's model",
        )
    return found[0]


def _options(options: Mapping[str, Any]) -> Options:
    known = Options.__dataclass_fields__
    if unknown := sorted(set(options) - set(known)):
        raise UsageError(f"there is no option {unknown[0]}", expected=", ".join(known))
    stop = options.get("stop", ())
    return Options(**{**options, "stop": (stop,) if isinstance(stop, str) else tuple(stop)})


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the beginning that two sequences share."""
    same = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        same += 1
    return same


def _tokenizer(packed: Packed) -> Tokenizer | None:
    data = packed.tokenizer_json
    if data is None:
        return None
    try:
        tokenizer = Tokenizer.from_str(data.decode())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        raise FormatError(
            f"the tokenizer in {packed.path} cannot be read", saw=str(error).partition("\n")[0][:200]
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
