"""The recipe: one typed YAML file that says everything about a compressed model.

Unknown keys are refused with their line and the nearest key known at that place, so a misspelt option
never runs. So are keys that stand twice, of which YAML would silently take the last.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from string import ascii_lowercase, digits
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from zoo.entry import EntryId
from zoo.errors import RecipeError
from zoo.logs import line_of_secret

MAX_BYTES = 1 << 18  # of a recipe; a real one has less than 2 KB
MAX_PROBLEMS = 20  # told at once


class Part(BaseModel):
    # strict: `windows: yes` is no number, as the JSON Schema says too
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


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


Allocation = Annotated[
    Annotated[Literal["uniform"], Tag("uniform")] | Annotated[Owl, Tag("owl")],
    Discriminator(lambda value: "owl" if isinstance(value, dict | Owl) else "uniform"),
]


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
    zero_point: Literal["integer", "float16"] | None = Field(
        None,
        description="of an asymmetric grid: an integer, so that 0 is on the grid and compressed-tensors can "
        "hold it, or a float16 minimum, as in GGUF's Q4_1; null: integer for zeropoint, else float16",
    )

    @model_validator(mode="after")
    def _zero_point_if_asymmetric(self) -> Rounding:
        if self.symmetric and self.zero_point is not None:
            raise ValueError("a symmetric grid has no `zero_point`")
        return self

    @model_validator(mode="after")
    def _group_goes_with_group(self) -> Rounding:
        if (self.per == "group") != (self.group is not None):
            raise ValueError("`per: group` needs `group`; the others need `group: null`")
        return self


class QuantizeOverride(Part):
    """Another grid for some linear layers; without one, they are not quantized."""

    layers: str = Field(description="shell pattern of module names, e.g. '*.down_proj'")
    grid: Rounding | None = None


Override = TypeVar("Override", PruneOverride, QuantizeOverride)


def override_of(layer: str, overrides: Sequence[Override]) -> Override | None:
    """The one that counts for a layer: the last that matches its name."""
    return next((one for one in reversed(overrides) if fnmatchcase(layer, one.layers)), None)


class JointRounding(Rounding):
    """Rounds in the same pass that prunes."""

    activation_order: bool = True


class Prune(Part):
    """Sets weights to zero."""

    kind: Literal["prune"]
    method: Literal["magnitude", "wanda", "sparsegpt", "admm"]
    pattern: SparsityPattern
    allocation: Allocation = "uniform"
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
    correction: float = Field(
        0.0, ge=0, le=1, description="gptq: undo the error of earlier layers, in decoder layers"
    )
    damping: float = Field(0.01, gt=0, description="fraction of the mean of the Hessian's diagonal")
    embeddings: Rounding | None = Field(
        None,
        description="grid of the token embeddings, each rounded to the nearest, but by gptq if they are the "
        "head too; null: unchanged",
    )
    head: Rounding | None = Field(
        None, description="grid of an untied output head, rounded by gptq in such a step; null: unchanged"
    )
    overrides: list[QuantizeOverride] = []

    @model_validator(mode="after")
    def _grid_fits_method(self) -> Quantize:
        for grid in filter(None, [self.grid, *(override.grid for override in self.overrides)]):
            if self.method == "absmax" and not grid.symmetric:
                raise ValueError("absmax is symmetric: say `symmetric: true`, or take zeropoint")
            if self.method == "zeropoint" and grid.symmetric:
                raise ValueError("zeropoint is asymmetric: say `symmetric: false`, or take absmax")
            if self.method == "zeropoint" and grid.zero_point == "float16":
                raise ValueError("zeropoint has integer zero points: take rtn for float16 ones")
        if self.method != "gptq" and self.correction:
            raise ValueError("`correction` needs method gptq")
        return self

    @property
    def calibrated(self) -> bool:
        return self.method == "gptq"


class TrainingText(Part):
    """Text that a model is trained on."""

    source: str = Field(
        description="a .txt or .parquet file, hub:org/name (streamed), or token ids in a .npy file"
    )
    column: str = Field("text", description="column of a parquet file or data set")
    tokens: int | None = Field(None, ge=1, description="the first tokens only; null: all")


class Skill(Part):
    """Skill distillation: texts that a teacher writes in answer to a seed set of prompts."""

    prompts: str = Field(description="a .txt file with a prompt per line, a .parquet file, or hub:org/name")
    column: str = "text"
    templates: list[str] = Field(["{}"], min_length=1, description="what is asked, each with a prompt for {}")
    samples: int = Field(1, ge=1, description="answers to each of these")
    new_tokens: int = Field(256, ge=1, description="length of an answer at most")
    temperature: float = Field(0.8, gt=0)
    batch: int = Field(16, ge=1, description="prompts that a local teacher answers at a time")
    endpoint: str | None = Field(
        None, description="URL of an OpenAI-compatible server, its key in OPENAI_API_KEY; null: the teacher"
    )
    model: str | None = Field(None, description="the endpoint's name of the model")
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _model_of_the_endpoint(self) -> Skill:
        if (self.endpoint is None) != (self.model is None):
            raise ValueError("`endpoint` and `model` go together")
        if not all("{}" in template for template in self.templates):
            raise ValueError("each of `templates` needs a {} for the prompt")
        return self


class Written(Part):
    """Text that a model writes: pieces that begin with some tokens of a text, from places drawn at random."""

    source: str = Field(description="what pieces begin with: as in `data`, builtin:seed or builtin:openings")
    column: str = Field("text", description="column of a parquet file or data set")
    model: str | None = Field(None, description="who writes, as in `teacher`; null: the teacher")
    tokens: int = Field(ge=1, description="to be written")
    begin: Literal["anywhere", "lines"] = Field("anywhere", description="where in the text a piece begins")
    prompt: int = Field(16, ge=1, description="tokens of the text that a piece begins with")
    temperature: float = Field(1.0, gt=0, description="of the writing, from the 50 likeliest tokens")
    length: int = Field(256, ge=2, description="tokens of a piece")
    batch: int = Field(256, ge=1, description="pieces written at a time")
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _something_written(self) -> Written:
        if self.prompt + 2 > self.length:
            raise ValueError(
                "`length` must leave room after the `prompt` for a token and the end of the text"
            )
        return self


class Resample(Part):
    """Data augmentation: from the second pass over the text on, some of its tokens are ones that the teacher
    might have written in their place, so that the student cannot learn the text by heart."""

    fraction: float = Field(0.3, gt=0, lt=1, description="of the tokens of a block")
    samples: int = Field(4, ge=1, le=16, description="drawn once for every token, to choose from")


class Losses(Part):
    """Weights of the losses that training minimises; the cross-entropy is recorded even at weight 0."""

    logits: float = Field(1.0, ge=0, description="KL divergence from the teacher's next-token distribution")
    temperature: float = Field(1.0, gt=0, description="of the distributions of `logits`")
    top_k: int | None = Field(
        None, ge=1, description="of `logits`: tell only the teacher's k likeliest tokens apart; null: all"
    )
    cross_entropy: float = Field(0.0, ge=0, description="of the text's own next token")
    squarehead: float = Field(0.0, ge=0, description="error of the hidden states, relative to the teacher's")
    weights: float = Field(0.0, ge=0, description="error of the kept weights, relative to the teacher's")

    @model_validator(mode="after")
    def _something_to_minimise(self) -> Losses:
        if not (self.logits or self.cross_entropy or self.squarehead or self.weights):
            raise ValueError("give at least one loss a weight above 0")
        return self

    @property
    def taught(self) -> bool:
        return bool(self.logits or self.squarehead or self.weights)


class Budget(Part):
    """When training ends: at the first limit that is reached."""

    tokens: int | None = Field(None, ge=1, description="training tokens; repeats exactly")
    seconds: float | None = Field(None, gt=0, description="training time, without start and compilation")

    @model_validator(mode="after")
    def _some_end(self) -> Budget:
        if self.tokens is None and self.seconds is None:
            raise ValueError("say `tokens`, `seconds` or both")
        return self


class Optimizer(Part):
    """AdamW with a linear warm-up and a cosine to zero."""

    kind: Literal["adamw", "adamw-8bit"] = Field(
        "adamw", description="adamw-8bit: moments in 8 bits and stochastic rounding (needs torchao)"
    )
    learning_rate: float = Field(6e-4, gt=0)
    warmup: float = Field(0.02, ge=0, lt=1, description="fraction of the budget")
    weight_decay: float = Field(0.0, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")


class PruneInTraining(Part):
    """Decides while the model trains which weights end up as zero, or before by their gradients (snip)."""

    method: Literal["magnitude", "wanda", "rigl", "snip"] = Field(
        description="what is dropped; rigl also regrows where the gradient is largest"
    )
    pattern: SparsityPattern = Field(description="reached exactly at `until`")
    schedule: Literal["once", "cubic", "stages"] = "once"
    stages: list[int] = Field([], description="for schedule stages: `keep` of each, e.g. [12, 8, 4]")
    until: float = Field(0.5, gt=0, le=0.95, description="fraction of the budget; then masks stay")
    every: int = Field(50, ge=1, description="optimizer steps between two updates of the masks")
    regrow: float = Field(0.1, ge=0, lt=1, description="rigl: fraction of the kept weights, falling to 0")
    decay: float | None = Field(
        None,
        gt=0,
        description="until `until`, what is not kept goes on learning and may come back, while it decays at "
        "a rate that rises to this, times the learning rate, a step; null: it is zero at once",
    )
    overrides: list[PruneOverride] = []

    @model_validator(mode="after")
    def _stages_lead_to_the_pattern(self) -> PruneInTraining:
        if (self.schedule == "stages") != bool(self.stages):
            raise ValueError("`stages` goes with `schedule: stages`")
        falling = all(a > b for a, b in zip(self.stages, self.stages[1:], strict=False))
        if self.stages and (not falling or self.stages[-1] != self.pattern.keep):
            raise ValueError(f"`stages` must fall to the pattern's keep, {self.pattern.keep}")
        if self.method == "snip" and self.schedule != "once":
            raise ValueError("snip prunes before training: `schedule: once`")
        if self.decay is not None and self.method not in ("magnitude", "wanda"):
            raise ValueError("`decay` goes with magnitude and wanda, which may bring weights back")
        return self


class QuantizeInTraining(Part):
    """Quantization-aware training on the grid of the export, with straight-through gradients."""

    grid: Rounding
    embeddings: Rounding | None = Field(None, description="grid of the token embeddings; null: unchanged")
    head: Rounding | None = Field(None, description="grid of an untied output head; null: unchanged")
    scales: Literal["learned", "searched"] = Field(
        "learned", description="searched: for the least rounding error, every `every` steps"
    )
    every: int = Field(50, ge=1, description="optimizer steps between two searches")
    start: float = Field(0.5, ge=0, lt=1, description="fraction of the budget before weights are rounded")
    overrides: list[QuantizeOverride] = []

    @model_validator(mode="after")
    def _not_per_tensor(self) -> QuantizeInTraining:
        grids = [self.grid, self.embeddings, self.head, *(override.grid for override in self.overrides)]
        if any(grid is not None and grid.per == "tensor" for grid in grids):
            raise ValueError("training has scales per channel or group, not per tensor")
        return self


class Recover(Part):
    """Trains the model so far, keeping its zeros, or to those of `prune`; with neither, the dense model."""

    kind: Literal["recover"]
    data: list[TrainingText] = []
    skills: list[Skill] = []
    written: list[Written] = []
    resample: Resample | None = Field(None, description="augment the text; null: train on it as it is")
    teacher: str | None = Field(
        None, description="a model as in `base`, or step:N, what an earlier step N made; null: the base"
    )
    budget: Budget
    losses: Losses = Losses()
    optimizer: Optimizer = Optimizer()
    prune: PruneInTraining | None = None
    quantize: QuantizeInTraining | None = None
    length: int = Field(512, ge=8, description="tokens of a block of text")
    batch: int = Field(64, ge=1, description="blocks of an optimizer step, over all GPUs")
    micro_batch: int = Field(64, ge=1, description="blocks that a GPU takes at once")
    weights: Literal["float32", "bfloat16"] = Field("float32", description="type of the weights in training")
    stored: Literal["float16", "bfloat16", "float32"] = Field(
        "float16", description="type of the weights in the file"
    )
    shard: bool = Field(False, description="FSDP: spread weights and optimizer over several GPUs")
    recompute: bool = Field(False, description="keep no activations for the backward pass: slower, smaller")
    compile: bool = Field(True, description="torch.compile, on a GPU")
    seed: int = Field(0, ge=0, description="of the order of the blocks")

    @model_validator(mode="after")
    def _possible(self) -> Recover:
        if not (self.data or self.skills or self.written):
            raise ValueError("say what to train on: `data`, `skills` or `written`")
        if self.batch % self.micro_batch:
            raise ValueError(f"`batch` must be a multiple of `micro_batch`, {self.micro_batch}")
        if self.weights == "bfloat16" and self.optimizer.kind == "adamw":
            raise ValueError("`weights: bfloat16` would round small updates away: take adamw-8bit")
        prune, quantize = self.prune, self.quantize
        if prune and prune.decay and quantize and quantize.start < prune.until:
            raise ValueError("with `decay`, `quantize.start` must not come before `prune.until`")
        if prune and prune.decay and self.weights == "bfloat16":
            raise ValueError("`decay` needs `weights: float32`: bfloat16 would round it away")
        if self.quantize is not None and self.stored == "bfloat16":
            raise ValueError("bfloat16 does not hold integers times a scale: say `stored: float16`")
        return self

    @property
    def models(self) -> list[str | None]:
        """What it learns from (None: the base): its teacher, then the models that write."""
        return [self.teacher, *(text.model or self.teacher for text in self.written)]

    @property
    def calibrated(self) -> bool:
        return False


Simple = Prune | Quantize | Recover  # step: it makes one model of one


class Average(Part):
    """The mean of several models, each made of the model so far by steps of its own: a model soup
    (arXiv:2203.05482). What trained apart, of the same beginning, is together better than its best.

    What earlier steps made zero stays so, unless a branch prunes: then zeros are what all branches agree on,
    and a later step has to prune again. Nothing is quantized afterwards.
    """

    kind: Literal["average"]
    branches: list[list[Annotated[Simple, Field(discriminator="kind")]]] = Field(
        min_length=2,
        max_length=len(ascii_lowercase),
        description="steps, one after the other, for each of the models; []: the model so far",
    )
    weights: list[Annotated[float, Field(ge=1e-6, le=1e6)]] | None = Field(
        None, description="of each branch in the mean, relative to each other; null: all the same"
    )

    @model_validator(mode="after")
    def _a_weight_for_each(self) -> Average:
        if self.weights is not None and len(self.weights) != len(self.branches):
            raise ValueError(f"{len(self.branches)} branches need as many `weights`")
        return self

    @property
    def calibrated(self) -> bool:
        return False

    @property
    def prunes(self) -> bool:
        """Whether branches may come to have zeros in other places."""
        return any(_prunes(step) for branch in self.branches for step in branch)


Step = Simple | Average


def _prunes(step: Simple) -> bool:
    return isinstance(step, Prune) or (isinstance(step, Recover) and step.prune is not None)


Model = TypeVar("Model")

STEP = "step:"  # what a step made, as a teacher


def follow(steps: Sequence[Step], model: Model, make: Callable[[str, Step, list[Model]], Model]) -> Model:
    """What the steps make of `model`. `make` does one: it is given the step's number, the step and what it
    takes, the model so far and, for an average, what its branches made of that.

    Steps count from 1; those of the branches of step 2 are done before it, and called 2a1, 2a2, 2b1.
    """
    for number, step in enumerate(steps, 1):
        taken = [model]
        if isinstance(step, Average):
            for letter, branch in zip(ascii_lowercase, step.branches, strict=False):
                end = model
                for place, one in enumerate(branch, 1):
                    end = make(f"{number}{letter}{place}", one, [end])
                taken.append(end)
        model = make(str(number), step, taken)
    return model


def made_by(name: str | None) -> str | None:
    """The number of the step that makes the model called so in its recipe; None if it is another's."""
    return name.removeprefix(STEP) if name is not None and name.startswith(STEP) else None


def numbered(steps: Sequence[Step]) -> list[tuple[str, Step]]:
    """All steps in the order in which they are done, those of branches too."""
    return [(number, led[-1]) for number, led in leading(steps).items()]


def leading(steps: Sequence[Step]) -> dict[str, list[Step]]:
    """Of each step, by its number, those that lead to it, one after the other; it is the last of them."""
    found: dict[str, list[Step]] = {}

    def make(number: str, step: Step, taken: list[list[Step]]) -> list[Step]:
        found[number] = [*taken[0], step]
        return found[number]

    begin: list[Step] = []
    follow(steps, begin, make)
    return found


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
    base: bool = Field(True, description="ask the base too, with transformers, which takes long on a CPU")


class Evaluation(Part):
    perplexity: list[Passage] = [Passage()]
    fidelity: Passage | None = Passage(windows=8)
    tasks: list[Task] = [Task(name="zoo_choice")]
    gguf: bool = Field(
        False, description="ask the quantized GGUF files too: the first of `perplexity`, and the tasks"
    )
    data: str | None = Field(None, description="a folder laid out like the Hub, for tasks without a network")
    workers: int | None = Field(
        None, ge=1, description="processes; the figures do not change. null: as cores and memory allow"
    )


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

    @property
    def quantized(self) -> list[str]:
        """The types that are not the weights themselves."""
        return [kind for kind in self.types if kind not in ("F32", "F16", "BF16")]


class Packed(Part):
    """One file for this project's sparse runner: integers of the last grid, int8 where there is none."""

    kind: Literal["packed"]


Export = Annotated[Safetensors | CompressedTensors | Gguf | Packed, Field(discriminator="kind")]


class VerifyWith(Part):
    threads: int | None = Field(None, ge=1, description="of the runner; null: one per core")


class Publish(Part):
    """Pushes the verified entry, as `zoo push` does. The token is HF_TOKEN or that of `hf auth login`."""

    to: str | None = Field(None, description="user or organisation; null: the token's own")
    endpoint: str | None = Field(None, description="URL; null: HF_ENDPOINT, or the public Hub")
    private: bool = False


def _grid(step: Step) -> Rounding | None:
    if isinstance(step, Average):
        return None
    if isinstance(step, Quantize):
        return step.grid
    return step.quantize.grid if isinstance(step.quantize, QuantizeInTraining) else step.quantize


def _packs(step: Step) -> bool:
    """Whether compressed-tensors can hold the grids of this step."""
    rounding = step if isinstance(step, Quantize) else step.quantize if isinstance(step, Recover) else None
    grids = [_grid(step), *(override.grid for override in rounding.overrides)] if rounding else [_grid(step)]
    integer = isinstance(step, Quantize) and step.method == "zeropoint"
    return integer or all(grid is None or grid.symmetric or grid.zero_point == "integer" for grid in grids)


class Recipe(Part):
    name: EntryId = Field(description="id of the entry: a valid Hub repository name in lower case")
    base: str = Field(description="hub:org/name@revision, pypi:package, a model folder, or a .gguf file")
    calibration: Calibration = Calibration()
    steps: list[Annotated[Step, Field(discriminator="kind")]] = Field(
        description="none: the base itself, converted and measured"
    )
    evaluation: Evaluation = Evaluation()
    exports: list[Export] = [Safetensors(kind="safetensors"), Gguf(kind="gguf", types=["F16", "Q8_0"])]
    verification: VerifyWith = VerifyWith()
    publish: Publish | None = Field(None, description="push the verified entry; null: `zoo push` does, later")

    @model_validator(mode="after")
    def _pruned_again(self) -> Recipe:
        open_ = False  # whether zeros are not where a pattern has them
        for step in self.steps:
            open_ = (open_ or step.prunes) if isinstance(step, Average) else open_ and not _prunes(step)
        if open_:
            raise ValueError(
                "an average's branches prune, and may differ in their zeros: a later step has to prune again"
            )
        return self

    @model_validator(mode="after")
    def _taught_by_earlier_steps(self) -> Recipe:
        done: list[str] = []
        for number, step in numbered(self.steps):
            branch = number.rstrip(digits)  # whose steps need not wait for those of others
            before = [one for one in done if not branch or one.isdigit() or one.startswith(branch)]
            for name in step.models if isinstance(step, Recover) else ():
                if (wanted := made_by(name)) is not None and wanted not in before:
                    steps = ", ".join(before) or "none"
                    raise ValueError(f"step {number} learns from {name}; the steps before it are: {steps}")
            done.append(number)
        return self

    @model_validator(mode="after")
    def _something_to_pack(self) -> Recipe:
        packs = any(isinstance(export, CompressedTensors) for export in self.exports)
        since: list[Step] = []  # the last average: a mean is on no grid
        for step in self.steps:
            since = [] if isinstance(step, Average) else [*since, step]
        if packs and not any(_grid(step) is not None for step in since):
            raise ValueError("the export compressed-tensors needs a step that quantizes")
        if packs and not all(map(_packs, since)):
            raise ValueError("the export compressed-tensors needs `symmetric: true` or `zero_point: integer`")
        return self

    @model_validator(mode="after")
    def _something_to_ask(self) -> Recipe:
        if self.evaluation.gguf and not any(e.quantized for e in self.exports if isinstance(e, Gguf)):
            raise ValueError("`evaluation.gguf` needs an export of a quantized GGUF type, e.g. Q4_0")
        return self

    @property
    def models(self) -> set[str | None]:
        """Those that its trainings learn from and no step of its own makes, as in `base` (None: the base)."""
        trainings = [step for _, step in numbered(self.steps) if isinstance(step, Recover)]
        return {name for step in trainings for name in step.models if made_by(name) is None}

    @property
    def asked_gguf(self) -> Mapping[str, str]:
        """The GGUF files that are asked: name -> type."""
        if not self.evaluation.gguf:
            return {}
        exports = [export for export in self.exports if isinstance(export, Gguf)]
        return {f"{self.name}-{kind}.gguf": kind for export in exports for kind in export.quantized}

    def to_yaml(self) -> str:
        """The resolved recipe, every default spelt out; without what makes no other entry."""
        said = self.model_dump(mode="json", exclude={"publish": True, "evaluation": {"workers"}})
        text: str = yaml.safe_dump(said, sort_keys=False, allow_unicode=True)
        return text


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors."""
    return Recipe.model_json_schema()


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe. Overrides are `key.path=value`, the value in YAML: `steps.0.damping=0.1`.

    Raises RecipeError for whatever is wrong, with the line.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        text = raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"cannot read the recipe {path}",
            saw=getattr(error, "strerror", None) or str(error),
            try_="zoo recipe check FILE, or one of those in pipelines/recipes/",
        ) from error
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{path} is too large for a recipe", expected=f"at most {MAX_BYTES} bytes")
    _refuse_secrets(path, text, overrides)
    try:
        tree, data = _parse(text)
    except _NOT_YAML as error:
        raise RecipeError(f"{path} is not YAML{_at(error, text)}", saw=_reason(error)) from error
    if not isinstance(data, dict):
        saw = "nothing" if data is None else type(data).__name__
        raise RecipeError(f"{path} is not a recipe", saw=saw, expected="a mapping of keys")
    for override in overrides:
        _override(data, override)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        found = error.errors(include_url=False)
        problems = [_explain(problem, tree, overrides) for problem in found[:MAX_PROBLEMS]]
        if len(found) > MAX_PROBLEMS:
            problems.append(f"  and {len(found) - MAX_PROBLEMS} more")
        raise RecipeError(
            f"{path} is not a valid recipe\n" + "\n".join(problems),
            try_="zoo recipe schema, which prints every key",
        ) from error


def _refuse_secrets(path: Path, text: str, overrides: Sequence[str]) -> None:
    """A recipe is recorded and published as it is; so are the changes to it."""
    line = line_of_secret(text)
    changed = next((o.partition("=")[0] for o in overrides if line_of_secret(o)), None)
    if line is not None or changed is not None:
        raise RecipeError(
            f"{path}, line {line} holds a secret" if line else f"--set {changed} holds a secret",
            expected="no token or key, and no password in a URL: recipes are recorded and published",
            try_="give it by the environment, e.g. HF_TOKEN",
        )


class _Loader(yaml.SafeLoader):
    """Refuses what a recipe has no use for, and hostile files have: aliases, and keys that stand twice."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not for recipes", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"the key `{key.value}` stands twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
            # what PyYAML lets through on values like `!!int x` or the date 2024-02-31
            problem = f"{str(node.value)[:60]!r} is not a {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


# In YAML 1.1, which PyYAML reads, 1e-3 is a string: it wants 1.0e-3.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)
_NOT_YAML = (yaml.YAMLError, RecursionError)


def _parse(text: str) -> tuple[yaml.Node | None, Any]:
    """The one document as nodes, which know their lines, and as data."""
    loader = _Loader(text)
    try:
        tree = loader.get_single_node()
        return tree, None if tree is None else loader.construct_document(tree)
    finally:
        loader.dispose()


def _at(error: BaseException, text: str) -> str:
    if mark := getattr(error, "problem_mark", None):
        return f" at line {mark.line + 1}, column {mark.column + 1}"
    if isinstance(error, yaml.reader.ReaderError):
        return f" at line {text[: error.position].count(chr(10)) + 1}"
    return ""


def _reason(error: BaseException) -> str:
    return getattr(error, "problem", None) or " ".join(str(error).split())


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    parts = key.split(".")
    target: Any = data
    try:
        if not equals or not all(parts):
            raise ValueError
        _, parsed = _parse(value)
        for part in parts[:-1]:
            target = target[int(part)] if isinstance(target, list) else target.setdefault(part, {})
        if isinstance(target, list):
            target[int(parts[-1])] = parsed
        elif isinstance(target, dict):
            target[parts[-1]] = parsed
        else:
            raise ValueError
    except (*_NOT_YAML, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RecipeError(
            f"--set {override} does not name a place in the recipe, or no value",
            expected="key=value, e.g. --set calibration.windows=32 or --set steps.0.pattern.sparsity=0.6",
        ) from error


def _explain(problem: Any, tree: yaml.Node | None, overrides: Sequence[str]) -> str:
    """One line for one of pydantic's errors, with the line of the file, or the override, it is about."""
    kind, loc = problem["type"], problem["loc"]
    if kind in ("extra_forbidden", "invalid_key"):
        path, here = _place(loc[:-1])
        path.append(str(loc[-1]))
        keys = sorted({key for alternative in here for key in alternative.get("properties", {})})
        message = f" is not a known key{_nearest(path[-1], keys, 'known here')}"
    elif kind in ("union_tag_invalid", "union_tag_not_found"):
        path, here = _place(loc)
        path.append("kind")
        message = _not_one_of(problem["input"].get("kind"), _kinds(here))
    else:
        path, here = _place(loc)
        message = f": {problem['msg'].removeprefix('Value error, ')}"
        if kind == "missing":
            message = " is missing"
        elif kind == "literal_error":
            choices = [c for a in here for c in a.get("enum", [a["const"]] if "const" in a else [])]
            choices += [f"a mapping of kind {kind}" for kind in _kinds(here)]
            message = _not_one_of(problem["input"], choices)
        elif kind in ("model_type", "model_attributes_type"):
            given = problem["input"]
            message = f" must be a mapping of keys, not {'nothing' if given is None else repr(given)[:60]}"
    where = ".".join(path)
    for override in overrides:
        key = override.partition("=")[0]
        if f"{where}.".startswith(f"{key}.") or f"{key}.".startswith(f"{where}."):
            return f"  --set {override}: `{where}`{message}"
    return f"  line {_line(tree, path)}: `{where or 'recipe'}`{message}"


def _not_one_of(found: object, choices: list[Any]) -> str:
    if found is None:
        return f" is missing: one of {', '.join(map(str, choices))}"
    return f" is {repr(found)[:60]}{_nearest(str(found), [str(choice) for choice in choices], 'want')}"


def _nearest(word: str, known: list[str], heading: str) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean `{near[0]}`?" if near else f"; {heading}: {', '.join(known)}"


def _place(loc: Sequence[int | str]) -> tuple[list[str], list[dict[str, Any]]]:
    """Where in the file one of pydantic's locations is, and the alternatives of the schema for that place.

    The location also names the members of unions that pydantic tried; these are not in the file.
    """
    schema = json_schema()
    path: list[str] = []
    here = _alternatives(schema, schema)
    for part in loc:
        if len(here) > 1 and part in _kinds(here):
            here = [node for node in here if part in _kinds([node])]
            continue
        if isinstance(part, int):
            below = [node["items"] for node in here if "items" in node]
        else:
            below = [node["properties"][part] for node in here if part in node.get("properties", {})]
        if below:
            path.append(str(part))
            here = [alternative for node in below for alternative in _alternatives(node, schema)]
    return path, here


def _alternatives(node: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    """What a node of the JSON Schema stands for, references and unions resolved."""
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    members = node.get("anyOf") or node.get("oneOf")
    return [a for member in members for a in _alternatives(member, schema)] if members else [node]


def _kinds(alternatives: list[dict[str, Any]]) -> list[str]:
    return [a["properties"]["kind"]["const"] for a in alternatives if "kind" in a.get("properties", {})]


def _line(tree: yaml.Node | None, path: Sequence[str]) -> int:
    """The line, from 1, of the last part of `path` that is in the file."""
    line = 1 if tree is None else tree.start_mark.line + 1
    for part in path:
        if isinstance(tree, yaml.MappingNode):
            found = next(((key, value) for key, value in tree.value if key.value == part), None)
        elif isinstance(tree, yaml.SequenceNode) and part.isdigit() and int(part) < len(tree.value):
            found = (tree.value[int(part)],) * 2
        else:
            found = None
        if found is None:
            break
        line, tree = found[0].start_mark.line + 1, found[1]
    return line
