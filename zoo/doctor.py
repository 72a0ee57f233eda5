"""What this machine has and what is missing, with the command that mends it. No network is used."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement

from zoo.entry import Record
from zoo.errors import ZooError
from zoo.logs import redact
from zoo.machine import this_machine
from zoo.runner import native

LEAST_FREE_BYTES = 5_000_000_000  # a small model with its steps' outputs and exports
LEAST_MEMORY_BYTES = 2_000_000_000
_PROBE_TORCH = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
_PROBE_LLAMA = (
    "import pathlib, llama_cpp; from zoo.runner import peers, shapes; "
    "peers.write_gguf(pathlib.Path('random.gguf'), shapes.SHAPES['tiny'], 'Q4_0'); "
    "model = llama_cpp.Llama('random.gguf', n_ctx=16, n_threads=1, verbose=False); "
    "model.eval([1, 2, 3]); model.close(); print(llama_cpp.__version__)"
)
_OTHER_PROCESSOR = "ended by SIGILL: it was compiled for another processor, or by a compiler that breaks AMX"
_WITHOUT_AMX = "CFLAGS=-mno-amx-int8 CXXFLAGS=-mno-amx-int8 "  # Makefile says why


class Check(Record):
    name: str
    status: Literal["ok", "missing", "broken"]  # missing: optional, and some command needs it
    found: str
    mend: str | None = None  # a command, or what to do


def examine(store: Path, registry: str) -> list[Check]:
    """Every check, in the order in which to mend. `broken`: the base install does not work."""
    checks = [
        *_system(),
        _engine(),
        _disk(store),
        *_packages(),
        *_runners(),
        _registry(registry),
        _hub(),
        _shared(),
    ]
    return [check.model_copy(update={"found": redact(check.found)}) for check in checks]


def _system() -> list[Check]:
    machine = this_machine()
    version = platform.python_version()
    recent = sys.version_info >= (3, 11)
    available = psutil.virtual_memory().available
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)
    return [
        Check(
            name="python",
            status="ok" if recent else "broken",
            found=f"{version} at {sys.executable}",
            mend=None if recent else "install Python 3.11 or newer",
        ),
        Check(
            name="cpu",
            status="ok",
            found=f"{machine.cpu}, {machine.cores} cores, {' '.join(machine.isa) or 'features unknown'}",
        ),
        Check(
            name="memory",
            status="ok" if available >= LEAST_MEMORY_BYTES else "missing",
            found=f"{available / 1e9:.1f} GB available of {machine.memory_bytes / 1e9:.1f} GB",
            mend=None if available >= LEAST_MEMORY_BYTES else "close other programs",
        ),
        Check(
            name="c++ compiler",
            status="ok" if compiler else "missing",
            found=compiler or "none: llama-cpp-python cannot be built from source",
            mend=None if compiler else _compiler_command(),
        ),
    ]


def _engine() -> Check:
    return Check(
        name="sparse runner",
        status="ok" if native.AVAILABLE else "missing",
        found=f"C++, {native.ISA} kernels" if native.AVAILABLE else f"NumPy, which is slow: {native.WHY_NOT}",
        mend=None if native.AVAILABLE else _compiler_command(),
    )


def _compiler_command() -> str:
    if platform.system() == "Darwin":
        return "xcode-select --install"
    return "sudo apt-get install -y g++" if shutil.which("apt-get") else "install g++ or clang++"


def _disk(store: Path) -> Check:
    folder = store.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    writable = os.access(folder, os.W_OK)
    enough = writable and free >= LEAST_FREE_BYTES
    return Check(
        name="store",
        status="ok" if enough else "missing",
        found=f"{store}, {free / 1e9:.1f} GB free{'' if writable else ', not writable'}",
        mend=None if enough else "name a folder with room by --store or ZOO_STORE",
    )


def _packages() -> list[Check]:
    """One check for the base install and one per extra, from the package's own metadata."""
    try:
        distribution = metadata.distribution("sparse-zoo")
    except metadata.PackageNotFoundError:
        return [
            Check(
                name="sparse-zoo", status="broken", found="not installed", mend="pip install . in a checkout"
            )
        ]
    requirements = [Requirement(line) for line in distribution.requires or []]
    checks = []
    for extra in ["", *distribution.metadata.get_all("Provides-Extra", [])]:
        found, wrong = [], []
        for requirement in requirements:
            of_base = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if of_base != (not extra):
                continue
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
                continue
            version = _version(requirement.name)
            found.append(f"{requirement.name} {version or 'absent'}")
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                wrong.append(f"{requirement.name}{requirement.specifier}")
        checks.append(
            Check(
                name=f"extra {extra}" if extra else f"sparse-zoo {distribution.version}",
                status="ok" if not wrong else "missing" if extra else "broken",
                found=", ".join(found),
                mend=f"pip install '.{f'[{extra}]' if extra else ''}' in a checkout" if wrong else None,
            )
        )
    return checks


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _runners() -> list[Check]:
    checks = []
    if _version("torch") is not None:
        works, told = _probe(_PROBE_TORCH)
        device = f"CUDA: {told}" if told else "no CUDA device: the CPU is used"
        checks.append(_imported("torch", works, device if works else told))
    if _version("llama-cpp-python") is not None:
        works, told = _probe(_PROBE_LLAMA)
        checks.append(_imported("llama-cpp-python", works, f"runs, {told}" if works else told))
    return checks


def _imported(package: str, works: bool, found: str) -> Check:
    mend = None
    if not works:
        mend = f"pip install --force-reinstall --no-cache-dir {package}"
        compiled = package == "llama-cpp-python" and found == _OTHER_PROCESSOR
        if compiled and platform.machine() == "x86_64":
            mend = _WITHOUT_AMX + mend
    return Check(name=package, status="ok" if works else "missing", found=found, mend=mend)


def _probe(program: str) -> tuple[bool, str]:
    """Run a Python program in a process and a folder of its own; did it succeed, and its last line."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-c", program],
                cwd=folder, capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False, "does not run within two minutes"
    if done.returncode == -signal.SIGILL:
        return False, _OTHER_PROCESSOR
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else ""


def _registry(url: str) -> Check:
    from zoo.registry import open_registry

    try:
        registry = open_registry(url, create=False)
        count = registry.count()
    except ZooError as error:
        return Check(name="registry", status="missing", found=error.what, mend=error.try_)
    entries = f"{count:,} {'entry' if count == 1 else 'entries'}"
    found = f"{registry.name}, schema {registry.revision()}, {entries}"
    return Check(name="registry", status="ok", found=found)


def _hub() -> Check:
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    offline = [
        name
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
        if os.environ.get(name)
    ]
    found = f"{endpoint}, not tried" + (f"; offline by {', '.join(offline)}" if offline else "")
    return Check(name="hub", status="ok", found=found)


def _shared() -> Check:
    folder = Path(os.environ.get("ZOO_SHARED") or Path(__file__).parents[1] / ".." / "shared").resolve()
    if (folder / "data").is_dir():
        return Check(name="shared data", status="ok", found=str(folder))
    return Check(
        name="shared data",
        status="missing",
        found=f"none at {folder}: recipes that need the shared text, and some tests, want it",
        mend="set ZOO_SHARED to its folder; README.md says under Start what it holds",
    )
