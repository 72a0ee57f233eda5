"""One engine of a benchmark, in a process of its own: `python -m zoo.runner.bench_worker JOB`.

JOB is JSON: `engine` ("zoo", "llama.cpp" or "memory") and what it needs. The process loads once, then
answers every line on standard input with one on standard output, and sleeps in between, so that engines
take turns without sharing anything: what one holds in memory is what its own process holds.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from zoo.errors import ZooError

LLAMA_BATCH = 512  # tokens of one call; llama.cpp's own n_ubatch
BANDWIDTH_PASSES = 4  # over the buffer, for one figure
_GGML_TYPES = {"f16": 1, "int8": 8}  # F16 and Q8_0, for llama.cpp's keys and values


class Runner(Protocol):
    load_s: float  # until the first token was run, as weights may be read only when they are used
    versions: dict[str, str]

    def run(self, start: int, count: int, step: int) -> float:
        """Seconds for `count` tokens at positions `start`, ..., `step` in a call, with the last one's logits.

        What the context held at and after `start` is forgotten; what lies before stays. step 0: as many
        as the engine likes best.
        """


class Ours:
    def __init__(self, job: dict[str, Any]) -> None:
        from zoo import __version__
        from zoo.runner import native
        from zoo.runner.engine import open_engine
        from zoo.runner.packed import Packed

        began = time.perf_counter()
        packed = Packed(Path(job["path"]))
        self._engine = open_engine(packed, context=job["context"], threads=job["threads"], kv=job["kv"])
        self._random = np.random.default_rng(0)
        self._vocabulary = packed.architecture.vocabulary
        self.versions = {"sparse-zoo": f"{__version__} ({native.ISA if native.AVAILABLE else 'NumPy'})"}
        self.run(0, 1, 1)
        self.load_s = time.perf_counter() - began

    def run(self, start: int, count: int, step: int) -> float:
        step = step or count
        calls = []
        for at in range(0, count, step):
            tokens = self._random.integers(0, self._vocabulary, min(step, count - at)).astype(np.int32)
            positions = np.arange(start + at, start + at + len(tokens), dtype=np.int32)
            calls.append((tokens, np.zeros_like(tokens), positions, np.array([len(tokens) - 1], np.int32)))
        began = time.perf_counter()
        for call in calls:
            self._engine.forward(*call)
        return time.perf_counter() - began


class LlamaCpp:
    """llama.cpp with its own defaults (but for threads, and keys and values of the type asked for)."""

    def __init__(self, job: dict[str, Any]) -> None:
        import llama_cpp

        self._said: list[str] = []
        self._log = llama_cpp.llama_log_callback(self._listen)  # llama.cpp keeps a pointer to it
        self._cpp: Any = llama_cpp
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        began = time.perf_counter()
        of_model = llama_cpp.llama_model_default_params()
        of_model.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(job["path"]), of_model)
        if not self._model:
            raise self._failure(f"llama.cpp cannot load {job['path']}")
        wanted = llama_cpp.llama_context_default_params()
        wanted.n_ctx = job["context"]
        wanted.n_batch = wanted.n_ubatch = LLAMA_BATCH
        wanted.n_threads = wanted.n_threads_batch = job["threads"]
        wanted.type_k = wanted.type_v = _GGML_TYPES[job["kv"]]
        self._context = llama_cpp.llama_init_from_model(self._model, wanted)
        if not self._context:
            raise self._failure(f"llama.cpp cannot run {job['path']}")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._random = np.random.default_rng(0)
        self.versions = {"llama-cpp-python": llama_cpp.__version__}
        self.run(0, 1, 1)
        self.load_s = time.perf_counter() - began

    def run(self, start: int, count: int, step: int) -> float:
        step = min(step or LLAMA_BATCH, LLAMA_BATCH)
        memory = self._cpp.llama_get_memory(self._context)
        if not self._cpp.llama_memory_seq_rm(memory, 0, start, -1):
            raise self._failure("llama.cpp cannot go back in its context")
        tokens = (ctypes.c_int32 * count)(*self._random.integers(0, self._vocabulary, count).tolist())
        batches = []
        for at in range(0, count, step):
            first = ctypes.cast(ctypes.byref(tokens, 4 * at), ctypes.POINTER(ctypes.c_int32))
            batches.append(self._cpp.llama_batch_get_one(first, min(step, count - at)))
        began = time.perf_counter()
        for batch in batches:
            if self._cpp.llama_decode(self._context, batch):
                raise self._failure("llama.cpp failed to run the model")
            self._cpp.llama_get_logits_ith(self._context, -1)  # waits for them
        return time.perf_counter() - began

    def _listen(self, _level: int, text: bytes, _data: object) -> None:
        self._said = [*self._said, text.decode(errors="replace").strip()][-8:]

    def _failure(self, what: str) -> ZooError:
        return ZooError(what, saw=next((line for line in reversed(self._said) if line), None))


def read_bandwidth(size: int, threads: int) -> tuple[float, str]:
    """GB/s at which `threads` threads read `size` bytes of memory, and what measured it."""
    from zoo.runner import native

    if native.AVAILABLE:
        return float(native.read_bandwidth(size, threads)), "native"
    return _numpy_bandwidth(size, threads), "numpy"


def _numpy_bandwidth(size: int, threads: int) -> float:
    parts = np.array_split(np.ones(size // 8, np.uint64), threads)  # ones: every page must be there
    add: Callable[[Any], Any] = np.add.reduce
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(BANDWIDTH_PASSES):
            began = time.perf_counter()
            list(pool.map(add, parts))
            best = max(best, size / (time.perf_counter() - began) / 1e9)
    return best


def peak_memory() -> int:
    """Most bytes of memory that this process ever held, mapped files included."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux keeps a parent's ru_maxrss across exec, but not its VmHWM
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


Answer = Callable[[dict[str, Any]], dict[str, Any]]


def _open(job: dict[str, Any]) -> tuple[dict[str, Any], Answer]:
    """Load what the job names; returns the first answer, and what answers the requests."""
    if job["engine"] == "memory":

        def bandwidth(_: dict[str, Any]) -> dict[str, Any]:
            speed, method = read_bandwidth(job["size"], job["threads"])
            return {"gb_s": speed, "method": method}

        return {}, bandwidth
    runner: Runner = Ours(job) if job["engine"] == "zoo" else LlamaCpp(job)

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        if "count" not in request:
            return {"peak_memory_bytes": peak_memory()}
        began = time.monotonic()
        return {"began": began, "seconds": runner.run(request["start"], request["count"], request["step"])}

    return {"load_s": runner.load_s, "versions": runner.versions}, measure


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, who ends this process
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints must not be taken for an answer

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=out, flush=True)

    try:
        ready, answer = _open(json.loads(sys.argv[1]))
        say(ready)
        for line in sys.stdin:
            say(answer(json.loads(line)))
    except ZooError as error:
        fields = {"what": error.what, "saw": error.saw, "expected": error.expected, "try_": error.try_}
        say({"error": fields})
    out.flush()
    os._exit(0)  # nothing that native destructors do on the way out can matter now


if __name__ == "__main__":
    main()
