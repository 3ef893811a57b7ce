"""Weights in 4 and 8 bits, in plain PyTorch: how they are stored, made and read.

A weight [N, K] is cut into blocks of K / S columns, each with one scale: weight_scale float32 [N, S].

  format     stored as                              element
  nf4        uint8 [N, K / 2], two a byte, the      weight_scale NF4[code], NF4 the 16 quantiles of a normal
             first in the upper four bits           distribution (Dettmers et al., QLoRA, arXiv:2305.14314)
  int8       int8 [N, K], or its bytes              weight_scale value
  fp8_e4m3   float8_e4m3fn [N, K], or its bytes     weight_scale value
"""

from __future__ import annotations

import torch
from torch import Tensor

FORMATS = ("dense", "nf4", "int8", "fp8_e4m3")

#: QLoRA, appendix E; the table of bitsandbytes.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

_LARGEST = {"nf4": 1.0, "int8": 127.0, "fp8_e4m3": 448.0}
_ELEMENT = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}


def quantize(weight: Tensor, weight_format: str, block_size: int) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> (stored weight, weight_scale float32 [N, K / block_size]).

    A block's scale is its largest absolute value over the format's largest element; every element becomes the
    nearest one of the format, ties going to the lower of two NF4 values. A block of zeros stays zeros.
    """
    rows, columns = weight.shape
    blocks = weight.float().reshape(rows, columns // block_size, block_size)
    scale = blocks.abs().amax(-1) / _LARGEST[weight_format]
    # Zeros are not divided by their scale of zero; elements that are not finite stay so.
    scaled = (blocks / torch.where(scale == 0, 1.0, scale)[..., None]).reshape(rows, columns)
    if weight_format == "int8":
        return scaled.round().to(torch.int8), scale
    if weight_format == "fp8_e4m3":
        return scaled.to(torch.float8_e4m3fn), scale
    table = torch.tensor(NF4, device=weight.device)
    codes = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2).to(torch.uint8)
    return codes[:, 0::2] << 4 | codes[:, 1::2], scale


def dequantize(
    weight: Tensor, weight_scale: Tensor | None, weight_format: str, dtype: torch.dtype
) -> Tensor:
    """The weight [N, K] in `dtype`: multiplied in float32, rounded once; a dense one as it is."""
    if weight_format == "dense" or weight_scale is None:
        return weight
    if weight_format == "nf4":
        table = torch.tensor(NF4, device=weight.device)
        codes = torch.stack((weight >> 4, weight & 15), dim=-1).flatten(-2)
        values = table[codes.long()]
    else:
        values = weight.view(_ELEMENT[weight_format]).float()
    rows, columns = values.shape
    blocks = values.reshape(rows, weight_scale.shape[1], -1) * weight_scale[..., None]
    return blocks.reshape(rows, columns).to(dtype)


#: Scales of one block of compressed scales.
SCALE_BLOCK = 256


def dynamic_codes(device: torch.device | str = "cpu") -> Tensor:
    """256 rising numbers from -1 to 1, denser towards 0: 7 decades, each with twice the numbers of the one
    below.

    Source: Dettmers, 8-bit approximations for parallelism (arXiv:1511.04561); bitsandbytes' dynamic map.
    """
    numbers = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2**decade + 1)
        middles = 10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2
        numbers += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(numbers), device=device)


def compress_scale(scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """QLoRA's double quantisation of scales, in any shape: (codes uint8 [n], block_scale [blocks], offset
    []).

    Less their mean, the offset, every 256 of them are divided by their largest absolute value and become the
    nearest of `dynamic_codes`.
    """
    flat = scale.flatten()
    offset = flat.mean()
    missing = -len(flat) % SCALE_BLOCK
    blocks = torch.nn.functional.pad(flat - offset, (0, missing)).view(-1, SCALE_BLOCK)
    block_scale = blocks.abs().amax(1)
    numbers = dynamic_codes(scale.device)
    relative = blocks / torch.where(block_scale == 0, 1.0, block_scale)[:, None]
    codes = torch.bucketize(relative, (numbers[1:] + numbers[:-1]) / 2).to(torch.uint8)
    return codes.flatten()[: len(flat)], block_scale, offset


def expand_scale(codes: Tensor, block_scale: Tensor, offset: Tensor) -> Tensor:
    """The scales [n] that `compress_scale` has stored."""
    numbers = dynamic_codes(codes.device)[codes.long()]
    return numbers * block_scale.repeat_interleave(SCALE_BLOCK)[: len(codes)] + offset
