"""Renders one chat template, as a program of its own: a JSON request on standard input, a JSON answer out.

Chat templates come with models from anywhere, and Jinja cannot bound what a template computes. So this runs
in a process with little time and memory, besides Jinja's sandbox. It imports nothing of the zoo.
Language and globals are those of transformers' `apply_chat_template`.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS = 2
MEMORY = 512 << 20
TEXT = 4 << 20  # characters of the answer


class Generation(Extension):
    """{% generation %} marks what the assistant wrote, for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def render(template: str, variables: dict[str, Any]) -> str:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
    return environment.from_string(template).render(variables)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes what is special in HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def answer(request: dict[str, Any]) -> dict[str, str]:
    try:
        text = render(request["template"], request["variables"])
        text.encode()  # lone surrogates
    except MemoryError:
        return {"error": "it needs too much memory"}
    except Exception as error:  # a template can raise any
        message = f"{error}"[:300] or type(error).__name__
        return {"refused" if type(error) is TemplateError else "error": message}
    return {"text": text} if len(text) <= TEXT else {"error": f"it makes {len(text)} characters"}


if __name__ == "__main__":
    asked = json.load(sys.stdin.buffer)
    for what, limit in (
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # not every system has every limit
            resource.setrlimit(what, (limit, limit))
    print(json.dumps(answer(asked)))
