"""Blocks of pixels that become channels, and back: every element of the output is fetched from its place."""

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
from warploom.triton_kernels.coupling.elements import empty_like_lines, lines_are_channels

NUM_WARPS = 4
_BLOCK = 2048
_FIRST_WIDE = 2**31


@triton.jit(do_not_specialize=["elements"])
def _squeeze_kernel(
    x_ptr,  # [B, ?, ?, ?], strides x_b, x_c, x_h, x_w
    z_ptr,  # [B, C, H, W], dense: the channels of a pixel side by side with CHANNELS_LAST
    elements, C, H, W, x_b, x_c, x_h, x_w,
    FACTOR: tl.constexpr, BY_POSITION: tl.constexpr, INVERSE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """z: x squeezed, or INVERSE back. Grid: [cdiv(elements, BLOCK)], in the order of z's memory."""
    POSITIONS: tl.constexpr = FACTOR * FACTOR
    start = tl.program_id(0).to(tl.int64) * BLOCK if WIDE else tl.program_id(0) * BLOCK
    # [BLOCK] from here on
    places = start + tl.arange(0, BLOCK)
    if CHANNELS_LAST:
        channels, pixels = places % C, places // C
        columns, rows, samples = pixels % W, pixels // W % H, pixels // W // H
    else:
        columns, lines = places % W, places // W
        rows, channels, samples = lines % H, lines // H % C, lines // H // C
    if INVERSE:
        position = rows % FACTOR * FACTOR + columns % FACTOR
        channels = position * C + channels if BY_POSITION else channels * POSITIONS + position
        rows, columns = rows // FACTOR, columns // FACTOR
    else:
        image_channels = C // POSITIONS
        position = channels // image_channels if BY_POSITION else channels % POSITIONS
        channels = channels % image_channels if BY_POSITION else channels // POSITIONS
        rows = rows * FACTOR + position // FACTOR
        columns = columns * FACTOR + position % FACTOR
    p_x = x_ptr + samples * x_b + channels * x_c + rows * x_h + columns * x_w
    b_x = tl.load(p_x, mask=places < elements)
    tl.store(z_ptr + places, b_x, mask=places < elements)


@on_own_device
def squeeze(x: torch.Tensor, factor: int, order: str, inverse: bool) -> torch.Tensor:
    """x [B, C, H, W] -> [B, C f^2, H / f, W / f], or with `inverse` back; in the layout of x."""
    batch, channels, height, width = x.shape
    positions = factor * factor
    shape = (
        (batch, channels // positions, height * factor, width * factor)
        if inverse
        else (batch, channels * positions, height // factor, width // factor)
    )
    z = empty_like_lines(torch.Size(shape), x)
    if x.numel() > 0:
        reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
        _squeeze_kernel[(cdiv(z.numel(), _BLOCK),)](
            x,
            z,
            z.numel(),
            *z.shape[1:],
            *x.stride(),
            FACTOR=factor,
            BY_POSITION=order == "position_major",
            INVERSE=inverse,
            CHANNELS_LAST=lines_are_channels(x),
            WIDE=max(reach, z.numel()) + _BLOCK >= _FIRST_WIDE,
            BLOCK=_BLOCK,
            num_warps=NUM_WARPS,
            **COMPILE_OPTIONS,
        )
    return z


def why_not(*args: object) -> list[str]:
    """What this kernel cannot do with the op's arguments."""
    return why_not_tensors(*args)


def aot_cases() -> list[AheadOfTimeCase]:
    cases = []
    for channels_last in (False, True):
        line = "x_c" if channels_last else "x_w"
        arguments: dict[str, Constant | str] = {
            "x_ptr": "*bf16:16",
            "z_ptr": "*bf16:16",
            "elements": "i32",
            **dict.fromkeys(("C", "H", "W"), "i32:16"),
            **dict.fromkeys(("x_b", "x_c", "x_h", "x_w"), "i32:16"),
            line: Constant(1),
            "FACTOR": Constant(2),
            "BY_POSITION": Constant(channels_last),
            "INVERSE": Constant(channels_last),
            "CHANNELS_LAST": Constant(channels_last),
            "WIDE": Constant(False),
            "BLOCK": Constant(_BLOCK),
        }
        name = "bf16 channels last, inverse" if channels_last else "bf16"
        cases.append(AheadOfTimeCase(name, _squeeze_kernel, arguments, NUM_WARPS))
    return cases
