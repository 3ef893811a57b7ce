"""The second stage of a sum over rows: adds the programs' partial sums in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from warploom.triton_kernels.common.launch import COMPILE_OPTIONS, AheadOfTimeCase, Constant, cdiv
from warploom.triton_kernels.common.numerics import cast

_BLOCK_P = 32
_BLOCK_N = 64
_NUM_WARPS = 4


@triton.jit(do_not_specialize=["P"])
def _sum_partials_kernel(
    partials_ptr,  # [P, N] float32, contiguous
    sums_ptr,  # [N]
    P,
    N,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """sums[n] = sum_p partials[p, n], in the same order whatever the timing.

    Grid: [cdiv(N, BLOCK_N)].
    """
    columns = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_sum = tl.zeros([BLOCK_P, BLOCK_N], dtype=tl.float32)
    for start in range(0, P, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)[:, None]
        mask = (rows < P) & (columns[None, :] < N)
        # [BLOCK_P, BLOCK_N]
        p_partials = partials_ptr + rows.to(tl.int64) * N + columns[None, :]
        b_sum += tl.load(p_partials, mask=mask, other=0.0)
    # [BLOCK_N]
    b_total = tl.sum(b_sum, axis=0)
    tl.store(sums_ptr + columns, cast(b_total, sums_ptr.dtype.element_ty), mask=columns < N)


def sum_partials(partials: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """partials [P, N] float32, contiguous -> [N] in `dtype`; deterministic, added in float32."""
    p, n = partials.shape
    sums = torch.empty(n, dtype=dtype, device=partials.device)
    _sum_partials_kernel[(cdiv(n, _BLOCK_N),)](
        partials,
        sums,
        p,
        n,
        BLOCK_P=_BLOCK_P,
        BLOCK_N=_BLOCK_N,
        num_warps=_NUM_WARPS,
        **COMPILE_OPTIONS,
    )
    return sums


def aot_cases() -> list[AheadOfTimeCase]:
    arguments: dict[str, Constant | str] = {
        "partials_ptr": "*fp32:16",
        "sums_ptr": "*bf16:16",
        "P": "i32",
        "N": "i32:16",
        "BLOCK_P": Constant(_BLOCK_P),
        "BLOCK_N": Constant(_BLOCK_N),
    }
    return [AheadOfTimeCase("bf16", _sum_partials_kernel, arguments, _NUM_WARPS)]
