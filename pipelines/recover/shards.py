"""Tensors of which each process holds a part (FSDP): the few operations that training needs on them."""

from __future__ import annotations

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every process."""
    found: Tensor = getattr(tensor, "full_tensor")() if is_sharded(tensor) else tensor  # noqa: B009
    return found.detach()


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that all processes hold, spread as `like` is."""
    tensor = tensor.to(like.device)
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor, like.device_mesh, like.placements)


@torch.no_grad()
def apply_mask(tensor: Tensor | None, mask: Tensor) -> None:
    """Set to zero, in place, what the mask does not keep."""
    if tensor is not None:
        tensor.mul_(mask)


@torch.no_grad()
def shrink(tensor: Tensor, mask: Tensor, factor: float) -> None:
    """Multiply by `factor`, in place, what the mask does not keep."""
    tensor.mul_(mask.to(tensor.dtype).mul_(1 - factor).add_(factor))
