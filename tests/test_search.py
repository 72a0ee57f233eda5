"""Search: the same entries as a plain filter over all of them finds, in the same order, on both databases."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import pytest

from tests.example import ARC, PERPLEXITY, entry, measured
from tests.hub import serving
from tests.many import fill, many
from tests.postgres import database
from tests.process import Zoo, refused
from zoo import search as searching
from zoo.entry import Artifact, Entry, Layer
from zoo.files import sha256_bytes
from zoo.hub import client
from zoo.hub.manifest import File, Manifest
from zoo.registry import Query, Registry, open_registry, registry
from zoo.registry import query as query_
from zoo.registry.figures import figures

COUNT = 700
ENTRIES = list(many(COUNT))
CPUS = sorted({b.machine.cpu for e in ENTRIES for b in e.benchmarks})


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def filled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    postgres = request.param == "postgresql"
    url = database() if postgres else str(tmp_path_factory.mktemp("many") / "registry.db")
    fill(url, COUNT)
    opened = open_registry(url, create=False)
    yield opened
    opened.engine.dispose()


# --- a plain filter, which shares nothing with the registry ---


def value_of(one: Entry, sort: str, machine: str | None) -> Any:
    own = {m.task: m.value for m in one.measurements if m.subject == "entry"}
    if sort == "perplexity":
        return own.get(PERPLEXITY["task"])
    if sort == "accuracy":
        return fmean(own[task] for task in tasks(one)) if own else None
    if sort == "speed":
        return max((b.decode_tokens_per_s for b in on_machine(one, machine)), default=None)
    if sort == "size":
        return packed(one)
    fields = {"newest": one.created, "id": one.id, "bits": one.bits_per_weight, "sparsity": one.sparsity}
    return fields[sort]


def tasks(one: Entry) -> list[str]:
    return [m.task for m in one.measurements if m.subject == "entry" and m.task != PERPLEXITY["task"]]


def packed(one: Entry) -> int | None:
    return next((a.size for a in one.artifacts if a.kind == "packed"), None)


def on_machine(one: Entry, machine: str | None) -> list[Any]:
    """But for what is the model rounded further."""
    own = [b for b in one.benchmarks if not b.artifact.endswith("Q4_0.gguf")]
    if machine is None:
        return own
    return [
        b for b in own
        if machine.lower() in b.machine.cpu.lower() or b.machine.fingerprint.startswith(machine)
    ]  # fmt: skip


def facets_of(one: Entry) -> dict[str, str]:
    return {
        "families": one.family,
        "bases": one.base_repository or one.base_model,
        "methods": one.layers[0].method or "unknown",
        "patterns": one.layers[0].pattern or "dense",
        "licenses": one.license or "unknown",
        "statuses": one.status,
    }


def chosen(one: Entry, query: Query, name: str) -> bool:
    wanted, value = getattr(query, name), facets_of(one)[name]
    if name == "statuses" and not wanted:
        return value != "failed"
    return not wanted or value in wanted or (name == "bases" and one.base_model in wanted)


def passes(one: Entry, query: Query) -> bool:
    formats = [a.format for a in one.artifacts if a.format]
    names = [one.id, one.base_model, one.base_repository, one.family, one.layers[0].method or "unknown"]
    parts = [str(part).lower() for part in [*names, one.layers[0].pattern or "dense", *formats]]
    size = packed(one)
    return (
        all(any(word in part for part in parts) for word in (query.text or "").lower().split())
        and (query.min_sparsity is None or one.sparsity >= query.min_sparsity)
        and (query.max_sparsity is None or one.sparsity <= query.max_sparsity)
        and (query.min_bits is None or one.bits_per_weight >= query.min_bits)
        and (query.max_bits is None or one.bits_per_weight <= query.max_bits)
        and (query.min_size is None or (size is not None and size >= query.min_size))
        and (query.max_size is None or (size is not None and size <= query.max_size))
        and (query.machine is None or bool(on_machine(one, query.machine)))
    )


def expected_ids(query: Query) -> list[str]:
    found = [e for e in ENTRIES if passes(e, query) and all(chosen(e, query, name) for name in facets_of(e))]
    found.sort(key=lambda one: one.id)
    have = [one for one in found if value_of(one, query.sort, query.machine) is not None]
    lack = [one.id for one in found if value_of(one, query.sort, query.machine) is None]
    largest_first = (query.sort in ("newest", "accuracy", "speed", "sparsity")) != query.reverse
    have.sort(key=lambda one: value_of(one, query.sort, query.machine), reverse=largest_first)
    if query.sort == "accuracy":  # over arc_easy and hellaswag, then over arc_easy alone
        have.sort(key=lambda one: -len(tasks(one)))
    return [one.id for one in have] + lack


def any_query(random: Random) -> Query:
    """A query of up to four filters whose values occur, and now and then of values that do not."""
    one = random.choice(ENTRIES)
    facets = facets_of(one)
    offers: dict[str, Any] = {
        "text": random.choice(
            [
                one.id[: random.randint(1, 12)],
                "llama 8of16",
                "q4_0 mistral",
                "W4",
                "7b gptq",
                "%",
                "_",
                '"',
                "x-y",
            ]
        ),
        "families": (one.family, random.choice(("mpt", "llama"))),
        "bases": (random.choice((facets["bases"], one.base_model)),),
        "methods": (facets["methods"], "admm"),
        "patterns": (facets["patterns"],),
        "licenses": (facets["licenses"], "mit"),
        "statuses": (random.choice(("verified", "published", "failed")),),
        "min_sparsity": one.sparsity,
        "max_sparsity": one.sparsity,
        "min_bits": one.bits_per_weight,
        "max_bits": one.bits_per_weight,
        "min_size": packed(one),
        "max_size": packed(one),
        "machine": random.choice([*CPUS, "EPYC", "intel", "nothing like it", one.base_sha256]),
    }
    picked = random.sample(sorted(offers), random.choice((0, 1, 1, 2, 2, 3, 4)))
    sorts = ("newest", "id", "accuracy", "perplexity", "speed", "size", "bits", "sparsity")
    return Query(
        **{name: offers[name] for name in picked},
        sort=random.choice(sorts),  # type: ignore[arg-type]
        reverse=random.random() < 0.3,
        limit=random.choice((1, 10, 40)),
        offset=random.choice((0, 0, 3)),
    )


def test_search_finds_what_a_plain_filter_finds(filled: Registry) -> None:
    random = Random(1)
    found_some = 0
    for _ in range(100):
        query = any_query(random)
        ids = expected_ids(query)
        page = filled.search(query)
        assert [e.id for e in page.entries] == ids[query.offset :][: query.limit], query
        assert page.total == len(ids), query
        found_some += bool(ids)
    assert found_some > 50


@pytest.mark.parametrize("walked", [5, 60, 10_000])
def test_search_of_more_than_is_counted(
    filled: Registry, walked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a walk that finds the page, by one that is too short, and by sorting: the same page."""
    for module in (query_, registry):
        monkeypatch.setattr(module, "MOST_COUNTED", 20)
    monkeypatch.setattr(registry, "MOST_WALKED", walked)
    if filled.engine.dialect.name == "postgresql":
        with filled.engine.begin() as connection:
            connection.exec_driver_sql("ANALYZE")  # it walks where it expects many matches
    random = Random(4)
    more = 0
    for query in [
        *(any_query(random) for _ in range(60)),
        Query(limit=0),
        Query(limit=None),
        Query(offset=650),
    ]:
        ids = expected_ids(query)
        page = filled.search(query)
        end = None if query.limit is None else query.offset + query.limit
        assert [e.id for e in page.entries] == ids[query.offset : end], query
        assert (page.total, page.more) == (min(len(ids), 20), len(ids) > 20), query
        more += page.more
    assert more > 20


def test_facets_count_what_each_choice_would_find(filled: Registry) -> None:
    found = filled.facets().model_dump()
    for name, counts in found.items():
        assert list(counts.values()) == sorted(counts.values(), reverse=True)
        assert counts == Counter(
            facets_of(e)[name] for e in ENTRIES if name == "statuses" or e.status != "failed"
        )
        for value, count in counts.items():
            assert filled.search(Query.model_validate({name: (value,), "limit": 0})).total == count
    assert "failed" in found["statuses"]


def test_pages_join_to_the_whole(filled: Registry) -> None:
    whole = [e.id for e in filled.search(Query(sort="size", limit=None)).entries]
    pages = [filled.search(Query(sort="size", limit=97, offset=at)).entries for at in range(0, 800, 97)]
    assert [e.id for page in pages for e in page] == whole
    assert len(set(whole)) == len(whole) > 600


def test_what_is_found_is_what_was_put(filled: Registry) -> None:
    by_id = {e.id: e for e in ENTRIES}
    for summary in filled.search(Query(limit=30, sort="id")).entries:
        whole = by_id[summary.id]
        assert summary.model_dump(exclude={"figures"}) == whole.model_dump(
            include=set(type(summary).model_fields) - {"figures"}
        )
        assert summary.figures == figures(whole)


def test_speed_is_that_of_the_machine_asked_for(filled: Registry) -> None:
    by_id = {e.id: e for e in ENTRIES}
    slower = 0
    for summary in filled.search(Query(machine="Apple M2", sort="speed", limit=None)).entries:
        speeds = [b.decode_tokens_per_s for b in on_machine(by_id[summary.id], "Apple M2")]
        assert summary.figures.speed == max(speeds)
        slower += max(speeds) < max(b.decode_tokens_per_s for b in on_machine(by_id[summary.id], None))
    assert slower


@pytest.mark.parametrize(
    "text", ["\0", "a\0b", "'; DROP TABLE entries; --", '"', '" OR "', "NEAR(", "*", "\\", "ß"]
)
def test_no_text_is_syntax(filled: Registry, text: str) -> None:
    assert filled.search(Query(text=text)).total == 0
    assert filled.count() == COUNT


def test_the_index_follows_every_change(filled: Registry) -> None:
    """By put, put again, and removal, the text index included."""
    one = entry("a-passing-entry", created="2035-01-01T00:00:00Z")
    filled.put(one)
    try:
        assert [e.id for e in filled.search(Query(text="passing")).entries] == [one.id]
        filled.put(entry(one.id, base_repository="org/elsewhere", created=one.created, status="failed"))
        assert filled.search(Query(text="passing")).total == 0
        assert filled.search(Query(text="passing elsewhere", statuses=("failed",))).total == 1
        assert filled.search(Query(text="huggingfacetb passing", statuses=("failed",))).total == 0
    finally:
        with filled.engine.begin() as connection:
            connection.exec_driver_sql(f"DELETE FROM entries WHERE id = '{one.id}'")
    assert filled.count() == COUNT
    assert filled.search(Query(text="passing", statuses=("failed", "verified"))).total == 0
    if filled.engine.dialect.name == "sqlite":
        with filled.engine.begin() as connection:  # raises if the text index is not that of the table
            connection.exec_driver_sql(
                "INSERT INTO entry_text (entry_text, rank) VALUES ('integrity-check', 1)"
            )


# --- the figures ---


def test_figures_of_an_entry() -> None:
    found = figures(entry())
    assert found.size == 269_060_552  # of its weights: GGUF files are the model rounded further
    assert (found.accuracy, found.tasks) == (0.41, "arc_easy:200")
    assert found.accuracy_delta == pytest.approx(0.41 - 0.545)
    assert (found.perplexity, found.base_perplexity) == (41.6, 25.61)
    assert found.speed == 71.25
    assert (found.method, found.pattern) == ("sparsegpt+gptq", "8:16")


def test_figures_of_an_entry_without_any() -> None:
    found = figures(entry(layers=[], artifacts=[], measurements=[], benchmarks=[]))
    assert found.model_dump(exclude={"method", "pattern"}) == dict.fromkeys(
        ["size", "accuracy", "tasks", "accuracy_delta", "perplexity", "base_perplexity", "speed"]
    )
    assert (found.method, found.pattern) == ("unknown", "dense")


def test_shards_count_together_and_tasks_alike() -> None:
    files = [("a-1.safetensors", 60), ("a-2.safetensors", 50), ("b.gguf", 100)]
    other_task = {**ARC, "task": "hellaswag"}
    unlike = {**ARC, "task": "piqa"}
    lambada = {**ARC, "task": "lambada_openai", "context_length": 4096, "direction": "lower_is_better"}
    longer = {**PERPLEXITY, "context_length": 2048}
    found = figures(
        entry(
            artifacts=[
                Artifact(
                    path=p, kind="gguf" if "gguf" in p else "safetensors", size=s, sha256=sha256_bytes(b"")
                )
                for p, s in files
            ],
            measurements=[
                measured("entry", "accuracy", 0.4, None, **ARC),
                measured("base", "accuracy", 0.5, None, **ARC),
                measured("entry", "accuracy", 0.7, None, **other_task),  # which is not what it is known by
                measured("entry", "accuracy_norm", 0.2, None, **other_task),
                measured("base", "accuracy_norm", 0.4, None, **other_task),
                measured("entry", "accuracy_norm", 0.8, None, **unlike),
                measured("entry", "accuracy", 0.9, None, **unlike),
                measured("base", "accuracy", 0.9, None, **{**unlike, "limit": 7}),
                measured("entry", "perplexity", 9.0, None, **longer),
                measured("entry", "perplexity", 12.0, None, **PERPLEXITY),
                measured("base", "perplexity", 10.0, None, **PERPLEXITY),
                measured("entry", "perplexity", 40.0, None, **lambada),  # of questions, not of a text
                measured("base", "perplexity", 40.0, None, **lambada),
            ],
            layers=[
                Layer(name="a", rows=10, columns=10, sparsity=0, bits=4, method="rtn"),
                Layer(
                    name="b", rows=20, columns=10, sparsity=0.5, bits=4, method="wanda+gptq", pattern="2:4"
                ),
                Layer(name="c", rows=9, columns=10, sparsity=0, bits=4, method="rtn"),
            ],
        )
    )
    assert found.size == 110
    assert found.accuracy == pytest.approx(fmean((0.4, 0.2, 0.9)))
    assert found.tasks == "arc_easy:200,hellaswag:200,piqa:200"
    assert found.accuracy_delta == pytest.approx(fmean((-0.1, -0.2)))  # of the tasks measured alike
    assert (found.perplexity, found.base_perplexity) == (12.0, 10.0)  # not at a context that the base lacks
    assert (found.method, found.pattern) == ("wanda+gptq", "2:4")


WEIGHTS = {
    "model.safetensors": 270, "F16.gguf": 271, "BF16.gguf": 269, "Q8_0.gguf": 145, "Q2_K.gguf": 88,
    "packed.safetensors": 147,
}  # fmt: skip


@pytest.mark.parametrize(
    ("there", "size", "speed"),
    [
        (list(WEIGHTS), 147, "packed.safetensors"),
        (["model.safetensors", "F16.gguf", "BF16.gguf", "Q8_0.gguf", "Q2_K.gguf"], 269, "Q8_0.gguf"),
        (["F16.gguf", "Q2_K.gguf"], 271, "F16.gguf"),
        (["Q8_0.gguf", "Q2_K.gguf"], 145, "Q8_0.gguf"),
        (["Q2_K.gguf"], 88, "Q2_K.gguf"),  # imported so: it is the model
    ],
)
def test_size_and_speed_are_those_of_what_was_measured(there: list[str], size: int, speed: str) -> None:
    files = [
        Artifact(
            path=path,
            kind="gguf" if "gguf" in path else "packed" if "packed" in path else "safetensors",
            format=path.partition(".")[0] if "gguf" in path else None,
            size=WEIGHTS[path],
            sha256=sha256_bytes(b""),
        )
        for path in there
    ]
    run = entry().benchmarks[0]
    speeds = {"packed.safetensors": 185.0, "F16.gguf": 85.0, "Q8_0.gguf": 120.0, "Q2_K.gguf": 999.0}
    runs = [run.model_copy(update={"artifact": p, "decode_tokens_per_s": s}) for p, s in speeds.items()]
    found = figures(entry(artifacts=files, benchmarks=runs))
    assert (found.size, found.speed) == (size, speeds[speed])


def test_figures_too_large_for_a_mean_are_left_out() -> None:
    huge = [measured("entry", "accuracy", 1.7e308, None, **{**ARC, "task": str(i)}) for i in range(3)]
    assert figures(entry(measurements=huge)).accuracy is None
    assert math.isfinite(figures(entry(measurements=huge[:1])).accuracy or math.inf)


# --- what others published ---


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[client.Hub]:
    """An empty server that this process may write to."""
    with serving(tmp_path / "server") as server:
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield client.connect(server.endpoint)


def publish(hub: client.Hub, namespace: str, one: Entry, manifest: bytes | None = None) -> None:
    """As far as a search looks at it: a tagged card, and the manifest."""
    files = [File(path=a.path, size=a.size, sha256=a.sha256) for a in one.artifacts]
    manifest = manifest or Manifest(files=files, entry=one).to_bytes()
    name = hub.api.create_repo(f"{namespace}/{one.id}").repo_id
    for path, data in (("zoo.json", manifest), ("README.md", b"---\ntags: [sparse-zoo]\n---\n")):
        hub.api.upload_file(path_or_fileobj=data, path_in_repo=path, repo_id=name)


def other_files(one: Entry, **changes: Any) -> Entry:
    files = [a.model_copy(update={"sha256": sha256_bytes(a.path.encode())}) for a in one.artifacts]
    return one.model_copy(update={"artifacts": files, **changes})


def test_entries_of_one_id_are_told_apart(hub: client.Hub, tmp_path: Path) -> None:
    theirs = entry("foo", sparsity=0.5)
    another = other_files(theirs, sparsity=0.75)
    for namespace, one in (("alice", theirs), ("bob", another), ("carol", theirs)):
        publish(hub, namespace, one)
    publish(hub, "alice", entry("foo-2"))

    def found(local: Registry | None = None, **asked: Any) -> list[tuple[str, float, list[str]]]:
        page = searching.search(Query(**{"sort": "id", **asked}), local, hub)
        assert page.total >= len(page.hits)
        return [(h.id, h.sparsity, sorted(p.repository or p.endpoint for p in h.places)) for h in page.hits]

    same, bobs, last = ("foo", 0.5, ["alice/foo", "carol/foo"]), ("foo", 0.75, ["bob/foo"]), "foo-2"
    everything = found()
    assert sorted(everything[:2]) == [same, bobs] and everything[2][0] == last
    assert searching.search(Query(), None, hub).total == 3
    assert sorted(found(text="foo", limit=2)) == [same, bobs]
    assert [hit[0] for hit in found(limit=1, offset=2)] == [last]
    assert found(min_sparsity=0.7) == [bobs] and found(max_sparsity=0.7, text="smollm2")[0] == same

    local = open_registry(str(tmp_path / "registry.db"))
    local.put(theirs)
    mine = ("foo", 0.5, ["alice/foo", "carol/foo", "local"])
    assert sorted(found(local)[:2]) == [mine, bobs]
    local.put(theirs.model_copy(update={"status": "failed", "failure": "does not run"}))
    assert sorted(found(local)[:2]) == [same, bobs]  # one that failed here hides none
    assert found(local, statuses=("failed",)) == [("foo", 0.5, ["local"])]


def test_an_odd_manifest_is_left_out_and_the_rest_found(
    hub: client.Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    good, odd = entry("good"), json.loads(Manifest(files=[], entry=entry("odd", artifacts=[])).to_bytes())
    odd["entry"]["benchmarks"][0]["machine"]["cpu"] = "another"  # by the fingerprint it is that of `good`
    publish(hub, "alice", good)
    publish(hub, "evil", entry("odd", artifacts=[]), json.dumps(odd).encode())
    assert [hit.id for hit in searching.search(Query(), None, hub).hits] == ["good"]
    assert "left out: zoo.json of evil/odd" in capsys.readouterr().err


def test_what_a_registry_does_not_take_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = entry().benchmarks[0]
    odd = run.model_copy(update={"machine": run.machine.model_copy(update={"cpu": "another"})})
    taking = open_registry(str(tmp_path / "registry.db"))
    searching._put_all(taking, [entry("a"), entry("b", benchmarks=[odd]), entry("c")])
    assert [one.id for one in taking.every()] == ["a", "c"]
    assert "left out: b was measured on a machine" in capsys.readouterr().err


# --- the command ---


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    folder = tmp_path_factory.mktemp("zoo")
    fill(str(folder / "registry.db"), COUNT)
    return Zoo(folder, {"ZOO_REGISTRY": str(folder / "registry.db")})


def test_the_command_finds_and_sorts(zoo: Zoo) -> None:
    arguments = ["--family", "llama", "--max-size", "1GB", "--min-sparsity", "50%", "--bits", "4.5"]
    found = json.loads(zoo("search", "smollm2", *arguments, "--sort", "speed", "--json").stdout)
    query = Query(
        text="smollm2", families=("llama",), max_size=10**9, min_sparsity=0.5, max_bits=4.5, sort="speed"
    )
    assert [hit["id"] for hit in found["hits"]] == expected_ids(query)[:20]
    assert found["total"] == len(expected_ids(query)) > 0
    assert all(hit["places"] == [{"endpoint": "local", "repository": None}] for hit in found["hits"])


def test_the_command_ranks_answers_to_the_same_tasks_only(zoo: Zoo) -> None:
    """Over the most tasks first, and told apart, though over one the mean may be higher."""
    query = Query(text="smollm2", families=("llama",), sort="accuracy", limit=None)
    ids = expected_ids(query)
    by_id = {one.id: one for one in ENTRIES}
    first_of_one = next(i for i, id_ in enumerate(ids) if len(tasks(by_id[id_])) == 1)
    at = str(first_of_one - 2)
    arguments = (
        "search",
        "smollm2",
        "--family",
        "llama",
        "--sort",
        "accuracy",
        "--limit",
        "4",
        "--offset",
        at,
    )
    done = zoo(*arguments)
    lines = done.stdout.splitlines()[1:]
    assert [line.split()[0] for line in lines] == ids[first_of_one - 2 : first_of_one + 2]
    assert ["(2)" in line for line in lines] == [True, True, False, False]
    assert ["(1)" in line for line in lines] == [False, False, True, True]
    assert "do not compare" in done.stderr and "arc_easy:200, hellaswag:200; arc_easy:200" in done.stderr
    assert "do not compare" not in zoo(*arguments[:-3], "1").stderr


def test_a_name_that_several_machines_have_is_refused(tmp_path: Path) -> None:
    one = entry("a")
    run = one.benchmarks[0]
    other = run.machine.model_copy(update={"fingerprint": sha256_bytes(b"other memory")})
    opened = open_registry(str(tmp_path / "registry.db"))
    opened.put(one)
    opened.put(entry("b", benchmarks=[run.model_copy(update={"machine": other})]))
    zoo = Zoo(tmp_path, {"ZOO_REGISTRY": str(tmp_path / "registry.db")})
    named = [f"({m.fingerprint[:8]})" for m in (run.machine, other)]
    refused(zoo("search", "--for", "EPYC"), 2, "2 machines", *named, "--for ")
    refused(zoo("best", "--base", one.base_model, "--for", "EPYC"), 2, "2 machines", *named)
    done = zoo("search", "--for", other.fingerprint[:8])
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == ["b"]


def test_the_command_tells_how_many_there_are(zoo: Zoo) -> None:
    done = zoo("search", "mpt", "7b", "--limit", "3", "--offset", "3", "--for", "epyc", "--sort", "speed")
    query = Query(text="mpt 7b", machine="EPYC", sort="speed")
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == expected_ids(query)[3:6]
    assert f"4-6 of {len(expected_ids(query))}" in done.stderr
    assert "--offset 6" in done.stderr
    nothing = zoo("search", "no such model")
    assert (nothing.stdout, nothing.returncode) == ("", 0)
    assert "0 of 0" in nothing.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-size", "200 apples"], ["--max-size", "200 apples", "MB"]),
        (["--min-sparsity", "half"], ["--min-sparsity", "half", "%"]),
        (["--sort", "beauty"], ["beauty", "accuracy"]),
        (["--family", "gpt"], ["gpt", "mistral"]),
        (["--for", "Cray-1"], ["Cray-1", "Apple M2"]),
        (["--limit", "0"], ["--limit", "1"]),
    ],
)
def test_what_the_command_refuses(zoo: Zoo, arguments: list[str], words: list[str]) -> None:
    refused(zoo("search", *arguments), 2, *words)


def test_an_argument_that_is_no_text_finds_nothing(zoo: Zoo) -> None:
    done = zoo("search", "\udcff", "--base", "\udcff")
    assert (done.returncode, done.stdout) == (0, "")


def test_without_a_registry(tmp_path: Path) -> None:
    refused(Zoo(tmp_path)("search", "x", "--registry", tmp_path / "none.db"), 1, "no registry", "migrate")
