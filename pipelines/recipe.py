"""The recipe: one typed YAML file that says everything about a compressed model.

Unknown keys are refused with their line and the nearest known key, so a misspelt option never runs.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from zoo.entry import EntryId
from zoo.errors import RecipeError


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Calibration(Part):
    """The text that the solvers see."""

    source: str = Field(
        "self",
        description="`self` (text the base model writes itself), a .txt or .parquet file, or hub:org/name",
    )
    column: str = Field("text", description="column of a parquet file or data set")
    windows: int = Field(64, ge=1, description="number of windows")
    length: int = Field(512, ge=2, description="tokens per window")
    seed: int = Field(0, ge=0, description="of the sampling, for `self`")


class SparsityPattern(Part):
    """Either `sparsity` (unstructured), or `keep` of `group`, or with `window` the banded pattern."""

    sparsity: float | None = Field(None, ge=0, lt=1, description="fraction of weights removed")
    keep: int | None = Field(None, ge=1, description="weights kept in each group")
    group: int | None = Field(None, ge=2, description="consecutive columns of a group")
    window: Literal[4, 8] | None = Field(
        None, description="columns that each kept weight of 16 can choose from: the sparse runner's format"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> SparsityPattern:
        if (self.sparsity is None) == (self.keep is None):
            raise ValueError("say either `sparsity`, or `keep` and `group`")
        if (self.keep is None) != (self.group is None):
            raise ValueError("`keep` and `group` go together")
        if self.keep is not None and self.group is not None and self.keep > self.group:
            raise ValueError(f"cannot keep {self.keep} of {self.group}")
        if self.window is not None and (self.group != 16 or self.keep not in (4, 6, 8, 10, 12)):
            raise ValueError("`window` needs group 16 and keep 4, 6, 8, 10 or 12")
        return self


class Owl(Part):
    """Outlier-weighed layerwise sparsity (OWL, arXiv:2310.05175)."""

    kind: Literal["owl"]
    threshold: float = Field(5.0, gt=1, description="M: a score above M times the mean is an outlier")
    spread: float = Field(0.08, gt=0, lt=0.5, description="lambda: most that a layer's sparsity differs")


class PruneOverride(Part):
    """Another pattern for some linear layers; without one, they stay dense."""

    layers: str = Field(description="shell pattern of module names, e.g. '*.down_proj'")
    pattern: SparsityPattern | None = None


class Rounding(Part):
    """A quantization grid."""

    bits: int = Field(ge=2, le=8)
    per: Literal["tensor", "channel", "group"] = "group"
    group: int | None = Field(64, ge=8, description="columns that share a scale, for per: group")
    symmetric: bool = True

    @model_validator(mode="after")
    def _group_goes_with_group(self) -> Rounding:
        if (self.per == "group") != (self.group is not None):
            raise ValueError("`per: group` needs `group`; the others need `group: null`")
        return self


class QuantizeOverride(Part):
    """Another grid for some linear layers; without one, they are not quantized."""

    layers: str = Field(description="shell pattern of module names, e.g. '*.down_proj'")
    grid: Rounding | None = None


class JointRounding(Rounding):
    """Rounds in the same pass that prunes."""

    activation_order: bool = True


class Prune(Part):
    """Sets weights to zero."""

    kind: Literal["prune"]
    method: Literal["magnitude", "wanda", "sparsegpt", "admm"]
    pattern: SparsityPattern
    allocation: Literal["uniform"] | Owl = "uniform"
    correction: float = Field(
        0.0, ge=0, le=1, description="how far weights move to undo the error of earlier layers"
    )
    damping: float = Field(0.01, gt=0, description="fraction of the mean of the Hessian's diagonal")
    quantize: JointRounding | None = Field(None, description="prune and quantize in one joint pass")
    overrides: list[PruneOverride] = []

    @model_validator(mode="after")
    def _solver(self) -> Prune:
        if self.method in ("magnitude", "wanda") and (self.correction or self.quantize):
            raise ValueError(f"`correction` and `quantize` need method sparsegpt or admm, not {self.method}")
        return self

    @property
    def calibrated(self) -> bool:
        return self.method != "magnitude" or self.allocation != "uniform"


class Quantize(Part):
    """Rounds weights to integers times a scale."""

    kind: Literal["quantize"]
    method: Literal["absmax", "zeropoint", "rtn", "gptq"]
    grid: Rounding
    activation_order: bool = Field(True, description="gptq: round the columns of largest activation first")
    correction: float = Field(0.0, ge=0, le=1, description="gptq: undo the error of earlier layers")
    damping: float = Field(0.01, gt=0, description="fraction of the mean of the Hessian's diagonal")
    embeddings: Rounding | None = Field(None, description="grid of the token embeddings; null: unchanged")
    head: Rounding | None = Field(None, description="grid of an untied output head; null: unchanged")
    overrides: list[QuantizeOverride] = []

    @model_validator(mode="after")
    def _grid_fits_method(self) -> Quantize:
        if self.method == "absmax" and not self.grid.symmetric:
            raise ValueError("absmax is symmetric: say `symmetric: true`, or take zeropoint")
        if self.method == "zeropoint" and self.grid.symmetric:
            raise ValueError("zeropoint is asymmetric: say `symmetric: false`, or take absmax")
        if self.method != "gptq" and self.correction:
            raise ValueError("`correction` needs method gptq")
        return self

    @property
    def calibrated(self) -> bool:
        return self.method == "gptq"


Step = Annotated[Prune | Quantize, Field(discriminator="kind")]


class Passage(Part):
    """A text cut into windows: tokenised whole, the first `windows` without overlap."""

    text: str = Field("builtin:prose", description="builtin:prose, a .txt or .parquet file, or hub:org/name")
    column: str = "text"
    windows: int = Field(14, ge=1)
    length: int = Field(512, ge=2, description="tokens: the context length of the figure")


class Task(Part):
    name: str = Field(description="any task of lm-eval, or zoo_choice, which comes with this project")
    few_shot: int = Field(0, ge=0)
    limit: int | None = Field(None, ge=1, description="first questions only; null: all")


class Evaluation(Part):
    perplexity: list[Passage] = [Passage()]
    fidelity: Passage | None = Passage(windows=8)
    tasks: list[Task] = [Task(name="zoo_choice")]
    data: str | None = Field(None, description="a folder laid out like the Hub, for tasks without a network")


class Safetensors(Part):
    kind: Literal["safetensors"]


class CompressedTensors(Part):
    """int4 or int8 that transformers and vLLM read."""

    kind: Literal["compressed-tensors"]


class Gguf(Part):
    kind: Literal["gguf"]
    types: list[str] = Field(
        ["F16", "Q8_0"], min_length=1, description="F16, BF16, F32, Q8_0, Q4_0, Q4_K_M ..."
    )


Export = Annotated[Safetensors | CompressedTensors | Gguf, Field(discriminator="kind")]


class VerifyWith(Part):
    threads: int | None = Field(None, ge=1, description="of the runner; null: one per core")


class Recipe(Part):
    name: EntryId = Field(description="id of the entry: a valid Hub repository name in lower case")
    base: str = Field(description="hub:org/name@revision, pypi:package, a model folder, or a .gguf file")
    calibration: Calibration = Calibration()
    steps: list[Step] = Field(min_length=1)
    evaluation: Evaluation = Evaluation()
    exports: list[Export] = [Safetensors(kind="safetensors"), Gguf(kind="gguf", types=["F16", "Q8_0"])]
    verification: VerifyWith = VerifyWith()

    def to_yaml(self) -> str:
        """The resolved recipe, every default spelt out."""
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        return text


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors."""
    return Recipe.model_json_schema()


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe. Overrides are `key.path=value`, the value in YAML: `steps.0.damping=0.1`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"cannot read the recipe {path}",
            saw=getattr(error, "strerror", None) or str(error),
            try_="zoo recipe check FILE, or one of those in pipelines/recipes/",
        ) from error
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError(
            f"{path} is not YAML{where}", saw=getattr(error, "problem", None) or str(error)
        ) from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path} is not a recipe", saw=type(data).__name__, expected="a mapping of keys")
    for override in overrides:
        _override(data, override)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(
            f"{path} is not a valid recipe\n"
            + "\n".join(_explain(problem, tree) for problem in error.errors()),
            try_="zoo recipe schema, which prints every key",
        ) from error


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    parts = key.split(".")
    target: Any = data
    try:
        if not equals or not all(parts):
            raise ValueError
        parsed = yaml.safe_load(value)
        for part in parts[:-1]:
            target = target[int(part)] if isinstance(target, list) else target.setdefault(part, {})
        if isinstance(target, list):
            target[int(parts[-1])] = parsed
        elif isinstance(target, dict):
            target[parts[-1]] = parsed
        else:
            raise ValueError
    except (ValueError, IndexError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise RecipeError(
            f"--set {override} does not name a place in the recipe",
            expected="key=value, e.g. --set calibration.windows=32 or --set steps.0.pattern.sparsity=0.6",
        ) from error


def _explain(problem: Any, tree: yaml.Node | None) -> str:
    """One line for one of pydantic's errors, with the line of the file it is about."""
    node, path = tree, []
    for part in problem["loc"]:
        step = _child(node, part)
        if step is not None:
            node = step
            path.append(str(part))
    line = f"line {node.start_mark.line + 1}" if node is not None else "recipe"
    where = ".".join(path) or "recipe"
    if problem["type"] == "extra_forbidden":
        key = str(problem["loc"][-1])
        known = _known_keys()
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        return f"  {line}: `{where}` is not a known key{hint}"
    if problem["type"] == "missing":
        return f"  {line}: `{'.'.join([*path, str(problem['loc'][-1])])}` is missing"
    return f"  {line}: `{where}`: {problem['msg'].removeprefix('Value error, ')}"


def _child(node: yaml.Node | None, part: int | str) -> yaml.Node | None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == part:
                found: yaml.Node = value
                return found
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        item: yaml.Node = node.value[part]
        return item
    return None


def _known_keys() -> list[str]:
    schema = json_schema()
    parts = [schema, *schema["$defs"].values()]
    return sorted({key for part in parts for key in part.get("properties", {})})
