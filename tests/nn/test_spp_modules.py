"""Modules of the spatial pyramid against PyTorch's pools."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from warploom.nn import SPPF, RoISpatialPyramidPool, SpatialPyramidPool

LEVELS = (1, 2, 3)


def pyramid(x: Tensor, levels=LEVELS, pool=F.adaptive_max_pool2d) -> Tensor:
    return torch.cat([pool(x, level).flatten(1) for level in levels], dim=1)


@pytest.mark.parametrize(
    ("mode", "pool"), [("max", F.adaptive_max_pool2d), ("avg", F.adaptive_avg_pool2d)]
)
def test_pyramid_is_adaptive_pools_concatenated(mode, pool):
    x = torch.randn(2, 5, 7, 4, requires_grad=True)
    module = SpatialPyramidPool(LEVELS, mode=mode)
    out, expected = module(x), pyramid(x, pool=pool)
    assert out.shape == (2, 5 * module.bins) == (2, 5 * 14)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, x, weights)
    (expected_gradient,) = torch.autograd.grad(expected, x, weights)
    torch.testing.assert_close(gradient, expected_gradient)


def test_flatten_by_channel_is_the_same_values():
    x = torch.randn(2, 3, 5, 6)
    by_level, by_channel = (
        SpatialPyramidPool(LEVELS, flatten=order)(x) for order in ("level_major", "channel_major")
    )
    levels = by_level.split([3 * level**2 for level in LEVELS], dim=1)
    rows = torch.cat([one.unflatten(1, (3, -1)) for one in levels], dim=2)
    assert torch.equal(by_channel, rows.flatten(1))


def test_padded_batch_equals_its_images():
    sizes = [(6, 4), (3, 7)]
    images = [torch.randn(1, 3, *size) for size in sizes]
    padded = torch.full((2, 3, 6, 7), 9.0)  # more than any value of an image
    for row, image in zip(padded, images):
        row[:, : image.shape[2], : image.shape[3]] = image[0]
    out = SpatialPyramidPool(LEVELS)(padded, torch.tensor(sizes, dtype=torch.int32))
    assert torch.equal(out, torch.cat([pyramid(image) for image in images]))


@pytest.mark.parametrize("as_list", [False, True], ids=["rows of five", "list of boxes"])
def test_region_of_whole_bins_is_an_adaptive_pool_of_the_crop(as_list):
    """Boxes are in the image, of stride 4; both corners' pixels belong to the region."""
    x = torch.randn(2, 3, 9, 9)
    pool = RoISpatialPyramidPool((3, 1), spatial_scale=0.25)
    boxes = [torch.tensor([[4.0, 0.0, 24.0, 8.0]]), torch.tensor([[0.0, 0.0, 32.0, 32.0]])]
    rows = torch.cat([F.pad(box, (1, 0), value=float(i)) for i, box in enumerate(boxes)])
    out = pool(x, boxes if as_list else rows)
    crops = [x[:1, :, 0:3, 1:7], x[1:, :, 0:9, 0:9]]
    assert torch.equal(out, torch.cat([pyramid(crop, (3, 1)) for crop in crops]))


def test_default_of_regions_is_the_paper_s_fifty_bins():
    pool = RoISpatialPyramidPool()
    assert pool.bins == 50
    rois = torch.tensor([[0.0, 1.0, 1.0, 6.0, 6.0], [0.0, 0.0, 0.0, 7.0, 7.0]])
    assert pool(torch.randn(1, 2, 8, 8), rois).shape == (2, 100)


def reference_sppf(module: SPPF, x: Tensor) -> Tensor:
    """One pool of each window on the first map: a cascade of k = 5 is pools of 5, 9 and 13."""
    y = F.silu(module.cv1.bn(module.cv1.conv(x)))
    reach = [step * (module.k - 1) + 1 for step in (1, 2, 3)]
    pools = [F.max_pool2d(y, side, stride=1, padding=side // 2) for side in reach]
    return F.silu(module.cv2.bn(module.cv2.conv(torch.cat([y, *pools], dim=1))))


@pytest.mark.parametrize("k", [3, 5])
def test_sppf_pools_over_growing_windows(k):
    module = SPPF(6, 8, k).double()
    x = torch.randn(2, 6, 7, 9, dtype=torch.float64, requires_grad=True)
    out, expected = module(x), reference_sppf(module, x)
    torch.testing.assert_close(out, expected)
    inputs = [x, *module.parameters()]
    weights = torch.randn_like(out)
    gradients = torch.autograd.grad(out, inputs, weights)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, inputs, weights)):
        torch.testing.assert_close(ours, theirs)


def test_sppf_has_ultralytics_state_and_constants():
    module = SPPF(8, 10)
    norm = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    parts = ("cv1", "cv2")
    expected = {f"{part}.conv.weight" for part in parts}
    expected |= {f"{part}.bn.{name}" for part in parts for name in norm}
    assert set(module.state_dict()) == expected
    assert module.cv1.conv.weight.shape == (4, 8, 1, 1)
    assert module.cv2.conv.weight.shape == (10, 16, 1, 1)
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert [(layer.eps, layer.momentum) for layer in norms] == [(1e-3, 0.03)] * 2


def test_representations_name_the_settings():
    assert "levels=(1, 2, 4), mode='max'" in repr(SpatialPyramidPool())
    assert "spatial_scale=0.0625" in repr(RoISpatialPyramidPool(spatial_scale=1 / 16))
    assert "k=5" in repr(SPPF(4, 4))
