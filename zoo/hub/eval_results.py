"""Figures of recognised benchmarks as the Hub's `.eval_results/*.yaml`.

Source: https://huggingface.co/docs/hub/eval-results. A figure goes there only if the whole split was
measured; the others, and perplexity, stand in the card's `model-index`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from zoo.compare import is_accuracy, own
from zoo.entry import Measurement

FOLDER = ".eval_results"


class Benchmark(NamedTuple):
    dataset: str  # on the Hub
    task: str  # within it
    metric: str | None = None  # of ours: the one by which it is known; None: its accuracy (`is_accuracy`)


# lm-eval's task -> the benchmark
BENCHMARKS: Mapping[str, Benchmark] = {
    "arc_challenge": Benchmark("allenai/ai2_arc", "ARC-Challenge"),
    "arc_easy": Benchmark("allenai/ai2_arc", "ARC-Easy"),
    "gsm8k": Benchmark("openai/gsm8k", "gsm8k", "exact_match"),
    "hellaswag": Benchmark("Rowan/hellaswag", "hellaswag"),
    "humaneval": Benchmark("openai/openai_humaneval", "openai_humaneval", "pass@1"),
    "lambada_openai": Benchmark("EleutherAI/lambada_openai", "lambada_openai"),
    "mmlu": Benchmark("cais/mmlu", "mmlu"),
    "mmlu_pro": Benchmark("TIGER-Lab/MMLU-Pro", "mmlu_pro", "exact_match"),
    "winogrande": Benchmark("allenai/winogrande", "winogrande_xl"),
}


def eval_results(measurements: Iterable[Measurement], date: str) -> dict[str, bytes]:
    """Path in the repository -> content, one file for each recognised benchmark. `date` is ISO 8601."""
    files = {}
    for m in own(measurements):
        benchmark = BENCHMARKS.get(m.task)
        if m.subject != "entry" or benchmark is None or m.limit is not None:
            continue
        if not (is_accuracy(m) if benchmark.metric is None else m.metric == benchmark.metric):
            continue
        result = EvalResultEntry(
            dataset_id=benchmark.dataset,
            task_id=benchmark.task,
            value=round(100 * m.value, 4),  # percent, as the benchmarks' own tables have it
            date=date,
            notes=f"{m.metric}, {m.few_shot or 0}-shot, {m.harness}",
        )
        text = yaml.safe_dump(eval_result_entries_to_yaml([result]), sort_keys=False)
        files[f"{FOLDER}/{m.task}.yaml"] = text.encode()
    return files
