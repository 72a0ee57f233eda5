"""Memory and time that training by a recipe takes, on random weights of a model's shape:
`python -m benchmarks.recover_memory RECIPE --shape llama-2-7b --memory 80`.

The settings are those of the recipe's last `recover` step (--set changes the recipe), but 40 steps are done,
on random tokens; what the recipe prunes before it is pruned by magnitude as the training begins, and rounding
begins after half of it. On a GPU the process may have --memory GB and no more. Prints, as a Markdown table,
the most that tensors took, the same with what PyTorch's allocator keeps (of a CPU: the whole process), and
the seconds of a step before and while weights are rounded.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.recipe import Budget, Prune, PruneInTraining, Recover, TrainingText, leading, load
from zoo.errors import UsageError, ZooError
from zoo.runner.bench_worker import peak_memory
from zoo.runner.packed import Architecture
from zoo.runner.shapes import shape

STEPS = 40
# Steps between two points of the curve: none compiles from the 10th to the 20th, and after the 30th.
APART = 10
TOKENS = 1 << 22


def training(recipe: Path, changes: list[str]) -> Recover:
    """The last `recover` step as it is to be measured. Raises UsageError if the recipe has none."""
    for led in reversed(leading(load(recipe, changes).steps).values()):
        if isinstance(step := led[-1], Recover):
            break
    else:
        raise UsageError(f"{recipe} trains nothing", expected="a recipe with a `recover` step")
    changed: dict[str, Any] = {
        "data": [TrainingText(source="random.npy")],
        "skills": [],
        "written": [],
        "resample": None,
        "budget": Budget(tokens=STEPS * step.batch * step.length),
    }
    pruned = [one for one in led[:-1] if isinstance(one, Prune)]
    if step.prune is not None:
        changed["prune"] = step.prune.model_copy(update={"until": 0.2})
    elif pruned:
        changed["prune"] = PruneInTraining(method="magnitude", pattern=pruned[-1].pattern, until=0.2)
    if step.quantize is not None:
        changed["quantize"] = step.quantize.model_copy(update={"start": 0.5})
    return step.model_copy(update=changed)


def write_model(one: Architecture, folder: Path) -> None:
    """A model folder of this architecture in bfloat16, initialised as transformers does it."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import (
        AutoModelForCausalLM,
        LlamaConfig,
        MistralConfig,
        MptConfig,
        PreTrainedTokenizerFast,
    )

    common = {"vocab_size": one.vocabulary, "tie_word_embeddings": one.tied}
    config: Any
    if one.family == "mpt":
        config = MptConfig(
            d_model=one.hidden, n_heads=one.heads, n_layers=one.layers, max_seq_len=one.context,
            expansion_ratio=one.intermediate // one.hidden, **common,
        )  # fmt: skip
    else:
        config = {"llama": LlamaConfig, "mistral": MistralConfig}[one.family](
            hidden_size=one.hidden, intermediate_size=one.intermediate, num_hidden_layers=one.layers,
            num_attention_heads=one.heads, num_key_value_heads=one.kv_heads,
            max_position_embeddings=one.context, rope_parameters=one.rope, **common,
        )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(folder)


def measured(folder: Path, step: Recover, memory_gb: float | None) -> dict[str, Any]:
    """Train; peaks in bytes, seconds of steps, on what."""
    import torch

    from pipelines.recover.train import Job, train

    gpu = torch.cuda.is_available()
    if gpu:  # what writing the model took
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if memory_gb is not None and gpu:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(memory_gb * 1e9 / whole, 1.0))
    out = folder / "out"
    out.mkdir()
    model = folder / "model"
    job = Job(step=step, identity="memory", student=model, teacher=model, tokens=[folder / "random.npy"],
              out=out, state=folder / "state")  # fmt: skip
    seconds = {point.step: point.seconds for point in train(job).curve}
    return {
        "tensors": torch.cuda.max_memory_allocated() if gpu else None,
        "all": torch.cuda.max_memory_reserved() if gpu else peak_memory(),
        "plain": (seconds[2 * APART] - seconds[APART]) / APART,
        "rounded": (seconds[STEPS] - seconds[STEPS - APART]) / APART if step.quantize else None,
        "where": f"{torch.cuda.get_device_name() if gpu else 'CPU'}, torch {torch.__version__}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--shape", required=True, help="as of `zoo bench`, such as llama-2-7b")
    parser.add_argument("--layers", type=int, help="with its first decoder layers only")
    parser.add_argument("--memory", type=float, metavar="GB", help="of the GPU, at most")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes")
    parser.add_argument("--scratch", type=Path, help="folder with room for two such models")
    arguments = parser.parse_args()
    try:
        step = training(arguments.recipe, arguments.changes)
        one = shape(arguments.shape, arguments.layers)
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            folder = Path(scratch)
            write_model(one, folder / "model")
            ids = np.random.default_rng(0).integers(0, one.vocabulary, TOKENS)
            np.save(folder / "random.npy", ids.astype(np.uint16 if one.vocabulary <= 1 << 16 else np.uint32))
            found = measured(folder, step, arguments.memory)
    except (ZooError, OSError) as error:
        sys.exit(f"recover_memory: {error}")
    print(
        "| recipe | shape | tensors, at most | with the allocator's | a step | rounded |\n"
        "|---|---|---|---|---|---|"
    )
    size = [f"{found[name] / 1e9:.1f} GB" if found[name] else "-" for name in ("tensors", "all")]
    time = [f"{found[name]:.2f} s" if found[name] else "-" for name in ("plain", "rounded")]
    layers = f", {one.layers} layers" if arguments.layers else ""
    print(f"| {arguments.recipe.stem} | {arguments.shape}{layers} | {' | '.join([*size, *time])} |")
    tokens = f"{step.batch} blocks of {step.length} tokens a step"
    print(f"\n{tokens}; {STEPS} steps on random tokens; {found['where']}")


if __name__ == "__main__":
    main()
