"""Spatial pyramid pooling on every backend: PyTorch's adaptive pools, and each rule of windows by itself."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from warploom.ops.spp import spatial_pyramid_pool

from tests.backends import BACKENDS, DEVICE, INTERPRETED, every_backend, every_dtype
from tests.numerics import check_against_float64, inside_larger

INF, NAN = float("inf"), float("nan")
every_mode = pytest.mark.parametrize("mode", ["max", "avg"])
every_layout = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels-last"]
)
SHAPES = {
    "divisible": (2, 1, 8, 8),
    "indivisible": (1, 2, 7, 13),
    "more bins than rows": (1, 1, 3, 5),
    "1 x 1": (2, 1, 1, 1),
    "more channels than lanes": (1, 9, 5, 6),
    "more channels than a vector": (1, 37, 13, 13),
    "wide": (1, 1, 6, 140),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


def levels_of_torch(x: Tensor, levels=(1, 2, 4), mode: str = "max") -> Tensor:
    pool = F.adaptive_max_pool2d if mode == "max" else F.adaptive_avg_pool2d
    return torch.cat([pool(x, level).flatten(1) for level in levels], dim=1)


def with_gradient(function, x: Tensor, upstream_like=None) -> tuple[Tensor, Tensor]:
    """The result, and x's gradient for an upstream gradient of small integers, whose sums are exact."""
    leaf = x.detach().requires_grad_()
    out = function(leaf)
    upstream = (torch.arange(out.numel(), device=out.device) % 7 - 3).view_as(out).to(out.dtype)
    return out.detach(), torch.autograd.grad(out, leaf, upstream)[0]


def same(actual: Tensor, expected: Tensor) -> bool:
    return torch.equal(actual.nan_to_num(7.25), expected.nan_to_num(7.25))


def with_ties(*shape: int) -> Tensor:
    return torch.randint(-2, 3, shape).to(DEVICE, torch.float32)


def all_equal(*shape: int) -> Tensor:
    return torch.ones(shape, device=DEVICE)


def minus_infinity(*shape: int) -> Tensor:
    return torch.full(shape, -INF, device=DEVICE)


def with_nan(*shape: int) -> Tensor:
    x = with_ties(*shape)
    return x.masked_fill(torch.rand(shape, device=DEVICE) < 0.2, NAN)


# --- maxima and means of PyTorch's windows ------------------------------------------------------------


@every_backend
@every_layout
@every_shape
def test_maxima_and_their_places_are_those_of_torch(backend, layout, shape):
    kinds = (with_ties, all_equal, minus_infinity, with_nan)
    x = torch.cat([values(*shape) for values in kinds], dim=1).contiguous(memory_format=layout)
    out, grad = with_gradient(lambda t: spatial_pyramid_pool(t, backend=backend), x)
    expected, expected_grad = with_gradient(levels_of_torch, x.contiguous())
    assert same(out, expected)
    assert same(grad, expected_grad)
    with torch.no_grad():
        assert same(spatial_pyramid_pool(x, backend=backend), expected)


@every_backend
@every_dtype
@every_layout
@every_mode
def test_every_dtype_against_float64(backend, dtype, layout, mode):
    x = normal(2, 19, 7, 9, dtype=dtype).contiguous(memory_format=layout)
    check_against_float64(
        lambda t: spatial_pyramid_pool(t, (1, 2, 3), mode=mode, backend=backend),
        lambda t: levels_of_torch(t, (1, 2, 3), mode),
        [x],
    )


@every_backend
@every_mode
def test_several_maxima_at_one_pixel_are_added_before_rounding(backend, mode):
    x = torch.zeros(1, 1, 4, 4, dtype=torch.bfloat16, device=DEVICE)
    x[0, 0, 0, 0] = 1
    leaf = x.requires_grad_()
    out = spatial_pyramid_pool(leaf, (1, 2, 4), mode=mode, backend=backend)
    upstream = torch.zeros_like(out)
    upstream[0, 0], upstream[0, 1], upstream[0, 5] = 256, 1, 1
    grad = torch.autograd.grad(out, leaf, upstream)[0]
    exact = 258.0 if mode == "max" else 256 / 16 + 1 / 4 + 1
    assert grad[0, 0, 0, 0] == torch.tensor(exact).bfloat16()


@every_backend
@every_mode
def test_windows_that_overlap_are_each_read_whole(backend, mode):
    x = torch.arange(13.0, device=DEVICE).square().expand(1, 1, 13, 13)
    out = spatial_pyramid_pool(x, mode=mode, backend=backend)
    torch.testing.assert_close(out, levels_of_torch(x, mode=mode), rtol=1e-6, atol=0)


@every_backend
@every_mode
@pytest.mark.parametrize("flatten", ["level_major", "channel_major"])
def test_levels_of_unequal_sides_in_either_order(backend, mode, flatten):
    x, levels = normal(2, 3, 6, 9), [(2, 3), 1, (1, 4)]
    pool = F.adaptive_max_pool2d if mode == "max" else F.adaptive_avg_pool2d
    parts = [pool(x, level).flatten(2) for level in levels]
    if flatten == "level_major":
        expected = torch.cat([part.flatten(1) for part in parts], dim=1)
    else:
        expected = torch.cat(parts, dim=2).flatten(1)
    out = spatial_pyramid_pool(x, levels, mode=mode, flatten=flatten, backend=backend)
    torch.testing.assert_close(out, expected)


@every_backend
@every_mode
def test_as_many_bins_as_there_may_be(backend, mode):
    x = with_ties(1, 2, 5, 20)
    out, grad = with_gradient(
        lambda t: spatial_pyramid_pool(t, (1, 2, 4, 8, 16), mode=mode, backend=backend), x
    )
    expected, expected_grad = with_gradient(lambda t: levels_of_torch(t, (1, 2, 4, 8, 16), mode), x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grad, expected_grad)


@every_backend
@every_mode
def test_a_slice_of_a_larger_buffer_reads_nothing_around(backend, mode):
    x = with_ties(2, 3, 5, 7)
    out = spatial_pyramid_pool(inside_larger(x), mode=mode, backend=backend)
    torch.testing.assert_close(out, levels_of_torch(x, mode=mode))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in INTERPRETED])
@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "levels"),
    [
        pytest.param((2, 24, 12, 16), (1, 2, 4), id="vectors of pixels or channels"),
        pytest.param((1, 17, 72, 64), (1, 3), id="more than a block writes"),
        pytest.param((1, 16, 20, 24), (1, 2, 4, 8, 16), id="more cells than a block holds"),
    ],
)
def test_gradients_of_means(backend, dtype, layout, shape, levels):
    x = normal(*shape, dtype=dtype).contiguous(memory_format=layout)
    grad = with_gradient(lambda t: spatial_pyramid_pool(t, levels, mode="avg", backend=backend), x)[
        1
    ]
    expected = with_gradient(lambda t: levels_of_torch(t, levels, "avg"), x.double())[1]
    torch.testing.assert_close(grad, expected.to(dtype))


@every_layout
def test_the_gradient_lies_in_memory_as_x_does(layout):
    x = normal(2, 3, 4, 5).contiguous(memory_format=layout)
    grad = with_gradient(spatial_pyramid_pool, x)[1]
    assert grad.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    "backend", [name for name in BACKENDS if name in ("cpu", "reference", "cuda")]
)
def test_a_plane_of_more_pixels_than_int16_counts(backend):
    x = with_ties(1, 1, 200, 300)
    out, grad = with_gradient(lambda t: spatial_pyramid_pool(t, (1, 3), backend=backend), x)
    expected, expected_grad = with_gradient(lambda t: levels_of_torch(t, (1, 3)), x)
    assert same(out, expected) and same(grad, expected_grad)


@pytest.mark.parametrize(
    "backend", [name for name in BACKENDS if name in ("cpu", "reference", "cuda")]
)
@every_layout
@pytest.mark.parametrize(
    "shape", [(2, 256, 9, 33), (3, 50, 13, 13)], ids=["rows of 33 x 256", "50 planes of 13 x 13"]
)
def test_blocks_of_channels(backend, layout, shape):
    """What a CPU takes at once: lines from end to end, and short rows of several planes."""
    x = with_nan(*shape).contiguous(memory_format=layout)
    out, grad = with_gradient(lambda t: spatial_pyramid_pool(t, backend=backend), x)
    expected, expected_grad = with_gradient(levels_of_torch, x.contiguous())
    assert same(out, expected) and same(grad, expected_grad)
    with torch.no_grad():
        assert same(spatial_pyramid_pool(x, backend=backend), expected)


# --- the other rules of windows, from their own formulas ----------------------------------------------


def caffe_windows(bins: int, size: int) -> list[tuple[int, int, int]]:
    """Begin, end and pixels of the mean: SPPLayer's kernel and padding, PoolingLayer's windows."""
    kernel = math.ceil(size / bins)
    padding = (kernel * bins - size + 1) // 2
    found = []
    for index in range(bins):
        begin = index * kernel - padding
        end = min(begin + kernel, size + padding)
        found.append((max(begin, 0), min(end, size), end - begin))
    return found


def sppnet_windows(bins: int, size: int) -> list[tuple[int, int, int]]:
    window, stride = math.ceil(size / bins), size // bins
    return [(index * stride, index * stride + window, window) for index in range(bins)]


def pool_windows(x: Tensor, levels, windows, mode: str) -> Tensor:
    """Of x [B, C, H, W], the maximum or mean of every window."""
    parts = []
    for bins in levels:
        for (top, bottom, high), (left, right, wide) in product(
            windows(bins, x.shape[2]), windows(bins, x.shape[3])
        ):
            window = x[:, :, top:bottom, left:right].flatten(2)
            empty = window.shape[2] == 0
            if empty:
                parts.append(torch.zeros_like(x[:, :, 0, 0]))
            else:
                parts.append(window.amax(2) if mode == "max" else window.sum(2) / (high * wide))
    return torch.cat([part[..., None] for part in parts], dim=2).flatten(1)


@every_backend
@every_mode
@pytest.mark.parametrize(
    ("bin_mode", "windows"), [("caffe", caffe_windows), ("sppnet", sppnet_windows)]
)
@pytest.mark.parametrize("size", [(8, 8), (13, 10), (5, 3)], ids=["8x8", "13x10", "5x3"])
def test_caffe_and_the_paper(backend, mode, bin_mode, windows, size):
    x = normal(2, 3, *size)
    check_against_float64(
        lambda t: spatial_pyramid_pool(
            t, mode=mode, bin_mode=bin_mode, flatten="channel_major", backend=backend
        ),
        lambda t: pool_windows(t, (1, 2, 4), windows, mode),
        [x],
    )


def test_caffe_means_count_the_padding_that_is_cut():
    x = torch.ones(1, 1, 5, 5)
    out = spatial_pyramid_pool(x, (2,), mode="avg", bin_mode="caffe")
    # Kernel 3, padding 1: the first window has 2 of 3 rows.
    assert torch.allclose(out[0, 0], torch.tensor(4 / 9))


def roi_pool(x: Tensor, rois: Tensor, levels, scale: float, mode: str) -> Tensor:
    """torchvision's roi_pool for each level, one bin after the other, with Python's numbers."""

    def nearest(value: float) -> int:
        return math.floor(abs(value) + 0.5) * (1 if value >= 0 else -1)

    def edges(bins: int, start: int, length: int, limit: int) -> list[tuple[int, int]]:
        size = torch.tensor(float(length)) / bins
        bounds = [
            (start + math.floor(index * size), start + math.ceil((index + 1) * size))
            for index in range(bins)
        ]
        return [(min(max(a, 0), limit), min(max(b, 0), limit)) for a, b in bounds]

    rows = []
    for image, *corners in rois.tolist():
        left, top, right, bottom = (nearest(corner * scale) for corner in corners)
        parts = []
        for bins in levels:
            vertical = edges(bins, top, max(bottom - top + 1, 1), x.shape[2])
            horizontal = edges(bins, left, max(right - left + 1, 1), x.shape[3])
            values = []
            for (a, b), (c, d) in product(vertical, horizontal):
                window = x[int(image), :, a:b, c:d].flatten(1)
                if window.shape[1] == 0:
                    values.append(torch.zeros_like(x[0, :, 0, 0]))
                else:
                    values.append(window.amax(1) if mode == "max" else window.mean(1))
            parts.append(torch.stack(values, dim=1).flatten())
        rows.append(torch.cat(parts))
    return torch.stack(rows)


ROIS = torch.tensor(
    [
        [0, 0.0, 0.0, 12.0, 9.0],
        [1, 3.0, 2.0, 17.0, 15.0],
        [0, 2.5, 3.5, 4.5, 20.5],  # halves away from 0, beyond the image
        [1, 5.0, 5.0, 5.0, 5.0],  # one pixel
        [1, 9.0, 9.0, 2.0, 3.0],  # its end before its begin
        [0, -30.0, -30.0, -20.0, -20.0],  # outside
        [0, -6.0, -6.0, 6.0, 6.0],
        [0, 0.0, 0.0, 12.0, 9.0],  # the first again
        [0, 100.0, 100.0, 120.0, 130.0],
    ]
)


@every_backend
@every_mode
@pytest.mark.parametrize(
    ("layout", "scale"),
    [(torch.contiguous_format, 1.0), (torch.channels_last, 0.5)],
    ids=["NCHW", "channels-last at half the scale"],
)
def test_regions_of_interest_by_the_rule_of_torchvision(backend, mode, layout, scale):
    x, rois = normal(2, 3, 10, 12).contiguous(memory_format=layout), ROIS.to(DEVICE)
    check_against_float64(
        lambda t: spatial_pyramid_pool(
            t, (1, 3), mode=mode, rois=rois, spatial_scale=scale, backend=backend
        ),
        lambda t: roi_pool(t, rois, (1, 3), scale, mode),
        [x],
    )


@every_backend
def test_regions_without_pixels_give_zero_and_take_no_gradient(backend):
    x = normal(1, 2, 6, 6)
    rois = torch.tensor([[0, -30.0, -30.0, -20.0, -20.0]], device=DEVICE)
    out, grad = with_gradient(lambda t: spatial_pyramid_pool(t, rois=rois, backend=backend), x)
    assert not out.any() and not grad.any()


@every_backend
@every_mode
def test_no_regions(backend, mode):
    x = normal(2, 3, 6, 6)
    out, grad = with_gradient(
        lambda t: spatial_pyramid_pool(t, mode=mode, rois=ROIS[:0].to(DEVICE), backend=backend), x
    )
    assert out.shape == (0, 3 * 21) and not grad.any()


@every_backend
@every_mode
def test_a_list_of_regions_for_each_image(backend, mode):
    x, rois = normal(2, 3, 10, 12), ROIS[ROIS[:, 0].argsort(stable=True)].to(DEVICE)
    per_image = [rois[rois[:, 0] == image, 1:] for image in (0, 1)]
    assert torch.equal(
        spatial_pyramid_pool(x, (2,), mode=mode, rois=per_image, backend=backend),
        spatial_pyramid_pool(x, (2,), mode=mode, rois=rois, backend=backend),
    )


@every_backend
@every_mode
def test_overlapping_regions_add_up_the_same_way_every_time(backend, mode):
    x, rois = normal(2, 3, 10, 12), ROIS.repeat(2, 1).to(DEVICE)
    leaf = x.requires_grad_()
    out = spatial_pyramid_pool(leaf, (2,), mode=mode, rois=rois, backend=backend)
    upstream = torch.randn_like(out)
    first, second = (
        torch.autograd.grad(out, leaf, upstream, retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, second)
    again = spatial_pyramid_pool(x.detach(), (2,), mode=mode, rois=rois, backend=backend)
    assert torch.equal(out, again)


# --- images of several sizes --------------------------------------------------------------------------

SIZES = [(5, 7), (1, 1), (8, 9)]


def ragged(layout: torch.memory_format, channels: int = 3) -> tuple[list[Tensor], Tensor, Tensor]:
    """Images, the batch padded with numbers larger than theirs and NaN, and their sizes."""
    images = [with_ties(channels, *size) for size in SIZES]
    padded = torch.full((len(SIZES), channels, 8, 9), 1e6, device=DEVICE)
    padded[:, :, 6:, 5:] = NAN
    for row, image in zip(padded, images):
        row[:, : image.shape[1], : image.shape[2]] = image
    return images, padded.contiguous(memory_format=layout), torch.tensor(SIZES, device=DEVICE)


@every_backend
@every_mode
@pytest.mark.parametrize(
    ("bin_mode", "layout"),
    [
        ("adaptive", torch.contiguous_format),
        ("caffe", torch.channels_last),
        ("sppnet", torch.contiguous_format),
        ("roi", torch.channels_last),
    ],
    ids=["adaptive NCHW", "caffe channels-last", "sppnet NCHW", "roi channels-last"],
)
def test_a_padded_batch_gives_what_its_images_give(backend, mode, bin_mode, layout):
    images, padded, sizes = ragged(layout)
    options = {"levels": (1, 3), "mode": mode, "bin_mode": bin_mode, "backend": backend}
    out, grad = with_gradient(lambda t: spatial_pyramid_pool(t, sizes=sizes, **options), padded)
    for index, image in enumerate(images):
        alone = image[None].contiguous(memory_format=layout)
        assert torch.equal(out[index : index + 1], spatial_pyramid_pool(alone, **options))
        inside = grad[index, :, : image.shape[1], : image.shape[2]]
        leaf = alone.requires_grad_()
        one = spatial_pyramid_pool(leaf, **options)
        upstream = (torch.arange(out.numel(), device=DEVICE) % 7 - 3).view_as(out).to(out.dtype)
        expected = torch.autograd.grad(one, leaf, upstream[index : index + 1])[0]
        assert torch.equal(inside, expected[0])
        around = grad[index].clone()
        around[:, : image.shape[1], : image.shape[2]] = 0
        assert not around.any()


@every_backend
@every_mode
def test_packed_images_give_what_padded_ones_give(backend, mode):
    images, padded, sizes = ragged(torch.channels_last, channels=18)
    packed = torch.cat([image.flatten(1).T for image in images])
    bounds = [0]
    for height, width in SIZES:
        bounds.append(bounds[-1] + height * width)
    offsets = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    options = {"levels": (1, 3), "mode": mode, "sizes": sizes, "backend": backend}
    out, grad = with_gradient(lambda t: spatial_pyramid_pool(t, offsets=offsets, **options), packed)
    expected, expected_grad = with_gradient(lambda t: spatial_pyramid_pool(t, **options), padded)
    assert torch.equal(out, expected)
    for index, (height, width) in enumerate(SIZES):
        one = grad[bounds[index] : bounds[index + 1]].T.view(-1, height, width)
        assert torch.equal(one, expected_grad[index, :, :height, :width])


# --- the rest -----------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4)], ids=["no images", "no channels"])
def test_empty(backend, shape):
    x = torch.ones(shape, device=DEVICE, requires_grad=True)
    out = spatial_pyramid_pool(x, backend=backend)
    out.sum().backward()
    assert out.shape == (shape[0], 21 * shape[1]) and x.grad.shape == shape


@every_backend
def test_images_without_pixels_give_zero(backend):
    out = spatial_pyramid_pool(torch.ones(2, 3, 0, 4, device=DEVICE), backend=backend)
    assert out.shape == (2, 63) and not out.any()


X = torch.ones(2, 3, 4, 4)
OFFSETS, SIZE = torch.tensor([0, 2]), torch.tensor([[1, 2]])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: spatial_pyramid_pool(X.int()), TypeError, "spatial_pyramid_pool: x: expected dtype"),
        (lambda: spatial_pyramid_pool(X[0]), ValueError, "x: expected 4 dimensions"),
        (lambda: spatial_pyramid_pool(X, ()), ValueError, "levels: expected numbers >= 1"),
        (lambda: spatial_pyramid_pool(X, (1, 32)), ValueError, "levels: expected at most 32 bins"),
        (lambda: spatial_pyramid_pool(X, mode="sum"), ValueError, "mode: expected one of max, avg"),
        (lambda: spatial_pyramid_pool(X, bin_mode="torch"), ValueError, "bin_mode: expected one of"),
        (lambda: spatial_pyramid_pool(X, flatten="rows"), ValueError, "flatten: expected one of"),
        (lambda: spatial_pyramid_pool(X, bin_mode="caffe", rois=ROIS), ValueError, "expected 'roi'"),
        (lambda: spatial_pyramid_pool(X, rois=ROIS[:, 1:]), ValueError, "rois: expected shape"),
        (lambda: spatial_pyramid_pool(X, rois=[ROIS[:, 1:]]), ValueError, "rois: expected one tensor"),
        (lambda: spatial_pyramid_pool(X, rois=ROIS + 5), RuntimeError, "rois: expected images below 2"),
        (lambda: spatial_pyramid_pool(X, sizes=torch.ones(2, 2)), TypeError, "sizes: expected dtype int32"),
        (lambda: spatial_pyramid_pool(X, sizes=SIZE), ValueError, "sizes: expected shape"),
        (lambda: spatial_pyramid_pool(X, sizes=5 * SIZE.repeat(2, 1)), RuntimeError, "sizes: expected"),
        (lambda: spatial_pyramid_pool(X[0, :, 0], offsets=OFFSETS, sizes=SIZE), RuntimeError,
         "offsets: expected numbers that rise from 0 to 3"),
        (lambda: spatial_pyramid_pool(X[0, :2, 0], offsets=OFFSETS, sizes=2 * SIZE), RuntimeError,
         "sizes: expected sizes within"),
        (lambda: spatial_pyramid_pool(X, offsets=OFFSETS, sizes=SIZE), ValueError, "expected 2 dimensions"),
        (lambda: spatial_pyramid_pool(X, rois=ROIS, sizes=SIZE), ValueError, "None beside rois"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
