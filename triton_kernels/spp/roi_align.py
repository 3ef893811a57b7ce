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

# Forward: bins of a region and channels; backward: columns of a row of pixels and channels.
_BLOCK_B = 64
_BLOCK_W = 64
_BLOCK_C = 32
_BLOCK_PIXELS = 256
_NUM_WARPS = 4


@triton.jit
def _pixels(number, cell, count, first, step, size):
    """Of sample `number` of a bin: the pixels beside it and their weights, 0 outside the plane."""
    moved = first + number * step
    whole = tl.floor(moved)
    part = moved - whole
    pixel = cell + whole.to(tl.int64)
    inside = (number < count) & (pixel >= -1)
    inside = inside & ((pixel < size) | ((pixel == size) & (part == 0.0)))
    # A sample beyond an outer pixel is that pixel.
    between = inside & (pixel >= 0) & (pixel < size - 1)
    high_weight = tl.where(between, part, 0.0)
    low_weight = tl.where(inside, 1.0 - high_weight, 0.0)
    low = tl.minimum(tl.maximum(pixel, 0), size - 1)
    return low, tl.minimum(low + 1, size - 1), low_weight, high_weight


@triton.jit
def _roi_align_kernel(
    x_ptr,  # [B, channels, height, width], with strides
    regions_ptr,  # [K, 5] int32, as class Samples says
    cells_ptr,  # [K, pooled_height + pooled_width, 2] int64
    steps_ptr,  # [K, pooled_height + pooled_width, 3] float32
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
    image = tl.load(regions_ptr + i_r * 5).to(tl.int64)
    # [BLOCK_B]
    axis_bins = i_r * (pooled_height + pooled_width)
    down = axis_bins + number // pooled_width
    across = axis_bins + pooled_height + number % pooled_width
    row_cell = tl.load(cells_ptr + down * 2, mask=is_bin, other=0)
    row_count = tl.load(cells_ptr + down * 2 + 1, mask=is_bin, other=0)
    row_first = tl.load(steps_ptr + down * 3, mask=is_bin, other=0.0)
    row_step = tl.load(steps_ptr + down * 3 + 1, mask=is_bin, other=0.0)
    column_cell = tl.load(cells_ptr + across * 2, mask=is_bin, other=0)
    column_count = tl.load(cells_ptr + across * 2 + 1, mask=is_bin, other=0)
    column_first = tl.load(steps_ptr + across * 3, mask=is_bin, other=0.0)
    column_step = tl.load(steps_ptr + across * 3 + 1, mask=is_bin, other=0.0)
    share = tl.load(steps_ptr + down * 3 + 2, mask=is_bin, other=0.0)
    share = share * tl.load(steps_ptr + across * 3 + 2, mask=is_bin, other=0.0)
    is_channel = (channel < channels)[:, None]
    planes = x_ptr + image * image_stride + (channel * channel_stride)[:, None]
    # [BLOCK_C, BLOCK_B]
    b_sum = tl.zeros((BLOCK_C, BLOCK_B), tl.float32)
    for i in range(tl.max(row_count, axis=0).to(tl.int32)):
        top, bottom, top_weight, bottom_weight = _pixels(
            i, row_cell, row_count, row_first, row_step, height
        )
        for j in range(tl.max(column_count, axis=0).to(tl.int32)):
            left, right, left_weight, right_weight = _pixels(
                j, column_cell, column_count, column_first, column_step, width
            )
            inside = (top_weight + bottom_weight != 0.0) & (left_weight + right_weight != 0.0)
            mask = inside[None, :] & is_channel
            above = planes + (top * row_stride)[None, :]
            below = planes + (bottom * row_stride)[None, :]
            to_left = (left * column_stride)[None, :]
            to_right = (right * column_stride)[None, :]
            b_above = left_weight[None, :] * _load(above + to_left, mask)
            b_above += right_weight[None, :] * _load(above + to_right, mask)
            b_below = left_weight[None, :] * _load(below + to_left, mask)
            b_below += right_weight[None, :] * _load(below + to_right, mask)
            b_sum += top_weight[None, :] * b_above + bottom_weight[None, :] * b_below
    to = (i_r * channels + channel)[:, None] * bins + number[None, :]
    b_out = cast(b_sum * share[None, :], out_ptr.dtype.element_ty)
    tl.store(out_ptr + to, b_out, mask=is_channel & is_bin[None, :])


@triton.jit
def _load(pointers, mask):
    return cast(tl.load(pointers, mask=mask, other=0.0), tl.float32)


@triton.jit
def _weights_kernel(
    cells_ptr,  # [K, axis_bins, 2] int64
    steps_ptr,  # [K, axis_bins, 3] float32
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
    place = i_r * axis_bins + first_bin + i_bin
    cell = tl.load(cells_ptr + place * 2)
    count = tl.load(cells_ptr + place * 2 + 1)
    first = tl.load(steps_ptr + place * 3)
    step = tl.load(steps_ptr + place * 3 + 1)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for number in range(count.to(tl.int32)):
        low, high, low_weight, high_weight = _pixels(number, cell, count, first, step, size)
        b_sum += tl.where(pixel == low, low_weight, 0.0)
        b_sum += tl.where(pixel == high, high_weight, 0.0)
    to = weights_ptr + (i_r * bins + i_bin) * size + pixel
    tl.store(to, b_sum * tl.load(steps_ptr + place * 3 + 2), mask=pixel < size)


@triton.jit
def _roi_align_backward_kernel(
    grad_out_ptr,  # [K, channels, pooled_height, pooled_width]
    regions_ptr,  # [K, 5] int32: image, rows from, to, columns from, to
    row_weights_ptr,  # [K, pooled_height, height]
    column_weights_ptr,  # [K, pooled_width, width]
    grad_x_ptr,  # [B, channels, height, width]
    regions,
    channels,
    height,
    width,
    pooled_height,
    pooled_width,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A program owns columns of one row of an image's planes. It adds regions and bins in their order.

    Grid: [B * height, cdiv(channels, BLOCK_C), cdiv(width, BLOCK_W)].
    """
    i_image = tl.program_id(0) // height
    row = tl.program_id(0) % height
    channel = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    is_channel = channel < channels
    begin = tl.program_id(2) * BLOCK_W
    column = begin + tl.arange(0, BLOCK_W)
    is_column = column < width
    # [BLOCK_C, BLOCK_W]
    b_sum = tl.zeros((BLOCK_C, BLOCK_W), tl.float32)
    for i_r in range(regions):
        region = regions_ptr + i_r * 5
        touches = (tl.load(region + 1) <= row) & (row < tl.load(region + 2))
        touches = touches & (tl.load(region + 3) < begin + BLOCK_W) & (begin < tl.load(region + 4))
        if (tl.load(region) == i_image) & touches:
            i_wide = tl.cast(i_r, tl.int64)
            for i in range(pooled_height):
                row_weight = tl.load(row_weights_ptr + (i_wide * pooled_height + i) * height + row)
                if row_weight != 0.0:
                    grads = (i_wide * channels + channel) * pooled_height + i
                    for j in range(pooled_width):
                        weights = column_weights_ptr + (i_wide * pooled_width + j) * width + column
                        b_weight = row_weight * tl.load(weights, mask=is_column, other=0.0)
                        b_grad = _load(grad_out_ptr + grads * pooled_width + j, is_channel)
                        # Elsewhere an infinity is not multiplied by 0.
                        b_given = b_grad[:, None] * b_weight[None, :]
                        b_sum += tl.where(b_weight[None, :] != 0.0, b_given, 0.0)
    planes = tl.cast(i_image, tl.int64) * channels + channel
    to = (planes * height + row)[:, None] * width + column[None, :]
    mask = is_channel[:, None] & is_column[None, :]
    tl.store(grad_x_ptr + to, cast(b_sum, grad_x_ptr.dtype.element_ty), mask=mask)


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
        samples.cells,
        samples.steps,
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
        block = min(next_power_of_2(size), _BLOCK_PIXELS)
        _weights_kernel[(count, bins, cdiv(size, block))](
            samples.cells,
            samples.steps,
            weights[-1],
            first,
            bins,
            axis_bins,
            size,
            BLOCK=block,
            num_warps=1,
            **COMPILE_OPTIONS,
        )
    block_w = min(next_power_of_2(width), _BLOCK_W)
    block_c = min(next_power_of_2(channels), _BLOCK_C)
    _roi_align_backward_kernel[(batch * height, cdiv(channels, block_c), cdiv(width, block_w))](
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
        BLOCK_W=block_w,
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
        "BLOCK_C": Constant(_BLOCK_C),
    }
    tables: dict[str, Constant | str] = {"cells_ptr": "*i64:16", "steps_ptr": "*fp32:16"}
    forward = shared | tables | {
        "x_ptr": "*bf16:16",
        "out_ptr": "*bf16:16",
        "image_stride": "i32",
        "row_stride": "i32",
        "BLOCK_B": Constant(_BLOCK_B),
    }  # fmt: skip
    weights = tables | {
        "weights_ptr": "*fp32:16",
        **dict.fromkeys(("first_bin", "bins", "axis_bins", "size"), "i32"),
        "BLOCK": Constant(_BLOCK_PIXELS),
    }
    backward = shared | {
        "grad_out_ptr": "*bf16:16",
        "row_weights_ptr": "*fp32:16",
        "column_weights_ptr": "*fp32:16",
        "grad_x_ptr": "*bf16:16",
        "regions": "i32",
        "BLOCK_W": Constant(_BLOCK_W),
    }
    planes = forward | {"channel_stride": "i32", "column_stride": Constant(1)}
    lanes = forward | {"channel_stride": Constant(1), "column_stride": "i32"}
    return [
        AheadOfTimeCase("bf16 planes", _roi_align_kernel, planes, _NUM_WARPS),
        AheadOfTimeCase("bf16 channels-last", _roi_align_kernel, lanes, _NUM_WARPS),
        AheadOfTimeCase("fp32", _weights_kernel, weights, 1),
        AheadOfTimeCase("bf16", _roi_align_backward_kernel, backward, _NUM_WARPS),
    ]
