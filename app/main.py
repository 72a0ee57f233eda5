"""The zoo's web app: `zoo app`, or `streamlit run app/main.py`. It reads the registry and writes nothing."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from app.parts import show_error
from zoo.errors import ZooError

ICON = Path(__file__).with_name("icon.svg")  # a named icon would be fetched from a server of Google's


def main() -> None:
    st.set_page_config(page_title="Sparse Zoo", page_icon=str(ICON), layout="wide")
    st.logo(str(ICON), size="small")
    pages = [
        st.Page("browse.py", title="Browse", icon=":material/grid_view:", default=True),
        st.Page("entry.py", title="Entry", url_path="entry", visibility="hidden"),
        st.Page("compare.py", title="Compare", icon=":material/balance:", url_path="compare"),
        st.Page("runs.py", title="Runs", icon=":material/manufacturing:", url_path="runs"),
        st.Page("jobs.py", title="Jobs", icon=":material/event_repeat:", url_path="jobs"),
        st.Page("try_it.py", title="Try it", icon=":material/forum:", url_path="try"),
    ]
    page = st.navigation(pages, position="top")
    try:
        page.run()
    except ZooError as error:
        show_error(error)


main()
