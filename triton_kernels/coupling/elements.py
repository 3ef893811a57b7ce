"""Which elements of an affine coupling a program takes, and the affine maps of these.

Tensors [B, C, P] of any strides: a sample's C P elements are numbered along its lines, channel by channel, or
pixel by pixel with CHANNELS_LAST, so that neighbours in memory are neighbours in a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from warploom.triton_kernels.common.launch import cdiv, next_power_of_2
from warploom.triton_kernels.common.numerics import cast
from warploom.triton_kernels.coupling.scales import log_scale

TILE_ELEMENTS = 1024
_FIRST_WIDE = 2**31


@triton.jit
def tile_elements(
    B, C, P, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Of program [cdiv(B, BLOCK_B) * tiles], tiles fastest: samples [BLOCK_B, 1] int64, channels and pixels
    [1, BLOCK_E] (int64 where WIDE), the mask [BLOCK_B, BLOCK_E] of what exists, and the tile's number."""
    sample_elements = tl.cast(C, tl.int64) * P if WIDE else C * P
    tiles = tl.cdiv(sample_elements, BLOCK_E)
    i_t = tl.program_id(0) % tiles
    samples = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    elements = i_t * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    if CHANNELS_LAST:
        channels = elements % C
        pixels = elements // C
    else:
        channels = elements // P
        pixels = elements % P
    return samples, channels, pixels, (samples < B) & (elements < sample_elements), i_t


@triton.jit
def slots_of(places_ptr, channels, exists, first, MASK: tl.constexpr):
    """The parameters' channels; not in [0, count) of a channel that passes."""
    if MASK == "range":
        return channels - first
    elif MASK == "slots":
        return tl.load(places_ptr + channels, mask=exists, other=-1)
    else:
        return channels


@triton.jit
def parameters_of(
    places_ptr, channels, pixels, exists, first, count, width, places_channel_stride,
    places_pixel_stride, MASK: tl.constexpr,
):  # fmt: skip
    """(moved, slots, slot_pixels): which elements are transformed, and where their parameters lie."""
    slots = slots_of(places_ptr, channels, exists, first, MASK)
    slot_pixels = pixels
    if MASK == "range" or MASK == "slots":
        moved = exists & (slots >= 0) & (slots < count)
    elif MASK == "free":
        p_places = places_ptr + channels * places_channel_stride + pixels * places_pixel_stride
        moved = exists & (tl.load(p_places, mask=exists, other=0) != 0)
    else:
        rows = pixels // width
        columns = pixels % width
        moved = exists & ((rows + columns) % 2 == first)
        if MASK == "checkerboard_packed":
            slot_pixels = rows * (width // 2) + columns // 2
    return moved, slots, slot_pixels


@triton.jit
def affine_maps(
    shift_ptr, raw_ptr, weight_ptr, mean, offsets, moved, slots, clamp, eps, params_scale,
    SHIFT_SIGN: tl.constexpr, LOG_SIGN: tl.constexpr, SCALE: tl.constexpr, HAS_EPS: tl.constexpr,
):  # fmt: skip
    """q t, F = exp(p L), L less `mean`, L without weight and mean, dL / du; for what is not `moved` those of
    parameters 0."""
    shift = cast(tl.load(shift_ptr + offsets, mask=moved, other=0.0), tl.float32)
    shift = shift * (params_scale * SHIFT_SIGN)
    if SCALE == "additive":
        zero = tl.zeros_like(shift)
        return shift, zero + 1.0, zero, zero, zero
    else:
        raw = cast(tl.load(raw_ptr + offsets, mask=moved, other=0.0), tl.float32) * params_scale
        unweighted, slope = log_scale(raw, clamp, eps, SCALE, HAS_EPS)
        log = unweighted
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + slots, mask=moved, other=0.0)
            log = log * weight
            slope = slope * weight
        log = log - mean
        return shift, tl.exp(log * LOG_SIGN), log, unweighted, slope


@triton.jit
def grad_log_scale(
    grad, source, shift, factor, ADD_FIRST: tl.constexpr, LOG_SIGN: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
):  # fmt: skip
    """The gradient of L, but for log_det's: p g F x, or with ADD_FIRST p g F (x + q t)."""
    if FROM_OUTPUT:
        scaled = source if ADD_FIRST else source - shift
    else:
        scaled = (source + shift if ADD_FIRST else source) * factor
    return grad * scaled * LOG_SIGN


def as_pixels(tensor: torch.Tensor) -> torch.Tensor:
    """[B, C, *spatial] as [B, C, P]; a view where the spatial dimensions have one stride."""
    return tensor.flatten(2) if tensor.dim() > 2 else tensor.unsqueeze(2)


def empty_like_lines(shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
    """Of the dtype of `like`, contiguous, or dense with channels last where `like` is so."""
    if lines_are_channels(like) and like.dim() > 2:
        return like.new_empty(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    return like.new_empty(shape)


def lines_are_channels(x: torch.Tensor) -> bool:
    return x.dim() == 2 or (x.stride(1) == 1 and x.stride(-1) != 1)


class Halves(NamedTuple):
    """Shift and raw scale [B, k, P] of equal strides; no raw scale of an additive coupling."""

    shift: torch.Tensor
    raw_scale: torch.Tensor | None


def split(params: torch.Tensor, raw_scale: torch.Tensor | None, layout: str, scale: str) -> Halves:
    """Views of the parameters where they have such strides."""
    if scale == "additive":
        return Halves(as_pixels(params), None)
    if raw_scale is not None:
        if params.stride() != raw_scale.stride():
            params, raw_scale = params.contiguous(), raw_scale.contiguous()
        shift = params
    elif layout == "interleaved":
        shift, raw_scale = params[:, 0::2], params[:, 1::2]
    else:
        first, second = params.chunk(2, dim=1)
        shift, raw_scale = (first, second) if layout == "shift_scale" else (second, first)
    return Halves(as_pixels(shift), as_pixels(raw_scale))


def places_of(places: torch.Tensor | None, mask: str) -> torch.Tensor | None:
    """[C] int32 slots, or a free mask as bytes [C, P]."""
    if places is None or mask == "slots":
        return places
    flat = places.flatten(1) if places.dim() > 1 else places.unsqueeze(1)
    return flat.view(torch.uint8)


def are_wide(*tensors: torch.Tensor | None) -> bool:
    """Whether 32 bits cannot number the elements of a sample [C, P] of one of them."""
    return any(
        (t.shape[1] - 1) * t.stride(1) + (t.shape[2] - 1) * t.stride(2) + TILE_ELEMENTS
        >= _FIRST_WIDE
        for t in tensors
        if t is not None
    )


class Blocks(NamedTuple):
    """A program's tile: BLOCK_E elements of each of BLOCK_B samples."""

    samples: int
    elements: int

    def programs(self, x: torch.Tensor) -> int:
        return cdiv(x.shape[0], self.samples) * self.tiles(x)

    def tiles(self, x: torch.Tensor) -> int:
        return cdiv(x.shape[1] * x.shape[2], self.elements)


def blocks_of(x: torch.Tensor) -> Blocks:
    elements = min(TILE_ELEMENTS, next_power_of_2(x.shape[1] * x.shape[2]))
    return Blocks(min(TILE_ELEMENTS // elements, next_power_of_2(x.shape[0])), elements)
