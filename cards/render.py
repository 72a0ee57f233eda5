"""An entry as a Hub model card: YAML metadata, then Markdown in which no text of the entry is markup."""

from __future__ import annotations

import html
import json
import math
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from statistics import fmean
from string import ascii_lowercase
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from zoo.compare import Pair, describe, gguf_files, gguf_tasks, own, pairs
from zoo.entry import Artifact, Entry, Layer, Measurement, TrainingPoint, TrainingRun, curves, ran
from zoo.errors import FormatError
from zoo.safe_yaml import safe_yaml

# Licences that the Hub knows by these names; any other is "other" with a name of its own.
HUB_LICENSES = frozenset(
    """apache-2.0 mit bsd-2-clause bsd-3-clause cc0-1.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-4.0
    cc-by-nc-sa-4.0 gpl-2.0 gpl-3.0 agpl-3.0 lgpl-3.0 mpl-2.0 unlicense openrail bigscience-openrail-m
    creativeml-openrail-m bigcode-openrail-m llama2 llama3 llama3.1 llama3.2 llama3.3 gemma""".split()  # noqa: SIM905
)
FEW_QUESTIONS = 1000  # below this a 95 % interval of an accuracy is wider than 6 points
SHORT_CONTEXT = 1024
CURVE_ROWS = 8  # of the table of a training
TRACE = 0.01  # share of zeros up to which an unpruned model is not said to have any
_METRIC_NAMES = {
    "accuracy_norm": "accuracy (length-normalised)",
    "kl_divergence": "KL divergence from the base",
}


def render(entry: Entry, *, details: bool = True) -> str:
    """The card's text, front matter included. Pure: the same entry gives the same card.

    Without `details` the collapsed table of every layer, its only HTML, is left out.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        text=text,
        code=code,
        cell=cell,
        fence=fence,
        percent=percent,
        size=size,
        figure=figure,
        measured=measured,
        shell=shlex.quote,
    )
    body = environment.get_template("card.md.j2").render(
        entry=entry,
        details=details,
        summary=_summary(entry),
        kinds=kinds_of_layers(entry.layers),
        pairs=pairs(entry.measurements),
        ggufs=gguf_files(entry),
        gguf_tasks=gguf_tasks(entry),
        machines=list({b.machine.fingerprint: b.machine for b in entry.benchmarks}.values()),
        gguf=_recommended_gguf(entry),
        packed=next((a for a in entry.artifacts if a.kind == "packed" and _passed(entry, a)), None),
        transformers=_transformers_folder(entry),
        requirements=_requirements(entry),
        limitations=limitations(entry),
        trainings=trainings(entry),
        averaged=any(one.step and not one.step.isdigit() for one in trainings(entry)),  # in branches
        few=_few,
        sparkline=sparkline,
        python=json.dumps,
        metric=lambda m: _METRIC_NAMES.get(m.metric, m.metric.replace("_", " ")),
        verdict=_verdict,
    )
    return f"---\n{metadata(entry).to_yaml()}\n---\n\n{body}"


def metadata(entry: Entry) -> ModelCardData:
    """The Hub's metadata: lineage, tags and the figures of the entry as `model-index`."""
    extra: dict[str, Any] = {}
    if entry.license:
        name = entry.license.lower()
        extra["license"] = name if name in HUB_LICENSES else "other"
        if name not in HUB_LICENSES:
            extra["license_name"] = re.sub(r"[^a-z0-9.]+", "-", name).strip("-") or "other"
    if entry.base_repository:
        extra |= {"base_model": _plain(entry.base_repository), "base_model_relation": "quantized"}
    return ModelCardData(
        **extra,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=_tags(entry),
        model_name=_plain(entry.id),
        eval_results=[_eval_result(m) for m in _own(entry)] or None,
    )


def _tags(entry: Entry) -> list[str]:
    tags = ["sparse-zoo", entry.family]
    if _pruned(entry):
        tags += ["sparse", f"sparsity-{entry.sparsity:.0%}".rstrip("%")]
    for layer in entry.layers:
        tags += (layer.method or "").split("+") if layer.method else []
        tags += [f"{layer.bits:g}-bit"] if layer.bits < 16 else []
    tags += ["gguf"] if any(a.kind == "gguf" for a in entry.artifacts) else []
    return list(dict.fromkeys(re.sub(r"[^a-z0-9.-]+", "-", tag.lower()) for tag in tags if tag))


def _eval_result(m: Measurement) -> EvalResult:
    arguments = {
        "context_length": m.context_length,
        "stride": m.stride,
        "num_few_shot": m.few_shot,
        "limit": m.limit,
        "samples": m.samples,
        "stderr": m.stderr,
        "harness": _plain(m.harness),
    }
    return EvalResult(
        task_type="text-generation",
        dataset_type=_plain(m.task),
        dataset_name=_plain(m.task),
        dataset_revision=_plain(m.data_revision) if m.data_revision else None,
        metric_type=_plain(m.metric),
        metric_name=_plain(describe(m)),
        metric_value=m.value,
        metric_args={name: value for name, value in arguments.items() if value is not None},
    )


def _own(entry: Entry) -> list[Measurement]:
    return [m for m in own(entry.measurements) if m.subject == "entry"]


# --- text of an entry inside Markdown ---------------------------------------------------------------


def _plain(value: object) -> str:
    """One line of printable characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def text(value: object) -> str:
    """Text that Markdown and HTML leave as it is: no emphasis, link, image, tag, column or heading."""
    escaped = html.escape(_plain(value), quote=False)
    escaped = re.sub(r"[\\`*\[\]|~!]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", escaped)
    escaped = re.sub(r"^(\d+)([.)])(?= |$)", r"\1\\\2", escaped)  # an ordered list
    return re.sub(r"^[#+\-=]", r"\\\g<0>", escaped)


def code(value: object) -> str:
    """An inline code span. A backtick inside it becomes an apostrophe; it may stand in a table."""
    return "`" + (_plain(value).replace("`", "'").replace("|", "\\|") or " ") + "`"


def cell(value: object) -> str:
    """A table's cell: an en dash for what is not known."""
    return "–" if value is None or value == "" else text(value)


def fence(value: str, language: str = "") -> str:
    """A fenced block, its fence longer than any in the text."""
    printable = "".join(c for c in value if c == "\n" or c == "\t" or c.isprintable()).rstrip("\n")
    longest = max((len(run) for run in re.findall("`+", printable)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{printable}\n{ticks}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}".replace("%", " %")


def size(value: float) -> str:
    """Bytes in the unit that leaves one to three digits before the point; powers of ten."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.1f} {unit}"
    return f"{value:.0f} B"


def figure(value: float | None, signed: bool = False) -> str:
    """Four significant digits, or a dash."""
    if value is None:
        return "–"
    shown = f"{value:{'+' if signed else ''}.4g}"
    return shown if "e" not in shown or abs(value) < 1e-4 else f"{value:{'+' if signed else ''},.0f}"


def measured(m: Measurement | None) -> str:
    """A measurement's value and one standard error."""
    if m is None:
        return figure(None)
    return figure(m.value) + ("" if m.stderr is None else f" ± {figure(m.stderr)}")


# --- what the template shows ------------------------------------------------------------------------


class Kind(NamedTuple):
    """Layers of one kind (`self_attn.q_proj` of every decoder layer) taken together."""

    name: str
    layers: int
    weights: int
    sparsity: float  # weighted by size
    pattern: str
    bits: str
    group: str
    method: str
    error: float | None  # mean over the layers where it is known


def kinds_of_layers(layers: Sequence[Layer]) -> list[Kind]:
    grouped: dict[str, list[Layer]] = {}
    for layer in layers:
        grouped.setdefault(re.sub(r"(?s)^.*\.\d+\.", "", layer.name), []).append(layer)
    kinds = []
    for name, group in grouped.items():
        weights = sum(layer.rows * layer.columns for layer in group)
        zeros = sum(layer.rows * layer.columns * layer.sparsity for layer in group)
        errors = [layer.error for layer in group if layer.error is not None]
        kinds.append(
            Kind(
                name=name,
                layers=len(group),
                weights=weights,
                sparsity=zeros / weights if weights else 0.0,
                pattern=_each(_pattern(layer) for layer in group),
                bits=_each(f"{layer.bits:g}" for layer in group),
                group=_each(_group(layer) for layer in group),
                method=_each(layer.method or "–" for layer in group),
                error=fmean(errors) if errors else None,
            )
        )
    return kinds


class Training(NamedTuple):
    """The curve of one training, whose steps, tokens and seconds count from its own beginning."""

    step: str | None  # its number in the recipe; None: the base model was trained so before
    curve: list[TrainingPoint]
    run: TrainingRun | None

    @property
    def tokens(self) -> int:
        return self.curve[-1].tokens

    @property
    def seconds(self) -> float:
        return self.curve[-1].seconds


def trainings(entry: Entry) -> list[Training]:
    """The trainings that led to an entry, its base's among them, in their order: its curve has one after the
    other, and counts anew at the beginning of each. The last are those of the recipe's `recover` steps.
    """
    found = curves(entry.training)
    recovers = [number for number, step in numbered_steps(entry.recipe) if step.get("kind") == "recover"]
    numbers = [*[None] * len(found), *recovers][len(recovers) :]
    runs = ran(entry.training, entry.training_runs)
    return [Training(*one) for one in zip(numbers, found, runs, strict=True)]


def recipe_steps(recipe: str) -> list[dict[str, Any]]:
    """The steps of a resolved recipe, in order; none if it is not one that can be read."""
    try:
        said = safe_yaml(recipe, "the recipe")
    except FormatError:
        return []
    found = said.get("steps") if isinstance(said, dict) else None
    return [step for step in found if isinstance(step, dict)] if isinstance(found, list) else []


def numbered_steps(recipe: str) -> list[tuple[str, dict[str, Any]]]:
    """All steps of a resolved recipe by number, those of an average's branches (2a1, 2b1) before it."""
    found: list[tuple[str, dict[str, Any]]] = []
    for number, step in enumerate(recipe_steps(recipe), 1):
        for letter, branch in zip(ascii_lowercase, branches_of(step), strict=False):
            found += [(f"{number}{letter}{place}", one) for place, one in enumerate(branch, 1)]
        found.append((str(number), step))
    return found


def branches_of(step: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The steps of each branch of an average; of other steps, and of what is none, nothing."""
    branches = step.get("branches")
    if not isinstance(branches, list):
        return []
    return [
        [one for one in branch if isinstance(one, dict)] for branch in branches if isinstance(branch, list)
    ]


def _pruned(entry: Entry) -> bool:
    """Whether weights were removed: rounding to few bits makes some zero, too."""
    steps = [step for _, step in numbered_steps(entry.recipe)]
    of_recipe = any(step.get("kind") == "prune" or step.get("prune") for step in steps)
    return entry.sparsity > 0 and (of_recipe or any(layer.pattern for layer in entry.layers))


def _few(curve: Sequence[TrainingPoint]) -> list[TrainingPoint]:
    """At most CURVE_ROWS points, evenly, the last among them."""
    rows = min(CURVE_ROWS, len(curve))
    return [curve[-1 - (rows - 1 - row) * len(curve) // rows] for row in range(rows)]


def sparkline(values: Sequence[float], width: int = 32) -> str:
    """A line of blocks as high as the values, each the mean of its share of them."""
    width = min(width, len(values))
    means = [fmean(values[i * len(values) // width : (i + 1) * len(values) // width]) for i in range(width)]
    low, high = (min(means), max(means)) if means else (0.0, 0.0)
    height = (high - low) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[round((value - low) / height * 7)] for value in means)


def _each(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _pattern(layer: Layer) -> str:
    if layer.pattern is None:
        return "–"
    return f"{layer.pattern}, window {layer.window}" if layer.window else layer.pattern


def _group(layer: Layer) -> str:
    if layer.bits >= 16:
        return "–"
    return str(layer.group) if layer.group else "row"


def _summary(entry: Entry) -> str:
    """What it is in one sentence; Markdown."""
    done = []
    if _pruned(entry):
        patterns = _each(_pattern(x) for x in entry.layers if x.pattern)
        done.append(
            f"pruned to {percent(entry.sparsity)} zeros" + (f" ({text(patterns)})" if patterns else "")
        )
    bits = sorted({layer.bits for layer in entry.layers if layer.bits < 16})
    if bits:
        done.append("quantized to " + " and ".join(f"{b:g}" for b in bits) + " bits")
    tokens = sum(training.tokens for training in trainings(entry) if training.step is not None)
    if tokens:
        done.append(f"trained on {tokens / 1e6:.3g} M tokens")
    base = entry.base_repository or (entry.base_model if entry.origin is None else "A model of others")
    how = " and ".join(filter(None, [", ".join(done[:-1]), *done[-1:]])) or "unchanged"
    zeros = ""
    if bits and not _pruned(entry) and entry.sparsity > TRACE:
        zeros = f" {percent(entry.sparsity)} of weights are zero after rounding."
    return f"{text(base)}, {how}, for plain CPUs.{zeros}"


def _verdict(pair: Pair) -> str:
    """Better, worse, or not to be told from noise (two standard errors)."""
    if pair.loss is None:
        return "–"
    if pair.loss == 0:
        return "same"
    if pair.stderr is not None and abs(pair.loss) <= 2 * pair.stderr:
        return "within error"
    return "worse" if pair.loss > 0 else "better"


def _passed(entry: Entry, artifact: Artifact) -> bool:
    checks = [v.passed for v in entry.verifications if v.artifact == artifact.path]
    return bool(checks) and all(checks)


def _recommended_gguf(entry: Entry) -> Artifact | None:
    """The verified GGUF file that is nearest to the entry: Q8_0, which llama.cpp runs faster than 16 bits and
    which loses next to nothing; else that of the lowest perplexity, else the largest.
    """
    ggufs = [a for a in entry.artifacts if a.kind == "gguf" and _passed(entry, a)]
    perplexities = {one.file.path: one.perplexity.value for one in gguf_files(entry) if one.perplexity}

    def worth(a: Artifact) -> tuple[bool, float, int]:
        return a.format == "Q8_0", -perplexities.get(a.path, math.inf), a.size

    return max(ggufs, key=worth, default=None)


def _transformers_folder(entry: Entry) -> str | None:
    """Folder, within the repository, of the weights that transformers loads; "." for its root."""
    loadable = [
        a for kind in ("safetensors", "compressed-tensors") for a in entry.artifacts if a.kind == kind
    ]
    return str(PurePosixPath(loadable[0].path).parent) if loadable else None


def _requirements(entry: Entry) -> list[str]:
    """pip requirements that restore the recorded versions. A local part (`+cpu`) is not on an index."""
    pinned = []
    for name, version in entry.versions.items():
        version = version.partition("+")[0]
        if name in ("python", "sparse-zoo", "zoo"):
            continue
        if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) and re.fullmatch(
            r"[0-9][A-Za-z0-9.!]*", version
        ):
            pinned.append(f"{name}=={version}")
    return pinned


def limitations(entry: Entry) -> list[str]:
    """What a user must know before relying on the entry; Markdown sentences, each from the data."""
    found = []
    if entry.status == "failed":
        reason = text(entry.failure or "no reason recorded")
        found.append(f"**This entry failed and is not offered:** {reason}.")
    found += _lost_accuracy(entry)
    found += _weak_measurements(entry)
    found += _unverified(entry)
    if _pruned(entry) and any(a.kind == "gguf" for a in entry.artifacts):
        found.append(
            "GGUF has no sparse types: its files store the zeros, so pruning makes them neither smaller nor "
            "faster in llama.cpp. Bits per weight above are those of the smallest exact encoding."
        )
    if entry.family == "mistral" and any(a.kind == "gguf" for a in entry.artifacts):
        found.append(
            "llama.cpp runs Mistral with full attention: beyond the model's sliding window the GGUF files "
            "and transformers give different results."
        )
    if entry.base_model.startswith("pypi:") or entry.base_model.endswith(".gguf"):
        found.append(
            "The base was de-quantized from a GGUF file, whose grid it inherits: errors of that first "
            "quantization are part of the base figures, and a second grid adds to them."
        )
    if not entry.benchmarks:
        found.append("Its speed was not measured.")
    else:
        found.append("Speed was measured on the machines named above only; another machine differs.")
    tasks = _each(m.task for m in _own(entry))
    measured = f"Only {text(tasks)} " if tasks else "Nothing "
    found.append(
        f"{measured}{'were' if ', ' in tasks else 'was'} measured: nothing is known here of other tasks and "
        "languages, nor of safety; the base model's biases and limits remain."
    )
    return found


def _lost_accuracy(entry: Entry) -> list[str]:
    found = []
    for pair in pairs(entry.measurements):
        entry_, base = pair
        if base is not None and _verdict(pair) == "worse":
            beyond = " by more than two standard errors" if pair.stderr is not None else ""
            found.append(
                f"Worse than the base{beyond}: {text(describe(entry_))}: {figure(entry_.value)}, "
                f"base {figure(base.value)}."
            )
    if entry.measurements and not any(m.subject == "base" for m in entry.measurements):
        found.append("The base model was not measured in the same way, so what was lost is not known.")
    return found


def _weak_measurements(entry: Entry) -> list[str]:
    found = []
    measured = _own(entry)
    for m in measured:
        if m.sample_unit == "questions" and m.samples < FEW_QUESTIONS:
            error = f": ± {figure(1.96 * m.stderr)} at 95 %" if m.stderr is not None else ""
            found.append(f"{text(m.task)} {text(m.metric)} rests on {m.samples} questions only{error}.")
    limited = _each(f"{m.task} ({m.limit})" for m in measured if m.limit is not None)
    if limited:
        found.append(
            "Measured on the first questions only, so not to be held against published figures: "
            f"{text(limited)}."
        )
    contexts = [m.context_length for m in measured if m.metric == "perplexity" and m.context_length]
    if any(length < SHORT_CONTEXT for length in contexts):
        found.append(
            f"Perplexity is at a context of {_each(map(str, contexts))} tokens: it compares with figures "
            "of that context and text only."
        )
    return found


def _unverified(entry: Entry) -> list[str]:
    found = []
    failed = _each(v.artifact for v in entry.verifications if not v.passed)
    if failed:
        found.append(f"Failed verification; do not use: {text(failed)}.")
    checked = {v.artifact for v in entry.verifications}
    runnable = [a for a in entry.artifacts if a.kind in ("gguf", "compressed-tensors", "packed")]
    never = _each(a.path for a in runnable if a.path not in checked)
    if never:
        found.append(f"Not verified against the reference: {text(never)}.")
    return found
