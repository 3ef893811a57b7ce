"""Frozen weights in 4 and 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from warploom.ops._check import check_dim, fail
from warploom.reference import quantization


@dataclass(frozen=True)
class CompressedScale:
    """float32 scales [N, S] as codes of 8 bits: QLoRA's double quantisation, 0.127 bits a weight for 0.5.

    Attributes:
        codes: uint8 [N, S].
        block_scale: float32, one a block of 256 codes.
        offset: float32, the scales' mean.
    """

    codes: Tensor
    block_scale: Tensor
    offset: Tensor

    @classmethod
    def compress(cls, scale: Tensor) -> CompressedScale:
        codes, block_scale, offset = quantization.compress_scale(scale)
        return cls(codes.view(scale.shape), block_scale, offset)

    def expand(self) -> Tensor:
        flat = quantization.expand_scale(self.codes.flatten(), self.block_scale, self.offset)
        return flat.view(self.codes.shape)


@dataclass(frozen=True)
class QuantizedWeight:
    """A frozen weight [N, K] in 4 or 8 bits, dequantised inside the products that read it.

    `warploom.reference.quantization` has the formats.

    Attributes:
        values: nf4: uint8 [N, K / 2]; int8: int8 [N, K]; fp8_e4m3: float8_e4m3fn [N, K].
        scale: float32 [N, K / block], one number a block of columns, blocks of an even number of columns; or
            those in 8 bits, which every product expands.
        format: "nf4", "int8" or "fp8_e4m3".
    """

    values: Tensor
    scale: Tensor | CompressedScale
    format: str

    @classmethod
    def quantize(
        cls,
        weight: Tensor,
        format: str,
        block_size: int | None = None,
        *,
        double_quantize: bool = False,
    ) -> QuantizedWeight:
        """weight [N, K] to the nearest values.

        Args:
            block_size: columns that share a scale; default: 64 for nf4, else the whole row.
            double_quantize: whether the scales become a `CompressedScale`.

        Raises:
            ValueError: an unknown format; a block size that is odd or does not divide K.
        """
        op = "QuantizedWeight.quantize"
        if format not in quantization.FORMATS[1:]:
            fail(op, "format", "one of " + ", ".join(quantization.FORMATS[1:]), repr(format))
        check_dim(op, "weight", weight, 2, "[N, K]")
        columns = weight.shape[1]
        if block_size is None:
            block_size = 64 if format == "nf4" else columns
        if block_size < 2 or block_size % 2 or columns % block_size:
            fail(op, "block_size", f"an even divisor of {columns}", block_size)
        values, scale = quantization.quantize(weight.detach(), format, block_size)
        return cls(values, CompressedScale.compress(scale) if double_quantize else scale, format)

    @classmethod
    def from_bitsandbytes(cls, values: Tensor, quant_state: Any) -> QuantizedWeight:
        """The weight and quant_state of a `bitsandbytes.nn.Linear4bit`, its bytes as they are.

        Raises:
            ValueError: another quant_type than nf4; blocks that go over the end of a row.
        """
        op = "QuantizedWeight.from_bitsandbytes"
        rows, columns = quant_state.shape
        if quant_state.quant_type != "nf4":
            fail(op, "quant_state", "quant_type 'nf4'", repr(quant_state.quant_type))
        if columns % quant_state.blocksize:
            fail(op, "quant_state", f"a blocksize that divides {columns}", quant_state.blocksize)
        shape = (rows, columns // quant_state.blocksize)
        absmax: Tensor = quant_state.absmax.view(shape)
        scale: Tensor | CompressedScale = absmax
        if quant_state.nested:
            scale = CompressedScale(absmax, quant_state.state2.absmax, quant_state.offset)
        return cls(values.view(rows, columns // 2), scale, "nf4")

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.values.shape
        return rows, columns * 2 if self.format == "nf4" else columns

    @property
    def block_scale(self) -> Tensor:
        """float32 [N, K / block]."""
        return self.scale.expand() if isinstance(self.scale, CompressedScale) else self.scale

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] in `dtype`."""
        return quantization.dequantize(self.values, self.block_scale, self.format, dtype)
