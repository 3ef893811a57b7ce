"""What a rank takes of tensors that are distributed, where a module computes with its own heads alone."""

from __future__ import annotations

import torch
from torch import Tensor

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Partial


def own_part(x: Tensor) -> Tensor:
    """The rank's part of a sharded tensor; any other tensor itself."""
    return x.to_local() if torch.distributed.is_available() and isinstance(x, DTensor) else x


def shared_whole(x: Tensor) -> Tensor:
    """A replicated tensor, of which each rank makes something else: its gradient is the ranks' sum."""
    if torch.distributed.is_available() and isinstance(x, DTensor):
        return x.to_local(grad_placements=[Partial()] * x.device_mesh.ndim)
    return x
