"""An affine coupling of rows whose parameters are the product of the conditioner's last layer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from warploom.triton_kernels.common.launch import (
    COMPILE_OPTIONS,
    AheadOfTimeCase,
    Constant,
    cdiv,
    on_own_device,
    with_unit_last_stride,
)
from warploom.triton_kernels.common.numerics import cast, dot
from warploom.triton_kernels.common.reduce import sum_partials
from warploom.triton_kernels.coupling.affine_coupling import constants, options_of
from warploom.triton_kernels.coupling.scales import log_scale

_BLOCK_M, _BLOCK_N, _BLOCK_K = 64, 32, 32
_NUM_WARPS = 4


@triton.jit(do_not_specialize=["M"])
def _affine_coupling_linear_kernel(
    x_ptr,  # [M, C], row stride x_stride
    hidden_ptr,  # [M, K], row stride hidden_stride
    weight_ptr,  # rows of K, weight_stride apart
    bias_ptr,  # as many as rows of the weight, or None
    channels_ptr,  # [C] int32: the channel of each slot, then those that pass; None for a range
    scale_weight_ptr,  # [count] float32, or None
    z_ptr,  # [M, C], contiguous
    partials_ptr,  # [cdiv(count, BLOCK_N), M] float32, or None
    M, C, K, first, count, clamp, eps, params_scale, x_stride, hidden_stride, weight_stride,
    shift_row, raw_row, row_step,  # slot j: shift at row shift_row + j row_step of the weight
    MASK: tl.constexpr, SCALE: tl.constexpr, HAS_EPS: tl.constexpr, ADD_FIRST: tl.constexpr,
    SHIFT_SIGN: tl.constexpr, LOG_SIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """t = hidden weight[shift rows]^T + bias, u of the raw rows; z = F x + q t, or F (x + q t);
    partials[tile, m] = p sum of L over the tile's slots.

    Grid: [cdiv(M, BLOCK_M) * (cdiv(count, BLOCK_N) + cdiv(C - count, BLOCK_N))], column tiles fastest: those
    of the slots, then those of the channels that pass.
    """
    slot_tiles = tl.cdiv(count, BLOCK_N)
    tiles = slot_tiles + tl.cdiv(C - count, BLOCK_N)
    i_n = tl.program_id(0) % tiles
    rows = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    lanes = tl.arange(0, BLOCK_N)
    passes = i_n >= slot_tiles
    # Slots, or numbers of channels that pass.
    numbers = tl.where(passes, (i_n - slot_tiles) * BLOCK_N + lanes, i_n * BLOCK_N + lanes)
    columns = numbers < tl.where(passes, C - count, count)
    if MASK == "range":
        passing = tl.where(numbers < first, numbers, numbers + count)
        channels = tl.where(passes, passing, numbers + first)
    else:
        p_channels = channels_ptr + tl.where(passes, numbers + count, numbers)
        channels = tl.load(p_channels, mask=columns, other=0)
    # [BLOCK_M, BLOCK_N]
    exists = (rows < M)[:, None] & columns[None, :]
    p_x = x_ptr + rows[:, None] * x_stride + channels[None, :]
    p_z = z_ptr + rows[:, None] * C + channels[None, :]
    b_x = tl.load(p_x, mask=exists, other=0.0)
    if passes:
        tl.store(p_z, b_x, mask=exists)
    else:
        b_shift = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        b_raw = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        shift_rows = (shift_row + numbers * row_step).to(tl.int64)
        raw_rows = (raw_row + numbers * row_step).to(tl.int64)
        for start in range(0, K, BLOCK_K):
            inner = start + tl.arange(0, BLOCK_K)
            p_hidden = hidden_ptr + rows[:, None] * hidden_stride + inner[None, :]
            # [BLOCK_M, BLOCK_K], [BLOCK_K, BLOCK_N]
            b_hidden = tl.load(p_hidden, mask=(rows < M)[:, None] & (inner < K)[None, :], other=0.0)
            present = (inner < K)[:, None] & columns[None, :]
            p_weight = weight_ptr + shift_rows[None, :] * weight_stride + inner[:, None]
            b_shift = dot(b_hidden, tl.load(p_weight, mask=present, other=0.0), b_shift)
            if SCALE != "additive":
                p_weight = weight_ptr + raw_rows[None, :] * weight_stride + inner[:, None]
                b_raw = dot(b_hidden, tl.load(p_weight, mask=present, other=0.0), b_raw)
        if bias_ptr is not None:
            b_bias = tl.load(bias_ptr + shift_rows, mask=columns, other=0.0)
            b_shift += cast(b_bias, tl.float32)[None, :]
            if SCALE != "additive":
                b_bias = tl.load(bias_ptr + raw_rows, mask=columns, other=0.0)
                b_raw += cast(b_bias, tl.float32)[None, :]
        b_shift = b_shift * (params_scale * SHIFT_SIGN)
        b_wide = cast(b_x, tl.float32)
        if SCALE == "additive":
            b_z = b_wide + b_shift
        else:
            b_log, _ = log_scale(b_raw * params_scale, clamp, eps, SCALE, HAS_EPS)
            if scale_weight_ptr is not None:
                b_log = (
                    b_log * tl.load(scale_weight_ptr + numbers, mask=columns, other=0.0)[None, :]
                )
            b_factor = tl.exp(b_log * LOG_SIGN)
            b_z = b_factor * (b_wide + b_shift) if ADD_FIRST else b_factor * b_wide + b_shift
            b_sum = tl.sum(tl.where(exists, b_log, 0.0), axis=1) * LOG_SIGN
            if partials_ptr is not None:
                p_partials = partials_ptr + i_n.to(tl.int64) * M + rows
                tl.store(p_partials, b_sum, mask=rows < M)
        tl.store(p_z, cast(b_z, z_ptr.dtype.element_ty), mask=exists)


@on_own_device
def affine_coupling_linear(
    x: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
    places: torch.Tensor | None, scale_weight: torch.Tensor | None, log_det_in: torch.Tensor | None,
    mask: str, first: int, count: int, layout: str, scale: str, clamp: float, eps: float,
    params_scale: float, add_first: bool, shift_sign: int, log_sign: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """x [M, C], hidden [M, K], weight [2 count, K] and the further arguments of the op -> (z [M, C]
    contiguous, log_det [M] float32). Deterministic: partial sums per tile, added in a fixed order."""
    x, hidden, weight = (with_unit_last_stride(tensor) for tensor in (x, hidden, weight))
    m, c = x.shape
    z = torch.empty((m, c), dtype=x.dtype, device=x.device)
    log_det = x.new_zeros(m, dtype=torch.float32)
    if x.numel() > 0:
        channels = None
        if places is not None:
            order = torch.where(places < 0, c, places)
            channels = order.argsort(stable=True).to(torch.int32)
        row_step = 2 if layout == "interleaved" and scale != "additive" else 1
        other = 1 if row_step == 2 else count
        shift_row = other if layout == "scale_shift" and scale != "additive" else 0
        slot_tiles = cdiv(count, _BLOCK_N)
        partials = None
        if scale != "additive" and count > 0:
            partials = x.new_empty((slot_tiles, m), dtype=torch.float32)
        options = options_of(
            mask, first, count, scale, clamp, eps, params_scale, add_first, shift_sign, log_sign
        )
        tiles = slot_tiles + cdiv(c - count, _BLOCK_N)
        _affine_coupling_linear_kernel[(cdiv(m, _BLOCK_M) * tiles,)](
            x,
            hidden,
            weight,
            None if bias is None else bias.contiguous(),
            channels,
            None if scale_weight is None else scale_weight.contiguous(),
            z,
            partials,
            m,
            c,
            hidden.shape[1],
            first,
            count,
            options["clamp"],
            eps,
            params_scale,
            x.stride(0),
            hidden.stride(0),
            weight.stride(0),
            shift_row,
            other - shift_row,
            row_step,
            **constants(options),
            BLOCK_M=_BLOCK_M,
            BLOCK_N=_BLOCK_N,
            BLOCK_K=_BLOCK_K,
            num_warps=_NUM_WARPS,
            **COMPILE_OPTIONS,
        )
        if partials is not None:
            log_det = sum_partials(partials, torch.float32)
    return z, log_det if log_det_in is None else log_det + log_det_in


def aot_cases() -> list[AheadOfTimeCase]:
    arguments: dict[str, Constant | str] = {
        **dict.fromkeys(("x_ptr", "hidden_ptr", "weight_ptr", "bias_ptr", "z_ptr"), "*bf16:16"),
        "channels_ptr": Constant(None),
        "scale_weight_ptr": Constant(None),
        "partials_ptr": "*fp32:16",
        "M": "i32",
        **dict.fromkeys(("C", "K", "first", "count"), "i32:16"),
        **dict.fromkeys(("clamp", "eps", "params_scale"), "fp32"),
        **dict.fromkeys(("x_stride", "hidden_stride", "weight_stride", "raw_row"), "i32:16"),
        "shift_row": Constant(0),
        "row_step": Constant(1),
        "MASK": Constant("range"),
        "SCALE": Constant("exp"),
        "HAS_EPS": Constant(False),
        "ADD_FIRST": Constant(False),
        "SHIFT_SIGN": Constant(1),
        "LOG_SIGN": Constant(1),
        "BLOCK_M": Constant(_BLOCK_M),
        "BLOCK_N": Constant(_BLOCK_N),
        "BLOCK_K": Constant(_BLOCK_K),
    }
    nothing_moves = arguments | {"partials_ptr": Constant(None), "count": Constant(0)}
    return [
        AheadOfTimeCase(f"bf16 exp{name}", _affine_coupling_linear_kernel, chosen, _NUM_WARPS)
        for name, chosen in (("", arguments), (", nothing moves", nothing_moves))
    ]
