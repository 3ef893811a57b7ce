"""A scale and a shift per channel, and its gradients.

z = (x + before) * scale + after, of an inverse (x + before) / scale + after, where before and after are 0 or
q shift. Tensors [B, C, P] of any strides are seen as rows of B P places by C channels.
"""

from __future__ import annotations

from typing import NamedTuple

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
    why_not_tensors,
)
from warploom.triton_kernels.common.numerics import cast
from warploom.triton_kernels.common.reduce import sum_partials
from warploom.triton_kernels.coupling.elements import (
    as_pixels,
    empty_like_lines,
    lines_are_channels,
)

NUM_WARPS = 4
_TILE_ELEMENTS = 2048
#: Of the backward: each adds up some tiles, so that the partial sums are few.
_PROGRAMS = 2048
_FIRST_WIDE = 2**31


@triton.jit
def _places(tile, i_c, R, C, P, WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """samples and pixels [1, BLOCK_R], channels [BLOCK_C, 1], and the mask of what exists."""
    rows = tile * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
    channels = i_c * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    if WIDE:
        rows = tl.cast(tile, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
        channels = channels.to(tl.int64)
    return rows // P, rows % P, channels, (rows < R) & (channels < C)


@triton.jit
def _factors(scale_ptr, shift_ptr, channels, C, ADD_FIRST: tl.constexpr, INVERSE: tl.constexpr):
    """scale, before and after [BLOCK_C, 1]; 1, 0, 0 past the last channel."""
    scale = cast(tl.load(scale_ptr + channels, mask=channels < C, other=1.0), tl.float32)
    shift = cast(tl.load(shift_ptr + channels, mask=channels < C, other=0.0), tl.float32)
    signed = -shift if INVERSE else shift
    zero = tl.zeros_like(shift)
    return scale, signed if ADD_FIRST else zero, zero if ADD_FIRST else signed


@triton.jit(do_not_specialize=["R"])
def _channel_affine_kernel(
    x_ptr,  # [B, C, P], strides x_b, x_c, x_p
    scale_ptr,  # [C]
    shift_ptr,  # [C]
    z_ptr,  # [B, C, P], strides z_b, z_c, z_p
    R, C, P, x_b, x_c, x_p, z_b, z_c, z_p,
    ADD_FIRST: tl.constexpr, INVERSE: tl.constexpr, WIDE: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: [cdiv(B P, BLOCK_R) * cdiv(C, BLOCK_C)], channels fastest; R = B P."""
    blocks = tl.cdiv(C, BLOCK_C)
    samples, pixels, channels, exists = _places(
        tl.program_id(0) // blocks, tl.program_id(0) % blocks, R, C, P, WIDE, BLOCK_R, BLOCK_C
    )
    b_scale, b_before, b_after = _factors(scale_ptr, shift_ptr, channels, C, ADD_FIRST, INVERSE)
    # [BLOCK_C, BLOCK_R] from here on
    p_x = x_ptr + samples * x_b + pixels * x_p + channels * x_c
    b_x = cast(tl.load(p_x, mask=exists, other=0.0), tl.float32) + b_before
    b_z = (b_x / b_scale if INVERSE else b_x * b_scale) + b_after
    p_z = z_ptr + samples * z_b + pixels * z_p + channels * z_c
    tl.store(p_z, cast(b_z, z_ptr.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["R"])
def _channel_affine_backward_kernel(
    grad_ptr,  # [B, C, P], strides grad_b, grad_c, grad_p
    x_ptr,  # [B, C, P], strides x_b, x_c, x_p
    scale_ptr,  # [C]
    shift_ptr,  # [C]
    grad_x_ptr,  # [B, C, P], strides grad_x_b, grad_x_c, grad_x_p
    partials_ptr,  # [2, parts, C] float32, contiguous: of grad_scale, of grad_shift
    R, C, P, parts,
    grad_b, grad_c, grad_p, x_b, x_c, x_p, grad_x_b, grad_x_c, grad_x_p,
    ADD_FIRST: tl.constexpr, INVERSE: tl.constexpr, WIDE: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_x = g scale or g / scale; the sums of g (x + before) and of g, as shares of the gradients.

    Grid: [parts * cdiv(C, BLOCK_C)], channels fastest; part p takes the tiles p, p + parts, ...; R = B P.
    """
    blocks = tl.cdiv(C, BLOCK_C)
    i_c = tl.program_id(0) % blocks
    i_p = tl.program_id(0) // blocks
    b_products = tl.zeros([BLOCK_C, BLOCK_R], dtype=tl.float32)
    b_grads = tl.zeros([BLOCK_C, BLOCK_R], dtype=tl.float32)
    own = i_c * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    b_scale, b_before, _after = _factors(scale_ptr, shift_ptr, own, C, ADD_FIRST, INVERSE)
    for tile in range(i_p, tl.cdiv(R, BLOCK_R), parts):
        samples, pixels, channels, exists = _places(tile, i_c, R, C, P, WIDE, BLOCK_R, BLOCK_C)
        # [BLOCK_C, BLOCK_R]
        p_grad = grad_ptr + samples * grad_b + pixels * grad_p + channels * grad_c
        b_grad = cast(tl.load(p_grad, mask=exists, other=0.0), tl.float32)
        p_x = x_ptr + samples * x_b + pixels * x_p + channels * x_c
        b_x = cast(tl.load(p_x, mask=exists, other=0.0), tl.float32)
        b_products += b_grad * (b_x + b_before)
        b_grads += b_grad
        b_grad_x = b_grad / b_scale if INVERSE else b_grad * b_scale
        p_grad_x = grad_x_ptr + samples * grad_x_b + pixels * grad_x_p + channels * grad_x_c
        tl.store(p_grad_x, cast(b_grad_x, grad_x_ptr.dtype.element_ty), mask=exists)
    # [BLOCK_C, 1]
    b_product = tl.sum(b_products, axis=1, keep_dims=True)
    b_grad = tl.sum(b_grads, axis=1, keep_dims=True)
    if INVERSE:
        b_product = -(b_product / b_scale / b_scale)
        b_grad = -b_grad
    if ADD_FIRST:
        b_grad = b_grad / b_scale if INVERSE else b_grad * b_scale
    p_partials = partials_ptr + tl.cast(i_p, tl.int64) * C + own
    tl.store(p_partials, b_product, mask=own < C)
    tl.store(p_partials + tl.cast(parts, tl.int64) * C, b_grad, mask=own < C)


class _Blocks(NamedTuple):
    """A tile: pixels of one channel, or, where channels are neighbours in memory, channels of pixels."""

    rows: int
    channels: int

    @classmethod
    def of(cls, x: torch.Tensor, along_channels: bool) -> _Blocks:
        b, c, p = x.shape
        channels = min(128, next_power_of_2(c)) if along_channels else 1
        return cls(min(_TILE_ELEMENTS // channels, next_power_of_2(b * p)), channels)


def _is_wide(*tensors: torch.Tensor) -> bool:
    """Whether 32 bits cannot number what the tiles of one of them reach."""
    return any(
        sum((size - 1) * stride for size, stride in zip(t.shape, t.stride())) + _TILE_ELEMENTS
        >= _FIRST_WIDE
        for t in tensors
    )


def _constants(order: str, inverse: bool) -> dict[str, bool]:
    return {"ADD_FIRST": (order == "mul_add") == inverse, "INVERSE": inverse}


@on_own_device
def channel_affine(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, order: str, inverse: bool
) -> torch.Tensor:
    """x [B, C, *spatial], scale, shift [C] -> z in the layout of x."""
    z = empty_like_lines(x.shape, x)
    if x.numel() > 0:
        inputs, outputs = as_pixels(x), as_pixels(z)  # [B, C, P]
        b, c, p = inputs.shape
        blocks = _Blocks.of(inputs, lines_are_channels(x))
        _channel_affine_kernel[(cdiv(b * p, blocks.rows) * cdiv(c, blocks.channels),)](
            inputs,
            scale.contiguous(),
            shift.contiguous(),
            outputs,
            b * p,
            c,
            p,
            *inputs.stride(),
            *outputs.stride(),
            **_constants(order, inverse),
            WIDE=_is_wide(inputs, outputs),
            BLOCK_R=blocks.rows,
            BLOCK_C=blocks.channels,
            num_warps=NUM_WARPS,
            **COMPILE_OPTIONS,
        )
    return z


@on_own_device
def channel_affine_backward(
    grad_z: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, order: str,
    inverse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """grad_z, x [B, C, *spatial], scale, shift [C] -> (grad_x in the layout of x, grad_scale, grad_shift).

    Deterministic: partial sums per program, added in a fixed order in float32.
    """
    grad_x = empty_like_lines(x.shape, x)
    if x.numel() == 0:
        return grad_x, torch.zeros_like(scale), torch.zeros_like(shift)
    grads, inputs, outputs = as_pixels(grad_z), as_pixels(x), as_pixels(grad_x)  # [B, C, P]
    b, c, p = inputs.shape
    blocks = _Blocks.of(inputs, lines_are_channels(x))
    channel_blocks = cdiv(c, blocks.channels)
    parts = min(cdiv(b * p, blocks.rows), cdiv(_PROGRAMS, channel_blocks))
    partials = torch.empty((2, parts, c), dtype=torch.float32, device=x.device)
    _channel_affine_backward_kernel[(parts * channel_blocks,)](
        grads,
        inputs,
        scale.contiguous(),
        shift.contiguous(),
        outputs,
        partials,
        b * p,
        c,
        p,
        parts,
        *grads.stride(),
        *inputs.stride(),
        *outputs.stride(),
        **_constants(order, inverse),
        WIDE=_is_wide(grads, inputs, outputs),
        BLOCK_R=blocks.rows,
        BLOCK_C=blocks.channels,
        num_warps=NUM_WARPS,
        **COMPILE_OPTIONS,
    )
    grad_scale, grad_shift = (sum_partials(partial, scale.dtype) for partial in partials)
    return grad_x, grad_scale, grad_shift


def why_not(*args: object) -> list[str]:
    """What these kernels cannot do with the arguments of either op."""
    return why_not_tensors(*args)


def aot_cases() -> list[AheadOfTimeCase]:
    cases = []
    for channels_last in (False, True):
        line, other = ("c", "p") if channels_last else ("p", "c")

        def tensor(name: str, line: str = line, other: str = other) -> dict[str, Constant | str]:
            strides = {f"{name}_{line}": Constant(1), f"{name}_{other}": "i32:16"}
            return {f"{name}_ptr": "*bf16:16", f"{name}_b": "i32:16", **strides}

        shared: dict[str, Constant | str] = {
            **tensor("x"),
            "scale_ptr": "*fp32:16",
            "shift_ptr": "*fp32:16",
            "R": "i32",
            "C": "i32:16",
            "P": "i32:16",
            "ADD_FIRST": Constant(channels_last),
            "INVERSE": Constant(channels_last),
            "WIDE": Constant(False),
            "BLOCK_R": Constant(16 if channels_last else _TILE_ELEMENTS),
            "BLOCK_C": Constant(128 if channels_last else 1),
        }
        backward = {
            **shared,
            **tensor("grad"),
            **tensor("grad_x"),
            "partials_ptr": "*fp32:16",
            "parts": "i32",
        }
        name = "bf16 channels last, inverse" if channels_last else "bf16"
        cases += [
            AheadOfTimeCase(name, _channel_affine_kernel, shared | tensor("z"), NUM_WARPS),
            AheadOfTimeCase(name, _channel_affine_backward_kernel, backward, NUM_WARPS),
        ]
    return cases
