"""Blocks with FrEIA's constructors against FrEIA's."""

from __future__ import annotations

import pytest
import torch
from FrEIA import framework, modules
from torch import nn
from warploom.integrations import freia_flows
from warploom.integrations.freia_all_in_one import AllInOneBlock

from tests.integrations.flow_parity import assert_parity, conv, mlp, random


def call(rev):
    def run(block, x, *condition):
        (z,), log_det = block((x,), c=condition, rev=rev)
        return z, log_det

    return run


BOTH = [call(False), call(True)]
AFFINE = [
    "RNVPCouplingBlock", "GLOWCouplingBlock", "GINCouplingBlock", "AffineCouplingOneSided",
]  # fmt: skip
every_affine = pytest.mark.parametrize("name", AFFINE)
TABLE, IMAGE = [(5,)], [(4, 3, 2)]
every_shape = pytest.mark.parametrize("dims", [TABLE, IMAGE], ids=["table", "image"])


def compare(name, dims, condition=0, **options):
    dims_c = [(condition, *dims[0][1:])] if condition else []
    options["subnet_constructor"] = mlp if len(dims[0]) == 1 else conv
    own = AllInOneBlock if name == "AllInOneBlock" else getattr(freia_flows, name)
    inputs = [random(3, *size) for size in (*dims, *dims_c)]
    peer = getattr(modules, name)(dims, dims_c=dims_c, **options)
    # FrEIA multiplies by the transpose of a rotation kept in float32.
    tolerance = 1e-6 if options.get("permute_soft") else 1e-9
    assert_parity(own(dims, dims_c=dims_c, **options), peer, inputs, BOTH, tolerance)


@every_affine
@every_shape
@pytest.mark.parametrize("activation", ["ATAN", "TANH", "SIGMOID", nn.functional.softsign])
def test_clamps(name, dims, activation):
    compare(name, dims, clamp_activation=activation, clamp=1.7)


@every_affine
@pytest.mark.parametrize("split_len", [0.3, 0.5, 1, 3])
def test_splits(name, split_len):
    compare(name, TABLE, split_len=split_len)


@every_affine
@every_shape
def test_conditions(name, dims):
    compare(name, dims, condition=2)


@every_shape
@pytest.mark.parametrize("condition", [0, 2], ids=["alone", "conditional"])
@pytest.mark.parametrize("split_len", [0.5, 1])
def test_nice(dims, condition, split_len):
    compare("NICECouplingBlock", dims, condition, split_len=split_len)


ALL_IN_ONE = {
    "default": {},
    "sigmoid": {"global_affine_type": "SIGMOID", "global_affine_init": 0.7},
    "exp": {"global_affine_type": "EXP", "global_affine_init": 0.7},
    "gin": {"gin_block": True},
    "soft": {"permute_soft": True},
    "reversed": {"reverse_permutation": True},
    "householder": {"learned_householder_permutation": 2},
    "householder_reversed": {"learned_householder_permutation": 2, "reverse_permutation": True},
    "gin_reversed": {"gin_block": True, "reverse_permutation": True, "affine_clamping": 1.0},
}


@every_shape
@pytest.mark.parametrize("options", ALL_IN_ONE.values(), ids=ALL_IN_ONE)
def test_all_in_one(dims, options):
    compare("AllInOneBlock", dims, **options)


def test_all_in_one_with_a_condition():
    compare("AllInOneBlock", IMAGE, condition=3)


@pytest.mark.parametrize("kind", ["SIGMOID", "SOFTPLUS", "EXP"])
def test_all_in_one_starts_like_the_peers(kind):
    options = {"subnet_constructor": mlp, "global_affine_type": kind, "global_affine_init": 0.6}
    own, peer = (module([(4,)], **options) for module in (AllInOneBlock, modules.AllInOneBlock))
    torch.testing.assert_close(own.global_scale, peer.global_scale)
    torch.testing.assert_close(own._scale(), torch.full((4,), 0.6))
    matrix = AllInOneBlock([(4,)], subnet_constructor=mlp, permute_soft=True).w_perm
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(4))
    torch.testing.assert_close(torch.linalg.det(matrix), torch.tensor(1.0))


def test_the_subnets_output_is_left_alone():
    """FrEIA multiplies it by 0.1 in place."""
    kept = []

    def make(inputs, outputs):
        net = mlp(inputs, outputs)
        net.register_forward_hook(lambda module, args, out: kept.append((out, out.clone())))
        return net

    AllInOneBlock([(4,)], subnet_constructor=make)((torch.randn(2, 4),))
    assert torch.equal(*kept[0])


def test_blocks_inside_a_sequence():
    """FrEIA's SequenceINN builds and runs our blocks."""
    flow = framework.SequenceINN(4)
    for _ in range(2):
        flow.append(AllInOneBlock, subnet_constructor=mlp)
        flow.append(freia_flows.GLOWCouplingBlock, subnet_constructor=mlp)
    x = torch.randn(3, 4)
    z, log_det = flow(x)
    back, negated = flow(z, rev=True)
    torch.testing.assert_close(back, x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(negated, -log_det, atol=1e-5, rtol=1e-5)


def test_bad_arguments_are_named():
    make = freia_flows.GLOWCouplingBlock
    with pytest.raises(ValueError, match="GLOWCouplingBlock: split_len: expected 0 to 4, got 5"):
        make([(4,)], subnet_constructor=mlp, split_len=5)
    with pytest.raises(ValueError, match="GLOWCouplingBlock: clamp_activation: expected one of"):
        make([(4,)], subnet_constructor=mlp, clamp_activation="RELU")
    with pytest.raises(ValueError, match="GLOWCouplingBlock: subnet_constructor"):
        make([(4,)])
    with pytest.raises(ValueError, match="GLOWCouplingBlock: dims_c: expected the sizes"):
        make([(4, 2, 2)], [(1, 3, 3)], subnet_constructor=conv)
    with pytest.raises(ValueError, match="AllInOneBlock: global_affine_type"):
        AllInOneBlock([(4,)], subnet_constructor=mlp, global_affine_type="TANH")
