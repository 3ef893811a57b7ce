"""RoIAlign and its gradient.

A bin has samples in a regular grid, and a bilinear weight is a product of those of the axes. Backward, what
each bin takes of the pixels of an axis is computed once for all channels; then a program owns pixels, and
adds what the regions give them in their order.
"""

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
from warploom.triton_kernels.spp.samples import Samples

# Forward: bins of a region and channels; backward: pixels of an axis, and of a plane and channels.
_BLOCK_B, _BLOCK_C = 16, 32
_BLOCK_AXIS = 256
_BLOCK_P, _BACKWARD_BLOCK_C = 128, 16
_NUM_WARPS = 4


@triton.jit
def _pixels(number, first, step, count, size):
    """Of sample `number` of bins: the pixels beside it and their weights, 0 outside the plane.

    Bins: the place of the first sample, float64, the step to the next, and how many there are.
    """
    place = first + number * step
    inside = (number < count) & (place >= -1.0) & (place <= size)
    # A sample beyond an outer pixel is that pixel.
    place = tl.minimum(tl.maximum(place, 0.0), size - 1)
    whole = tl.floor(place)
    part = (place - whole).to(tl.float32)
    low = whole.to(tl.int32)
    high = tl.minimum(low + 1, size - 1)
    return low, high, tl.where(inside, 1.0 - part, 0.0), tl.where(inside, part, 0.0)


@triton.jit
def _roi_align_kernel(
    x_ptr,  # [B, channels, height, width], with strides
    regions_ptr,  # [K, 3] int32, as class Samples says
    samples_ptr,  # [K, pooled_height + pooled_width, 4] float64
    out_ptr,  # [K, channels, pooled_height, pooled_width]
    channels,
    height,
    width,
    pooled_height,
    pooled_width,
    image_stride,
    channel_stride,
    row_stride,
    column_stride,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: [K, cdiv(channels, BLOCK_C), cdiv(pooled_height * pooled_width, BLOCK_B)]."""
    i_r = tl.program_id(0).to(tl.int64)
    channel = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    number = tl.program_id(2) * BLOCK_B + tl.arange(0, BLOCK_B)
    bins = pooled_height * pooled_width
    is_bin = number < bins
    image = tl.load(regions_ptr + i_r * 3).to(tl.int64)
    # [BLOCK_B]
    axis_bins = i_r * (pooled_height + pooled_width)
    down = samples_ptr + (axis_bins + number // pooled_width) * 4
    across = samples_ptr + (axis_bins + pooled_height + number % pooled_width) * 4
    row_first = tl.load(down, mask=is_bin, other=0.0)
    row_step = tl.load(down + 1, mask=is_bin, other=0.0)
    row_count = tl.load(down + 2, mask=is_bin, other=0.0).to(tl.int32)
    column_first = tl.load(across, mask=is_bin, other=0.0)
    column_step = tl.load(across + 1, mask=is_bin, other=0.0)
    column_count = tl.load(across + 2, mask=is_bin, other=0.0).to(tl.int32)
    share = tl.load(down + 3, mask=is_bin, other=0.0) * tl.load(across + 3, mask=is_bin, other=0.0)
    is_channel = (channel < channels)[:, None]
    planes = x_ptr + image * image_stride + (channel * channel_stride)[:, None]
    # [BLOCK_C, BLOCK_B]
    b_sum = tl.zeros((BLOCK_C, BLOCK_B), tl.float32)
    for i in range(tl.max(row_count, axis=0)):
        top, bottom, top_weight, bottom_weight = _pixels(i, row_first, row_step, row_count, height)
        for j in range(tl.max(column_count, axis=0)):
            left, right, left_weight, right_weight = _pixels(
                j, column_first, column_step, column_count, width
            )
            inside = (top_weight + bottom_weight != 0.0) & (left_weight + right_weight != 0.0)
            mask = inside[None, :] & is_channel
            above = planes + (top * row_stride)[None, :]
            below = planes + (bottom * row_stride)[None, :]
            to_left = (left * column_stride)[None, :]
            to_right = (right * column_stride)[None, :]
            b_x = cast(tl.load(above + to_left, mask=mask, other=0.0), tl.float32)
            b_above = left_weight[None, :] * b_x
            b_x = cast(tl.load(above + to_right, mask=mask, other=0.0), tl.float32)
            b_above += right_weight[None, :] * b_x
            b_x = cast(tl.load(below + to_left, mask=mask, other=0.0), tl.float32)
            b_below = left_weight[None, :] * b_x
            b_x = cast(tl.load(below + to_right, mask=mask, other=0.0), tl.float32)
            b_below += right_weight[None, :] * b_x
            b_sum += top_weight[None, :] * b_above + bottom_weight[None, :] * b_below
    to = (i_r * channels + channel)[:, None] * bins + number[None, :]
    b_out = cast(b_sum * share.to(tl.float32)[None, :], out_ptr.dtype.element_ty)
    tl.store(out_ptr + to, b_out, mask=is_channel & is_bin[None, :])


@triton.jit
def _weights_kernel(
    samples_ptr,  # [K, axis_bins, 4] float64
    weights_ptr,  # float32 [K, bins, size]
    first_bin,  # of the axis
    bins,
    axis_bins,  # of both axes
    size,
    BLOCK: tl.constexpr,
):
    """What the mean of a bin's samples takes of each pixel of an axis. Grid: [K, bins, cdiv(size, BLOCK)]."""
    i_r = tl.program_id(0).to(tl.int64)
    i_bin = tl.program_id(1)
    pixel = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    samples = samples_ptr + (i_r * axis_bins + first_bin + i_bin) * 4
    first = tl.load(samples)
    step = tl.load(samples + 1)
    count = tl.load(samples + 2).to(tl.int32)
    share = tl.load(samples + 3).to(tl.float32)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for number in range(count):
        low, high, low_weight, high_weight = _pixels(number, first, step, count, size)
        b_sum += tl.where(pixel == low, low_weight, 0.0)
        b_sum += tl.where(pixel == high, high_weight, 0.0)
    to = weights_ptr + (i_r * bins + i_bin) * size + pixel
    tl.store(to, b_sum * share, mask=pixel < size)


@triton.jit
def _roi_align_backward_kernel(
    grad_out_ptr,  # [K, channels, pooled_height, pooled_width]
    regions_ptr,  # [K, 3] int32
    row_weights_ptr,  # [K, pooled_height, height]
    column_weights_ptr,  # [K, pooled_width, width]
    grad_x_ptr,  # [B, channels, height, width]
    regions,
    channels,
    height,
    width,
    pooled_height,
    pooled_width,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A program owns pixels of an image's planes: it adds what regions and bins give them in their order.

    Grid: [B * cdiv(height * width, BLOCK_P), cdiv(channels, BLOCK_C)], tiles of pixels fastest.
    """
    tiles = tl.cdiv(height * width, BLOCK_P)
    i_image = tl.program_id(0) // tiles
    channel = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    is_channel = channel < channels
    begin = tl.program_id(0) % tiles * BLOCK_P
    pixel = begin + tl.arange(0, BLOCK_P)
    is_pixel = pixel < height * width
    row, column = pixel // width, pixel % width
    # [BLOCK_C, BLOCK_P]
    b_sum = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for i_r in range(regions):
        region = regions_ptr + i_r * 3
        begin_row, end_row = tl.load(region + 1), tl.load(region + 2)
        reaches = (begin_row * width < begin + BLOCK_P) & (begin < end_row * width)
        if (tl.load(region) == i_image) & reaches:
            i_wide = tl.cast(i_r, tl.int64)
            for i in range(pooled_height):
                weights = row_weights_ptr + (i_wide * pooled_height + i) * height + row
                b_row = tl.load(weights, mask=is_pixel, other=0.0)
                if tl.max(b_row, axis=0) > 0.0:
                    grads = (i_wide * channels + channel) * pooled_height + i
                    for j in range(pooled_width):
                        weights = column_weights_ptr + (i_wide * pooled_width + j) * width + column
                        b_weight = b_row * tl.load(weights, mask=is_pixel, other=0.0)
                        if tl.max(b_weight, axis=0) > 0.0:
                            p_grad = grad_out_ptr + grads * pooled_width + j
                            b_grad = tl.load(p_grad, mask=is_channel, other=0.0)
                            b_given = cast(b_grad, tl.float32)[:, None] * b_weight[None, :]
                            # An infinity is not multiplied by 0.
                            b_sum += tl.where(b_weight[None, :] > 0.0, b_given, 0.0)
    planes = tl.cast(i_image, tl.int64) * channels + channel
    to = grad_x_ptr + (planes * height * width)[:, None] + pixel[None, :]
    mask = is_channel[:, None] & is_pixel[None, :]
    tl.store(to, cast(b_sum, grad_x_ptr.dtype.element_ty), mask=mask)


@on_own_device
def roi_align(
    x: torch.Tensor,
    rois: torch.Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> torch.Tensor:
    """x [B, C, H, W] of any strides, rois [K, 5] float32 -> [K, C, pooled_height, pooled_width]."""
    count, channels, bins = rois.shape[0], x.shape[1], pooled_height * pooled_width
    out = torch.empty(
        (count, channels, pooled_height, pooled_width), dtype=x.dtype, device=x.device
    )
    if out.numel() == 0:
        return out
    samples = Samples(x, rois, pooled_height, pooled_width, spatial_scale, sampling_ratio, aligned)
    block_b = min(next_power_of_2(bins), _BLOCK_B)
    block_c = min(next_power_of_2(channels), _BLOCK_C)
    _roi_align_kernel[(count, cdiv(channels, block_c), cdiv(bins, block_b))](
        x,
        samples.regions,
        samples.of_bins,
        out,
        *x.shape[1:],
        pooled_height,
        pooled_width,
        *x.stride(),
        BLOCK_B=block_b,
        BLOCK_C=block_c,
        num_warps=_NUM_WARPS,
        **COMPILE_OPTIONS,
    )
    return out


@on_own_device
def roi_align_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    rois: torch.Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> torch.Tensor:
    """grad_out [K, C, pooled_height, pooled_width] -> grad_x of x's shape, contiguous."""
    count, (batch, channels, height, width) = rois.shape[0], x.shape
    grad_x = torch.empty(x.shape, dtype=grad_out.dtype, device=grad_out.device)
    if grad_x.numel() == 0 or grad_out.numel() == 0:
        return grad_x.zero_()
    samples = Samples(x, rois, pooled_height, pooled_width, spatial_scale, sampling_ratio, aligned)
    weights = []
    axis_bins = pooled_height + pooled_width
    for first, bins, size in ((0, pooled_height, height), (pooled_height, pooled_width, width)):
        weights.append(rois.new_empty(count, bins, size))
        block = min(next_power_of_2(size), _BLOCK_AXIS)
        _weights_kernel[(count, bins, cdiv(size, block))](
            samples.of_bins,
            weights[-1],
            first,
            bins,
            axis_bins,
            size,
            BLOCK=block,
            num_warps=1,
            **COMPILE_OPTIONS,
        )
    block_p = min(next_power_of_2(height * width), _BLOCK_P)
    block_c = min(next_power_of_2(channels), _BACKWARD_BLOCK_C)
    _roi_align_backward_kernel[(batch * cdiv(height * width, block_p), cdiv(channels, block_c))](
        grad_out.contiguous(),
        samples.regions,
        *weights,
        grad_x,
        count,
        channels,
        height,
        width,
        pooled_height,
        pooled_width,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        num_warps=_NUM_WARPS,
        **COMPILE_OPTIONS,
    )
    return grad_x


def why_not(*args: object) -> list[str]:
    """What these kernels cannot do with the arguments of either op of this module."""
    return why_not_tensors(*args)


def aot_cases() -> list[AheadOfTimeCase]:
    sizes = ("channels", "height", "width", "pooled_height", "pooled_width")
    shared: dict[str, Constant | str] = {
        **dict.fromkeys(sizes, "i32"),
        "regions_ptr": "*i32:16",
    }
    forward = shared | {
        "samples_ptr": "*fp64:16",
        "x_ptr": "*bf16:16",
        "out_ptr": "*bf16:16",
        "image_stride": "i32",
        "row_stride": "i32",
        "BLOCK_B": Constant(_BLOCK_B),
        "BLOCK_C": Constant(_BLOCK_C),
    }
    weights: dict[str, Constant | str] = {
        "samples_ptr": "*fp64:16",
        "weights_ptr": "*fp32:16",
        **dict.fromkeys(("first_bin", "bins", "axis_bins", "size"), "i32"),
        "BLOCK": Constant(_BLOCK_AXIS),
    }
    backward = shared | {
        "grad_out_ptr": "*bf16:16",
        "row_weights_ptr": "*fp32:16",
        "column_weights_ptr": "*fp32:16",
        "grad_x_ptr": "*bf16:16",
        "regions": "i32",
        "BLOCK_P": Constant(_BLOCK_P),
        "BLOCK_C": Constant(_BACKWARD_BLOCK_C),
    }
    planes = forward | {"channel_stride": "i32", "column_stride": Constant(1)}
    lanes = forward | {"channel_stride": Constant(1), "column_stride": "i32"}
    return [
        AheadOfTimeCase("bf16 planes", _roi_align_kernel, planes, _NUM_WARPS),
        AheadOfTimeCase("bf16 channels-last", _roi_align_kernel, lanes, _NUM_WARPS),
        AheadOfTimeCase("fp32", _weights_kernel, weights, 1),
        AheadOfTimeCase("bf16", _roi_align_backward_kernel, backward, _NUM_WARPS),
    ]
