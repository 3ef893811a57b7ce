"""Couplings in zuko's conventions against its transforms."""

from __future__ import annotations

import math

import pytest
import torch
from warploom.ops.coupling import PRESETS, affine_coupling, spline_coupling
from zuko.transforms import (
    CouplingTransform,
    DependentTransform,
    MonotonicAffineTransform,
    MonotonicRQSTransform,
)

from tests.integrations.flow_parity import random

#: zuko's masks: True passes.
MASKS = {
    "halves": [True, True, False, False],
    "alternating": [True, False, True, False, True],
    "all": [False, False, False],
}
BINS = 5
every_mask = pytest.mark.parametrize(
    "constant", [torch.tensor(mask) for mask in MASKS.values()], ids=MASKS
)
every_direction = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def compare(ours, transform, leaves, inverse):
    """z, log_det and gradients; `transform()` makes zuko's, `ours()` gives (z, log_det)."""

    def gradients(z, log_det):
        weights = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view_as(z)
        loss = (weights * z).sum() + (log_det * weights[:, 0]).sum()
        return z, log_det, *torch.autograd.grad(loss, leaves)

    peer = transform()
    want = gradients(*(peer.inv if inverse else peer).call_and_ladj(leaves[0]))
    for got, expected in zip(gradients(*ours()), want):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@every_mask
@every_direction
def test_affine(constant, inverse):
    count = int((~constant).sum())
    leaves = [random(4, len(constant)), random(4, count), 3 * random(4, count)]
    x, shift, raw_scale = (leaf.requires_grad_() for leaf in leaves)

    def meta(_):
        return DependentTransform(MonotonicAffineTransform(shift, raw_scale), 1)

    def ours():
        return affine_coupling(
            x, (shift, raw_scale), mask=~constant, inverse=inverse, **PRESETS["zuko"]
        )

    compare(ours, lambda: CouplingTransform(meta, constant), leaves, inverse)


@every_mask
@every_direction
@pytest.mark.parametrize("bound", [5.0, 1.5])
def test_spline(constant, inverse, bound):
    count = int((~constant).sum())
    leaves = [2 * random(4, len(constant)), 2 * random(4, count, 3 * BINS - 1)]
    x, logits = (leaf.requires_grad_() for leaf in leaves)

    def meta(_):
        parts = logits.split((BINS, BINS, BINS - 1), -1)
        return DependentTransform(MonotonicRQSTransform(*parts, bound=bound), 1)

    def ours():
        return spline_coupling(
            x,
            logits,
            num_bins=BINS,
            mask=~constant,
            tails="linear",
            tail_bound=bound,
            convention="zuko",
            params_dim=-1,
            inverse=inverse,
        )

    compare(ours, lambda: CouplingTransform(meta, constant), leaves, inverse)


def test_the_limit_of_the_log_scale():
    """softclip keeps |log s| below -log(1e-3)."""
    raw = torch.tensor([[1e9]], dtype=torch.float64)
    _, log_det = affine_coupling(raw, (raw, raw), mask=0, **PRESETS["zuko"])
    assert log_det.item() == pytest.approx(-math.log(1e-3), rel=1e-6)
