"""How fast models run here, side by side: prefill, decode, memory, and what the machine's memory allows.

Every engine sits in a process of its own (`zoo.runner.bench_worker`) and they take turns, A B A B ..., so
that whatever slows the machine down meets all of them; the speed of plain reads from memory is measured in
the same rounds. Decode reads every weight once per token, so that bytes per token x tokens per second,
over that speed, says how much there is left to gain: the roofline.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import psutil

from zoo.entry import Machine, Record
from zoo.errors import ZooError
from zoo.machine import this_machine
from zoo.progress import track
from zoo.runner.contenders import BANDWIDTH_BYTES, Contender

WARM_UP_TOKENS = 4  # decoded before each measurement, to wake threads and fill caches
BUSY_CORES = 0.1  # taken by others: then figures are not to be trusted


class BenchRow(Record):
    engine: Literal["zoo", "llama.cpp"]
    model: str  # shape or file
    format: str
    bits_per_weight: float  # of the decoder's matrices, scales and zeros included
    prefill_tok_s: float
    prefill_spread: float
    first_token_s: float  # from the prompt to the first token's logits
    decode_tok_s: float
    spread: float  # of decode_tok_s
    bytes_per_token: int  # weights, keys and values that decoding a token reads
    read_gb_s: float
    roofline_fraction: float
    load_s: float
    peak_memory_bytes: int


class Bench(Record):
    """Medians of `repeats` interleaved measurements; a spread is their interquartile range / median."""

    machine: Machine
    versions: dict[str, str]
    threads: int
    prompt_tokens: int
    generated_tokens: int
    context_tokens: int  # in the context when decode begins
    kv: str
    repeats: int
    roofline_gb_s: float
    roofline_spread: float
    roofline_method: Literal["native", "numpy"]
    cores_taken: float  # by other programs, on average, while it was measured
    rows: list[BenchRow]


@dataclass(frozen=True)
class Settings:
    threads: int
    prompt: int = 512
    generate: int = 128
    context_at: int | None = None
    kv: Literal["f16", "int8"] = "f16"
    repeat: int = 5

    @property
    def filled(self) -> int:
        """Tokens in the context when decode begins."""
        return self.prompt if self.context_at is None else self.context_at

    @property
    def context(self) -> int:
        return max(self.prompt, self.filled + self.generate)


class Worker:
    """An engine in a process of its own; use it in a `with` block."""

    def __init__(self, name: str, job: dict[str, Any]) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115
        # NumPy's own threads, where there is no C++ engine.
        limits = {f"{library}_NUM_THREADS": str(job["threads"]) for library in ("OMP", "OPENBLAS", "MKL")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "zoo.runner.bench_worker", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | limits,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()
        self._log.close()

    def answer(self) -> dict[str, Any]:
        """The next answer. Raises the process's own error, or ZooError if it crashed."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self._log.seek(0)
            said = [text for text in self._log.read().decode(errors="replace").splitlines() if text.strip()]
            how = f"crashed ({signal.Signals(-code).name})" if code < 0 else "failed"
            raise ZooError(f"{self.name} {how}", saw=said[-1] if said else f"exit code {code}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise ZooError(f"{self.name}: {found['error'].pop('what')}", **found["error"])
        return found

    def ask(self, **request: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # its last words tell why
        return self.answer()


class _Others:
    """Processor time of everything but the workers, from now on: what disturbs a measurement."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._ours = [psutil.Process(worker.process.pid) for worker in workers]
        self._began, self._before = time.monotonic(), self._used()

    def _used(self) -> float:
        times = psutil.cpu_times()
        of_us = [process.cpu_times() for process in self._ours]
        return times.user + times.system - sum(one.user + one.system for one in of_us)

    def cores(self) -> float:
        return max(0.0, (self._used() - self._before) / (time.monotonic() - self._began))


@dataclass(frozen=True)
class Figures:
    """What one contender did, in the order of the rounds."""

    load_s: float
    peak_memory_bytes: int
    prefill_s: list[float]
    decode_s: list[float]


@dataclass(frozen=True)
class Run:
    figures: list[Figures]  # of each contender
    bandwidth_gb_s: list[float]
    bandwidth_method: Literal["native", "numpy"]
    cores_taken: float
    versions: dict[str, str]
    order: list[tuple[float, str, int]]  # when, which phase, which contender


def measure(contenders: Sequence[Contender], settings: Settings) -> Run:
    """Load every contender, then `repeat` rounds of prefill and as many of decode, all taking turns.

    Raises ZooError if an engine fails.
    """
    common = {"threads": settings.threads, "context": settings.context, "kv": settings.kv}
    with ExitStack() as stack:
        memory = stack.enter_context(
            Worker("memory", {"engine": "memory", "size": BANDWIDTH_BYTES, "threads": settings.threads})
        )
        memory.answer()
        workers, loaded = [], []
        for contender in track(contenders, "loading"):
            name = f"{contender.engine} with {contender.model} {contender.format}"
            job = {"engine": contender.engine, "path": str(contender.path.absolute()), **common}
            workers.append(stack.enter_context(Worker(name, job)))
            loaded.append(workers[-1].answer())

        bandwidth: list[float] = []
        order: list[tuple[float, str, int]] = []
        method: Any = None
        seconds: dict[str, list[list[float]]] = {p: [[] for _ in workers] for p in ("prefill", "decode")}
        for worker in workers:  # every page touched, every thread started
            worker.ask(start=0, count=settings.prompt, step=0)
        others = _Others([memory, *workers])
        for phase, position in track(_turns(len(workers), settings.repeat), "measuring"):
            if position < 0:
                found = memory.ask()
                bandwidth.append(found["gb_s"])
                method = found["method"]
                continue
            worker = workers[position]
            if phase == "fill":
                worker.ask(start=0, count=settings.filled, step=0)
                continue
            if phase == "prefill":
                found = worker.ask(start=0, count=settings.prompt, step=0)
            else:
                worker.ask(start=settings.filled, count=min(WARM_UP_TOKENS, settings.generate), step=1)
                found = worker.ask(start=settings.filled, count=settings.generate, step=1)
            seconds[phase][position].append(found["seconds"])
            order.append((found["began"], phase, position))
        cores_taken = others.cores()
        peaks = [worker.ask()["peak_memory_bytes"] for worker in workers]
    versions = {name: text for ready in loaded for name, text in ready["versions"].items()}
    figures = [
        Figures(ready["load_s"], peak, prefill, decode)
        for ready, peak, prefill, decode in zip(
            loaded, peaks, seconds["prefill"], seconds["decode"], strict=True
        )
    ]
    return Run(figures, bandwidth, method, cores_taken, versions, order)


def _turns(contenders: int, repeat: int) -> list[tuple[str, int]]:
    """Phase and contender of every turn; contender -1 is the memory itself.

    Decode goes back over the same positions every round, so that contexts are filled once.
    """
    everyone = range(contenders)
    return [
        *(("prefill", i) for _ in range(repeat) for i in everyone),
        *(("fill", i) for i in everyone),
        *(("decode", i) for _ in range(repeat) for i in range(-1, contenders)),
    ]


def summarize(run: Run, contenders: Sequence[Contender], settings: Settings) -> Bench:
    """Medians, spreads and what they are of the roofline."""
    roofline, roofline_spread = _middle(run.bandwidth_gb_s)
    rows = []
    for contender, figures in zip(contenders, run.figures, strict=True):
        prefill, prefill_spread = _middle([settings.prompt / s for s in figures.prefill_s])
        decode, spread = _middle([settings.generate / s for s in figures.decode_s])
        seen = [settings.filled + i + 1 for i in range(settings.generate)]
        positions = round(statistics.fmean(min(n, contender.window or n) for n in seen))
        read = contender.weight_bytes + contender.kv_bytes(positions, settings.kv)
        rows.append(
            BenchRow(
                engine=contender.engine,
                model=contender.model,
                format=contender.format,
                bits_per_weight=contender.bits_per_weight,
                prefill_tok_s=prefill,
                prefill_spread=prefill_spread,
                first_token_s=statistics.median(figures.prefill_s),
                decode_tok_s=decode,
                spread=spread,
                bytes_per_token=read,
                read_gb_s=read * decode / 1e9,
                roofline_fraction=read * decode / 1e9 / roofline,
                load_s=figures.load_s,
                peak_memory_bytes=figures.peak_memory_bytes,
            )
        )
    return Bench(
        machine=this_machine(),
        versions=run.versions,
        threads=settings.threads,
        prompt_tokens=settings.prompt,
        generated_tokens=settings.generate,
        context_tokens=settings.filled,
        kv=settings.kv,
        repeats=settings.repeat,
        roofline_gb_s=roofline,
        roofline_spread=roofline_spread,
        roofline_method=run.bandwidth_method,
        cores_taken=run.cores_taken,
        rows=rows,
    )


def references(bench: Bench) -> list[BenchRow]:
    """The rows that others are held against: llama.cpp's, and our own dense ones."""
    return [row for row in bench.rows if row.engine != "zoo" or row.format.startswith("dense/")]


def _middle(values: Sequence[float]) -> tuple[float, float]:
    """Median, and interquartile range / median."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return float(middle), float((high - low) / middle)
