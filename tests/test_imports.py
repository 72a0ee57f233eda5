"""What may import what, and that every command is documented."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import cards
import zoo
from tests.example import entry
from zoo import cli, compare, doctor
from zoo import entry as records
from zoo.entry import Record
from zoo.registry import Summary, open_registry

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "lm_eval", "streamlit", "llama_cpp", "datasets", "pipelines")
MODULES = sorted(
    module.name
    for package in (zoo, cards)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if ".migrations" not in module.name  # run by Alembic, in a context of its own
    and not module.name.endswith("._native")  # compiled
)
LOADED = f"import sys; print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"


def heavy_after(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\n{LOADED}", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()[-1]


def loaded_by(*arguments: str) -> set[str]:
    """The packages that a command loads beside Python's own and those of this Python's start."""
    names = "print(*{name.partition('.')[0] for name in sys.modules if name[0] != '_'}, file=sys.stderr)"
    command = (
        "import sys; from zoo import cli\n"
        f"sys.argv = ['zoo', *{arguments!r}]\n"
        "try: cli.main()\n"
        f"except SystemExit as end: assert not end.code, end.code\n{names}"
    )
    found = []
    for program in (f"import sys\n{names}", command):
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found.append(set(done.stderr.splitlines()[-1].split()))
    return found[1] - found[0] - sys.stdlib_module_names


def test_there_are_modules() -> None:
    assert {"zoo.cli", "zoo.registry.registry", "zoo.analyze", "cards.render"} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_of_zoo_or_cards_imports_nothing_heavy(module: str) -> None:
    source = (ROOT / module.replace(".", "/")).with_suffix(".py")
    source = source if source.exists() else source.with_suffix("") / "__init__.py"
    found = re.findall(r"^\s*(?:from|import) (\w+)", source.read_text(), re.MULTILINE)
    allowed = {"zoo.cli": {"pipelines"}, "zoo.runner.bench_worker": {"llama_cpp"}}.get(module, set())
    assert not (set(found) & set(HEAVY)) - allowed


def test_importing_all_of_zoo_and_cards_loads_nothing_heavy() -> None:
    assert heavy_after("\n".join(f"import {module}" for module in MODULES)) == "[]"


def test_a_command_loads_what_it_needs_alone(tmp_path: Path) -> None:
    """Most of a short command's time is this. `python -m benchmarks.startup` measures it."""
    url = str(tmp_path / "registry.db")
    open_registry(url).put(entry())
    parser = {"zoo", "typer", "annotated_doc", "shellingham"}
    checks = {"pydantic", "pydantic_core", "annotated_types", "typing_inspection", "typing_extensions"}
    tables = {"sqlalchemy", "cython_runtime", "psutil", *checks}
    assert loaded_by("--help") - parser == set()
    assert loaded_by("list", "--registry", url) - parser - tables == set()
    assert loaded_by("list", "--registry", url) >= {"zoo", "sqlalchemy"}


def test_the_check_for_heavy_modules_can_fail() -> None:
    assert heavy_after("import sys; sys.modules['torch'] = sys") == "['torch']"


# --- documentation ---


def commands(app: typer.Typer = cli.app, prefix: str = "zoo") -> dict[str, set[str]]:
    """Every command in full, with its options."""
    group = typer.main.get_command(app)
    found: dict[str, set[str]] = {}

    def walk(command: object, name: str) -> None:
        inner = getattr(command, "commands", None)
        for word, child in (inner or {}).items():
            walk(child, f"{name} {word}")
        if inner is None:
            parameters = command.params  # type: ignore[attr-defined]
            found[name] = {
                option
                for p in parameters
                for option in p.opts
                if option.startswith("--") and option != "--help"
            }

    walk(group, prefix)
    return found


def test_every_command_and_option_is_documented() -> None:
    found = re.findall(
        r"^## (zoo[a-z ]*)(?: [\[A-Z][^\n]*)?\n(.*?)(?=^## |\Z)", documentation("commands.md"), re.M | re.S
    )
    sections = {command.strip(): section for command, section in found}
    assert set(sections) == set(commands())
    for command, options in commands().items():
        for option in options:
            assert f"`{option}" in sections[command], f"{command} {option}"


def documentation(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def documented_records() -> list[type[Record]]:
    from zoo.analyze import Analysis, TensorAnalysis
    from zoo.best import Best, Candidate, Constraint, LeftOut
    from zoo.fsck import Finding
    from zoo.hub.pull import Pulled
    from zoo.jobs.plan import Planned
    from zoo.jobs.summary import Delta, JobResult, JobsSummary
    from zoo.registry import Figures
    from zoo.registry.job_runs import Figure
    from zoo.registry.transfer import Transferred
    from zoo.search import Found, Hit, Place

    of_entry = [r for r in vars(records).values() if isinstance(r, type) and issubclass(r, Record)]
    others: list[type[Record]] = [compare.Row, doctor.Check, Analysis, TensorAnalysis, Pulled]
    others += [Planned, JobsSummary, JobResult, Figure, Delta, Finding, Transferred]
    others += [Figures, Found, Hit, Place, Best, Candidate, Constraint, LeftOut]
    return [r for r in of_entry if r is not Record] + others


@pytest.mark.parametrize("record", documented_records(), ids=lambda r: r.__name__)
def test_every_field_of_the_json_is_documented(record: type[Record]) -> None:
    section = re.search(rf"^## {record.__name__}\n(.*?)(?=^## |\Z)", documentation("json.md"), re.M | re.S)
    assert section, record
    assert re.findall(r"^\| `(\w+)` \|", section[1], re.M) == list(record.model_fields)


def test_a_summary_is_an_entry_without_what_is_documented() -> None:
    section = re.search(r"^## Summary\n(.*?);", documentation("json.md"), re.M | re.S)
    assert section
    without = set(re.findall(r"`(\w+)`", section[1]))
    assert without == set(records.Entry.model_fields) - set(Summary.model_fields)
