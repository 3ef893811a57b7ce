"""Tiles of a weight [N, K], dense or in 4 or 8 bits (warploom.reference.quantization).

A quantised element is read as float32, multiplied with its block's scale and rounded once.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl
from warploom.reference.quantization import NF4
from warploom.triton_kernels.common.launch import Constant
from warploom.triton_kernels.common.numerics import cast

# What the kernels read; the bytes of nf4 and fp8_e4m3 are taken apart there.
_STORED = {"nf4": torch.uint8, "int8": torch.int8, "fp8_e4m3": torch.uint8}
_STORED_NAMES = {"nf4": "u8", "int8": "i8", "fp8_e4m3": "u8"}


@functools.cache
def _nf4_table(device: torch.device) -> torch.Tensor:
    return torch.tensor(NF4, dtype=torch.float32, device=device)


@triton.jit
def _from_e4m3(bits):
    """uint8 -> float32, exactly. All ones but the sign is NaN; there are no infinities."""
    magnitude = bits & 0x7F
    # Three bits of fraction below four of exponent are a float16 whose exponent is 8 too small,
    # subnormal numbers included.
    half = ((bits & 0x80).to(tl.uint16) << 8) | (magnitude.to(tl.uint16) << 7)
    value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where(magnitude == 0x7F, float("nan"), value)


@triton.jit
def weight_tile(
    weight,
    first_row,
    first_column,
    N,
    K,
    dtype: tl.constexpr,
    FORMAT: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_N, BLOCK_K] of the weight in `dtype`, from (first_row, first_column); 0 outside of it.

    weight is a tuple of pointers and sizes: values [N, K], or [N, K / 2] for nf4; scale float32
    [N, blocks]; NF4's 16 values; columns of a block, even; blocks. ONE_SCALE: no tile's columns
    belong to two blocks. first_column is a multiple of BLOCK_K, K even for nf4.
    """
    values_ptr, scale_ptr, table_ptr, scale_block, blocks = weight
    rows = (first_row + tl.arange(0, BLOCK_N)[:, None]).to(tl.int64)
    columns = first_column + tl.arange(0, BLOCK_K)[None, :]
    mask = (rows < N) & (columns < K)
    if FORMAT == "dense":
        return tl.load(values_ptr + rows * K + columns, mask=mask, other=0.0)
    else:
        if FORMAT == "nf4":
            pairs = first_column // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
            # [BLOCK_N, BLOCK_K / 2]
            p_values = values_ptr + rows * (K // 2) + pairs
            b_pairs = tl.load(p_values, mask=(rows < N) & (pairs < K // 2), other=0)
            b_codes = tl.interleave(b_pairs >> 4, b_pairs & 15)
            b_values = tl.load(table_ptr + b_codes.to(tl.int32))
        else:
            b_stored = tl.load(values_ptr + rows * K + columns, mask=mask, other=0)
            if FORMAT == "int8":
                b_values = b_stored.to(tl.float32)
            else:
                tl.static_assert(FORMAT == "fp8_e4m3", "weight_format: dense, nf4, int8, fp8_e4m3")
                b_values = _from_e4m3(b_stored)
        if ONE_SCALE:
            # [BLOCK_N, 1]
            p_scale = scale_ptr + rows * blocks + first_column // scale_block
            b_scale = tl.load(p_scale, mask=rows < N, other=0.0)
        else:
            # [BLOCK_N, BLOCK_K / 2]
            pairs = first_column + 2 * tl.arange(0, BLOCK_K // 2)[None, :]
            p_scale = scale_ptr + rows * blocks + pairs // scale_block
            b_scale = tl.load(p_scale, mask=(rows < N) & (pairs < K), other=0.0)
            b_scale = tl.interleave(b_scale, b_scale)
        return cast(b_values * b_scale, dtype)


@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """A weight [N, K] as the launchers take it: values, scales (None if dense) and format."""

    values: torch.Tensor
    scale: torch.Tensor | None
    format: str

    def arguments(self, tile_columns: int) -> dict[str, object]:
        """Kernel arguments for tiles of `tile_columns` columns."""
        values, scale, block, blocks = self.values.contiguous(), self.scale, 1, 1
        if scale is not None:
            values, scale, blocks = (
                values.view(_STORED[self.format]),
                scale.contiguous(),
                scale.shape[1],
            )
            block = values.shape[1] * (2 if self.format == "nf4" else 1) // max(1, blocks)
        return {
            "values_ptr": values,
            "scale_ptr": scale,
            "table_ptr": _nf4_table(values.device) if self.format == "nf4" else None,
            "scale_block": block,
            "scale_blocks": blocks,
            "FORMAT": self.format,
            "ONE_SCALE": blocks == 1 or block % tile_columns == 0,
        }


def weight_types(name: str, weight_format: str, one_scale: bool) -> dict[str, Constant | str]:
    """`StoredWeight.arguments` for an ahead-of-time case; `name` is x's type."""
    stored = weight_format != "dense"
    return {
        "values_ptr": f"*{_STORED_NAMES.get(weight_format, name)}:16",
        "scale_ptr": "*fp32:16" if stored else Constant(None),
        "table_ptr": "*fp32:16" if weight_format == "nf4" else Constant(None),
        "scale_block": "i32:16" if stored else Constant(1),
        "scale_blocks": "i32" if stored else Constant(1),
        "FORMAT": Constant(weight_format),
        "ONE_SCALE": Constant(one_scale),
    }
