"""Try it: talk with an entry whose packed file is on this machine, in the sparse runner."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from app.parts import entry_link, kept_view, show_error, store_folder
from app.text import code, escape_lines, plain
from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.runner.generate import Generation, Model

SHOWN_EVERY_S = 0.25  # tokens per second while a text grows


def page() -> None:
    from zoo.runner.packed import FILE

    st.title("Try it")
    store = store_folder()
    local = sorted(
        {path.relative_to(store / "entries").parts[0] for path in store.glob(f"entries/*/**/{FILE}")}
    )
    asked = st.query_params.get("model", "")
    if not local or (asked and asked not in local):
        what = (
            f"The packed file of {code(asked)} is not on this machine."
            if asked
            else "No packed model is here yet."
        )
        st.info(f"**{what}** This fetches it; `zoo run RECIPE` makes one.", icon=":material/download:")
        st.code(f"zoo pull {shlex.quote(plain(asked)) if asked else 'ID'}", language="sh")
        if not local:
            return
    chosen: str = st.selectbox("Entry", local, key="model", bind="query-params", on_change=_forget)
    with st.container(horizontal=True, vertical_alignment="center"):
        entry_link(chosen, icon=":material/open_in_new:")
        st.button("New conversation", on_click=_forget, icon=":material/restart_alt:")
        with st.popover("Settings", icon=":material/tune:"):
            max_tokens = st.slider("Tokens at most", 16, 1024, 256, 16, key="max", bind="query-params")
            temperature = st.slider("Temperature", 0.0, 2.0, 0.0, 0.1, key="temperature", bind="query-params")
            st.caption("0: the likeliest token every time.")
    try:
        model = _loaded(chosen, str(store))
    except ZooError as error:
        show_error(error)
        return
    if model.packed.text.chat_template is None:
        st.caption("This model has no chat template: it goes on with your text.")
    messages: list[dict[str, Any]] = st.session_state.setdefault("messages", [])
    for message in messages:
        with st.chat_message(message["role"]):
            st.markdown(escape_lines(message["content"]))
            if message.get("speed"):
                st.caption(message["speed"])
    if not messages:
        st.caption(
            "Say something below. The first answer takes a moment longer: the model is read from disk."
        )
    said = st.chat_input("Say something", max_chars=20_000)
    if said:
        _answer(model, messages, said, {"max_tokens": max_tokens, "temperature": temperature})


def _loaded(entry_id: str, store: str) -> Model:
    return st.cache_resource(_load, max_entries=1, show_spinner="Reading the model …")(entry_id, store)  # type: ignore[no-any-return]


def _load(entry_id: str, store: str) -> Model:
    from zoo.runner.generate import load

    return load(entry_id, store=Path(store))


def _forget() -> None:
    st.session_state["messages"] = []


def _answer(model: Model, messages: list[dict[str, Any]], said: str, options: dict[str, Any]) -> None:
    asked = {"role": "user", "content": said}
    with st.chat_message("user"):
        st.markdown(escape_lines(said))
    pieces: list[str] = []
    with st.chat_message("assistant"):
        speed = st.empty()
        try:
            if model.packed.text.chat_template is None:
                stream = model.generate(said, stream=True, **options)
            else:
                history = [{"role": m["role"], "content": m["content"]} for m in [*messages, asked]]
                stream = model.chat(history, stream=True, **options)

            def growing() -> Iterator[str]:
                """The text's pieces as Markdown; meanwhile the speed so far."""
                first = shown = time.monotonic()
                for piece in stream:
                    pieces.append(piece)
                    now = time.monotonic()
                    if len(pieces) == 1:
                        first = shown = now
                    elif now - shown > SHOWN_EVERY_S:
                        shown = now
                        speed.caption(f"{(len(pieces) - 1) / (now - first):.1f} tokens/s so far")
                    yield escape_lines(piece)

            with closing(stream):
                st.write_stream(growing)
                told = _told(stream.result)
            speed.empty()
            st.caption(told)
        except ZooError as error:  # such as a conversation that is longer than the context
            show_error(error)
            return
    messages += [asked, {"role": "assistant", "content": "".join(pieces), "speed": told}]


def _told(result: Generation) -> str:
    ends = {"stop": "ended", "length": "as many as allowed", "context": "the context is full"}
    return (
        f"**{result.tokens_per_s:.1f} tokens/s** · {result.generated_tokens} tokens "
        f"({ends[result.finish_reason]}) · prompt of {result.prompt_tokens} read in "
        f"{result.seconds_to_first_token:.2f} s"
    )


with kept_view("try_it.py", {"model", "max", "temperature"}):
    page()
