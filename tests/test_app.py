"""The Streamlit page, run by Streamlit's own test driver."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.example import entry
from zoo.registry import open_registry

pytest.importorskip("streamlit", reason="the extra [app] is not installed")
from streamlit.testing.v1 import AppTest

PAGE = Path(__file__).parents[1] / "app" / "main.py"


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    url = str(tmp_path / "registry.db")
    monkeypatch.setenv("ZOO_REGISTRY", url)
    return url


def shown() -> AppTest:
    page = AppTest.from_file(str(PAGE), default_timeout=30).run()
    assert not page.exception
    return page


def test_no_registry_is_told(url: str) -> None:
    assert "there is no registry" in shown().error[0].value


def test_an_empty_registry_says_what_to_run(url: str) -> None:
    open_registry(url)
    assert "make demo" in shown().info[0].value


def test_entries_by_family(url: str) -> None:
    registry = open_registry(url)
    registry.put(entry("a-llama"))
    registry.put(entry("an-mpt", family="mpt"))
    registry.put(entry("a-failure", status="failed"))
    page = shown()
    assert set(page.dataframe[0].value["id"]) == {"a-llama", "an-mpt"}
    page.multiselect[0].set_value(["mpt"]).run()
    assert list(page.dataframe[0].value["id"]) == ["an-mpt"]
