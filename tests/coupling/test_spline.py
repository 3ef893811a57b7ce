"""Rational-quadratic splines on every backend against float64."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn import functional as F
from warploom.ops.coupling import rational_quadratic_spline, spline_coupling

from tests import plain
from tests.backends import BACKENDS, DEVICE, every_backend, every_dtype
from tests.numerics import check_against_float64, inside_larger

ENDS = {None: 1, "linear": -1, "circular": 0}
every_tail = pytest.mark.parametrize("tails", ENDS, ids=str)
every_convention = pytest.mark.parametrize("convention", ["nflows", "zuko"])
both_directions = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
both_layouts = pytest.mark.parametrize(
    "params_dim", [-1, 2], ids=["params-last", "params-in-planes"]
)
FLOAT64 = [backend for backend in BACKENDS if backend in ("reference", "cpu")]


def normal(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(DEVICE, dtype)


def logits(shape, num_bins, tails, *, params_dim=-1, scale=0.4, dtype=torch.float32):
    """Of bins of about one size: of few elements the largest error is else that of the narrowest bin."""
    params = normal(*shape, 3 * num_bins + ENDS[tails], scale=scale, dtype=dtype)
    return params if params_dim == -1 else params.movedim(-1, 2).contiguous()


def inputs(shape, tails, dtype=torch.float32):
    """Most of them in [-1, 1] or, without tails, all of them in [0, 1]."""
    if tails is None:
        return torch.rand(shape, dtype=torch.float64).to(DEVICE, dtype)
    return normal(*shape, dtype=dtype)


def oracle(x, params, *, tails, params_dim=-1, bound=1.0, **options):
    bounds = (0.0, 1.0, 0.0, 1.0) if tails is None else (-bound, bound, -bound, bound)
    if params_dim == 2:
        params = params.movedim(2, -1)
    return plain.rational_quadratic_spline(x, params, tails=tails, bounds=bounds, **options)


def judged(function, exact, x, params, **options):
    """A spline is as rough as its narrowest bin: the yardstick is plain code on elements that change
    places."""

    def draw():
        return [x.flatten()[torch.randperm(x.numel(), device=x.device)].view_as(x), params]

    check_against_float64(function, exact, [x, params], draw=draw, **options)


def check(backend, x, params, *, params_dim=-1, gradients=True, **options):
    function = functools.partial(
        rational_quadratic_spline,
        params_dim=params_dim,
        tail_bound=None,
        backend=backend,
        **options,
    )
    bound = 5.0 if options.get("convention") == "zuko" else 1.0
    exact = functools.partial(oracle, params_dim=params_dim, bound=bound, **options)
    judged(function, exact, x, params, gradients=gradients)


@every_backend
@every_tail
@every_convention
@both_directions
def test_values_and_gradients(backend, tails, convention, inverse):
    x = inputs((4, 3, 40), tails)
    params = logits((4, 3, 40), 5, tails)
    check(
        backend, x, params, num_bins=5, tails=tails, convention=convention, inverse=inverse,
        logit_scale=0.7,
    )  # fmt: skip


@every_backend
@every_dtype
@both_layouts
@both_directions
def test_every_type_and_layout(backend, dtype, params_dim, inverse):
    x = inputs((2, 3, 35), "linear", dtype)
    params = logits((2, 3, 35), 4, "linear", params_dim=params_dim, scale=0.3, dtype=dtype)
    check(
        backend, x, params, num_bins=4, tails="linear", params_dim=params_dim, inverse=inverse,
        min_derivative=0.1,
    )  # fmt: skip


@every_backend
@both_directions
@pytest.mark.parametrize("num_bins", [1, 2, 8, 13, 64], ids=lambda count: f"{count}-bins")
@pytest.mark.parametrize("tails", ["linear", "circular"])
def test_any_number_of_bins(backend, num_bins, tails, inverse):
    x = inputs((1, 2, 25), tails)
    params = logits((1, 2, 25), num_bins, tails, params_dim=2)
    check(backend, x, params, num_bins=num_bins, tails=tails, params_dim=2, inverse=inverse)


@pytest.mark.parametrize(
    "backend", [name for name in BACKENDS if name in ("cpu", "cuda", "reference")]
)
@both_layouts
def test_more_elements_than_a_block(backend, params_dim):
    x = inputs((3, 5, 331), "linear")
    params = logits((3, 5, 331), 8, "linear", params_dim=params_dim)
    check(backend, x, params, num_bins=8, tails="linear", params_dim=params_dim)


@every_backend
def test_an_interval_of_each_axis(backend):
    """Without tails, and the least sizes a large part of it."""
    bounds = (-1.0, 3.0, 2.0, 2.5)
    options = {"num_bins": 4, "min_bin_width": 0.1, "min_bin_height": 0.2, "bounds": bounds}
    x, params = inputs((17,), None) * 4 - 1, logits((17,), 4, None)
    judged(
        functools.partial(rational_quadratic_spline, backend=backend, **options),
        functools.partial(plain.rational_quadratic_spline, **options),
        x,
        params,
    )


@every_backend
@every_tail
@both_directions
@pytest.mark.parametrize("only", [0, 1], ids=["y", "log_det"])
def test_one_output_alone(backend, tails, inverse, only):
    def one(function, x, params):
        return function(x, params, num_bins=3, tails=tails, inverse=inverse)[only]

    judged(
        functools.partial(one, functools.partial(rational_quadratic_spline, backend=backend)),
        functools.partial(one, oracle),
        inputs((5, 4), tails),
        logits((5, 4), 3, tails),
    )


@every_backend
@every_convention
@both_directions
def test_equal_bins_with_unit_slopes_are_the_identity(backend, convention, inverse):
    """On the knots, at the bounds and beyond them."""
    bound = 2.0
    x = torch.tensor([-9.0, -2.0, -1.5, -1.0, -0.3, 0.0, 0.5, 1.5, 2.0, 2.0001, 9.0], device=DEVICE)
    params = torch.zeros(len(x), 3 * 8 - 1, device=DEVICE)
    if convention == "nflows":
        params[:, 16:] = torch.log(torch.expm1(torch.tensor(1 - 1e-3)))
    y, log_det = rational_quadratic_spline(
        x, params, num_bins=8, tails="linear", tail_bound=bound, convention=convention,
        inverse=inverse, backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(y, x, atol=1e-6, rtol=0)
    torch.testing.assert_close(log_det, torch.zeros_like(x), atol=2e-6, rtol=0)
    outside = x.abs() > bound
    assert torch.equal(y[outside], x[outside]) and not log_det[outside].any()


@every_backend
@both_directions
def test_knots_belong_to_both_of_their_bins(backend, inverse):
    """Every knot of one spline, the last one too: y, log_det and gradients are finite, y the other knot."""
    num_bins = 6
    params = logits((1,), num_bins, "linear", scale=1.5, dtype=torch.float64)

    def knots(part):
        sizes = 1e-3 + (1 - 1e-3 * num_bins) * part.softmax(-1)
        return 2 * F.pad(sizes.cumsum(-1), (1, 0)) - 1

    widths, heights = knots(params[0, :num_bins]), knots(params[0, num_bins : 2 * num_bins])
    source, target = (heights, widths) if inverse else (widths, heights)
    leaf = source.float().requires_grad_()
    rows = params.float().expand(len(leaf), -1).contiguous().requires_grad_()
    y, log_det = rational_quadratic_spline(
        leaf, rows, num_bins=num_bins, tails="linear", inverse=inverse, backend=backend
    )
    torch.testing.assert_close(y, target.float(), atol=2e-5, rtol=0)
    derivatives = 1e-3 + F.softplus(params[0, 2 * num_bins :])
    expected = F.pad(derivatives.log(), (1, 1)) * (-1 if inverse else 1)
    torch.testing.assert_close(log_det[1:-1], expected.float()[1:-1], atol=2e-3, rtol=0)
    for gradient in torch.autograd.grad(y.sum() + log_det.sum(), (leaf, rows)):
        assert gradient.isfinite().all()


@every_backend
@every_tail
@every_convention
@both_directions
def test_extreme_logits_stay_finite(backend, tails, convention, inverse):
    num_bins = 4
    x = torch.linspace(0, 1, 24, device=DEVICE).requires_grad_()
    choices = torch.tensor([-100.0, 0.0, 100.0], device=DEVICE)
    picks = torch.randint(3, (24, 3 * num_bins + ENDS[tails]), device=DEVICE)
    params = choices[picks].requires_grad_()
    y, log_det = rational_quadratic_spline(
        x, params, num_bins=num_bins, tails=tails, convention=convention, inverse=inverse,
        backend=backend,
    )  # fmt: skip
    assert y.isfinite().all() and log_det.isfinite().all()
    for gradient in torch.autograd.grad(y.sum() + log_det.sum(), (x, params)):
        assert gradient.isfinite().all()


@every_backend
@both_directions
@pytest.mark.parametrize("tails", ["linear", "circular"])
def test_the_outside_is_the_identity_with_no_gradient_of_logits(backend, tails, inverse):
    """Not even where the logits are NaN."""
    x = torch.tensor([-1e30, -1.5, 1.5, 1e30, float("inf")], device=DEVICE, requires_grad=True)
    params = logits((5,), 3, tails)
    params[2] = float("nan")
    params.requires_grad_()
    y, log_det = rational_quadratic_spline(
        x, params, num_bins=3, tails=tails, inverse=inverse, backend=backend
    )
    assert torch.equal(y, x) and not log_det.any()
    weights = torch.arange(1.0, 6, device=DEVICE)
    grad_x, grad_params = torch.autograd.grad((y * weights).sum() + log_det.sum(), (x, params))
    assert torch.equal(grad_x, weights) and not grad_params.any()


@every_backend
@both_directions
def test_without_tails_inputs_are_clipped(backend, inverse):
    x = torch.tensor([-3.0, 0.0, 1.0, 7.0], device=DEVICE, requires_grad=True)
    params = logits((1,), 4, None).expand(4, -1)
    y, log_det = rational_quadratic_spline(x, params, num_bins=4, inverse=inverse, backend=backend)
    torch.testing.assert_close(y, x.detach().clamp(0, 1), atol=1e-6, rtol=0)
    assert torch.equal(log_det[0], log_det[1]) and torch.equal(log_det[2], log_det[3])
    (grad_x,) = torch.autograd.grad(y.sum(), x)
    assert (grad_x != 0).tolist() == [False, True, True, False]


@every_backend
@pytest.mark.parametrize("tails", [None, "linear"], ids=str)
def test_nan_stays_in_its_element(backend, tails):
    x = torch.full((6,), 0.25, device=DEVICE)
    params = logits((6,), 3, tails)
    x[1], params[4, 2] = float("nan"), float("nan")
    y, log_det = rational_quadratic_spline(x, params, num_bins=3, tails=tails, backend=backend)
    assert y.isnan().tolist() == [False, True, False, False, True, False]
    assert not log_det[[0, 2, 3, 5]].isnan().any() and log_det[4].isnan()


@every_backend
@every_tail
@every_convention
@both_directions
def test_the_other_direction_leads_back(backend, tails, convention, inverse):
    options = {"num_bins": 8, "tails": tails, "convention": convention, "backend": backend}
    x, params = inputs((40,), tails), logits((40,), 8, tails)
    y, log_det = rational_quadratic_spline(x, params, inverse=inverse, **options)
    back, minus_log_det = rational_quadratic_spline(y, params, inverse=not inverse, **options)
    torch.testing.assert_close(back, x, atol=1e-4, rtol=0)
    torch.testing.assert_close(minus_log_det, -log_det, atol=2e-3, rtol=0)


@every_backend
@both_layouts
def test_strided_and_expanded_inputs(backend, params_dim):
    shape = (2, 4, 5)
    params = inside_larger(logits(shape, 3, "linear", params_dim=params_dim))
    x = inside_larger(inputs(shape, "linear"))
    check(backend, x, params, num_bins=3, tails="linear", params_dim=params_dim)
    x = inputs((4, 5), "linear").expand(shape)
    params = logits((1, *shape[1:]), 3, "linear", params_dim=params_dim)
    expanded = params.expand(2, *params.shape[1:])
    function = functools.partial(
        rational_quadratic_spline,
        num_bins=3,
        tails="linear",
        params_dim=params_dim,
        backend=backend,
    )
    for got, want in zip(function(x, expanded), function(x.contiguous(), expanded.contiguous())):
        assert torch.equal(got, want) and got.is_contiguous()


@every_backend
@pytest.mark.parametrize("shape", [(0,), (2, 0, 3), (0, 4)], ids=str)
def test_empty(backend, shape):
    x = torch.ones(shape, device=DEVICE, requires_grad=True)
    params = torch.ones(*shape, 8, device=DEVICE, requires_grad=True)
    y, log_det = rational_quadratic_spline(x, params, num_bins=3, tails="linear", backend=backend)
    (y.sum() + log_det.sum()).backward()
    assert y.shape == log_det.shape == x.grad.shape == shape and params.grad.shape == params.shape


@pytest.mark.parametrize("backend", FLOAT64)
@every_tail
@every_convention
@both_directions
def test_gradcheck(backend, tails, convention, inverse):
    x = inputs((3, 4), tails, torch.float64).requires_grad_()
    params = logits((3, 4), 3, tails, dtype=torch.float64).requires_grad_()
    function = functools.partial(
        rational_quadratic_spline, num_bins=3, tails=tails, convention=convention, inverse=inverse,
        backend=backend,
    )  # fmt: skip
    assert torch.autograd.gradcheck(function, (x, params))


@every_backend
def test_two_runs_give_the_same_bits(backend):
    x, params = inputs((2, 6, 7), "linear"), logits((2, 3, 7), 4, "linear", params_dim=2)
    first, second = (spline_coupling(x, params, num_bins=4, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def coupled(chosen, x, params, *, num_bins, inverse):
    """Of params [B, k, M, *spatial]."""
    params = params.movedim(2, -1)
    y, log_det = oracle(x[:, chosen], params, num_bins=num_bins, tails="linear", inverse=inverse)
    z = x.index_copy(1, torch.tensor(chosen, device=x.device), y)
    return z, log_det.flatten(1).sum(1)


#: name -> (mask, the transformed ones of 5 channels)
MASKS = {
    "channel": ("channel", [3, 4]),
    "channel_inverse": ("channel_inverse", [0, 1, 2]),
    "the first passes": (1, [1, 2, 3, 4]),
    "all are transformed": (0, [0, 1, 2, 3, 4]),
    "free": (torch.tensor([True, False, True, False, True]), [0, 2, 4]),
}
every_mask = pytest.mark.parametrize(("mask", "chosen"), MASKS.values(), ids=MASKS)


@every_backend
@every_mask
@both_directions
@pytest.mark.parametrize("spatial", [(), (7,), (2, 3)], ids=str)
def test_coupling(backend, mask, chosen, inverse, spatial):
    x = inputs((3, 5, *spatial), "linear")
    params = logits((3, len(chosen), *spatial), 3, "linear", params_dim=2)
    mask = mask.to(DEVICE) if isinstance(mask, torch.Tensor) else mask
    judged(
        functools.partial(spline_coupling, num_bins=3, mask=mask, inverse=inverse, backend=backend),
        functools.partial(coupled, chosen, num_bins=3, inverse=inverse),
        x,
        params,
    )


@every_backend
def test_coupling_takes_the_logits_in_any_layout(backend):
    x, params = inputs((2, 4, 3, 3), "linear"), logits((2, 2, 3, 3), 3, "linear", params_dim=2)
    z, log_det = spline_coupling(x, params, num_bins=3, backend=backend)
    assert torch.equal(z[:, :2], x[:, :2])
    joined = spline_coupling(x, params.flatten(1, 2), num_bins=3, backend=backend)
    last = spline_coupling(x, params.movedim(2, -1), num_bins=3, params_dim=-1, backend=backend)
    torch.testing.assert_close(joined, (z, log_det))
    torch.testing.assert_close(last, (z, log_det))


@every_backend
def test_coupling_in_16_bits_sums_in_float32(backend):
    x = inputs((2, 4, 20), "linear", torch.bfloat16)
    params = logits((2, 2, 20), 3, "linear", params_dim=2, dtype=torch.bfloat16)
    z, log_det = spline_coupling(x, params, num_bins=3, backend=backend)
    exact = spline_coupling(x.double(), params.double(), num_bins=3, backend="reference")[1]
    assert z.dtype == torch.bfloat16 and log_det.dtype == torch.float32
    torch.testing.assert_close(log_det, exact.float(), atol=1e-4, rtol=1e-4)


def test_tails_of_each_feature():
    tails = ["linear", "circular", "linear"]
    x, params = inputs((6, 3), "linear"), logits((6, 3), 4, None)
    y, log_det = rational_quadratic_spline(x, params, num_bins=4, tails=tails)
    for index, kind in enumerate(tails):
        used = params[:, index, :-1]
        if kind == "linear":
            used = torch.cat([used[:, :8], used[:, 9:]], -1)
        alone = rational_quadratic_spline(x[:, index], used, num_bins=4, tails=kind)
        assert torch.equal(y[:, index], alone[0]) and torch.equal(log_det[:, index], alone[1])


def test_bound_of_each_feature():
    bound = torch.tensor([0.5, 1.0, 3.0], device=DEVICE)
    x, params = inputs((6, 3), "linear"), logits((6, 3), 4, "linear")
    y, log_det = rational_quadratic_spline(x, params, num_bins=4, tails="linear", tail_bound=bound)
    for index, limit in enumerate(bound.tolist()):
        alone = rational_quadratic_spline(
            x[:, index], params[:, index], num_bins=4, tails="linear", tail_bound=limit
        )
        torch.testing.assert_close((y[:, index], log_det[:, index]), alone, atol=2e-5, rtol=2e-5)


def spline(*shape, params=(2, 3, 8), **options):
    return rational_quadratic_spline(
        torch.ones(*shape), torch.ones(params), **{"num_bins": 3, "tails": "linear", **options}
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: spline(2, 3, params=(2, 3, 9)), ValueError, r"params: expected shape \(2, 3, 8\)"),
        (lambda: spline(2, 3, params_dim=1), ValueError, "params_dim: expected -1, or 2"),
        (lambda: spline(2, 3, num_bins=65), ValueError, "num_bins: expected 1 to 64, got 65"),
        (lambda: spline(2, 3, tails="cubic"), ValueError, "tails: expected None, 'linear' or"),
        (lambda: spline(2, 3, convention="rqs"), ValueError, "convention: expected 'nflows' or 'zuko'"),
        (lambda: spline(2, 3, bounds=(0, 1, 0, 2)), ValueError, "bounds: expected one interval"),
        (lambda: spline(2, 3, bounds=(1, 0, 1, 0)), ValueError, "bounds: expected left < right"),
        (lambda: spline(2, 3, bounds=(0, 1, 0, 1), tail_bound=1), ValueError, "tail_bound: expected None"),
        (lambda: spline(2, 3, min_bin_width=0.4), ValueError, "min_bin_width: expected a number of at"),
        (lambda: spline(2, 3, min_derivative=0), ValueError, "min_derivative: expected a number between"),
        (lambda: spline(2, 3, logit_scale=-1), ValueError, "logit_scale: expected a number > 0"),
        (lambda: spline(2, 3, tails=["linear"]), ValueError, "tails: expected one for each feature"),
        (lambda: rational_quadratic_spline(torch.ones(2).int(), torch.ones(2, 8), num_bins=3),
         TypeError, "x: expected dtype"),
        (lambda: rational_quadratic_spline(torch.ones(2), torch.ones(2, 8).half(), num_bins=3),
         TypeError, "params: expected x's dtype float32"),
        (lambda: spline_coupling(torch.ones(2, 4), torch.ones(2, 15), num_bins=3), ValueError,
         r"spline_coupling: params: expected shape \(2, 2, 8\)"),
        (lambda: spline_coupling(torch.ones(2, 4), torch.ones(2, 16), num_bins=3, mask="rows"), ValueError,
         "mask: expected 'channel', 'channel_inverse', 0 to 4 or a bool tensor, got rows"),
        (lambda: spline_coupling(torch.ones(2, 4), torch.ones(2, 16), num_bins=3,
                                 mask=torch.tensor([True, True, True, False])), ValueError,
         "params: expected logits of 3 channels, got of 2"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
