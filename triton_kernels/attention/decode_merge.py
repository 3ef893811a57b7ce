"""The second stage of decoding: joins what the splits of the keys gave, in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from warploom.triton_kernels.attention.arguments import Launch
from warploom.triton_kernels.attention.scoring import LN_2
from warploom.triton_kernels.common.launch import AheadOfTimeCase, next_power_of_2
from warploom.triton_kernels.common.numerics import cast

_NUM_WARPS = 4


@triton.jit(do_not_specialize=["num_splits", "H", "Sq"])
def _merge_splits_kernel(
    partial_out_ptr,  # [num_splits, B, Sq, H, DV] float32, contiguous
    partial_lse_ptr,  # [num_splits, B, H, Sq] float32, contiguous, base 2
    out_ptr,  # [B, Sq, H, DV], contiguous
    lse_ptr,  # [B, H, Sq] float32, contiguous, base e
    num_splits,
    H,
    Sq,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """out = sum(w out_s) / sum(w), w = exp(lse_s - max lse); lse = max lse + log(sum(w)).

    Splits without keys (lse -inf) add zeros, so that bits do not depend on how many there are.
    Grid: [B * Sq * H].
    """
    i_row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    i_h = i_row % H
    i_s = i_row // H % Sq
    i_b = i_row // H // Sq
    i_lse = (i_b * H + i_h) * Sq + i_s
    features = tl.arange(0, BLOCK_DV)
    b_max = tl.load(partial_lse_ptr + i_lse)
    for i_split in range(1, num_splits):
        b_max = tl.maximum(b_max, tl.load(partial_lse_ptr + i_split * rows + i_lse))
    b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_sum = b_shift * 0.0
    # [BLOCK_DV]
    b_out = tl.zeros([BLOCK_DV], dtype=tl.float32)
    for i_split in range(0, num_splits):
        b_weight = tl.exp2(tl.load(partial_lse_ptr + i_split * rows + i_lse) - b_shift)
        p_out = partial_out_ptr + (i_split * rows + i_row) * DV + features
        b_out += b_weight * tl.load(p_out, mask=features < DV, other=0.0)
        b_sum += b_weight
    b_divisor = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_lse = tl.where(b_sum == 0.0, float("-inf"), b_max + tl.log2(b_divisor))
    b_out = cast(b_out / b_divisor, out_ptr.dtype.element_ty)
    tl.store(out_ptr + i_row * DV + features, b_out, mask=features < DV)
    tl.store(lse_ptr + i_lse, b_lse * LN_2)


def merge_splits(
    partial_out: torch.Tensor, partial_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> Launch:
    """The launch that writes out and lse."""
    b, sq, h, dv = out.shape
    arguments = {
        **{"partial_out_ptr": partial_out, "partial_lse_ptr": partial_lse},
        **{"out_ptr": out, "lse_ptr": lse},
        **{"num_splits": partial_out.shape[0], "H": h, "Sq": sq},
    }
    constants = {"DV": dv, "BLOCK_DV": next_power_of_2(dv)}
    return Launch(_merge_splits_kernel, (b * sq * h,), arguments, constants, _NUM_WARPS)


def aot_cases() -> list[AheadOfTimeCase]:
    def tensor(*shape: int, of: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    launch = merge_splits(
        tensor(4, 2, 1, 8, 128),
        tensor(4, 2, 8, 1),
        tensor(2, 1, 8, 128, of=torch.bfloat16),
        tensor(2, 8, 1),
    )
    return [launch.ahead_of_time("bf16 Dv=128")]
