"""What a training needs to go on after `kill -9`: written beside, synced, then renamed as a whole."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.checkpoint import full_disk_as_oserror
from pipelines.recipe import Budget
from zoo.entry import TrainingPoint
from zoo.errors import StoreError
from zoo.files import fsync, told_plainly

MASKS = "masks.safetensors"
PROGRESS = "progress.json"


class Progress(BaseModel):
    """How far a training is. The position in the text is `step` times the batch."""

    identity: str  # of what is trained, by whom and on what
    processes: int = 1  # that share the batch; may change from call to call
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    rounding: bool = False  # whether the weights are rounded by now
    pruned: bool = False  # whether the pattern of `prune` is reached
    curve: list[TrainingPoint] = []
    sums: dict[str, float] = {}  # of the losses since the curve's last point
    summed: int = 0  # steps

    def used(self, budget: Budget, ahead: float = 0) -> float:
        """Fraction of the budget that is used up, `ahead` tokens from now."""
        tokens = (self.tokens + ahead) / budget.tokens if budget.tokens else 0.0
        return max(tokens, self.seconds / budget.seconds if budget.seconds else 0.0)


def save(accelerator: Any, folder: Path, progress: Progress, masks: dict[str, Tensor]) -> None:
    """Write model, optimizer, random states (by accelerate), masks and progress; then drop older states.

    There must be no state of this step yet: it would be lost if we were killed while replacing it.
    """
    final = folder / f"step-{progress.step:08d}"
    partial = folder / f".{final.name}.partial"
    with told_plainly(folder), full_disk_as_oserror():
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(".step-*.partial"):  # by a process that was killed, or a full disk
                shutil.rmtree(left, ignore_errors=True)
            partial.mkdir()
        accelerator.wait_for_everyone()
        # it warns that a tied head is stored once, which is meant
        logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
        accelerator.save_state(str(partial))
        if accelerator.is_main_process:
            save_file({name: mask.contiguous().cpu() for name, mask in masks.items()}, partial / MASKS)
            (partial / PROGRESS).write_text(progress.model_dump_json())
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            for path in (*partial.rglob("*"), partial):
                fsync(path)
            partial.rename(final)
            fsync(folder)
            for old in folder.iterdir():
                if old != final:
                    shutil.rmtree(old, ignore_errors=True)
        accelerator.wait_for_everyone()
        if accelerator.is_local_main_process:  # of a machine that shares no folder with the first one
            shutil.rmtree(partial, ignore_errors=True)


def newest(folder: Path) -> Path | None:
    """The last complete state, or None."""
    found = sorted(folder.glob("step-*")) if folder.is_dir() else []
    return found[-1] if found else None


def read_progress(state: Path, identity: str) -> Progress:
    """Raises StoreError for the state of another training."""
    progress = Progress.model_validate_json((state / PROGRESS).read_text())
    if progress.identity != identity:
        raise StoreError(
            f"{state} belongs to another training",
            saw="another recipe, model or text",
            try_="another --out, or remove that folder to begin anew",
        )
    return progress


def restore(accelerator: Any, state: Path) -> dict[str, Tensor]:
    """Put model, optimizer and random states back; returns the masks."""
    accelerator.load_state(str(state))
    masks: dict[str, Tensor] = load_file(state / MASKS)
    return masks
