"""Rational-quadratic splines (Durkan et al. 2019) and their gradients: a row of a tile is an element.

The formulas, their derivation and that of the gradients stand in csrc/coupling/spline_point.h.
"""

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
    next_power_of_2,
    on_own_device,
    why_not_tensors,
)
from warploom.triton_kernels.common.numerics import cast
from warploom.triton_kernels.coupling.spline_bins import find, offsets, point, to_unit

_TILE_ELEMENTS = 2048
_NUM_WARPS = 4


@triton.jit(do_not_specialize=["count"])
def _spline_kernel(
    x_ptr,  # [samples, sample_stride]
    logits_ptr,  # [runs, num_logits, length] or [runs, length, num_logits]
    y_ptr,  # as x
    log_det_ptr,  # [runs, length] float32
    count,
    length,
    runs_per_sample,
    sample_stride,
    first,
    num_logits,
    element_stride,
    stride,  # between the logits of an element
    low,
    high,
    input_size,
    ratio,
    min_width,
    min_height,
    free_width,
    free_height,
    scale,
    softness,
    min_derivative,
    boundary_logit,
    derivative_softness,
    output_low,
    output_size,
    K: tl.constexpr,
    KP: tl.constexpr,
    TAILS: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y and log_det of the transformed elements. Grid: [cdiv(runs * length, BLOCK)]."""
    layout = (count, length, runs_per_sample, sample_stride, first, num_logits, element_stride)
    bounds = (low, high, input_size, ratio)
    sizes = (min_width, min_height, free_width, free_height, scale, softness)
    numbers = (bounds, sizes, (min_derivative, boundary_logit, derivative_softness))
    index, element, rows, mask = offsets(layout, BLOCK)
    b_x, inside, _, found, t, _, _, _ = find(
        x_ptr, logits_ptr, element, rows, mask, stride, numbers, K, KP, TAILS, EXPONENTIAL, INVERSE
    )
    x0, w, y0, h, s, _, _ = found
    _, denominator, slopes, r = point(found, t)
    b_log_det = tl.log(slopes * (s / denominator) * (s / denominator))
    if INVERSE:
        b_y = output_low + output_size * to_unit(x0 + w * t)
        b_log_det = -b_log_det
    else:
        b_y = output_low + output_size * to_unit(y0 + h * r)
    if TAILS != "none":
        b_y = tl.where(inside, b_y, b_x)
        b_log_det = tl.where(inside, b_log_det, 0.0)
    tl.store(y_ptr + element, cast(b_y, y_ptr.dtype.element_ty), mask=mask)
    tl.store(log_det_ptr + index, b_log_det, mask=mask)


@triton.jit
def _grad_axis(axis, chosen, of_start, of_size, KP: tl.constexpr):
    """[BLOCK, KP], through the softmax: a start is the sum of the probabilities before it."""
    probabilities, slopes, before, live = axis
    k = tl.arange(0, KP)[None, :]
    mean = of_start * before + of_size * live
    upstream = tl.where(k == chosen[:, None], of_size[:, None], 0.0)
    upstream = tl.where(k < chosen[:, None], of_start[:, None], upstream)
    return probabilities * (upstream - mean[:, None]) * slopes


@triton.jit
def _store_rows(grads_ptr, rows, mask, stride, b_grads, kept, K: tl.constexpr, KP: tl.constexpr):
    """b_grads [BLOCK, KP], zeros where an element is not kept."""
    k = tl.arange(0, KP)[None, :]
    b_grads = cast(tl.where(kept[:, None], b_grads, 0.0), grads_ptr.dtype.element_ty)
    tl.store(grads_ptr + rows[:, None] + k * stride, b_grads, mask=mask[:, None] & (k < K))


@triton.jit(do_not_specialize=["count"])
def _spline_backward_kernel(
    grad_y_ptr,  # as x
    grad_log_det_ptr,  # [runs, length] float32
    x_ptr,  # [samples, sample_stride]
    logits_ptr,  # [runs, num_logits, length] or [runs, length, num_logits]
    grad_x_ptr,  # as x
    grads_ptr,  # as logits
    count,
    length,
    runs_per_sample,
    sample_stride,
    first,
    num_logits,
    element_stride,
    stride,  # between the logits of an element
    low,
    high,
    input_size,
    ratio,
    min_width,
    min_height,
    free_width,
    free_height,
    scale,
    softness,
    min_derivative,
    boundary_logit,
    derivative_softness,
    output_size,
    K: tl.constexpr,
    KP: tl.constexpr,
    NUM_D: tl.constexpr,
    DP: tl.constexpr,
    TAILS: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    INVERSE: tl.constexpr,
    HAS_GRAD_LOG_DET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of the transformed elements and of their logits. Grid: [cdiv(runs * length, BLOCK)]."""
    layout = (count, length, runs_per_sample, sample_stride, first, num_logits, element_stride)
    bounds = (low, high, input_size, ratio)
    sizes = (min_width, min_height, free_width, free_height, scale, softness)
    numbers = (bounds, sizes, (min_derivative, boundary_logit, derivative_softness))
    index, element, rows, mask = offsets(layout, BLOCK)
    _, inside, chosen, found, t, axis_w, axis_h, derivatives = find(
        x_ptr, logits_ptr, element, rows, mask, stride, numbers, K, KP, TAILS, EXPONENTIAL, INVERSE
    )
    _, w, _, h, s, d0, d1 = found
    q, denominator, slopes, r = point(found, t)
    b_upstream = cast(tl.load(grad_y_ptr + element, mask=mask, other=0.0), tl.float32)
    g_l = tl.zeros([BLOCK], dtype=tl.float32)
    if HAS_GRAD_LOG_DET:
        g_l = tl.load(grad_log_det_ptr + index, mask=mask, other=0.0)
    output = b_upstream * output_size
    back, tilt, wide = 1.0 - t, 1.0 - 2.0 * t, 1.0 - 2.0 * q
    h_r_t = h * s * slopes / (denominator * denominator)
    l_t = 2.0 * ((d1 * t + s * tilt - d0 * back) / slopes)
    l_t -= 2.0 * ((d0 + d1 - 2.0 * s) * tilt / denominator)
    if INVERSE:
        g_position = (output * w - g_l * l_t) / h_r_t
        g_x0, g_y0, g_l = output, -g_position, -g_l
    else:
        g_position = (output * h_r_t + g_l * l_t) / w
        g_x0, g_y0 = -g_position, output
    scaled = g_y0 * h / denominator
    g_s = scaled * s * (t * t - r * wide)  # times s
    g_s += g_l * 2.0 * (1.0 + s * (q / slopes - wide / denominator))
    g_w, g_h = g_x0 * t - g_s / w, g_y0 * r + g_s / h
    g_d0 = scaled * q * (1.0 - r) + g_l * (back * back / slopes - 2.0 * q / denominator)
    g_d1 = -scaled * q * r + g_l * (t * t / slopes - 2.0 * q / denominator)
    b_grad_x = g_position / input_size
    if TAILS == "none":
        kept = mask
        b_grad_x = tl.where(inside, b_grad_x, 0.0)
    else:
        kept = inside
        b_grad_x = tl.where(inside, b_grad_x, b_upstream)
    tl.store(grad_x_ptr + element, cast(b_grad_x, grad_x_ptr.dtype.element_ty), mask=mask)
    b_grads = _grad_axis(axis_w, chosen, g_x0 * free_width, g_w * free_width, KP)
    _store_rows(grads_ptr, rows, mask, stride, b_grads, kept, K, KP)
    b_grads = _grad_axis(axis_h, chosen, g_y0 * free_height, g_h * free_height, KP)
    _store_rows(grads_ptr, rows + K * stride, mask, stride, b_grads, kept, K, KP)
    if NUM_D > 0:
        slope0, place0, slope1, place1 = derivatives
        k = tl.arange(0, DP)[None, :]
        b_grads = tl.where(k == place0[:, None], (g_d0 * slope0)[:, None], 0.0)
        b_grads += tl.where(k == place1[:, None], (g_d1 * slope1)[:, None], 0.0)
        _store_rows(grads_ptr, rows + 2 * K * stride, mask, stride, b_grads, kept, NUM_D, DP)


def _prepare(
    x: torch.Tensor, params: torch.Tensor, options: tuple[Any, ...]
) -> tuple[dict[str, Any], tuple[float, float]]:
    """What both kernels are given beside their tensors, and the output's interval."""
    first, bins, params_last, tails, left, right, bottom, top, *rest = options
    min_width, min_height, min_derivative, scale, convention, inverse = rest
    samples, channels, inner = x.shape
    transformed = params.shape[1]
    last = params_last or inner == 1
    num_logits = params.shape[3 if params_last else 2]
    runs_per_sample, length = (1, transformed * inner) if last else (transformed, inner)
    exponential = convention == "zuko"
    softness = -1 / math.log(min_derivative) if exponential else 0.0
    boundary_logit = 0.0 if exponential else math.log(math.expm1(1 - min_derivative))
    low, high, low_out, high_out = left, right, bottom, top
    if inverse:
        low, high, low_out, high_out = bottom, top, left, right
    padded = next_power_of_2(bins)
    arguments = {
        "count": samples * runs_per_sample * length,
        "length": length,
        "runs_per_sample": runs_per_sample,
        "sample_stride": channels * inner,
        "first": first * inner,
        "num_logits": num_logits,
        "element_stride": num_logits if last else 1,
        "stride": 1 if last else inner,
        "low": low,
        "high": high,
        "input_size": high - low,
        "ratio": (top - bottom) / (right - left),
        "min_width": min_width,
        "min_height": min_height,
        "free_width": 1 - bins * min_width,
        "free_height": 1 - bins * min_height,
        "scale": scale,
        "softness": 2 * softness,
        "min_derivative": min_derivative,
        "boundary_logit": boundary_logit,
        "derivative_softness": softness,
        "K": bins,
        "KP": padded,
        "TAILS": tails,
        "EXPONENTIAL": exponential,
        "INVERSE": inverse,
        "BLOCK": max(16, _TILE_ELEMENTS // max(8, padded)),
        "num_warps": _NUM_WARPS,
        **COMPILE_OPTIONS,
    }
    return arguments, (low_out, high_out - low_out)


def _grid(arguments: dict[str, Any]) -> tuple[int]:
    return (cdiv(arguments["count"], arguments["BLOCK"]),)


def _with_others(source: torch.Tensor, first: int, transformed: int) -> torch.Tensor:
    """An empty tensor like `source` [A, C, S] with the channels that are not transformed."""
    out = torch.empty(source.shape, dtype=source.dtype, device=source.device)
    for others in (slice(first), slice(first + transformed, None)):
        out[:, others] = source[:, others]
    return out


@on_own_device
def rational_quadratic_spline(
    x: torch.Tensor, params: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [A, C, S], params [A, k, M, S] or [A, k, S, M] -> y like x, log_det [A, k, S] float32."""
    x, params = x.contiguous(), params.contiguous()
    y = _with_others(x, options[0], params.shape[1])
    log_det = x.new_empty((x.shape[0], params.shape[1], x.shape[2]), dtype=torch.float32)
    if log_det.numel() == 0:
        return y, log_det
    arguments, (low, size) = _prepare(x, params, options)
    _spline_kernel[_grid(arguments)](
        x, params, y, log_det, output_low=low, output_size=size, **arguments
    )
    return y, log_det


def rational_quadratic_spline_backward(
    grad_y: torch.Tensor | None,
    grad_log_det: torch.Tensor | None,
    x: torch.Tensor,
    params: torch.Tensor,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """grad_x like x and grad_params like params, contiguous; an absent upstream gradient is 0."""
    return _backward(x, params, grad_y, grad_log_det, options)


@on_own_device
def _backward(
    x: torch.Tensor,
    params: torch.Tensor,
    grad_y: torch.Tensor | None,
    grad_log_det: torch.Tensor | None,
    options: tuple[Any, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    x, params = x.contiguous(), params.contiguous()
    upstream = torch.zeros_like(x) if grad_y is None else grad_y.contiguous()
    grad_x = _with_others(upstream, options[0], params.shape[1])
    grads = torch.empty_like(params)
    if grads.numel() == 0:
        return grad_x, grads
    arguments, (_, size) = _prepare(x, params, options)
    num_d = arguments["num_logits"] - 2 * arguments["K"]
    _spline_backward_kernel[_grid(arguments)](
        upstream,
        x if grad_log_det is None else grad_log_det.contiguous(),
        x,
        params,
        grad_x,
        grads,
        output_size=size,
        NUM_D=num_d,
        DP=next_power_of_2(num_d),
        HAS_GRAD_LOG_DET=grad_log_det is not None,
        **arguments,
    )
    return grad_x, grads


def why_not(*args: object) -> list[str]:
    """What these kernels cannot do with the arguments of either op."""
    return why_not_tensors(*args)


def aot_cases() -> list[AheadOfTimeCase]:
    """The half of [64, 96, 64, 64], bfloat16, and its conditioner's output as it comes."""
    x = torch.empty(64, 96, 4096, dtype=torch.bfloat16, device="meta")
    params = torch.empty(64, 48, 23, 4096, dtype=torch.bfloat16, device="meta")
    interval = (-3.0, 3.0, -3.0, 3.0)
    cases = []
    for convention, inverse in (("nflows", False), ("zuko", True)):
        options = (48, 8, False, "linear", *interval, 1e-3, 1e-3, 1e-3, 1.0, convention, inverse)
        arguments, _ = _prepare(x, params, options)
        shared: dict[str, Constant | str] = {
            "x_ptr": "*bf16:16",
            "logits_ptr": "*bf16:16",
            "count": "i32",
            "output_size": "fp32",
        }
        for name, value in arguments.items():
            if name in ("num_warps", "count", *COMPILE_OPTIONS):
                continue
            if name.isupper():
                shared[name] = Constant(value)
            elif isinstance(value, float):
                shared[name] = "fp32"
            else:
                shared[name] = Constant(1) if value == 1 else "i32:16" if value % 16 == 0 else "i32"
        forward: dict[str, Constant | str] = {
            "y_ptr": "*bf16:16",
            "log_det_ptr": "*fp32:16",
            "output_low": "fp32",
        }
        backward: dict[str, Constant | str] = {
            "grad_y_ptr": "*bf16:16",
            "grad_log_det_ptr": "*fp32:16",
            "grad_x_ptr": "*bf16:16",
            "grads_ptr": "*bf16:16",
            "NUM_D": Constant(7),
            "DP": Constant(8),
            "HAS_GRAD_LOG_DET": Constant(True),
        }
        name = f"bf16 {convention}{' inverse' if inverse else ''}"
        cases += [
            AheadOfTimeCase(name, _spline_kernel, shared | forward, _NUM_WARPS),
            AheadOfTimeCase(name, _spline_backward_kernel, shared | backward, _NUM_WARPS),
        ]
    return cases
