"""The machine that a benchmark ran on."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import psutil

from zoo.entry import Machine
from zoo.files import sha256_json

# Instruction sets that change how fast a quantized or sparse matrix product runs, as Linux names them.
RELEVANT_ISA = (
    "avx2", "fma", "f16c", "bmi2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni",
    "avx512_vbmi2", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    "neon", "asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
# The same on macOS: names in `sysctl machdep.cpu` and below `hw.optional.arm`.
_MACOS_ISA = {
    "AVX2": "avx2",
    "FMA": "fma",
    "F16C": "f16c",
    "BMI2": "bmi2",
    "AVX512F": "avx512f",
    "AdvSIMD": "asimd",
    "FEAT_DotProd": "asimddp",
    "FEAT_FP16": "asimdhp",
    "FEAT_I8MM": "i8mm",
    "FEAT_BF16": "bf16",
}


def this_machine() -> Machine:
    """What this machine is, with a fingerprint that stays the same until it changes."""
    cpu, isa = _cpu()
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    facts = {
        "cpu": cpu,
        "cores": cores,
        "threads_per_core": max(1, (psutil.cpu_count() or cores) // cores),
        "isa": isa,
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    return Machine.model_validate({**facts, "fingerprint": sha256_json(facts)})


def _cpu() -> tuple[str, list[str]]:
    """The processor's name and its relevant instruction sets, as far as the system tells."""
    fallback = platform.processor() or platform.machine() or "unknown"
    if platform.system() == "Darwin":
        return _macos_cpu(fallback)
    try:
        return parse_cpuinfo(Path("/proc/cpuinfo").read_text(), fallback)
    except OSError:  # not Linux
        return fallback, []


def parse_cpuinfo(text: str, fallback: str) -> tuple[str, list[str]]:
    """Name and relevant instruction sets from Linux's `/proc/cpuinfo`, x86 or ARM."""
    facts: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    name = facts.get("model name") or facts.get("Model") or fallback
    if "CPU part" in facts and "model name" not in facts:
        name = f"ARM implementer {facts.get('CPU implementer', '?')} part {facts['CPU part']}"
    return name, [feature for feature in RELEVANT_ISA if feature in flags]


def _macos_cpu(fallback: str) -> tuple[str, list[str]]:
    try:
        told = subprocess.run(
            ["sysctl", "-a"], capture_output=True, text=True, timeout=10, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return fallback, []
    facts = dict(line.split(": ", 1) for line in told.splitlines() if ": " in line)
    names = f"{facts.get('machdep.cpu.features', '')} {facts.get('machdep.cpu.leaf7_features', '')}".split()
    names += [
        key.rpartition(".")[2] for key, value in facts.items() if "optional.arm" in key and value == "1"
    ]
    known = {_MACOS_ISA[name] for name in names if name in _MACOS_ISA}
    return facts.get("machdep.cpu.brand_string", fallback), [isa for isa in RELEVANT_ISA if isa in known]
