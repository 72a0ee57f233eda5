"""The job list: recipes × base models, how often, how long at most, and where to publish.

```yaml
tolerance: {accuracy: 0.01}
jobs:
  - recipes: [recipes/smollm2-135m-8of16-w4.yaml]
    every: 7d
    budget: 2h
  - recipes: [recipes/mpt-7b-8of16-w5-recovered.yaml]
    bases: {my-mpt: hub:org/name}
    publish: {to: my-organisation}
```
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
)

from zoo.entry import EntryId, Record
from zoo.errors import UsageError
from zoo.logs import line_of_secret

MAX_BYTES = 1 << 20
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class JobsError(UsageError):
    """A job list that does not parse or does not say something possible."""


def _duration(value: Any) -> Any:
    """Seconds of `90s`, `10m`, `2h` or `7d`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([smhd])", value) if isinstance(value, str) else None
    if found is None:
        raise ValueError("is no duration; want one like 90s, 10m, 2h or 7d")
    return float(found[1]) * _UNITS[found[2]]


Duration = Annotated[float, BeforeValidator(_duration), Field(gt=0)]


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Tolerance(Part):
    """How much worse than at the last run a figure may become; null: as much as it likes."""

    accuracy: float | None = Field(0.01, ge=0, description="absolute, of accuracies and agreements")
    perplexity: float | None = Field(0.02, ge=0, description="relative, of perplexities and divergences")
    speed: float | None = Field(None, ge=0, description="relative, of tokens per second on the same machine")
    size: float | None = Field(0.02, ge=0, description="relative, of the files")


class Target(Part):
    """As `publish` in a recipe."""

    to: str | None = None
    endpoint: str | None = None
    private: bool = False


StageKind = Literal["compress", "recover", "evaluate", "export"]
SHARED_STAGES = ("recover", "evaluate")  # which several workers can do together


class StageNeeds(Part):
    """What a stage needs that differs from its job."""

    cpus: float | None = Field(None, gt=0)
    gpus: float | None = Field(None, ge=0)
    memory_gb: float | None = Field(None, gt=0)
    workers: int | None = Field(None, ge=1)


class Needs(Part):
    """What a job is to have for itself on a cluster."""

    cpus: float = Field(1.0, gt=0)
    gpus: float = Field(0.0, ge=0)
    memory_gb: float | None = Field(None, gt=0)
    workers: int = Field(1, ge=1, description="that have this each and share a training or an evaluation")
    stages: dict[StageKind, StageNeeds] = {}

    @field_validator("stages")
    @classmethod
    def _alone(cls, stages: dict[StageKind, StageNeeds]) -> dict[StageKind, StageNeeds]:
        if wrong := [kind for kind, needs in stages.items() if needs.workers and kind not in SHARED_STAGES]:
            raise ValueError(f"{wrong[0]} is done by one worker; `workers` is for recover and evaluate")
        return stages

    def of(self, kind: StageKind) -> Needs:
        """What a stage of this kind needs: the job's, but for what is said of the stage."""
        said = self.stages.get(kind, StageNeeds()).model_dump(exclude_none=True)
        alone = {} if kind in SHARED_STAGES else {"workers": 1}
        return self.model_copy(update={**said, **alone, "stages": {}})


class Group(Part):
    """Jobs that differ in recipe and base model only."""

    recipes: list[str] = Field(min_length=1, description="files, from the folder of the job list")
    bases: dict[str, str] | None = Field(
        None, description="name: source; the entries are called NAME-RECIPE. null: the recipes' own"
    )
    set: list[str] = Field([], description="KEY=VALUE, as `zoo run --set`")
    every: Duration | None = Field(None, description="a stale job waits so long after its last run")
    budget: Duration | None = Field(None, description="a run is stopped, and failed, after this time")
    retries: int = Field(3, ge=0, description="after transient failures")
    needs: Needs = Needs()
    publish: Target | None = None


class JobList(Part):
    tolerance: Tolerance = Tolerance()
    jobs: list[Group] = Field(min_length=1)


class Job(Record):
    """One entry to be kept up to date."""

    name: str
    recipe: str  # path of the file
    overrides: list[str]  # KEY=VALUE, all that is changed in the recipe
    every_s: float | None
    budget_s: float | None
    retries: int
    needs: Needs = Needs()
    publish: Target | None


def load(path: Path) -> tuple[list[Job], Tolerance]:
    """Read a job list. Raises JobsError for whatever is wrong with it; the recipes are not read."""
    try:
        raw = path.read_bytes()
        if len(raw) > MAX_BYTES:
            raise JobsError(f"{path} is too large for a job list", expected=f"at most {MAX_BYTES} bytes")
        line = line_of_secret(raw.decode())
        if line is not None:
            raise JobsError(
                f"{path}, line {line} holds a secret",
                expected="no token or key, and no password in a URL",
                try_="give it by the environment, e.g. HF_TOKEN",
            )
        data = yaml.safe_load(raw)
    except (OSError, UnicodeDecodeError) as error:
        raise JobsError(
            f"cannot read the job list {path}",
            saw=getattr(error, "strerror", None) or str(error),
            try_="name one with --jobs; pipelines/jobs.yaml is the project's own",
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise JobsError(
            f"{path} is not YAML",
            saw=" ".join(str(error).split())[:200],
            expected="a job list",
            try_="docs/jobs.md, which has every key; pipelines/jobs.yaml is the project's own",
        ) from error
    try:
        parsed = JobList.model_validate(data)
    except ValidationError as error:
        problems = [
            f"  {'.'.join(map(str, problem['loc'])) or 'the whole'}: {problem['msg']}"
            for problem in error.errors(include_url=False, include_input=False)[:20]
        ]
        raise JobsError(
            f"{path} is not a job list\n" + "\n".join(problems), try_="docs/jobs.md, which has every key"
        ) from error
    jobs = [job for group in parsed.jobs for job in _jobs(group, path.parent)]
    if twice := [name for name, count in Counter(job.name for job in jobs).items() if count > 1]:
        raise JobsError(
            f"{path} has several jobs for one entry",
            saw=", ".join(twice),
            expected="one job for each; `set: [name=...]` gives an entry another name",
        )
    return jobs, parsed.tolerance


def selected(jobs: list[Job], names: Sequence[str] | None) -> list[Job]:
    """The jobs of these names; all if none is given. UsageError for a name that no job has."""
    unknown = sorted({*(names or ())} - {job.name for job in jobs})
    if unknown:
        raise JobsError(f"there is no job {unknown[0]!r}", expected=", ".join(job.name for job in jobs)[:300])
    return [job for job in jobs if not names or job.name in names]


def parse_duration(option: str, text: str) -> float:
    """Seconds. UsageError naming the option."""
    try:
        return float(_duration(text))
    except ValueError as error:
        raise UsageError(f"{option} {error}", saw=repr(text)) from error


def _jobs(group: Group, folder: Path) -> list[Job]:
    found = []
    for recipe in group.recipes:
        for base_name, source in (group.bases or {"": ""}).items():
            overrides = list(group.set)
            if base_name:
                overrides += [f"base={json.dumps(source)}", f"name={base_name}-{Path(recipe).stem}"]
            if group.publish is not None:
                overrides.append(f"publish={group.publish.model_dump_json()}")
            found.append(
                Job(
                    name=_name(recipe, folder, overrides),
                    recipe=str(folder / recipe),
                    overrides=overrides,
                    every_s=group.every,
                    budget_s=group.budget,
                    retries=group.retries,
                    needs=group.needs,
                    publish=group.publish,
                )
            )
    return found


def _name(recipe: str, folder: Path, overrides: list[str]) -> str:
    """The entry's id: what `set` makes of it, else what the recipe says, else the file's name."""
    said = [override.removeprefix("name=") for override in overrides if override.startswith("name=")]
    try:
        name = said[-1] if said else yaml.safe_load((folder / recipe).read_bytes())["name"]
        return TypeAdapter(EntryId).validate_python(name)
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError, RecursionError):
        return Path(recipe).stem  # the recipe is not right, which its job will say
