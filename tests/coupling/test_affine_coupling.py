"""Affine coupling on every backend against the formulas in float64."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from warploom._library import OPS
from warploom.ops.coupling import PRESETS, affine_coupling, channel_slots

from tests import plain
from tests.backends import BACKENDS, DEVICE, SLOW_BACKENDS, every_dtype
from tests.numerics import check_against_float64, inside_larger

every_backend = pytest.mark.parametrize(
    "backend", [name for name in BACKENDS if name in OPS["affine_coupling"].backends]
)
SCALES = {
    "additive": {},
    "exp": {},
    "tanh": {"clamp": 0.7},
    "tanh of scaled params": {"clamp": 2.0, "params_scale": 0.1},
    "atan": {"clamp": 2.0},
    "centered_sigmoid": {"clamp": 1.5},
    "sigmoid": {},
    "sigmoid and eps": {"eps": 1e-3},
    "softclip": {"clamp": 1e-3},
}
every_scale = pytest.mark.parametrize("scale", SCALES)
every_order = pytest.mark.parametrize("order", ["mul_add", "add_mul", "div_add"])
both_directions = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
both_sources = pytest.mark.parametrize("recompute", [True, False], ids=["from-z", "from-x"])


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


def options_of(scale):
    return {"scale": scale.split(" ")[0], **SCALES[scale]}


def params_for(x, mask="channel", scale="exp", dtype=None):
    """Parameters in one tensor, of the shape that the mask asks for."""
    moved = plain.coupling_mask(mask, x)
    over_channels = isinstance(mask, int) or mask in ("channel", "channel_inverse")
    if isinstance(mask, torch.Tensor):
        over_channels = mask.dim() == 1
    count = x.shape[1]
    if over_channels:
        count = int(moved.flatten(1)[:, 0].sum()) if moved.dim() > 1 else int(moved.sum())
    return normal(
        x.shape[0], (1 if scale == "additive" else 2) * count, *x.shape[2:], dtype=dtype or x.dtype
    )


def check(x, params, *, backend, weight=None, log_det_in=None, recompute=True, **options):
    """z, log_det and the gradients of all tensors; `params` is a tensor or a pair."""
    pair = isinstance(params, tuple)
    extras = [("scale_weight", weight), ("log_det_in", log_det_in)]
    names = [name for name, value in extras if value is not None]
    tensors = [x, *(params if pair else [params])]
    tensors += [value for _, value in extras if value is not None]

    def call(function, *tensors):
        x, *rest = tensors
        given = (rest.pop(0), rest.pop(0)) if pair else rest.pop(0)
        return function(x, given, **dict(zip(names, rest)), **options)

    ours = functools.partial(affine_coupling, backend=backend, recompute=recompute)
    check_against_float64(
        functools.partial(call, ours), functools.partial(call, plain.affine_coupling), tensors
    )


@every_backend
@every_scale
@every_order
@both_directions
@pytest.mark.parametrize("layout", ["shift_scale", "scale_shift", "interleaved"])
def test_every_convention(backend, scale, order, inverse, layout):
    options = options_of(scale)
    x = normal(2, 5, 1, 3)
    check(
        x, params_for(x, scale=options["scale"]), backend=backend,
        order=order, inverse=inverse, layout=layout, **options,
    )  # fmt: skip


@every_backend
@every_dtype
@every_scale
def test_every_dtype(backend, dtype, scale):
    options = options_of(scale)
    x = normal(2, 6, 7, 5, dtype=dtype)
    # z of 16 bits has lost what its gradient needs.
    check(x, params_for(x, scale=options["scale"]), backend=backend, recompute=False, **options)


MASKS = {
    "channel": "channel",
    "channel_inverse": "channel_inverse",
    "the first passes": 1,
    "all": 0,
    "none": 5,
    "alternate": torch.tensor([True, False, True, False, True]),
    "one in the middle": torch.tensor([False, False, True, False, False]),
    "random": torch.tensor([False, True, True, False, True]),
    "checkerboard": "checkerboard",
    "checkerboard_inverse": "checkerboard_inverse",
}
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
FREE_MASKS = {
    "elements": (5, 3, 4),
    "pixels": (1, 3, 4),
    "rows": (1, 3, 1),
    "channels": (5, 1, 1),
}


@every_backend
@every_mask
@both_sources
@pytest.mark.parametrize(
    "memory", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
def test_every_mask(backend, mask, recompute, memory):
    mask = mask.to(DEVICE) if isinstance(mask, torch.Tensor) else mask
    x = normal(2, 5, 3, 4).contiguous(memory_format=memory)
    params = params_for(x, mask).contiguous(memory_format=memory)
    check(x, params, backend=backend, mask=mask, recompute=recompute)
    z, _ = affine_coupling(x, params, mask=mask, backend=backend)
    moved = plain.coupling_mask(mask, x)
    assert torch.equal(z[:, ~moved], x[:, ~moved])
    assert z.is_contiguous(memory_format=memory)


@every_backend
@pytest.mark.parametrize("shape", FREE_MASKS.values(), ids=FREE_MASKS)
@pytest.mark.parametrize(
    "memory", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
def test_free_mask(backend, shape, memory):
    x = normal(8, 5, 3, 4).contiguous(memory_format=memory)
    mask = (torch.arange(math.prod(shape)) % 3 != 1).view(shape).to(DEVICE)
    pair = tuple(normal(8, 5, 3, 4).contiguous(memory_format=memory) for _ in range(2))
    check(x, pair, backend=backend, mask=mask, scale="tanh", weight=normal(5))


@every_backend
@pytest.mark.parametrize("mask", ["checkerboard", "checkerboard_inverse"])
@pytest.mark.parametrize("layout", ["shift_scale", "interleaved"])
@pytest.mark.parametrize(
    "memory", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
@pytest.mark.parametrize("width", [6, 70], ids=["narrow", "vectors_and_a_rest"])
def test_packed_checkerboard(backend, mask, layout, memory, width):
    x = normal(2, 3, 5, width).contiguous(memory_format=memory)
    full = normal(2, 6, 5, width)
    moved = plain.coupling_mask(mask, x)[:1].expand(6, 5, width)
    packed = full[:, moved].view(2, 6, 5, width // 2).contiguous(memory_format=memory)
    options = {"mask": mask, "layout": layout, "scale": "sigmoid", "backend": backend}
    leaves = [tensor.requires_grad_() for tensor in (x, full, packed)]
    outputs = [affine_coupling(leaves[0], params, **options) for params in leaves[1:]]
    assert torch.equal(outputs[0][0], outputs[1][0])
    torch.testing.assert_close(outputs[0][1], outputs[1][1])  # sums in another order
    grads = []
    for params, (z, log_det) in zip(leaves[1:], outputs):
        grads.append(torch.autograd.grad((z * z).sum() + log_det.sum(), (x, params)))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1][:, moved].view(packed.shape), grads[1][1])
    assert not grads[0][1][:, ~moved].any()


@every_backend
@pytest.mark.parametrize("layout", ["shift_scale", "interleaved"])
@pytest.mark.parametrize("mask", ["channel", "channel_inverse", 5])
def test_channels_last_with_pixels_of_vectors(backend, layout, mask):
    x = normal(2, 75, 3, 5).contiguous(memory_format=torch.channels_last)
    count = {"channel": 37, "channel_inverse": 38, 5: 70}[mask]
    params = normal(2, 2 * count, 3, 5).contiguous(memory_format=torch.channels_last)
    check(x, params, backend=backend, mask=mask, layout=layout, scale="atan")


@every_backend
@every_scale
@pytest.mark.parametrize("center", ["channel", "sample"])
@both_sources
@pytest.mark.parametrize(
    "memory", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
def test_centred_scales_preserve_volume(backend, scale, center, recompute, memory):
    options = options_of(scale)
    x = normal(2, 5, 3, 4).contiguous(memory_format=memory)
    params = params_for(x, scale=options["scale"])
    check(
        x, params, backend=backend, center=center, recompute=recompute, order="add_mul", **options
    )
    _, log_det = affine_coupling(x, params, center=center, backend=backend, **options)
    assert not log_det.any()


@every_backend
@pytest.mark.parametrize("weights", [3, 1], ids=["per channel", "one"])
@pytest.mark.parametrize(
    "memory", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
def test_learned_scale(backend, weights, memory):
    x = normal(3, 6, 3, 3).contiguous(memory_format=memory)
    check(x, params_for(x), backend=backend, scale="tanh", weight=normal(weights))


@every_backend
@every_order
def test_log_det_is_added_to_the_one_given(backend, order):
    x = normal(3, 4, 5)
    check(x, params_for(x), backend=backend, order=order, log_det_in=normal(3))


@every_backend
@pytest.mark.parametrize(
    "shape", [(3, 4), (3, 7), (2, 1), (2, 1, 4), (2, 3, 7), (2, 4, 2, 3, 2)], ids=str
)
@pytest.mark.parametrize("mask", ["channel", "channel_inverse"])
def test_any_number_of_spatial_dimensions(backend, shape, mask):
    x = normal(*shape)
    check(x, params_for(x, mask), backend=backend, mask=mask, scale="sigmoid")


@every_backend
@pytest.mark.parametrize(
    "mask",
    ["channel", torch.tensor([False, True] * 8), "checkerboard"],
    ids=["halves", "alternate", "checkerboard"],
)
@pytest.mark.parametrize(
    "memory", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
def test_planes_that_are_cut(backend, mask, memory):
    """More pixels than a part of a sample has, and lines that are not full."""
    if backend in SLOW_BACKENDS:
        pytest.skip(
            "parts are the CPU code's; test_affine_coupling_tiles.py has the kernels' tiles"
        )
    mask = mask.to(DEVICE) if isinstance(mask, torch.Tensor) else mask
    x = normal(2, 16, 131, 141).contiguous(memory_format=memory)
    params = params_for(x, mask).contiguous(memory_format=memory)
    options = {} if mask == "checkerboard" else {"weight": normal(8)}
    check(x, params, backend=backend, mask=mask, scale="tanh", **options)
    if not options:
        return
    for center in ("channel", "sample"):
        check(x, params, backend=backend, mask=mask, scale="atan", center=center)


@every_backend
@every_scale
@every_order
def test_inverse_of_forward(backend, scale, order):
    options = {"order": order, "backend": backend, **options_of(scale)}
    x = normal(2, 5, 3, 4)
    params = params_for(x, scale=options["scale"])
    z, log_det = affine_coupling(x, params, **options)
    back, inverse_log_det = affine_coupling(z, params, inverse=True, **options)
    torch.testing.assert_close(back, x, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(inverse_log_det, -log_det)


@every_backend
@pytest.mark.parametrize(
    "kind", ["pair", "halves of one", "batch of others", "expanded", "strided", "unlike"]
)
@pytest.mark.parametrize(
    "memory", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
def test_memory_of_the_inputs(backend, kind, memory):
    x, params = (normal(2, c, 3, 4).contiguous(memory_format=memory) for c in (6, 6))
    if kind == "pair":
        params = tuple(normal(2, 3, 3, 4) for _ in range(2))
    if kind == "halves of one":
        params = tuple(params.chunk(2, dim=1))
    if kind == "batch of others":
        x, params = normal(8, 9, 3, 4)[:, 1:7], normal(8, 8, 3, 4)[:, 2:]
    if kind == "expanded":
        x, params = normal(1, 6, 3, 4).expand(2, 6, 3, 4), normal(2, 6, 1, 1).expand(2, 6, 3, 4)
    if kind == "strided":
        x, params = inside_larger(x), inside_larger(params)
    if kind == "unlike":
        params = (
            params.contiguous()
            if memory == torch.channels_last
            else params.to(memory_format=torch.channels_last)
        )
    check(x, params, backend=backend, recompute=False)


@every_backend
@pytest.mark.parametrize("in_place", [False, True], ids=["beside", "in place"])
@pytest.mark.parametrize(
    "memory", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
@pytest.mark.parametrize("mask", ["channel", "checkerboard", "alternate"])
def test_out(backend, in_place, memory, mask):
    mask = MASKS[mask].to(DEVICE) if mask == "alternate" else mask
    x = normal(2, 5, 3, 4).contiguous(memory_format=memory)
    params = params_for(x, mask).contiguous(memory_format=memory)
    options = {"mask": mask, "scale": "atan", "log_det_in": normal(2), "backend": backend}
    expected = affine_coupling(x, params, **options)
    out = x if in_place else torch.empty_like(x)
    z, log_det = affine_coupling(x, params, out=out, **options)
    assert z is out
    assert torch.equal(z, expected[0]) and torch.equal(log_det, expected[1])


@every_backend
@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 2, 2), (2, 4, 0, 3)], ids=str)
def test_empty(backend, shape):
    x, params = normal(*shape).requires_grad_(), normal(*shape).requires_grad_()
    z, log_det = affine_coupling(x, params, backend=backend)
    (z.sum() + log_det.sum()).backward()
    assert x.grad.shape == params.grad.shape == z.shape == shape
    assert torch.equal(log_det, torch.zeros(shape[0], device=DEVICE))


@every_backend
@pytest.mark.parametrize("scale", [name for name in SCALES if name != "additive"])
@pytest.mark.parametrize("order", ["mul_add", "div_add"])
def test_large_logits(backend, scale, order):
    """u of +-100 and the like: what is finite in the formula is finite, log(sigmoid) among it."""
    options = options_of(scale)
    u = torch.tensor([-100.0, -88.0, -30.0, -3.0, 0.0, 3.0, 30.0, 88.0, 100.0], device=DEVICE)
    x, t = torch.full((1, 18), 0.5, device=DEVICE), torch.full((1, 9), 0.25, device=DEVICE)
    params = torch.cat((t, u[None]), 1)
    z, log_det = affine_coupling(x, params, order=order, backend=backend, **options)
    exact, exact_log_det = plain.affine_coupling(
        x.double(), params.double(), order=order, **options
    )
    torch.testing.assert_close(log_det.double(), exact_log_det, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z.double(), exact.float().double(), rtol=1e-5, atol=1e-30)


@every_backend
@pytest.mark.parametrize("place", ["x passing", "x", "shift", "raw scale"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
@both_directions
def test_what_is_not_finite_stays_in_its_place(backend, place, value, inverse):
    clean_x, clean_params = normal(2, 4, 6), normal(2, 4, 6)
    x, params = clean_x.clone(), clean_params.clone()
    where = {"x passing": (x, 1), "x": (x, 3), "shift": (params, 1), "raw scale": (params, 3)}
    tensor, channel = where[place]
    tensor[1, channel, 2] = value
    options = {"inverse": inverse, "backend": backend}
    z, log_det = affine_coupling(x, params, **options)
    expected, expected_log_det = plain.affine_coupling(x, params, inverse=inverse)
    torch.testing.assert_close(z, expected, equal_nan=True)
    torch.testing.assert_close(log_det, expected_log_det, equal_nan=True)
    clean, _ = affine_coupling(clean_x, clean_params, **options)
    same = torch.ones_like(z, dtype=torch.bool)
    same[1, 1 if place == "x passing" else 3, 2] = False
    assert torch.equal(z[same], clean[same])


@every_backend
@pytest.mark.parametrize("mask", ["checkerboard", "free"])
def test_parameters_where_x_passes_are_not_used(backend, mask):
    mask = torch.arange(12).view(1, 3, 4).to(DEVICE) % 3 == 0 if mask == "free" else mask
    x, params = normal(2, 5, 3, 4), normal(2, 10, 3, 4)
    moved = plain.coupling_mask(mask, x)[:1].expand(10, 3, 4)
    spoilt = torch.where(moved, params, math.nan).requires_grad_()
    z, log_det = affine_coupling(x, spoilt, mask=mask, backend=backend)
    expected = affine_coupling(x, params, mask=mask, backend=backend)
    assert torch.equal(z, expected[0]) and torch.equal(log_det, expected[1])
    (z.sum() + log_det.sum()).backward()
    assert not spoilt.grad[:, ~moved].any()
    assert torch.isfinite(spoilt.grad).all()


@every_backend
@both_sources
def test_only_one_output_in_the_loss(backend, recompute):
    """A huge scale does not reach gradients that are 0."""
    x = normal(2, 4, 6).requires_grad_()
    params = torch.cat(
        (normal(2, 2, 6), torch.full((2, 2, 6), 120.0, device=DEVICE)), 1
    ).requires_grad_()
    _, log_det = affine_coupling(x, params, recompute=recompute, backend=backend)
    log_det.sum().backward()
    assert not x.grad.any()
    assert torch.equal(
        params.grad, torch.cat((torch.zeros(2, 2, 6), torch.ones(2, 2, 6)), 1).to(DEVICE)
    )
    x.grad = params.grad = None
    z, _ = affine_coupling(x, params.detach(), recompute=recompute, backend=backend)
    z[:, :2].sum().backward()
    assert torch.equal(x.grad[:, :2], torch.ones(2, 2, 6, device=DEVICE))


@every_backend
@pytest.mark.parametrize(
    "memory", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
def test_two_runs_agree_bit_for_bit(backend, memory):
    shape = (2, 6, 5, 5) if backend in SLOW_BACKENDS else (3, 6, 70, 70)
    x = normal(*shape).contiguous(memory_format=memory).requires_grad_()
    params = params_for(x).contiguous(memory_format=memory).requires_grad_()
    weight = normal(3).requires_grad_()

    def run():
        z, log_det = affine_coupling(x, params, scale="tanh", scale_weight=weight, backend=backend)
        grads = torch.autograd.grad((z * z).sum() + log_det.sum(), (x, params, weight))
        return z, log_det, *grads

    assert all(torch.equal(first, second) for first, second in zip(run(), run()))


@every_backend
def test_narrow_parameters_beside_a_wide_stream(backend):
    x, params = normal(2, 4, 6), normal(2, 4, 6, dtype=torch.bfloat16).requires_grad_()
    z, log_det = affine_coupling(x, params, backend=backend)
    expected = affine_coupling(x, params.detach().float(), backend=backend)
    assert torch.equal(z, expected[0]) and torch.equal(log_det, expected[1])
    z.sum().backward()
    assert params.grad.dtype == torch.bfloat16


@every_backend
def test_slots_stand_for_a_mask(backend):
    x, mask = normal(2, 5, 6), MASKS["random"].to(DEVICE)
    params = params_for(x, mask)
    expected = affine_coupling(x, params, mask=mask, backend=backend)
    got = affine_coupling(x, params, mask=channel_slots(mask), backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_presets_are_keyword_arguments():
    for name, preset in PRESETS.items():
        x = normal(2, 4, 3, 3)
        params = params_for(x)
        z, _ = affine_coupling(x, params, **preset)
        expected, _ = plain.affine_coupling(x.double(), params.double(), **preset)
        torch.testing.assert_close(
            z, expected.float(), msg=lambda text, name=name: f"{name}: {text}"
        )


def call(x=None, params=None, **options):
    x = torch.ones(2, 4, 3, 3) if x is None else x
    return affine_coupling(x, torch.ones(2, 4, 3, 3) if params is None else params, **options)


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        (lambda: call(torch.ones(4)), ValueError, "x: expected at least 2 dimensions"),
        (lambda: call(torch.ones(2, 4).int()), TypeError, "x: expected dtype"),
        (lambda: call(params=torch.ones(2, 3, 3, 3)), ValueError, r"params: expected shape \(2, 4, 3, 3\)"),
        (lambda: call(params=torch.ones(2, 4, 3, 3).double()), TypeError, "params: expected x's dtype"),
        (lambda: call(params=(torch.ones(2, 2, 3, 3), torch.ones(2, 1, 3, 3))), ValueError, r"params\[1\]"),
        (lambda: call(mask="halves"), ValueError, "mask: expected 'channel'"),
        (lambda: call(mask=5), ValueError, "mask: expected a number of channels from 0 to 4"),
        (lambda: call(mask=torch.ones(5, dtype=torch.bool)), ValueError, r"mask: expected shape \(4,\)"),
        (lambda: call(mask=torch.ones(4, 3, 3)), TypeError, "mask: expected dtype torch.bool"),
        (lambda: call(mask=torch.ones(2, 3, 3).bool()), ValueError, "mask: expected a shape that broadcasts"),
        (lambda: call(torch.ones(2, 4, 3), mask="checkerboard"), ValueError, "x: expected shape"),
        (lambda: call(layout="halves"), ValueError, "layout: expected one of shift_scale"),
        (lambda: call(scale="cube"), ValueError, "scale: expected one of additive"),
        (lambda: call(order="add"), ValueError, "order: expected one of mul_add"),
        (lambda: call(center="batch"), ValueError, "center: expected one of none"),
        (lambda: call(center="channel", mask="checkerboard", params=torch.ones(2, 8, 3, 3)), ValueError,
         "center: expected 'none'"),
        (lambda: call(scale="softclip"), ValueError, "clamp: expected a number between 0 and 1"),
        (lambda: call(eps=-1.0), ValueError, "eps: expected a number >= 0"),
        (lambda: call(scale_weight=torch.ones(2)), ValueError, "scale_weight: expected None for scale"),
        (lambda: call(scale="tanh", scale_weight=torch.ones(4)), ValueError, "scale_weight: expected shape"),
        (lambda: call(log_det_in=torch.ones(3)), ValueError, r"log_det_in: expected shape \(2,\)"),
        (lambda: call(log_det_in=torch.ones(2).double()), TypeError, "log_det_in: expected dtype"),
        (lambda: call(out=torch.ones(2, 4)), ValueError, "out: expected shape"),
        (lambda: call(torch.ones(2, 4, 3, 3, requires_grad=True), out=torch.ones(2, 4, 3, 3)), RuntimeError,
         "out: expected None"),
    ],
)  # fmt: skip
def test_bad_input_is_named(attempt, error, message):
    with pytest.raises(error, match="affine_coupling: " + message):
        attempt()


@pytest.mark.skipif(DEVICE != "cpu", reason="a mask on a GPU is not looked at")
def test_a_mask_that_does_not_fit_the_parameters_is_refused():
    with pytest.raises(
        RuntimeError, match="mask: expected 2 transformed channels, as params has, got"
    ):
        call(mask=torch.tensor([True, True, True, False]))


GRADCHECKS = list(
    itertools.product(
        ("exp", "tanh", "sigmoid"), ("mul_add", "add_mul"), ("none", "channel", "sample")
    )
)


@pytest.mark.parametrize(("scale", "order", "center"), GRADCHECKS, ids=str)
@pytest.mark.parametrize("backend", [name for name in ("reference", "cpu") if name in BACKENDS])
@both_sources
def test_gradcheck(backend, scale, order, center, recompute):
    x, params = normal(2, 4, 3, dtype=torch.float64), normal(2, 4, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, params: affine_coupling(
            x, params, scale=scale, order=order, center=center, recompute=recompute, backend=backend
        ),
        (x.requires_grad_(), params.requires_grad_()),
    )
