"""Rotary position embedding (Su et al. 2021, equation 34) of the first R of D features."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from warploom.triton_kernels.common.launch import (
    COMPILE_OPTIONS,
    AheadOfTimeCase,
    Constant,
    cdiv,
    next_power_of_2,
    on_own_device,
    warp_count,
    why_not_tensors,
    with_unit_last_stride,
)
from warploom.triton_kernels.common.numerics import cast

_TILE_ELEMENTS = 2048


@triton.jit(do_not_specialize=["M", "S", "H", "P"])
def _rotary_kernel(
    x_ptr,  # [B, S, H, D], strides x_stride_{b,s,h}, 1
    cos_ptr,  # [P, R / 2], row stride cos_stride
    sin_ptr,  # [P, R / 2], row stride sin_stride
    positions_ptr,  # [B, S] integers, strides positions_stride_{b,s}; or None for s
    out_ptr,  # [B, S, H, D], contiguous
    M,  # B * S * H
    S,
    H,
    P,
    x_stride_b,
    x_stride_s,
    x_stride_h,
    cos_stride,
    sin_stride,
    positions_stride_b,
    positions_stride_s,
    D: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    CONJUGATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
):
    """y1 = x1 cos - x2 sin; y2 = x2 cos + x1 sin for the pair (x1, x2) = (x[i], x[i + R/2]), or
    (x[2i], x[2i + 1]) where INTERLEAVED; CONJUGATE turns the other way.

    Grid: [cdiv(B * S * H, BLOCK_M)]; BLOCK_R >= R / 2; BLOCK_TAIL >= D - R, 0 where R == D.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    row_mask = rows < M
    i_h = rows % H
    i_s = rows // H % S
    i_b = rows // H // S
    p_x = x_ptr + i_b * x_stride_b + i_s * x_stride_s + i_h * x_stride_h
    p_out = out_ptr + rows * D
    # [BLOCK_M, 1]
    if positions_ptr is None:
        b_position = i_s
    else:
        p_position = positions_ptr + i_b * positions_stride_b + i_s * positions_stride_s
        b_position = tl.load(p_position, mask=row_mask, other=0).to(tl.int64)

    pairs = tl.arange(0, BLOCK_R)[None, :]
    mask = row_mask & (pairs < R // 2)
    # A position outside the tables must not be read.
    table_mask = mask & (b_position >= 0) & (b_position < P)
    # [BLOCK_M, BLOCK_R]
    b_cos = tl.load(cos_ptr + b_position * cos_stride + pairs, mask=table_mask, other=0.0)
    b_sin = tl.load(sin_ptr + b_position * sin_stride + pairs, mask=table_mask, other=0.0)
    b_cos = cast(b_cos, tl.float32)
    b_sin = cast(b_sin, tl.float32)
    if CONJUGATE:
        b_sin = -b_sin
    if INTERLEAVED:
        first = 2 * pairs
        second = first + 1
    else:
        first = pairs
        second = pairs + R // 2
    b_x1 = cast(tl.load(p_x + first, mask=mask, other=0.0), tl.float32)
    b_x2 = cast(tl.load(p_x + second, mask=mask, other=0.0), tl.float32)
    b_y1 = cast(b_x1 * b_cos - b_x2 * b_sin, out_ptr.dtype.element_ty)
    b_y2 = cast(b_x2 * b_cos + b_x1 * b_sin, out_ptr.dtype.element_ty)
    tl.store(p_out + first, b_y1, mask=mask)
    tl.store(p_out + second, b_y2, mask=mask)

    if BLOCK_TAIL > 0:
        tail = R + tl.arange(0, BLOCK_TAIL)[None, :]
        tail_mask = row_mask & (tail < D)
        # [BLOCK_M, BLOCK_TAIL]
        b_tail = tl.load(p_x + tail, mask=tail_mask, other=0.0)
        tl.store(p_out + tail, b_tail, mask=tail_mask)


def _blocks(d: int, r: int) -> dict[str, int]:
    """BLOCK_M, BLOCK_R and BLOCK_TAIL for D = d and R = r."""
    return {
        "BLOCK_M": max(1, min(32, _TILE_ELEMENTS // next_power_of_2(d))),
        "BLOCK_R": next_power_of_2(r // 2),
        "BLOCK_TAIL": next_power_of_2(d - r) if d > r else 0,
    }


@on_own_device
def apply_rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    interleaved: bool,
    conjugate: bool,
) -> torch.Tensor:
    """x [B, S, H, D], cos, sin [P, R/2], positions [B, S] or None for arange(S) -> out like x and
    contiguous."""
    x = with_unit_last_stride(x)
    cos = with_unit_last_stride(cos)
    sin = with_unit_last_stride(sin)
    _, s, h, d = x.shape
    r = 2 * cos.shape[1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    m = out.numel() // d
    blocks = _blocks(d, r)
    _rotary_kernel[(cdiv(m, blocks["BLOCK_M"]),)](
        x,
        cos,
        sin,
        positions,
        out,
        m,
        s,
        h,
        cos.shape[0],
        x.stride(0),
        x.stride(1),
        x.stride(2),
        cos.stride(0),
        sin.stride(0),
        0 if positions is None else positions.stride(0),
        0 if positions is None else positions.stride(1),
        D=d,
        R=r,
        INTERLEAVED=interleaved,
        CONJUGATE=conjugate,
        num_warps=warp_count(blocks["BLOCK_M"] * next_power_of_2(d)),
        **COMPILE_OPTIONS,
        **blocks,
    )
    return out


def why_not(*args: object) -> list[str]:
    """What this kernel cannot do with the arguments of `apply_rotary`."""
    return why_not_tensors(*args)


def aot_cases() -> list[AheadOfTimeCase]:
    cases = []
    for d, r, interleaved, positions in (
        (128, 128, False, "*i64:16"),
        (128, 64, False, None),
        (64, 64, True, "*i32:16"),
    ):
        blocks = _blocks(d, r)
        arguments: dict[str, Constant | str] = {
            "x_ptr": "*bf16:16",
            "cos_ptr": "*fp32:16",
            "sin_ptr": "*fp32:16",
            "positions_ptr": positions or Constant(None),
            "out_ptr": "*bf16:16",
            "M": "i32",
            "S": "i32",
            "H": "i32",
            "P": "i32",
            "x_stride_b": "i32:16",
            "x_stride_s": "i32:16",
            "x_stride_h": "i32:16",
            "cos_stride": "i32:16",
            "sin_stride": "i32:16",
            "positions_stride_b": "i32",
            "positions_stride_s": Constant(1),
            "D": Constant(d),
            "R": Constant(r),
            "INTERLEAVED": Constant(interleaved),
            "CONJUGATE": Constant(False),
        }
        arguments |= {name: Constant(value) for name, value in blocks.items()}
        name = f"bf16 D={d} R={r} {'interleaved' if interleaved else 'halves'}"
        num_warps = warp_count(blocks["BLOCK_M"] * next_power_of_2(d))
        cases.append(AheadOfTimeCase(name, _rotary_kernel, arguments, num_warps))
    return cases
