"""The mean of models that were made apart: in the command, in `zoo run` and in what is told of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from app import lineage
from cards.render import numbered_steps, trainings
from pipelines import average, keys
from pipelines.adopt import adopt, patterns_of
from pipelines.checkpoint import Checkpoint
from pipelines.recipe import Average, load, numbered
from pipelines.recover.__main__ import main
from pipelines.recover.write import History, history
from pipelines.run import run
from tests.process import Zoo
from tests.test_adopt import MEASURED
from tests.test_recover_command import PRUNE, RECOVER, recipe, run_here
from tests.tiny import tiny_llama
from zoo.entry import TrainingPoint, TrainingRun, curves, ran
from zoo.errors import FormatError, RecipeError, UsageError
from zoo.files import Store
from zoo.registry import open_registry

SHORT: dict[str, Any] = {**RECOVER, "budget": {"tokens": 1280}, "quantize": None}
OTHER: dict[str, Any] = {**SHORT, "seed": 1}
BRANCHES: dict[str, Any] = {"kind": "average", "branches": [[SHORT], [OTHER, SHORT]], "weights": [3.0, 1.0]}
FREE: dict[str, Any] = {**SHORT, "prune": {"method": "magnitude", "pattern": PRUNE["pattern"]}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny_llama(tmp_path_factory.mktemp("base") / "base", num_hidden_layers=2)


def trained(base: Path, place: Path, *steps: dict[str, Any]) -> Path:
    """What the command makes of `base` by these steps, `place`/model being its model."""
    place.mkdir()
    path = recipe(place, steps=list(steps))
    main(
        ["--model", str(base), "--recipe", str(path), "--out", str(place), "--store", str(place.parent / "s")]
    )
    return place


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model" / "model.safetensors")


def grouped_zeros(weight: np.ndarray) -> np.ndarray:
    """In every 16 columns of a row."""
    return (weight.reshape(len(weight), -1, 16) == 0).sum(-1)


def test_the_mean_is_that_of_the_branches(base: Path, tmp_path: Path) -> None:
    """Each of which the command also makes alone; the zeros that all began with stay."""
    begin = trained(base, tmp_path / "pruned", PRUNE)
    first = weights(trained(base, tmp_path / "first", PRUNE, SHORT))
    second = weights(trained(base, tmp_path / "second", PRUNE, OTHER, SHORT))
    made = set((tmp_path / "s" / "objects").glob("*/*/model.safetensors"))
    folder = trained(base, tmp_path / "mean", PRUNE, BRANCHES) / "model"
    assert len(set((tmp_path / "s" / "objects").glob("*/*/model.safetensors")) - made) == 1, "the mean alone"
    mean = weights(folder.parent)
    assert mean.keys() == first.keys()
    for name, found in mean.items():
        assert not np.array_equal(first[name], second[name])
        expected = (3 * first[name].astype(np.float64) + second[name].astype(np.float64)) / 4
        assert found.dtype == first[name].dtype
        np.testing.assert_allclose(found, expected, rtol=2**-11, atol=1e-7)
    layers = Checkpoint(folder).compression()
    assert {(x.pattern, x.window, x.bits) for x in layers} == {("8:16", 8, 16.0)}
    pruned = weights(begin)
    for layer in layers:
        name = f"{layer.name}.weight"
        assert (mean[name][pruned[name] == 0] == 0).all() and grouped_zeros(mean[name]).min() == 8
        assert layer.sparsity == pytest.approx(float((mean[name] == 0).mean()))
        assert layer.method == "wanda+recover+average"
    past = history(folder)
    assert [point.tokens for point in past.training if point.tokens == 1280] == [1280] * 3
    assert len(past.runs) == 3


def test_branches_that_prune_leave_the_zeros_open(base: Path, tmp_path: Path) -> None:
    """They differ in them; a step that prunes the mean, and one that trains it, make an 8 of 16 again."""
    wanda = {**FREE, "prune": {**FREE["prune"], "method": "wanda"}}
    free = {"kind": "average", "branches": [[FREE], [wanda]]}
    folders = [trained(base, tmp_path / one["prune"]["method"], one) / "model" for one in (FREE, wanda)]
    (tmp_path / "mean" / "model").mkdir(parents=True)
    average.run_step(Average.model_validate(free), [base, *folders], tmp_path / "mean" / "model")
    layers = Checkpoint(tmp_path / "mean" / "model").compression()
    assert {(layer.pattern, layer.window) for layer in layers} == {(None, None)}
    mean = weights(tmp_path / "mean")
    assert min(grouped_zeros(mean[f"{layer.name}.weight"]).min() for layer in layers) < 8
    assert all(x.sparsity == pytest.approx(float((mean[f"{x.name}.weight"] == 0).mean())) for x in layers)
    steps = [free, PRUNE, RECOVER]
    again = trained(base, tmp_path / "again", *steps)
    layers = Checkpoint(again / "model").compression()
    assert {(layer.pattern, layer.window, layer.bits) for layer in layers} == {("8:16", 8, 5.0)}
    assert min(grouped_zeros(weights(again)[f"{layer.name}.weight"]).min() for layer in layers) == 8
    (tmp_path / "home").mkdir()
    store = Store(tmp_path / "home" / "store")
    right = load(recipe(tmp_path, base, steps=steps))
    assert store.get(adopt(right, again, store)) is not None
    assert patterns_of([*right.steps[1:], right.steps[0]], Checkpoint(again / "model")) == {}
    with pytest.raises(UsageError, match="only what a recover step made"):
        adopt(right, again, store, "1")
    for steps in ([free], [PRUNE, free, {**RECOVER, "prune": None}]):
        with pytest.raises(RecipeError, match="has to prune again"):
            load(recipe(tmp_path, base, steps=steps))


def test_each_branch_adds_its_own_trainings(tmp_path: Path) -> None:
    """Whatever of the model before it knows, and on what each ran, where that is known."""

    def points(tokens: int, count: int) -> list[TrainingPoint]:
        return [
            TrainingPoint(
                step=n, tokens=tokens * n // count, seconds=n, loss=1.0, learning_rate=0.1, terms={}
            )
            for n in range(1, count + 1)
        ]

    def ran_on(device: str, tokens: int) -> TrainingRun:
        return TrainingRun(device=device, processes=1, versions={}, tokens=tokens, seconds=1, ended="")

    train = {**SHORT, "data": [{"source": "text.txt"}]}
    step = Average.model_validate({"kind": "average", "branches": [[train], [train, train], []]})
    past = [
        History(training=points(10, 5)),
        History(training=points(20, 2), runs=[ran_on("first", 20)]),
        History(training=[*points(10, 3), *points(30, 4), *points(40, 4)]),
        History(training=points(10, 5)),
    ]
    folders = [tmp_path / str(number) for number in range(len(past))]
    for folder, one in zip(folders, past, strict=True):
        tiny_llama(folder, num_hidden_layers=1)
        (folder / "training.json").write_text(one.model_dump_json())
    (tmp_path / "out").mkdir()
    average.run_step(step, folders, tmp_path / "out")
    found = history(tmp_path / "out")
    assert [(c[-1].tokens, len(c)) for c in curves(found.training)] == [(10, 5), (20, 2), (30, 4), (40, 4)]
    assert [run and run.device for run in ran(found.training, found.runs)] == [None, "first", None, None]


def test_models_that_are_not_alike_are_refused(base: Path, tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other", num_hidden_layers=1)
    step = Average(kind="average", branches=[[], []])
    with pytest.raises(FormatError, match="cannot be averaged"):
        average.run_step(step, [base, base, other], tmp_path / "out")


def test_the_command_goes_on_within_a_branch(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped as often as need be, it makes the same model."""
    steps = [PRUNE, BRANCHES]
    whole = weights(trained(base, tmp_path / "whole", *steps))
    command = [
        "--model",
        str(base),
        "--recipe",
        str(recipe(tmp_path, steps=steps)),
        "--out",
        str(tmp_path / "o"),
    ]
    rounds = 0
    while not rounds or "--resume to go on" in capsys.readouterr().err:
        main([*command, "--seconds", "0.3", *(["--resume"] if rounds else [])])
        rounds += 1
        assert rounds < 60
    assert rounds > 1
    assert all(np.array_equal(tensor, whole[name]) for name, tensor in weights(tmp_path / "o").items())


def test_what_decides_a_mean_is_in_its_key(base: Path, tmp_path: Path) -> None:
    def made(*steps: dict[str, Any]) -> list[keys.Made]:
        return keys.steps(load(recipe(tmp_path, base, steps=list(steps))), "base", "windows", lambda _: None)

    found = made(PRUNE, BRANCHES)
    assert [one.name for one in found] == [
        "1. prune (wanda)", "2a1. recover", "2b1. recover", "2b2. recover", "2. average"
    ]  # fmt: skip
    pruned, first, second, third, mean = (one.key for one in found)
    assert [one.of for one in found] == [("base",), (pruned,), (pruned,), (second,), (pruned, first, third)]
    others = [
        made(PRUNE, {**BRANCHES, "weights": [1.0, 1.0]}),
        made(PRUNE, {**BRANCHES, "branches": BRANCHES["branches"][::-1]}),
        made({**PRUNE, "damping": 0.02}, BRANCHES),
    ]
    assert len({mean, *(one[-1].key for one in others)}) == 4
    unknown = {**SHORT, "teacher": "zoo:absent"}
    assert [one.name for one in made(PRUNE, {**BRANCHES, "branches": [[SHORT], [unknown]]})] == [
        "1. prune (wanda)", "2a1. recover"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("steps.1.weights=[1.0]", "2 branches need as many `weights`"),
        ("steps.1.weights=[1.0, 0.0]", "greater than or equal to"),
        ("steps.1.weights=[1.0, 1.0e+300]", "less than or equal to"),
        ("steps.1.branches=[[]]", "at least 2"),
        ("steps.1.branches.0.0.kind=average", "is 'average'; want: prune, quantize, recover"),
        ("steps.1.branches.1.0.batsh=4", "did you mean `batch`"),
        ("exports=[{kind: compressed-tensors}]", "needs a step that quantizes"),
    ],
)
def test_impossible_branches_are_refused(tmp_path: Path, change: str, words: str) -> None:
    path = recipe(tmp_path, steps=[{"kind": "quantize", "method": "rtn", "grid": {"bits": 4}}, BRANCHES])
    assert [number for number, _ in numbered(load(path).steps)] == ["1", "2a1", "2b1", "2b2", "2"]
    with pytest.raises(RecipeError, match=words):
        load(path, [change])


def test_branches_that_were_trained_elsewhere_are_taken_home(base: Path, tmp_path: Path) -> None:
    """Each as the output of its own step: the run only makes what they branched off, and their mean."""
    path = recipe(tmp_path, base, steps=[PRUNE, BRANCHES])
    store, zoo = tmp_path / "store", Zoo(tmp_path)
    for number, steps in (("2a1", [PRUNE, SHORT]), ("2b2", [PRUNE, OTHER, SHORT])):
        folder = trained(base, tmp_path / number, *steps)
        done = zoo("adopt", path, folder, "--step", number, "--store", store)
        assert done.returncode == 0, done.stderr
    done = zoo("adopt", path, folder, "--step", "2a1", "--store", store)
    assert done.returncode == 0, "what is known of a training does not tell these two apart"
    for number, words in (
        ("2", "--step 2a1 or 2b1 or 2b2"),
        ("7", "none of this number"),
        ("1", "step 1 of"),
    ):
        done = zoo("adopt", path, folder, "--step", number, "--store", store)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    made = run(load(path), Store(store), open_registry(str(tmp_path / "registry.db"), create=True))
    names = [stage.name for stage in made.stages]
    assert names[:5] == ["calibrate", "1. prune (wanda)", "2a1. recover", "2b2. recover", "2. average"]
    assert [stage.status for stage in made.stages[2:4]] == ["cached", "cached"]


@pytest.mark.real
def test_zoo_run_averages_and_tells_of_every_training(base: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, base, steps=[PRUNE, BRANCHES, {**RECOVER, "budget": {"tokens": 640}}], **MEASURED)
    entry = run_here(tmp_path, path)
    names = ["1. prune (wanda)", "2a1. recover", "2b1. recover", "2b2. recover", "2. average", "3. recover"]
    assert [stage.name for stage in entry.stages if stage.name in names] == names
    assert [(one.step, one.tokens) for one in trainings(entry)] == [
        ("2a1", 1280), ("2b1", 1280), ("2b2", 1280), ("3", 640)
    ]  # fmt: skip
    assert [number for number, _ in numbered_steps(entry.recipe)] == ["1", "2a1", "2b1", "2b2", "2", "3"]
    card = (tmp_path / "store" / "entries" / "tiny-recovered" / "README.md").read_text()
    assert "Step 2b1 of the recipe" in card and "what they made of it was averaged" in card
    assert lineage.steps(entry.recipe)[1] == ("averaged", "recovered, recovered and recovered")
    assert {stage.status for stage in run_here(tmp_path, path).stages} == {"cached"}
