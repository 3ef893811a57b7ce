"""Affine coupling (Dinh, Sohl-Dickstein and Bengio 2017, equations 4 to 8), forward."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from warploom.triton_kernels.common.launch import (
    COMPILE_OPTIONS,
    AheadOfTimeCase,
    Constant,
    cdiv,
    on_own_device,
    why_not_tensors,
)
from warploom.triton_kernels.common.numerics import cast
from warploom.triton_kernels.common.reduce import sum_partials
from warploom.triton_kernels.coupling.elements import (
    Halves,
    affine_maps,
    are_wide,
    as_pixels,
    blocks_of,
    empty_like_lines,
    grad_log_scale,
    lines_are_channels,
    parameters_of,
    places_of,
    split,
    tile_elements,
)

NUM_WARPS = 4
_CENTER_ROWS = 128


@triton.jit(do_not_specialize=["B"])
def _affine_coupling_kernel(
    x_ptr,  # [B, C, P], strides x_b, x_c, x_p
    shift_ptr,  # [B, k, Q], strides params_b, params_c, params_p
    raw_ptr,  # as shift, or None
    places_ptr,  # slots [C], or bytes [C, P], strides places_c, places_p, or None
    weight_ptr,  # [k] float32, or None
    means_ptr,  # float32, strides means_b, means_p, or None
    z_ptr,  # [B, C, P], strides z_b, z_c, z_p
    partials_ptr,  # [tiles, B] float32, or None
    B, C, P, first, count, width, clamp, eps, params_scale,
    x_b, x_c, x_p, params_b, params_c, params_p, places_c, places_p, means_b, means_p, z_b, z_c, z_p,
    MASK: tl.constexpr, SCALE: tl.constexpr, HAS_EPS: tl.constexpr, ADD_FIRST: tl.constexpr,
    SHIFT_SIGN: tl.constexpr, LOG_SIGN: tl.constexpr, IN_PLACE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """z = F x + q t, or F (x + q t); partials[tile, b] = p sum of L over the tile.

    Grid: [cdiv(B, BLOCK_B) * cdiv(C P, BLOCK_E)], tiles fastest. IN_PLACE: z is x, what passes stays unread.
    """
    samples, channels, pixels, exists, i_t = tile_elements(
        B, C, P, CHANNELS_LAST, WIDE, BLOCK_B, BLOCK_E
    )
    moved, slots, slot_pixels = parameters_of(
        places_ptr, channels, pixels, exists, first, count, width, places_c, places_p, MASK
    )
    # [BLOCK_B, BLOCK_E] from here on
    touched = moved if IN_PLACE else exists
    b_mean = 0.0
    if means_ptr is not None:
        b_mean = tl.load(means_ptr + samples * means_b + pixels * means_p, mask=moved, other=0.0)
    offsets = samples * params_b + slots * params_c + slot_pixels * params_p
    b_shift, b_factor, b_log, _, _ = affine_maps(
        shift_ptr, raw_ptr, weight_ptr, b_mean, offsets, moved, slots, clamp, eps, params_scale,
        SHIFT_SIGN, LOG_SIGN, SCALE, HAS_EPS,
    )  # fmt: skip
    b_x = tl.load(x_ptr + samples * x_b + channels * x_c + pixels * x_p, mask=touched, other=0.0)
    b_x = cast(b_x, tl.float32)
    b_z = b_factor * (b_x + b_shift) if ADD_FIRST else b_factor * b_x + b_shift
    p_z = z_ptr + samples * z_b + channels * z_c + pixels * z_p
    tl.store(p_z, cast(tl.where(moved, b_z, b_x), z_ptr.dtype.element_ty), mask=touched)
    if partials_ptr is not None:
        b_sum = tl.sum(tl.where(moved, b_log, 0.0), axis=1, keep_dims=True) * LOG_SIGN
        tl.store(partials_ptr + i_t.to(tl.int64) * B + samples, b_sum, mask=samples < B)


@triton.jit(do_not_specialize=["B"])
def _center_kernel(
    shift_ptr,  # [B, k, P], strides params_b, params_c, params_p
    raw_ptr,  # as shift
    places_ptr,  # slots [C], or None
    weight_ptr,  # [k] float32, or None
    grad_ptr,  # [B, C, P], strides grad_b, grad_c, grad_p, or None
    source_ptr,  # [B, C, P], strides source_b, source_c, source_p, or None
    means_ptr,  # [2, B, P] float32, contiguous
    B, C, P, first, count, clamp, eps, params_scale,
    params_b, params_c, params_p, grad_b, grad_c, grad_p, source_b, source_c, source_p,
    MASK: tl.constexpr, SCALE: tl.constexpr, HAS_EPS: tl.constexpr, ADD_FIRST: tl.constexpr,
    SHIFT_SIGN: tl.constexpr, LOG_SIGN: tl.constexpr, FROM_OUTPUT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The means over the transformed channels of each pixel, of L and, beside grad_ptr, of its gradient.

    Grid: [cdiv(B P, BLOCK)].
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = rows < tl.cast(B, tl.int64) * P
    samples = rows // P
    pixels = rows % P
    b_logs = tl.zeros([BLOCK], dtype=tl.float32)
    b_grads = tl.zeros([BLOCK], dtype=tl.float32)
    for channel in range(C):
        i_c = tl.cast(channel, tl.int64)
        moved, slot, _slot_pixels = parameters_of(
            places_ptr, i_c, pixels, i_c < C, first, count, 1, 0, 0, MASK
        )
        if moved:
            slots = tl.zeros([BLOCK], dtype=tl.int64) + slot
            offsets = samples * params_b + slots * params_c + pixels * params_p
            b_shift, b_factor, b_log, _unweighted, _slope = affine_maps(
                shift_ptr, raw_ptr, weight_ptr, 0.0, offsets, exists, slots, clamp, eps, params_scale,
                SHIFT_SIGN, LOG_SIGN, SCALE, HAS_EPS,
            )  # fmt: skip
            b_logs += b_log
            if grad_ptr is not None:
                p_grad = grad_ptr + samples * grad_b + i_c * grad_c + pixels * grad_p
                p_source = source_ptr + samples * source_b + i_c * source_c + pixels * source_p
                b_grad = cast(tl.load(p_grad, mask=exists, other=0.0), tl.float32)
                b_source = cast(tl.load(p_source, mask=exists, other=0.0), tl.float32)
                b_grads += grad_log_scale(
                    b_grad, b_source, b_shift, b_factor, ADD_FIRST, LOG_SIGN, FROM_OUTPUT
                )
    tl.store(means_ptr + rows, b_logs / count, mask=exists)
    tl.store(means_ptr + tl.cast(B, tl.int64) * P + rows, b_grads / count, mask=exists)


def center_means(
    halves: Halves, places: torch.Tensor | None, weight: torch.Tensor | None,
    grad: torch.Tensor | None, source: torch.Tensor, options: dict[str, Any], center: str,
) -> torch.Tensor:  # fmt: skip
    """[2, B, P] float32, for center "sample" [2, B, 1] expanded: the means of L and of its gradient."""
    b, c, p = source.shape
    means = source.new_zeros((2, b, p), dtype=torch.float32)
    if means.numel() == 0 or options["count"] == 0 or halves.raw_scale is None:
        return means
    _center_kernel[(cdiv(b * p, _CENTER_ROWS),)](
        halves.shift,
        halves.raw_scale,
        places,
        weight,
        grad,
        source,
        means,
        b,
        c,
        p,
        *(options[name] for name in ("first", "count", "clamp", "eps", "params_scale")),
        *halves.shift.stride(),
        *((0, 0, 0) if grad is None else grad.stride()),
        *source.stride(),
        **constants(options),
        FROM_OUTPUT=options.get("from_output", True),
        BLOCK=_CENTER_ROWS,
        num_warps=NUM_WARPS,
        **COMPILE_OPTIONS,
    )
    return means if center == "channel" else means.mean(2, keepdim=True).expand(2, b, p)


def options_of(
    mask: str, first: int, count: int, scale: str, clamp: float, eps: float, params_scale: float,
    add_first: bool, shift_sign: int, log_sign: int,
) -> dict[str, Any]:  # fmt: skip
    """What the kernels take of an op's scalars; `clamp` of softclip becomes its bound."""
    bound = abs(math.log(clamp)) if scale == "softclip" else clamp
    return locals() | {"clamp": bound}


def constants(options: dict[str, Any]) -> dict[str, Any]:
    return {
        "MASK": options["mask"],
        "SCALE": options["scale"],
        "HAS_EPS": options["eps"] != 0.0,
        "ADD_FIRST": options["add_first"],
        "SHIFT_SIGN": options["shift_sign"],
        "LOG_SIGN": options["log_sign"],
    }


def _run(
    z: torch.Tensor, x: torch.Tensor, params: torch.Tensor, raw_scale: torch.Tensor | None,
    places: torch.Tensor | None, scale_weight: torch.Tensor | None, log_det_in: torch.Tensor | None,
    mask: str, first: int, count: int, layout: str, scale: str, clamp: float, eps: float,
    params_scale: float, add_first: bool, shift_sign: int, log_sign: int, center: str,
) -> torch.Tensor:  # fmt: skip
    """Writes z; returns log_det [B] float32."""
    channels_last = lines_are_channels(x)
    target, x = as_pixels(z), as_pixels(x)  # [B, C, P]
    b, c, p = x.shape
    log_det = x.new_zeros(b, dtype=torch.float32)
    if x.numel() > 0:
        halves = split(params, raw_scale, layout, scale)
        slots = places_of(places, mask)
        weight = None if scale_weight is None else scale_weight.contiguous()
        options = options_of(
            mask, first, count, scale, clamp, eps, params_scale, add_first, shift_sign, log_sign
        )
        means = None
        if center != "none":
            means = center_means(halves, slots, weight, None, x, options, center)[0]
        blocks = blocks_of(x)
        partials = None
        if center == "none" and scale != "additive":
            partials = x.new_empty((blocks.tiles(x), b), dtype=torch.float32)
        _affine_coupling_kernel[(blocks.programs(x),)](
            x,
            halves.shift,
            halves.raw_scale,
            slots,
            weight,
            means,
            target,
            partials,
            b,
            c,
            p,
            first,
            count,
            z.shape[-1],
            options["clamp"],
            eps,
            params_scale,
            *x.stride(),
            *halves.shift.stride(),
            *(slots.stride() if slots is not None and mask == "free" else (0, 0)),
            *((0, 0) if means is None else means.stride()),
            *target.stride(),
            **constants(options),
            IN_PLACE=z.data_ptr() == x.data_ptr(),
            CHANNELS_LAST=channels_last,
            WIDE=are_wide(x, target, halves.shift),
            BLOCK_B=blocks.samples,
            BLOCK_E=blocks.elements,
            num_warps=NUM_WARPS,
            **COMPILE_OPTIONS,
        )
        if partials is not None:
            log_det = sum_partials(partials, torch.float32)
    return log_det if log_det_in is None else log_det + log_det_in


@on_own_device
def affine_coupling(x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B, C, *spatial] and the further arguments of the op -> (z in the layout of x, log_det [B] float32).

    Deterministic: partial sums per tile, added in a fixed order in float32.
    """
    z = empty_like_lines(x.shape, x)
    return z, _run(z, x, *rest)


@on_own_device
def affine_coupling_out(out: torch.Tensor, x: torch.Tensor, *rest: Any) -> torch.Tensor:
    """The same with z put into `out`, which may be x; returns log_det."""
    pixels = as_pixels(out)
    if pixels.data_ptr() == out.data_ptr():
        return _run(out, x, *rest)
    z = empty_like_lines(x.shape, x)
    log_det = _run(z, x, *rest)
    out.copy_(z)
    return log_det


def why_not(*args: object) -> list[str]:
    """What these kernels cannot do with the arguments of any op of this module."""
    return why_not_tensors(*args)


def aot_arguments(mask: str, scale: str, channels_last: bool) -> dict[str, Constant | str]:
    """Of both directions, for bfloat16 images with vectors along their lines."""
    line, other = ("c", "p") if channels_last else ("p", "c")
    arguments: dict[str, Constant | str] = {
        "shift_ptr": "*bf16:16",
        "raw_ptr": Constant(None) if scale == "additive" else "*bf16:16",
        "places_ptr": {"slots": "*i32:16", "free": "*u8:16"}.get(mask, Constant(None)),
        "weight_ptr": "*fp32:16" if scale == "tanh" else Constant(None),
        "means_ptr": Constant(None),
        "B": "i32",
        **dict.fromkeys(("C", "P", "first", "count", "width"), "i32:16"),
        **dict.fromkeys(("clamp", "eps", "params_scale"), "fp32"),
        **dict.fromkeys(("means_b", "means_p"), Constant(0)),
        "MASK": Constant(mask),
        "SCALE": Constant(scale),
        "HAS_EPS": Constant(False),
        "ADD_FIRST": Constant(False),
        "SHIFT_SIGN": Constant(1),
        "LOG_SIGN": Constant(1),
        "CHANNELS_LAST": Constant(channels_last),
        "WIDE": Constant(False),
        "BLOCK_B": Constant(1),
        "BLOCK_E": Constant(1024),
    }
    for name in ("params", "places"):
        arguments |= {f"{name}_{line}": Constant(1), f"{name}_{other}": "i32:16"}
    return arguments | {"params_b": "i32:16"}


def tensor_arguments(name: str, channels_last: bool) -> dict[str, Constant | str]:
    """Pointer and strides of a bfloat16 tensor [B, C, P]."""
    line, other = ("c", "p") if channels_last else ("p", "c")
    return {
        f"{name}_ptr": "*bf16:16",
        f"{name}_b": "i32:16",
        f"{name}_{line}": Constant(1),
        f"{name}_{other}": "i32:16",
    }


#: Every mask and every scale once, in both layouts of memory.
AOT_FORMS = (
    ("range", "exp", False),
    ("range", "sigmoid", True),
    ("slots", "tanh", False),
    ("free", "atan", False),
    ("checkerboard", "softclip", True),
    ("checkerboard_packed", "centered_sigmoid", False),
    ("range", "additive", False),
)


def aot_cases() -> list[AheadOfTimeCase]:
    cases = []
    for mask, scale, channels_last in AOT_FORMS:
        arguments = {
            **aot_arguments(mask, scale, channels_last),
            **tensor_arguments("x", channels_last),
            **tensor_arguments("z", channels_last),
            "partials_ptr": Constant(None) if scale == "additive" else "*fp32:16",
            "IN_PLACE": Constant(False),
        }
        name = f"bf16 {mask} {scale}"
        cases.append(AheadOfTimeCase(name, _affine_coupling_kernel, arguments, NUM_WARPS))
    center = {
        **aot_arguments("range", "atan", False),
        **tensor_arguments("grad", False),
        **tensor_arguments("source", False),
        "means_ptr": "*fp32:16",
        "FROM_OUTPUT": Constant(True),
        "BLOCK": Constant(_CENTER_ROWS),
    }
    center = {name: center[name] for name in _center_kernel.arg_names}
    return [*cases, AheadOfTimeCase("bf16 range atan", _center_kernel, center, NUM_WARPS)]
