"""The cascade of max pools on every backend: PyTorch's bits, and its gradients."""

from __future__ import annotations

import functools

import pytest
import torch
from warploom.ops.spp import sppf

from tests import plain
from tests.backends import BACKENDS, DEVICE, SLOW_BACKENDS, every_backend, every_dtype
from tests.numerics import check_against_float64, inside_larger

LAYOUTS = {"planes": torch.contiguous_format, "channels-last": torch.channels_last}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
SPECIAL = [float("nan"), float("-inf"), float("inf"), 0.0, -0.0]


def few_levels(*shape, dtype=torch.float32, layout=torch.contiguous_format):
    """Small integers: nearly every window has ties."""
    x = torch.randint(-2, 3, shape).to(DEVICE, dtype)
    return x.contiguous(memory_format=layout)


def with_special_values(x):
    places = torch.randint(12, x.shape, device=x.device)
    for index, value in enumerate(SPECIAL):
        x[places == index] = value
    return x


def assert_same_bits(actual, expected):
    """Zeros of one sign and NaN at the same places, too."""
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(actual[numbers], expected[numbers])
    assert torch.equal(actual[numbers].signbit(), expected[numbers].signbit())


@every_backend
@every_dtype
@every_layout
@pytest.mark.parametrize("kernel_size", [3, 5, 7])
def test_forward_has_the_bits_of_pytorch(backend, dtype, layout, kernel_size):
    x = with_special_values(few_levels(2, 6, 9, 11, dtype=dtype, layout=layout))
    assert_same_bits(sppf(x, kernel_size, backend=backend), plain.sppf(x, kernel_size))


@every_backend
@every_layout
@pytest.mark.parametrize("value", [float("-inf"), float("nan"), 1.0], ids=["-inf", "nan", "1"])
def test_planes_of_one_value(backend, layout, value):
    """As PyTorch's kernels on a CPU: those on a GPU lose the gradients of channels-last planes of -inf."""
    here = torch.full((1, 2, 5, 4), value).contiguous(memory_format=layout).requires_grad_()
    x = here.detach().to(DEVICE).requires_grad_()
    out, expected = sppf(x, backend=backend), plain.sppf(here)
    assert_same_bits(out.detach().cpu(), expected.detach())
    upstream = torch.randn_like(expected)
    got = torch.autograd.grad(out, x, upstream.to(DEVICE))[0].cpu()
    torch.testing.assert_close(got, torch.autograd.grad(expected, here, upstream)[0])


@every_backend
@every_layout
@pytest.mark.parametrize(
    ("shape", "kernel_size"),
    [((2, 3, 1, 1), 3), ((1, 2, 3, 2), 5), ((1, 1, 2, 40), 3), ((1, 3, 11, 5), 9)],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else f"kernel {value}",
)
def test_windows_wider_than_the_plane(backend, layout, shape, kernel_size):
    x = few_levels(*shape, layout=layout)
    function = functools.partial(sppf, kernel_size=kernel_size, backend=backend)
    assert_same_bits(function(x), plain.sppf(x, kernel_size))
    check_against_float64(function, functools.partial(plain.sppf, kernel_size=kernel_size), [x])


@every_backend
@every_dtype
@every_layout
def test_gradients_go_where_maxima_came_from(backend, dtype, layout):
    """Also among ties, of which PyTorch takes the first in row-major order."""
    x = few_levels(2, 6, 9, 11, dtype=dtype, layout=layout)
    check_against_float64(functools.partial(sppf, backend=backend), plain.sppf, [x])


@every_backend
@every_layout
def test_gradients_pass_special_values(backend, layout):
    x = with_special_values(few_levels(2, 3, 9, 11, layout=layout)).requires_grad_()
    upstream = torch.randint(-8, 9, (2, 12, 9, 11), device=DEVICE).float()
    grads = (
        torch.autograd.grad(function(x), x, upstream)[0]
        for function in (functools.partial(sppf, backend=backend), plain.sppf)
    )
    assert torch.equal(*grads)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in SLOW_BACKENDS])
def test_gradients_have_the_bits_of_pytorch(backend):
    """Sums are taken in the order of autograd's."""
    x = torch.randn(2, 3, 20, 20, device=DEVICE, requires_grad=True)
    out, expected = sppf(x, backend=backend), plain.sppf(x)
    upstream = torch.randn_like(out)
    grads = [torch.autograd.grad(result, x, upstream)[0] for result in (out, expected)]
    if DEVICE == "cpu":
        assert torch.equal(*grads)
    torch.testing.assert_close(*grads)


@every_backend
@every_layout
def test_planes_of_several_tiles(backend, layout):
    # A tile of Triton's kernels has 1024 elements.
    shapes = (
        [(1, 1, 37, 31), (1, 2, 27, 21)]
        if backend == "triton"
        else [(1, 1, 91, 93), (1, 6, 47, 21)]
    )
    shape = shapes[layout == torch.channels_last]
    x = few_levels(*shape, layout=layout).requires_grad_()
    out, expected = sppf(x, backend=backend), plain.sppf(x)
    assert_same_bits(out.detach(), expected.detach())
    upstream = torch.randint(-8, 9, out.shape, device=DEVICE).float()
    assert torch.equal(
        torch.autograd.grad(out, x, upstream)[0], torch.autograd.grad(expected, x, upstream)[0]
    )


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "cpu"])
@pytest.mark.parametrize(
    "shape", [(2, 37, 6, 9), (1, 64, 112, 120)], ids=["whole and partial groups", "past the caches"]
)
def test_channels_in_groups(backend, shape):
    """Of channels-last tensors groups are taken at a time; large outputs are written past the caches."""
    x = few_levels(*shape, layout=torch.channels_last)
    for values in (x, with_special_values(x.clone(memory_format=torch.preserve_format))):
        leaf = values.requires_grad_()
        out, expected = sppf(leaf, backend=backend), plain.sppf(leaf)
        assert_same_bits(out.detach(), expected.detach())
        upstream = torch.randint(-8, 9, out.shape, device=DEVICE).float()
        grads = [torch.autograd.grad(result, leaf, upstream)[0] for result in (out, expected)]
        assert torch.equal(*grads)


@every_layout
def test_the_layout_of_the_input_is_kept(layout):
    x = few_levels(2, 3, 5, 4, layout=layout).requires_grad_()
    out = sppf(x)
    assert out.is_contiguous(memory_format=layout)
    assert torch.autograd.grad(out.sum(), x)[0].is_contiguous(memory_format=layout)


@every_backend
def test_slices_of_larger_buffers(backend):
    x = few_levels(2, 3, 7, 5)
    for view in (inside_larger(x), x[:, :1].expand(2, 3, 7, 5), x.transpose(2, 3)):
        assert_same_bits(sppf(view, backend=backend), plain.sppf(view))


@every_backend
@every_layout
def test_two_runs_give_the_same_bits(backend, layout):
    x = few_levels(2, 5, 9, 8, layout=layout).requires_grad_()
    upstream = torch.randn(2, 20, 9, 8, device=DEVICE)
    first, second = (
        torch.autograd.grad(sppf(x, 3, backend=backend), x, upstream)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


@every_backend
def test_an_empty_batch(backend):
    x = torch.ones(0, 3, 5, 4, device=DEVICE, requires_grad=True)
    out = sppf(x, backend=backend)
    out.sum().backward()
    assert out.shape == (0, 12, 5, 4)
    assert x.grad.shape == x.shape


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sppf(torch.ones(3, 4, 4)), ValueError, "sppf: x: expected 4 dimensions"),
        (lambda: sppf(torch.ones(1, 3, 0, 4)), ValueError, "x: expected at least one channel"),
        (lambda: sppf(torch.ones(1, 3, 4, 4), 4), ValueError, "kernel_size: expected an odd number >= 3"),
        (lambda: sppf(torch.ones(1, 3, 4, 4).int()), TypeError, "sppf: x: expected dtype"),
        (lambda: sppf(None), TypeError, "sppf: x: expected a tensor"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("cuda", "simt")])
def test_a_window_that_no_tile_holds_is_refused(backend):
    with pytest.raises(RuntimeError, match="kernel_size 21"):
        sppf(torch.ones(1, 1, 4, 4, device=DEVICE), 21, backend=backend)
