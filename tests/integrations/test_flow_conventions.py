"""Presets of peers that are in no package index, against their published formulas, with all gradients.

h are the outputs of a coupling's network, b the part that it changes.
"""

from __future__ import annotations

import pytest
import torch
from warploom.ops.coupling import PRESETS, affine_coupling

from tests.integrations.flow_parity import random


def openai_glow(b, h, inverse):
    """openai/glow: shift = h[..., 0::2], scale = sigmoid(h[..., 1::2] + 2), (b + shift) * scale."""
    t, s = h[:, 0::2], torch.sigmoid(h[:, 1::2] + 2)
    return (b / s - t if inverse else (b + t) * s), s


def glow_pytorch(b, h, inverse):
    u, t = h.chunk(2, 1)
    s = torch.sigmoid(u + 2)
    return (b / s - t if inverse else (b + t) * s), s


def ffjord(b, h, inverse):
    """lib/layers/coupling.py: scale = sigmoid(h[:, :k] + 2), shift = h[:, k:]; its delta is -log_det."""
    s, t = torch.sigmoid(h[:, : b.shape[1]] + 2), h[:, b.shape[1] :]
    return ((b - t) / s if inverse else b * s + t), s


def memcnn(b, h, inverse):
    """The adapter with sigmoid: shift = h[:, 0::2], scale = sigmoid(h[:, 1::2] + 2)."""
    t, s = h[:, 0::2], torch.sigmoid(h[:, 1::2] + 2)
    return ((b - t) / s if inverse else b * s + t), s


FORMULAS = {
    "openai_glow": openai_glow,
    "glow_pytorch": glow_pytorch,
    "ffjord": ffjord,
    "memcnn": memcnn,
}
every_direction = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def assert_same(ours, formula, leaves):
    """Of two functions of the leaves: outputs and the gradients of one loss."""
    outcomes = []
    for function in (ours, formula):
        z, log_det = function(*leaves)
        weights = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view_as(z)
        loss = (weights * z).sum() + (log_det * torch.arange(1, len(z) + 1)).sum()
        outcomes.append((z, log_det, *torch.autograd.grad(loss, leaves)))
    for got, want in zip(*outcomes):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@every_direction
@pytest.mark.parametrize("preset", FORMULAS)
@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 3, 2)], ids=["table", "image"])
@pytest.mark.parametrize("mask", ["channel", "channel_inverse", "bool"])
def test_preset(preset, shape, mask, inverse):
    channels = shape[1]
    moved = torch.zeros(channels, dtype=torch.bool)
    kept = channels - channels // 2
    if mask == "channel":
        moved[kept:] = True
    elif mask == "channel_inverse":
        moved[:kept] = True
    else:
        moved[::2] = True
    count = int(moved.sum())
    leaves = [random(*shape), random(shape[0], 2 * count, *shape[2:])]

    def formula(x, h):
        changed, s = FORMULAS[preset](x[:, moved], h, inverse)
        log_det = s.log().flatten(1).sum(1)
        z = x.index_copy(1, moved.nonzero()[:, 0], changed)
        return z, -log_det if inverse else log_det

    def ours(x, h):
        where = moved if mask == "bool" else mask
        return affine_coupling(x, h, mask=where, inverse=inverse, **PRESETS[preset])

    assert_same(ours, formula, [leaf.requires_grad_() for leaf in leaves])


@every_direction
@pytest.mark.parametrize("dim", [2, 3])
def test_residual_log_likelihood_estimation(dim, inverse):
    """RLE's RealNVP: masks of 0 and 1 over x, s = tanh of a network; training goes from data to latent.

    backward_p: z = m x + (1 - m) (x - t) e^-s, with log_det = -sum (1 - m) s.
    """
    mask = torch.tensor([0, 1, 0][:dim])
    leaves = [random(5, dim), random(5, dim), random(5, dim)]

    def formula(x, t, raw):
        s = torch.tanh(raw) * (1 - mask)
        t = t * (1 - mask)
        if inverse:
            return (1 - mask) * (x - t) * torch.exp(-s) + mask * x, -s.sum(1)
        return mask * x + (1 - mask) * (x * torch.exp(s) + t), s.sum(1)

    def ours(x, t, raw):
        # A dimension more keeps a mask of one dimension free: networks give all components.
        z, log_det = affine_coupling(
            x[..., None],
            (t[..., None], raw[..., None]),
            mask=(mask == 0)[:, None],
            inverse=inverse,
            **PRESETS["rle"],
        )
        return z[..., 0], log_det

    assert_same(ours, formula, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_inverted(preset):
    x = random(3, 4, 4, 4)
    options = PRESETS[preset]
    params = random(3, 4, 4, 4)
    z, log_det = affine_coupling(x, params, **options)
    back, negated = affine_coupling(z, params, inverse=True, **options)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(negated, -log_det)


def test_two_sided_blocks_of_memcnn():
    """y1 = s x1 + t of x2, then y2 of y1: two calls, the first with the first half transformed."""
    x, nets = random(2, 4), [torch.nn.Linear(2, 4).double() for _ in range(2)]
    first, _ = affine_coupling(x, nets[0](x[:, 2:]), mask="channel_inverse", **PRESETS["memcnn"])
    z, _ = affine_coupling(first, nets[1](first[:, :2]), **PRESETS["memcnn"])
    y1 = memcnn(x[:, :2], nets[0](x[:, 2:]), False)[0]
    y2 = memcnn(x[:, 2:], nets[1](y1), False)[0]
    torch.testing.assert_close(z, torch.cat((y1, y2), 1))
