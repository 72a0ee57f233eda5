"""Browse the registry: `streamlit run app/main.py`. Reads the registry only."""

from __future__ import annotations

import os

import streamlit as st

from zoo.errors import ZooError
from zoo.registry import Summary, open_registry


def row(summary: Summary) -> dict[str, object]:
    """What the table shows of an entry."""
    measured = next(
        (m for m in summary.measurements if m.subject == "entry" and m.metric == "perplexity"), None
    )
    return {
        "id": summary.id,
        "family": summary.family,
        "base": summary.base_repository or summary.base_model,
        "status": summary.status,
        "sparsity": f"{summary.sparsity:.1%}",
        "bits per weight": round(summary.bits_per_weight, 3),
        "perplexity": None if measured is None else f"{measured.value:.2f} at {measured.context_length}",
        "decode token/s": max((b.decode_tokens_per_s for b in summary.benchmarks), default=None),
    }


def page() -> None:
    st.set_page_config(page_title="Sparse Zoo", layout="wide")
    st.title("Sparse Zoo")
    try:
        entries = open_registry(os.environ.get("ZOO_REGISTRY", "registry.db"), create=False).entries()
    except ZooError as error:
        st.error(str(error))
        return
    if not entries:
        st.info("No entries yet. `make demo` makes the first one.")
        return
    families = sorted({entry.family for entry in entries})
    chosen = st.multiselect("Family", families, default=families)
    shown = [row(entry) for entry in entries if entry.family in chosen]
    st.caption(f"{len(shown)} of {len(entries)} entries")
    st.dataframe(shown, hide_index=True)


page()
