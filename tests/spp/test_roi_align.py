"""RoIAlign on every backend against its documented maths in float64."""

from __future__ import annotations

import functools

import pytest
import torch
from warploom.ops.spp import roi_align

from tests import plain
from tests.backends import BACKENDS, DEVICE, every_backend, every_dtype
from tests.numerics import check_against_float64, inside_larger

#: Of two images of 9 x 13 pixels: place in the batch, x1, y1, x2, y2. They overlap.
INSIDE = [[0, 1.25, 0.5, 9.75, 7.0], [1, 2.0, 3.0, 5.5, 6.25], [0, 3.5, 2.0, 11.0, 8.5]]
BEYOND = [[1, -6.0, -4.5, 4.0, 3.25], [0, 8.0, 5.5, 20.0, 15.0], [0, 40.0, 2.0, 50.0, 8.0]]
EMPTY = [[0, 4.0, 4.0, 4.0, 4.0], [1, 6.0, 5.0, 3.0, 2.0], [0, 0.0, 0.0, 0.25, 0.25]]
WHOLE = [[0, 0.0, 0.0, 13.0, 9.0], [1, -2.0, -1.5, 16.0, 10.5]]
REGIONS = {"inside": INSIDE, "beyond the border": BEYOND, "empty": EMPTY, "whole": WHOLE}
every_region = pytest.mark.parametrize("rois", REGIONS.values(), ids=REGIONS)


def maps(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


def check(backend, x, rois, output_size, **options):
    boxes = torch.tensor(rois, dtype=torch.float32, device=DEVICE)
    check_against_float64(
        lambda x: roi_align(x, boxes, output_size, backend=backend, **options),
        functools.partial(plain.roi_align, rois=rois, output_size=output_size, **options),
        [x],
    )


@every_backend
@every_dtype
def test_regions_and_their_gradients(backend, dtype):
    check(backend, maps(2, 5, 9, 13, dtype=dtype), INSIDE, (4, 3))


@every_backend
@every_region
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("sampling_ratio", [-1, 2], ids=["adaptive", "2 samples"])
def test_every_kind_of_region(backend, rois, aligned, sampling_ratio):
    x = maps(2, 2, 9, 13)
    check(backend, x, rois, (5, 3), aligned=aligned, sampling_ratio=sampling_ratio)


@every_backend
def test_boxes_in_coordinates_of_the_image(backend):
    rois = [[0, 16.0, 40.0, 150.0, 121.0], [0, 0.0, 8.0, 208.0, 144.0]]
    check(backend, maps(1, 3, 9, 13), rois, (4, 3), spatial_scale=0.0625)


@every_backend
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 7), (33, 3), (18, 8)], ids=lambda shape: "x".join(map(str, shape))
)
def test_planes_of_every_shape(backend, shape):
    # The second one ends in row 16, where a tile begins.
    rois = [[0, -0.5, -0.5, 6.25, 17.5], [0, 0.0, 0.0, 6.0, 16.25]]
    check(backend, maps(1, 2, *shape), rois, (4, 2))


@every_backend
def test_a_list_of_boxes_is_a_tensor_with_their_places(backend):
    x, rois = maps(2, 3, 9, 13), torch.tensor(sorted(INSIDE), device=DEVICE)
    boxes = [rois[rois[:, 0] == sample, 1:] for sample in (0, 1)]
    assert torch.equal(
        roi_align(x, boxes, 2, backend=backend), roi_align(x, rois, 2, backend=backend)
    )


@every_backend
def test_no_regions(backend):
    x = maps(2, 3, 9, 13).requires_grad_()
    out = roi_align(x, torch.empty(0, 5, device=DEVICE), (2, 3), backend=backend)
    assert out.shape == (0, 3, 2, 3)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.zeros_like(x))


@every_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30], ids=str)
def test_regions_that_are_no_numbers_are_zero(backend, value):
    rois = torch.tensor([[0, 1.0, value, 5.0, value], [0, 1.0, 1.0, 5.0, 5.0]], device=DEVICE)
    x = maps(1, 2, 9, 13)
    out = roi_align(x, rois, 2, backend=backend)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert torch.equal(out[1:], roi_align(x, rois[1:], 2, backend=backend))


@every_backend
def test_what_lies_outside_a_region_is_not_read(backend):
    x = maps(1, 2, 9, 13)
    rois = torch.tensor([[0, 3.0, 3.0, 6.0, 6.0]], device=DEVICE)
    around = torch.full_like(x, float("nan"))
    around[:, :, 2:7, 2:7] = x[:, :, 2:7, 2:7]
    expected = roi_align(x, rois, 2, backend=backend)
    assert torch.equal(roi_align(around, rois, 2, backend=backend), expected)


@every_backend
def test_other_layouts(backend):
    x, rois = maps(2, 3, 9, 13), torch.tensor(INSIDE, device=DEVICE)
    expected = roi_align(x, rois, 2, backend=backend)
    for view in (inside_larger(x), x.contiguous(memory_format=torch.channels_last)):
        assert torch.equal(roi_align(view, rois, 2, backend=backend), expected)


@every_backend
def test_two_runs_give_the_same_bits(backend):
    x, rois = maps(2, 3, 9, 13).requires_grad_(), torch.tensor(INSIDE, device=DEVICE)
    upstream = torch.randn(3, 3, 2, 2, device=DEVICE)
    first, second = (
        torch.autograd.grad(roi_align(x, rois, 2, backend=backend), x, upstream)[0]
        for _ in range(2)
    )
    assert torch.equal(first, second)


X, ROIS = torch.ones(2, 3, 4, 4), torch.tensor([[0.0, 1.0, 1.0, 3.0, 3.0]])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: roi_align(X[0], ROIS, 2), ValueError, "roi_align: x: expected 4 dimensions"),
        (lambda: roi_align(X[:, :, :0], ROIS, 2), ValueError, "roi_align: x: expected at least one channel"),
        (lambda: roi_align(X, ROIS[:, 1:], 2), ValueError, r"roi_align: rois: expected shape \(K, 5\)"),
        (lambda: roi_align(X, [ROIS[:, 1:]], 2), ValueError, "roi_align: rois: expected boxes of each of 2"),
        (lambda: roi_align(X, [ROIS[:, 1:], ROIS], 2), ValueError, r"roi_align: rois\[1\]: expected shape"),
        (lambda: roi_align(X, ROIS.int(), 2), TypeError, "roi_align: rois: expected dtype"),
        (lambda: roi_align(X, ROIS, (2, 0)), ValueError, "roi_align: output_size: expected numbers >= 1"),
        (lambda: roi_align(X, ROIS.clone().requires_grad_(), 2), RuntimeError,
         "roi_align: rois: expected a tensor"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif("cpu" not in BACKENDS, reason="elsewhere nobody reads the places")
@pytest.mark.parametrize("place", [-1.0, 2.0, float("nan")])
def test_a_region_of_no_sample_is_refused(place):
    rois = ROIS.clone()
    rois[0, 0] = place
    with pytest.raises(RuntimeError, match="roi_align: rois: expected samples from 0 to 1"):
        roi_align(X, rois, 2, backend="cpu")
