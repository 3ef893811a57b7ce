"""The gated activation launchers against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from warploom.reference import activation as reference
from warploom.triton_kernels.activation import gated_activation as gated

Draw = Callable[..., Tensor]
Check = Callable[..., None]
Embed = Callable[[Tensor], Tensor]

ACTIVATIONS = pytest.mark.parametrize("activation", ("silu", "gelu", "gelu_tanh"))
SHAPES = pytest.mark.parametrize(
    "shape", ((1,), (3, 63), (2, 3, 65), (2, 1025), (1030, 2)), ids=str
)


@ACTIVATIONS
@SHAPES
def test_gated_activation(
    shape: tuple[int, ...],
    activation: str,
    dtype: torch.dtype,
    random: Draw,
    embedded: Embed,
    assert_close: Check,
) -> None:
    gate, up = (embedded(random(*shape, dtype=dtype, scale=3.0)) for _ in range(2))
    actual = gated.gated_activation(gate, up, activation)
    assert_close((actual,), reference.gated_activation, gate, up, activation, factor=2)


@ACTIVATIONS
@SHAPES
def test_gated_activation_backward(
    shape: tuple[int, ...],
    activation: str,
    dtype: torch.dtype,
    random: Draw,
    embedded: Embed,
    assert_close: Check,
) -> None:
    args = tuple(embedded(random(*shape, dtype=dtype, scale=2.0)) for _ in range(3))
    actual = gated.gated_activation_backward(*args, activation)
    assert_close(actual, reference.gated_activation_backward, *args, activation, factor=3)


def test_gate_and_up_may_be_the_halves_of_one_tensor(random: Draw, assert_close: Check) -> None:
    gate, up = random(4, 5, 34, dtype=torch.bfloat16).chunk(2, dim=-1)
    actual = gated.gated_activation(gate, up, "silu")
    assert_close((actual,), reference.gated_activation, gate, up, "silu", factor=2)


def test_gate_and_up_may_have_rows_of_different_strides(random: Draw, assert_close: Check) -> None:
    gate, up, grad_out = random(6, 40)[:, :20], random(6, 20), random(6, 30)[:, 5:25]
    actual = gated.gated_activation(gate, up, "gelu")
    assert_close((actual,), reference.gated_activation, gate, up, "gelu", factor=2)
    args = (grad_out, gate, up, "gelu")
    actual = gated.gated_activation_backward(*args)
    assert_close(actual, reference.gated_activation_backward, *args, factor=3)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@ACTIVATIONS
def test_large_gates_saturate(activation: str) -> None:
    gate = torch.tensor([-1e30, -1e4, 1e4, 1e30])
    out = gated.gated_activation(gate, torch.ones(4), activation)
    assert torch.equal(out, torch.tensor([0.0, 0.0, 1e4, 1e30]))


@pytest.mark.parametrize("shape", ((0, 4), (4, 0)), ids=str)
def test_nothing_to_activate(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    assert gated.gated_activation(x, x, "silu").shape == shape
    assert [g.shape for g in gated.gated_activation_backward(x, x, x, "silu")] == [shape, shape]


def test_why_not_names_float64(random: Draw) -> None:
    x = random(2, 3)
    assert gated.why_not(x, x, "silu") == []
    (reason,) = gated.why_not(x.double(), x.double(), "silu")
    assert "float64" in reason
