"""Does an exported file run, and does it say what the model says? Checked in a process of its own.

`reference` computes the exported model's logits with transformers once; `verify_gguf` has llama.cpp
compute them from each GGUF for the same token ids, `verify_packed` our own runner from the packed file.
Native code that crashes or hangs takes only the child process with it and becomes a failed verification.

The child is `python -m pipelines.verify FOLDER`: it reads FOLDER/job.json and writes its answer there.
"""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.export_gguf import TYPES
from zoo import __version__
from zoo.entry import Benchmark, Verification
from zoo.errors import ZooError
from zoo.logs import redact
from zoo.machine import this_machine
from zoo.progress import say
from zoo.runner import packed

LLAMA_CPP = "llama.cpp"
ZOO = "zoo"
SAMPLE_TOKENS = 32
PREFILL_TOKENS = 512
DECODE_TOKENS = 64
REPEATS = 3
TIMEOUT_S = 1800.0
MAX_POSITIONS = 64  # of one prompt

PROMPTS = (
    "The history of bread begins long before anyone wrote it down. People ground wild grain between stones, "
    "mixed the flour with water and left it near the fire, where some forgotten batch began to rise.",
    "To find the area of a triangle, multiply its base by its height and divide by two. A triangle with a "
    "base of 12 cm and a height of 7.5 cm therefore has an area of 45 square centimetres.",
    'def median(values):\n    """The middle of the sorted values."""\n    ordered = sorted(values)\n'
    "    middle = len(ordered) // 2\n    if len(ordered) % 2 == 1:\n        return ordered[middle]\n"
    "    return (ordered[middle - 1] + ordered[middle]) / 2\n",
    "Dear Ms. Alvarez,\n\nThank you for your letter of 3 March. We are sorry that the lamp you ordered came "
    "with a broken shade, and we will send you a new one this week at no cost. Please keep the old one.",
    "Question: Why does the moon always show us the same face?\nAnswer: Because it turns around itself in "
    "exactly the time it takes to travel once around the Earth, so the same half always points at us.",
    "The committee met on Tuesday evening to discuss the new bridge. Several members said that the old one "
    "was still safe, while the engineer warned that its pillars had moved by 4 mm since last winter.",
    "She closed the door, put the kettle on the stove and sat down by the window. Outside it had begun to "
    "snow, and the street was so quiet that she could hear the clock in the next room.",
    "Water boils at 100 degrees Celsius at sea level, but on a high mountain the air presses less on its "
    "surface, so it boils at a lower temperature and an egg takes longer to cook.",
)
# Splitting is where tokenizers differ: only the ids are compared on these.
TOKENIZER_TEXTS = (
    "1969 2024  3.14159 1,000,000 x12y 0b1011",
    "  two spaces,\ttab,\n\nnewlines \r\n and trailing   ",
    "don't we'll THEY'RE it's I'd",
    "naïve café — “quotes” … 100 € ½ ™",
    "日本語のテキスト, русский текст, العربية, हिन्दी, 👩‍👩‍👧 🎉",
    "for(i=0;i<10;++i){a[i]*=2;} // $x_1 != @y#z",
)


@dataclass(frozen=True)
class Tolerance:
    min_top1: float  # fraction of positions where both put the same token first
    max_kl: float  # nats, mean over positions, reference to runner


# Measured on PROMPTS, mean KL divergence in nats:
#                          F16      BF16     Q8_0     Q6_K     Q5_K_M   Q4_K_M   IQ4_XS   Q4_0
#   SmolLM2-135M-Instruct  0.00001  0.00018  0.0047   0.015    0.086    0.059    0.23     0.35
#   mpt-25m                0.000005 0.00002  0.00023  0.00039  0.0018   0.0027            0.013
# SmolLM2 was de-quantized from Q4_1, so other four-bit grids hurt it twice, and small models suffer most:
# a limit of three to ten times its loss leaves room for a pruned model and none for a wrong one. One matrix
# shuffled in F16 costs 0.06 to 2 nats, other weights or a wrong rope several. So F16 to Q6_K tell any
# damaged matrix; below, where rounding itself costs as much, only a damage that shows is told.
TOLERANCES = {
    "F32": Tolerance(0.97, 0.001), "F16": Tolerance(0.97, 0.001), "BF16": Tolerance(0.93, 0.005),
    "Q8_0": Tolerance(0.85, 0.03), "Q6_K": Tolerance(0.80, 0.05),
    "Q5_K_M": Tolerance(0.65, 0.30), "Q5_K_S": Tolerance(0.65, 0.30),
    "Q5_1": Tolerance(0.65, 0.30), "Q5_0": Tolerance(0.65, 0.30),
    "Q4_K_M": Tolerance(0.55, 0.50), "Q4_K_S": Tolerance(0.55, 0.50), "Q4_1": Tolerance(0.50, 0.80),
    "IQ4_NL": Tolerance(0.50, 0.80), "IQ4_XS": Tolerance(0.50, 0.80), "Q4_0": Tolerance(0.40, 1.20),
    "Q3_K_L": Tolerance(0.40, 1.20), "Q3_K_M": Tolerance(0.40, 1.20), "Q3_K_S": Tolerance(0.30, 2.0),
    "Q2_K": Tolerance(0.20, 3.0),
}  # fmt: skip
# A packed file has the model's own weights, or int8 ones where they lie on no grid; the rest is arithmetic.
PACKED_TOLERANCE = Tolerance(0.90, 0.003)
# What a bfloat16 reference (a model too large for float32 here) may differ by on its own.
_BFLOAT16 = Tolerance(0.07, 0.01)


@dataclass(frozen=True)
class Reference:
    """The exported model's own answers, from transformers.

    ids: one list of token ids per prompt; log_probabilities: float32 (tokens, vocabulary) of each;
    texts and text_ids: what both tokenizers must agree on.
    """

    ids: list[list[int]]
    log_probabilities: list[NDArray[np.float32]]
    texts: list[str]
    text_ids: list[list[int]]
    tokenizer: Any  # to write the sample out
    dtype: str  # of the forward pass


def reference(folder: Path, prompts: Sequence[str] = PROMPTS) -> Reference:
    """Compute what every GGUF of the model in `folder` is held against; once for all of them.

    Prompts are cut to 64 tokens, and to the sliding window, which llama.cpp does not have.
    """
    import torch

    from pipelines.evaluate import load_model

    model, tokenizer = load_model(folder)
    config = model.config
    context = getattr(config, "max_position_embeddings", None) or config.max_seq_len
    length = min(MAX_POSITIONS, context, getattr(config, "sliding_window", None) or context)
    texts = [*prompts, *TOKENIZER_TEXTS, *_with_special(tokenizer)]
    text_ids = [list(tokenizer(text).input_ids) for text in texts]
    ids = [tokens[:length] for tokens in text_ids[: len(prompts)]]
    log_probabilities = []
    with torch.inference_mode():
        for tokens in ids:
            logits = model(torch.tensor([tokens], device=model.device)).logits[0]
            log_probabilities.append(logits.float().log_softmax(-1).cpu().numpy())
    dtype = str(model.dtype).removeprefix("torch.")
    return Reference(ids, log_probabilities, texts, text_ids, tokenizer, dtype)


def _with_special(tokenizer: Any) -> list[str]:
    """A text with the special tokens in it, as a chat template would write them."""
    special = [token for token in tokenizer.all_special_tokens if token != tokenizer.unk_token]
    return ["".join(f"{token}user\nHello there." for token in special[:4])] if special else []


def verify_gguf(
    gguf: Path, expected: Reference, *, threads: int, timeout_s: float = TIMEOUT_S
) -> tuple[Verification, Benchmark | None]:
    """Run the GGUF file with llama-cpp-python and compare it with `expected`.

    The tolerance is that of the file's own type. Whatever goes wrong in llama.cpp, a crash or a hang
    of `timeout_s` seconds included, is a failed Verification with the reason, and then there is no
    Benchmark.
    """
    return _verify(LLAMA_CPP, gguf, expected, threads, timeout_s)


def verify_packed(
    path: Path, expected: Reference, *, threads: int, timeout_s: float = TIMEOUT_S
) -> tuple[Verification, Benchmark | None]:
    """Run the packed file with our own runner and compare it with `expected`, as `verify_gguf` does."""
    return _verify(ZOO, path, expected, threads, timeout_s)


def _verify(
    runner: str, path: Path, expected: Reference, threads: int, timeout_s: float
) -> tuple[Verification, Benchmark | None]:
    say(f"verifying {path.name} with {runner}")
    with tempfile.TemporaryDirectory(prefix="zoo-verify-") as scratch:
        job = {"runner": runner, "path": str(path.absolute()), "threads": threads}
        answer = {"do": "answer", "ids": expected.ids, "texts": expected.texts}
        found = _child(Path(scratch) / "answer", job | answer, timeout_s)
        if isinstance(found, str):
            return _verification(runner, path, found), None
        logits = np.load(Path(scratch) / "answer" / "logits.npy", mmap_mode="r")
        verification = _compare(runner, path, found, logits, expected)
        del logits
        if not verification.passed:
            return verification, None
        flat = [token for tokens in expected.ids for token in tokens]
        speed = _child(Path(scratch) / "speed", job | {"do": "speed", "ids": [flat]}, timeout_s)
    if isinstance(speed, str):
        return verification.model_copy(update={"passed": False, "reason": speed}), None
    return verification, Benchmark(
        runner=runner,
        runner_version=_version(runner),
        artifact=path.name,
        threads=threads,
        repeats=REPEATS,
        machine=this_machine(),
        **speed,
    )


def verify_all(model: Path, exports: Path, *, threads: int) -> tuple[list[Verification], list[Benchmark]]:
    """Verify every model file in `exports`: the dense folder `model` is what they must match."""
    verifications, benchmarks = [], []
    weights = min((path.name for path in exports.glob("model*.safetensors")), default=model.name)
    try:
        expected = reference(model)
    except ZooError as error:
        return [_verification_of_folder(weights, str(error))], []
    if not all(np.isfinite(p).all() for p in expected.log_probabilities):
        return [_verification_of_folder(weights, "its logits are NaN or infinite")], []
    if (exports / weights).is_file():
        verifications.append(_verification_of_folder(weights, None))
    compressed = exports / "compressed-tensors"
    if compressed.is_dir():
        verifications.append(verify_folder(compressed, expected))
    for path in sorted([*exports.glob("*.gguf"), *exports.glob(packed.FILE)]):
        check = verify_packed if path.name == packed.FILE else verify_gguf
        verification, benchmark = check(path, expected, threads=threads)
        verifications.append(verification)
        if benchmark is not None:
            benchmarks.append(benchmark)
    return verifications, benchmarks


def verify_folder(folder: Path, expected: Reference) -> Verification:
    """Load another export of the same weights with transformers and compare its logits with `expected`."""
    try:
        with redirect_stderr(io.StringIO()):  # compressed-tensors draws four bars of its own
            found = reference(folder)
    except ZooError as error:
        return _verification_of_folder(folder.name, str(error))
    pairs = list(zip(expected.log_probabilities, found.log_probabilities, strict=True))
    kl = float(np.concatenate([(np.exp(p) * (p - q)).sum(axis=1) for p, q in pairs]).mean())
    top1 = float(np.concatenate([p.argmax(axis=1) == q.argmax(axis=1) for p, q in pairs]).mean())
    tolerance = TOLERANCES["F16"]
    failure = None
    if not (kl <= tolerance.max_kl and top1 >= tolerance.min_top1):
        failure = (
            f"its logits are not the model's: mean KL divergence {kl:.4f} nats, top-1 agreement {top1:.3f}"
        )
    return _verification_of_folder(
        folder.name,
        failure,
        top1_agreement=top1,
        kl_divergence=max(kl, 0.0) if np.isfinite(kl) else None,
        min_top1_agreement=tolerance.min_top1,
        max_kl_divergence=tolerance.max_kl,
        positions=sum(map(len, expected.ids)),
    )


def _verification_of_folder(artifact: str, failure: str | None, **facts: Any) -> Verification:
    return Verification(
        runner="transformers",
        runner_version=version("transformers"),
        artifact=artifact,
        passed=failure is None,
        reason=failure or "loads unmodified and gives finite logits",
        **facts,
    )


def _version(runner: str) -> str:
    if runner == LLAMA_CPP:
        return f"llama-cpp-python {version('llama-cpp-python')}"
    from zoo.runner import native

    return f"{__version__} ({native.ISA if native.AVAILABLE else 'NumPy'})"


def _verification(runner: str, path: Path, failure: str | None, **facts: Any) -> Verification:
    return Verification(
        runner=runner,
        runner_version=_version(runner),
        artifact=path.name,
        passed=failure is None,
        reason=failure or "tokenizer, logits and a greedy sample agree with the exported model",
        **facts,
    )


def _compare(
    runner: str, path: Path, found: dict[str, Any], logits: NDArray[np.float32], expected: Reference
) -> Verification:
    kind, tolerance = "a packed file", PACKED_TOLERANCE
    if runner == LLAMA_CPP:
        names = {str(number): name for name, number in TYPES.items()}
        if (file_type := names.get(found["file_type"])) is None:
            return _verification(runner, path, f"unknown general.file_type {found['file_type']}")
        kind, tolerance = file_type, TOLERANCES[file_type]
    for text, ours, theirs in zip(expected.texts, expected.text_ids, found["text_ids"], strict=True):
        if ours != theirs:
            pairs = enumerate(zip(ours, theirs, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
            return _verification(
                runner,
                path,
                f"{runner} tokenizes {text[:40]!r} differently, from token {at}: "
                f"{theirs[at : at + 4]} instead of {ours[at : at + 4]}",
            )
    wanted = (sum(map(len, expected.ids)), expected.log_probabilities[0].shape[1])
    if logits.shape != wanted:
        return _verification(runner, path, f"{runner} gave logits of shape {logits.shape}, not {wanted}")
    divergence, agreement = [], []
    start = 0
    for target in expected.log_probabilities:
        own = logits[start : start + len(target)].astype(np.float64)
        start += len(target)
        if not np.isfinite(own).all():
            return _verification(runner, path, f"{runner} gave logits that are NaN or infinite")
        own -= np.logaddexp.reduce(own, axis=1, keepdims=True)
        divergence.append((np.exp(target, dtype=np.float64) * (target - own)).sum(axis=1))
        agreement.append(own.argmax(axis=1) == target.argmax(axis=1))
    kl, top1 = float(np.concatenate(divergence).mean()), float(np.concatenate(agreement).mean())
    if expected.dtype != "float32":
        tolerance = Tolerance(tolerance.min_top1 - _BFLOAT16.min_top1, tolerance.max_kl + _BFLOAT16.max_kl)
    sample = expected.tokenizer.decode(found["sample"])
    failure = None
    if kl > tolerance.max_kl or top1 < tolerance.min_top1:
        failure = (
            f"its logits are not the model's: mean KL divergence {kl:.4f} nats, top-1 agreement {top1:.3f} "
            f"({kind} may differ by {tolerance.max_kl} and must reach {tolerance.min_top1})"
        )
    elif not sample.strip():
        failure = f"its greedy sample of {SAMPLE_TOKENS} tokens is empty"
    return _verification(
        runner,
        path,
        failure,
        top1_agreement=top1,
        kl_divergence=max(kl, 0.0),  # rounding can leave a negative zero of 1e-9
        min_top1_agreement=tolerance.min_top1,
        max_kl_divergence=tolerance.max_kl,
        positions=wanted[0],
        sample=sample,
    )


def _child(scratch: Path, job: dict[str, Any], timeout_s: float) -> dict[str, Any] | str:
    """Do `job` in a fresh process; its answer, or why there is none."""
    scratch.mkdir()
    (scratch / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "pipelines.verify", str(scratch)]
    with (scratch / "log").open("w+b") as log:
        try:
            done = subprocess.run(command, stdout=log, stderr=log, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired:
            return f"{job['runner']} did not finish within {timeout_s:.0f} s"
    answer = scratch / "answer.json"
    if done.returncode == 0 and answer.is_file():
        found: dict[str, Any] = json.loads(answer.read_bytes())
        return found
    lines = [line for line in (scratch / "log").read_text(errors="replace").splitlines() if line.strip()]
    last = redact(lines[-1].strip())[:300] if lines else "no message"
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return f"{job['runner']} crashed ({name}): {last}"
    return f"{job['runner']} failed: {last}"


# In the child


class _Model(Protocol):
    """A loaded model with one sequence, which begins again with `restart`."""

    vocabulary: int
    context: int  # that the model was made for

    def restart(self) -> None: ...

    def eval(self, ids: list[int]) -> NDArray[np.float32]:
        """Go on with `ids`; logits after each of them, or after the last, as the model was opened."""

    def tokenize(self, text: str) -> list[int]: ...


class _LlamaCpp:
    def __init__(self, job: dict[str, Any], *, context: int, every_logit: bool) -> None:
        import llama_cpp

        self._llama = llama_cpp.Llama(
            job["path"],
            n_ctx=context,
            n_batch=PREFILL_TOKENS,
            n_threads=job["threads"],
            n_threads_batch=job["threads"],
            logits_all=every_logit,
            verbose=False,
        )
        self._every = every_logit
        self.vocabulary: int = self._llama.n_vocab()
        metadata = self._llama.metadata
        architecture = metadata.get("general.architecture")
        self.context = int(metadata.get(f"{architecture}.context_length", PREFILL_TOKENS))
        self.file_type: str | None = metadata.get("general.file_type")

    def restart(self) -> None:
        self._llama.reset()

    def eval(self, ids: list[int]) -> NDArray[np.float32]:
        self._llama.eval(ids)
        end = self._llama.n_tokens
        scores: NDArray[np.float32] = self._llama.scores[end - len(ids) if self._every else end - 1 : end]
        return scores

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = self._llama.tokenize(text.encode(), add_bos=True, special=True)
        return ids


class _Zoo:
    def __init__(self, job: dict[str, Any], *, context: int, every_logit: bool) -> None:
        from tokenizers import Tokenizer

        from zoo.runner.engine import open_engine

        opened = packed.Packed(Path(job["path"]))
        self.vocabulary, self.context = opened.architecture.vocabulary, opened.architecture.context
        self._engine = open_engine(opened, context=min(context, self.context), threads=job["threads"])
        if opened.tokenizer_json is None:
            raise ValueError("there is no tokenizer.json in it")
        self._tokenizer = Tokenizer.from_str(opened.tokenizer_json.decode())
        self._every = every_logit
        self._end = 0

    def restart(self) -> None:
        self._end = 0

    def eval(self, ids: list[int]) -> NDArray[np.float32]:
        positions = np.arange(self._end, self._end + len(ids), dtype=np.int32)
        self._end += len(ids)
        wanted = np.arange(0 if self._every else len(ids) - 1, len(ids), dtype=np.int32)
        return self._engine.forward(np.array(ids, np.int32), np.zeros_like(positions), positions, wanted)

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids


def _load(job: dict[str, Any], *, context: int, every_logit: bool) -> _Model:
    runner = _LlamaCpp if job["runner"] == LLAMA_CPP else _Zoo
    return runner(job, context=context, every_logit=every_logit)


def _answer(job: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Logits of every prompt at every position (to logits.npy), all texts tokenized, a greedy sample."""
    longest = max(map(len, job["ids"]))
    model = _load(job, context=longest + SAMPLE_TOKENS, every_logit=True)
    shape = (sum(map(len, job["ids"])), model.vocabulary)
    logits = np.lib.format.open_memmap(scratch / "logits.npy", mode="w+", dtype=np.float32, shape=shape)
    start = 0
    for ids in job["ids"]:
        model.restart()
        logits[start : start + len(ids)] = model.eval(ids)
        start += len(ids)
    model.restart()
    last = model.eval(job["ids"][0])[-1]
    sample: list[int] = []
    for _ in range(min(SAMPLE_TOKENS, model.context - len(job["ids"][0]))):
        sample.append(int(last.argmax()))
        last = model.eval(sample[-1:])[-1]
    return {
        "sample": sample,
        "text_ids": [model.tokenize(text) for text in job["texts"]],
        "file_type": getattr(model, "file_type", None),  # of a GGUF
    }


def _speed(job: dict[str, Any]) -> dict[str, Any]:
    """Load time, tokens per second and peak memory, without the cost of keeping every logit."""
    began = time.perf_counter()
    model = _load(job, context=PREFILL_TOKENS + DECODE_TOKENS, every_logit=False)
    model.eval(job["ids"][0][:1])  # the weights are read from disk only when they are used
    load_s = time.perf_counter() - began
    (known,) = job["ids"]
    length = max(min(PREFILL_TOKENS, model.context - DECODE_TOKENS), 1)
    prompt = (known * (length // len(known) + 1))[:length]
    prefill, decode = [], []
    for _ in range(REPEATS):
        model.restart()
        began = time.perf_counter()
        model.eval(prompt)
        prefill.append(len(prompt) / (time.perf_counter() - began))
        began = time.perf_counter()
        for i in range(DECODE_TOKENS):
            model.eval([known[i % len(known)]])
        decode.append(DECODE_TOKENS / (time.perf_counter() - began))
    return {
        "prompt_tokens": len(prompt),
        "generated_tokens": DECODE_TOKENS,
        "prefill_tokens_per_s": statistics.median(prefill),
        "decode_tokens_per_s": statistics.median(decode),
        "load_s": load_s,
        "peak_memory_bytes": _peak_memory(),
    }


def _peak_memory() -> int:
    """Most bytes of memory this process ever held."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux keeps a parent's ru_maxrss across exec, but not its VmHWM
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _main(scratch: Path) -> None:
    job = json.loads((scratch / "job.json").read_bytes())
    answer = _answer(job, scratch) if job["do"] == "answer" else _speed(job)
    (scratch / "answer.json").write_text(json.dumps(answer))
    # Nothing that native destructors do on the way out can matter now.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
