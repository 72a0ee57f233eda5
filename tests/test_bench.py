"""`zoo bench`: random models, llama.cpp's peers, and measuring."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import gguf
import jsonschema
import llama_cpp
import numpy as np
import psutil
import pytest

from zoo.entry import Machine, Record
from zoo.errors import StoreError, UsageError, ZooError
from zoo.machine import this_machine
from zoo.runner import bench, chart, contenders, peers
from zoo.runner.bench import Bench, BenchRow, Figures, Run, Settings, Worker
from zoo.runner.contenders import Contender
from zoo.runner.format import Layout, dequantize, unpack
from zoo.runner.packed import Packed
from zoo.runner.shapes import SHAPES, Weights, parse_pattern, random_size, shape, write_random

ROOT = Path(__file__).parents[1]
TINY = SHAPES["tiny"]
QUICK = Settings(threads=1, prompt=24, generate=6, repeat=3)


def zoo(*arguments: str | Path, before: str = "") -> subprocess.CompletedProcess[str]:
    """`zoo ARGUMENTS` in a process of its own, after the statements `before`."""
    words = [str(argument) for argument in arguments]
    program = f"import sys\n{before}\nfrom zoo.cli import main\nsys.argv[1:] = {words!r}\nmain()"
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
    )


# --- patterns and random models ---

# pattern -> kept of 16, bits per weight: by hand, 16 bits of scale per 64 columns included
PATTERNS = {
    "dense": (16, 4.25),
    "dense/6": (16, 6.25),
    "dense/8": (16, 8.25),
    "dense@32": (16, 4.5),
    "8:16": (8, 4.25),
    "8:16/4": (8, 4.25),
    "12:16/6": (12, 6.25),
    "6:16": (6, 3.25),
    "4:16": (4, 2.25),
    "8:16/planes": (8, 3.25),
    "4:16/4/planes": (4, 1.75),
    "10:16/8/planes": (10, 7.75),
    "75%": (4, 1 + 2 + 0.25),
    "50%/4": (8, 1 + 2 + 0.25),
}


@pytest.mark.parametrize("text", PATTERNS)
def test_a_random_model_is_what_its_pattern_says(text: str, tmp_path: Path) -> None:
    keep, bits = PATTERNS[text]
    pattern = parse_pattern(text)
    assert parse_pattern(str(pattern)) == pattern
    path = tmp_path / "packed.safetensors"
    write_random(path, TINY, pattern)
    packed = Packed(path)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size - header == pytest.approx(random_size(TINY, pattern), rel=0.02)
    for name in ("layers.0.q", "layers.1.down"):
        weights = dequantize(packed.layouts[name], packed.parts(name))
        assert (weights != 0).sum() * 16 == keep * weights.size
        assert np.isfinite(weights).all()
        assert weights.std() * weights.shape[1] ** 0.5 == pytest.approx(1, abs=0.1)
        if pattern.keep:
            assert ((weights.reshape(-1, 16) != 0).sum(axis=1) == keep).all()
    contender = contenders.open_packed(path)
    assert contender.bits_per_weight == pytest.approx(bits)
    assert contender.format == str(pattern)


@pytest.mark.parametrize("text", ["6:16/planes", "6:16/8/planes"])
def test_nothing_lies_beyond_the_last_column(text: str) -> None:
    pattern = parse_pattern(text)
    layout = pattern.layout(32, 288)
    parts = Weights(0).matrix(pattern, 32, 288)
    width = layout.pairs * 32
    assert width > 288
    padded = Layout(layout.kind, 32, width, layout.bits, 0, layout.keep, layout.offset_bits)
    q, _, _ = unpack(padded, parts | {"scales": np.zeros((2, 1, 16), np.float16)})
    assert not q[:, 288:].any()
    assert (q[:, :288] != 0).sum() == 32 * 288 * 6 / 16


@pytest.mark.parametrize(
    "text",
    ["", "9:16", "8:32", "dense/5", "8:16/3", "8:16/8", "8:16/6/planes", "dense/planes", "70", "100%",
     "8:16@48", "70%/planes", "8:16/5/4"],
)  # fmt: skip
def test_other_patterns_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no pattern"):
        parse_pattern(text)


def test_bits_are_of_patterns_that_name_none() -> None:
    found = contenders.parse_patterns(["8:16,4:16/5", "6:16"], 4)
    assert list(map(str, found)) == ["8:16/4", "4:16/5", "6:16/4"]
    assert str(parse_pattern("8:16/head6")) == "8:16/5/head6" and parse_pattern("8:16/head6").head_bits == 6
    with pytest.raises(UsageError, match="no pattern '8:16' with 7 bits"):
        contenders.parse_patterns(["8:16"], 7)


# Sizes of the published models, from their model cards.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-2-7b", 6_738_415_616), ("llama-2-13b", 13_015_864_320), ("llama-3-8b", 8_030_261_248),
     ("llama-3.2-1b", 1_235_814_400), ("llama-3.2-3b", 3_212_749_824), ("mistral-7b", 7_241_732_096),
     ("smollm2-135m", 134_515_008), ("smollm2-360m", 361_821_120), ("smollm2-1.7b", 1_711_376_384),
     ("mpt-7b", 6_649_286_656)],
)  # fmt: skip
def test_shapes_are_those_of_the_published_models(name: str, parameters: int) -> None:
    found = SHAPES[name]
    count = sum(rows * columns for rows, columns in found.matrices.values())
    assert count + len(found.norms) * found.hidden == parameters


def test_unknown_shapes_and_layers_are_refused() -> None:
    assert shape("llama-2-7b", 8).layers == 8
    with pytest.raises(UsageError) as refused:
        shape("llama-9")
    assert "llama-2-7b" in str(refused.value)
    with pytest.raises(UsageError, match="33 layers"):
        shape("llama-2-7b", 33)


# --- peers ---


@pytest.mark.parametrize("name", ["tiny", "tiny-mpt"])
@pytest.mark.parametrize("kind", peers.TYPES)
def test_peers_run_in_llama_cpp(name: str, kind: str, tmp_path: Path) -> None:
    one = SHAPES[name]
    path = tmp_path / "peer.gguf"
    peers.write_gguf(path, one, kind)
    assert abs(path.stat().st_size / peers.gguf_size(one, kind) - 1) < 0.15
    weights = 0
    for tensor in gguf.GGUFReader(path).tensors:
        if len(tensor.shape) == 1:
            continue
        assert tensor.tensor_type.name == kind
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        scale = values.std() * values.shape[1] ** 0.5  # random floats have a power of two
        assert 0.7 < scale < 1.42 if kind in ("F16", "F32") else 0.95 < scale < 1.05
        weights += values.size
    assert weights == sum(rows * columns for rows, columns in one.matrices.values())

    model = llama_cpp.Llama(str(path), n_ctx=32, logits_all=True, n_threads=1, verbose=False)
    model.eval([1, 2, 3, 500])
    logits = model.scores[:4]
    model.close()
    assert logits.shape == (4, one.vocabulary)
    assert np.isfinite(logits).all()
    assert 0.1 < logits.std() < 10
    assert not np.allclose(logits[0], logits[3])


def test_what_decode_reads_is_counted(tmp_path: Path) -> None:
    h, inner, vocabulary, norms = 128, 256, 512, 5 * 128 * 4
    layer = h * (2 * h + 2 * 64) + 3 * h * inner
    peers.write_gguf(tmp_path / "q8.gguf", TINY, "Q8_0")
    theirs = contenders.open_gguf(tmp_path / "q8.gguf")
    # two layers and the head, and of the embeddings one row
    assert theirs.weight_bytes == (2 * layer + vocabulary * h + h) * 34 // 32 + norms
    assert (theirs.bits_per_weight, theirs.format) == (8.5, "Q8_0")
    write_random(tmp_path / "ours.safetensors", TINY, parse_pattern("dense/8"))
    ours = contenders.open_packed(tmp_path / "ours.safetensors")
    assert ours.weight_bytes == (2 * layer + vocabulary * h + h) * 66 // 64 + norms
    # keys and values of 2 layers, 2 heads of 32, in 2 bytes
    assert ours.kv_bytes(10, "f16") == theirs.kv_bytes(10, "f16") == 10 * 2 * 2 * 2 * 32 * 2
    assert theirs.kv_bytes(10, "int8") == 10 * 2 * 2 * 2 * 34

    write_random(tmp_path / "tied.safetensors", SHAPES["tiny-mpt"], parse_pattern("dense/8"))
    tied = contenders.open_packed(tmp_path / "tied.safetensors")
    assert tied.weight_bytes == (2 * 12 * h * h + vocabulary * h) * 66 // 64 + norms
    peers.write_gguf(tmp_path / "mpt.gguf", SHAPES["tiny-mpt"], "F16")
    assert contenders.open_gguf(tmp_path / "mpt.gguf").kv_width == tied.kv_width == 2 * 2 * 128


# --- measuring ---


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Contender]:
    planned = contenders.plan([], shape="tiny", layers=1, patterns=[parse_pattern("8:16")], against=["Q4_0"])
    return contenders.write(tmp_path_factory.mktemp("models"), planned)


def test_engines_take_turns(models: list[Contender]) -> None:
    run = bench.measure(models, QUICK)
    assert run.order == sorted(run.order)  # by the clock of the processes themselves
    assert [(phase, who) for _, phase, who in run.order] == [("prefill", 0), ("prefill", 1)] * 3 + [
        ("decode", 0),
        ("decode", 1),
    ] * 3
    assert len(run.bandwidth_gb_s) == 3 and min(run.bandwidth_gb_s) > 0.1
    for figures in run.figures:
        assert len(figures.prefill_s) == len(figures.decode_s) == 3
        assert min(*figures.prefill_s, *figures.decode_s, figures.load_s) > 0
        assert 20e6 < figures.peak_memory_bytes < 1e9


@pytest.mark.parametrize("position", [0, 1])
def test_idle_engines_use_no_processor(models: list[Contender], position: int) -> None:
    one = models[position]
    job = {"engine": one.engine, "path": str(one.path), "threads": 2, "context": 64, "kv": "f16"}
    with Worker("engine", job) as worker:
        worker.answer()
        worker.ask(start=0, count=48, step=0)
        worker.ask(start=48, count=16, step=1)
        process = psutil.Process(worker.process.pid)
        time.sleep(0.3)  # threads may spin for a moment before they sleep
        before = process.cpu_times()
        time.sleep(0.7)
        after = process.cpu_times()
    assert after.user + after.system - before.user - before.system < 0.03


def test_an_engine_goes_back_over_its_context(models: list[Contender]) -> None:
    for one in models:
        job = {"engine": one.engine, "path": str(one.path), "threads": 1, "context": 40, "kv": "int8"}
        with Worker("engine", job) as worker:
            worker.answer()
            for start, count, step in [(0, 32, 0), (32, 8, 1), (32, 8, 1), (0, 40, 0), (16, 8, 1)]:
                assert worker.ask(start=start, count=count, step=step)["seconds"] > 0


def test_an_engine_that_fails_says_why(models: list[Contender], tmp_path: Path) -> None:
    ours = models[0]
    job: dict[str, Any] = {
        "engine": "zoo",
        "path": str(ours.path),
        "threads": 1,
        "context": 99999,
        "kv": "f16",
    }
    with Worker("ours", job) as worker, pytest.raises(ZooError, match="ours: the context cannot be 99999"):
        worker.answer()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(models[1].path.read_bytes()[:50_000])
    job = {"engine": "llama.cpp", "path": str(broken), "threads": 1, "context": 64, "kv": "f16"}
    with Worker("theirs", job) as worker, pytest.raises(ZooError, match="cannot load"):
        worker.answer()
    with Worker("theirs", job | {"path": str(models[1].path)}) as worker:
        worker.answer()
        worker.process.kill()
        with pytest.raises(ZooError, match=r"theirs crashed \(SIGKILL\)"):
            worker.ask(start=0, count=1, step=1)


def made_up(decode_s: list[float]) -> tuple[Run, list[Contender], Settings]:
    one = Contender("zoo", "m", "dense/4", Path("m"), 4.25, 900_000_000, 1000, 8.25, window=100)
    settings = Settings(threads=1, prompt=512, generate=10, context_at=200, repeat=5)
    figures = Figures(1.5, 10**9, [2.0, 1.0, 4.0, 1.0, 2.0], decode_s)
    return Run([figures], [20, 30, 10, 20, 20], "native", 0.0, {}, []), [one], settings


def test_medians_spreads_and_the_roofline() -> None:
    run, models, settings = made_up([1.0, 0.5, 2.0, 1.0, 1.0])
    found = bench.summarize(run, models, settings)
    assert found.roofline_gb_s == 20 and found.roofline_spread == 0
    (row,) = found.rows
    assert row.prefill_tok_s == 256 and row.first_token_s == 2.0
    low, middle, high = statistics.quantiles([256, 512, 128, 512, 256], n=4, method="inclusive")
    assert row.prefill_spread == pytest.approx((high - low) / middle)
    assert row.decode_tok_s == 10 and row.spread == 0
    assert row.bytes_per_token == 900_000_000 + 100 * 1000 * 2  # no more than the window is read
    assert row.read_gb_s == pytest.approx(9.002)
    assert row.roofline_fraction == pytest.approx(9.002 / 20)


def test_room_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    large = contenders.plan([], shape="llama-2-13b", layers=None, patterns=[], against=["F32"])
    with pytest.raises(UsageError, match="do not fit into memory"):
        contenders.check_room(tmp_path, [], large * 100, context=30, kv="f16")
    small = contenders.plan([], shape="tiny", layers=None, patterns=[], against=[])
    contenders.check_room(tmp_path, [], small, context=30, kv="f16")
    if os.geteuid() == 0:
        from tests.process import small_disk

        with small_disk(1_000_000) as disk, pytest.raises(StoreError, match="no space"):
            contenders.check_room(disk, [], small, context=30, kv="f16")


def test_what_killed_runs_left_is_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, running = tmp_path / "bench" / f"{dead.pid}-abc", tmp_path / "bench" / f"{os.getppid()}-abc"
    left.mkdir(parents=True)
    running.mkdir()
    with contenders.scratch(tmp_path, None) as folder:
        assert folder.is_dir() and not left.exists() and running.exists()
    assert not folder.exists()
    with contenders.scratch(tmp_path, tmp_path / "kept") as folder:
        (folder / "model").touch()
    assert (tmp_path / "kept" / "model").exists()


def test_models_are_found(models: list[Contender], tmp_path: Path) -> None:
    ours, theirs = models
    folder = tmp_path / "entries" / "an-entry" / "packed"
    folder.mkdir(parents=True)
    (folder / "packed.safetensors").write_bytes(ours.path.read_bytes())
    for target in ("an-entry", str(folder), str(folder / "packed.safetensors")):
        found = contenders.find(target, tmp_path)
        assert (found.engine, found.format) == ("zoo", "8:16/5")
    assert contenders.find(str(theirs.path), tmp_path).format == "Q4_0"
    for target in ("nothing", str(tmp_path / "nothing.gguf"), str(tmp_path)):
        with pytest.raises(UsageError):
            contenders.find(target, tmp_path)
    peer = contenders.plan([ours], shape=None, layers=None, patterns=[], against=["F16"])
    assert [(p.how, p.architecture) for p in peer] == [("F16", Packed(ours.path).architecture)]
    for wrong in (
        lambda: contenders.plan([], shape=None, layers=None, patterns=[], against=[]),
        lambda: contenders.plan([theirs], shape=None, layers=None, patterns=[], against=["F16"]),
        lambda: contenders.plan([ours], shape=None, layers=1, patterns=[], against=[]),
        lambda: peers.parse_against("vllm"),
        lambda: peers.parse_against("llama.cpp:q3_k"),
    ):
        with pytest.raises(UsageError):
            wrong()


# --- the command ---


def documented(record: type[Record]) -> dict[str, Any]:
    """The JSON Schema that docs/json.md describes in its table for `record`."""
    text = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {record.__name__}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert section
    others = {"Machine": Machine, "BenchRow": BenchRow}

    def of(kind: str) -> dict[str, Any]:
        if kind.startswith("array of "):
            return {"type": "array", "items": of(kind.removeprefix("array of "))}
        return documented(others[kind]) if kind in others else {"type": kind}

    fields = {name: of(kind) for name, kind in re.findall(r"^\| `(\w+)` \| ([\w ]+) \|", section[1], re.M)}
    assert list(fields) == list(record.model_fields)
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


def test_bench_from_end_to_end(tmp_path: Path) -> None:
    drawing = tmp_path / "chart.svg"
    done = zoo(
        "bench", "--shape", "tiny", "--pattern", "dense,4:16", "--against", "llama.cpp:q8_0",
        "--threads", "1", "--prompt", "16", "--generate", "4", "--context-at", "40", "--repeat", "2",
        "--store", tmp_path / "store", "--json", "--plot", drawing,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    jsonschema.validate(found, documented(Bench))
    assert [(row["engine"], row["format"], row["model"]) for row in found["rows"]] == [
        ("zoo", "dense/4", "tiny"),
        ("zoo", "4:16/5", "tiny"),
        ("llama.cpp", "Q8_0", "tiny"),
    ]
    assert [row["bits_per_weight"] for row in found["rows"]] == [4.25, 2.25, 8.5]
    assert found["machine"] == this_machine().model_dump(mode="json")
    assert (found["context_tokens"], found["repeats"], found["threads"]) == (40, 2, 1)
    for row in found["rows"]:
        assert row["read_gb_s"] == pytest.approx(row["bytes_per_token"] * row["decode_tok_s"] / 1e9)
        assert row["roofline_fraction"] == pytest.approx(row["read_gb_s"] / found["roofline_gb_s"])
    assert list((tmp_path / "store" / "bench").iterdir()) == []
    drawn = " ".join(xml.etree.ElementTree.parse(drawing).getroot().itertext())
    assert all(word in drawn for word in ("decode", "prefill", "zoo dense/4", "zoo 4:16/5", "llama.cpp Q8_0"))
    assert all(f"{row['decode_tok_s']:.1f}" in drawn for row in found["rows"])


def test_a_chart_is_a_picture(tmp_path: Path) -> None:
    run, models, settings = made_up([1.0])
    chart.draw(bench.summarize(run, models, settings), tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_names_what_is_compared(tmp_path: Path) -> None:
    done = zoo(
        "bench", "--shape", "tiny-mpt", "--layers", "1", "--against", "llama.cpp", "--threads", "1",
        "--prompt", "16", "--generate", "4", "--repeat", "1", "--store", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tiny-mpt (1 of 2 layers)" in done.stdout
    assert re.search(r"^model +format +zoo dense/4 +llama.cpp Q4_0$", done.stdout, re.M)
    assert re.search(
        r"^tiny-mpt \(1 of 2 layers\) +8:16/5 +[\d.]+ / [\d.]+ +[\d.]+ / [\d.]+$", done.stdout, re.M
    )
    assert "GB/s" in done.stdout


HIDDEN = """
class Hide:
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, *rest):
        return None if name == "llama_cpp" else self.finder.find_spec(name, *rest)
sys.meta_path = [Hide(finder) for finder in sys.meta_path]
"""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "llama-9"], "smollm2-135m"),
        ([], "nothing to measure"),
        (["--shape", "tiny", "--pattern", "8:17"], "no pattern"),
        (["--shape", "tiny", "--plot", "chart.pdf"], ".svg"),
        (["--shape", "tiny", "--kv", "int4"], "f16, int8"),
        (["--shape", "tiny", "--against", "llama.cpp"], "pip install llama-cpp-python"),
    ],
)
def test_wrong_usage_is_told(arguments: list[str], words: str, tmp_path: Path) -> None:
    done = zoo("bench", *arguments, "--store", tmp_path, before=HIDDEN)
    assert done.returncode == 2
    assert done.stderr.startswith("zoo: ") and words in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "" and not list(tmp_path.rglob("*.safetensors"))
