"""Weights in 4 and 8 bits: their tables, their rounding, and bitsandbytes' own bytes."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional
from warploom.ops.lora import CompressedScale, QuantizedWeight, lora_linear
from warploom.reference import quantization

FORMATS = ["nf4", "int8", "fp8_e4m3"]
every_format = pytest.mark.parametrize("format", FORMATS)


@every_format
def test_every_element_is_the_nearest_one(format):
    weight = torch.randn(6, 128)
    quantized = QuantizedWeight.quantize(weight, format, 64)
    if format == "nf4":
        levels = torch.tensor(quantization.NF4)
    elif format == "int8":
        levels = torch.arange(-127.0, 128.0)
    else:
        every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        levels = every[torch.isfinite(every)]
    values = levels * quantized.scale.repeat_interleave(64, 1)[..., None]
    nearest = (values - weight[..., None]).abs().amin(-1)
    error = (quantized.dequantize() - weight).abs()
    torch.testing.assert_close(error, nearest, rtol=0, atol=1e-6)


@every_format
def test_blocks_of_zeros_stay_zeros(format):
    weight = torch.randn(2, 128)
    weight[:, :64] = 0
    assert not QuantizedWeight.quantize(weight, format, 64).dequantize()[:, :64].any()


def test_compressed_scales_are_close_and_small():
    scale = torch.rand(40, 16) + 0.5
    compressed = CompressedScale.compress(scale)
    assert (compressed.expand() - scale).abs().max() < 0.01
    size = sum(
        part.numel() * part.element_size()
        for part in (compressed.codes, compressed.block_scale, compressed.offset)
    )
    assert size < scale.numel() * 1.05


@pytest.mark.parametrize("double", [False, True], ids=["float32 scales", "double quantisation"])
def test_bitsandbytes_own_bytes(double):
    """Its table, its choice of codes and its dequantised weights, bit for bit."""
    weight = torch.randn(48, 256)
    values, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=double
    )
    assert torch.equal(state.code, torch.tensor(quantization.NF4))
    theirs = QuantizedWeight.from_bitsandbytes(values, state)
    ours = QuantizedWeight.quantize(weight, "nf4", double_quantize=double)
    assert torch.equal(ours.values, theirs.values)
    assert torch.equal(theirs.dequantize(), functional.dequantize_4bit(values, state))
    if double:
        assert torch.equal(state.state2.code, quantization.dynamic_codes())
        torch.testing.assert_close(ours.block_scale, theirs.block_scale, rtol=0, atol=0.02)


def test_a_product_with_compressed_scales():
    weight, x = torch.randn(24, 128, dtype=torch.float64), torch.randn(3, 128, dtype=torch.float64)
    quantized = QuantizedWeight.quantize(weight, "nf4", double_quantize=True)
    out = lora_linear(x, quantized, None, None, None, 1.0)
    torch.testing.assert_close(out, x @ quantized.dequantize(torch.float64).T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block_size", [3, 48, 0], ids=["odd", "no divisor", "zero"])
def test_a_block_size_that_does_not_fit_is_named(block_size):
    with pytest.raises(ValueError, match="QuantizedWeight.quantize: block_size: expected an even"):
        QuantizedWeight.quantize(torch.zeros(2, 128), "int8", block_size)
