"""Text as it comes, token by token: never a broken character, never a part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what decoders make of bytes that are not yet a character
PROMPT_TAIL = 8


class Detokenizer:
    """Turns tokens into text one by one, with as much of the past as decoders need.

    A decoder may drop a space at the beginning of a text, and joins bytes of several tokens into one
    character. So each token is decoded together with those of the last two pieces of text (at first: the
    end of the prompt), and what the past alone decodes to is cut off.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = _end(tokenizer, prompt)
        self._last = 0  # where in _ids the latest piece of text begins
        self._shown = len(self._ids)  # and where it ends
        self._past = tokenizer.decode(self._ids).rstrip(BROKEN)

    def add(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        piece: str = text[len(self._past) :]
        if not piece or text.endswith(BROKEN):
            return ""
        del self._ids[: self._last]
        self._last = self._shown - self._last
        self._shown = len(self._ids)
        self._past = self._tokenizer.decode(self._ids)
        return piece

    def rest(self) -> str:
        """The whole characters left, once no more tokens come."""
        text: str = self._tokenizer.decode(self._ids).rstrip(BROKEN)
        return text[len(self._past) :]


def _end(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    """The last tokens of a prompt, not from within a character on."""
    count = PROMPT_TAIL
    while count < len(prompt) and tokenizer.decode(prompt[-count:]).startswith(BROKEN):
        count *= 2
    return list(prompt[-count:])


class StopStrings:
    """Holds text back for as long as it may be the beginning of a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""
        self.found = False

    def add(self, piece: str) -> str:
        """What may be shown now. Once a stop string is found, what stands before it, and nothing after."""
        self._held += piece
        places = [at for at in map(self._held.find, self._stop) if at >= 0]
        if places:
            self.found = True
            shown, self._held = self._held[: min(places)], ""
            return shown
        keep = max((self._overlap(stop) for stop in self._stop), default=0)
        end = len(self._held) - keep
        shown, self._held = self._held[:end], self._held[end:]
        return shown

    def rest(self) -> str:
        """What was held back, once no more text comes."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that is a beginning of `stop`."""
        lengths = range(min(len(stop) - 1, len(self._held)), 0, -1)
        return next((n for n in lengths if self._held.endswith(stop[:n])), 0)
