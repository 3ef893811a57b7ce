"""Layers of flows: inverses, log-determinants against the Jacobian, initialisation, reversible stacks."""

from __future__ import annotations

import copy
import weakref
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from warploom.nn import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    CouplingConvNet,
    CouplingMLP,
    Invertible1x1,
    SplineCoupling,
    Squeeze,
    reversible,
)

CHANNELS, SIZE = 4, 4


def awake(module):
    """The module with every parameter away from its initial value, where couplings are the identity."""
    for parameter in module.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return module


def conv_net(passing, params, context=0):
    return awake(CouplingConvNet(passing, 8, params, context_channels=context))


def free_mask():
    return torch.rand(CHANNELS, SIZE, SIZE) < 0.5


#: name -> a layer for [B, 4, 4, 4] images.
IMAGE_LAYERS = {
    "additive": lambda: AdditiveCoupling(conv_net(2, 2)),
    "affine": lambda: AffineCoupling(conv_net(2, 4)),
    "affine_glow": lambda: AffineCoupling(conv_net(2, 4), preset="glow_pytorch"),
    "affine_inverse_half": lambda: AffineCoupling(conv_net(2, 4), "channel_inverse"),
    "affine_three_pass": lambda: AffineCoupling(conv_net(3, 2), 3),
    "affine_bool_channels": lambda: AffineCoupling(
        conv_net(1, 6), torch.tensor([True, False, True, True])
    ),
    "affine_checkerboard": lambda: AffineCoupling(
        conv_net(4, 8), "checkerboard", scale="tanh", scale_weight=torch.ones(1)
    ),
    "affine_checkerboard_inverse": lambda: AffineCoupling(conv_net(4, 8), "checkerboard_inverse"),
    "affine_free_mask": lambda: AffineCoupling(conv_net(4, 8), free_mask()),
    "spline": lambda: SplineCoupling(conv_net(2, 2 * 11), num_bins=4, tail_bound=2.0),
    "spline_circular": lambda: SplineCoupling(
        conv_net(2, 2 * 12), "channel_inverse", num_bins=4, tails="circular", tail_bound=2.0
    ),
    "spline_bool_channels": lambda: SplineCoupling(
        conv_net(1, 3 * 11), torch.tensor([True, False, True, True]), num_bins=4
    ),
    "actnorm": lambda: awake(ActNorm(CHANNELS)).eval(),
    "actnorm_add_first": lambda: awake(ActNorm(CHANNELS, order="add_mul")).eval(),
    "product_lu": lambda: awake(Invertible1x1(CHANNELS)),
    "product_full": lambda: awake(Invertible1x1(CHANNELS, lu=False)),
    "product_with_actnorm": lambda: awake(
        Invertible1x1(CHANNELS, actnorm=ActNorm(CHANNELS, order="add_mul"))
    ).eval(),
    "squeeze": lambda: Squeeze(),
    "squeeze_by_position": lambda: Squeeze(order="position_major"),
}


@pytest.mark.parametrize("name", IMAGE_LAYERS)
def test_inverse_and_log_det(name):
    """log_det is that of the Jacobian; inverse undoes forward and negates it."""
    layer = IMAGE_LAYERS[name]().double()
    x = torch.randn(2, CHANNELS, SIZE, SIZE, dtype=torch.float64)
    z, log_det = layer(x)
    back, negated = layer.inverse(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(negated, -log_det)
    jacobian = torch.autograd.functional.jacobian(lambda one: layer(one)[0], x[:1])
    expected = torch.linalg.slogdet(jacobian.reshape(x[0].numel(), -1))[1]
    torch.testing.assert_close(log_det[0], expected)


@pytest.mark.parametrize("mask", ["channel", "channel_inverse", 2, torch.tensor([1, 0, 0, 1, 1])])
def test_tabular_coupling_of_an_odd_number_of_features(mask):
    mask = mask.bool() if isinstance(mask, torch.Tensor) else mask
    changed = {"channel": 2, "channel_inverse": 3}.get(mask, 3) if isinstance(mask, str) else 3
    net = awake(CouplingMLP(5 - changed, 8, 2 * changed, context_features=2))
    layer = AffineCoupling(net, mask).double()
    x, context = (torch.randn(3, size, dtype=torch.float64) for size in (5, 2))
    z, log_det = layer(x, context)
    torch.testing.assert_close(layer.inverse(z, context)[0], x)
    jacobian = torch.autograd.functional.jacobian(lambda one: layer(one, context[:1])[0], x[:1])
    torch.testing.assert_close(log_det[0], torch.linalg.slogdet(jacobian.view(5, 5))[1])


@pytest.mark.parametrize("net", [CouplingConvNet(2, 8, 4), CouplingMLP(2, 8, 4)])
def test_couplings_begin_as_the_identity(net):
    x = torch.randn(3, 4, *(5, 5) if isinstance(net, CouplingConvNet) else ())
    z, log_det = AffineCoupling(net)(x)
    assert torch.equal(z, x) and not log_det.any()


def test_a_bad_coupling_is_named():
    with pytest.raises(ValueError, match="AffineCoupling: preset: expected one of normflows"):
        AffineCoupling(nn.Identity(), preset="realnvp")
    with pytest.raises(TypeError, match="AffineCoupling: options: .* got shift"):
        AffineCoupling(nn.Identity(), shift=1.0)
    with pytest.raises(TypeError, match="SplineCoupling: options: .* got scale"):
        SplineCoupling(nn.Identity(), num_bins=4, scale="exp")


class TestActNorm:
    @pytest.mark.parametrize("order", ["mul_add", "add_mul"])
    def test_the_first_batch_in_training_is_standardised(self, order):
        layer, x = ActNorm(3, order=order), 5 + 3 * torch.randn(8, 3, 4, 4)
        z, _ = layer(x)
        torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(z.var((0, 2, 3), correction=0), torch.ones(3))
        before = copy.deepcopy(layer.state_dict())
        layer(torch.randn(8, 3, 4, 4))
        assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())

    def test_evaluation_initialises_nothing(self):
        layer = ActNorm(3).eval()
        x = torch.randn(8, 3) + 5
        assert torch.equal(layer(x)[0], x)
        layer.train()(x)
        assert bool(layer.initialized)

    def test_loaded_parameters_are_kept(self):
        first, second = ActNorm(3), ActNorm(3)
        first(torch.randn(8, 3) + 5)
        second.load_state_dict(first.state_dict())
        second(torch.randn(8, 3))
        assert torch.equal(second.shift, first.shift)

    def test_the_flag_is_read_once(self, monkeypatch):
        layer, x = ActNorm(3), torch.randn(8, 3)
        layer(x)
        monkeypatch.setattr(torch.Tensor, "__bool__", None)
        layer(x)

    def test_one_value_a_channel_is_refused(self):
        layer = ActNorm(3)
        with pytest.raises(ValueError, match="ActNorm: x: expected at least 2 values a channel"):
            layer(torch.randn(1, 3))
        assert not bool(layer.initialized)


def glow_like(depth, channels=CHANNELS, hidden=8, context=0):
    layers = []
    for _ in range(depth):
        actnorm = ActNorm(channels, order="add_mul")
        net = CouplingConvNet(channels // 2, hidden, channels, context_channels=context)
        for parameter in net.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        layers += [Invertible1x1(channels, actnorm=actnorm), AffineCoupling(net, scale="tanh")]
    return nn.ModuleList(layers)


def run(layers, x, context=None, inverse=False):
    """The layers one after another, as plain autograd records them."""
    total = 0
    for layer in reversed(layers) if inverse else layers:
        x, log_det = (layer.inverse if inverse else layer)(x, context)
        total = total + log_det
    return x, total


def gradients(function, layers, x, context=None):
    """z, log_det and the gradients of one loss of both in the parameters, x and the context."""
    inputs = [x, *([] if context is None else [context]), *layers.parameters()]
    z, log_det = function(x, context)
    weights = torch.linspace(-1, 1, z.numel()).view_as(z)
    loss = (0.5 * z * z + weights * z).mean() - log_det.mean() / z[0].numel()
    return z, log_det, torch.autograd.grad(loss, inputs)


def assert_same_gradients(got, want, tolerance=1e-4):
    torch.testing.assert_close(got[:2], want[:2])
    for actual, expected in zip(got[2], want[2]):
        error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
        assert error <= tolerance, f"relative error {error:.1e} of a gradient"


class PeakMemory(TorchDispatchMode):
    """The largest number of bytes of tensors made inside, alive at one time."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self.seen = set()

    def _freed(self, key, size):
        self.alive -= size
        self.seen.discard(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.seen:
                    self.seen.add(key)
                    self.alive += size
                    weakref.finalize(storage, self._freed, key, size)
        self.peak = max(self.peak, self.alive)
        return out


class PlainStack(nn.Module):
    """The layers under plain autograd."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return run(self.layers, x)


class Cost(NamedTuple):
    saved: float
    peak: float


def cost(depth, make):
    """Of one step of training of 2 * depth layers, without the gradients of the parameters."""
    layers = glow_like(depth, hidden=4)
    x = torch.randn(16, CHANNELS, 32, 32)
    run(layers, x)
    stack, saved = make(layers), []

    def save(tensor):
        saved.append(tensor.nbytes)
        return tensor

    with PeakMemory() as memory:
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            z, log_det = stack(x)
        (z.square().mean() - log_det.mean()).backward()
    gradients = sum(parameter.nbytes for parameter in layers.parameters())
    return Cost(sum(saved) / x.nbytes, (memory.peak - gradients) / x.nbytes)


class TestReversible:
    @pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
    @pytest.mark.parametrize("checkpoint_every", [0, 16])
    def test_gradients_of_32_layers_are_those_of_autograd(self, inverse, checkpoint_every):
        layers = glow_like(32, context=2)
        x, context = torch.randn(4, CHANNELS, SIZE, SIZE), torch.randn(4, 2)
        x.requires_grad_()
        context.requires_grad_()
        run(layers, x, context)  # initialises
        stack = reversible(layers, checkpoint_every=checkpoint_every)
        function = stack.inverse if inverse else stack
        assert_same_gradients(
            gradients(function, layers, x, context),
            gradients(lambda x, c: run(layers, x, c, inverse), layers, x, context),
        )

    def test_a_32_layer_glow_trains_in_the_memory_of_2_layers(self):
        """Saved bytes, and the peak of forward and backward, in units of the activation's size."""
        reversible_2, reversible_32 = cost(1, reversible), cost(16, reversible)
        assert reversible_2.saved == reversible_32.saved == 2  # the input and the output
        # Deeper stacks keep the last output beside the stream.
        assert reversible_32.peak <= reversible_2.peak + 1.1
        assert reversible_32.peak <= cost(1, PlainStack).peak + 1.1
        assert cost(16, PlainStack).peak > 5 * reversible_32.peak

    def test_actnorm_initialises_inside(self):
        layers = glow_like(2)
        twin = copy.deepcopy(layers)
        x = torch.randn(8, CHANNELS, SIZE, SIZE)
        assert_same_gradients(
            gradients(reversible(layers), layers, x.requires_grad_()),
            gradients(lambda x, c: run(twin, x, c), twin, x),
        )

    def test_only_some_gradients(self):
        """Frozen parameters, an x without gradient, a loss of log_det alone."""
        layers = glow_like(3).double()
        x = torch.randn(4, CHANNELS, SIZE, SIZE, dtype=torch.float64)
        run(layers, x)
        for parameter in layers[0].parameters():
            parameter.requires_grad_(False)
        results = []
        for function in (reversible(layers), lambda x: run(layers, x)):
            layers.zero_grad()
            function(x)[1].sum().backward()
            results.append([parameter.grad for parameter in layers.parameters()])
        for got, want in zip(*results):
            got = torch.zeros(()) if got is None else got
            torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want)

    def test_a_layer_twice(self):
        layer = AffineCoupling(conv_net(2, 4)).double()
        x = torch.randn(2, CHANNELS, SIZE, SIZE, dtype=torch.float64, requires_grad=True)
        twice = nn.ModuleList([layer, layer])
        assert_same_gradients(
            gradients(reversible(twice), layer, x), gradients(lambda x, c: run(twice, x), layer, x)
        )

    def test_autocast_of_the_conditioners_alone(self):
        layers = glow_like(4)
        x = torch.randn(4, CHANNELS, SIZE, SIZE, requires_grad=True)
        run(layers, x)
        with torch.autocast("cpu", torch.bfloat16):
            got = gradients(reversible(layers), layers, x)
            want = gradients(lambda x, c: run(layers, x, c), layers, x)
        assert got[0].dtype == torch.float32
        assert_same_gradients(got, want, tolerance=1e-2)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_a_16_bit_stream_becomes_float32(self, dtype):
        stack = reversible(glow_like(1))
        with pytest.warns(UserWarning, match="is kept in float32"):
            z, _ = stack(torch.randn(2, CHANNELS, SIZE, SIZE, dtype=dtype))
        assert z.dtype == torch.float32

    def test_a_layer_that_is_no_inverse_of_itself_is_found(self):
        class Drifting(Squeeze):
            def inverse(self, z, context=None):
                x, log_det = super().inverse(z)
                return x + 0.1, log_det

        x = torch.randn(2, CHANNELS, SIZE, SIZE, requires_grad=True)
        layers = [AffineCoupling(conv_net(2, 4)), Drifting(), AffineCoupling(conv_net(8, 16))]
        z, _ = reversible(layers, checkpoint_every=1)(x)
        with pytest.raises(RuntimeError, match=r"layer 1 \(Drifting\): .* with error 1\.00e-01"):
            z.sum().backward()
        z, _ = reversible(layers)(x)
        with pytest.raises(RuntimeError, match=r"layer 0 \(AffineCoupling\): its input"):
            z.sum().backward()
        reversible(layers, max_error=None)(x)[0].sum().backward()

    def test_refusals(self):
        stack = reversible(glow_like(1))
        x = torch.randn(2, CHANNELS, SIZE, SIZE, requires_grad=True)
        z, _ = stack(x)
        with pytest.raises(RuntimeError, match="differentiated once only"):
            torch.autograd.grad(z.sum(), x, create_graph=True)
        z, _ = stack(x)
        with torch.no_grad():
            next(stack.parameters()).add_(1)
        with pytest.raises(RuntimeError, match="a parameter was changed in place"):
            z.sum().backward()
        with pytest.raises(ValueError, match="expected at least one layer"):
            reversible([])
        with pytest.raises(TypeError, match=r"layers\[0\]: expected a module with a method"):
            reversible([nn.Linear(2, 2)])
