"""Student and teacher: what one forward pass of recovery training computes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipelines.checkpoint import Checkpoint
from pipelines.evaluate import load_model
from pipelines.families import Family
from pipelines.recipe import Losses, Recover, Rounding, override_of
from pipelines.recover.losses import IGNORED, ChunkLoss, HeadLoss, chunk_loss, squarehead, weight_error
from pipelines.recover.rounding import Rounder, add_rounder
from zoo.errors import FormatError


class Taught(NamedTuple):
    """What the teacher says of a batch."""

    hidden: Tensor  # (batch, length, width), after the last norm
    states: tuple[Tensor, ...]  # after every decoder layer, if asked for
    head: Tensor  # (vocabulary, width)


class Teacher:
    """The model to be imitated; it never learns."""

    def __init__(self, folder: Path, losses: Losses, compiled: bool) -> None:
        cuda = torch.cuda.is_available()
        model, _ = load_model(folder, torch.bfloat16 if cuda else torch.float32)
        self.model = model.requires_grad_(False)
        self.states = losses.squarehead > 0
        if compiled:
            compile_layers(model)

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Taught:
        hidden, states = _backbone(self.model, ids, self.states)
        return Taught(hidden, states, self.model.get_output_embeddings().weight)

    def weight(self, name: str) -> Tensor:
        return self.model.get_parameter(f"{name}.weight")  # type: ignore[no-any-return]


class Student(nn.Module):
    """The model in training with its losses: one module, so that DDP and FSDP see one forward pass.

    `targets` are the teacher's weights and the masks for the loss `weights`, by layer.
    """

    def __init__(self, model: nn.Module, losses: Losses, compiled: bool) -> None:
        super().__init__()
        self.model = model
        self.losses = losses
        self.loss: ChunkLoss = chunk_loss
        if compiled:
            compile_layers(model)
            self.loss = torch.compile(chunk_loss, dynamic=False)

    def forward(
        self, ids: Tensor, taught: Taught | None, targets: Mapping[str, tuple[Tensor, Tensor]] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """ids (batch, length). Returns the loss to minimise and its terms, each a mean, unweighted.

        Without `taught` and `targets`, the losses that need them are left out.
        """
        losses = self.losses
        hidden, states = _backbone(self.model, ids, losses.squarehead > 0)
        dtype = _arithmetic(hidden)
        head = self.head().to(dtype)
        tokens, predicted = ids.numel(), ids.shape[0] * (ids.shape[1] - 1)
        shifted = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], dim=1)
        flat = hidden.flatten(0, 1).to(dtype)
        if not (losses.logits or losses.cross_entropy):
            flat, head = flat.detach(), head.detach()  # the cross-entropy is recorded all the same
        use = taught if losses.logits else None
        scales = (losses.logits / tokens, losses.cross_entropy / predicted)

        def loss(h: Tensor, w: Tensor, theirs: Tensor | None, their_head: Tensor | None, t: Tensor) -> Any:
            return self.loss(h, w, theirs, their_head, t, scales, losses.temperature, losses.top_k)

        total, sums = HeadLoss.apply(  # type: ignore[no-untyped-call]
            loss,
            flat,
            head,
            None if use is None else use.hidden.flatten(0, 1).to(dtype),
            None if use is None else use.head.to(dtype),
            shifted.flatten(),
        )
        terms = {"cross_entropy": sums[1] / predicted}
        if use is not None:
            terms["logits"] = sums[0] / tokens
        if losses.squarehead and taught is not None:
            term = squarehead(states, taught.states)
            terms["squarehead"], total = term.detach(), total + losses.squarehead * term
        if losses.weights and targets is not None:
            ours = [self.model.get_parameter(f"{name}.weight") for name in targets]
            theirs, masks = zip(*targets.values(), strict=True)
            term = weight_error(ours, theirs, masks)
            terms["weights"], total = term.detach(), total + losses.weights * term
        return total, terms

    def head(self) -> Tensor:
        """The output head (vocabulary, width), rounded as it will be stored."""
        head, embeddings = self.model.get_output_embeddings(), self.model.get_input_embeddings()  # type: ignore[operator]
        rounder = getattr(embeddings if head.weight is embeddings.weight else head, "rounder", None)
        weight: Tensor = head.weight
        return weight if rounder is None else rounder(weight)


def _backbone(model: Any, ids: Tensor, states: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    out = model.base_model(input_ids=ids, use_cache=False, output_hidden_states=states)
    return out.last_hidden_state, tuple(out.hidden_states[1:]) if states else ()


def _arithmetic(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def compile_layers(model: Any) -> None:
    """Compile one decoder layer's code for all of them: seconds instead of minutes for the whole model."""
    for layer in decoder_layers(model):
        layer.compile(dynamic=False)


def decoder_layers(model: Any) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def load_student(step: Recover, folder: Path) -> nn.Module:
    """The model in `folder` ready to learn, with the grids of `step.quantize` not yet in use."""
    model, _ = load_model(folder, getattr(torch, step.weights))
    model.train()
    if step.recompute:
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # newer and older
        enable = next(getattr(model, name) for name in names if hasattr(model, name))
        enable({"use_reentrant": False})
    if torch.cuda.is_available():
        # the residual stream in the type of the arithmetic: half the bytes between the products
        model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.to(torch.bfloat16))
    checkpoint = Checkpoint(folder)
    if step.quantize is not None:
        learned = step.quantize.scales == "learned"
        pruned = set(linear_names(checkpoint)) if step.prune else pruned_layers(checkpoint)
        for name, rounding in grids_of(step, checkpoint).items():
            add_rounder(model.get_submodule(name), name, rounding, learned, name in pruned)
    found: nn.Module = model
    return found


def linear_names(checkpoint: Checkpoint) -> list[str]:
    """The linear layers of the decoder."""
    family, count = checkpoint.family, checkpoint.layer_count
    return [family.layer_prefix(i) + name for i in range(count) for name in family.linears]


def pruned_layers(checkpoint: Checkpoint) -> set[str]:
    """Those in which earlier steps made zeros that must stay."""
    return {record.name for record in checkpoint.compression() if record.pattern is not None}


def grids_of(step: Recover, checkpoint: Checkpoint) -> dict[str, Rounding]:
    """The grid of every layer that this step quantizes."""
    quantize = step.quantize
    if quantize is None:
        return {}
    family: Family = checkpoint.family
    found: dict[str, Rounding | None] = {}
    for name in linear_names(checkpoint):
        other = override_of(name, quantize.overrides)
        found[name] = quantize.grid if other is None else other.grid
    found[family.embeddings] = quantize.embeddings
    if not checkpoint.tied:
        found[family.head] = quantize.head
    return {name: grid for name, grid in found.items() if grid is not None}


def rounders(model: nn.Module) -> dict[str, Rounder]:
    """The grids in use or to come, by layer."""
    return {
        name.removesuffix(".rounder"): module
        for name, module in model.named_modules()
        if isinstance(module, Rounder)
    }


def check_alike(student: Checkpoint, teacher: Checkpoint, losses: Losses) -> None:
    """Raise FormatError unless teacher and student have the dimensions that the losses compare."""
    ours, theirs = student.shapes(), teacher.shapes()
    name = f"{student.family.embeddings}.weight"
    other = f"{teacher.family.embeddings}.weight"
    if ours.get(name, (0,))[0] != theirs.get(other, (0,))[0]:
        raise FormatError(
            "teacher and student do not share a vocabulary",
            saw=f"{theirs.get(other)} and {ours.get(name)} embeddings",
        )
    deep = student.layer_count == teacher.layer_count and ours.get(name) == theirs.get(other)
    if losses.squarehead and not deep:
        raise FormatError("`squarehead` compares layer by layer", expected="a teacher of the same dimensions")
    if losses.weights:
        differ = [n for n in linear_names(student) if ours.get(f"{n}.weight") != theirs.get(f"{n}.weight")]
        if differ:
            raise FormatError(
                "`weights` compares matrix by matrix", saw=f"{differ[0]} differs", expected="equal shapes"
            )
