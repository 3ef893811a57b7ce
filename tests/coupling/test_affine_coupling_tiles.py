"""How the GPU kernels of affine couplings share out samples: tiles of one, several samples a block."""

from __future__ import annotations

import pytest
import torch
from warploom.ops.coupling import affine_coupling

from tests.backends import DEVICE, every_backend

SHAPES = {
    "a lane a sample": (300, 4),
    "some lanes a sample": (70, 3, 5, 5),
    "a block a sample, vectors": (3, 6, 16, 8),
    "a block a sample, no vectors": (3, 6, 15, 9),
    "several tiles, vectors": (2, 17, 16, 16),
    "several tiles, no vectors": (2, 15, 17, 17),
}
every_share = pytest.mark.parametrize(
    ("shape", "channels_last"),
    [
        pytest.param(shape, channels_last, id=f"{name}, {'nhwc' if channels_last else 'nchw'}")
        for name, shape in SHAPES.items()
        for channels_last in (False, True)
        if len(shape) == 4 or not channels_last
    ],
)


def normal(*shape, channels_last=False):
    tensor = torch.randn(shape, device=DEVICE)
    if channels_last and len(shape) == 4:
        tensor = tensor.to(memory_format=torch.channels_last)
    return tensor.requires_grad_()


@every_backend
@every_share
def test_every_share_gives_what_the_reference_gives(backend, shape, channels_last):
    if backend == "triton":
        # Its tiles round numbers of samples up; interpreted, each sample's gradient of the weight is slow.
        shape = (min(shape[0], 19), *shape[1:])
    count = shape[1] // 2
    x = normal(*shape, channels_last=channels_last)
    params = normal(shape[0], 2 * count, *shape[2:], channels_last=channels_last)
    weight = normal(count)
    options = {"scale": "tanh", "layout": "interleaved", "scale_weight": weight}
    got = affine_coupling(x, params, backend=backend, **options)
    want = affine_coupling(x, params, backend="reference", **options)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
    upstream = [torch.randn_like(out) for out in want]
    leaves = (x, params, weight)
    torch.testing.assert_close(
        torch.autograd.grad(got, leaves, upstream),
        torch.autograd.grad(want, leaves, upstream),
        rtol=1e-5,
        atol=2e-4,
    )


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["shift_scale", "interleaved"])
def test_vectors_along_channels_give_what_single_elements_give(backend, dtype, layout):
    """16 channels of which 8 are transformed are vectors; the same as a slice of a larger tensor are not."""
    x = normal(2, 16, 3, 2, channels_last=True).detach().to(dtype)
    params = normal(2, 16, 3, 2, channels_last=True).detach().to(dtype)
    shifted = torch.empty(2, 3, 2, 17, dtype=dtype, device=DEVICE)[..., 1:].movedim(-1, 1)
    shifted.copy_(params)
    vectors, elements = (
        affine_coupling(x, given, layout=layout, backend=backend) for given in (params, shifted)
    )
    assert torch.equal(vectors[0], elements[0])
    torch.testing.assert_close(vectors[1], elements[1])
