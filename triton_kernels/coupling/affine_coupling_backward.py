"""The gradients of an affine coupling, from its output or from its input."""

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
    why_not_tensors,
)
from warploom.triton_kernels.common.numerics import cast
from warploom.triton_kernels.coupling.affine_coupling import (
    AOT_FORMS,
    NUM_WARPS,
    aot_arguments,
    center_means,
    constants,
    options_of,
    tensor_arguments,
)
from warploom.triton_kernels.coupling.elements import (
    TILE_ELEMENTS,
    affine_maps,
    are_wide,
    as_pixels,
    blocks_of,
    empty_like_lines,
    grad_log_scale,
    lines_are_channels,
    parameters_of,
    places_of,
    slots_of,
    split,
    tile_elements,
)


@triton.jit
def _gradients(
    shift_ptr, raw_ptr, weight_ptr, means_ptr, grad_mean_ptr, grad_ptr, grad_log_det_ptr, source_ptr,
    samples, channels, pixels, moved, slots, exists, params_offsets, grad_offsets, source_offsets,
    means_offsets, clamp, eps, params_scale,
    SCALE: tl.constexpr, HAS_EPS: tl.constexpr, ADD_FIRST: tl.constexpr, SHIFT_SIGN: tl.constexpr,
    LOG_SIGN: tl.constexpr, FROM_OUTPUT: tl.constexpr,
):  # fmt: skip
    """(g, g F, grad_L, L without weight and mean, dL / du) of a tile; an absent gradient of z is 0."""
    b_mean = 0.0
    if means_ptr is not None:
        b_mean = tl.load(means_ptr + means_offsets, mask=moved, other=0.0)
    b_shift, b_factor, _, b_unweighted, b_slope = affine_maps(
        shift_ptr, raw_ptr, weight_ptr, b_mean, params_offsets, moved, slots, clamp, eps,
        params_scale, SHIFT_SIGN, LOG_SIGN, SCALE, HAS_EPS,
    )  # fmt: skip
    b_grad = tl.zeros_like(b_shift)
    b_grad_x = b_grad
    b_grad_log = b_grad
    if grad_ptr is not None:
        b_source = tl.load(source_ptr + source_offsets, mask=moved, other=0.0)
        b_grad = cast(tl.load(grad_ptr + grad_offsets, mask=exists, other=0.0), tl.float32)
        b_grad_x = b_grad * b_factor
        b_grad_log = grad_log_scale(
            b_grad, cast(b_source, tl.float32), b_shift, b_factor, ADD_FIRST, LOG_SIGN, FROM_OUTPUT
        )
    if means_ptr is not None:
        b_grad_mean = tl.load(grad_mean_ptr + means_offsets, mask=moved, other=0.0)
        if not FROM_OUTPUT:
            # It was taken of gradients with the factors of log scales that were not centred.
            b_grad_mean = b_grad_mean * tl.exp(b_mean * (-LOG_SIGN))
        b_grad_log -= b_grad_mean
    elif grad_log_det_ptr is not None:
        b_grad_log += tl.load(grad_log_det_ptr + samples, mask=exists, other=0.0) * LOG_SIGN
    return b_grad, b_grad_x, b_grad_log, b_unweighted, b_slope


@triton.jit(do_not_specialize=["B"])
def _affine_coupling_backward_kernel(
    grad_ptr,  # [B, C, P], strides grad_b, grad_c, grad_p, or None
    grad_log_det_ptr,  # [B] float32, or None
    source_ptr,  # [B, C, P], strides source_b, source_c, source_p: z where FROM_OUTPUT, else x
    shift_ptr,  # [B, k, Q], strides params_b, params_c, params_p
    raw_ptr,  # as shift, or None
    places_ptr,  # slots [C], or bytes [C, P], strides places_c, places_p, or None
    weight_ptr,  # [k] float32, or None
    means_ptr,  # float32, strides means_b, means_p, or None
    grad_means_ptr,  # as means
    grad_x_ptr,  # [B, C, P], strides grad_x_b, grad_x_c, grad_x_p
    grad_shift_ptr,  # [B, k, Q], strides grad_params_b, grad_params_c, grad_params_p
    grad_raw_ptr,  # as grad_shift, or None
    B, C, P, first, count, width, clamp, eps, params_scale,
    grad_b, grad_c, grad_p, source_b, source_c, source_p, params_b, params_c, params_p, places_c,
    places_p, means_b, means_p, grad_x_b, grad_x_c, grad_x_p, grad_params_b, grad_params_c,
    grad_params_p,
    MASK: tl.constexpr, SCALE: tl.constexpr, HAS_EPS: tl.constexpr, ADD_FIRST: tl.constexpr,
    SHIFT_SIGN: tl.constexpr, LOG_SIGN: tl.constexpr, FROM_OUTPUT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """grad_x = g F, grad_t = q g (q g F with ADD_FIRST), grad_u = grad_L dL / du.

    Grid: [cdiv(B, BLOCK_B) * cdiv(C P, BLOCK_E)], tiles fastest.
    """
    samples, channels, pixels, exists, _ = tile_elements(
        B, C, P, CHANNELS_LAST, WIDE, BLOCK_B, BLOCK_E
    )
    moved, slots, slot_pixels = parameters_of(
        places_ptr, channels, pixels, exists, first, count, width, places_c, places_p, MASK
    )
    # [BLOCK_B, BLOCK_E] from here on
    b_grad, b_grad_x, b_grad_log, _, b_slope = _gradients(
        shift_ptr, raw_ptr, weight_ptr, means_ptr, grad_means_ptr, grad_ptr, grad_log_det_ptr,
        source_ptr, samples, channels, pixels, moved, slots, exists,
        samples * params_b + slots * params_c + slot_pixels * params_p,
        samples * grad_b + channels * grad_c + pixels * grad_p,
        samples * source_b + channels * source_c + pixels * source_p,
        samples * means_b + pixels * means_p, clamp, eps, params_scale,
        SCALE, HAS_EPS, ADD_FIRST, SHIFT_SIGN, LOG_SIGN, FROM_OUTPUT,
    )  # fmt: skip
    p_grad_x = grad_x_ptr + samples * grad_x_b + channels * grad_x_c + pixels * grad_x_p
    b_out = tl.where(moved, b_grad_x, b_grad)
    tl.store(p_grad_x, cast(b_out, grad_x_ptr.dtype.element_ty), mask=exists)
    # Parameters of what passes exist for masks over pixels; their gradients are 0.
    stored = exists if MASK == "checkerboard" or MASK == "free" else moved
    offsets = samples * grad_params_b + slots * grad_params_c + slot_pixels * grad_params_p
    b_grad_shift = (b_grad_x if ADD_FIRST else b_grad) * (params_scale * SHIFT_SIGN)
    b_grad_shift = cast(tl.where(moved, b_grad_shift, 0.0), grad_shift_ptr.dtype.element_ty)
    tl.store(grad_shift_ptr + offsets, b_grad_shift, mask=stored)
    if grad_raw_ptr is not None:
        b_grad_raw = tl.where(moved, b_grad_log * b_slope * params_scale, 0.0)
        p_grad_raw = grad_raw_ptr + offsets
        tl.store(p_grad_raw, cast(b_grad_raw, grad_raw_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["B"])
def _weight_gradient_kernel(
    grad_ptr,  # as in _affine_coupling_backward_kernel, down to grad_means_ptr
    grad_log_det_ptr, source_ptr, shift_ptr, raw_ptr, places_ptr, weight_ptr, means_ptr,
    grad_means_ptr,
    grad_weight_ptr,  # [B, k] float32, contiguous
    B, C, P, first, count, width, clamp, eps, params_scale,
    grad_b, grad_c, grad_p, source_b, source_c, source_p, params_b, params_c, params_p, places_c,
    places_p, means_b, means_p,
    MASK: tl.constexpr, SCALE: tl.constexpr, HAS_EPS: tl.constexpr, ADD_FIRST: tl.constexpr,
    SHIFT_SIGN: tl.constexpr, LOG_SIGN: tl.constexpr, FROM_OUTPUT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """grad_weight = sum over the pixels of grad_L L(u), L without the weight.

    Grid: [B * cdiv(C, BLOCK_C)], the channels of a sample side by side.
    """
    channel_tiles = tl.cdiv(C, BLOCK_C)
    sample = (tl.program_id(0) // channel_tiles).to(tl.int64) + tl.zeros([1, 1], dtype=tl.int64)
    channels = tl.program_id(0) % channel_tiles * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    channels = channels.to(tl.int64)
    b_sum = tl.zeros([BLOCK_C, BLOCK_P], dtype=tl.float32)
    for start in range(0, P, BLOCK_P):
        pixels = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_P)[None, :]
        exists = (channels < C) & (pixels < P)
        moved, slots, slot_pixels = parameters_of(
            places_ptr, channels, pixels, exists, first, count, width, places_c, places_p, MASK
        )
        # [BLOCK_C, BLOCK_P]
        _, _, b_grad_log, b_unweighted, _ = _gradients(
            shift_ptr, raw_ptr, weight_ptr, means_ptr, grad_means_ptr, grad_ptr, grad_log_det_ptr,
            source_ptr, sample, channels, pixels, moved, slots, exists,
            sample * params_b + slots * params_c + slot_pixels * params_p,
            sample * grad_b + channels * grad_c + pixels * grad_p,
            sample * source_b + channels * source_c + pixels * source_p,
            sample * means_b + pixels * means_p, clamp, eps, params_scale,
            SCALE, HAS_EPS, ADD_FIRST, SHIFT_SIGN, LOG_SIGN, FROM_OUTPUT,
        )  # fmt: skip
        b_sum += tl.where(moved, b_grad_log * b_unweighted, 0.0)
    b_total = tl.sum(b_sum, axis=1, keep_dims=True)
    # [BLOCK_C, 1]
    own_slots = slots_of(places_ptr, channels, channels < C, first, MASK)
    p_total = grad_weight_ptr + sample * count + own_slots
    tl.store(p_total, b_total, mask=(channels < C) & (own_slots >= 0) & (own_slots < count))


@on_own_device
def affine_coupling_backward(
    grad_z: torch.Tensor | None, grad_log_det: torch.Tensor | None, source: torch.Tensor,
    params: torch.Tensor, raw_scale: torch.Tensor | None, places: torch.Tensor | None,
    scale_weight: torch.Tensor | None, mask: str, first: int, count: int, layout: str, scale: str,
    clamp: float, eps: float, params_scale: float, add_first: bool, shift_sign: int, log_sign: int,
    center: str, from_output: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The arguments of the op -> (grad_x, grad_params, grad_raw_scale, grad_weight [B, k] float32).

    Deterministic: each gradient is written once, sums are added in a fixed order in float32.
    """
    grad_x = empty_like_lines(source.shape, source)
    grad_params = empty_like_lines(params.shape, source)
    grad_raw = None if raw_scale is None else empty_like_lines(raw_scale.shape, source)
    weights = (0,) if scale_weight is None else (source.shape[0], count)
    grad_weight = source.new_zeros(weights, dtype=torch.float32)
    if source.numel() > 0:
        x = as_pixels(source)  # [B, C, P]
        grad = None if grad_z is None else as_pixels(grad_z)  # [B, C, P]
        b, c, p = x.shape
        halves = split(params, raw_scale, layout, scale)
        grad_halves = split(grad_params, grad_raw, layout, scale)
        slots = places_of(places, mask)
        weight = None if scale_weight is None else scale_weight.contiguous()
        options = options_of(
            mask, first, count, scale, clamp, eps, params_scale, add_first, shift_sign, log_sign
        )
        options["from_output"] = from_output
        means = None
        if center != "none":
            means = center_means(halves, slots, weight, grad, x, options, center)
        pixels_of_grad = as_pixels(grad_x)
        inputs = (
            grad,
            None if grad_log_det is None else grad_log_det.contiguous(),
            x,
            halves.shift,
            halves.raw_scale,
            slots,
            weight,
            None if means is None else means[0],
            None if means is None else means[1],
        )
        scalars = (
            b,
            c,
            p,
            first,
            count,
            source.shape[-1],
            options["clamp"],
            eps,
            params_scale,
            *((0, 0, 0) if grad is None else grad.stride()),
            *x.stride(),
            *halves.shift.stride(),
            *(slots.stride() if slots is not None and mask == "free" else (0, 0)),
            *((0, 0) if means is None else means.stride()[1:]),
        )
        shared = {
            **constants(options),
            "FROM_OUTPUT": from_output,
            "num_warps": NUM_WARPS,
            **COMPILE_OPTIONS,
        }
        blocks = blocks_of(x)
        _affine_coupling_backward_kernel[(blocks.programs(x),)](
            *inputs,
            pixels_of_grad,
            grad_halves.shift,
            grad_halves.raw_scale,
            *scalars,
            *pixels_of_grad.stride(),
            *grad_halves.shift.stride(),
            CHANNELS_LAST=lines_are_channels(source),
            WIDE=are_wide(x, grad, halves.shift, pixels_of_grad, grad_halves.shift),
            BLOCK_B=blocks.samples,
            BLOCK_E=blocks.elements,
            **shared,
        )
        if scale_weight is not None:
            block_p = min(TILE_ELEMENTS // 4, next_power_of_2(p))
            block_c = min(TILE_ELEMENTS // block_p, next_power_of_2(c))
            _weight_gradient_kernel[(b * cdiv(c, block_c),)](
                *inputs, grad_weight, *scalars, BLOCK_C=block_c, BLOCK_P=block_p, **shared
            )
    empty = params.new_empty(0)
    return grad_x, grad_params, empty if grad_raw is None else grad_raw, grad_weight


def why_not(*args: object) -> list[str]:
    """What these kernels cannot do with the arguments of any op of this module."""
    return why_not_tensors(*args)


def aot_cases() -> list[AheadOfTimeCase]:
    cases = []
    for mask, scale, channels_last in AOT_FORMS:
        shared = {
            **aot_arguments(mask, scale, channels_last),
            **tensor_arguments("grad", channels_last),
            **tensor_arguments("source", channels_last),
            "grad_log_det_ptr": "*fp32:16",
            "grad_means_ptr": Constant(None),
            "FROM_OUTPUT": Constant(True),
        }
        grad_params = tensor_arguments("grad_params", channels_last)
        grad_shift = grad_params.pop("grad_params_ptr")
        backward = {
            **shared,
            **tensor_arguments("grad_x", channels_last),
            **grad_params,
            "grad_shift_ptr": grad_shift,
            "grad_raw_ptr": Constant(None) if scale == "additive" else "*bf16:16",
        }
        name = f"bf16 {mask} {scale}"
        cases.append(AheadOfTimeCase(name, _affine_coupling_backward_kernel, backward, NUM_WARPS))
        if scale == "tanh":
            weight = {
                **shared,
                "grad_weight_ptr": "*fp32:16",
                "BLOCK_C": Constant(4),
                "BLOCK_P": Constant(256),
            }
            weight = {key: weight[key] for key in _weight_gradient_kernel.arg_names}
            cases.append(AheadOfTimeCase(name, _weight_gradient_kernel, weight, NUM_WARPS))
    return cases
