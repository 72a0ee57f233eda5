"""Text of entries, which is untrusted, as Markdown that Streamlit shows as nothing but that text."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from typing import Any

NAME_LIMIT = 160  # characters of a name that are shown; an id has at most 96
REASON_LIMIT = 600

# Fenced blocks and code spans, as the card's template writes them: a span holds no backtick.
_CODE = re.compile(r"(^(?P<ticks>`{3,})[^\n]*\n.*?^(?P=ticks)$|(?<!\\)`[^`\n]*`)", re.DOTALL | re.MULTILINE)


def plain(value: object, limit: int = NAME_LIMIT) -> str:
    """One line of printable characters, cut where it is longer than `limit`."""
    start = str(value)[: 4 * limit]
    line = " ".join("".join(c if c.isprintable() else " " for c in start).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def escape(value: object, limit: int = NAME_LIMIT) -> str:
    """One line in which every ASCII punctuation mark is escaped.

    So neither Markdown, nor HTML, nor Streamlit's own syntax (`:red[..]`, `$..$`) has anything to work with.
    """
    return _escaped(plain(value, limit))


def escape_lines(value: str) -> str:
    """As `escape`, of any length, with its line breaks. Pieces of a text may be escaped one by one."""
    kept = "".join(c for c in value if c == "\n" or c == "\t" or c.isprintable())
    return _escaped(kept).replace("\n", "  \n")


def code(value: object, limit: int = NAME_LIMIT) -> str:
    """A code span, which may stand in a table; a backtick in it becomes an apostrophe."""
    return "`" + (plain(value, limit).replace("`", "'").replace("|", "\\|") or " ") + "`"


def card(rendered: str) -> str:
    """A model card, as `cards.render` makes it without `details`, for Streamlit, which shows no HTML.

    Its text is safe as Markdown of the Hub. Here its metadata goes, and what only Streamlit reads as markup
    is escaped.
    """
    body = rendered.split("\n---\n", 1)[-1]
    found, at = [], 0
    for match in _CODE.finditer(body):
        found += [_streamlit_escaped(body[at : match.start()]), match[0]]
        at = match.end()
    return "".join([*found, _streamlit_escaped(body[at:])])


def spreadsheet(lines: Sequence[Sequence[Any]]) -> str:
    """CSV. Text that a spreadsheet would take for a formula gets an apostrophe before it."""
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows(
        [
            f"'{c}" if isinstance(c, str) and c.startswith(("=", "+", "-", "@", "\t", "\r")) else c
            for c in line
        ]
        for line in lines
    )
    return written.getvalue()


def _escaped(value: str) -> str:
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", value)


def _streamlit_escaped(markdown: str) -> str:
    return re.sub(r"[$:]", r"\\\g<0>", markdown)
