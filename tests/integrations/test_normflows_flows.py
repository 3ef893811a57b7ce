"""Layers with normflows' constructors against normflows'."""

from __future__ import annotations

import copy

import normflows
import pytest
import torch
from normflows.flows import affine, mixing, normalization, reshape
from warploom.integrations import normflows_flows as ours

from tests.integrations.flow_parity import assert_parity, conv, mlp, random

BOTH = [lambda layer, z: layer(z), lambda layer, z: layer.inverse(z)]
MAPS = [(True, "exp"), (True, "sigmoid"), (True, "sigmoid_inv"), (False, "exp")]
every_map = pytest.mark.parametrize(
    ("scale", "scale_map"), MAPS, ids=["exp", "sigmoid", "sigmoid_inv", "additive"]
)


@every_map
@pytest.mark.parametrize("channels", [4, 5])
@pytest.mark.parametrize("mode", ["channel", "channel_inv", "checkerboard", "checkerboard_inv"])
def test_affine_coupling_block(scale, scale_map, channels, mode):
    passing, moved = channels - channels // 2, channels // 2
    if mode == "channel_inv":
        passing, moved = moved, passing
    if mode.startswith("checkerboard"):
        passing = moved = channels
    arguments = (conv(passing, moved * (1 + scale)), scale, scale_map, mode)
    assert_parity(
        ours.AffineCouplingBlock(*copy.deepcopy(arguments)),
        affine.AffineCouplingBlock(*copy.deepcopy(arguments)),
        [random(3, channels, 3, 4)],
        BOTH,
    )


@pytest.mark.parametrize("mode", ["channel", "checkerboard", "checkerboard_inv"])
def test_affine_coupling_block_of_a_table(mode):
    arguments = (mlp(3, 6), True, "exp", mode)
    assert_parity(
        ours.AffineCouplingBlock(*copy.deepcopy(arguments)),
        affine.AffineCouplingBlock(*copy.deepcopy(arguments)),
        [random(4, 6)],
        BOTH,
    )


@every_map
def test_affine_coupling_of_a_pair(scale, scale_map):
    def call(method):
        def run(layer, z1, z2):
            (z1, z2), log_det = getattr(layer, method)([z1, z2])
            return torch.cat((z1, z2), 1), log_det

        return run

    arguments = (mlp(3, 2 * (1 + scale)), scale, scale_map)
    assert_parity(
        ours.AffineCoupling(*copy.deepcopy(arguments)),
        affine.AffineCoupling(*copy.deepcopy(arguments)),
        [random(4, 3), random(4, 2)],
        [call("forward"), call("inverse")],
    )


@pytest.mark.parametrize("nets", ["t", "s", "st"])
@pytest.mark.parametrize("shape", [(5,), (3, 4, 4)], ids=["table", "image"])
def test_masked_affine_flow(nets, shape):
    b = (torch.rand(shape) < 0.5).double()
    make = mlp if len(shape) == 1 else conv
    t, s = (make(shape[0], shape[0]) if name in nets else None for name in "ts")
    assert_parity(
        ours.MaskedAffineFlow(b, copy.deepcopy(t), copy.deepcopy(s)),
        affine.MaskedAffineFlow(b, copy.deepcopy(t), copy.deepcopy(s)),
        [random(3, *shape)],
        BOTH,
    )


def test_masked_affine_flow_makes_what_is_not_finite_nan():
    """Where z is transformed; the peer spoils the rest as well, by 0 * nan."""
    b, z = torch.tensor([1.0, 0.0]), torch.tensor([[2.0, 3.0]])

    class Infinite(torch.nn.Module):
        def forward(self, z):
            return torch.full_like(z, float("inf"))

    out, _ = ours.MaskedAffineFlow(b, t=Infinite())(z)
    assert out[0, 0] == 2 and torch.isnan(out[0, 1])
    assert torch.isnan(affine.MaskedAffineFlow(b, t=Infinite())(z)[0]).all()


def test_masked_affine_flow_refuses_fractions():
    with pytest.raises(ValueError, match="MaskedAffineFlow: b: expected zeros and ones"):
        ours.MaskedAffineFlow(torch.tensor([0.5]))


@pytest.mark.parametrize("shape", [(4,), (4, 1, 1)], ids=["table", "image"])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_actnorm(shape, direction):
    z = random(6, 4, *(3,) * (len(shape) - 1))
    layer, peer = ours.ActNorm(shape).double(), normalization.ActNorm(shape).double()
    for module in (layer, peer):  # initialises in the direction that comes first
        getattr(module, direction)(2 + 3 * z)
    for key, value in peer.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[key].double(), value.double())
    assert_parity(layer, peer, [z], BOTH)


@pytest.mark.parametrize("use_lu", [False, True], ids=["full", "lu"])
def test_invertible_1x1_conv(use_lu):
    assert_parity(
        ours.Invertible1x1Conv(4, use_lu),
        mixing.Invertible1x1Conv(4, use_lu),
        [random(2, 4, 3, 3)],
        BOTH,
    )


def test_squeeze():
    for method in ("forward", "inverse"):
        z = random(2, 8, 4, 4)
        got, log_det = getattr(ours.Squeeze(), method)(z)
        assert torch.equal(got, getattr(reshape.Squeeze(), method)(z)[0]) and not log_det.any()


def test_layers_inside_a_normalizing_flow():
    """Our layers in normflows' model: the likelihood is that of its own."""
    torch.manual_seed(0)
    layers, peers = [], []
    for index in range(3):
        param_map = mlp(2, 4)
        mode = ("channel", "channel_inv")[index % 2]
        layers.append(ours.AffineCouplingBlock(copy.deepcopy(param_map), split_mode=mode))
        peers.append(affine.AffineCouplingBlock(param_map, split_mode=mode))
    base = normflows.distributions.DiagGaussian(4, trainable=False)
    x = torch.randn(8, 4)
    torch.testing.assert_close(
        normflows.NormalizingFlow(base, layers).log_prob(x),
        normflows.NormalizingFlow(base, peers).log_prob(x),
    )


def test_a_bad_choice_is_named():
    with pytest.raises(ValueError, match="AffineCoupling: scale_map: expected one of exp"):
        ours.AffineCoupling(torch.nn.Identity(), scale_map="tanh")
    with pytest.raises(
        ValueError, match="AffineCouplingBlock: split_mode: expected one of channel"
    ):
        ours.AffineCouplingBlock(torch.nn.Identity(), split_mode="half")
    with pytest.raises(ValueError, match=r"ActNorm: shape: expected \(C, 1, ..., 1\)"):
        ours.ActNorm((3, 2, 2))
