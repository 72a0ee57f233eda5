"""The command line: parse, call, print. Every failure ends here, as `zoo: ...` and an exit code."""

from __future__ import annotations

import difflib
import io
import json
import os
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from zoo import __version__
from zoo.errors import Stopped, UsageError, ZooError

if TYPE_CHECKING:
    from pipelines.executors import Executor
    from zoo.best import Best
    from zoo.entry import Entry, Measurement, Record
    from zoo.registry import Registry, Summary
    from zoo.registry.transfer import Transferred
    from zoo.runner.bench import Bench
    from zoo.runner.pack import PackedMatrix, PackReport
    from zoo.search import Hit

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
tokens = typer.Typer(help="Who may use the server of `zoo serve`.", no_args_is_help=True)
jobs = typer.Typer(help="Jobs: keep the entries of a job list up to date.", no_args_is_help=True)
app.add_typer(recipes, name="recipe")
app.add_typer(registries, name="registry")
app.add_typer(tokens, name="token")
app.add_typer(jobs, name="jobs")


def _check_file(path: Path | None) -> Path | None:
    """The file to write, where ~ is the home folder. UsageError if it is a folder."""
    file = None if path is None else path.expanduser()
    if file is not None and file.is_dir():
        raise UsageError(f"{path} is a folder", expected="the file to write", try_=f"{file / 'NAME'}")
    return file


RegistryOption = Annotated[
    str,
    typer.Option("--registry", envvar="ZOO_REGISTRY", help="SQLAlchemy URL, or path of an SQLite file."),
]
StoreOption = Annotated[
    Path,
    typer.Option(
        "--store",
        envvar="ZOO_STORE",
        help="Folder of the steps' outputs.",
        show_default=True,
        callback=lambda folder: _folder_of_this_machine(folder),
    ),
]
SharedStoreOption = Annotated[
    str | None,
    typer.Option(
        "--shared-store",
        metavar="URL",
        envvar="ZOO_SHARED_STORE",
        help="Share outputs with other machines there: s3://bucket/prefix, or whatever fsspec knows.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, as docs/json.md describes it.")]
ModelArgument = Annotated[
    str, typer.Argument(metavar="ID|PATH", help="An entry, or a packed file or the folder that holds it.")
]
MaxTokensOption = Annotated[int, typer.Option(help="Tokens to generate at most.")]
TemperatureOption = Annotated[float, typer.Option(help="0: always the likeliest token.")]
TopKOption = Annotated[int, typer.Option(help="Choose from so many of the likeliest tokens; 0: all.")]
TopPOption = Annotated[float, typer.Option(help="From the likeliest that together have this probability.")]
MinPOption = Annotated[float, typer.Option(help="From those at least this likely, of the likeliest's.")]
PenaltyOption = Annotated[float, typer.Option(help="Above 1: tokens seen before become less likely.")]
SeedOption = Annotated[int, typer.Option(help="The same seed gives the same text.")]
StopOption = Annotated[list[str] | None, typer.Option(help="End before this string; may be repeated.")]
ThreadsOption = Annotated[int | None, typer.Option(help="Default: all cores.")]
ContextOption = Annotated[
    int | None, typer.Option(help="Tokens, prompt included. Default: the model's, at most 4096.")
]
KvOption = Annotated[str, typer.Option("--kv", help="How keys and values are kept: f16 or int8.")]
EntryArgument = Annotated[str, typer.Argument(metavar="ID", help="An entry's id, as `zoo list` shows it.")]
EndpointOption = Annotated[
    str | None,
    typer.Option("--endpoint", metavar="URL", help="Default: HF_ENDPOINT, or https://huggingface.co."),
]
MachineOption = Annotated[
    str | None,
    typer.Option(
        "--for", metavar="MACHINE", help="Speed on it: a part of its CPU's name, its fingerprint, or `this`."
    ),
]
JobsOption = Annotated[
    Path, typer.Option("--jobs", envvar="ZOO_JOBS", metavar="FILE", help="The job list.", show_default=True)
]
OnlyOption = Annotated[
    list[str] | None, typer.Option("--only", metavar="JOB", help="This job; may be repeated.")
]
JOBS = Path("pipelines/jobs.yaml")
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
    except Stopped as error:
        code = 128 + error.signal
        _complain(str(error))
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
        code = FAILED
        if (error.name or "").partition(".")[0] in OUR_PACKAGES:
            _crash(error)
        else:
            missing = ZooError(
                f"this command needs {error.name or 'a package'}, which is not installed or does not load",
                saw=str(error),
                try_="pip install '.[pipelines]' in a checkout",
            )
            _complain(str(missing))
    except OSError as error:
        code = FAILED
        _complain(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    except Exception as error:
        code = FAILED
        _crash(error)
    sys.exit(code)


def _complain(message: str) -> None:
    from zoo import logs

    logs.tell("error", f"zoo: {message}", level="error")


def _crash(error: Exception) -> None:
    """Tell of a bug: its traceback, without the secrets that its message may hold."""
    import traceback

    from zoo import logs

    logs.tell("crash", "".join(traceback.format_exception(error)).rstrip(), level="error")


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
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Progress and errors as JSON, one event a line.")
    ] = False,
) -> None:
    from zoo import logs

    if log_json:
        os.environ[logs.ENVIRONMENT] = "1"  # of the processes that this one starts, too


# --- the two journeys' commands ---------------------------------------------------------------------


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe's YAML file.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe.")
    ] = None,
    store: StoreOption = STORE,
    shared_store: SharedStoreOption = None,
    registry: RegistryOption = REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Make an entry: compress, measure, export, verify and record a model. Goes on where it was stopped."""
    from pipelines.recipe import load

    parsed = load(recipe, set_ or [])

    from zoo.registry import open_registry
    from zoo.shared_store import open_store
    from zoo.signals import stoppable

    def last_words(stopped: Stopped) -> None:
        _complain(str(stopped))
        with suppress(ZooError):
            open_registry(registry, create=False).close_dead_runs(os.getpid())

    with stoppable(last_words):
        from pipelines.run import run as run_recipe  # after the recipe: it imports torch, which takes seconds

        entry = run_recipe(parsed, open_store(store.expanduser(), shared_store), open_registry(registry))
    if as_json:
        _print_json(entry)
    else:
        _print_entry(entry)
    if entry.status == "failed":
        raise ZooError(
            f"{entry.id} failed: {entry.failure or 'no reason recorded'}", try_=f"zoo show {entry.id}"
        )


@app.command()
def adopt(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe with a recover step.")],
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="What `python -m pipelines.recover --out FOLDER` left."),
    ],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe.")
    ] = None,
    step: Annotated[
        str | None,
        typer.Option(
            help="Number of the recover step that made it, in a branch such as 2a1 (default: the last step)."
        ),
    ] = None,
    store: StoreOption = STORE,
    shared_store: SharedStoreOption = None,
) -> None:
    """Take over a model that another machine trained by this recipe; `zoo run RECIPE` goes on from there."""
    from pipelines.recipe import load

    parsed = load(recipe, set_ or [])

    from pipelines.adopt import adopt as take_over
    from zoo.progress import say
    from zoo.shared_store import open_store

    take_over(parsed, folder, open_store(store.expanduser(), shared_store), step)
    say(f"the model is in the store; now: zoo run {recipe}")


@app.command("list")
def list_(
    text: Annotated[
        str | None, typer.Argument(metavar="[TEXT]", help="Words of a name, base, method, format ...")
    ] = None,
    family: Annotated[str | None, typer.Option(help="llama, mistral or mpt.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model, as `zoo show` names it.")] = None,
    status: Annotated[str | None, typer.Option(help="verified, published or failed.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Failed entries too.")] = False,
    registry: RegistryOption = REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """List the entries, newest first; failed ones only with --all."""
    opened = _open(registry)
    found = opened.entries(
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
    elif count := opened.count():
        print(f"none of the {count} entries matches; try: zoo list --all", file=sys.stderr)
    else:
        print("no entries; `zoo run RECIPE` makes one", file=sys.stderr)


@app.command()
def search(
    text: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TEXT...]", help="Words of a name, base, method, format ..."),
    ] = None,
    family: Annotated[list[str] | None, typer.Option(help="llama, mistral or mpt; may be repeated.")] = None,
    base: Annotated[list[str] | None, typer.Option(help="Base model; may be repeated.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="E.g. sparsegpt+gptq; may be repeated.")] = None,
    pattern: Annotated[
        list[str] | None, typer.Option(help="8:16, unstructured, dense ...; may be repeated.")
    ] = None,
    license_: Annotated[
        list[str] | None, typer.Option("--license", help="E.g. apache-2.0; may be repeated.")
    ] = None,
    status: Annotated[
        list[str] | None, typer.Option(help="verified, published or failed. Default: all but failed.")
    ] = None,
    max_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of its own files at most, e.g. 200MB.")
    ] = None,
    min_sparsity: Annotated[str | None, typer.Option(metavar="S", help="At least, e.g. 50% or 0.5.")] = None,
    bits: Annotated[float | None, typer.Option(min=0, help="Bits per weight at most.")] = None,
    sort: Annotated[
        str, typer.Option(help="newest, id, accuracy, perplexity, speed, size, bits or sparsity; best first.")
    ] = "newest",
    reverse: Annotated[bool, typer.Option("--reverse", help="Worst first.")] = False,
    machine: MachineOption = None,
    limit: Annotated[int, typer.Option(min=1, help="Lines.")] = 20,
    offset: Annotated[int, typer.Option(min=0, help="Lines to skip.")] = 0,
    remote: Annotated[bool, typer.Option("--remote", help="What is on the Hub too.")] = False,
    endpoint: EndpointOption = None,
    registry: RegistryOption = REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Find entries: here, and with --remote or --endpoint on the Hub or a zoo server."""
    from zoo import search as searching
    from zoo.registry import Query, open_registry

    query = Query(
        text=_printable(" ".join(text)) if text else None,
        families=tuple(_one_of("--family", name, "llama mistral mpt") for name in family or []),
        bases=tuple(map(_printable, base or [])),
        methods=tuple(map(_printable, method or [])),
        patterns=tuple(map(_printable, pattern or [])),
        licenses=tuple(map(_printable, license_ or [])),
        statuses=tuple(_one_of("--status", name, "verified published failed") for name in status or []),
        max_size=None if max_size is None else int(_amount("--max-size", max_size, "size")),
        min_sparsity=None if min_sparsity is None else _amount("--min-sparsity", min_sparsity, "sparsity"),
        max_bits=bits,
        sort=_one_of("--sort", sort, "newest id accuracy perplexity speed size bits sparsity"),
        reverse=reverse,
        machine=_machine_name(machine),
        limit=limit,
        offset=offset,
    )
    hub = None
    if remote or endpoint is not None:
        from zoo.hub import client

        hub = client.connect(endpoint)
    absent = hub is not None and "://" not in registry and not Path(registry).expanduser().exists()
    local = None if absent else open_registry(registry, create=False)
    found = searching.search(query, local, hub)
    if as_json:
        _print_json(found)
        return
    if found.hits:
        where = ["where"] if hub is not None else []
        head = ["id", *where, "status", "sparsity", "bits/weight", "size", "accuracy (tasks)"]
        lines = [_hit_line(hit, bool(where)) for hit in found.hits]
        _print_table([*head, "perplexity (base)", "decode tok/s"], lines)
        asked = list(dict.fromkeys(hit.figures.tasks for hit in found.hits if hit.figures.tasks))
        if len(asked) > 1:
            told = "; ".join(tasks.replace(",", ", ") for tasks in asked)
            _tell(f"accuracies over other tasks do not compare; these are over {told}")
    total = f"more than {found.total:,}" if found.more else f"{found.total:,}"
    entries = "entry" if total == "1" else "entries"
    first = f"{offset + 1}-{offset + len(found.hits)}" if found.hits else "0"
    shown = f"{first} of {total} {entries}"
    further = found.more or found.total > offset + len(found.hits)
    _tell(shown + (f"; --offset {offset + limit} shows more" if further else ""))


@app.command()
def best(
    base: Annotated[str, typer.Option(help="Base model, by its source or repository.")],
    optimize: Annotated[str, typer.Option(help="accuracy, speed, size or ppl.")] = "accuracy",
    within: Annotated[str, typer.Option(metavar="LIMITS", help='E.g. "ppl<=1.1*base,size<=200MB".')] = "",
    machine: MachineOption = None,
    all_: Annotated[bool, typer.Option("--all", help="The whole Pareto front.")] = False,
    registry: RegistryOption = REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Of a base model's entries, the best for a target, or with --all all that none beats."""
    from zoo import best as choosing
    from zoo.registry import Query
    from zoo.search import check_machine

    target = _one_of("--optimize", optimize, " ".join(choosing.OPTIMIZED))
    limits = choosing.parse_within(within)
    opened = _open(registry)
    name = _machine_name(machine)
    machine_ = None if name is None else check_machine(name, [opened]).fingerprint
    page = opened.search(Query(bases=(_printable(base),), limit=None))
    if not page.total:
        known = opened.facets().bases
        near = difflib.get_close_matches(base, known, n=3, cutoff=0.4)
        raise ZooError(
            f"no entry of the base model {base!r} in the registry {opened.name}",
            expected=", ".join(near or list(known)[:5]) or "an entry; `zoo run RECIPE` makes one",
        )
    found = choosing.best(base, page.entries, target, limits, machine_)
    if as_json:
        _print_json(found if all_ else found.model_copy(update={"front": found.front[:1]}))
    else:
        _print_best(found, all_)


@app.command("import")
def import_(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="hub:ORG/NAME[@REVISION], a model folder or a .gguf file."),
    ],
    file: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Which GGUF file, where there are several.")
    ] = None,
    entry_id: Annotated[
        str | None, typer.Option("--id", help="Default: the repository's or file's name.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Base model; default: what the model card says.")
    ] = None,
    threads: ThreadsOption = None,
    store: StoreOption = STORE,
    registry: RegistryOption = REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Record a model that others published as an entry, after analysing it and checking that it runs."""
    from zoo.files import Store
    from zoo.importing import check_id
    from zoo.registry import open_registry

    if entry_id is not None:
        check_id(entry_id)

    from pipelines.import_model import import_model  # after it, as this imports torch, which takes seconds

    entry = import_model(
        source,
        Store(store.expanduser()),
        open_registry(registry),
        files=file or (),
        entry_id=entry_id,
        base=base,
        threads=threads,
    )
    if as_json:
        _print_json(entry)
    else:
        _print_entry(entry)
    if entry.status == "failed":
        raise ZooError(
            f"{entry.id} failed: {entry.failure or 'no reason recorded'}", try_=f"zoo show {entry.id}"
        )


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
    if twice := [entry_id for entry_id in dict.fromkeys(entry_ids) if entry_ids.count(entry_id) > 1]:
        raise UsageError(f"{twice[0]} is given twice", expected="each id once", try_="zoo list")
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
    output: Annotated[
        Path | None, typer.Option("--output", help="Write here, not to the terminal.", callback=_check_file)
    ] = None,
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
def bench(
    targets: Annotated[
        list[str] | None, typer.Argument(metavar="[ID|PATH...]", help="Packed or GGUF files, or entries.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Random weights of this shape, such as llama-2-7b.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Decoder layers of the shape; all if not given.")] = None,
    pattern: Annotated[
        list[str] | None,
        typer.Option(help="How to pack the shape: dense, 8:16, 70%, with /BITS; several with commas."),
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Bits of patterns that name none.")] = None,
    against: Annotated[
        str | None, typer.Option(help="llama.cpp[:q4_0,q8_0,f16,f32]: random GGUF files of the same shape.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the physical cores.")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of prefill.")] = 512,
    generate: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of decode. Default: 128; with --record 64."),
    ] = None,
    context_at: Annotated[
        int | None, typer.Option(min=1, help="Tokens in the context when decode begins; default: the prompt.")
    ] = None,
    kv: Annotated[str, typer.Option(help="How keys and values are kept: f16 or int8.")] = "f16",
    repeat: Annotated[int, typer.Option(min=1, help="Rounds, of which medians are taken.")] = 5,
    keep: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the random models here and leave them.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw a chart, .png or .svg.", callback=_check_file)
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Add the speeds of entries' files to the registry.")
    ] = False,
    store: StoreOption = STORE,
    registry: RegistryOption = REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Measure how fast models run here, side by side with llama.cpp and with the memory's own speed."""
    from zoo import speeds
    from zoo.machine import this_machine
    from zoo.progress import say
    from zoo.runner import bench as benchmark
    from zoo.runner import chart, contenders
    from zoo.runner.peers import parse_against

    if plot is not None:
        chart.check_plot(plot)
    settings = benchmark.Settings(
        threads or this_machine().cores,
        prompt,
        generate or (speeds.GENERATE if record else 128),
        context_at,
        _one_of("--kv", kv, "f16 int8"),
        repeat,
    )
    if record:
        speeds.check_settings(settings)
    store = store.expanduser()
    for target in targets or []:
        _pull_if_absent(target, store, registry if record else None)
    opened = [contenders.find(target, store) for target in targets or []]
    files = speeds.recordable(opened, store, _open(registry)) if record else {}
    planned = contenders.plan(
        opened,
        shape=shape,
        layers=layers,
        patterns=contenders.parse_patterns(pattern or [], bits),
        against=parse_against(against) if against else [],
    )
    with contenders.scratch(store, keep and keep.expanduser()) as folder:
        contenders.check_room(folder, opened, planned, context=settings.context, kv=settings.kv)
        models = [*opened, *contenders.write(folder, planned)]
        measured = benchmark.summarize(benchmark.measure(models, settings), models, settings)
    if plot is not None:
        chart.draw(measured, plot)
    if as_json:
        _print_json(measured)
    else:
        _print_bench(measured)
    if record:
        speeds.record(measured, files, _open(registry))
        say(f"recorded: {', '.join(dict.fromkeys(entry for entry, _ in files.values()))}")


@app.command()
def pack(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model folder as the Hub has them.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Default: packed.safetensors in DIR.", callback=_check_file),
    ] = None,
    bits: Annotated[int, typer.Option(help="Of weights that lie on no grid: 4, 5, 6 or 8.")] = 8,
    group: Annotated[int, typer.Option(help="Columns per scale of those: 32, 64, 128, or 0 for rows.")] = 32,
    head_bits: Annotated[
        int | None, typer.Option(help="Of embeddings and head, 4, 6 or 8. Default: their own grid, or 8.")
    ] = None,
    layout: Annotated[str, typer.Option(help="auto, dense, banded, planes or mask.")] = "auto",
    window: Annotated[
        int | None, typer.Option(help="Of banded layouts: 4, 8 or 16. Default: the cheapest.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Convert a model folder, pruned, quantized or both, into one file for the sparse runner."""
    from zoo.runner.pack import Settings, pack_folder

    settings = Settings(
        _number_of("--bits", bits, (4, 5, 6, 8)),
        _number_of("--group", group, (0, 32, 64, 128)),
        None if head_bits is None else _number_of("--head-bits", head_bits, (4, 6, 8)),
        _one_of("--layout", layout, "auto dense banded planes mask"),
        None if window is None else _number_of("--window", window, (4, 8, 16)),
    )
    folder = folder.expanduser()
    if not folder.exists() and (entry := _recorded(str(folder))) is not None:
        raise _entry_for_folder(entry)
    report = pack_folder(folder, output, settings)
    if as_json:
        _print_json(report)
    else:
        _print_pack_report(report)


@app.command()
def push(
    entry_id: EntryArgument,
    to: Annotated[
        str | None, typer.Option("--to", metavar="NAMESPACE", help="A user or organisation; default: yours.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="A repository that only you may see.")] = False,
    endpoint: EndpointOption = None,
    store: StoreOption = STORE,
    registry: RegistryOption = REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Publish a verified entry on the Hub, or a zoo server, in one commit."""
    from cards import render
    from zoo.hub import client
    from zoo.hub.push import push as publish

    publication = publish(
        entry_id,
        client.connect(endpoint),
        store=store.expanduser(),
        registry=_open(registry),
        card=render,
        to=to,
        private=private,
    )
    if as_json:
        _print_json(publication)
    else:
        print(f"{publication.endpoint}/{publication.repository}/tree/{publication.tag}")


@app.command()
def pull(
    target: Annotated[
        str, typer.Argument(metavar="ID|NAMESPACE/NAME", help="An entry's id, or any repository of the Hub.")
    ],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit. Default: main.")] = None,
    only: Annotated[
        str | None, typer.Option(help="gguf, sparse or safetensors: the files for one kind of runner.")
    ] = None,
    dest: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Plain files here, not the Hub's cache.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Fetch again what is here; replace another entry of this id.")
    ] = False,
    endpoint: EndpointOption = None,
    store: StoreOption = STORE,
    registry: RegistryOption = REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Fetch an entry from the Hub, or a zoo server, and check every file. Goes on where it was stopped."""
    from zoo.hub import client
    from zoo.hub import pull as pulling
    from zoo.registry import open_registry

    pulled = pulling.pull(
        target,
        client.connect(endpoint),
        store=store.expanduser(),
        registry=open_registry(registry),
        revision=revision,
        only=_one_of("--only", only, "gguf sparse safetensors"),
        dest=dest and dest.expanduser(),
        force=force,
    )
    if as_json:
        _print_json(pulled)
    else:
        print(pulled.folder)


@app.command()
def generate(
    target: ModelArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to go on with; - reads it.")],
    max_tokens: MaxTokensOption = 256,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    repetition_penalty: PenaltyOption = 1.0,
    seed: SeedOption = 0,
    stop: StopOption = None,
    threads: ThreadsOption = None,
    context: ContextOption = None,
    kv: KvOption = "f16",
    store: StoreOption = STORE,
    as_json: JsonOption = False,
) -> None:
    """Go on with a prompt, on this machine's CPU."""
    from dataclasses import asdict

    from zoo.progress import say
    from zoo.runner.generate import load
    from zoo.runner.sample import Options

    options = Options(
        max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, tuple(stop or ())
    )
    if prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise UsageError("the prompt is not UTF-8", saw=f"byte {error.start}: {error.reason}") from error
    kept = _one_of("--kv", kv, "f16 int8")
    _pull_if_absent(target, store)
    model = load(target, threads=threads, context=context, kv=kept, store=store)
    stream = model.generate(prompt, stream=True, **asdict(options))
    for piece in stream:
        if not as_json:
            _show(piece)
    if as_json:
        _print_json(asdict(stream.result))
        return
    print()
    result = stream.result
    reasons = {"stop": "ended", "length": "as many as asked for", "context": "the context is full"}
    say(
        f"{result.generated_tokens} tokens ({reasons[result.finish_reason]}), {result.tokens_per_s:.1f} "
        f"tokens/s; prompt of {result.prompt_tokens} in {result.seconds_to_first_token:.2f} s"
    )


@app.command()
def chat(
    target: ModelArgument,
    max_tokens: MaxTokensOption = 1024,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    repetition_penalty: PenaltyOption = 1.0,
    seed: SeedOption = 0,
    stop: StopOption = None,
    threads: ThreadsOption = None,
    context: ContextOption = None,
    kv: KvOption = "f16",
    store: StoreOption = STORE,
) -> None:
    """Talk with a model: /reset begins anew, Ctrl-C stops an answer, /quit or Ctrl-D leaves."""
    from dataclasses import asdict

    from zoo.runner.chat import converse
    from zoo.runner.generate import load
    from zoo.runner.sample import Options

    options = Options(
        max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, tuple(stop or ())
    )
    kept = _one_of("--kv", kv, "f16 int8")
    _pull_if_absent(target, store)
    model = load(target, threads=threads, context=context, kv=kept, store=store)
    model.prompt_of([{"role": "user", "content": "Hello"}])  # a model without a template: now, not later

    def answer(messages: list[dict[str, str]]) -> Generator[str, None, None]:
        stream = model.chat(messages, stream=True, **asdict(options))
        try:
            yield from stream
        finally:
            stream.close()

    converse(answer, _lines(), _show)


@app.command("app")
def web(
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0: reached from everywhere.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: 8501, or the next one that is free.")
    ] = None,
    store: StoreOption = STORE,
    registry: RegistryOption = REGISTRY,
) -> None:
    """Serve the web app: browse, compare and try entries, and watch runs. Ctrl-C ends it."""
    from app.launch import serve

    serve(registry, store, host, port)


@app.command()
def serve(
    host: Annotated[
        str, typer.Option(help="Address to listen at; others need tokens to exist.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8750,
    collect: Annotated[
        bool, typer.Option("--collect", help="Remove files that no repository names, and exit.")
    ] = False,
    store: StoreOption = STORE,
    registry: Annotated[
        str | None,
        typer.Option(
            "--registry", envvar="ZOO_REGISTRY", help="Show its entries too: a path or SQLAlchemy URL."
        ),
    ] = None,
) -> None:
    """Serve models and data sets to every client of the Hub. Ctrl-C ends it."""
    from zoo.hub.store import HubStore

    hub = HubStore(store.expanduser() / "hub")
    if collect:
        count, freed = hub.collect()
        print(f"removed {count} files, {_size(freed)}")
        return
    try:
        from zoo.hub.server import serve as serve_hub
    except ImportError as error:
        raise ZooError(
            f"the server needs {error.name}", saw=str(error), try_="pip install '.[serve]' in a checkout"
        ) from error

    entries = None if registry is None else _open(registry)
    serve_hub(hub, host, port, entries, lambda url: print(f"zoo: serving {url} from {store}", flush=True))


@tokens.command("create")
def create_token(
    name: Annotated[str, typer.Option(help="Whose it is; the namespace of what it creates without one.")],
    scope: Annotated[str, typer.Option(help="read or write.")],
    store: StoreOption = STORE,
) -> None:
    """Make a token for the server, and print it: this once, as the store keeps only its hash."""
    from zoo.hub.store import HubStore
    from zoo.hub.tokens import create_token as create

    hub = HubStore(store.expanduser() / "hub")
    print(create(hub, name, _one_of("--scope", scope, "read write")))


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


@app.command()
def fsck(
    repair: Annotated[bool, typer.Option("--repair", help="Mend what can be mended.")] = False,
    published: Annotated[
        bool, typer.Option("--published", help="Check what was published too, where it is.")
    ] = False,
    no_store: Annotated[
        bool, typer.Option("--no-store", help="Not the store, as that of a CI's jobs is elsewhere.")
    ] = False,
    store: StoreOption = STORE,
    shared_store: SharedStoreOption = None,
    registry: RegistryOption = REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Check whether registry, stores and published entries agree."""
    from cards import render
    from zoo import fsck as checking
    from zoo.hub import client
    from zoo.hub import pull as pulling
    from zoo.shared_store import open_store

    opened = _open(registry)
    connect = partial(client.connect, trusted=False)  # entries may come from others

    def fetch(entry: Entry) -> None:
        place = entry.publications[-1]
        hub = connect(place.endpoint)
        pulling.pull(
            place.repository,
            hub,
            store=store.expanduser(),
            registry=opened,
            revision=place.commit,
            mend=entry,
        )

    findings = checking.fsck(
        opened,
        None if no_store else open_store(store.expanduser(), shared_store),
        connect if published else None,
        repair=repair,
        render=render,
        fetch=fetch,
    )
    if as_json:
        _print_json(findings)
    elif findings:
        _print_table(["where", "what", "problem", "repair"], checking.as_lines(findings))
    else:
        stores = ["store", *(["shared store"] if shared_store else [])]
        agree = ["registry", *([] if no_store else stores), *(["what was published"] if published else [])]
        print(f"nothing wrong with {', '.join(agree)}")
    if not checking.clean(findings):
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


@jobs.command("plan")
def plan_jobs(
    path: JobsOption = JOBS,
    only: OnlyOption = None,
    store: StoreOption = STORE,
    shared_store: SharedStoreOption = None,
    registry: RegistryOption = REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Say which entries are stale, and why."""
    from pipelines.jobs import plan
    from zoo.jobs.joblist import load, selected
    from zoo.shared_store import open_store

    listed, _ = load(path)
    where = open_store(store.expanduser(), shared_store)
    planned = plan(selected(listed, only), _open(registry), where)
    if as_json:
        _print_json(planned)
        return
    rows = [
        [p.job, p.state + (f", by {p.holder}" if p.holder else ""), "; ".join(p.reasons)] for p in planned
    ]
    _print_table(["job", "state", "why"], rows)


@jobs.command("run")
def run_jobs(
    path: JobsOption = JOBS,
    only: OnlyOption = None,
    max_parallel: Annotated[int, typer.Option(min=1, help="Jobs at once.")] = 1,
    deadline: Annotated[
        str | None, typer.Option(metavar="TIME", help="Stop then, e.g. 5h; the next call goes on.")
    ] = None,
    keep_going: Annotated[bool, typer.Option("--keep-going", help="Start others after one failed.")] = False,
    now: Annotated[bool, typer.Option("--now", help="Waiting jobs too, whatever their `every`.")] = False,
    summary: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the summary here, in Markdown.", callback=_check_file),
    ] = None,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write JUnit XML here.", callback=_check_file)
    ] = None,
    executor: Annotated[str, typer.Option(help="Where jobs run: local, or ray.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="Of the Ray cluster; without it RAY_ADDRESS, or this machine.")
    ] = None,
    patience: Annotated[
        str, typer.Option(metavar="TIME", help="A scheduler silent for so long has lost its jobs.")
    ] = "30s",
    store: StoreOption = STORE,
    shared_store: SharedStoreOption = None,
    registry: RegistryOption = REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Make every stale entry anew. Ctrl-C or SIGTERM ends it within 10 seconds; the next call goes on."""
    from pipelines import jobs as running
    from pipelines.executors import Local
    from zoo.jobs import summary as summaries
    from zoo.jobs.joblist import load, parse_duration, selected
    from zoo.registry import open_registry
    from zoo.shared_store import open_store

    on = _one_of("--executor", executor, "local ray")
    listed, tolerance = load(path)
    settings = running.Settings(
        max_parallel=max_parallel,
        deadline_s=None if deadline is None else parse_duration("--deadline", deadline),
        keep_going=keep_going,
        patience_s=parse_duration("--patience", patience),
    )
    # Standard output is the summary's, though Ray speaks there; and Ray's handlers of signals come first.
    with redirect_stdout(sys.stderr):
        where: Executor = _on_ray(address) if on == "ray" else Local()
    with redirect_stdout(sys.stderr), running.stop_on_signals() as stop:
        done = running.run_jobs(
            selected(listed, only),
            tolerance,
            open_registry(registry),
            open_store(store.expanduser(), shared_store),
            where,
            settings,
            stop,
            now=now,
        )
    summaries.write(done, markdown_to=summary, junit_to=junit)
    if as_json:
        _print_json(done)
    else:
        if done.results:
            _print_table(summaries.HEAD, summaries.rows(done))
        print(summaries.last_line(done))
    if stop.asked:
        raise typer.Exit(INTERRUPTED)
    if not done.ok:
        raise typer.Exit(FAILED)


def _on_ray(address: str | None) -> Executor:
    try:
        from pipelines.ray_executor import OnRay
    except ImportError as error:
        raise UsageError(
            "--executor ray needs Ray", saw=str(error), try_="pip install '.[ray]' in a checkout"
        ) from error
    return OnRay(address)


@jobs.command("metrics")
def job_metrics(registry: RegistryOption = REGISTRY) -> None:
    """Print jobs, leases, stages and entries for Prometheus."""
    from zoo.jobs.metrics import metrics

    print(metrics(_open(registry)), end="")


@registries.command()
def migrate(registry: RegistryOption = REGISTRY) -> None:
    """Create the registry if it is absent, and bring the tables of an older one up to date."""
    from zoo.registry import open_registry

    opened = open_registry(registry)
    print(f"{opened.name}: schema {opened.revision()}")


@registries.command()
def export(
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="Write here, not to the terminal.", callback=_check_file
        ),
    ] = None,
    registry: RegistryOption = REGISTRY,
) -> None:
    """Write every entry, as JSON lines that `zoo registry import` reads."""
    from zoo.files import atomic_file
    from zoo.registry.transfer import export as lines

    if output is None:
        for line in lines(_open(registry)):
            sys.stdout.write(line)
        return
    opened = _open(registry)
    with atomic_file(output) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(lines(opened))


PreferOption = Annotated[
    str | None, typer.Option("--prefer", help="Of two that differ: newer, ours or theirs. Default: refuse.")
]


@registries.command("import")
def import_entries(
    source: Annotated[str, typer.Argument(metavar="FILE", help="An export; - reads standard input.")],
    prefer: PreferOption = None,
    registry: RegistryOption = REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Take in the entries of an export, all or none."""
    from zoo.registry import open_registry
    from zoo.registry.transfer import bring_in, read

    preferred = _one_of("--prefer", prefer, "newer ours theirs")
    try:
        opened = sys.stdin.buffer if source == "-" else Path(source).expanduser().open("rb")
    except OSError as error:
        raise ZooError(
            f"cannot read {source}", saw=error.strerror, try_="`zoo registry export -o FILE` writes one"
        ) from error
    with opened as file:
        _print_transferred(bring_in(read(file, source), open_registry(registry), preferred), as_json)


@registries.command()
def merge(
    other: Annotated[str, typer.Argument(metavar="REGISTRY", help="Another registry: a path or URL.")],
    prefer: PreferOption = None,
    registry: RegistryOption = REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Take in the entries of another registry, all or none."""
    from zoo.registry import open_registry
    from zoo.registry.transfer import bring_in

    preferred = _one_of("--prefer", prefer, "newer ours theirs")
    _print_transferred(bring_in(_open(other).every(), open_registry(registry), preferred), as_json)


def _print_transferred(done: Transferred, as_json: bool) -> None:
    if as_json:
        _print_json(done)
    else:
        print(f"{done.added} added, {done.replaced} replaced, {done.kept} kept, {done.same} the same")


# --- printing ---------------------------------------------------------------------------------------


def _open(url: str) -> Registry:
    from zoo.registry import open_registry

    return open_registry(url, create=False)


def _folder_of_this_machine(folder: Path) -> Path:
    """UsageError for a URL, from which no command could read a file."""
    scheme, found, rest = str(folder).partition(":/")
    if not found or not scheme.isalnum() or len(scheme) < 2:
        return folder
    url = f"{scheme}://{rest.lstrip('/')}"
    raise UsageError(
        "--store is a folder of this machine",
        saw=url,
        expected="a folder; zoo run, zoo jobs and zoo fsck share it with others by --shared-store",
        try_=f"--store {STORE} --shared-store {url}",
    )


def _pull_if_absent(target: str, store: Path, into: str | None = None) -> None:
    """If `target` is no file, but could be the id of an entry that is not here, pull what runs of it.

    The entry goes into the registry `into`; None: the environment's, if there is one. If it cannot be found,
    what is said is what the store lacks, and why the Hub did not have it.
    """
    from zoo.runner.generate import find

    absent: ZooError
    try:
        path = find(target, store)
        if path.exists():
            return
        absent = ZooError(f"the files of {target} are gone", saw=f"no {path.resolve()}")
    except ZooError as error:
        if "/" in target or target.endswith((".gguf", ".safetensors")) or Path(target).expanduser().exists():
            raise
        # Not a wrong usage: an id that is not known is the same to every command.
        absent = ZooError(error.what, saw=error.saw, expected=error.expected, try_=error.try_)

    from zoo.hub import client, pull
    from zoo.progress import say
    from zoo.registry import open_registry

    hub = client.connect()
    try:
        repository = pull.resolve(hub, target)
    except ZooError as error:
        absent.saw = "; ".join(filter(None, (absent.saw, error.what, error.saw)))
        if _recorded(target) is not None:
            absent.what = f"{target} is in the registry, but its files are not in {store}"
            absent.try_ = f"zoo run, with its recipe, makes them: `zoo show {target} --json` has it"
        raise absent from error
    say(f"{target} is not here: pulling {repository} from {hub.endpoint}")
    url = into or os.environ.get("ZOO_REGISTRY") or REGISTRY
    there = into is not None or "://" in url or Path(url).expanduser().exists()
    registry = open_registry(url) if there else None
    pull.pull(repository, hub, store=store.expanduser(), registry=registry, only="sparse")


def _recorded(entry_id: str) -> Entry | None:
    """The entry of this id in the registry that the environment names, if there is one."""
    try:
        return _open(os.environ.get("ZOO_REGISTRY") or REGISTRY).find(entry_id)
    except ZooError:
        return None


def _entry_for_folder(entry: Entry) -> UsageError:
    """What to say of an entry's id where a model's folder is wanted: where that is, or how to get it."""
    store = Path(os.environ.get("ZOO_STORE") or STORE).expanduser()
    kinds = ("safetensors", "compressed-tensors")
    weights = next((a.path for kind in kinds for a in entry.artifacts if a.kind == kind), "model.safetensors")
    file = store / "entries" / entry.id / weights
    if file.exists():
        try_ = f"zoo pack {file.parent} -o packed.safetensors"
    elif entry.publications:
        try_ = f"zoo pull {entry.id} --only safetensors, which prints its folder"
    else:
        try_ = f"zoo run, with its recipe, makes the folder: `zoo show {entry.id} --json` has it"
    return UsageError(f"{entry.id} is an entry, not a folder", expected="a model folder", try_=try_)


def _show(text: str) -> None:
    """Print a piece of a model's text at once; on a terminal without codes that would steer it."""
    from zoo.logs import without_controls

    print(without_controls(text) if sys.stdout.isatty() else text, end="", flush=True)


def _lines() -> Iterator[str]:
    """What a person types, line by line."""
    terminal = sys.stdin.isatty()
    if terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  (by its import, `input` can edit lines)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is not UTF-8 is refused where it is used
    while True:
        try:
            yield input("> " if terminal else "")
        except EOFError:
            if terminal:
                print()
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            print("\nCtrl-D leaves", file=sys.stderr)


def _printable(text: str) -> str:
    """An argument that is no UTF-8 finds nothing, and must not stop anything."""
    return text.encode("utf-8", "replace").decode()


def _amount(option: str, text: str, figure: Any) -> float:
    from zoo.best import amount

    try:
        return amount(text, figure)
    except ValueError as error:
        raise UsageError(f"{option} {text!r} is not possible", expected=str(error)) from error


def _machine_name(name: str | None) -> str | None:
    """What --for means: `this` is the machine that the command runs on."""
    if name != "this":
        return None if name is None else _printable(name)
    from zoo.machine import this_machine

    return this_machine().fingerprint


def _one_of(option: str, value: str | None, known: str) -> Any:
    if value is not None and value not in known.split():
        raise UsageError(f"{option} {value!r} is not known", expected=", ".join(known.split()))
    return value


def _number_of(option: str, value: int, known: Sequence[int]) -> int:
    if value not in known:
        raise UsageError(f"{option} {value} is not possible", expected=", ".join(map(str, known)))
    return value


def _print_json(value: Record | Sequence[Record] | dict[str, Any]) -> None:
    def plain(record: Any) -> Any:
        return record.model_dump(mode="json") if hasattr(record, "model_dump") else record

    value = [plain(record) for record in value] if isinstance(value, list) else plain(value)
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _tell(line: str, to: TextIO | None = None) -> None:
    """Print a line with words of entries, on standard error if not told otherwise."""
    from zoo.logs import without_controls

    print(without_controls(line), file=to or sys.stderr)


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
    from zoo.compare import descriptions, gguf_files, gguf_tasks, pairs

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
        found = pairs(entry.measurements)
        names = descriptions(pair.entry for pair in found)
        for name, (measured, base) in zip(names, found, strict=True):
            arrow = "↑" if measured.direction == "higher_is_better" else "↓"
            lines.append([f"{name} {arrow}", _value(measured), _value(base)])
        _print_table(["measured", "entry", "base"], lines)
    if ggufs := gguf_files(entry):
        print()
        tasks = len(gguf_tasks(entry))
        accuracy = f"accuracy, {tasks} tasks" if tasks > 1 else "accuracy"
        _print_table(
            ["of GGUF files", "size", "bits/weight", "perplexity", accuracy, "decode tok/s"],
            [
                [
                    one.file.path,
                    _size(one.file.size),
                    f"{one.bits_per_weight:.4g}",
                    _value(one.perplexity),
                    "-" if one.accuracy is None else f"{one.accuracy:.4f}",
                    "-" if one.decode is None else f"{one.decode:.1f}",
                ]
                for one in ggufs
            ],
        )
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


def _print_pack_report(report: PackReport) -> None:
    """Matrices of one kind on one line; those of a decoder layer differ only in rare cases."""
    kinds: dict[tuple[str, ...], list[PackedMatrix]] = {}
    for matrix in report.matrices:
        pattern = f" {matrix.keep}:16 window {matrix.window}" if matrix.keep else ""
        kind = (
            matrix.name.rpartition(".")[2],
            f"{matrix.kind} int{matrix.bits}{pattern}",
            str(matrix.group or "row"),
            "yes" if matrix.exact else "rounded" if matrix.grid == "rounded" else "nearly",
        )
        kinds.setdefault(kind, []).append(matrix)
    lines = []
    for (name, layout, group, exact), members in kinds.items():
        weights = sum(m.rows * m.columns for m in members)
        lines.append(
            [
                name,
                str(len(members)),
                layout,
                group,
                _percent(sum(m.sparsity * m.rows * m.columns for m in members) / weights),
                f"{8 * sum(m.size for m in members) / weights:.4g}",
                exact,
                f"{max(m.error for m in members):.2g}",
            ]
        )
    head = ["matrix", "count", "layout", "columns per scale", "sparsity", "bits/weight", "exact", "error"]
    _print_table(head, lines)
    print(
        f"\n{report.path}: {_size(report.size)}, {report.weights:,} weights, "
        f"{report.bits_per_weight:.4g} bits per weight"
        + ("" if report.tokenizer else "; without a tokenizer, as the folder has no tokenizer.json")
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


def _print_bench(measured: Bench) -> None:
    from zoo.runner.bench import BUSY_CORES, references

    head = "model,engine,format,bits/weight,prefill tok/s,decode tok/s,read per token,GB/s,of roofline"
    _print_table(
        [*head.split(","), "first token", "load", "memory"],
        [
            [
                row.model,
                row.engine,
                row.format,
                f"{row.bits_per_weight:.4g}",
                f"{row.prefill_tok_s:.1f} ± {row.prefill_spread / 2:.1%}",
                f"{row.decode_tok_s:.1f} ± {row.spread / 2:.1%}",
                _size(row.bytes_per_token),
                f"{row.read_gb_s:.1f}",
                f"{row.roofline_fraction:.0%}",
                f"{row.first_token_s:.3g} s",
                f"{row.load_s:.2f} s",
                _size(row.peak_memory_bytes),
            ]
            for row in measured.rows
        ],
    )
    against = references(measured)
    lines = []
    for row in (row for row in measured.rows if row.engine == "zoo"):
        comparable = [other if other.model == row.model and other is not row else None for other in against]
        cells = [
            f"{row.decode_tok_s / o.decode_tok_s:.2f} / {row.prefill_tok_s / o.prefill_tok_s:.2f}"
            if o
            else "-"
            for o in comparable
        ]
        lines.append([row.model, row.format, *cells])
    if against and len(measured.rows) > 1:
        print("\ntimes as fast, decode / prefill:")
        _print_table(["model", "format", *(f"{o.engine} {o.format}" for o in against)], lines)
    print(
        f"\n{measured.machine.cpu}, threads: {measured.threads}; prompt {measured.prompt_tokens}, decode of "
        f"{measured.generated_tokens} at {measured.context_tokens}, keys and values in {measured.kv}; "
        f"medians of {measured.repeats} ± half the interquartile range\nroofline: memory reads at "
        f"{measured.roofline_gb_s:.1f} GB/s ± {measured.roofline_spread / 2:.1%}"
        + (" (by NumPy, which may be below what is possible)" if measured.roofline_method == "numpy" else "")
    )
    if measured.cores_taken > BUSY_CORES:
        print(
            f"other programs used {measured.cores_taken:.2g} cores meanwhile: repeat this on an idle machine"
        )


def _line(summary: Summary) -> list[str]:
    from zoo.compare import perplexity_of

    figures = summary.figures
    measured = perplexity_of(summary)
    perplexity = "-"
    if measured is not None:
        perplexity = f"{measured.value:.2f} at {measured.context_length or '?'}"
        if figures.base_perplexity is not None:
            perplexity += f" (base {figures.base_perplexity:.2f})"
    return [
        summary.id,
        summary.family,
        summary.status,
        _percent(summary.sparsity),
        f"{summary.bits_per_weight:.3g}",
        "-" if figures.size is None else _size(figures.size),
        perplexity,
        "-" if figures.speed is None else f"{figures.speed:.1f}",
    ]


def _hit_line(hit: Hit, where: bool) -> list[str]:
    from zoo.registry.figures import task_count

    figures = hit.figures
    perplexity = "-" if figures.perplexity is None else f"{figures.perplexity:.4g}"
    if figures.base_perplexity is not None:
        perplexity += f" ({figures.base_perplexity:.4g})"
    return [
        hit.id,
        *([", ".join(place.repository or place.endpoint for place in hit.places)] if where else []),
        hit.status,
        _percent(hit.sparsity),
        f"{hit.bits_per_weight:.3g}",
        "-" if figures.size is None else _size(figures.size),
        "-" if figures.accuracy is None else f"{figures.accuracy:.4f} ({task_count(figures)})",
        perplexity,
        "-" if figures.speed is None else f"{figures.speed:.1f}",
    ]


def _print_best(found: Best, whole_front: bool) -> None:
    def cell(value: float | None, base: float | None) -> str:
        if value is None:
            return "-"
        return f"{value:.4g}" + (f" (base {base:.4g})" if base is not None else "")

    rows = [
        [
            c.id,
            cell(c.accuracy, c.base_accuracy),
            cell(c.ppl, c.base_ppl),
            "-" if c.speed is None else f"{c.speed:.1f}",
            "-" if c.size is None else _size(c.size),
            f"{c.bits:.3g}",
            _percent(c.sparsity),
        ]
        for c in (found.front if whole_front else found.front[:1])
    ]
    _print_table(
        ["id", "accuracy ↑", "perplexity ↓", "decode tok/s", "size", "bits/weight", "sparsity"], rows
    )
    for figure, how in found.measured.items():
        _tell(f"{figure}: {how}", sys.stdout)
    _tell(
        f"{found.considered} entries of {found.base}: {len(found.front)} on the Pareto front of "
        f"{', '.join(found.axes)}; {found.outside} outside the limits, {len(found.left_out)} not comparable"
    )
    reasons: dict[str, list[str]] = {}
    for left in found.left_out:
        reasons.setdefault(left.reason, []).append(left.id)
    for reason, ids in list(reasons.items())[:5]:
        more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
        _tell(f"  {', '.join(ids[:5])}{more}: {reason}")


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
