"""A scale and shift per channel, 1x1 products and squeezing against float64 and plain formulas."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn import functional as F
from warploom._library import OPS
from warploom.ops.coupling import actnorm, channel_affine, invertible_1x1, lu_weight, squeeze

from tests.backends import BACKENDS, DEVICE, every_dtype
from tests.numerics import check_against_float64, inside_larger

every_backend = pytest.mark.parametrize(
    "backend", [name for name in BACKENDS if name in OPS["channel_affine"].overloads]
)
every_map = pytest.mark.parametrize(
    ("order", "inverse"),
    [("mul_add", False), ("mul_add", True), ("add_mul", False), ("add_mul", True)],
    ids=["mul_add", "mul_add_inverse", "add_mul", "add_mul_inverse"],
)
SHAPES = [(3, 5), (2, 3, 7), (2, 4, 3, 5), (2, 2, 2, 3, 3), (1, 1, 1, 1)]


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


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


@every_backend
@every_dtype
@every_map
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_channel_affine_and_its_gradients(backend, dtype, order, inverse, shape):
    check_against_float64(
        functools.partial(channel_affine, order=order, inverse=inverse, backend=backend),
        functools.partial(plain, order=order, inverse=inverse),
        [normal(*shape, dtype=dtype), *parameters(shape[1], dtype)],
    )


@every_backend
@every_map
@pytest.mark.parametrize("memory", ["slice", "channels_last", "expanded"])
def test_strides(backend, order, inverse, memory):
    x = {
        "slice": lambda: inside_larger(normal(2, 3, 4, 5)),
        "channels_last": lambda: normal(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": lambda: normal(1, 3, 1, 5).expand(2, 3, 4, 5),
    }[memory]()
    scale, shift = parameters(3)
    got = channel_affine(x, scale, shift, order=order, inverse=inverse, backend=backend)
    torch.testing.assert_close(got, plain(x, scale, shift, order, inverse))


@every_backend
def test_no_samples(backend):
    x = torch.empty(0, 3, 4, device=DEVICE, requires_grad=True)
    scale, shift = (value.requires_grad_() for value in parameters(3))
    channel_affine(x, scale, shift, backend=backend).sum().backward()
    assert x.grad.shape == (0, 3, 4)
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


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
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


@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("order", ["channel_major", "position_major"])
def test_squeeze_places_each_pixel(factor, order):
    x = normal(2, 3, 2 * factor, 3 * factor)
    z = squeeze(x, factor, order=order)
    assert z.shape == (2, 3 * factor**2, 2, 3)
    for channel in range(3):
        for position in range(factor**2):
            row, column = divmod(position, factor)
            place = {
                "channel_major": channel * factor**2 + position,
                "position_major": position * 3 + channel,
            }[order]
            assert torch.equal(z[:, place], x[:, channel, row::factor, column::factor])
    assert torch.equal(squeeze(z, factor, order=order, inverse=True), x)


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
    with pytest.raises(ValueError, match="squeeze: x: expected height and width"):
        squeeze(torch.ones(1, 1, 3, 4), 2)
    with pytest.raises(ValueError, match="squeeze: x: expected a multiple of 4 channels"):
        squeeze(torch.ones(1, 3, 2, 2), 2, inverse=True)


def test_conv_layouts_agree():
    x, weight = normal(2, 3, 4, 4), normal(3, 3)
    plain_layout = invertible_1x1(x, weight)[0]
    last = invertible_1x1(x.to(memory_format=torch.channels_last), weight)[0]
    torch.testing.assert_close(last, plain_layout)
    exact = F.conv2d(x.double(), weight.double()[:, :, None, None]).float()
    torch.testing.assert_close(plain_layout, exact)
