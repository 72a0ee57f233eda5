"""A stage's key changes with all that decides its result, and with nothing else."""

from __future__ import annotations

from pathlib import Path

from pipelines import keys


def test_the_answers_to_tasks_are_of_the_data_wherever_it_lies(tmp_path: Path) -> None:
    def key(name: str, said: str) -> str:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "questions").write_text(said)
        keys._tree.cache_clear()
        return keys.tasks(["arc_easy"], 0, None, tmp_path / name, "entry", "model", packed=False)

    assert key("here", "one") == key("there", "one") != key("here", "another")


def test_our_runners_answers_are_of_its_code() -> None:
    packed, folder = (
        keys.tasks(["arc_easy"], 0, None, None, "entry", "model", packed=packed) for packed in (True, False)
    )
    assert packed != folder
    for name in ("engine", "sample", "generate"):
        assert f"../zoo/runner/{name}" in keys.RUNNER_CODE
    assert (keys.KERNELS / "kernels.h").is_file() or list(keys.KERNELS.glob("*.cpp"))


def test_every_code_that_decides_a_result_is_there() -> None:
    """A base in a GGUF file is named by that file: how it is read is code of all that looks at it."""
    for code in (keys.SOLVER_CODE, keys.RECOVER_CODE, keys.EVALUATION_CODE, keys.EXPORT_CODE, keys.PACK_CODE):
        assert "dequantize" in code
        assert all((Path(keys.__file__).parent / f"{module}.py").is_file() for module in code)
