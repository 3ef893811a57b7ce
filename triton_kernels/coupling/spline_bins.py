"""The bin of every element of a rational-quadratic spline: a row of a tile is an element.

The formulas and their derivation stand in csrc/coupling/spline_point.h.
"""

from __future__ import annotations

import triton
import triton.language as tl
from warploom.triton_kernels.common.numerics import cast


@triton.jit
def offsets(layout, BLOCK: tl.constexpr):
    """Of the program's elements: in log_det, in x and in the logits, and which there are; [BLOCK] each."""
    count, length, runs_per_sample, sample_stride, first, num_logits, element_stride = layout
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    run = index // length
    within = index % length
    element = run // runs_per_sample * sample_stride + first
    element += run % runs_per_sample * length + within
    return index, element, run * length * num_logits + within * element_stride, index < count


@triton.jit
def _softmax(logits_ptr, offsets, mask, stride, scale, softness, K: tl.constexpr, KP: tl.constexpr):
    """Of the logits of one axis, and the slopes of the soft limit; [BLOCK, KP]."""
    k = tl.arange(0, KP)[None, :]
    there = mask[:, None] & (k < K)
    b_logits = tl.load(logits_ptr + offsets[:, None] + k * stride, mask=there, other=0.0)
    b_logits = cast(b_logits, tl.float32) * scale
    b_factor = 1.0 / (1.0 + softness * tl.abs(b_logits))
    b_limited = tl.where(k < K, b_logits * b_factor, float("-inf"))
    b_weights = tl.exp(b_limited - tl.max(b_limited, 1)[:, None])
    return b_weights / tl.sum(b_weights, 1)[:, None], scale * b_factor * b_factor


@triton.jit
def _derivative(
    logits_ptr,
    offsets,
    mask,
    stride,
    knot,
    numbers,
    K: tl.constexpr,
    TAILS: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
):
    """The derivative at a knot, d derivative / d its logit, and its place in D (-1: it has none)."""
    min_derivative, boundary_logit, softness = numbers
    if TAILS == "linear":
        place = tl.where((knot == 0) | (knot == K), -1, knot - 1)
    elif TAILS == "circular":
        place = tl.where(knot == K, 0, knot)
    else:
        place = knot
    b_logit = tl.load(
        logits_ptr + offsets + (2 * K + place) * stride, mask=mask & (place >= 0), other=0.0
    )
    b_logit = tl.where(place < 0, boundary_logit, cast(b_logit, tl.float32))
    if EXPONENTIAL:
        b_factor = 1.0 / (1.0 + softness * tl.abs(b_logit))
        b_value = tl.exp(b_logit * b_factor)
        b_slope = b_value * b_factor * b_factor
    else:
        # log(1 + z) = log(w) z / (w - 1) with w = 1 + z as it is rounded.
        z = tl.exp(-tl.abs(b_logit))
        w = 1.0 + z
        b_log = tl.where(w == 1.0, z, tl.log(w) * z / (w - 1.0))
        b_value = min_derivative + (tl.maximum(b_logit, 0.0) + b_log)
        b_slope = tl.where(b_logit < 0, z, 1.0) / w
    return b_value, b_slope, place


@triton.jit
def to_unit(x):
    raised = tl.where(x < 0.0, 0.0, x)
    return tl.where(raised > 1.0, 1.0, raised)


@triton.jit
def find(
    x_ptr,
    logits_ptr,
    element,
    offsets,
    mask,
    stride,
    numbers,
    K: tl.constexpr,
    KP: tl.constexpr,
    TAILS: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """The elements' bins, their places there, and the softmax of both axes."""
    bounds, sizes, derivative_numbers = numbers
    low, high, size, ratio = bounds
    min_width, min_height, free_width, free_height, scale, softness = sizes
    k = tl.arange(0, KP)[None, :]
    b_x = cast(tl.load(x_ptr + element, mask=mask, other=0.0), tl.float32)
    inside = (b_x >= low) & (b_x <= high)
    raised = tl.where(b_x < low, low, b_x)
    position = (tl.where(raised > high, high, raised) - low) / size
    widths, slopes_w = _softmax(logits_ptr, offsets, mask, stride, scale, softness, K, KP)
    heights, slopes_h = _softmax(
        logits_ptr, offsets + K * stride, mask, stride, scale, softness, K, KP
    )
    # How many knots behind the first, but for the last one, are not beyond the position.
    if INVERSE:
        ends = min_height * (k + 1) + free_height * tl.cumsum(heights, 1)
    else:
        ends = min_width * (k + 1) + free_width * tl.cumsum(widths, 1)
    chosen = tl.sum(((position[:, None] >= ends) & (k < K - 1)).to(tl.int32), 1)
    before, live = k < chosen[:, None], k == chosen[:, None]
    before_w, live_w = (
        tl.sum(tl.where(before, widths, 0.0), 1),
        tl.sum(tl.where(live, widths, 0.0), 1),
    )
    before_h, live_h = (
        tl.sum(tl.where(before, heights, 0.0), 1),
        tl.sum(tl.where(live, heights, 0.0), 1),
    )
    x0, w = min_width * chosen + free_width * before_w, min_width + free_width * live_w
    y0, h = min_height * chosen + free_height * before_h, min_height + free_height * live_h
    s = ratio * h / w
    d0, slope0, place0 = _derivative(
        logits_ptr, offsets, mask, stride, chosen, derivative_numbers, K, TAILS, EXPONENTIAL
    )
    d1, slope1, place1 = _derivative(
        logits_ptr, offsets, mask, stride, chosen + 1, derivative_numbers, K, TAILS, EXPONENTIAL
    )
    if INVERSE:
        r = (position - y0) / h
        bend = r * (d0 + d1 - 2 * s)
        a, b = s - d0 + bend, d0 - bend
        root = tl.sqrt(tl.maximum(b * b + 4 * a * s * r, 0.0))
        t = tl.where(b < 0, root - b, 2 * s * r) / tl.where(b < 0, 2 * a, b + root)
    else:
        t = (position - x0) / w
    axis_w = (widths, slopes_w, before_w, live_w)
    axis_h = (heights, slopes_h, before_h, live_h)
    derivatives = (slope0, place0, slope1, place1)
    return b_x, inside, chosen, (x0, w, y0, h, s, d0, d1), to_unit(t), axis_w, axis_h, derivatives


@triton.jit
def point(found, t):
    """q, D, P and R."""
    _, _, _, _, s, d0, d1 = found
    q = t * (1.0 - t)
    denominator = s * (1.0 - 2.0 * q) + (d0 + d1) * q
    slopes = d1 * t * t + 2.0 * s * q + d0 * (1.0 - t) * (1.0 - t)
    return q, denominator, slopes, (s * t * t + d0 * q) / denominator
