"""Recovery: train a pruned or quantized model until it says again what its teacher says.

One short loop, on a CPU, a GPU, or several through accelerate. `python -m pipelines.recover` runs it without
the rest of the pipeline; see docs/recover.md.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from pipelines import cluster
from pipelines.checkpoint import Checkpoint
from pipelines.recipe import Optimizer, Recover
from pipelines.recover.data import Blocks, open_tokens
from pipelines.recover.prune import Sparsity, masks_of
from pipelines.recover.shards import whole
from pipelines.recover.state import Progress, newest, read_progress, restore, save
from pipelines.recover.student import (
    Student,
    Teacher,
    check_alike,
    decoder_layers,
    linear_names,
    load_student,
    rounders,
)
from pipelines.recover.write import write_model
from zoo.entry import TrainingPoint
from zoo.errors import NumericsError, UsageError
from zoo.progress import QUIET_INTERVAL_S, say

LOG_STEPS = 10  # between two points of the curve
DECAY_STEPS = 10  # between two decays of what masks do not keep: of every matrix, by small operations
SAVE_SECONDS = 180.0  # between two states on disk


class Job(BaseModel):
    """One training: what each of its processes needs to know."""

    step: Recover
    identity: str  # of what is trained, by whom and on what: the state of another is no beginning
    student: Path
    teacher: Path
    tokens: list[Path]
    alternatives: list[Path] = []  # of each file of tokens, for `resample`
    out: Path  # an empty folder, for the model
    state: Path  # of a training that is not finished
    stop_after: float | None = None  # seconds of this call, after which it saves and ends


def recover(job: Job) -> Progress:
    """Train from where the state is, and write the model, finished or not, to `job.out`.

    Uses all GPUs there are, also of the other machines that the Ray executor reserved, each in a process of
    its own. Raises ZooError for what is wrong with the recipe, the text or the numbers.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if "LOCAL_RANK" not in os.environ and (gpus > 1 or cluster.reserved() is not None):
        from pipelines.recover.launch import launched

        return launched(job, max(gpus, 1))
    return train(job)


def train(job: Job) -> Progress:
    """The loop itself, in this process (one of several, if launched so)."""
    step = job.step
    with _fast_arithmetic():
        accelerator = _accelerator(job)
        blocks = _blocks(job)
        student, optimizer, teacher = _prepared(job, accelerator)
        model: nn.Module = accelerator.unwrap_model(student).model
        checkpoint = Checkpoint(job.student)
        masks = masks_of(model, checkpoint)
        progress = Progress(identity=job.identity)
        if (state := newest(job.state)) is not None:
            progress = read_progress(state, job.identity)
            device = accelerator.device
            masks = {name: mask.to(device) for name, mask in restore(accelerator, state).items()}
            for rounder in rounders(model).values():
                rounder.on = progress.rounding
        progress.processes = accelerator.num_processes
        loop = _Loop(job, accelerator, student, optimizer, teacher, blocks, masks, progress, checkpoint)
        loop.run()
        sparsity = loop.sparsity
        write_model(
            step, model, Path(job.student), job.out, sparsity.masks, sparsity.pruner, progress, accelerator
        )
    return progress


class _Loop:
    """The state of a running training."""

    def __init__(
        self,
        job: Job,
        accelerator: Any,
        student: nn.Module,
        optimizer: Any,
        teacher: Teacher | None,
        blocks: Blocks,
        masks: dict[str, Tensor],
        progress: Progress,
        checkpoint: Checkpoint,
    ) -> None:
        self.job, self.step = job, job.step
        self.accelerator, self.student, self.optimizer = accelerator, student, optimizer
        self.model: nn.Module = accelerator.unwrap_model(student).model
        self.teacher, self.blocks, self.progress = teacher, blocks, progress
        self.names = linear_names(checkpoint)
        self.sparsity = Sparsity(job.step.prune, self.model, self.names, masks, progress, accelerator)
        share, self.micro = shares(self.step, accelerator.num_processes)
        self.accumulated = share // self.micro
        self.step_tokens = self.step.batch * self.step.length
        self.clock = _Clock(accelerator, job.stop_after)
        self.compiles = True  # the next step does, so that the budget in seconds does not count it
        self.saved = progress.step if progress.step else None  # the step of the state on disk
        self.finite = torch.ones((), dtype=torch.bool, device=accelerator.device)  # all gradients
        # of the losses since the last point of the curve: in the state, so that a resumed curve is the same
        self.sums = {n: torch.tensor(v, device=accelerator.device) for n, v in progress.sums.items()}
        self.summed = progress.summed

    def run(self) -> None:
        progress = self.progress
        said = saved = time.monotonic()
        rate = self._rate(-self.step_tokens / 2)
        while (done := self._done()) < 1.0 and not self.clock.stop:
            compiled = self._prepare(done) or self.compiles
            self.compiles = False
            rate = self._rate(self.step_tokens / 2)
            for group in self.optimizer.param_groups:
                if isinstance(group["lr"], Tensor):  # torchao's, of which compiled code holds the address
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
            for name, value in self._gradients(progress.step).items():
                self.sums[name] = self.sums.get(name, 0) + value
            self._update_masks(done)
            self._step(rate, done)
            progress.step += 1
            progress.tokens += self.step_tokens
            self.summed += 1
            wish = time.monotonic() - saved >= SAVE_SECONDS
            took, due = self.clock.tick(progress.step, wish, counted=not compiled)
            progress.seconds += took
            if progress.step % LOG_STEPS == 0:
                self._record(rate)
            now = time.monotonic()
            if now - said >= QUIET_INTERVAL_S and self.accelerator.is_main_process:
                said = now
                say(self._news())
            if due:
                self._save()
                saved = self.clock.last = time.monotonic()
        if self._done() >= 1.0 and self.summed:
            self._record(rate)
        if self._done() >= 1.0:
            self._update_masks(1.0)
            self.sparsity.check()
        self._save()
        self.sparsity.zero()  # those too that would have gone on learning
        if self.accelerator.is_main_process:
            say(self._news())

    # --- one step -----------------------------------------------------------------------------------

    def _prepare(self, done: float) -> bool:
        """What begins at this step: masks from gradients, rounding, new grids. Whether layers change their
        code by that, and compile."""
        quantize, progress = self.step.quantize, self.progress
        self.sparsity.begin_step(done)
        snip = self.sparsity.needs_gradients_first
        if snip:
            self._gradients(progress.step)
            self.sparsity.snip()
            self.optimizer.zero_grad()
        if quantize is None or done < quantize.start or self.sparsity.learning:
            return snip  # scales are not searched for weights that masks are about to drop
        first = not progress.rounding
        again = quantize.scales == "searched" and progress.step % quantize.every == 0
        if first or again:
            self.sparsity.zero()
            for name, rounder in rounders(self.model).items():
                rounder.fit(whole(self.model.get_parameter(f"{name}.weight")))
        progress.rounding = True
        return snip or first

    def _gradients(self, number: int) -> dict[str, Tensor]:
        """Sum the gradients of optimizer step `number` over its micro batches; the terms' means."""
        found: dict[str, Tensor] = {}
        for turn, ids in enumerate(self._batches(number), 1):
            last = turn == self.accumulated
            with nullcontext() if last else self.accelerator.no_sync(self.student):
                taught = None if self.teacher is None else self.teacher(ids)
                loss, terms = self.student(ids, taught, self._targets())
                self.accelerator.backward(loss / self.accumulated)
            for name, value in {"loss": loss.detach(), **terms}.items():
                found[name] = found.get(name, 0) + value.float() / self.accumulated
        return found

    def _batches(self, number: int) -> Iterator[Tensor]:
        """This process's micro batches of optimizer step `number`, each (blocks, length)."""
        first = number * self.step.batch + self.accelerator.process_index * self.micro * self.accumulated
        for start in range(first, first + self.micro * self.accumulated, self.micro):
            ids = self.blocks.at(range(start, start + self.micro))
            if self.accelerator.device.type == "cuda":
                ids = ids.pin_memory()  # a copy from there does not wait until the GPU has done all before
            yield ids.to(self.accelerator.device, non_blocking=True)

    def _targets(self) -> Mapping[str, tuple[Tensor, Tensor]] | None:
        if not self.step.losses.weights or self.teacher is None:
            return None
        one = torch.ones((), device=self.accelerator.device)
        return {name: (self.teacher.weight(name), self.sparsity.masks.get(name, one)) for name in self.names}

    def _update_masks(self, done: float) -> None:
        if self.sparsity.changes(done):
            masked = len(self.sparsity.masks)
            self.sparsity.update(done, self.student, self._batches(self.progress.step))
            self.compiles = len(self.sparsity.masks) > masked  # layers that had no mask have other code

    def _step(self, rate: float, done: float) -> None:
        norm = self.accelerator.clip_grad_norm_(self.student.parameters(), self.step.optimizer.clip)
        self.finite &= whole(norm).isfinite()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.progress.step % DECAY_STEPS == 0:
            self.sparsity.decay(DECAY_STEPS * rate, done)

    # --- bookkeeping --------------------------------------------------------------------------------

    def _rate(self, ahead: float) -> float:
        """The learning rate so many tokens from now."""
        setting = self.step.optimizer
        return setting.learning_rate * schedule(self._done(ahead), setting.warmup)

    def _done(self, ahead: float = 0) -> float:
        """Fraction of the budget that is used up."""
        return self.progress.used(self.step.budget, ahead)

    def _agreed_sums(self) -> dict[str, float]:
        """The losses summed since the last point of the curve, as all processes saw them.

        Raises NumericsError if one, or a gradient, was not finite: so that no such state is ever saved.
        """
        names = sorted(self.sums)
        values = torch.stack([self.finite.double(), *(self.sums[name].double() for name in names)])
        finite, *means = self.accelerator.reduce(values, "mean").tolist()
        found = dict(zip(names, means, strict=True))
        if finite < 1 or not all(map(math.isfinite, means)):
            wrong = [f"{name} {value}" for name, value in found.items() if not math.isfinite(value)]
            raise NumericsError(
                f"the training is not finite at step {self.progress.step}",
                saw=", ".join(wrong) or "a gradient that is NaN or infinite",
                try_="a smaller `learning_rate`, with which it begins anew",
            )
        return found

    def _record(self, rate: float) -> None:
        terms = {name: value / self.summed for name, value in self._agreed_sums().items()}
        self.sums, self.summed = {}, 0
        self.progress.curve.append(
            TrainingPoint(
                step=self.progress.step,
                tokens=self.progress.tokens,
                seconds=round(self.progress.seconds, 3),
                loss=terms.pop("loss"),
                learning_rate=rate,
                terms=terms,
            )
        )

    def _save(self) -> None:
        if self.saved == self.progress.step:
            return
        self.progress.sums, self.progress.summed = self._agreed_sums(), self.summed
        save(self.accelerator, self.job.state, self.progress, self.sparsity.masks)
        self.saved = self.progress.step

    def _news(self) -> str:
        progress, done = self.progress, self._done()
        speed = self.clock.rate(self.step_tokens)
        loss = f", loss {progress.curve[-1].loss:.4f}" if progress.curve else ""
        left = ""
        if speed and 0 < done < 1 and progress.seconds:
            left = f", {progress.seconds / done * (1 - done):.0f} s left"
        return (
            f"  recover: step {progress.step}, {done:.1%}, {progress.tokens / 1e6:.2f} M tokens{loss}, "
            f"{speed:,.0f} tokens/s{left}"
        )


class _Clock:
    """Training time, agreed on by all processes. Steps that compile, and saving, are not counted."""

    def __init__(self, accelerator: Any, stop_after: float | None) -> None:
        self.accelerator = accelerator
        self.began = self.last = time.monotonic()
        self.stop_after = stop_after
        self.stop = False
        self.new = 0  # steps since `last`
        self.steps, self.seconds = 0, 0.0  # that are counted

    def tick(self, step: int, wish: bool, counted: bool) -> tuple[float, bool]:
        """Seconds since the last tick, 0 if they are not counted, and what the first process wishes; also
        finds out whether the call's time is over.

        Several processes agree every LOG_STEPS only, as they have to wait for their GPUs to do so.
        """
        self.new += 1
        several = self.accelerator.num_processes > 1
        if several and counted and step % LOG_STEPS:
            return 0.0, False
        now = time.monotonic()
        took, self.last = now - self.last, now
        over = self.stop_after is not None and now - self.began >= self.stop_after
        if several:
            from accelerate.utils import broadcast

            said = torch.tensor([took, over, wish], dtype=torch.float64, device=self.accelerator.device)
            took, over, wish = broadcast(said, from_process=0).tolist()
        self.stop = bool(over)
        new, self.new = self.new, 0
        if not counted:
            return 0.0, bool(wish)
        self.steps += new
        self.seconds += took
        return took, bool(wish)

    def rate(self, tokens: int) -> float:
        return tokens * self.steps / self.seconds if self.seconds else 0.0


def schedule(done: float, warmup: float) -> float:
    """Factor of the learning rate: linear up to 1 at `warmup`, then half a cosine down to 0 at 1."""
    if done < warmup:
        return done / warmup
    return 0.5 * (1 + math.cos(math.pi * min((done - warmup) / (1 - warmup), 1.0)))


def thinned(curve: list[TrainingPoint], most: int = 200) -> list[TrainingPoint]:
    """At most about `most` points of a curve, its first and last among them."""
    every = max(math.ceil(len(curve) / most), 1)
    return [*curve[:-1:every], *curve[-1:]]


# --- getting ready ------------------------------------------------------------------------------------


def _accelerator(job: Job) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    cuda = torch.cuda.is_available()
    losses, quantize = job.step.losses, job.step.quantize
    # learned scales are unused until weights are rounded, the head if nothing is learned from logits
    later = quantize is not None and quantize.scales == "learned" and quantize.start > 0
    unused = later or not (losses.logits or losses.cross_entropy)
    sharded = job.step.shard and int(os.environ.get("WORLD_SIZE", "1")) > 1
    return Accelerator(
        mixed_precision="bf16" if cuda else "no",
        cpu=not cuda,
        fsdp_plugin=_fsdp(_layer_class(job.student)) if sharded else None,
        # every process fits its grids, the only buffers that change, to the same weights
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=unused, broadcast_buffers=False)
        ],
    )


def _fsdp(layer_class: str) -> Any:
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[layer_class],
        state_dict_type="SHARDED_STATE_DICT",
        # Nothing is cast but by autocast: accelerate would gather the weights in bfloat16, and masks and
        # grids not see those that are exported. Nor is what goes into a layer, as torch 2.11 does not cast
        # that where `recompute` makes it again.
        mixed_precision_policy=MixedPrecisionPolicy(),
    )


def _layer_class(folder: Path) -> str:
    from transformers import AutoModelForCausalLM

    from pipelines.layers import parsed

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(parsed(Checkpoint(folder).config))
    return type(decoder_layers(model)[0]).__name__


def _blocks(job: Job) -> Blocks:
    checkpoint = Checkpoint(job.student)
    vocabulary = checkpoint.shapes()[f"{checkpoint.family.embeddings}.weight"][0]
    sources = [open_tokens(path, vocabulary) for path in job.tokens]
    others = [open_tokens(path, vocabulary, dimensions=2) for path in job.alternatives]
    fraction = job.step.resample.fraction if job.step.resample else 0.0
    return Blocks(sources, job.step.length, job.step.seed, others, fraction)


def _prepared(job: Job, accelerator: Any) -> tuple[nn.Module, Any, Teacher | None]:
    step = job.step
    compiled = step.compile and torch.cuda.is_available()
    teacher = None
    if step.losses.taught:
        check_alike(Checkpoint(job.student), Checkpoint(job.teacher), step.losses)
        teacher = Teacher(job.teacher, step.losses, compiled)
    student = Student(load_student(step, job.student), step.losses, compiled)
    optimizer = _optimizer(step.optimizer, student)
    with warnings.catch_warnings():
        # accelerate knows no other name for it yet
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        student, optimizer = accelerator.prepare(student, optimizer)
    return student, optimizer, teacher


def _optimizer(setting: Optimizer, student: nn.Module) -> torch.optim.Optimizer:
    learning = {name: p for name, p in student.named_parameters() if p.requires_grad}
    matrices = [p for name, p in learning.items() if p.ndim > 1 and not name.endswith("rounder.delta")]
    others = [p for name, p in learning.items() if p.ndim <= 1 or name.endswith("rounder.delta")]
    groups = [
        {"params": matrices, "weight_decay": setting.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {"lr": setting.learning_rate, "betas": (setting.beta1, setting.beta2)}
    groups = [group for group in groups if group["params"]]
    if setting.kind == "adamw":
        return torch.optim.AdamW(groups, fused=torch.cuda.is_available(), **options)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UsageError("adamw-8bit needs the package torchao", try_="pip install torchao") from error
    found: torch.optim.Optimizer = AdamW8bit(groups, bf16_stochastic_round=True, **options)
    return found


def shares(step: Recover, processes: int) -> tuple[int, int]:
    """Blocks of an optimizer step for each process, and how many of them at once."""
    if step.shard and step.losses.weights and processes > 1:
        raise UsageError("the loss `weights` needs whole matrices", try_="`shard: false`, or weights: 0")
    if step.batch % processes:
        raise UsageError(
            f"a batch of {step.batch} blocks cannot be shared by {processes} processes",
            try_=f"a `batch` that is a multiple of {processes}",
        )
    share = step.batch // processes
    micro = next(size for size in range(min(step.micro_batch, share), 0, -1) if share % size == 0)
    return share, micro


@contextmanager
def _fast_arithmetic() -> Iterator[None]:
    """Without the pipeline's deterministic algorithms, of which CUDA's products know none."""
    before = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.set_float32_matmul_precision(before[1])
