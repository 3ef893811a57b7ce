"""Squeezing: each pixel's place, in every order, layout, dtype and direction."""

from __future__ import annotations

import pytest
import torch
from warploom.nn import Squeeze
from warploom.ops.coupling import squeeze

from tests.backends import DEVICE, every_backend, every_dtype

every_factor = pytest.mark.parametrize("factor", [1, 2, 3])
every_order = pytest.mark.parametrize("order", ["channel_major", "position_major"])
every_memory = pytest.mark.parametrize(
    "memory", [torch.contiguous_format, torch.channels_last], ids=["channels_first", "last"]
)
#: Channels, rows and columns of squeezed planes: odd ones, one of each, lines of vectors, of many of them.
SIZES = [(3, 2, 3), (1, 1, 1), (2, 1, 8), (8, 3, 2), (16, 2, 34)]


def numbered(*shape, dtype=torch.float32):
    """Every element another number, as far as the dtype has them."""
    return torch.arange(torch.Size(shape).numel(), device=DEVICE).reshape(shape).to(dtype)


def place_of(channel, position, channels, factor, order):
    if order == "channel_major":
        return channel * factor**2 + position
    return position * channels + channel


@every_backend
@every_dtype
@every_memory
@every_order
@every_factor
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_each_pixel_has_its_place(backend, dtype, memory, order, factor, size):
    channels, rows, columns = size
    x = numbered(2, channels, rows * factor, columns * factor, dtype=dtype)
    x = x.to(memory_format=memory)
    z = squeeze(x, factor, order=order, backend=backend)
    assert z.shape == (2, channels * factor**2, rows, columns)
    for channel in range(channels):
        for position in range(factor**2):
            row, column = divmod(position, factor)
            place = place_of(channel, position, channels, factor, order)
            assert torch.equal(z[:, place], x[:, channel, row::factor, column::factor])
    assert torch.equal(squeeze(z, factor, order=order, inverse=True, backend=backend), x)


@every_backend
@every_order
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_the_layout_is_kept(backend, order, inverse):
    x = numbered(2, 8, 4, 6)
    last = x.to(memory_format=torch.channels_last)
    for given, memory in ((x, torch.contiguous_format), (last, torch.channels_last)):
        z = squeeze(given, order=order, inverse=inverse, backend=backend)
        assert z.is_contiguous(memory_format=memory)


VIEWS = {
    "a stride of 0": lambda: numbered(1, 4, 4, 6).expand(3, 4, 4, 6),
    "every other sample": lambda: numbered(4, 4, 4, 8)[::2],
    "some channels": lambda: numbered(2, 9, 4, 8)[:, 3:7],
    "some channels, channels last": lambda: numbered(2, 12, 4, 6).to(
        memory_format=torch.channels_last
    )[:, 4:8],
    "turned planes": lambda: numbered(2, 4, 6, 4).transpose(2, 3),
    "off by one element": lambda: numbered(2 * 4 * 4 * 8 + 1)[1:].view(2, 4, 4, 8),
}


@every_backend
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_views_are_read_as_they_lie(backend, view, inverse):
    x = view()
    wanted = squeeze(x.contiguous(), inverse=inverse, backend="reference")
    assert torch.equal(squeeze(x, inverse=inverse, backend=backend), wanted)


@every_backend
def test_no_samples(backend):
    z = squeeze(numbered(0, 3, 4, 6), backend=backend)
    assert z.shape == (0, 12, 2, 3)


@every_backend
@every_order
@every_memory
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_the_gradient_takes_the_way_back(backend, order, memory, inverse):
    x = numbered(2, 4, 4, 6).to(memory_format=memory).requires_grad_()
    z = squeeze(x, order=order, inverse=inverse, backend=backend)
    grad_z = numbered(*z.shape).flip(1)
    (grad_x,) = torch.autograd.grad(z, x, grad_z)
    assert torch.equal(grad_x, squeeze(grad_z, order=order, inverse=not inverse))


def test_the_layer_is_the_op():
    x = numbered(2, 3, 4, 6)
    z, log_det = Squeeze(order="position_major")(x)
    assert torch.equal(z, squeeze(x, order="position_major"))
    assert torch.equal(log_det, torch.zeros(2, device=DEVICE))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="squeeze: x: expected height and width that 2 divides"):
        squeeze(torch.ones(1, 1, 3, 4))
    with pytest.raises(ValueError, match="squeeze: x: expected a multiple of 4 channels"):
        squeeze(torch.ones(1, 3, 2, 2), inverse=True)
    with pytest.raises(ValueError, match=r"squeeze: x: expected 4 dimensions \[B, C, H, W\]"):
        squeeze(torch.ones(1, 3, 2))
    with pytest.raises(ValueError, match="squeeze: factor: expected at least 1"):
        squeeze(torch.ones(1, 3, 2, 2), 0)
    with pytest.raises(ValueError, match="squeeze: order"):
        squeeze(torch.ones(1, 3, 2, 2), order="row_major")
    with pytest.raises(TypeError, match="squeeze: x: expected dtype float32"):
        squeeze(torch.ones(1, 3, 2, 2, dtype=torch.int32))
