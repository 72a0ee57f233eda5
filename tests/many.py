"""A registry of many made-up entries, as varied as real ones. No figure here was measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

from sqlalchemy import insert

from tests.example import ARC, PERPLEXITY, RECIPE, measured
from zoo.entry import Artifact, Benchmark, Entry, Layer, Machine, Stage, Verification
from zoo.files import sha256_bytes, sha256_json
from zoo.registry import open_registry
from zoo.registry.models import EntryRow, MachineRow
from zoo.registry.registry import _PARTS, _values, add_to_index, batched

HELLASWAG = {**ARC, "task": "hellaswag"}
# name, family, organisation, licence, parameters, perplexity, accuracy
BASES = [
    ("smollm2-135m-instruct", "llama", "HuggingFaceTB", "apache-2.0", 134_515_008, 25.6, 0.55),
    ("smollm2-360m-instruct", "llama", "HuggingFaceTB", "apache-2.0", 361_821_120, 18.4, 0.61),
    ("smollm2-1.7b", "llama", "HuggingFaceTB", "apache-2.0", 1_711_376_384, 11.2, 0.71),
    ("tinyllama-1.1b-chat", "llama", "TinyLlama", "apache-2.0", 1_100_048_384, 9.8, 0.62),
    ("llama-2-7b", "llama", "meta-llama", "llama2", 6_738_415_616, 5.5, 0.75),
    ("llama-2-13b", "llama", "meta-llama", "llama2", 13_015_864_320, 4.9, 0.79),
    ("llama-3.1-8b", "llama", "meta-llama", "llama3.1", 8_030_261_248, 6.2, 0.81),
    ("llama-3.2-1b-instruct", "llama", "meta-llama", "llama3.2", 1_235_814_400, 9.7, 0.65),
    ("mistral-7b-v0.1", "mistral", "mistralai", "apache-2.0", 7_241_732_096, 5.3, 0.80),
    ("mistral-7b-instruct-v0.3", "mistral", "mistralai", "apache-2.0", 7_248_023_552, 5.9, 0.82),
    ("mpt-7b", "mpt", "mosaicml", "apache-2.0", 6_649_286_656, 7.7, 0.70),
    ("mpt-7b-chat", "mpt", "mosaicml", "cc-by-nc-sa-4.0", 6_649_286_656, 9.9, 0.68),
    ("mpt-25m", "mpt", "sparse-zoo", None, 25_591_040, 236.0, 0.29),
]
PATTERNS = [None, "unstructured", "8:16", "6:16", "4:16", "4:8", "2:4"]
METHODS = ["magnitude", "wanda", "sparsegpt", "admm"]
QUANTIZERS = {16: None, 8: "absmax", 6: "rtn", 5: "gptq", 4: "gptq"}
CPUS = [
    ("AMD EPYC 7B13 64-Core Processor", 16, 18.0),
    ("AMD Ryzen 9 7950X 16-Core Processor", 16, 45.0),
    ("Intel(R) Xeon(R) Platinum 8480+", 56, 60.0),
    ("Intel(R) Core(TM) i7-1185G7 @ 3.00GHz", 4, 22.0),
    ("Apple M2", 8, 50.0),
    ("Neoverse-N1", 4, 15.0),
]


def _machine(cpu: str, cores: int) -> Machine:
    facts: dict[str, Any] = {
        "cpu": cpu,
        "cores": cores,
        "threads_per_core": 1,
        "isa": ["neon"] if cpu in ("Apple M2", "Neoverse-N1") else ["avx2", "fma"],
        "memory_bytes": cores << 31,
        "system": "Linux 6.1.0 x86_64",
    }
    return Machine(fingerprint=sha256_json(facts), **facts)


MACHINES = [(_machine(cpu, cores), bandwidth) for cpu, cores, bandwidth in CPUS]


def many(count: int, seed: int = 0) -> Iterator[Entry]:
    """`count` entries, always the same; one in fifty failed, some without figures, licence or speed."""
    random = Random(seed)
    start = datetime(2025, 1, 1, tzinfo=UTC)
    for number in range(count):
        yield _entry(number, random, (start + timedelta(minutes=37 * number)).isoformat())


def fill(registry_url: str, count: int, seed: int = 0) -> None:
    """Write `many(count)` into a registry in one transaction; about 0.5 ms an entry."""
    registry = open_registry(registry_url)
    with registry.engine.execution_options(zoo_begin="write").begin() as connection:
        connection.execute(insert(MachineRow), [machine.model_dump() for machine, _ in MACHINES])
        for entries in batched(many(count, seed), 1000):
            lists = set(_PARTS)  # each in a table of its own
            connection.execute(insert(EntryRow), [entry.model_dump(exclude=lists) for entry in entries])
            for name, (_, row) in _PARTS.items():
                records = [
                    {"entry_id": entry.id, "position": position, **_values(record)}
                    for entry in entries
                    for position, record in enumerate(getattr(entry, name))
                ]
                if records:
                    connection.execute(insert(row), records)
            add_to_index(connection, entries)


def _entry(number: int, random: Random, created: str) -> Entry:
    name, family, organisation, license_, parameters, base_perplexity, base_accuracy = random.choice(BASES)
    pattern = random.choice(PATTERNS)
    sparsity, keep = _sparsity(pattern, random)
    bits = random.choice(list(QUANTIZERS))
    method = "+".join(filter(None, [random.choice(METHODS) if pattern else None, QUANTIZERS[bits]])) or None
    words = [name, f"sparse{sparsity:.0%}".rstrip("%") if pattern == "unstructured" else keep]
    entry_id = "-".join(filter(None, [*words, f"w{bits}" if bits < 16 else "f16", f"{number:06d}"]))
    stored = bits * (1 - sparsity) + (1.0 if pattern else 0.0) + (0.25 if bits < 16 else 0.0)
    loss = math.exp(random.gauss(0.1, 0.05) + 1.2 * sparsity**3 + (0.3 if bits < 5 else 0.0))
    failed = random.random() < 0.02
    artifacts = _artifacts(entry_id, parameters, stored, bits, random)
    return Entry(
        id=entry_id,
        status="failed" if failed else random.choice(("verified", "verified", "published")),
        failure="model.gguf: mean KL divergence 2.31 nats, at most 0.8" if failed else None,
        family=family,  # type: ignore[arg-type]
        base_model=f"hub:{organisation}/{name}",
        base_repository=f"{organisation}/{name}" if license_ else None,
        base_revision=sha256_bytes(name.encode())[:40],
        base_sha256=sha256_bytes(name.encode()),
        license=license_,
        recipe=f"{RECIPE}# {entry_id}\n",
        recipe_sha256=sha256_bytes(entry_id.encode()),
        created=created,
        parameters=parameters,
        sparsity=sparsity,
        bits_per_weight=stored,
        compression_ratio=16 / stored,
        versions={"python": "3.11.2", "sparse-zoo": "0.1.0", "torch": "2.13.0"},
        layers=[
            Layer(
                name=f"model.layers.{block}.{linear}",
                rows=576,
                columns=columns,
                sparsity=sparsity,
                pattern=pattern,
                bits=bits,
                group=64 if bits < 16 else None,
                symmetric=bits < 16 or None,
                method=method,
                error=random.random() * 0.1,
            )
            for block in range(2)
            for linear, columns in (("self_attn.q_proj", 576), ("mlp.down_proj", 1536))
        ],
        artifacts=artifacts,
        measurements=[]
        if failed or random.random() < 0.05
        else [
            measured("base", "perplexity", base_perplexity, base_perplexity / 80, **PERPLEXITY),
            measured("entry", "perplexity", base_perplexity * loss, base_perplexity / 70, **PERPLEXITY),
            measured("base", "accuracy", base_accuracy, 0.0352, **ARC),
            measured("entry", "accuracy", base_accuracy / loss, 0.0348, **ARC),
            *([measured("entry", "accuracy_norm", 0.9 / loss, 0.03, **HELLASWAG)] if number % 3 == 0 else []),
        ],
        benchmarks=[]
        if failed or not artifacts
        else [
            Benchmark(
                runner=runner,
                runner_version="0.1.0",
                artifact=artifact.path,
                threads=machine.cores,
                prompt_tokens=512,
                generated_tokens=64,
                repeats=3,
                prefill_tokens_per_s=bandwidth * 4e9 / artifact.size * random.uniform(0.8, 1.2),
                decode_tokens_per_s=bandwidth * 1e9 / artifact.size * random.uniform(0.7, 1.0),
                load_s=artifact.size / 2e9,
                peak_memory_bytes=int(artifact.size * 1.2),
                machine=machine,
            )
            for machine, bandwidth in random.sample(MACHINES, random.choice((0, 1, 1, 2)))
            for runner, artifact in (("zoo", artifacts[-1]), ("llama.cpp", artifacts[1]))
        ],
        verifications=[
            Verification(
                runner="llama.cpp",
                runner_version="0.3.36",
                artifact=artifacts[1].path,
                passed=not failed,
                reason="mean KL divergence 2.31 nats, at most 0.8" if failed else "within tolerance",
                top1_agreement=0.98,
                kl_divergence=2.31 if failed else 0.001,
                positions=512,
            )
        ]
        if artifacts
        else [],
        stages=[Stage(name="1. prune", key=sha256_bytes(entry_id.encode()), status="done", seconds=182.4)],
    )


def _sparsity(pattern: str | None, random: Random) -> tuple[float, str | None]:
    """A pattern's sparsity, and its name in an id."""
    if pattern is None:
        return 0.0, None
    if pattern == "unstructured":
        return random.choice((0.5, 0.6, 0.7)), pattern
    keep, group = map(int, pattern.split(":"))
    return 1 - keep / group, f"{keep}of{group}"


def _artifacts(entry_id: str, parameters: int, stored: float, bits: int, random: Random) -> list[Artifact]:
    """Weights in two safetensors shards, one GGUF file and a packed one; now and then none at all."""
    if random.random() < 0.03:
        return []
    gguf = "Q4_0" if bits <= 4 else "Q8_0" if bits <= 8 else "F16"
    gguf_bits = {"Q4_0": 4.5, "Q8_0": 8.5, "F16": 16.0}[gguf]
    files = [
        ("model-00001-of-00002.safetensors", "safetensors", "float16", parameters),
        (f"{entry_id}-{gguf}.gguf", "gguf", gguf, int(parameters * gguf_bits / 8)),
        ("model-00002-of-00002.safetensors", "safetensors", "float16", parameters),
        ("config.json", "config", None, 861),
        ("packed.safetensors", "packed", f"int{min(bits, 8)}", int(parameters * min(stored, 8.25) / 8)),
    ]
    return [
        Artifact.model_validate(
            {"path": path, "kind": kind, "format": form, "size": size, "sha256": sha256_bytes(path.encode())}
        )
        for path, kind, form, size in files
    ]
