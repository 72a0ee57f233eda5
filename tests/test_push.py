"""`zoo push` against a real zoo server, read back with the Hub's own client."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard, constants, parse_eval_result_entries, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError

import tests.example
from cards import render
from pipelines.recipe import load
from tests.hub import Server, new_token, serving
from tests.process import ROOT, refused
from tests.proxy import slow_line
from tests.tiny_entry import ID, Shelf, model_files, same_files, shelve
from zoo.entry import Entry
from zoo.errors import FormatError, HubError, StoreError, ZooError
from zoo.hub import client, manifest
from zoo.hub.push import push

PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_files(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("hub")) as running:
        yield running


@pytest.fixture
def hub(server: Server, monkeypatch: pytest.MonkeyPatch) -> client.Hub:
    monkeypatch.setenv("HF_TOKEN", server.token)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return client.connect(server.endpoint)


@pytest.fixture
def shelf(tmp_path: Path, files: Path) -> Shelf:
    return shelve(tmp_path, files)


def publish(shelf: Shelf, hub: client.Hub, to: str, **options: object) -> str:
    """Push; returns the commit."""
    card: Callable[[Entry], str] = options.pop("card", render)  # type: ignore[assignment]
    private = bool(options.pop("private", False))
    assert not options
    done = push(ID, hub, store=shelf.store, registry=shelf.registry, card=card, to=to, private=private)
    assert done == shelf.entry().publications[-1]
    assert (done.endpoint, done.repository) == (hub.endpoint, f"{to}/{ID}")
    return done.commit


def history(hub: client.Hub, repository: str) -> list[str]:
    return [commit.commit_id for commit in hub.api.list_repo_commits(repository)]


def tags(hub: client.Hub, repository: str) -> dict[str, str]:
    return {tag.name: tag.target_commit for tag in hub.api.list_repo_refs(repository).tags}


def change(shelf: Shelf, **changes: object) -> None:
    shelf.registry.put(shelf.entry().model_copy(update=changes))


def test_other_clients_read_what_was_pushed(hub: client.Hub, shelf: Shelf, tmp_path: Path) -> None:
    whole = [m.model_copy(update={"limit": None, "metric": "accuracy"}) if m.task == "arc_easy" else m
             for m in shelf.entry().measurements]  # fmt: skip
    change(shelf, measurements=whole)
    before = shelf.entry()
    commit = publish(shelf, hub, "readers")
    repository = f"readers/{ID}"
    entry = shelf.entry()
    assert entry == before.model_copy(update={"status": "published", "publications": entry.publications})
    assert tags(hub, repository) == {entry.publications[0].tag: commit}
    assert entry.publications[0].tag == f"recipe-{entry.recipe_sha256[:16]}"

    folder = Path(
        snapshot_download(
            repository, endpoint=hub.endpoint, revision=entry.publications[0].tag, local_dir=tmp_path / "got"
        )
    )
    assert same_files(entry, folder)
    card = ModelCard.load(folder / "README.md")
    assert card.data.model_name == ID and "sparse-zoo" in card.data.tags  # type: ignore[attr-defined]
    assert {r.metric_type for r in card.data.eval_results or []} == {m.metric for m in whole}  # type: ignore[attr-defined]
    (results,) = [yaml.safe_load(p.read_text()) for p in (folder / ".eval_results").iterdir()]
    (result,) = parse_eval_result_entries(results)
    assert (result.dataset_id, result.task_id, result.value) == ("allenai/ai2_arc", "ARC-Easy", 41.0)

    found = manifest.parse((folder / "zoo.json").read_bytes(), "zoo.json")
    on_disk = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    listed = {file.path for file in found.files}
    assert listed == {path for path in on_disk if not path.startswith(".cache/")} - {
        "zoo.json",
        ".gitattributes",
    }
    assert found.entry.artifacts == entry.artifacts and found.entry.publications == []
    (model,) = hub.api.list_models(filter="sparse-zoo", search="readers/")
    assert model.id == repository


def test_the_same_content_is_not_pushed_again(hub: client.Hub, shelf: Shelf) -> None:
    commit = publish(shelf, hub, "same")
    first = shelf.entry()
    commits = history(hub, f"same/{ID}")
    assert publish(shelf, hub, "same") == commit
    assert shelf.entry() == first
    # made again by the same recipe: another date, other times
    shelf.registry.put(
        first.model_copy(update={"created": "2026-01-01T00:00:00Z", "stages": [], "publications": []})
    )
    assert publish(shelf, hub, "same") == commit
    assert history(hub, f"same/{ID}") == commits


def test_a_new_release_replaces_the_old_and_leaves_what_others_added(
    hub: client.Hub, shelf: Shelf, tmp_path: Path
) -> None:
    repository = f"again/{ID}"
    first = publish(shelf, hub, "again")
    hub.api.upload_file(path_or_fileobj=b"all rights", path_in_repo="LICENSE", repo_id=repository)
    left = [a for a in shelf.entry().artifacts if not a.path.endswith(".gguf")]
    assert len(left) < len(shelf.entry().artifacts)
    change(shelf, artifacts=left)
    second = publish(shelf, hub, "again")
    names = set(hub.api.list_repo_files(repository))
    assert "LICENSE" in names and not any(name.endswith(".gguf") for name in names)
    assert {a.path for a in left} < names
    tag = f"recipe-{shelf.entry().recipe_sha256[:16]}"
    assert tags(hub, repository) == {tag: first, f"{tag}-2": second}
    commits = history(hub, repository)
    assert commits[0] == second and first in commits
    assert [p.commit for p in shelf.entry().publications] == [first, second]


def test_a_stale_parent_is_told_and_nothing_overwritten(hub: client.Hub, shelf: Shelf) -> None:
    repository = f"stale/{ID}"
    publish(shelf, hub, "stale")

    def card(entry: Entry) -> str:
        """What the push calls between looking at the repository and committing."""
        hub.api.upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id=repository)
        return render(entry)

    change(shelf, bits_per_weight=4.5)
    with pytest.raises(HubError, match="changed by someone else") as told:
        publish(shelf, hub, "stale", card=card)
    assert told.value.try_ is not None and f"zoo push {ID}" in told.value.try_
    commits = history(hub, repository)
    assert told.value.saw == f"commit {commits[0]}"
    assert "notes.txt" in hub.api.list_repo_files(repository)
    publish(shelf, hub, "stale")
    assert history(hub, repository)[1:] == commits
    assert "notes.txt" in hub.api.list_repo_files(repository)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"status": "failed", "failure": "it diverged"}, "it diverged"),
        ({"verifications": []}, "nothing of it was verified"),
        (
            {"verifications": [tests.example.entry().verifications[0].model_copy(update={"passed": False})]},
            "failed: gguf/model-Q8_0.gguf",
        ),
    ],
)
def test_what_is_not_verified_is_refused(
    hub: client.Hub, shelf: Shelf, changes: dict[str, object], word: str
) -> None:
    change(shelf, **changes)
    with pytest.raises(ZooError, match="not verified") as told:
        publish(shelf, hub, "unverified")
    assert word in str(told.value) and "zoo run" in str(told.value)
    with pytest.raises(RepositoryNotFoundError):
        hub.api.model_info(f"unverified/{ID}")


def test_an_entry_whose_manifest_nobody_would_accept_is_refused(hub: client.Hub, shelf: Shelf) -> None:
    run = tests.example.entry().benchmarks[0]
    odd = run.machine.model_copy(update={"cpu": "another"})
    change(shelf, benchmarks=[run.model_copy(update={"machine": odd})])
    with pytest.raises(FormatError, match="cannot be published") as told:
        publish(shelf, hub, "odd")
    assert "fingerprint" in str(told.value)


def test_files_that_are_not_the_verified_ones_are_refused(hub: client.Hub, shelf: Shelf) -> None:
    path = shelf.folder() / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"model\.safetensors is not the file that was verified") as told:
        publish(shelf, hub, "damaged")
    assert "zoo run RECIPE --store" in str(told.value)
    path.unlink()
    with pytest.raises(StoreError, match="missing") as told:
        publish(shelf, hub, "damaged")
    assert "no model.safetensors" in str(told.value) and "zoo run" in str(told.value)
    with pytest.raises(RepositoryNotFoundError):
        hub.api.model_info(f"damaged/{ID}")


def test_a_repository_of_something_else_is_left_alone(hub: client.Hub, shelf: Shelf) -> None:
    repository = f"theirs/{ID}"
    hub.api.create_repo(repository)
    hub.api.upload_file(path_or_fileobj=b"weights", path_in_repo="model.bin", repo_id=repository)
    before = history(hub, repository)
    with pytest.raises(HubError, match="holds something else") as told:
        publish(shelf, hub, "theirs")
    assert "--to" in str(told.value)
    assert history(hub, repository) == before and shelf.entry().publications == []


def test_private(hub: client.Hub, shelf: Shelf, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(shelf, hub, "secret", private=True)
    assert hub.api.model_info(f"secret/{ID}").private
    with pytest.raises(RepositoryNotFoundError):
        HfApi(endpoint=server.endpoint, token=False).model_info(f"secret/{ID}")
    publish(shelf, hub, "open")
    with pytest.raises(HubError, match="is public"):
        publish(shelf, hub, "open", private=True)


def test_tokens(
    shelf: Shelf, hub: client.Hub, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read = new_token(server.store, "reader", "read")
    for token, words in (
        ("", ("asks for a token", "set HF_TOKEN")),
        ("hf_" + "x" * 37, ("does not accept the token", "set HF_TOKEN")),
        (read, ("refuses this to the token", "may write")),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # so that no kept token is sent
        with pytest.raises(HubError) as told:
            publish(shelf, client.connect(server.endpoint), "strangers")
        assert all(word in str(told.value) for word in words), str(told.value)
        assert not token or token not in str(told.value)
    monkeypatch.setenv("HF_TOKEN", "hf_two\nlines")
    with pytest.raises(ZooError, match="not one") as told:
        client.connect(server.endpoint)
    assert "two" not in str(told.value)


def test_a_kept_token_goes_to_its_own_endpoint_only(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = tmp_path / "token"
    kept.write_text("hf_" + "k" * 37)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(kept))
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    assert client.connect().has_token
    assert not client.connect("http://127.0.0.1:9").has_token


def test_a_given_token_goes_to_no_endpoint_that_others_named(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", server.token)
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    assert client.connect(f"{server.endpoint}/", trusted=False).has_token
    assert client.connect("http://127.0.0.1:9").has_token
    assert not client.connect("http://127.0.0.1:9", trusted=False).has_token
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError) as told:
        client.user(client.connect(server.endpoint, trusted=False))
    assert f"set HF_ENDPOINT={server.endpoint}" in str(told.value)


# --- the command ---


def start(shelf: Shelf, server: Server, endpoint: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "zoo.cli", "push", ID, "--endpoint", endpoint, *shelf.options, *arguments],
        env=server.environment(shelf.store.parent / "home"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate(timeout=PATIENCE_S)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.parametrize(
    "moment",
    [b"/commit/", *(pytest.param(m, marks=pytest.mark.real) for m in (b"/preupload/", b"PUT /", b"/tag/"))],
)
def test_killed_at_any_moment_the_same_command_completes(
    hub: client.Hub, server: Server, files: Path, tmp_path: Path, moment: bytes
) -> None:
    size = 4_000_000
    shelf = shelve(tmp_path, files, padding=size, seed=len(moment))
    to = f"killed-{moment.decode().strip('/ ').lower()}"
    with slow_line(server.endpoint, 20e6) as line:
        process = start(shelf, server, line.endpoint, "--to", to)

        def kill(data: bytes) -> None:
            if moment in data:
                process.kill()

        line.seen = kill
        assert finish(process).returncode == -9
    assert shelf.entry().publications == []
    with slow_line(server.endpoint) as line:
        done = finish(start(shelf, server, line.endpoint, "--to", to, "--json"))
        assert done.returncode == 0, done.stderr
        if moment in (b"/commit/", b"/tag/"):  # what had been sent is not sent again
            assert line.up < size / 4
    assert server.token not in done.stderr + done.stdout
    publication = json.loads(done.stdout)
    repository = f"{to}/{ID}"
    assert [p.model_dump() for p in shelf.entry().publications] == [publication]
    commits = history(hub, repository)
    assert publication["commit"] == commits[0]
    assert tags(hub, repository) == {publication["tag"]: commits[0]}
    titles = [commit.title for commit in hub.api.list_repo_commits(repository)]
    assert titles.count(f"Publish {ID}") == 1
    folder = snapshot_download(repository, endpoint=server.endpoint, local_dir=tmp_path / "got")
    assert same_files(shelf.entry(), Path(folder))


@pytest.mark.real
def test_one_of_many_pushes_lands_and_the_others_are_told(
    hub: client.Hub, server: Server, files: Path, tmp_path: Path
) -> None:
    """Four entries of one name and other content, pushed to one repository at once."""
    shelves = [shelve(tmp_path / str(n), files, padding=1000, seed=n) for n in range(4)]
    running = [start(shelf, server, server.endpoint, "--to", "crowd") for shelf in shelves]
    done = [finish(process) for process in running]
    landed = [shelf for shelf, one in zip(shelves, done, strict=True) if one.returncode == 0]
    for one in done:
        if one.returncode:
            refused(one, 1, "changed by someone else", "zoo push")
    assert landed
    commits = hub.api.list_repo_commits(f"crowd/{ID}")
    published = {shelf.entry().publications[0].commit for shelf in landed}
    assert {c.commit_id for c in commits if c.title.startswith("Publish")} == published
    assert set(tags(hub, f"crowd/{ID}").values()) == published


def test_a_server_that_is_not_there(shelf: Shelf, server: Server) -> None:
    done = finish(start(shelf, server, "http://127.0.0.1:9"))
    refused(done, 1, "cannot reach http://127.0.0.1:9", "run the same command again")
    done = finish(start(shelf, server, "ftp://example.org"))
    refused(done, 2, "not an endpoint")


def test_where_it_is_published_is_no_part_of_what_makes_an_entry() -> None:
    recipe = load(ROOT / "pipelines/recipes/smollm2-135m-w4.yaml")
    published = load(
        ROOT / "pipelines/recipes/smollm2-135m-w4.yaml", ["publish.to=me", "publish.private=true"]
    )
    assert published.publish is not None and (published.publish.to, published.publish.private) == ("me", True)
    assert published.to_yaml() == recipe.to_yaml()


@pytest.mark.real
def test_a_recipe_that_publishes(server: Server, hub: client.Hub, tmp_path: Path) -> None:
    from tests.test_run import RECIPE
    from tests.tiny import tiny_llama

    base = tiny_llama(tmp_path / "base")
    recipe = tmp_path / "recipe.yaml"
    said = {"name": "by-recipe", "base": str(base), **RECIPE}
    said["publish"] = {"endpoint": server.endpoint, "to": "recipes"}
    recipe.write_text(yaml.safe_dump(said))
    command = [sys.executable, "-m", "zoo.cli", "run", recipe]
    command += ["--store", tmp_path / "store", "--registry", tmp_path / "registry.db"]

    def run(token: str) -> subprocess.CompletedProcess[str]:
        environment = server.environment(tmp_path / "home", token)
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    refused(run(""), 1, "asks for a token", "HF_TOKEN")
    assert not (tmp_path / "store").exists() or not list((tmp_path / "store").glob("objects/*"))
    first = run(server.token)
    assert first.returncode == 0, first.stderr
    entry = Shelf(tmp_path / "store", tmp_path / "registry.db").entry("by-recipe")
    (publication,) = entry.publications
    assert entry.status == "published" and f"published: {server.endpoint}/recipes/by-recipe" in first.stderr
    assert "publish" not in yaml.safe_load(entry.recipe)
    again = run(server.token)
    assert again.returncode == 0 and "nothing was sent" in again.stderr
    entry = Shelf(tmp_path / "store", tmp_path / "registry.db").entry("by-recipe")
    assert entry.status == "published" and entry.publications == [publication]
