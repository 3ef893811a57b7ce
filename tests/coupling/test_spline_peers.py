"""Rational-quadratic splines against those of nflows, normflows and zuko: values and gradients in float64."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from warploom.ops.coupling import rational_quadratic_spline, spline_coupling

from tests.backends import BACKENDS, DEVICE

BINS = 6
BOUND = 2.5
both_directions = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
every_backend = pytest.mark.parametrize(
    "backend", [name for name in BACKENDS if name in ("reference", "cpu")]
)


def draw(shape, num_logits, scale=1.0):
    """Leaves: inputs of which some lie beyond the bound, and their logits."""
    x = (torch.randn(shape, dtype=torch.float64, device=DEVICE) * 1.3).requires_grad_()
    params = torch.randn(*shape, num_logits, dtype=torch.float64, device=DEVICE) * scale
    return x, params.requires_grad_()


def split(params):
    return params.tensor_split((BINS, 2 * BINS), dim=-1)


def check(ours, theirs, leaves):
    """The results of both, and their gradients for one upstream gradient."""
    upstream = [torch.randn_like(out) for out in theirs]
    grads, expected = (torch.autograd.grad(outs, leaves, upstream) for outs in (ours, theirs))
    for got, want in zip((*ours, *grads), (*theirs, *expected)):
        torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-7)


@every_backend
@both_directions
@pytest.mark.parametrize(
    "peer", ["nflows.transforms.splines.rational_quadratic", "normflows.utils.splines"]
)
def test_linear_tails(backend, inverse, peer):
    peer = importlib.import_module(peer)
    x, params = draw((5, 7), 3 * BINS - 1)
    theirs = peer.unconstrained_rational_quadratic_spline(
        x, *split(params), inverse=inverse, tails="linear", tail_bound=BOUND
    )
    ours = rational_quadratic_spline(
        x, params, num_bins=BINS, tails="linear", tail_bound=BOUND, inverse=inverse, backend=backend
    )
    check(ours, theirs, (x, params))


@every_backend
@both_directions
@pytest.mark.parametrize(
    "peer", ["nflows.transforms.splines.rational_quadratic", "normflows.utils.splines"]
)
def test_an_interval_without_tails(backend, inverse, peer):
    """The y interval within the x interval: nflows checks the inputs of its inverse against the latter."""
    peer = importlib.import_module(peer)
    left, right, bottom, top = bounds = (-1.0, 2.0, 0.5, 1.75)
    low, high = (bottom, top) if inverse else (left, right)
    _, params = draw((5, 7), 3 * BINS + 1)
    x = low + (high - low) * torch.rand(5, 7, dtype=torch.float64, device=DEVICE)
    x.requires_grad_()
    minima = {"min_bin_width": 0.02, "min_bin_height": 0.03, "min_derivative": 0.1}
    theirs = peer.rational_quadratic_spline(
        x, *split(params), inverse=inverse, left=left, right=right, bottom=bottom, top=top, **minima
    )
    ours = rational_quadratic_spline(
        x, params, num_bins=BINS, bounds=bounds, inverse=inverse, backend=backend, **minima
    )
    check(ours, theirs, (x, params))


@every_backend
@both_directions
def test_circular_tails_of_normflows(backend, inverse):
    splines = importlib.import_module("normflows.utils.splines")
    x, params = draw((5, 7), 3 * BINS)
    theirs = splines.unconstrained_rational_quadratic_spline(
        x, *split(params), inverse=inverse, tails="circular", tail_bound=math.pi
    )
    ours = rational_quadratic_spline(
        x,
        params,
        num_bins=BINS,
        tails="circular",
        tail_bound=math.pi,
        inverse=inverse,
        backend=backend,
    )
    check(ours, theirs, (x, params))


@both_directions
def test_tails_and_bounds_of_each_feature_of_normflows(inverse):
    """Inside the bounds: outside of them normflows gives 0 where each feature has tails of its own."""
    splines = importlib.import_module("normflows.utils.splines")
    tails = ["linear", "circular", "circular"]
    bound = torch.tensor([2.0, 3.0, 0.5], dtype=torch.float64, device=DEVICE)
    _, params = draw((5, 3), 3 * BINS + 1)
    x = ((torch.rand(5, 3, dtype=torch.float64, device=DEVICE) * 2 - 1) * bound).requires_grad_()
    theirs = splines.unconstrained_rational_quadratic_spline(
        x, *split(params), inverse=inverse, tails=tails, tail_bound=bound
    )
    ours = rational_quadratic_spline(
        x, params, num_bins=BINS, tails=tails, tail_bound=bound, inverse=inverse
    )
    check(ours, theirs, (x, params))


@every_backend
@both_directions
def test_zuko(backend, inverse):
    transforms = importlib.import_module("zuko.transforms")
    x, params = draw((5, 7), 3 * BINS - 1, scale=3.0)
    x = (x.detach() * 3).requires_grad_()
    transform = transforms.MonotonicRQSTransform(*split(params))
    if inverse:
        y = transform.inv(x)
        # Of a differentiable y: zuko's own inverse keeps the graph.
        theirs = (y, -transform.call_and_ladj(y)[1])
    else:
        theirs = transform.call_and_ladj(x)
    ours = rational_quadratic_spline(
        x,
        params,
        num_bins=BINS,
        tails="linear",
        convention="zuko",
        inverse=inverse,
        backend=backend,
    )
    check(ours, theirs, (x, params))


@every_backend
@both_directions
def test_the_coupling_of_nflows(backend, inverse):
    """A conditioner that gives given logits; nflows divides those of sizes by sqrt(hidden channels)."""
    coupling = importlib.import_module("nflows.transforms.coupling")
    hidden, channels = 16, 5
    x = (torch.randn(3, channels, 2, 4, dtype=torch.float64, device=DEVICE) * 1.3).requires_grad_()
    params = torch.randn(3, 2 * (3 * BINS - 1), 2, 4, dtype=torch.float64, device=DEVICE)
    params.requires_grad_()

    class Given(torch.nn.Module):
        hidden_channels = hidden

        def forward(self, _, context=None):
            return params.clone()

    mask = torch.tensor([0, 0, 0, 1, 1])
    layer = coupling.PiecewiseRationalQuadraticCouplingTransform(
        mask, lambda *sizes: Given(), num_bins=BINS, tails="linear", tail_bound=BOUND
    ).to(DEVICE)
    theirs = layer.inverse(x) if inverse else layer(x)
    ours = spline_coupling(
        x, params, num_bins=BINS, tail_bound=BOUND, logit_scale=hidden**-0.5, inverse=inverse,
        backend=backend,
    )  # fmt: skip
    check(ours, theirs, (x, params))
