"""The losses of recovery training, and the output head without ever holding all of its logits.

Student and teacher share a vocabulary and a number of layers. All functions are pure; sums and means are
over tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # a target that is not predicted
CHUNK_LOGITS = 1 << 28  # logits that exist at a time: 1 GiB in float32
REST = 1e-6  # least probability of all tokens but the top k


def divergence(student: Tensor, teacher: Tensor, temperature: float, top_k: int | None = None) -> Tensor:
    """Sum over tokens of T^2 KL(teacher || student) of the softmax of logits / T, logits (n, vocabulary).

    With `top_k`, of the distributions over the teacher's k likeliest tokens and, as one more outcome, all the
    others: a lower bound that needs k logits of the teacher and does not forget how much the rest weighs.
    Source: Hinton et al., arXiv:1503.02531.
    """
    p = (teacher / temperature).log_softmax(-1)
    q = (student / temperature).log_softmax(-1)
    if top_k is not None and top_k < p.shape[-1]:
        p, likeliest = p.topk(top_k, dim=-1)
        q = q.gather(-1, likeliest)
        p, q = (torch.cat([x, _rest(x)], dim=-1) for x in (p, q))
    return (p.exp() * (p - q)).sum() * temperature**2


def _rest(log_probabilities: Tensor) -> Tensor:
    """log(1 - sum of probabilities), (n, 1)."""
    return (1 - log_probabilities.exp().sum(-1, keepdim=True)).clamp_min(REST).log()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens of -log p(target); targets (n,), IGNORED ones are left out."""
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def squarehead(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over layers of MSE(teacher, student) / MSE(teacher, 0), each hidden state (..., width).

    Source: the SquareHead loss of "Sparse Fine-tuning for Inference Acceleration", arXiv:2310.06927.
    """
    terms = [
        (ours.float() - theirs.float()).square().mean() / theirs.float().square().mean().clamp_min(1e-12)
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack(terms).mean()


def weight_error(student: Sequence[Tensor], teacher: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """Mean over matrices of ||M (W - W_teacher)||^2 / ||M W_teacher||^2: the kept weights' alone."""
    terms = []
    for ours, theirs, mask in zip(student, teacher, masks, strict=True):
        target = theirs.float() * mask
        terms.append((ours.float() * mask - target).square().sum() / target.square().sum().clamp_min(1e-12))
    return torch.stack(terms).mean()


# (student's states, its head, teacher's states, its head, targets) -> loss to minimise, and sums to report.
ChunkLoss = Callable[..., tuple[Tensor, Tensor]]


def chunk_loss(
    hidden: Tensor,
    head: Tensor,
    taught: Tensor | None,
    taught_head: Tensor | None,
    targets: Tensor,
    weights: tuple[float, float],
    temperature: float,
    top_k: int | None,
) -> tuple[Tensor, Tensor]:
    """Both losses of the logits for some tokens: their weighted sum, and (divergence, cross-entropy).

    hidden (n, width), head (vocabulary, width), of the teacher the same or None; targets (n,).
    """
    logits = (hidden @ head.t()).float()
    entropy = cross_entropy(logits, targets)
    if taught is None or taught_head is None:
        return weights[1] * entropy, torch.stack([torch.zeros_like(entropy), entropy]).detach()
    kl = divergence(logits, (taught @ taught_head.t()).float(), temperature, top_k)
    return weights[0] * kl + weights[1] * entropy, torch.stack([kl, entropy]).detach()


class HeadLoss(torch.autograd.Function):
    """`chunk_loss` over all tokens, chunk by chunk, with its gradients taken in the forward pass.

    So the logits of one chunk exist at a time and none is computed twice: at 49 k tokens of vocabulary all
    the logits of a batch would take more memory than all the activations.
    """

    @staticmethod
    def forward(
        ctx: Any,
        loss: ChunkLoss,
        hidden: Tensor,
        head: Tensor,
        taught: Tensor | None,
        taught_head: Tensor | None,
        targets: Tensor,
    ) -> tuple[Tensor, Tensor]:
        learns = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        count = _chunk(len(hidden), head.shape[0])
        h = hidden.detach()
        w = head.detach().requires_grad_(learns)
        grad_h = torch.empty_like(h) if learns else None
        grad_w = torch.zeros(head.shape, device=head.device) if learns else None
        total = torch.zeros((), device=h.device)
        parts = torch.zeros(2, device=h.device)
        for start in range(0, len(h), count):
            at = slice(start, start + count)
            theirs = None if taught is None else taught[at]
            with torch.set_grad_enabled(learns):
                piece = h[at].requires_grad_(learns)
                value, sums = loss(piece, w, theirs, taught_head, targets[at])
            if grad_h is not None and grad_w is not None:
                piece_grad, head_grad = torch.autograd.grad(value, (piece, w))
                grad_h[at] = piece_grad
                grad_w += head_grad
            total += value.detach()
            parts += sums
        if grad_h is not None and grad_w is not None:
            ctx.save_for_backward(grad_h, grad_w.to(head.dtype))
        ctx.mark_non_differentiable(parts)
        return total, parts

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad_h, grad_w = ctx.saved_tensors
        return None, grad_h * grads[0], grad_w * grads[0], None, None, None


def _chunk(tokens: int, vocabulary: int) -> int:
    """A power of two, so that chunks are alike and compiled once, with at most CHUNK_LOGITS logits."""
    largest = max(CHUNK_LOGITS // vocabulary, 1)
    return min(1 << (largest.bit_length() - 1), tokens)
