"""The norm launchers against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from warploom.reference import norm as reference
from warploom.triton_kernels.norm import layer_norm as layer
from warploom.triton_kernels.norm import rms_norm as rms
from warploom.triton_kernels.norm.row_tiles import MAX_COLUMNS, row_tile

Draw = Callable[..., Tensor]
Check = Callable[..., None]
Embed = Callable[[Tensor], Tensor]

# One column; a power of two and its neighbours; rows longer than several tiles of the short ones.
SHAPES = pytest.mark.parametrize(
    "shape", ((1, 1), (5, 63), (3, 64), (2, 17, 65), (40, 3), (1, 4097)), ids=str
)
# More rows than the persistent grid of the backward takes in one round.
MANY_ROWS = (300, 65)
EPS = 1e-5


@SHAPES
def test_rms_norm(
    shape: tuple[int, ...], dtype: torch.dtype, random: Draw, embedded: Embed, assert_close: Check
) -> None:
    x, weight = embedded(random(*shape, dtype=dtype)), random(shape[-1], dtype=dtype)
    actual = rms.rms_norm(x, weight, EPS)
    assert_close(actual, reference.rms_norm, x, weight, EPS, factor=2)


@SHAPES
def test_add_rms_norm_rounds_the_sum_before_it_is_normalised(
    shape: tuple[int, ...], dtype: torch.dtype, random: Draw, embedded: Embed, assert_close: Check
) -> None:
    x, residual = (embedded(random(*shape, dtype=dtype)) for _ in range(2))
    weight = random(shape[-1], dtype=dtype)
    out, total, rstd = rms.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, (x.float() + residual.float()).to(dtype))
    assert_close((out, rstd), reference.rms_norm, total, weight, EPS, factor=2)


@pytest.mark.parametrize("with_grad_sum", (False, True), ids=("norm", "norm-and-sum"))
@pytest.mark.parametrize("shape", ((1, 1), (2, 17, 65), (1, 4097), MANY_ROWS), ids=str)
def test_rms_norm_backward(
    shape: tuple[int, ...],
    with_grad_sum: bool,
    dtype: torch.dtype,
    random: Draw,
    embedded: Embed,
    assert_close: Check,
) -> None:
    x, grad_out, grad_sum = (embedded(random(*shape, dtype=dtype)) for _ in range(3))
    weight = random(shape[-1], dtype=dtype)
    _, rstd = reference.rms_norm(x, weight, EPS)
    args = (grad_out, x, weight, rstd, grad_sum if with_grad_sum else None)
    actual = rms.rms_norm_backward(*args)
    assert_close(actual, reference.rms_norm_backward, *args, factor=3)


@SHAPES
def test_layer_norm(
    shape: tuple[int, ...], dtype: torch.dtype, random: Draw, embedded: Embed, assert_close: Check
) -> None:
    x = embedded(random(*shape, dtype=dtype) + 3)  # a mean that must be taken away
    weight, bias = (random(shape[-1], dtype=dtype) for _ in range(2))
    actual = layer.layer_norm(x, weight, bias, EPS)
    assert_close(actual, reference.layer_norm, x, weight, bias, EPS, factor=2)


@pytest.mark.parametrize("shape", ((1, 1), (2, 17, 65), (1, 4097), MANY_ROWS), ids=str)
def test_layer_norm_backward(
    shape: tuple[int, ...], dtype: torch.dtype, random: Draw, embedded: Embed, assert_close: Check
) -> None:
    x, grad_out = (embedded(random(*shape, dtype=dtype) + 1) for _ in range(2))
    weight, bias = (random(shape[-1], dtype=dtype) for _ in range(2))
    _, mean, rstd = reference.layer_norm(x, weight, bias, EPS)
    args = (grad_out, x, weight, mean, rstd)
    actual = layer.layer_norm_backward(*args)
    assert_close(actual, reference.layer_norm_backward, *args, factor=3)


def test_a_float32_weight_serves_a_16_bit_x(random: Draw, assert_close: Check) -> None:
    x, grad_out = (random(6, 33, dtype=torch.bfloat16) for _ in range(2))
    weight = random(33)
    out, rstd = rms.rms_norm(x, weight, EPS)
    assert_close((out, rstd), reference.rms_norm, x, weight, EPS, factor=2)
    actual = rms.rms_norm_backward(grad_out, x, weight, rstd, None)
    assert actual[1].dtype == torch.float32
    assert_close(actual, reference.rms_norm_backward, grad_out, x, weight, rstd, None, factor=3)


@pytest.mark.parametrize(
    "view",
    (
        pytest.param(lambda x: x.transpose(0, 1), id="rows-in-another-order"),
        pytest.param(lambda x: x[..., ::2], id="every-other-column"),
        pytest.param(lambda x: x[:1].expand(4, 6, 10), id="one-row-broadcast"),
        pytest.param(lambda x: x.flip(-1).transpose(-1, -2), id="columns-strided"),
    ),
)
def test_any_strides_give_what_a_contiguous_copy_gives(
    view: Callable[[Tensor], Tensor], random: Draw
) -> None:
    x = view(random(4, 6, 10))
    weight = random(x.shape[-1])
    for got, want in zip(
        rms.rms_norm(x, weight, EPS), rms.rms_norm(x.contiguous(), weight, EPS), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("shape", ((0, 8), (3, 0, 8)), ids=str)
def test_no_rows(shape: tuple[int, ...]) -> None:
    x, weight = torch.zeros(shape), torch.ones(8)
    out, rstd = rms.rms_norm(x, weight, EPS)
    assert out.shape == shape
    assert rstd.shape == shape[:-1]
    grad_x, grad_weight = rms.rms_norm_backward(x, x, weight, rstd, None)
    assert grad_x.shape == shape
    assert torch.equal(grad_weight, torch.zeros(8))
    out, mean, rstd = layer.layer_norm(x, weight, weight, EPS)
    assert out.shape == shape
    _, grad_weight, grad_bias = layer.layer_norm_backward(x, x, weight, mean, rstd)
    assert torch.equal(grad_weight, torch.zeros(8))
    assert torch.equal(grad_bias, torch.zeros(8))


def test_weight_gradients_are_bitwise_reproducible(random: Draw) -> None:
    x, grad_out = random(MANY_ROWS[0], 33), random(MANY_ROWS[0], 33)
    weight = random(33)
    _, rstd = rms.rms_norm(x, weight, EPS)
    runs = [rms.rms_norm_backward(grad_out, x, weight, rstd, None)[1] for _ in range(2)]
    assert torch.equal(*runs)


def test_large_magnitudes_stay_finite(random: Draw, assert_close: Check) -> None:
    x, weight = random(3, 100, dtype=torch.bfloat16, scale=1e15), random(100, dtype=torch.bfloat16)
    assert_close(rms.rms_norm(x, weight, EPS), reference.rms_norm, x, weight, EPS, factor=2)


def test_why_not_names_what_triton_cannot_do() -> None:
    weight = torch.ones(4)
    assert rms.why_not(torch.ones(2, 4), weight, EPS) == []
    (reason,) = rms.why_not(torch.ones(2, 4, dtype=torch.float64), weight.double(), EPS)
    assert "float64" in reason
    (reason,) = layer.why_not(torch.ones(1, 1).expand(1, MAX_COLUMNS + 1), weight, weight, EPS)
    assert str(MAX_COLUMNS) in reason


@pytest.mark.parametrize("n", (1, 100, 4096, MAX_COLUMNS))
def test_a_tile_holds_whole_rows(n: int) -> None:
    tile = row_tile(n)
    assert tile.columns >= n
    assert tile.rows * tile.columns <= max(2048, tile.columns)
