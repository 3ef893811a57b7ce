"""A scale and shift per channel and 1x1 products against float64 and plain formulas."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
from torch.nn import functional as F
from warploom._library import OPS
from warploom.ops.coupling import actnorm, channel_affine, invertible_1x1, lu_weight

from tests.backends import DEVICE, every_backend, every_dtype
from tests.numerics import check_against_float64, inside_larger

every_map = pytest.mark.parametrize(
    ("order", "inverse"),
    [("mul_add", False), ("mul_add", True), ("add_mul", False), ("add_mul", True)],
    ids=["mul_add", "mul_add_inverse", "add_mul", "add_mul_inverse"],
)
every_memory = pytest.mark.parametrize("memory", ["channels_first", "channels_last"])
#: Odd and one channel, lines of vectors and others, one pixel, any number of spatial dimensions.
FIRST = [(3, 5), (3, 16), (2, 3, 7), (2, 8, 2, 4), (3, 1, 5), (1, 1, 1, 1)]
LAST = [(2, 3, 7), (2, 8, 2, 4), (2, 2, 2, 3, 3)]
CASES = [
    *[(shape, "channels_first") for shape in FIRST],
    *[(shape, "channels_last") for shape in LAST],
]
#: More than a part of the sums has: whole samples and pieces of planes, rows of few and of many channels.
CUTS = {
    "samples": ((5, 2, 2050), "channels_first"),
    "pieces": ((1, 2, 16399), "channels_first"),
    "rows": ((290, 3, 31), "channels_last"),
    "wide rows": ((18, 1030), "channels_first"),
}


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


def in_memory(x, memory):
    """The same values with the channels in their place, or innermost."""
    return x if memory == "channels_first" else x.movedim(1, -1).contiguous().movedim(-1, 1)


def parameters(channels, dtype=torch.float32):
    """Scales of both signs away from zero, and shifts."""
    scale = (0.5 + torch.rand(channels, dtype=torch.float64)) * torch.tensor([1.0, -1.0]).repeat(
        channels
    )[:channels]
    return scale.to(DEVICE, dtype), normal(channels, dtype=dtype)


def plain(x, scale, shift, order, inverse):
    s, t = (value.view(-1, *(1,) * (x.dim() - 2)) for value in (scale, shift))
    if order == "mul_add":
        return (x - t) / s if inverse else x * s + t
    return x / s - t if inverse else (x + t) * s


def check(x, scale, shift, order, inverse, backend):
    check_against_float64(
        functools.partial(channel_affine, order=order, inverse=inverse, backend=backend),
        functools.partial(plain, order=order, inverse=inverse),
        [x, scale, shift],
    )


@every_backend
@every_map
@every_memory
def test_every_map_and_its_gradients(backend, order, inverse, memory):
    x = in_memory(normal(3, 5, 4, 2), memory)
    check(x, *parameters(5), order, inverse, backend)
    z = channel_affine(x, *parameters(5), order=order, inverse=inverse, backend=backend)
    assert z.stride() == x.stride()


@every_backend
@every_dtype
@pytest.mark.parametrize(("shape", "memory"), CASES, ids=str)
def test_every_shape_and_dtype(backend, dtype, shape, memory):
    x = in_memory(normal(*shape, dtype=dtype), memory)
    check(x, *parameters(shape[1], dtype), "mul_add", True, backend)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@every_memory
def test_parameters_in_float32(backend, dtype, memory):
    """Of 16-bit x: gradients of the parameters keep float32."""
    x = in_memory(normal(2, 8, 8, dtype=dtype), memory)
    scale, shift = (value.requires_grad_() for value in parameters(8))
    upstream = in_memory(normal(2, 8, 8, dtype=dtype), memory)
    z = channel_affine(x, scale, shift, order="add_mul", backend=backend)
    got = torch.autograd.grad(z, (scale, shift), upstream)
    exact = plain(x.double(), scale.double(), shift.double(), "add_mul", False)
    torch.testing.assert_close(z, exact.to(dtype))
    for value, expected in zip(got, torch.autograd.grad(exact, (scale, shift), upstream.double())):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


def test_parameters_of_two_dtypes_keep_float64():
    x, scale, shift = normal(2, 3, dtype=torch.float64), *parameters(3, torch.float64)
    z = channel_affine(x, scale, shift.float())
    torch.testing.assert_close(z, plain(x, scale, shift.float().double(), "mul_add", False))


@every_backend
@pytest.mark.parametrize(("shape", "memory"), CUTS.values(), ids=CUTS)
def test_sums_in_many_parts_are_repeatable(backend, shape, memory, monkeypatch):
    if backend == "triton":
        module = importlib.import_module("warploom.triton_kernels.coupling.channel_affine")
        monkeypatch.setattr(module, "_PROGRAMS", 2)  # which then have several tiles each
    x, upstream = (in_memory(normal(*shape), memory) for _ in range(2))
    scale, shift = parameters(shape[1])
    overload = OPS["channel_affine_backward"].overloads[backend]
    first = overload(upstream, x, scale, shift, "add_mul", False)
    again = overload(upstream, x, scale, shift, "add_mul", False)
    assert all(torch.equal(one, other) for one, other in zip(first, again))
    wide = [value.double().requires_grad_() for value in (x, scale, shift)]
    expected = torch.autograd.grad(plain(*wide, "add_mul", False), wide, upstream.double())
    for got, want in zip(first, expected):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-3)


@every_backend
@every_map
@pytest.mark.parametrize("memory", ["slice", "half of the channels", "channels_last", "expanded"])
def test_strides(backend, order, inverse, memory):
    x = {
        "slice": lambda: inside_larger(normal(2, 3, 4, 5)),
        "half of the channels": lambda: normal(2, 6, 4, 5)[:, 3:],
        "channels_last": lambda: normal(2, 6, 4, 5).to(memory_format=torch.channels_last)[:, :3],
        "expanded": lambda: normal(1, 3, 1, 5).expand(2, 3, 4, 5),
    }[memory]()
    scale, shift = parameters(6)
    scale, shift = scale[::2], shift[::2]
    got = channel_affine(x, scale, shift, order=order, inverse=inverse, backend=backend)
    torch.testing.assert_close(got, plain(x, scale, shift, order, inverse))


@every_backend
@pytest.mark.parametrize("upstream", ["expanded", "other memory"])
@every_memory
def test_strides_of_the_upstream_gradient(backend, upstream, memory):
    x = in_memory(normal(2, 3, 4, 5), memory).requires_grad_()
    other = {"channels_first": "channels_last", "channels_last": "channels_first"}[memory]
    grad = {
        "expanded": lambda: normal(1, 1, 1, 1).expand(2, 3, 4, 5),
        "other memory": lambda: in_memory(normal(2, 3, 4, 5), other),
    }[upstream]()
    leaves = x, *(value.requires_grad_() for value in parameters(3))
    got = torch.autograd.grad(channel_affine(*leaves, backend=backend), leaves, grad)
    expected = torch.autograd.grad(plain(*leaves, "mul_add", False), leaves, grad)
    torch.testing.assert_close(got, expected)


@every_backend
@pytest.mark.parametrize("shape", [(0, 3, 4), (0, 3), (2, 3, 0), (2, 0, 4)], ids=str)
def test_nothing(backend, shape):
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    scale, shift = (value.requires_grad_() for value in parameters(shape[1]))
    channel_affine(x, scale, shift, inverse=True, backend=backend).sum().backward()
    assert x.grad.shape == shape
    assert not scale.grad.any() and not shift.grad.any()


@every_backend
def test_a_bad_element_spoils_no_other(backend):
    x = normal(2, 3, 4)
    scale, shift = parameters(3)
    whole = channel_affine(x, scale, shift, backend=backend)
    x[1, 2, 3] = float("nan")
    spoilt = channel_affine(x, scale, shift, backend=backend)
    assert torch.isnan(spoilt[1, 2, 3]) and torch.isnan(spoilt).sum() == 1
    assert torch.equal(whole[0], spoilt[0])


@every_map
@pytest.mark.parametrize("scale_form", ["log", "raw"])
def test_actnorm_has_the_determinant_of_its_jacobian(order, inverse, scale_form):
    x = normal(2, 3, 2, 2, dtype=torch.float64)
    scale, shift = parameters(3, torch.float64)
    scale = scale.abs().log() if scale_form == "log" else scale
    function = functools.partial(
        actnorm, scale=scale, shift=shift, scale_form=scale_form, order=order, inverse=inverse
    )
    jacobian = torch.autograd.functional.jacobian(lambda one: function(one)[0], x[:1])
    expected = torch.linalg.slogdet(jacobian.view(12, 12))[1]
    torch.testing.assert_close(function(x)[1], expected.expand(2))


@pytest.mark.parametrize("shape", FIRST, ids=str)
@pytest.mark.parametrize("folded", [False, True], ids=["alone", "with_actnorm"])
def test_invertible_1x1_is_a_product_at_each_place(shape, folded):
    channels, pixels = shape[1], torch.Size(shape[2:]).numel()
    x, weight = normal(*shape, dtype=torch.float64), normal(channels, channels, dtype=torch.float64)
    affine = parameters(channels, torch.float64) if folded else None
    z, log_det = invertible_1x1(x, weight, actnorm=affine)
    expected = plain(x, *affine, "mul_add", False) if folded else x
    expected = torch.einsum("ij,bj...->bi...", weight, expected)
    torch.testing.assert_close(z, expected)
    one = torch.linalg.slogdet(weight)[1] + (affine[0].abs().log().sum() if folded else 0)
    torch.testing.assert_close(log_det, (pixels * one).expand(shape[0]))
    back, negated = invertible_1x1(z, weight, actnorm=affine, inverse=True)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(negated, -log_det)


def test_invertible_1x1_keeps_float32_under_autocast():
    x, weight = normal(2, 3, 4, 4), normal(3, 3)
    with torch.autocast(DEVICE, torch.bfloat16):
        z, _ = invertible_1x1(x, weight)
    assert torch.equal(z, invertible_1x1(x, weight)[0])


def test_lu_weight_is_the_product_of_its_factors():
    lower, upper = normal(4, 4, dtype=torch.float64), normal(4, 4, dtype=torch.float64)
    log_diagonal = normal(4, dtype=torch.float64)
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64, device=DEVICE)
    permutation = torch.eye(4, dtype=torch.float64, device=DEVICE)[[2, 0, 3, 1]]
    weight, log_abs_det = lu_weight(lower, upper, log_diagonal, sign, permutation)
    torch.testing.assert_close(log_abs_det, torch.linalg.slogdet(weight)[1])
    left = torch.eye(4, dtype=torch.float64, device=DEVICE) + lower.tril(-1)
    right = upper.triu(1) + (sign * log_diagonal.exp()).diag()
    torch.testing.assert_close(weight, permutation @ left @ right)


def test_bad_input_is_named():
    x, ones = torch.ones(2, 3), torch.ones(3)
    with pytest.raises(ValueError, match=r"channel_affine: scale: expected shape \(3,\)"):
        channel_affine(x, torch.ones(2), ones)
    with pytest.raises(ValueError, match="channel_affine: order: expected 'mul_add' or 'add_mul'"):
        channel_affine(x, ones, ones, order="div_add")
    with pytest.raises(ValueError, match="actnorm: scale_form"):
        actnorm(x, ones, ones, scale_form="softplus")
    with pytest.raises(ValueError, match=r"invertible_1x1: weight: expected shape \(3, 3\)"):
        invertible_1x1(x, torch.ones(2, 2))


def test_conv_layouts_agree():
    x, weight = normal(2, 3, 4, 4), normal(3, 3)
    plain_layout = invertible_1x1(x, weight)[0]
    last = invertible_1x1(x.to(memory_format=torch.channels_last), weight)[0]
    torch.testing.assert_close(last, plain_layout)
    assert last.is_contiguous(memory_format=torch.channels_last)
    exact = F.conv2d(x.double(), weight.double()[:, :, None, None]).float()
    torch.testing.assert_close(plain_layout, exact)
