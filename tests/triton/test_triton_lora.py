"""The launchers of family lora against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from warploom.reference import lora as reference
from warploom.reference import quantization
from warploom.triton_kernels.lora import gated_activation_shrink as gated
from warploom.triton_kernels.lora import lora_linear as linear
from warploom.triton_kernels.lora import rms_norm_shrink as normed
from warploom.triton_kernels.lora import tiles
from warploom.triton_kernels.lora.lora_linear_backward import lora_linear_backward
from warploom.triton_kernels.lora.lora_shrink import lora_shrink, lora_shrink_backward, why_not

Draw = Callable[..., Tensor]
Check = Callable[..., None]
Embed = Callable[[Tensor], Tensor]

SEED = 2**40 + 12345
RANKS = pytest.mark.parametrize("rank", (1, 3, 16, 33), ids="rank-{}".format)
EVERY_FORMAT = pytest.mark.parametrize("weight_format", quantization.FORMATS)


def seed_of(dropout_p: float) -> Tensor | None:
    return torch.tensor([SEED]) if dropout_p else None


def stored(weight: Tensor, weight_format: str, block: int) -> tuple[Tensor, Tensor | None]:
    """The weight as the op is given it: its own values, or bytes and scales."""
    if weight_format == "dense":
        return weight, None
    values, scale = quantization.quantize(weight, weight_format, block)
    return values.view(torch.uint8), scale


def linear_args(
    random: Draw,
    dtype: torch.dtype,
    weight_format: str = "dense",
    *,
    rows: int = 37,
    columns: int = 70,
    terms: int = 128,
    rank: int = 3,
    block: int = 64,
    dropout_p: float = 0.3,
    adapter_dtype: torch.dtype | None = None,
) -> list[Any]:
    """Arguments of lora_linear with all that it can have."""
    weight, scale = stored(random(columns, terms, dtype=dtype), weight_format, block)
    adapter_dtype = adapter_dtype or dtype
    return [
        random(rows, terms, dtype=dtype),
        weight,
        scale,
        random(columns, dtype=dtype),
        random(rank, terms, dtype=adapter_dtype),
        random(columns, rank, dtype=adapter_dtype),
        random(columns).abs() + 0.5,
        None,
        seed_of(dropout_p),
        weight_format,
        0.5,
        dropout_p,
    ]


def backward_args(random: Draw, args: list[Any]) -> list[Any]:
    """Arguments of the backward of a call, every gradient but a quantised weight's asked for."""
    x, weight, scale, bias, lora_a, lora_b, column_scale, shrunk, seed, *scalars = args
    out, made, unscaled = reference.lora_linear(*args)
    given = shrunk if lora_a is None else made
    kept = None if column_scale is None else unscaled
    asked = [True, scale is None, bias is not None, lora_a is not None, lora_b is not None]
    asked += [column_scale is not None, lora_b is not None and lora_a is None]
    grad_out = random(*out.shape, dtype=x.dtype)
    return [
        grad_out,
        x,
        weight,
        scale,
        lora_a,
        lora_b,
        column_scale,
        given,
        seed,
        kept,
        *scalars,
        *asked,
    ]


def check_linear(random: Draw, assert_close: Check, args: list[Any]) -> None:
    """The output and every gradient."""
    assert_close(linear.lora_linear(*args), reference.lora_linear, *args, factor=2)
    backward = backward_args(random, args)
    results = lora_linear_backward(*backward)
    assert_close(results, reference.lora_linear_backward, *backward, factor=3)


@pytest.mark.parametrize(
    ("rank", "dropout_p"),
    ((1, 0.6), (3, 0.0), (16, 0.6), (33, 0.0)),
)
def test_shrink(
    rank: int,
    dropout_p: float,
    dtype: torch.dtype,
    random: Draw,
    embedded: Embed,
    assert_close: Check,
) -> None:
    x, lora_a = embedded(random(35, 139, dtype=dtype)), embedded(random(rank, 139, dtype=dtype))
    args = (x, lora_a, seed_of(dropout_p), dropout_p)
    assert_close((lora_shrink(*args),), reference.lora_shrink, *args, factor=2)
    backward = (embedded(random(35, rank, dtype=dtype)), *args, True, True)
    assert_close(
        lora_shrink_backward(*backward), reference.lora_shrink_backward, *backward, factor=3
    )


def test_shrink_of_more_ranks_than_a_tile_has(random: Draw, assert_close: Check) -> None:
    args = (random(3, 70), random(tiles.MAX_RANK + 3, 70), seed_of(0.5), 0.5)
    assert_close((lora_shrink(*args),), reference.lora_shrink, *args, factor=2)
    backward = (random(3, tiles.MAX_RANK + 3), *args, True, True)
    assert_close(
        lora_shrink_backward(*backward), reference.lora_shrink_backward, *backward, factor=3
    )


@EVERY_FORMAT
def test_linear(weight_format: str, dtype: torch.dtype, random: Draw, assert_close: Check) -> None:
    check_linear(random, assert_close, linear_args(random, dtype, weight_format))


@pytest.mark.parametrize("block", (2, 26, 130), ids="blocks-of-{}".format)
@pytest.mark.parametrize("weight_format", quantization.FORMATS[1:])
def test_blocks_that_no_tile_fits(
    weight_format: str, block: int, random: Draw, assert_close: Check
) -> None:
    args = linear_args(random, torch.bfloat16, weight_format, rows=9, terms=130, block=block)
    check_linear(random, assert_close, args)


@RANKS
def test_adapters_in_float32_beside_bfloat16(rank: int, random: Draw, assert_close: Check) -> None:
    args = linear_args(random, torch.bfloat16, rank=rank, adapter_dtype=torch.float32)
    check_linear(random, assert_close, args)


@pytest.mark.parametrize("rows", (0, 1, 129), ids="rows-{}".format)
def test_rows(rows: int, random: Draw, assert_close: Check) -> None:
    """Few rows have tiles of their own: 32 rows and fewer."""
    check_linear(
        random, assert_close, linear_args(random, torch.bfloat16, "nf4", rows=rows, terms=64)
    )


@pytest.mark.parametrize("without", ("bias", "column_scale", "dropout", "lora_a", "update"))
def test_parts_are_optional(without: str, random: Draw, assert_close: Check) -> None:
    args = linear_args(random, torch.float32, dropout_p=0.0 if without == "dropout" else 0.3)
    if without in ("lora_a", "update"):
        args[4], args[8], args[11] = None, None, 0.0
    if without == "lora_a":
        args[7] = random(37, 3)
    if without == "update":
        args[5] = args[6] = None
    if without == "bias":
        args[3] = None
    if without == "column_scale":
        args[6] = None
    check_linear(random, assert_close, args)


def test_more_row_tiles_than_a_band_has(random: Draw, assert_close: Check) -> None:
    """Nine tiles of 64 rows beside two of 64 columns."""
    args = linear_args(random, torch.float32, rows=530, terms=20)
    assert_close(linear.lora_linear(*args), reference.lora_linear, *args, factor=2)


def test_long_sums_over_rows_are_cut(random: Draw, assert_close: Check) -> None:
    """Into two parts from 1024 rows on, with the mask of the second part's rows."""
    args = linear_args(random, torch.bfloat16, rows=1030, columns=20, terms=24)
    backward = backward_args(random, args)
    assert tiles.outer_splits(1030, 1) == 2
    results = lora_linear_backward(*backward)
    assert_close(results, reference.lora_linear_backward, *backward, factor=3)


def test_rows_apart_in_memory(random: Draw, embedded: Embed, assert_close: Check) -> None:
    args = linear_args(random, torch.float16)
    args[:2] = embedded(args[0]), embedded(args[1])
    args[4:6] = embedded(args[4]), embedded(args[5])
    assert_close(linear.lora_linear(*args), reference.lora_linear, *args, factor=2)
    backward = backward_args(random, args)
    backward[0] = embedded(backward[0])
    results = lora_linear_backward(*backward)
    assert_close(results, reference.lora_linear_backward, *backward, factor=3)


@pytest.mark.parametrize("weight_format", quantization.FORMATS[1:])
def test_every_code_is_read_as_the_reference_does(weight_format: str) -> None:
    """Rows of the unit matrix pick single elements, whose products are exact."""
    codes = torch.arange(256, dtype=torch.uint8)
    spoiled = (codes & 0x7F) == 0x7F
    if weight_format == "fp8_e4m3":
        codes[spoiled] = 0
    weight, scale = codes.view(16, 16), torch.full((16, 1), 3.0)
    exact = quantization.dequantize(weight, scale, weight_format, torch.float32)
    unit = torch.eye(exact.shape[1])
    nothing = (None,) * 6
    out, _, _ = linear.lora_linear(unit, weight, scale, *nothing, weight_format, 1.0, 0.0)
    assert torch.equal(out, exact.T)
    if weight_format == "fp8_e4m3":
        weight = torch.tensor([[0x7F, 0], [0xFF, 0], [0x7E, 0]], dtype=torch.uint8)
        out, _, _ = linear.lora_linear(
            unit[:2, :2], weight, scale[:3], *nothing, weight_format, 1.0, 0.0
        )
        assert torch.equal(out[0].isnan(), torch.tensor([True, True, False]))


@pytest.mark.parametrize("wanted", range(6), ids=("x", "weight", "bias", "a", "b", "column_scale"))
def test_only_one_gradient_is_asked_for(wanted: int, random: Draw) -> None:
    *args, _, _, _, _, _, _, _ = backward_args(random, linear_args(random, torch.float32))
    every = lora_linear_backward(*args, *[True] * 7)
    single = lora_linear_backward(*args, *(place == wanted for place in range(7)))
    assert torch.equal(single[wanted], every[wanted])
    assert [grad.numel() > 0 for grad in single] == [place == wanted for place in range(7)]


@pytest.mark.parametrize(("rank", "residual"), ((1, True), (3, False), (16, True), (33, False)))
def test_rms_norm_shrink(
    residual: bool,
    rank: int,
    dtype: torch.dtype,
    random: Draw,
    embedded: Embed,
    assert_close: Check,
) -> None:
    x, added = (embedded(random(35, 139, dtype=dtype)) for _ in range(2))
    weight, lora_a = random(139, dtype=dtype), embedded(random(rank, 139, dtype=dtype))
    args = (x, added if residual else None, weight, lora_a, 1e-5)
    assert_close(normed.rms_norm_shrink(*args), reference.rms_norm_shrink, *args, factor=2)


def test_rms_norm_shrink_with_parameters_in_float32(random: Draw, assert_close: Check) -> None:
    x, residual = random(2, 300, dtype=torch.bfloat16), random(2, 300, dtype=torch.bfloat16)
    args = (x, residual, random(300), random(tiles.MAX_RANK + 3, 300), 1e-6)
    assert_close(normed.rms_norm_shrink(*args), reference.rms_norm_shrink, *args, factor=2)


def test_small_rows_are_normalised_before_the_product(random: Draw, assert_close: Check) -> None:
    """Sums of float16 near its smallest number times a small weight would be lost."""
    x, weight = (
        random(3, 64, dtype=torch.float16, scale=1e-5),
        random(64, dtype=torch.float16, scale=1e-3),
    )
    args = (x, None, weight, random(4, 64, dtype=torch.float16), 1e-12)
    assert_close(normed.rms_norm_shrink(*args), reference.rms_norm_shrink, *args, factor=2)


@pytest.mark.parametrize(
    ("activation", "rank"), (("silu", 1), ("gelu", 3), ("gelu_tanh", 16), ("silu", 33))
)
def test_gated_activation_shrink(
    activation: str,
    rank: int,
    dtype: torch.dtype,
    random: Draw,
    embedded: Embed,
    assert_close: Check,
) -> None:
    gate, up = (embedded(random(35, 139, dtype=dtype)) for _ in range(2))
    args = (gate, up, embedded(random(rank, 139, dtype=dtype)), activation)
    results = gated.gated_activation_shrink(*args)
    assert_close(results, reference.gated_activation_shrink, *args, factor=2)


@pytest.mark.parametrize("shape", ((0, 4), (1, 5)), ids=str)
@pytest.mark.parametrize("rank", (2, tiles.MAX_RANK + 1), ids="rank-{}".format)
def test_fused_rows(shape: tuple[int, int], rank: int, random: Draw, assert_close: Check) -> None:
    """More ranks than a tile has are programs of their own."""
    x, lora_a = random(*shape), random(rank, shape[1])
    args = (x, x, lora_a, "silu")
    results = gated.gated_activation_shrink(*args)
    assert_close(results, reference.gated_activation_shrink, *args, factor=2)
    args = (x, x, lora_a[0], lora_a, 1e-5)
    assert_close(normed.rms_norm_shrink(*args), reference.rms_norm_shrink, *args, factor=2)


def test_why_not_names_what_triton_cannot_do(random: Draw) -> None:
    x, lora_a = random(2, 8), random(300, 8)
    args = linear_args(random, torch.float32, "nf4")
    assert linear.why_not(*args) == why_not(x, lora_a, None, 0.0) == []
    assert normed.why_not(x, None, x[0], lora_a, 1e-5) == gated.why_not(x, x, lora_a, "silu") == []
    assert "float64" in linear.why_not(args[0].double(), *args[1:])[0]
    long = torch.zeros(1).expand(1, 65537)
    assert "65537" in normed.why_not(long, None, long[0], long, 1e-5)[0]
