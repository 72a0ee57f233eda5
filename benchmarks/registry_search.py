"""How fast a search is in a large registry: `python -m benchmarks.registry_search [--entries N]`.

Fills a registry of made-up entries (kept in --folder, if given), in SQLite and in PostgreSQL (a server of its
own, where Debian's is installed), and asks as people do. Times are those of `Registry.search`, the page of
entries and their total included, in milliseconds; after one warm-up round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from random import Random

from tests.many import BASES, fill, many
from tests.postgres import database
from zoo.registry import Query, Registry, open_registry

ROUNDS = 400


def asked(random: Random, ids: list[str]) -> tuple[str, Query]:
    """A kind of question, and a question of this kind."""
    name, family, organisation, *_ = random.choice(BASES)
    word = random.choice(
        ["llama", "smollm2", "instruct", "7b", "8of16", "sparsegpt", "wanda", "gptq", "w4", "q4_0"]
    )
    sort = random.choice(["newest", "accuracy", "speed", "size", "perplexity", "bits", "sparsity"])
    kind = random.choice(
        [
            "first page",
            "one word",
            "two words",
            "rare words",
            "text and filters",
            "filters",
            "for a machine",
            "page 50",
        ]
    )
    fields: dict[str, object] = {
        "first page": {},
        "one word": {"text": word},
        "two words": {"text": f"{name} {random.choice(['8of16', 'wanda', 'w8', '2:4'])}"},
        "rare words": {"text": random.choice(ids)[3:]},
        "text and filters": {
            "text": word,
            "families": (family,),
            "max_size": 2_000_000_000,
            "min_sparsity": 0.5,
        },
        "filters": {"bases": (f"{organisation}/{name}",), "max_bits": 5.0, "patterns": ("8:16", "2:4")},
        "for a machine": {
            "machine": random.choice(["EPYC", "Apple M2"]),
            "families": (family,),
            "sort": "speed",
        },
        "page 50": {"offset": 1000},
    }[kind]  # type: ignore[assignment]
    return kind, Query.model_validate({"sort": sort, "limit": 20, **fields})


def measure(registry: Registry, entries: int) -> None:
    random = Random(3)
    ids = [one.id for one in many(min(entries, 200))]
    questions = [asked(random, ids) for _ in range(ROUNDS)]
    for _, query in questions[:40]:
        registry.search(query)
    times: dict[str, list[float]] = {"all": []}
    for kind, query in questions:
        began = time.perf_counter()
        registry.search(query)
        took = 1000 * (time.perf_counter() - began)
        times["all"].append(took)
        times.setdefault(kind, []).append(took)
    print(f"{'':18}{'p50':>8}{'p95':>8}{'max':>8}   ms")
    for kind, found in times.items():
        ranked = statistics.quantiles(found, n=20, method="inclusive")
        print(f"{kind:18}{ranked[9]:8.1f}{ranked[18]:8.1f}{max(found):8.1f}")
    began = time.perf_counter()
    registry.facets()
    print(f"{'facets':18}{1000 * (time.perf_counter() - began):8.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--only", choices=["sqlite", "postgresql"])
    parser.add_argument("--folder", type=Path, help="keep SQLite's registry here, and use it again")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        for name in ("sqlite", "postgresql") if arguments.only is None else (arguments.only,):
            url = database() if name == "postgresql" else str(folder / f"{arguments.entries}.db")
            began = time.perf_counter()
            if name == "postgresql" or not Path(url).exists():
                fill(url, arguments.entries)
            registry = open_registry(url)
            print(f"\n{name}, {registry.count():,} entries, ready in {time.perf_counter() - began:.0f} s")
            if name == "postgresql":
                with registry.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
                    connection.exec_driver_sql("VACUUM ANALYZE")  # which the server does by itself, later
            measure(registry, arguments.entries)


if __name__ == "__main__":
    main()
