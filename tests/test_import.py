"""`zoo import`: models of others, as folders, GGUF files and on a Hub, become entries or are refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file

import cards
from pipelines import compress
from pipelines.export_compressed import export_compressed_tensors
from pipelines.export_gguf import export_gguf
from pipelines.import_model import import_model
from pipelines.recipe import Quantize
from tests import tiny_entry
from tests.example import entry
from tests.hub import Server, serving
from tests.process import Zoo, program, refused
from tests.tiny import tiny_llama, tiny_mpt
from zoo import importing
from zoo.entry import Entry
from zoo.errors import FormatError, HubError, SourceError, UsageError
from zoo.files import Store, file_table
from zoo.hub import client
from zoo.hub.push import push
from zoo.importing import entry_id, locate
from zoo.registry import Query, Registry, open_registry
from zoo.runner.generate import load
from zoo.search import search

CARD = """\
---
license: apache-2.0
base_model: somebody/base-1b
---
# A sparse model
"""
PATTERN = (0, 1, 1, 0)  # 2:4


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return open_registry(str(tmp_path / "registry.db"))


def prune(folder: Path, *, columns: bool) -> None:
    """Zero half of every linear layer: the same of every four columns, or of all whatever lies there."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if "proj" in name or "attn" in name or "ffn" in name:
            keep = torch.tensor(PATTERN).repeat(weight.shape[1] // 4).expand_as(weight)
            if not columns:
                keep = torch.rand(weight.shape, generator=generator) < 0.5
            weights[name] = weight * keep
    save_file(weights, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def sparse_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama(tmp_path_factory.mktemp("published") / "Sparse-Llama_2of4")
    prune(folder, columns=True)
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE").write_text("Apache License\n")
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    return folder


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of GGUF files only."""
    folder = tmp_path_factory.mktemp("gguf")
    made = folder / "made"
    export_gguf(tiny_llama(folder / "model"), folder, ["Q8_0", "F16"], name="Tiny.Llama", license="mit")
    made.mkdir()
    for path in folder.glob("*.gguf"):
        path.rename(made / path.name)
    return made


def test_a_folder(sparse_llama: Path, store: Store, registry: Registry) -> None:
    before = file_table(sparse_llama)
    made = import_model(str(sparse_llama), store, registry, threads=1)
    assert (made.id, made.status, made.failure) == ("sparse-llama_2of4", "verified", None)
    assert registry.get(made.id) == made
    # What is known, from the card and the weights.
    assert (made.family, made.license) == ("llama", "apache-2.0")
    assert (made.base_repository, made.base_model) == ("somebody/base-1b", "hub:somebody/base-1b")
    assert made.origin == str(sparse_llama)
    assert made.sparsity == pytest.approx(0.5, abs=1e-3)
    assert len(made.layers) == 3 * 7
    assert {layer.pattern for layer in made.layers} == {"2:4"}
    assert {layer.bits for layer in made.layers} == {16}
    # And what is not.
    assert (made.recipe, made.base_revision, made.base_sha256) == ("", "unknown", None)
    assert {(layer.method, layer.error) for layer in made.layers} == {(None, None)}
    assert made.measurements == []
    # Both runners have run it.
    assert {(v.runner, v.passed) for v in made.verifications} == {("transformers", True), ("zoo", True)}
    assert [b.artifact for b in made.benchmarks] == ["packed.safetensors"]
    # The files: all that make it up and its licence, nothing pickled; theirs are as they were.
    there = store.root / "entries" / made.id
    assert {a.path for a in made.artifacts} >= {
        "model.safetensors",
        "config.json",
        "LICENSE",
        "packed.safetensors",
    }
    assert "pytorch_model.bin" not in {a.path for a in made.artifacts}
    table = file_table(there)
    assert all(table[a.path] == (a.size, a.sha256) for a in made.artifacts)
    assert file_table(sparse_llama) == before
    assert not (there / "model.safetensors").samefile(sparse_llama / "model.safetensors")
    assert Entry.model_validate_json((there / "entry.json").read_text()) == made
    assert load(made.id, store=store.root).generate("The", max_tokens=2).ids
    # The card says what it is, and gives no recipe.
    card = (there / "README.md").read_text()
    assert "published by others" in card
    assert "zoo run recipe.yaml" not in card
    # It is found, and the run is recorded.
    assert [e.id for e in registry.search(Query(text="sparse-llama 2:4", methods=("unknown",))).entries] == [
        made.id
    ]
    assert [(run.status, run.entry_id) for run in registry.runs()] == [("done", made.id)]


@pytest.mark.parametrize(
    "readme",
    [b"---\nlicense: [mit\n---\n", b"---\nlicense: 2025-99-99\n---\n", b"---\n\xff: mit\n---\n", b"",
     b"---\na: &a {license: mit}\n<<: *a\n---\n"],
)  # fmt: skip
def test_a_card_that_cannot_be_read_says_nothing(readme: bytes, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    (folder / "README.md").write_bytes(readme)
    assert (locate(str(folder)).license, locate(str(folder)).base) == (None, None)


def test_unstructured_zeros_and_a_dense_model(tmp_path: Path, store: Store, registry: Registry) -> None:
    sparse, dense = tiny_mpt(tmp_path / "sparse-mpt"), tiny_mpt(tmp_path / "dense-mpt")
    prune(sparse, columns=False)
    made = import_model(str(sparse), store, registry, threads=1, base="mosaicml/mpt-7b")
    assert {layer.pattern for layer in made.layers} == {"unstructured"}
    assert made.sparsity == pytest.approx(0.5, abs=0.01)
    assert made.base_repository == "mosaicml/mpt-7b"
    made = import_model(str(dense), store, registry, threads=1)
    assert {layer.pattern for layer in made.layers} == {None}
    assert (made.status, made.base_model, made.base_repository) == ("verified", "unknown", None)


def test_a_compressed_tensors_folder(tmp_path: Path, store: Store, registry: Registry) -> None:
    model, quantized = tiny_llama(tmp_path / "model"), tmp_path / "quantized"
    quantized.mkdir()
    step = Quantize.model_validate(
        {"kind": "quantize", "method": "rtn", "grid": {"bits": 4, "group": 32, "symmetric": True}}
    )
    compress.run_step(step, model, quantized, None)
    published = tmp_path / "tiny-w4a16"
    published.mkdir()
    export_compressed_tensors(quantized, published)
    made = import_model(str(published), store, registry, threads=1)
    assert made.status == "verified", made.failure
    assert {(layer.bits, layer.group, layer.symmetric) for layer in made.layers} == {(4, 32, True)}
    assert {a.kind for a in made.artifacts if a.path == "model.safetensors"} == {"compressed-tensors"}


def test_a_gguf_file(ggufs: Path, store: Store, registry: Registry) -> None:
    path = ggufs / "Tiny.Llama-Q8_0.gguf"
    made = import_model(str(path), store, registry, threads=1)
    assert (made.id, made.status, made.failure) == ("tiny.llama-q8_0", "verified", None)
    assert [(v.runner, v.artifact, v.passed) for v in made.verifications] == [("llama.cpp", path.name, True)]
    assert [(a.path, a.kind, a.format) for a in made.artifacts if a.kind == "gguf"] == [
        (path.name, "gguf", "Q8_0")
    ]
    assert {(layer.bits, layer.group, layer.symmetric) for layer in made.layers} == {(8, 32, True)}
    assert {layer.name for layer in made.layers} >= {
        "model.layers.0.self_attn.q_proj",
        "model.layers.2.mlp.down_proj",
    }
    assert made.benchmarks[0].decode_tokens_per_s > 0


def test_what_does_not_run_is_recorded_as_failed(tmp_path: Path, store: Store, registry: Registry) -> None:
    folder = tiny_llama(tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    made = import_model(str(folder), store, registry, threads=1)
    assert made.status == "failed"
    assert "down_proj" in str(made.failure)
    assert registry.get("broken").failure == made.failure
    assert registry.search(Query()).total == 0  # not offered
    assert [run.status for run in registry.runs()] == ["failed"]


def test_another_entry_is_not_replaced(sparse_llama: Path, store: Store, registry: Registry) -> None:
    there = entry("sparse-llama_2of4")
    registry.put(there)
    with pytest.raises(UsageError, match="another entry") as caught:
        import_model(str(sparse_llama), store, registry)
    assert "--id" in str(caught.value)
    assert registry.get(there.id) == there
    assert registry.runs() == []


def test_a_model_of_an_unknown_family_is_refused(tmp_path: Path, store: Store, registry: Registry) -> None:
    folder = tiny_llama(tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["OddForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="OddForCausalLM"):
        import_model(str(folder), store, registry)
    assert registry.count() == 0
    assert [run.status for run in registry.runs()] == ["failed"]


def test_several_gguf_files(ggufs: Path) -> None:
    with pytest.raises(UsageError, match="several GGUF") as caught:
        locate(str(ggufs))
    assert "--file Tiny.Llama-F16.gguf" in str(caught.value)
    found = locate(str(ggufs), ["*Q8_0*"])
    assert found.gguf == ggufs / "Tiny.Llama-Q8_0.gguf"
    with pytest.raises(SourceError, match="no model"):
        locate(str(ggufs), ["*Q2_K*"])


@pytest.mark.parametrize("source", ["no/such/place", "hub:name", "hub:a/b/c", "hub:../x", "model.bin"])
def test_what_is_no_model(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.bin").write_bytes(b"")
    with pytest.raises((SourceError, UsageError)):
        locate(source)


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("hub:neuralmagic/Sparse-Llama-3.1-8B-2of4@abc", "sparse-llama-3.1-8b-2of4"),
        ("/models/My model (v2)", "my-model-v2"),
        ("hub:a/b--c..d__e._f-.g@1", "b-c-d-e-f-g"),
        ("/x/" + "a" * 95 + "-b", "a" * 95),
        ("/models/__x__", "x"),
    ],
)
def test_ids(origin: str, expected: str) -> None:
    found = importing.Published(origin, Path(), (), None, False, None, None)
    assert entry_id(found) == expected


def test_a_name_without_an_id() -> None:
    with pytest.raises(UsageError, match="--id"):
        entry_id(importing.Published("/models/日本", Path(), (), None, False, None, None))


# --- a Hub ---


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def hub(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> client.Hub:
    """The server as this process's Hub, with a cache of the test's own."""
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    monkeypatch.setenv("HF_TOKEN", server.token)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return client.connect()


def test_from_a_hub(
    hub: client.Hub, sparse_llama: Path, store: Store, registry: Registry, tmp_path: Path
) -> None:
    name = hub.api.create_repo("import-test").repo_id
    commit = hub.api.upload_folder(repo_id=name, folder_path=sparse_llama, ignore_patterns="*.bin").oid
    found = import_model(f"hub:{name}", store, registry, threads=1)
    assert (found.id, found.status, found.origin) == ("import-test", "verified", f"hub:{name}@{commit}")
    assert found.base_repository == "somebody/base-1b"
    # A cached file that was damaged is told, and not imported; the entry stays as it was.
    blob = next((tmp_path / "cache").rglob(f"snapshots/{commit}/model.safetensors")).resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.unlink()  # the store has links to it
    blob.write_bytes(data)
    with pytest.raises(FormatError, match="did not arrive whole") as caught:
        import_model(f"hub:{name}", store, registry)
    assert "rm " in str(caught.value)
    assert registry.get("import-test") == found
    table = file_table(store.root / "entries" / "import-test")
    assert all(table[a.path] == (a.size, a.sha256) for a in found.artifacts)
    with pytest.raises(HubError, match="nobody/nothing"):
        import_model("hub:nobody/nothing", store, registry)


def test_the_command_refuses(tmp_path: Path) -> None:
    zoo = Zoo(tmp_path, {"ZOO_REGISTRY": str(tmp_path / "registry.db"), "ZOO_STORE": str(tmp_path / "store")})
    refused(zoo("import", "hub:nothing"), 2, "hub:org/name")
    refused(zoo("import", "nothing"), 1, "there is no model at nothing")
    refused(zoo("import", "nothing", "--id", "Bad ID"), 2, "--id")


def test_search_finds_what_is_published(hub: client.Hub, registry: Registry, tmp_path: Path) -> None:
    files = tiny_entry.model_files(tmp_path / "files")
    for name in ("published-a", "published-b"):
        shelf = tiny_entry.shelve(tmp_path / name, files, entry_id=name)
        push(name, hub, store=shelf.store, registry=shelf.registry, card=cards.render)
    hub.api.create_repo("not-ours")
    registry.put(shelf.entry("published-b").model_copy(update={"license": "mit"}))
    registry.put(entry("only-here"))

    def found(local: Registry | None = registry, **asked: Any) -> dict[str, list[str]]:
        hits = search(Query(**asked), local, hub).hits
        return {hit.id: [place.endpoint for place in hit.places] for hit in hits}

    assert list(found(sort="id").items()) == [
        ("only-here", ["local"]),
        ("published-a", [hub.endpoint]),
        ("published-b", ["local", hub.endpoint]),
    ]
    assert found(text="published").keys() == {"published-a", "published-b"}
    assert found(licenses=("apache-2.0",), text="published") == {"published-a": [hub.endpoint]}
    assert list(found(sort="id", limit=1, offset=1)) == ["published-a"]
    assert search(Query(sort="id", limit=1, offset=1), registry, hub).total == 3
    assert found(families=("mpt",)) == {}
    assert found(None).keys() == {"published-a", "published-b"}
    # What is no entry of a zoo is left out, and the rest found.
    api = HfApi(endpoint=hub.endpoint, token=hub.api.token)
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="zoo.json", repo_id=api.create_repo("fake").repo_id)
    api.upload_file(
        path_or_fileobj=b"---\ntags: [sparse-zoo]\n---\n", path_in_repo="README.md", repo_id="/".join(
            (hub.api.whoami()["name"], "fake")
        )
    )  # fmt: skip
    assert found(None).keys() == {"published-a", "published-b"}
    done = program(
        *("search", "published", "--endpoint", hub.endpoint, "--registry", tmp_path / "none.db"),
        folder=tmp_path,
        environment={"HF_TOKEN": str(hub.api.token), "HF_HUB_OFFLINE": "0"},
    )
    assert done.returncode == 0, done.stderr
    assert "where" in done.stdout.splitlines()[0]
    assert "/published-a" in done.stdout
    assert "fake" in done.stderr


def test_search_tells_that_a_server_is_not_there(tmp_path: Path) -> None:
    search = Zoo(tmp_path, {"ZOO_REGISTRY": str(tmp_path / "registry.db"), "HF_HUB_OFFLINE": "0"})
    done = search("search", "--endpoint", "http://127.0.0.1:9")
    refused(done, 1, "http://127.0.0.1:9", "check the connection, and --endpoint")
    assert done.stderr.startswith("zoo: ") and "goes on" not in done.stderr  # nothing of the library, no lie
    refused(search("search", "--endpoint", "nonsense"), 2, "nonsense")


def test_all_pages_of_a_hub_are_asked_for_as_long_as_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(request.url)
        page = int(request.url.params.get("cursor", "0"))
        headers = {"Link": f'<http://hub.test/api/models?filter=sparse-zoo&cursor={page + 1}>; rel="next"'}
        return httpx2.Response(200, json=[{"id": f"a/{page}-{i}"} for i in range(3)], headers=headers)

    with httpx2.Client(transport=httpx2.MockTransport(answer)) as session:
        monkeypatch.setattr(client, "get_session", lambda: session)
        found = client.published(client.connect("http://hub.test"), 7)
    assert [model.id for model in found] == [f"a/{n // 3}-{n % 3}" for n in range(8)]
    assert [url.params["filter"] for url in asked] == ["sparse-zoo"] * 3
    assert asked[0].params.get_list("expand") == ["sha", "tags"]  # and no list of files
