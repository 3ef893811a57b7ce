"""Layers with glow-pytorch's constructors against its formulas: it is in no package index."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from warploom.integrations import glow_pytorch_flows as ours

from tests.integrations.flow_parity import awake, random, results

KEYS = {
    "ActNorm": {"loc", "scale", "initialized"},
    "InvConv2dLU": {"w_p", "u_mask", "l_mask", "s_sign", "l_eye", "w_l", "w_s", "w_u"},
    "InvConv2d": {"weight"},
    "ZeroConv2d": {"conv.weight", "conv.bias", "scale"},
    "AffineCoupling": {
        "net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias",
        "net.4.conv.weight", "net.4.conv.bias", "net.4.scale",
    },
}  # fmt: skip
MAKE = {
    "ActNorm": lambda: ours.ActNorm(4),
    "InvConv2dLU": lambda: ours.InvConv2dLU(4),
    "InvConv2d": lambda: ours.InvConv2d(4),
    "ZeroConv2d": lambda: ours.ZeroConv2d(4, 6),
    "AffineCoupling": lambda: ours.AffineCoupling(4, filter_size=8),
}


def pixels(x):
    return x.shape[2] * x.shape[3]


def actnorm(layer, x):
    log_det = pixels(x) * layer.scale.abs().log().sum()
    return layer.scale * (x + layer.loc), log_det


def actnorm_reverse(layer, x):
    return x / layer.scale - layer.loc


def lu(layer):
    lower = layer.w_l * layer.l_mask + layer.l_eye
    upper = layer.w_u * layer.u_mask + torch.diag(layer.s_sign * layer.w_s.exp())
    return layer.w_p @ lower @ upper


def product(layer, x, weight=lu):
    log_det = pixels(x) * torch.linalg.slogdet(weight(layer))[1]
    return F.conv2d(x, weight(layer)[:, :, None, None]), log_det


def product_reverse(layer, x, weight=lu):
    return F.conv2d(x, torch.linalg.inv(weight(layer))[:, :, None, None])


def full(layer):
    return layer.weight[:, :, 0, 0]


def coupling(layer, x):
    first, second = x.chunk(2, 1)
    log_s, t = layer.net(first).chunk(2, 1)
    s = torch.sigmoid(log_s + 2)
    return torch.cat((first, (second + t) * s), 1), s.log().flatten(1).sum(1)


def coupling_reverse(layer, x):
    first, second = x.chunk(2, 1)
    log_s, t = layer.net(first).chunk(2, 1)
    return torch.cat((first, second / torch.sigmoid(log_s + 2) - t), 1)


PARITY = {
    "ActNorm": (actnorm, actnorm_reverse),
    "InvConv2dLU": (product, product_reverse),
    "InvConv2d": (
        lambda layer, x: product(layer, x, full),
        lambda layer, x: product_reverse(layer, x, full),
    ),
    "AffineCoupling": (coupling, coupling_reverse),
}


@pytest.mark.parametrize("name", PARITY)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_layer(name, direction):
    """z, log_det and all gradients are those of the formulas."""
    layer, x = awake(MAKE[name]()), random(3, 4, 3, 2)
    if name == "ActNorm":
        layer(x)
    formula = PARITY[name][direction == "reverse"]

    def call(layer, x):
        out = (layer if direction == "forward" else layer.reverse)(x)
        return out if direction == "forward" else (out, 0.0)

    def expected(layer, x):
        out = formula(layer, x)
        return out if direction == "forward" else (out, 0.0)

    for got, want in zip(results(call, layer, [x]), results(expected, layer, [x])):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", KEYS)
def test_state_dict(name):
    assert set(MAKE[name]().state_dict()) == KEYS[name]


def test_actnorm_standardises_the_first_batch():
    x = 2 + 3 * random(6, 3, 4, 4)
    layer = ours.ActNorm(3).double()
    z, _ = layer(x)
    torch.testing.assert_close(layer.loc.flatten(), -x.mean((0, 2, 3)))
    torch.testing.assert_close(layer.scale.flatten(), 1 / (x.std((0, 2, 3)) + 1e-6))
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3, dtype=z.dtype))
    assert torch.is_tensor(ours.ActNorm(3, logdet=False)(x.float()))


def test_zero_conv_pads_with_ones():
    layer, x = awake(ours.ZeroConv2d(2, 3)), random(2, 2, 3, 3)
    padded = torch.ones(2, 2, 5, 5, dtype=torch.float64)
    padded[:, :, 1:-1, 1:-1] = x
    expected = F.conv2d(padded, layer.conv.weight, layer.conv.bias) * (3 * layer.scale).exp()
    torch.testing.assert_close(layer(x), expected)


def test_additive_coupling_has_no_log_det():
    layer, x = awake(ours.AffineCoupling(4, filter_size=8, affine=False)), random(2, 4, 3, 3)
    z, log_det = layer(x)
    assert log_det is None
    torch.testing.assert_close(z[:, 2:], x[:, 2:] + layer.net(x[:, :2]))
    torch.testing.assert_close(layer.reverse(z), x)


def test_couplings_begin_as_glows():
    """The last convolution is zero: the scale is sigmoid(2), the shift 0."""
    x = torch.randn(2, 4, 3, 3)
    z, _ = ours.AffineCoupling(4, filter_size=8)(x)
    torch.testing.assert_close(z[:, 2:], x[:, 2:] * torch.sigmoid(torch.tensor(2.0)))


def test_a_flow_of_blocks_is_undone():
    layers = nn.ModuleList()
    for _ in range(3):
        layers.extend([ours.ActNorm(4), ours.InvConv2dLU(4), ours.AffineCoupling(4, 8)])
    z = x = torch.randn(4, 4, 4, 4)
    for layer in layers:
        z = layer(z)[0]
    for layer in reversed(layers):
        z = layer.reverse(z)
    torch.testing.assert_close(z, x, rtol=1e-4, atol=1e-5)
