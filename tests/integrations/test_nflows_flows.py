"""Transforms with nflows' constructors against nflows'."""

from __future__ import annotations

import functools

import pytest
import torch
from nflows import transforms
from torch import nn
from warploom.integrations import nflows_flows as ours

from tests.integrations.flow_parity import assert_parity, random

FORWARD, INVERSE = (lambda layer, x: layer(x)), (lambda layer, x: layer.inverse(x))
MASKS = {
    "halves": [0, 0, 1, 1],
    "alternating": [1, -1, 1, -1, 1],
    "one": [0, 1, 0],
    "all_but_one": torch.tensor([1, 1, 0, 1]),
}
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


class Net(nn.Module):
    """A network of the identity features and of the context, with nflows' attribute of the width."""

    def __init__(self, inputs, outputs, image=False):
        super().__init__()
        self.hidden_features = 16
        make = functools.partial(nn.Conv2d, kernel_size=3, padding=1) if image else nn.Linear
        self.first, self.last = make(inputs, 16), make(16, outputs)

    def forward(self, x, context=None):
        hidden = self.first(x) if context is None else self.first(x) + context
        return self.last(torch.tanh(hidden))


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(5)


def inputs(mask, image):
    return [random(3, len(mask), *((4, 3) if image else ()))]


@every_mask
@pytest.mark.parametrize("image", [False, True], ids=["table", "image"])
@pytest.mark.parametrize("name", ["AffineCouplingTransform", "AdditiveCouplingTransform"])
def test_affine_coupling(name, mask, image):
    net = functools.partial(Net, image=image)
    assert_parity(
        getattr(ours, name)(mask, net),
        getattr(transforms, name)(mask, net),
        inputs(mask, image),
        [FORWARD, INVERSE],
    )


def test_coupling_with_a_context():
    assert_parity(
        ours.AffineCouplingTransform([0, 1, 1], Net),
        transforms.AffineCouplingTransform([0, 1, 1], Net),
        [random(4, 3), random(4, 16)],
        [lambda layer, x, c: layer(x, c), lambda layer, x, c: layer.inverse(x, c)],
    )


@every_mask
@pytest.mark.parametrize("image", [False, True], ids=["table", "image"])
@pytest.mark.parametrize("tails", [None, "linear"], ids=["none", "linear"])
@pytest.mark.parametrize("unconditional", [False, True], ids=["passing", "unconditional"])
def test_rational_quadratic_coupling(mask, image, tails, unconditional):
    def make(module):
        return module.PiecewiseRationalQuadraticCouplingTransform(
            mask,
            functools.partial(Net, image=image),
            num_bins=5,
            tails=tails,
            tail_bound=1.5,
            apply_unconditional_transform=unconditional,
            img_shape=[4, 3] if image else None,
        )

    x = inputs(mask, image)[0]
    x = torch.sigmoid(x) if tails is None else 1.2 * x  # some outside of the tails
    assert_parity(make(ours), make(transforms), [x], [FORWARD, INVERSE], tolerance=1e-8)


@pytest.mark.parametrize("shape", [(8, 3), (4, 3, 2, 2)], ids=["table", "image"])
def test_actnorm(shape):
    x = random(*shape)
    layer, peer = ours.ActNorm(3).double(), transforms.ActNorm(3).double()
    layer(2 + 3 * x), peer(2 + 3 * x)
    for key, value in peer.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[key], value)
    assert_parity(layer, peer, [x], [FORWARD, INVERSE])


@pytest.mark.parametrize("identity_init", [True, False], ids=["identity", "random"])
def test_one_by_one_convolution(identity_init):
    layer = ours.OneByOneConvolution(4, identity_init=identity_init)
    peer = transforms.OneByOneConvolution(4, identity_init=identity_init)
    # Its inverse needs torch.triangular_solve, which newer versions of torch lack.
    calls = [FORWARD, *([INVERSE] if hasattr(torch, "triangular_solve") else [])]
    assert_parity(layer, peer, [random(2, 4, 3, 2)], calls)
    z, log_det = layer(x := random(2, 4, 3, 2))
    back, negated = layer.inverse(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(negated, -log_det)


def test_one_by_one_convolution_starts_like_the_peers():
    torch.manual_seed(3)
    layer = ours.OneByOneConvolution(4)
    torch.manual_seed(3)
    peer = transforms.OneByOneConvolution(4)
    for key, value in peer.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[key], value)


@pytest.mark.parametrize("factor", [2, 3])
def test_squeeze(factor):
    x = random(2, 4, 6, 6)
    peer, layer = transforms.SqueezeTransform(factor), ours.SqueezeTransform(factor)
    z = layer(x)[0]
    assert torch.equal(z, peer(x)[0])
    assert torch.equal(layer.inverse(z)[0], x)
    assert layer.get_output_shape(4, 6, 6) == peer.get_output_shape(4, 6, 6)


def test_layers_inside_a_composite_transform():
    def make(module):
        torch.manual_seed(1)
        return transforms.CompositeTransform(
            [
                module.ActNorm(4).eval(),
                module.AffineCouplingTransform([0, 0, 1, 1], Net),
                module.AffineCouplingTransform([1, 1, 0, 0], Net),
            ]
        )

    x = torch.randn(5, 4)
    for got, want in zip(make(ours)(x), make(transforms)(x)):
        torch.testing.assert_close(got, want)


def test_the_networks_output_is_left_alone():
    """nflows divides the logits in place."""
    kept = []

    def make(passing, outputs):
        net = Net(passing, outputs)
        net.register_forward_hook(lambda module, args, out: kept.append((out, out.clone())))
        return net

    layer = ours.PiecewiseRationalQuadraticCouplingTransform([0, 1], make, tails="linear")
    layer(torch.randn(3, 2))
    assert torch.equal(*kept[0])


def test_bad_masks_are_named():
    with pytest.raises(ValueError, match="AffineCouplingTransform: mask: expected one dimension"):
        ours.AffineCouplingTransform([[0, 1]], Net)
    with pytest.raises(ValueError, match="AffineCouplingTransform: inputs: expected 2 or 4 dim"):
        ours.AffineCouplingTransform([0, 1], Net)(torch.zeros(2, 3))
