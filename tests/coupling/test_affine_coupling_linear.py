"""The coupling that makes its parameters by the conditioner's last layer, against float64."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn import functional as F
from warploom.ops.coupling import affine_coupling, affine_coupling_linear

from tests.backends import DEVICE, every_backend, every_dtype
from tests.numerics import check_against_float64

ROWS, CHANNELS, FEATURES = 9, 7, 19
MOVED = CHANNELS // 2


def normal(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(DEVICE, dtype)


def arguments(dtype, rows=ROWS, channels=CHANNELS, moved=MOVED, halves=2):
    return [
        normal(rows, channels, dtype=dtype),
        normal(rows, FEATURES, dtype=dtype),
        normal(halves * moved, FEATURES, dtype=dtype, scale=FEATURES**-0.5),
        normal(halves * moved, dtype=dtype),
    ]


def plain(x, hidden, weight, bias=None):
    """Real NVP's coupling of the last channels: s b + t, s = exp(u), and the sum of u."""
    shift, raw_scale = F.linear(hidden, weight, bias).chunk(2, dim=1)
    kept = x.shape[1] - shift.shape[1]
    moved = x[:, kept:] * raw_scale.exp() + shift
    return torch.cat((x[:, :kept], moved), dim=1), raw_scale.sum(1)


@every_backend
@every_dtype
def test_coupling_and_its_gradients(backend, dtype):
    check_against_float64(
        functools.partial(affine_coupling_linear, backend=backend), plain, arguments(dtype)
    )


@every_backend
def test_from_the_input_and_without_a_bias(backend):
    check_against_float64(
        functools.partial(affine_coupling_linear, recompute=False, backend=backend),
        plain,
        arguments(torch.float32)[:3],
    )


@every_backend
@pytest.mark.parametrize("shape", [(1, 1), (70, 72)], ids=["one-channel-passes", "several-tiles"])
def test_sizes(backend, shape):
    rows, channels = shape
    if backend == "simt_instrumented" and rows > ROWS:
        pytest.skip("its kernel is the coupling's, whose tiles have tests of their own")
    tensors = arguments(torch.float32, rows, channels, channels // 2)
    check_against_float64(
        functools.partial(affine_coupling_linear, backend=backend), plain, tensors, gradients=False
    )


@every_backend
@pytest.mark.parametrize(
    "options",
    [
        {"layout": "scale_shift", "scale": "sigmoid", "order": "add_mul", "eps": 1e-3},
        {"layout": "interleaved", "scale": "atan", "clamp": 2.0, "mask": "channel_inverse"},
        {"layout": "shift_scale", "scale": "softclip", "clamp": 1e-3, "order": "div_add"},
        {"layout": "interleaved", "scale": "tanh", "params_scale": 0.1, "mask": "odd"},
        {"scale": "additive", "layout": "interleaved", "mask": 3},
    ],
    ids=lambda options: options["scale"],
)
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_is_the_coupling_of_a_linear_layer(backend, options, inverse):
    options = {**options, "inverse": inverse}
    moved = {"channel_inverse": CHANNELS - MOVED, 3: CHANNELS - 3}.get(options.get("mask"), MOVED)
    if options.get("mask") == "odd":
        options["mask"] = torch.arange(CHANNELS, device=DEVICE) % 2 == 1
        options["scale_weight"] = normal(moved)
    options["log_det_in"] = normal(ROWS)
    halves = 1 if options["scale"] == "additive" else 2
    tensors = [t.requires_grad_() for t in arguments(torch.float32, moved=moved, halves=halves)]
    x, hidden, weight, bias = tensors
    got = affine_coupling_linear(x, hidden, weight, bias, **options, backend=backend)
    want = affine_coupling(x, F.linear(hidden, weight, bias), **options, backend="reference")
    torch.testing.assert_close(got, want)
    upstream = [torch.randn_like(out) for out in want]
    torch.testing.assert_close(
        torch.autograd.grad(got, tensors, upstream), torch.autograd.grad(want, tensors, upstream)
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.ones(2, FEATURES)}, ValueError, r"hidden: expected shape \[9, H\]"),
        ({"weight": torch.ones(4, FEATURES)}, ValueError, "weight: expected shape"),
        ({"bias": torch.ones(1)}, ValueError, "bias: expected shape"),
        ({"bias": torch.ones(6).half()}, TypeError, "bias: expected hidden's dtype"),
        ({"x": torch.ones(ROWS, CHANNELS, 2)}, ValueError, r"x: expected shape \[B, C\]"),
        ({"mask": "checkerboard"}, ValueError, "x: expected shape"),
        ({"scale": "relu"}, ValueError, "scale: expected one of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(changes, error, message):
    x, hidden, weight, bias = (tensor.cpu() for tensor in arguments(torch.float32))
    call = {"x": x, "hidden": hidden, "weight": weight, "bias": bias} | changes
    with pytest.raises(error, match=f"affine_coupling_linear: {message}"):
        affine_coupling_linear(**call)
