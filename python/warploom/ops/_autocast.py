"""What products do under autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast floating inputs to the autocast dtype where autocast is on: for ops that are products."""
    device_type = tensors[0].device.type
    # Meta tensors know no autocast; asking torch whether a device does breaks the graph on 2.11.
    if device_type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(tensor.to(dtype) for tensor in tensors)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which autocast leaves operations on x's device alone: streams that are to be inverted."""
    # Other devices (meta) know no autocast.
    if x.device.type not in ("cpu", "cuda"):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)
