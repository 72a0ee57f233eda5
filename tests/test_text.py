"""Text sources: what is read, what is recorded, and what a bad source is told."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.text import Text, expand, read_text, token_ids, windows
from tests.tiny import tiny_tokenizer
from zoo.errors import CalibrationError

SHARED = Path(os.environ.get("ZOO_SHARED") or Path(__file__).resolve().parents[2] / "shared")
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data; set ZOO_SHARED")
DOCUMENTS = ["The first page.", "", "Der zweite, mit ä und 漢字.", "  \n", "The last."]


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    path = tmp_path / "pages.parquet"
    pq.write_table(pa.table({"text": DOCUMENTS, "number": range(5)}), path)
    return path


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    """A folder as the Hub has them: two configurations, two splits."""
    folder = tmp_path / "org" / "pages"
    for config in ("plain", "other"):
        for split in ("train", "test"):
            (folder / config).mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table({"text": [f"{config} {split}"]}), folder / config / f"{split}.parquet")
    lines = ["---", "configs:"]
    for config in ("plain", "other"):
        lines += [f"- config_name: {config}-config", "  data_files:"]
        for split in ("train", "test"):
            lines += [f"  - split: {split}", f"    path: {config}/{split}.parquet"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


def test_a_text_file_is_read_whole_and_identified_by_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "page.txt"
    path.write_bytes("Zwölf Boxkämpfer\r\n".encode())
    text = read_text(str(path))
    assert text == Text(("Zwölf Boxkämpfer\r\n",), "page.txt", hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize("limit", range(1, 12))
def test_a_limit_never_splits_a_character(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "page.txt"
    path.write_text("aä漢🦊z", encoding="utf-8")
    got = read_text(str(path), limit_bytes=limit).whole
    assert "aä漢🦊z".startswith(got)
    assert limit - 3 <= len(got.encode()) <= limit or limit > 11


def test_a_parquet_file_gives_its_documents_without_the_empty_ones(parquet: Path) -> None:
    text = read_text(str(parquet))
    assert text.documents == (DOCUMENTS[0], DOCUMENTS[2], DOCUMENTS[4])
    assert text.whole == "\n\n".join(text.documents)
    assert text.revision == hashlib.sha256(parquet.read_bytes()).hexdigest()
    assert read_text(str(parquet), limit_bytes=20).documents == (DOCUMENTS[0], "Der z")


def test_a_folder_laid_out_like_the_hub(data_set: Path, tmp_path: Path) -> None:
    assert read_text(f"{data_set}/plain-config").documents == ("plain train",)
    assert read_text(f"{data_set}/other-config:test").documents == ("other test",)
    assert read_text(f"{data_set}/other-config", split="test").name == "other-config:test"
    before = read_text(f"{data_set}/plain-config").revision
    (data_set / "plain" / "train.parquet").write_bytes((data_set / "other" / "train.parquet").read_bytes())
    assert read_text(f"{data_set}/plain-config").revision != before


def test_paths_expand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_SHARED", "/somewhere/else")
    monkeypatch.setenv("HOME", "/home/me")
    assert expand("${ZOO_SHARED}/data/a.txt") == Path("/somewhere/else/data/a.txt")
    assert expand("~/a.txt") == Path("/home/me/a.txt")
    monkeypatch.delenv("ZOO_SHARED")
    assert expand("${ZOO_SHARED}/a.txt") == Path(__file__).resolve().parents[2] / "shared" / "a.txt"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("absent.txt", None, "there is no text"),
        ("absent.parquet", None, "there is no text"),
        ("latin.txt", b"caf\xe9 au lait", "0xe9 at offset 3"),
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\n ", "holds no text"),
        ("broken.parquet", b"PAR1 and then nothing", "cannot be read"),
        ("picture.png", b"\x89PNG", "a file ending in .png"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=says):
        read_text(str(tmp_path / name))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"column": "body"}, "columns text, number"),
        ({"column": "number"}, "int values"),
    ],
)
def test_bad_columns(parquet: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(CalibrationError, match=says):
        read_text(str(parquet), **options)


@pytest.mark.parametrize("readme", ["# A project\n", "---\nconfigs: [a\n---\n", "---\nconfigs: 3\n---\n"])
def test_a_folder_with_a_readme_is_no_data_set(tmp_path: Path, readme: str) -> None:
    """Its files, of which there may be gigabytes, are not read for a misspelt name."""
    (tmp_path / "README.md").write_text(readme)
    with pytest.raises(CalibrationError, match=r"there is no text at .*absent\.txt"):
        read_text(str(tmp_path / "absent.txt"))


def test_bad_data_sets(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CalibrationError, match="has plain-config, other-config, not other-confg"):
        read_text(f"{data_set}/other-confg")
    with pytest.raises(CalibrationError, match="plain-config"):  # lists the configurations
        read_text(str(data_set))
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_text(f"{data_set}/plain-config:validation")
    with pytest.raises(CalibrationError, match="names no data set"):
        read_text("hub:nothing")
    with pytest.raises(CalibrationError, match="no text builtin:poems"):
        read_text("builtin:poems")
    monkeypatch.chdir(data_set.parent.parent)
    with pytest.raises(CalibrationError, match="hides the data set"):
        read_text("hub:org/pages")


def test_an_unreachable_hub_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CalibrationError, match="cannot be reached"):
        read_text("hub:org/name/config:test@0123456")


@given(st.integers(1, 6), st.integers(2, 9), st.integers(0, 60))
def test_windows_are_the_first_tokens_or_an_error(count: int, length: int, tokens: int) -> None:
    ids = np.arange(tokens)
    if tokens < count * length:
        with pytest.raises(CalibrationError, match=rf"{tokens} tokens") as caught:
            windows(ids, count, length)
        assert f"{count * length} tokens" in str(caught.value)
        return
    cut = windows(ids, count, length)
    assert cut.shape == (count, length)
    assert [int(i) for row in cut for i in row] == list(range(count * length))


def test_too_short_a_text_says_what_to_lower() -> None:
    with pytest.raises(CalibrationError, match="number of windows to 3"):
        windows(np.arange(2000), 40, 512)
    with pytest.raises(CalibrationError, match="window length to 100"):
        windows(np.arange(100), 40, 512)
    with pytest.raises(CalibrationError, match="cannot be cut"):
        windows(np.arange(100), 0, 10)


def test_documents_are_tokenised_as_one_text(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    ids = token_ids(tokenizer, Text(("The fox", "and the dog"), "two", "0"))
    assert ids.dtype == np.int64
    assert tokenizer.decode(ids) == "The fox\n\nand the dog"


@needs_shared
def test_shared_text_is_found_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_SHARED", str(SHARED))
    text = read_text("${ZOO_SHARED}/data/text/wikitext2_test.tokens.txt", limit_bytes=1000)
    assert text.name == "wikitext2_test.tokens.txt"
    assert "Robert <unk>" in text.whole
    pages = read_text("${ZOO_SHARED}/data/hub/Salesforce/wikitext/wikitext-2-raw-v1:test", limit_bytes=5000)
    assert "Robert Boulter" in pages.whole
