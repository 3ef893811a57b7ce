"""The cascade of max pools of stride 1 beside its input (SPPF of YOLOv5), and its gradient.

A tensor is [B, S, H, W, L] of elements: S slices of the output (1 of x) of C channels, in the order of its
layout: [B, S C, H, W] has C planes a slice, channels-last [B, H, W, S C] has C lanes a pixel. Each stage is a
launch that reads one slice and writes the next; within it a program has a block of one sample's elements.
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
    on_own_device,
    why_not_tensors,
)
from warploom.triton_kernels.common.numerics import cast

_STAGES: tl.constexpr = tl.constexpr(3)
_BLOCK = 1024
_NUM_WARPS = 4
# Places in a window are 16-bit numbers.
_LARGEST_KERNEL_SIZE = 181


@triton.jit
def _places(SLICES: tl.constexpr, C, H, W, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr):
    """Of a block of a sample's C H W elements in the order of the layout: which exist, rows, columns, offsets
    in slice 0 of a tensor with SLICES of them; and the elements from one pixel to the next, from one slice to
    the next, and from one sample to the next."""
    elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # Sizes of 1 are constants to the compiler, which have no method `to`.
    wide = tl.cast(C, tl.int64)
    exist = elements < wide * H * W
    if CHANNELS_LAST:
        pixels = elements // C
        offsets = pixels * (SLICES * C) + elements % C
        pitch = SLICES * wide
        slice_stride = wide
    else:
        pixels = elements % (H * W)
        offsets = elements
        pitch = tl.cast(1, tl.int64)
        slice_stride = wide * H * W
    sample_stride = SLICES * wide * H * W
    return exist, pixels // W, pixels % W, offsets, pitch, slice_stride, sample_stride


@triton.jit
def _pool(values_ptr, exist, rows, columns, pitch, H, W, KERNEL: tl.constexpr, BLOCK: tl.constexpr):
    """Maxima of windows around elements at values_ptr, and their places: the last NaN in row-major order,
    else the first of the greatest. A place is row * KERNEL + column in the window."""
    RADIUS: tl.constexpr = KERNEL // 2
    b_maximum = tl.full([BLOCK], -float("inf"), dtype=tl.float32)
    b_place = tl.full([BLOCK], -1, dtype=tl.int32)
    for row in range(KERNEL):
        for column in range(KERNEL):
            down = row - RADIUS
            right = column - RADIUS
            inside = exist & (rows + down >= 0) & (rows + down < H)
            inside = inside & (columns + right >= 0) & (columns + right < W)
            b_value = tl.load(
                values_ptr + (down * W + right) * pitch, mask=inside, other=-float("inf")
            )
            b_value = cast(b_value, tl.float32)
            # The first cell of the window is taken even where it is -infinity.
            take = (b_value > b_maximum) | (b_value != b_value) | (inside & (b_place < 0))
            b_maximum = tl.where(take, b_value, b_maximum)
            b_place = tl.where(take, row * KERNEL + column, b_place)
    return b_maximum, b_place


@triton.jit
def _sppf_kernel(
    x_ptr,  # [B, C, H, W] or [B, H, W, C]
    out_ptr,  # [B, 4 C, H, W] or [B, H, W, 4 C]
    C,
    H,
    W,
    STAGE: tl.constexpr,
    KERNEL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Slice STAGE of out: of x for stage 1, with x itself as slice 0, else of the slice before.

    Grid: [cdiv(C H W, BLOCK), B].
    """
    exist, rows, columns, offsets, pitch, slice_stride, sample_stride = _places(
        _STAGES + 1, C, H, W, CHANNELS_LAST, BLOCK
    )
    sample = tl.program_id(1).to(tl.int64)
    p_out = out_ptr + sample * sample_stride + offsets
    if STAGE == 1:
        _, _, _, x_offsets, x_pitch, _, x_sample = _places(1, C, H, W, CHANNELS_LAST, BLOCK)
        p_x = x_ptr + sample * x_sample + x_offsets
        tl.store(p_out, tl.load(p_x, mask=exist), mask=exist)
        b_maximum, _ = _pool(p_x, exist, rows, columns, x_pitch, H, W, KERNEL, BLOCK)
    else:
        p_given = p_out + (STAGE - 1) * slice_stride
        b_maximum, _ = _pool(p_given, exist, rows, columns, pitch, H, W, KERNEL, BLOCK)
    b_out = cast(b_maximum, out_ptr.dtype.element_ty)
    tl.store(p_out + STAGE * slice_stride, b_out, mask=exist)


@triton.jit
def _sppf_places_kernel(
    out_ptr,  # [B, 4 C, H, W] or [B, H, W, 4 C]
    places_ptr,  # [3, B, C, H, W] or [3, B, H, W, C], int16
    C,
    H,
    W,
    KERNEL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where in its window each maximum of each stage comes from. Grid: [cdiv(C H W, BLOCK), B, 3]."""
    exist, rows, columns, offsets, pitch, slice_stride, sample_stride = _places(
        _STAGES + 1, C, H, W, CHANNELS_LAST, BLOCK
    )
    sample = tl.program_id(1).to(tl.int64)
    stage = tl.program_id(2).to(tl.int64)
    p_given = out_ptr + sample * sample_stride + offsets + stage * slice_stride
    _, b_place = _pool(p_given, exist, rows, columns, pitch, H, W, KERNEL, BLOCK)
    size = tl.cast(C, tl.int64) * H * W
    elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    p_places = places_ptr + (stage * tl.num_programs(1) + sample) * size + elements
    tl.store(p_places, b_place.to(tl.int16), mask=exist)


@triton.jit
def _sppf_gather_kernel(
    grad_out_ptr,  # [B, 4 C, H, W] or [B, H, W, 4 C]
    places_ptr,  # of this stage: [B, C, H, W] or [B, H, W, C], int16
    pooled_ptr,  # float32, as places: gradients of what the stage returned; None: grad_out's
    given_ptr,  # as places: gradients of what it was given
    C,
    H,
    W,
    STAGE: tl.constexpr,
    KERNEL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each element gathers the gradients of the maxima that it gave, in row-major order, and adds grad_out's.

    Grid: [cdiv(C H W, BLOCK), B].
    """
    exist, rows, columns, offsets, pitch, slice_stride, sample_stride = _places(
        _STAGES + 1, C, H, W, CHANNELS_LAST, BLOCK
    )
    _, _, _, own_offsets, own_pitch, _, own_sample = _places(1, C, H, W, CHANNELS_LAST, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    own_offsets += sample * own_sample
    p_grad = grad_out_ptr + sample * sample_stride + offsets
    RADIUS: tl.constexpr = KERNEL // 2
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for row in range(KERNEL):
        for column in range(KERNEL):
            down = row - RADIUS
            right = column - RADIUS
            inside = exist & (rows + down >= 0) & (rows + down < H)
            inside = inside & (columns + right >= 0) & (columns + right < W)
            away = down * W + right
            b_place = tl.load(places_ptr + own_offsets + away * own_pitch, mask=inside, other=-1)
            # From there, this element lies on the other side.
            gave = b_place == (KERNEL - 1 - row) * KERNEL + KERNEL - 1 - column
            if pooled_ptr is None:
                p_pooled = p_grad + STAGE * slice_stride + away * pitch
            else:
                p_pooled = pooled_ptr + own_offsets + away * own_pitch
            b_sum += cast(tl.load(p_pooled, mask=inside & gave, other=0.0), tl.float32)
    b_grad = tl.load(p_grad + (STAGE - 1) * slice_stride, mask=exist, other=0.0)
    b_grad = cast(cast(b_grad, tl.float32) + b_sum, given_ptr.dtype.element_ty)
    tl.store(given_ptr + own_offsets, b_grad, mask=exist)


def _sizes(x: torch.Tensor, slices: int, channels_last: bool) -> tuple[int, int, int, int]:
    """B, C, H, W of a tensor with `slices` times C channels."""
    if channels_last:
        batch, height, width, channels = x.shape
    else:
        batch, channels, height, width = x.shape
    return batch, channels // slices, height, width


def _empty(x: torch.Tensor, sizes: tuple[int, int, int, int], channels_last: bool) -> torch.Tensor:
    batch, channels, height, width = sizes
    inner = (height, width, channels) if channels_last else (channels, height, width)
    return torch.empty((batch, *inner), dtype=x.dtype, device=x.device)


@on_own_device
def sppf(x: torch.Tensor, kernel_size: int, channels_last: bool) -> torch.Tensor:
    """x [B, C, H, W] or [B, H, W, C] -> out with 4 C channels, contiguous."""
    x = x.contiguous()
    sizes = batch, channels, height, width = _sizes(x, 1, channels_last)
    out = _empty(x, (batch, 4 * channels, height, width), channels_last)
    if batch > 0:
        for stage in (1, 2, 3):
            _sppf_kernel[(cdiv(channels * height * width, _BLOCK), batch)](
                x,
                out,
                *sizes[1:],
                STAGE=stage,
                KERNEL=kernel_size,
                CHANNELS_LAST=channels_last,
                BLOCK=_BLOCK,
                num_warps=_NUM_WARPS,
                **COMPILE_OPTIONS,
            )
    return out


@on_own_device
def sppf_backward(
    grad_out: torch.Tensor, out: torch.Tensor, kernel_size: int, channels_last: bool
) -> torch.Tensor:
    """grad_out like out, out of the forward -> grad_x, contiguous."""
    grad_out, out = grad_out.contiguous(), out.contiguous()
    sizes = batch, channels, height, width = _sizes(out, 4, channels_last)
    grad_x = _empty(out, sizes, channels_last)
    if batch == 0:
        return grad_x
    places = torch.empty((3, *grad_x.shape), dtype=torch.int16, device=out.device)
    blocks = cdiv(channels * height * width, _BLOCK)
    options = {
        "KERNEL": kernel_size,
        "CHANNELS_LAST": channels_last,
        "BLOCK": _BLOCK,
        "num_warps": _NUM_WARPS,
        **COMPILE_OPTIONS,
    }
    _sppf_places_kernel[(blocks, batch, 3)](out, places, *sizes[1:], **options)
    pooled = None
    for stage in (3, 2, 1):
        given = grad_x if stage == 1 else torch.empty_like(grad_x, dtype=torch.float32)
        _sppf_gather_kernel[(blocks, batch)](
            grad_out, places[stage - 1], pooled, given, *sizes[1:], STAGE=stage, **options
        )
        pooled = given
    return grad_x


def why_not(*args: object) -> list[str]:
    """What these kernels cannot do with the arguments of any op of this module."""
    reasons = why_not_tensors(*args)
    kernel_size = args[-2]
    if isinstance(kernel_size, int) and kernel_size > _LARGEST_KERNEL_SIZE:
        reasons.append(f"kernel_size {kernel_size} (takes up to {_LARGEST_KERNEL_SIZE})")
    return reasons


def aot_cases() -> list[AheadOfTimeCase]:
    cases = []
    sizes: tuple[tuple[str, bool, dict[str, Constant | str]], ...] = (
        ("planes", False, {"C": "i32:16", "H": "i32", "W": "i32"}),
        ("channels-last", True, {"C": "i32:16", "H": "i32", "W": "i32"}),
        ("planes of 1", False, {"C": Constant(1), "H": Constant(1), "W": Constant(1)}),
    )
    for layout, channels_last, size in sizes:
        shared = size | {
            "KERNEL": Constant(5),
            "CHANNELS_LAST": Constant(channels_last),
            "BLOCK": Constant(_BLOCK),
        }
        for stage in (1, 2):
            arguments = shared | {
                "x_ptr": "*bf16:16",
                "out_ptr": "*bf16:16",
                "STAGE": Constant(stage),
            }
            cases.append(
                AheadOfTimeCase(f"bf16 {layout} {stage}", _sppf_kernel, arguments, _NUM_WARPS)
            )
        places = shared | {"out_ptr": "*bf16:16", "places_ptr": "*i16:16"}
        cases.append(AheadOfTimeCase(f"bf16 {layout}", _sppf_places_kernel, places, _NUM_WARPS))
        for stage, pooled, given in ((3, Constant(None), "*fp32:16"), (1, "*fp32:16", "*bf16:16")):
            arguments = shared | {
                "grad_out_ptr": "*bf16:16",
                "places_ptr": "*i16:16",
                "pooled_ptr": pooled,
                "given_ptr": given,
                "STAGE": Constant(stage),
            }
            cases.append(
                AheadOfTimeCase(
                    f"bf16 {layout} {stage}", _sppf_gather_kernel, arguments, _NUM_WARPS
                )
            )
    return cases
