"""Spatial pyramid pooling (He et al. 2014) in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor


class Window(NamedTuple):
    """Rows or columns [begin, end) of a plane; `span` of them count in an average."""

    begin: int
    end: int
    span: int


class Region(NamedTuple):
    """A rectangle of one image: the whole of it, or a region of interest."""

    image: int
    top: int
    left: int
    height: int
    width: int
    image_height: int
    image_width: int


def windows(bin_mode: str, bins: int, start: int, extent: int, limit: int) -> list[Window]:
    """The windows of `bins` bins over [start, start + extent), cut to [0, limit)."""
    # torchvision's roi_pool divides in float32, and so keeps bins that rounding has moved.
    size = torch.tensor(float(extent)) / bins
    found = []
    for index in range(bins):
        span = None
        if bin_mode == "adaptive":
            begin, end = index * extent // bins, -(-(index + 1) * extent // bins)
        elif bin_mode == "caffe":
            kernel = -(-extent // bins)
            padding = (kernel * bins - extent + 1) // 2
            begin = index * kernel - padding
            end = min(begin + kernel, extent + padding)
            span = end - begin
        elif bin_mode == "sppnet":
            begin = index * (extent // bins)
            end = begin - (-extent // bins)
        else:
            begin, end = math.floor(index * size), math.ceil((index + 1) * size)
        begin, end = (min(max(start + place, 0), limit) for place in (begin, end))
        found.append(Window(begin, end, end - begin if span is None else span))
    return found


class _Bin(NamedTuple):
    rows: Window
    columns: Window
    #: Where its channels stand in the output.
    places: slice


class _Pool(NamedTuple):
    """One region: its images [B, C, H, W], and its bins in order."""

    images: Tensor
    rows: slice
    bins: list[_Bin]


def _places(levels: list[int], channels: int, channel_major: bool) -> Iterator[slice]:
    """Of each bin of each level: where the numbers of its channels stand."""
    counts = [height * width for height, width in zip(levels[::2], levels[1::2])]
    before = 0
    for count in counts:
        for index in range(count):
            if channel_major:
                yield slice(before + index, None, sum(counts))
            else:
                first = channels * before + index
                yield slice(first, first + channels * count, count)
        before += count


def _pools(
    x: Tensor,
    regions: Tensor | None,
    offsets: Tensor | None,
    levels: list[int],
    bin_mode: str,
    channel_major: bool,
) -> Iterator[_Pool]:
    """All images at once, or one region after the other, as views of x."""
    places = list(_places(levels, x.shape[1], channel_major))
    if regions is None:
        rectangles = [Region(0, 0, 0, *x.shape[2:], *x.shape[2:])]
    else:
        rectangles = [Region(*rectangle) for rectangle in regions.tolist()]
    bounds = None if offsets is None else offsets.tolist()
    for index, region in enumerate(rectangles):
        if regions is None:
            images, rows = x, slice(None)
        elif bounds is None:
            images, rows = x[region.image : region.image + 1], slice(index, index + 1)
        else:
            first = bounds[region.image]
            pixels = x[first : first + region.image_height * region.image_width]
            images = pixels.T.view(1, x.shape[1], region.image_height, region.image_width)
            rows = slice(index, index + 1)
        pairs = [
            pair
            for down, across in zip(levels[::2], levels[1::2])
            for pair in product(
                windows(bin_mode, down, region.top, region.height, region.image_height),
                windows(bin_mode, across, region.left, region.width, region.image_width),
            )
        ]
        yield _Pool(images, rows, [_Bin(*pair, place) for pair, place in zip(pairs, places)])


def _last_nan_or_first_greatest(values: Tensor) -> Tensor:
    """Per row the place that PyTorch's max pooling keeps. values [B, C, N] -> [B, C]"""
    is_nan = values.isnan()
    last_nan = values.shape[-1] - 1 - is_nan.flip(-1).int().argmax(-1)
    first = (values == values.amax(-1, keepdim=True)).int().argmax(-1)
    return torch.where(is_nan.any(-1), last_nan, first)


def index_dtype(x: Tensor) -> torch.dtype:
    """int16 where it can number the pixels of a plane of x [B, C, H, W], or all those of x [N, C]."""
    pixels = x.shape[0] if x.dim() == 2 else x.shape[2] * x.shape[3]
    return torch.int16 if pixels <= 2**15 else torch.int32


def is_channels_last(x: Tensor) -> bool:
    """Whether x [B, C, H, W] lies in memory as [B, H, W, C] and not as [B, C, H, W], too."""
    return (
        x.dim() == 4
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def spatial_pyramid_pool(
    x: Tensor,
    regions: Tensor | None,
    offsets: Tensor | None,
    levels: list[int],
    mode: str,
    bin_mode: str,
    channel_major: bool,
    needs_index: bool,
) -> tuple[Tensor, Tensor]:
    """The pooled bins [R, C * bins] and, where `needs_index`, which pixel of its plane each maximum is.

    x [B, C, H, W], or [N, C] where image b is rows offsets[b] .. of x; regions [R, 7] (image, top, left,
    height, width, height and width of the image), None: each image; levels (height, width, height, ...). An
    empty window gives 0 and the index -1.
    """
    channels = x.shape[1]
    total = channels * sum(h * w for h, w in zip(levels[::2], levels[1::2]))
    count = x.shape[0] if regions is None else regions.shape[0]
    out = x.new_zeros(count, total)
    argmax = torch.full(
        (count, total) if needs_index else (0,), -1, dtype=index_dtype(x), device=x.device
    )
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for images, rows, bins in _pools(x, regions, offsets, levels, bin_mode, channel_major):
        for down, across, places in bins:
            window = images[:, :, down.begin : down.end, across.begin : across.end]
            if window.shape[2] * window.shape[3] == 0 or images.shape[0] == 0:
                continue
            if mode == "avg":
                mean = window.to(wide).sum((2, 3)) / (down.span * across.span)
                out[rows, places] = mean.to(x.dtype)
                continue
            values = window.flatten(2)
            place = _last_nan_or_first_greatest(values)
            out[rows, places] = values.gather(2, place[..., None])[..., 0]
            if needs_index:
                width = across.end - across.begin
                row, column = down.begin + place // width, across.begin + place % width
                argmax[rows, places] = (row * images.shape[3] + column).to(argmax.dtype)
    return out, argmax


def spatial_pyramid_pool_backward(
    grad_out: Tensor,
    x: Tensor,
    argmax: Tensor | None,
    regions: Tensor | None,
    offsets: Tensor | None,
    levels: list[int],
    mode: str,
    bin_mode: str,
    channel_major: bool,
) -> Tensor:
    """grad_x in x's layout: each bin's gradient goes to its maximum, or in equal parts to its window."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    grad_x = torch.zeros_like(x, dtype=wide, memory_format=layout)
    for planes, rows, bins in _pools(grad_x, regions, offsets, levels, bin_mode, channel_major):
        batch, channels, height, width = planes.shape
        image = torch.arange(batch, device=x.device)[:, None]
        channel = torch.arange(channels, device=x.device)
        for down, across, places in bins:
            grads = grad_out[rows, places].to(wide)
            if mode == "avg":
                window = planes[:, :, down.begin : down.end, across.begin : across.end]
                window += (grads / max(down.span * across.span, 1))[..., None, None]
            elif argmax is not None and height * width > 0:
                place = argmax[rows, places].long()
                pixel = image, channel, place.clamp(min=0) // width, place.clamp(min=0) % width
                planes.index_put_(pixel, grads.masked_fill(place < 0, 0), accumulate=True)
    return grad_x.to(x.dtype)
