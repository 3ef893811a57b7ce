"""Gated activations on every backend against float64."""

from __future__ import annotations

import functools

import pytest
import torch
from warploom.ops.activation import geglu, swiglu

from tests import plain
from tests.backends import DEVICE, every_backend, every_dtype
from tests.numerics import check_against_float64, inside_larger

GATES = {
    "swiglu": (swiglu, plain.swiglu),
    "geglu": (geglu, plain.geglu),
    "geglu_tanh": (functools.partial(geglu, approximate="tanh"), plain.geglu_tanh),
}
every_gate = pytest.mark.parametrize(("gated", "oracle"), GATES.values(), ids=GATES)


def normal(*shape, dtype=torch.float32, scale=2.0):
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(DEVICE, dtype)


@every_backend
@every_dtype
@every_gate
@pytest.mark.parametrize("shape", [(31, 33), (2, 5, 264)], ids=["31x33", "2x5x264"])
def test_activation_and_its_gradients(backend, dtype, gated, oracle, shape):
    check_against_float64(
        functools.partial(gated, backend=backend),
        oracle,
        [normal(*shape, dtype=dtype), normal(*shape, dtype=dtype)],
    )


@every_backend
@every_gate
@pytest.mark.parametrize("size", [1, 3, 17], ids=lambda size: f"{size}-elements")
def test_a_few_elements_give_what_they_give_among_many(backend, gated, oracle, size):
    gate, up = normal(64), normal(64)
    torch.testing.assert_close(
        gated(gate[:size], up[:size], backend=backend), gated(gate, up, backend=backend)[:size]
    )


@every_backend
@every_gate
def test_large_magnitudes_neither_overflow_nor_turn_to_nan(backend, gated, oracle):
    gate = torch.tensor(
        [-1e30, -1e4, -90.0, -30.0, -0.0, 0.0, 30.0, 90.0, 1e4, 1e30], device=DEVICE
    )
    up = torch.full_like(gate, 0.5)
    check_against_float64(
        functools.partial(gated, backend=backend), oracle, [gate, up], gradients=False
    )


@every_backend
@every_gate
def test_infinities_and_nan_stay_where_they_are(backend, gated, oracle):
    gate = torch.tensor([1.0, float("inf"), float("nan"), 2.0] * 9, device=DEVICE)
    out = gated(gate, torch.ones_like(gate), backend=backend)
    assert torch.equal(torch.isnan(out), torch.isnan(gate))
    assert torch.equal(torch.isposinf(out), torch.isposinf(gate))


@every_backend
@every_gate
def test_halves_of_one_projection(backend, gated, oracle):
    gate, up = normal(6, 2 * 72, dtype=torch.bfloat16).chunk(2, dim=-1)
    check_against_float64(functools.partial(gated, backend=backend), oracle, [gate, up])


@every_backend
def test_slices_of_larger_buffers(backend):
    check_against_float64(
        functools.partial(swiglu, backend=backend),
        plain.swiglu,
        [inside_larger(normal(3, 4, 35)), inside_larger(normal(3, 4, 35))],
    )


@every_backend
@pytest.mark.parametrize("shape", [(0,), (0, 8), (8, 0)], ids=["0", "0x8", "8x0"])
def test_empty(backend, shape):
    gate, up = (
        torch.ones(shape, device=DEVICE),
        torch.ones(shape, device=DEVICE, requires_grad=True),
    )
    out = swiglu(gate, up, backend=backend)
    out.sum().backward()
    assert out.shape == up.grad.shape == shape


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: swiglu(torch.ones(2, 3), torch.ones(2, 4)), ValueError, "swiglu: up: expected shape"),
        (lambda: swiglu(torch.ones(2), torch.ones(2).half()), TypeError, "swiglu: up: expected gate's dtype"),
        (lambda: swiglu(torch.ones(2).int(), torch.ones(2)), TypeError, "swiglu: gate: expected dtype"),
        (lambda: geglu(torch.ones(2), torch.ones(2), approximate="erf"), ValueError,
         "geglu: approximate: expected 'none' or 'tanh', got 'erf'"),
        (lambda: swiglu(torch.ones(2), None), TypeError, "swiglu: up: expected a tensor"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
