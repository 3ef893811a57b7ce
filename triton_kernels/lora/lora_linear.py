"""A linear map with a low-rank update."""

from __future__ import annotations

import torch
from warploom.triton_kernels.common.launch import on_own_device, why_not_tensors
from warploom.triton_kernels.lora.shrink_product import shrink_product
from warploom.triton_kernels.lora.two_phase_product import Base, Update, two_phase_product
from warploom.triton_kernels.lora.weight_tile import StoredWeight


@on_own_device
def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    column_scale: torch.Tensor | None,
    shrunk: torch.Tensor | None,
    seed: torch.Tensor | None,
    weight_format: str,
    scaling: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [M, K], weight [N, K] -> (out [M, N], shrunk [M, R], what column_scale is multiplied with
    [M, N]), contiguous; the last two empty without lora_a, without column_scale.
    """
    made = x.new_empty(0)
    if lora_a is not None:
        shrunk = made = shrink_product(x, lora_a, 1.0, seed, dropout_p)
    update = None
    if lora_b is not None and shrunk is not None:
        update = Update(shrunk, lora_b.mT, scaling)
    base = Base(x, StoredWeight(weight, weight_scale, weight_format), transposed=True)
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    unscaled = x.new_empty(0) if column_scale is None else torch.empty_like(out)
    two_phase_product(
        out, update, base, column_scale, bias, None if column_scale is None else unscaled
    )
    return out, made, unscaled


def why_not(*args: object) -> list[str]:
    """What these kernels cannot do with the op's arguments; a quantised weight comes as bytes."""
    return why_not_tensors(*args)
