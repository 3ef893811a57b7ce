"""Spatial pyramid pooling (He et al. 2014): all levels of bins in one read, and the gradient.

The ends of all windows cut an image into cells. A cell lies wholly inside a window or outside, so every
pixel is read once, for its cell, and a cell goes to the bins whose windows cover it.
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
from warploom.triton_kernels.spp.pyramid import Pyramid

_BLOCK_P = 64
_NUM_WARPS = 4

# Below the key of every pixel.
_NO_PIXEL: tl.constexpr = tl.constexpr(-(2**63))


@triton.jit
def _key(value, place):
    """A number that grows with (value, earlier place), and with (later place) among NaN, the greatest.

    The upper half orders float32 as integers, both zeros alike; the lower half holds the place.
    """
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    is_nan = value != value
    order = tl.where(is_nan, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    low = tl.where(is_nan, place, 0x7FFFFFFF - place)
    return (order.to(tl.int64) << 32) | low.to(tl.int64)


@triton.jit
def _value_and_place(key):
    """The other way round; of no pixel 0 and -1."""
    order = (key >> 32).to(tl.int32)
    low = (key & 0x7FFFFFFF).to(tl.int32)
    is_nan = order == 0x7FFFFFFF
    value = (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    is_none = key == _NO_PIXEL
    place = tl.where(is_nan, low, 0x7FFFFFFF - low)
    return tl.where(is_none, 0.0, value), tl.where(is_none, -1, place)


@triton.jit
def _pool_kernel(
    x_ptr,  # planes, as the strides and images say
    images_ptr,  # [R, 3] int64: first element, row stride, pixels of a row
    row_cuts_ptr,  # [R, ROW_CUTS], rising as far as counts
    column_cuts_ptr,  # [R, COLUMN_CUTS]
    counts_ptr,  # [R, 2]: bands between the cuts of rows, and of columns
    windows_ptr,  # [R, bins, 5]: first row, last row + 1, first column, last column + 1, area
    bins_ptr,  # [bins, 2]: place in the output and its distance from channel to channel
    out_ptr,  # [R, out_stride]
    argmax_ptr,  # as out, or None
    channels,
    bins,
    pixel_stride,
    channel_stride,
    out_stride,
    ROW_CUTS: tl.constexpr,
    COLUMN_CUTS: tl.constexpr,
    AVERAGE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Grid: [R, cdiv(channels, BLOCK_C)]; BLOCK_B >= bins."""
    i_r = tl.program_id(0).to(tl.int64)
    first = tl.load(images_ptr + i_r * 3)
    row_stride = tl.load(images_ptr + i_r * 3 + 1)
    pitch = tl.load(images_ptr + i_r * 3 + 2).to(tl.int32)
    channel = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    numbers = tl.arange(0, BLOCK_B)
    is_bin = numbers < bins
    window = windows_ptr + (i_r * bins + numbers) * 5
    row_begin = tl.load(window, mask=is_bin, other=0)
    row_end = tl.load(window + 1, mask=is_bin, other=0)
    column_begin = tl.load(window + 2, mask=is_bin, other=0)
    column_end = tl.load(window + 3, mask=is_bin, other=0)
    # [BLOCK_B, BLOCK_C]
    if AVERAGE:
        b_bins = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    else:
        b_bins = tl.full((BLOCK_B, BLOCK_C), _NO_PIXEL, tl.int64)
    for band in range(tl.load(counts_ptr + i_r * 2)):
        top = tl.load(row_cuts_ptr + i_r * ROW_CUTS + band)
        bottom = tl.load(row_cuts_ptr + i_r * ROW_CUTS + band + 1)
        for cell in range(tl.load(counts_ptr + i_r * 2 + 1)):
            left = tl.load(column_cuts_ptr + i_r * COLUMN_CUTS + cell)
            right = tl.load(column_cuts_ptr + i_r * COLUMN_CUTS + cell + 1)
            width = right - left
            pixels = (bottom - top) * width
            if AVERAGE:
                b_cell = tl.zeros((BLOCK_C,), tl.float32)
            else:
                b_cell = tl.full((BLOCK_C,), _NO_PIXEL, tl.int64)
            for start in range(0, pixels, BLOCK_P):
                pixel = start + tl.arange(0, BLOCK_P)
                row, column = top + pixel // width, left + pixel % width
                place = row * pitch + column
                offset = first + row * row_stride + column * pixel_stride
                mask = (pixel < pixels)[:, None] & (channel < channels)[None, :]
                # [BLOCK_P, BLOCK_C]
                pointers = x_ptr + offset[:, None] + channel[None, :] * channel_stride
                b_x = cast(tl.load(pointers, mask=mask, other=0.0), tl.float32)
                if AVERAGE:
                    b_cell += tl.sum(b_x, axis=0)
                else:
                    keys = tl.where(mask, _key(b_x, place[:, None]), _NO_PIXEL)
                    b_cell = tl.maximum(b_cell, tl.max(keys, axis=0))
            covers = (row_begin <= top) & (bottom <= row_end)
            covers = (covers & (column_begin <= left) & (right <= column_end))[:, None]
            if AVERAGE:
                b_bins += tl.where(covers, b_cell[None, :], 0.0)
            else:
                b_bins = tl.where(covers, tl.maximum(b_bins, b_cell[None, :]), b_bins)
    place = tl.load(bins_ptr + numbers * 2, mask=is_bin, other=0).to(tl.int64)
    distance = tl.load(bins_ptr + numbers * 2 + 1, mask=is_bin, other=0).to(tl.int64)
    to = i_r * out_stride + place[:, None] + channel[None, :] * distance[:, None]
    mask = is_bin[:, None] & (channel < channels)[None, :]
    if AVERAGE:
        # 1 of no pixels, whose sum is 0.
        area = tl.load(window + 4, mask=is_bin, other=1).to(tl.float32)
        b_out = b_bins / area[:, None]
    else:
        b_out, b_argmax = _value_and_place(b_bins)
        if argmax_ptr is not None:
            tl.store(argmax_ptr + to, b_argmax.to(argmax_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + to, cast(b_out, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pool_backward_kernel(
    grad_out_ptr,  # [R, out_stride]
    argmax_ptr,  # as grad_out, or None
    regions_ptr,  # [R, 4] int64: image, pixels of a row of it, the rows' first pixel, last pixel + 1
    planes_ptr,  # [images, 2] int64: first element, pixels
    windows_ptr,  # [R, bins, 5]
    bins_ptr,  # [bins, 2]
    grad_x_ptr,  # pixel_stride and channel_stride apart
    regions,
    channels,
    bins,
    pixel_stride,
    channel_stride,
    out_stride,
    LISTED: tl.constexpr,
    AVERAGE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A program owns its pixels: it adds what regions and bins give them in their order.

    Grid: [images, cdiv(channels, BLOCK_C), programs over tiles of BLOCK_P pixels].
    """
    i_image = tl.program_id(0).to(tl.int64)
    first = tl.load(planes_ptr + i_image * 2)
    pixels = tl.load(planes_ptr + i_image * 2 + 1)
    channel = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    is_channel = channel < channels
    # Region i belongs to image i where regions are not listed.
    begin_region = 0 if LISTED else i_image
    end_region = regions if LISTED else i_image + 1
    step = tl.num_programs(2) * BLOCK_P
    for begin in range(tl.program_id(2) * BLOCK_P, pixels, step):
        pixel = begin + tl.arange(0, BLOCK_P)
        # [BLOCK_P, BLOCK_C]
        b_sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for i_r in range(begin_region, end_region):
            region = regions_ptr + i_r * 4
            reaches = (tl.load(region + 2) < begin + BLOCK_P) & (tl.load(region + 3) > begin)
            if (tl.load(region) == i_image) & reaches:
                pitch = tl.load(region + 1)
                row, column = pixel // pitch, pixel % pitch
                for number in range(bins):
                    place = tl.load(bins_ptr + number * 2).to(tl.int64)
                    distance = tl.load(bins_ptr + number * 2 + 1).to(tl.int64)
                    offset = tl.cast(i_r, tl.int64) * out_stride + place + channel * distance
                    b_grad = tl.load(grad_out_ptr + offset, mask=is_channel, other=0.0)
                    b_grad = cast(b_grad, tl.float32)
                    if AVERAGE:
                        window = windows_ptr + (tl.cast(i_r, tl.int64) * bins + number) * 5
                        within = (row >= tl.load(window)) & (row < tl.load(window + 1))
                        within = within & (column >= tl.load(window + 2))
                        within = within & (column < tl.load(window + 3))
                        b_share = b_grad / tl.load(window + 4).to(tl.float32)
                        b_sums += tl.where(within[:, None], b_share[None, :], 0.0)
                    else:
                        b_argmax = tl.load(argmax_ptr + offset, mask=is_channel, other=-1)
                        chosen = pixel[:, None] == b_argmax[None, :].to(tl.int64)
                        b_sums += tl.where(chosen, b_grad[None, :], 0.0)
        to = first + pixel[:, None].to(tl.int64) * pixel_stride + channel[None, :] * channel_stride
        mask = (pixel < pixels)[:, None] & is_channel[None, :]
        tl.store(grad_x_ptr + to, cast(b_sums, grad_x_ptr.dtype.element_ty), mask=mask)


def _channel_block(bins: int, channels: int) -> int:
    return min(next_power_of_2(channels), max(1, min(32, 1024 // next_power_of_2(bins))))


@on_own_device
def spatial_pyramid_pool(
    x: torch.Tensor,
    regions: torch.Tensor | None,
    offsets: torch.Tensor | None,
    levels: list[int],
    mode: str,
    bin_mode: str,
    channel_major: bool,
    needs_index: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B, C, H, W], or [N, C] beside offsets -> (out [R, C * bins], argmax as out or empty)."""
    pyramid = Pyramid(x, regions, offsets, levels, bin_mode, channel_major)
    count, channels = pyramid.regions.shape[0], x.shape[1]
    shape = (count, channels * pyramid.bins)
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    pixels = x.shape[0] if offsets is not None else x.shape[2] * x.shape[3]
    index_dtype = torch.int16 if pixels <= 2**15 else torch.int32
    argmax = torch.empty(shape if needs_index else (0,), dtype=index_dtype, device=x.device)
    if out.numel() == 0:
        return out, argmax
    block_c = _channel_block(pyramid.bins, channels)
    _pool_kernel[(count, cdiv(channels, block_c))](
        x,
        pyramid.images,
        pyramid.row_cuts,
        pyramid.column_cuts,
        pyramid.counts,
        pyramid.windows,
        pyramid.places,
        out,
        argmax if needs_index else None,
        channels,
        pyramid.bins,
        pyramid.pixel_stride,
        x.stride(1),
        shape[1],
        ROW_CUTS=pyramid.row_cuts.shape[1],
        COLUMN_CUTS=pyramid.column_cuts.shape[1],
        AVERAGE=mode == "avg",
        BLOCK_P=_BLOCK_P,
        BLOCK_C=block_c,
        BLOCK_B=next_power_of_2(pyramid.bins),
        num_warps=_NUM_WARPS,
        **COMPILE_OPTIONS,
    )
    return out, argmax


@on_own_device
def spatial_pyramid_pool_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    argmax: torch.Tensor | None,
    regions: torch.Tensor | None,
    offsets: torch.Tensor | None,
    levels: list[int],
    mode: str,
    bin_mode: str,
    channel_major: bool,
) -> torch.Tensor:
    """grad_out [R, C * bins] -> grad_x like x: contiguous, or channels-last as x."""
    is_last = (
        x.dim() == 4
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
    )
    layout = torch.channels_last if is_last else torch.contiguous_format
    grad_x = torch.empty_like(x, memory_format=layout)
    if grad_x.numel() == 0:
        return grad_x
    pyramid = Pyramid(grad_x, regions, offsets, levels, bin_mode, channel_major)
    channels = x.shape[1]
    block_c = min(next_power_of_2(channels), 32)
    tiles = cdiv(pyramid.typical_pixels, _BLOCK_P)
    _pool_backward_kernel[(pyramid.planes.shape[0], cdiv(channels, block_c), min(tiles, 65535))](
        grad_out.contiguous(),
        argmax,
        pyramid.regions,
        pyramid.planes,
        pyramid.windows,
        pyramid.places,
        grad_x,
        pyramid.regions.shape[0],
        channels,
        pyramid.bins,
        pyramid.pixel_stride,
        grad_x.stride(1),
        channels * pyramid.bins,
        LISTED=pyramid.listed,
        AVERAGE=mode == "avg",
        BLOCK_P=_BLOCK_P,
        BLOCK_C=block_c,
        num_warps=_NUM_WARPS,
        **COMPILE_OPTIONS,
    )
    return grad_x


def why_not(*args: object) -> list[str]:
    """What these kernels cannot do with the arguments of either op of this module."""
    return why_not_tensors(*args)


def aot_cases() -> list[AheadOfTimeCase]:
    cases = []
    sizes = {name: "i32" for name in ("channels", "bins", "pixel_stride", "channel_stride")}
    for average in (False, True):
        index: Constant | str = Constant(None) if average else "*i16:16"
        shared: dict[str, Constant | str] = {
            **sizes,
            "argmax_ptr": index,
            "windows_ptr": "*i32:16",
            "bins_ptr": "*i32:16",
            "out_stride": "i32",
            "AVERAGE": Constant(average),
            "BLOCK_P": Constant(_BLOCK_P),
            "BLOCK_C": Constant(32),
        }
        forward = shared | {
            "x_ptr": "*bf16:16",
            "images_ptr": "*i64:16",
            "row_cuts_ptr": "*i32:16",
            "column_cuts_ptr": "*i32:16",
            "counts_ptr": "*i32:16",
            "out_ptr": "*bf16:16",
            "ROW_CUTS": Constant(14),
            "COLUMN_CUTS": Constant(14),
            "BLOCK_B": Constant(32),
        }
        backward = shared | {
            "grad_out_ptr": "*bf16:16",
            "regions_ptr": "*i64:16",
            "planes_ptr": "*i64:16",
            "grad_x_ptr": "*bf16:16",
            "regions": "i32",
            "LISTED": Constant(True),
        }
        name = f"bf16 {'avg' if average else 'max'}"
        cases += [
            AheadOfTimeCase(name, _pool_kernel, forward, _NUM_WARPS),
            AheadOfTimeCase(name, _pool_backward_kernel, backward, _NUM_WARPS),
        ]
    return cases
