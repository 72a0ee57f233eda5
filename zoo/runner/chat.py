"""Conversations: as a prompt, by the model's own template, and on the terminal."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from zoo.errors import FormatError, UsageError
from zoo.progress import say

TEMPLATE_PROGRAM = Path(__file__).with_name("chat_template.py")
PATIENCE_S = 60.0  # the program's own limit, on computing, is less; this is for a machine that stands still


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special: Mapping[str, str],
    *,
    add_generation_prompt: bool = True,
) -> str:
    """The prompt for a conversation, as transformers' `apply_chat_template` renders it.

    special: bos_token, eos_token ... as the template may name them. Raises UsageError where the template
    refuses the conversation, FormatError for a template that is wrong or computes without end.
    """
    variables = {
        **special,
        "messages": [dict(message) for message in messages],
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        request = json.dumps({"template": template, "variables": variables}, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            "the conversation is not valid Unicode", saw=ascii(error.object[error.start :])[:60]
        ) from error
    try:
        done = subprocess.run(
            [sys.executable, "-P", TEMPLATE_PROGRAM],
            input=request,
            capture_output=True,
            timeout=PATIENCE_S,
            check=False,
        )
        answer = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError) as error:
        raise FormatError(
            "the model's chat template computes for too long, or too much", try_="zoo generate, with a prompt"
        ) from error
    if "refused" in answer:
        raise UsageError("the model's chat template refuses this conversation", saw=answer["refused"])
    if "error" in answer:
        raise FormatError("the model's chat template does not work", saw=answer["error"])
    return str(answer["text"])


def converse(
    answer: Callable[[list[dict[str, str]]], Generator[str, None, None]],
    lines: Iterator[str],
    show: Callable[[str], None],
) -> None:
    """Read what a person says line by line and show the answers, until the lines end or /quit.

    answer: pieces of the reply to a conversation. /reset forgets the conversation; KeyboardInterrupt ends an
    answer, of which the conversation keeps what was shown.
    """
    messages: list[dict[str, str]] = []
    for line in lines:
        said = line.strip()
        if said == "/quit":
            return
        if said == "/reset":
            messages = []
            say("the conversation begins anew")
            continue
        if said.startswith("/"):
            say("/reset begins anew, /quit leaves (Ctrl-D too), Ctrl-C stops an answer")
            continue
        if not said:
            continue
        asked = [*messages, {"role": "user", "content": said}]
        pieces: list[str] = []
        try:
            with closing(answer(asked)) as reply:
                for piece in reply:
                    pieces.append(piece)
                    show(piece)
        except KeyboardInterrupt:
            pass
        except UsageError as error:  # such as a conversation that is longer than the context
            say(str(error))
            continue
        finally:
            show("\n")
        messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]
