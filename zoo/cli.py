"""The command line: parse, call, print. Every failure ends here, as `zoo: ...` and an exit code."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoo import __version__
from zoo.errors import UsageError, ZooError

if TYPE_CHECKING:
    from zoo.entry import Entry, Measurement, Record
    from zoo.registry import Registry, Summary

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130
# An error of the command line's own syntax; Typer does not export its base class.
SYNTAX_ERROR: type[Exception] = typer.BadParameter.__mro__[2]
OUR_PACKAGES = ("zoo", "pipelines", "cards", "app")

app = typer.Typer(
    name="zoo",
    help="The open zoo of sparse, quantized language models that run fast on ordinary CPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
recipes = typer.Typer(help="Recipes: what may stand in one, and whether one is right.", no_args_is_help=True)
registries = typer.Typer(help="The registry's own upkeep.", no_args_is_help=True)
app.add_typer(recipes, name="recipe")
app.add_typer(registries, name="registry")

RegistryOption = Annotated[
    str,
    typer.Option("--registry", envvar="ZOO_REGISTRY", help="SQLAlchemy URL, or path of an SQLite file."),
]
StoreOption = Annotated[
    Path,
    typer.Option("--store", envvar="ZOO_STORE", help="Folder of the steps' outputs.", show_default=True),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, as docs/json.md describes it.")]
EntryArgument = Annotated[str, typer.Argument(metavar="ID", help="An entry's id, as `zoo list` shows it.")]
REGISTRY = "registry.db"
STORE = Path("~/.cache/sparse-zoo")


def main() -> None:
    """The one place where failures become messages and exit codes."""
    try:
        code = app(prog_name="zoo", standalone_mode=False) or DONE
        sys.stdout.flush()
        if code == INTERRUPTED:  # Typer's answer to Ctrl-C
            _complain("interrupted; what was finished is kept")
    except SYNTAX_ERROR as error:
        code = _syntax(error)
    except ZooError as error:
        code = WRONG_USAGE if isinstance(error, UsageError) else FAILED
        _complain(str(error))
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
        _complain("interrupted; what was finished is kept")
    except BrokenPipeError:  # the reader of our output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    except ImportError as error:
        if (error.name or "").partition(".")[0] in OUR_PACKAGES:
            raise
        code = FAILED
        missing = ZooError(
            f"this command needs {error.name or 'a package'}, which is not installed or does not load",
            saw=str(error),
            try_="pip install 'sparse-zoo[pipelines]'",
        )
        _complain(str(missing))
    except OSError as error:
        code = FAILED
        _complain(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    sys.exit(code)


def _complain(message: str) -> None:
    print(f"zoo: {message}", file=sys.stderr)


def _syntax(error: Any) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":  # `zoo` alone: its help is the answer
        print(error.format_message(), file=sys.stderr)
        return WRONG_USAGE
    path = error.ctx.command_path if getattr(error, "ctx", None) else "zoo"
    _complain(str(UsageError(error.format_message(), try_=f"{path} --help")))
    return WRONG_USAGE


def _version(asked: bool) -> None:
    if asked:
        print(f"zoo {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# --- the two journeys' commands ---------------------------------------------------------------------


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe's YAML file.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe.")
    ] = None,
    store: StoreOption = STORE,
    registry: RegistryOption = REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Make an entry: compress, measure, export, verify and record a model. Goes on where it was stopped."""
    from pipelines.recipe import load

    parsed = load(recipe, set_ or [])

    from pipelines.run import run as run_recipe  # after it, as this imports torch, which takes seconds
    from zoo.files import Store
    from zoo.registry import open_registry

    entry = run_recipe(parsed, Store(store.expanduser()), open_registry(registry))
    if as_json:
        _print_json(entry)
    else:
        _print_entry(entry)
    if entry.status == "failed":
        raise ZooError(
            f"{entry.id} failed: {entry.failure or 'no reason recorded'}", try_=f"zoo show {entry.id}"
        )


@app.command("list")
def list_(
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="Part of an id or base model.")] = None,
    family: Annotated[str | None, typer.Option(help="llama, mistral or mpt.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model, as `zoo show` names it.")] = None,
    status: Annotated[str | None, typer.Option(help="verified, published or failed.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Failed entries too.")] = False,
    registry: RegistryOption = REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """List the entries, newest first; failed ones only with --all."""
    found = _open(registry).entries(
        family=_one_of("--family", family, "llama mistral mpt"),
        base_model=base,
        status=_one_of("--status", status, "verified published failed"),
        text=text,
        include_failed=all_,
    )
    if as_json:
        _print_json(found)
    elif found:
        head = ["id", "family", "status", "sparsity", "bits/weight", "size", "perplexity", "decode tok/s"]
        _print_table(head, [_line(summary) for summary in found])
    else:
        print("no entries; `zoo run RECIPE` makes one", file=sys.stderr)


@app.command()
def show(entry_id: EntryArgument, registry: RegistryOption = REGISTRY, as_json: JsonOption = False) -> None:
    """Show all that is known of an entry."""
    entry = _open(registry).get(entry_id)
    if as_json:
        _print_json(entry)
    else:
        _print_entry(entry)


@app.command()
def compare(
    entry_ids: Annotated[list[str], typer.Argument(metavar="ID ID...", help="Two entries or more.")],
    registry: RegistryOption = REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Put entries side by side; * marks the best of each row."""
    from zoo import compare as comparison

    if len(entry_ids) < 2:
        raise UsageError("there is nothing to compare", saw="one id", expected="two or more")
    opened = _open(registry)
    rows = comparison.compare([opened.get(entry_id) for entry_id in entry_ids])
    if as_json:
        _print_json({"entries": entry_ids, "rows": [row.model_dump(mode="json") for row in rows]})
        return
    lines = []
    for row in rows:
        cells = [
            _number(value, row.unit) + ("*" if position in row.best else "")
            for position, value in enumerate(row.values)
        ]
        lines.append([row.name, *cells, _number(row.base, row.unit)])
    _print_table(["", *entry_ids, "base"], lines)


@app.command()
def card(
    entry_id: EntryArgument,
    output: Annotated[Path | None, typer.Option("--output", help="Write here, not to the terminal.")] = None,
    registry: RegistryOption = REGISTRY,
) -> None:
    """Print an entry's model card."""
    from cards import render
    from zoo.files import atomic_file

    rendered = render(_open(registry).get(entry_id))
    if output is None:
        print(rendered, end="")
        return
    with atomic_file(output) as temporary:
        temporary.write_text(rendered, encoding="utf-8")


@app.command()
def analyze(
    target: Annotated[str, typer.Argument(metavar="PATH|ID", help="A model's file or folder, or an entry.")],
    registry: RegistryOption = REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Sparsity and bits of every layer: read from any safetensors or GGUF file, or recorded of an entry."""
    path = Path(target).expanduser()
    if path.exists():
        _analyze_files(path, as_json)
    elif "/" in target or target.endswith((".gguf", ".safetensors")):
        raise UsageError(f"there is no file {target}", expected="a safetensors or GGUF file or folder")
    else:
        _analyze_entry(_open(registry).get(target), as_json)


@app.command()
def doctor(
    store: StoreOption = STORE, registry: RegistryOption = REGISTRY, as_json: JsonOption = False
) -> None:
    """Say what this machine has and what is missing, with the command that mends it."""
    from zoo.doctor import examine

    checks = examine(store.expanduser(), registry)
    if as_json:
        _print_json(checks)
    else:
        _print_table(["", "check", "found"], [[c.status, c.name, c.found] for c in checks])
        for check in checks:
            if check.mend:
                print(f"  {check.name}: {check.mend}")
    if any(check.status == "broken" for check in checks):
        raise typer.Exit(FAILED)


@recipes.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, by which editors complete it."""
    from pipelines.recipe import json_schema

    _print_json(json_schema())


@recipes.command()
def check(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Recipes.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of each recipe.")
    ] = None,
) -> None:
    """Say whether recipes are right, without running them."""
    from pipelines.recipe import load

    wrong = 0
    for path in paths:
        try:
            load(path, set_ or [])
            print(f"{path}: right")
        except ZooError as error:
            wrong += 1
            _complain(str(error))
    if wrong:
        raise typer.Exit(WRONG_USAGE)


@registries.command()
def migrate(registry: RegistryOption = REGISTRY) -> None:
    """Create the registry if it is absent, and bring the tables of an older one up to date."""
    from zoo.registry import open_registry

    opened = open_registry(registry)
    print(f"{opened.name}: schema {opened.revision()}")


# --- printing ---------------------------------------------------------------------------------------


def _open(url: str) -> Registry:
    from zoo.registry import open_registry

    return open_registry(url, create=False)


def _one_of(option: str, value: str | None, known: str) -> Any:
    if value is not None and value not in known.split():
        raise UsageError(f"{option} {value!r} is not known", expected=", ".join(known.split()))
    return value


def _print_json(value: Record | Sequence[Record] | dict[str, Any]) -> None:
    def plain(record: Any) -> Any:
        return record.model_dump(mode="json") if hasattr(record, "model_dump") else record

    value = [plain(record) for record in value] if isinstance(value, list) else plain(value)
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Lines on a terminal, aligned words elsewhere. Control characters of the data are not printed."""
    clean = [["".join(c if c.isprintable() else " " for c in cell) for cell in row] for row in [head, *rows]]
    if sys.stdout.isatty():
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, pad_edge=False, show_header=any(head))
        for position, name in enumerate(clean[0]):  # the first names the row: whole, to be copied
            table.add_column(Text(name), overflow="fold", no_wrap=position == 0)
        for row in clean[1:]:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(*clean, strict=True)]
    for row in clean if any(head) else clean[1:]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_entry(entry: Entry) -> None:
    from zoo.compare import describe, pairs

    facts = {
        "id": entry.id,
        "status": entry.status + (f": {entry.failure}" if entry.failure else ""),
        "family": entry.family,
        "base": f"{entry.base_model}, revision {entry.base_revision}",
        "licence": entry.license or "-",
        "created": entry.created,
        "parameters": f"{entry.parameters:,}",
        "sparsity": _percent(entry.sparsity),
        "bits per weight": f"{entry.bits_per_weight:.4g} ({entry.compression_ratio:.4g} × against 16 bits)",
        "recipe": entry.recipe_sha256[:16],
    }
    _print_table(["", ""], [[name, fact] for name, fact in facts.items()])
    if entry.measurements:
        print()
        lines = []
        for measured, base in pairs(entry.measurements):
            arrow = "↑" if measured.direction == "higher_is_better" else "↓"
            lines.append([f"{describe(measured)} {arrow}", _value(measured), _value(base)])
        _print_table(["measured", "entry", "base"], lines)
    if entry.artifacts:
        passed: dict[str, bool] = {}
        for v in entry.verifications:
            passed[v.artifact] = passed.get(v.artifact, True) and v.passed
        print()
        words = {True: "yes", False: "NO", None: "-"}
        _print_table(
            ["file", "format", "size", "verified"],
            [[a.path, a.format or a.kind, _size(a.size), words[passed.get(a.path)]] for a in entry.artifacts],
        )
    if entry.benchmarks:
        print()
        _print_table(
            ["speed", "runner", "threads", "prefill tok/s", "decode tok/s", "load", "memory", "machine"],
            [
                [
                    b.artifact,
                    f"{b.runner} {b.runner_version}",
                    str(b.threads),
                    f"{b.prefill_tokens_per_s:.1f}",
                    f"{b.decode_tokens_per_s:.1f}",
                    f"{b.load_s:.2f} s",
                    _size(b.peak_memory_bytes),
                    b.machine.cpu,
                ]
                for b in entry.benchmarks
            ],
        )


def _analyze_files(path: Path, as_json: bool) -> None:
    from zoo.analyze import analyze as analyze_files

    analysis = analyze_files(path)
    if as_json:
        _print_json(analysis)
        return
    _print_table(
        ["tensor", "shape", "stored as", "sparsity", "bits/weight", "smallest"],
        [
            [
                tensor.name,
                " × ".join(map(str, tensor.shape)),
                tensor.dtype,
                _percent(tensor.sparsity),
                f"{tensor.bits_per_weight:.4g}",
                f"{tensor.smallest_bits_per_weight:.4g}",
            ]
            for tensor in analysis.tensors
        ],
    )
    print(
        f"\nwhole: {_size(analysis.bytes)}, {analysis.weights:,} weights, "
        f"sparsity {_percent(analysis.sparsity)}, {analysis.bits_per_weight:.4g} bits per weight, "
        f"{analysis.smallest_bits_per_weight:.4g} in the smallest exact encoding "
        f"({analysis.compression_ratio:.4g} × against 16 bits)"
    )


def _analyze_entry(entry: Entry, as_json: bool) -> None:
    if as_json:
        whole = {"id", "sparsity", "bits_per_weight", "compression_ratio", "layers"}
        _print_json(entry.model_dump(mode="json", include=whole))
        return
    _print_table(
        ["layer", "shape", "sparsity", "pattern", "bits", "group", "method", "error"],
        [
            [
                layer.name,
                f"{layer.rows} × {layer.columns}",
                _percent(layer.sparsity),
                (layer.pattern or "-") + (f" window {layer.window}" if layer.window else ""),
                f"{layer.bits:g}",
                str(layer.group or "-"),
                layer.method or "-",
                "-" if layer.error is None else f"{layer.error:.4g}",
            ]
            for layer in entry.layers
        ],
    )
    print(
        f"\nwhole: {entry.parameters:,} parameters, sparsity {_percent(entry.sparsity)}, "
        f"{entry.bits_per_weight:.4g} bits per weight ({entry.compression_ratio:.4g} × against 16 bits)"
    )


def _line(summary: Summary) -> list[str]:
    from zoo.compare import WEIGHTS

    perplexities = [m for m in summary.measurements if m.metric == "perplexity"]
    ours = next((m for m in perplexities if m.subject == "entry"), None)
    base = next((m for m in perplexities if m.subject == "base"), None)
    perplexity = "-"
    if ours is not None:
        perplexity = f"{ours.value:.2f} at {ours.context_length}" + (
            f" (base {base.value:.2f})" if base else ""
        )
    smallest = min((a.size for a in summary.artifacts if a.kind in WEIGHTS), default=None)
    decode = max((b.decode_tokens_per_s for b in summary.benchmarks), default=None)
    return [
        summary.id,
        summary.family,
        summary.status,
        _percent(summary.sparsity),
        f"{summary.bits_per_weight:.3g}",
        "-" if smallest is None else _size(smallest),
        perplexity,
        "-" if decode is None else f"{decode:.1f}",
    ]


def _value(measured: Measurement | None) -> str:
    if measured is None:
        return "-"
    return f"{measured.value:.4g}" + (f" ± {measured.stderr:.2g}" if measured.stderr is not None else "")


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return _size(value) if unit == "byte" else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _size(value: float) -> str:
    """Bytes in powers of ten."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.1f} {unit}"
    return f"{value:.0f} B"


if __name__ == "__main__":
    main()
