"""Flows as whole models: exact inverses and densities, samples, contexts, scales, memory, other names."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Independent, Laplace, Normal, TransformedDistribution
from warploom.models.flows import (
    FLOWS,
    Flow,
    FlowTransform,
    Glow,
    GlowConfig,
    RealNVP,
    RealNVPConfig,
    load_flow,
    make_flow,
    save_flow,
)

IMAGE = (2, 4, 4)
FLOWS_UNDER_TEST: dict[str, tuple[str, dict[str, Any]]] = {
    "nice-table": (
        "nice",
        {"event_shape": (5,), "couplings": 3, "hidden_features": 6, "hidden_layers": 1},
    ),
    "nice-image": (
        "nice",
        {
            "event_shape": (1, 2, 3),
            "couplings": 2,
            "hidden_features": 6,
            "hidden_layers": 1,
            "preprocessing": "logit",
        },
    ),
    "realnvp-table": ("realnvp", {"event_shape": (5,), "couplings": 3, "hidden_features": 6}),
    "realnvp-image": (
        "realnvp",
        {
            "event_shape": IMAGE,
            "couplings": 2,
            "hidden_channels": 4,
            "num_blocks": 1,
            "preprocessing": "logit",
        },
    ),
    "glow": ("glow", {"event_shape": IMAGE, "num_scales": 2, "depth": 2, "hidden_channels": 4}),
    "glow-additive-full": (
        "glow",
        {
            "event_shape": IMAGE,
            "num_scales": 1,
            "depth": 2,
            "hidden_channels": 4,
            "affine": False,
            "lu": False,
        },
    ),
    "glow-openai": (
        "glow",
        {
            "event_shape": IMAGE,
            "num_scales": 2,
            "depth": 1,
            "hidden_channels": 4,
            "layout": "interleaved",
            "prior_layout": "interleaved",
            "padding": "edge",
        },
    ),
    "spline-table": (
        "spline",
        {"event_shape": (5,), "depth": 2, "num_bins": 4, "hidden_features": 6},
    ),
    "spline-image": (
        "spline",
        {
            "event_shape": IMAGE,
            "num_scales": 2,
            "depth": 1,
            "num_bins": 4,
            "hidden_channels": 4,
            "preprocessing": "center",
        },
    ),
}
Make = Callable[..., Flow]


@pytest.fixture(params=FLOWS_UNDER_TEST)
def make(request: pytest.FixtureRequest) -> Make:
    """Makes a flow of each kind with random weights, so that no part is the identity."""
    name, fields = FLOWS_UNDER_TEST[request.param]

    def build(**changes: Any) -> Flow:
        return random_flow(name, **{**fields, **changes})

    return build


def random_flow(name: str, dtype: torch.dtype = torch.float64, **fields: Any) -> Flow:
    torch.manual_seed(0)
    flow = make_flow(name, **fields).to(dtype)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return flow.eval()


def data(flow: Flow, n: int) -> Tensor:
    """Images in (0, 1), or a table's rows."""
    generator = torch.Generator().manual_seed(1)
    dtype = next(flow.parameters()).dtype
    shape = (n, *flow.config.event_shape)
    if len(shape) == 2:
        return torch.randn(shape, generator=generator, dtype=dtype)
    return torch.rand(shape, generator=generator, dtype=dtype)


def test_decoding_inverts_encoding(make: Make) -> None:
    flow = make()
    x = data(flow, 4)
    z, log_det = flow.encode(x)
    assert z.shape == (4, x[0].numel())
    back, inverse_log_det = flow.decode(z)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=1e-9, atol=1e-9)


def test_log_prob_is_the_prior_times_the_determinant_of_the_jacobian(make: Make) -> None:
    flow = make()
    x = data(flow, 1)
    jacobian = torch.autograd.functional.jacobian(lambda x: flow.encode(x)[0], x)
    _, log_det = torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel()))
    z = flow.encode(x)[0]
    if flow.config.prior == "normal":
        log_prior = Normal(0.0, 1.0).log_prob(z).sum()
    else:
        log_prior = (torch.sigmoid(z) * (1.0 - torch.sigmoid(z))).log().sum()
    torch.testing.assert_close(flow(x)[0], log_prior + log_det, rtol=1e-9, atol=1e-9)


def test_density_of_a_plane_integrates_to_one() -> None:
    flow = random_flow("realnvp", event_shape=(2,), couplings=4, hidden_features=8)
    axis = torch.linspace(-30.0, 30.0, 601, dtype=torch.float64)
    with torch.no_grad():
        mass = flow.log_prob(torch.cartesian_prod(axis, axis)).exp().sum() * 0.1**2
    assert mass.item() == pytest.approx(1.0, abs=1e-2)


def test_samples_have_the_shape_and_follow_generator_and_temperature(make: Make) -> None:
    flow = make()

    def draw(temperature: float) -> Tensor:
        return flow.sample(3, temperature=temperature, generator=torch.Generator().manual_seed(5))

    cold, cool, warm = draw(0.0), draw(0.5), draw(1.0)
    assert warm.shape == (3, *flow.config.event_shape)
    assert torch.equal(warm, draw(1.0))
    torch.testing.assert_close(cold, cold[:1].expand_as(cold))
    middle = flow.decode(torch.zeros(1, flow.num_features, dtype=torch.float64))[0]
    torch.testing.assert_close(cold[:1], middle)
    assert (cool - middle).norm() < (warm - middle).norm()


def test_a_vector_conditions_density_and_samples(make: Make) -> None:
    flow = make(context_features=3)
    x, context = data(flow, 4), torch.randn(4, 3, dtype=torch.float64)
    log_prob = flow.log_prob(x, context)
    assert not torch.isclose(log_prob, flow.log_prob(x, context.roll(1, 0))).any()
    back = flow.decode(flow.encode(x, context)[0], context)[0]
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    assert flow.sample(2, context=context[0]).shape == (2, *x.shape[1:])


def test_classes_condition_through_their_embeddings(make: Make) -> None:
    flow = make(num_classes=4, context_features=3)
    x, labels = data(flow, 4), torch.tensor([0, 3, 3, 1])
    by_class = flow.log_prob(x, labels)
    by_vector = make(context_features=3)
    by_vector.load_state_dict(flow.state_dict(), strict=False)
    torch.testing.assert_close(by_class, by_vector.log_prob(x, flow.classes.weight[labels]))


@pytest.mark.parametrize(
    ("fields", "context", "message"),
    [
        ({}, torch.zeros(1, 3), "context: expected None"),
        ({"context_features": 3}, None, "context: expected one"),
        (
            {"context_features": 3},
            torch.zeros(1, 2),
            r"context: expected \[batch, 3\], got \[1, 2\]",
        ),
    ],
    ids=["unasked", "missing", "other-length"],
)
def test_wrong_contexts_are_refused(
    fields: dict[str, int], context: Tensor | None, message: str
) -> None:
    flow = make_flow("realnvp", event_shape=(3,), **fields)
    with pytest.raises(ValueError, match=message):
        flow.log_prob(torch.zeros(1, 3), context)


def test_wrong_shapes_are_refused() -> None:
    flow = make_flow("realnvp", event_shape=(3,))
    with pytest.raises(ValueError, match=r"encode: x: expected \[batch, 3\], got \[1, 4\]"):
        flow.encode(torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"decode: z: expected \[batch, 3\], got \[1, 4\]"):
        flow.decode(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="sides that 4 divides"):
        GlowConfig(event_shape=(1, 4, 6), num_scales=2)


@pytest.mark.parametrize(
    ("name", "fields", "shapes"),
    [
        ("realnvp", {"num_scales": 3}, [(6, 4, 4), (12, 2, 2), (12, 2, 2)]),
        ("glow", {"num_scales": 3, "depth": 1}, [(6, 4, 4), (12, 2, 2), (48, 1, 1)]),
    ],
)
def test_half_of_the_channels_leave_after_each_scale(
    name: str, fields: dict[str, int], shapes: list[tuple[int, ...]]
) -> None:
    flow = make_flow(name, event_shape=(3, 8, 8), hidden_channels=4, **fields)
    assert [tuple(scale.shape) for scale in flow.scales] == shapes
    assert sum(flow.latent_sizes) == flow.num_features == 192


def test_a_learned_prior_is_the_gaussian_of_what_stays() -> None:
    """log_prob with standardised latents equals the sum over Gaussians of the latents themselves."""
    flow = random_flow("glow", event_shape=IMAGE, num_scales=2, depth=1, hidden_channels=4)
    x, expected = data(flow, 3), 0.0
    stream = x - 0.5
    for scale in flow.scales:
        stream, log_det = scale.steps(stream, None)
        kept, latent = stream[:, : scale.split.kept], stream[:, scale.split.kept :]
        given = kept if kept.shape[1] else torch.zeros_like(latent)
        mean, log_deviation = scale.split.prior(given, None).chunk(2, 1)
        log_prob = Normal(mean, log_deviation.exp()).log_prob(latent).flatten(1).sum(1)
        expected, stream = expected + log_det + log_prob, kept
    torch.testing.assert_close(flow.log_prob(x), expected, rtol=1e-10, atol=1e-10)


def test_bits_of_a_uniform_density_are_those_of_the_levels() -> None:
    """A flow cannot be uniform, but its bits are log2(levels) less the density's."""
    flow = random_flow("nice", event_shape=(1, 2, 2), hidden_features=4, levels=17)
    x = torch.randint(17, (5, 1, 2, 2))
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    log_prob_of_levels = flow.log_prob((x + noise) / 17) - 4 * math.log(17)
    bits = flow.bits_per_dim(x, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(bits, -log_prob_of_levels / (4 * math.log(2)))


def test_levels_survive_dequantisation() -> None:
    flow = make_flow("nice", event_shape=(1, 4, 4), hidden_features=4, levels=17)
    x = torch.randint(17, (9, 1, 4, 4))
    assert torch.equal(flow.quantize(flow.dequantize(x)), x)
    assert flow.quantize(torch.tensor([-0.2, 1.0, 1.3])).tolist() == [0, 16, 16]


def test_the_logit_gives_no_mass_far_outside_of_the_colours() -> None:
    fields = {"event_shape": (1, 2, 2), "hidden_features": 4, "preprocessing": "logit"}
    samples = make_flow("nice", **fields).sample(2000)
    margin = 0.05 / 0.9
    assert -margin <= samples.min() < 0 and 1 < samples.max() <= 1 + margin


@pytest.mark.parametrize("name", FLOWS)
def test_a_directory_holds_the_whole_flow(name: str, tmp_path: Path) -> None:
    fields = {"hidden_features": 4} if name == "nice" else {"hidden_channels": 4, "num_scales": 1}
    flow = random_flow(
        name, torch.float32, event_shape=(1, 4, 4), num_classes=2, context_features=2, **fields
    )
    save_flow(flow, tmp_path / "flow")
    loaded = load_flow(tmp_path / "flow").eval()
    assert loaded.config == flow.config
    x, labels = data(flow, 2), torch.tensor([0, 1])
    assert torch.equal(loaded.log_prob(x, labels), flow.log_prob(x, labels))


@pytest.mark.parametrize("event_shape", [(4,), (1, 4, 4)], ids=["table", "image"])
def test_transformed_distribution_has_the_flows_density(event_shape: tuple[int, ...]) -> None:
    flow = random_flow("realnvp", event_shape=event_shape, hidden_features=8, hidden_channels=4)
    size = flow.num_features
    zero, one = torch.zeros(size, dtype=torch.float64), torch.ones(size, dtype=torch.float64)
    transform = FlowTransform(flow)
    distribution = TransformedDistribution(Independent(Normal(zero, one), 1), [transform])
    assert (distribution.batch_shape, distribution.event_shape) == ((), event_shape)
    x = distribution.sample((2, 3))
    assert x.shape == (2, 3, *event_shape)
    expected = flow.log_prob(x.flatten(0, 1)).unflatten(0, (2, 3))
    torch.testing.assert_close(distribution.log_prob(x), expected)
    torch.testing.assert_close(distribution.log_prob(x.clone()), expected)

    other = TransformedDistribution(Independent(Laplace(zero, one), 1), [transform])
    z, log_det = flow.encode(x[0])
    torch.testing.assert_close(
        other.log_prob(x[0]), Laplace(zero, one).log_prob(z).sum(1) + log_det
    )


def test_transform_gives_value_and_determinant_together() -> None:
    flow = random_flow("spline", event_shape=(4,), depth=2, num_bins=4, hidden_features=8)
    transform = FlowTransform(flow)
    z = torch.randn(5, 4, dtype=torch.float64)
    x, ladj = transform.call_and_ladj(z)
    torch.testing.assert_close(transform.inv(x), z)
    torch.testing.assert_close(ladj, -flow.encode(x)[1])
    torch.testing.assert_close(transform.log_abs_det_jacobian(z.clone(), x), ladj)


def saved_bytes_and_gradients(flow: Flow, x: Tensor) -> tuple[int, dict[str, Tensor]]:
    """Bytes of the distinct tensors that autograd keeps for a backward pass, parameters not counted."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in flow.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = -flow.log_prob(x).mean()
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    loss.backward()
    return total, {
        name: parameter.grad
        for name, parameter in flow.named_parameters()
        if parameter.grad is not None
    }


def deep_glow(depth: int, *, reversible: bool) -> Flow:
    fields = {"event_shape": (1, 8, 8), "num_scales": 1, "hidden_channels": 16}
    torch.manual_seed(0)
    flow = Glow(GlowConfig(depth=depth, reversible=reversible, **fields))
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            if ".net.4." in name:
                parameter.normal_(std=0.02)
    x = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    flow.train().log_prob(x)  # the first batch sets the activation norms
    return flow


def test_glow_of_32_layers_trains_in_the_memory_of_two_with_the_same_gradients() -> None:
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    two, _ = saved_bytes_and_gradients(deep_glow(2, reversible=True), x)
    deep, gradients = saved_bytes_and_gradients(deep_glow(32, reversible=True), x)
    plain, expected = saved_bytes_and_gradients(deep_glow(32, reversible=False), x)
    assert deep <= 1.05 * two
    assert plain > 10 * deep
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        error = (gradient - expected[name]).norm() / expected[name].norm().clamp(min=1e-6)
        assert error < 1e-4, (name, error)


def test_reversible_and_plain_flows_share_names_and_values(make: Make) -> None:
    plain, thrifty = make(), make(reversible=True)
    thrifty.load_state_dict(plain.state_dict())
    x = data(plain, 3)
    torch.testing.assert_close(thrifty.log_prob(x), plain.log_prob(x), rtol=1e-12, atol=1e-12)


def test_training_fits_a_ring() -> None:
    """A distribution that no affine map makes of a Gaussian: the flow is a nat closer than that."""
    torch.manual_seed(0)
    angle, radius = 2 * math.pi * torch.rand(512), 2 + 0.1 * torch.randn(512)
    x = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    gaussian = Normal(x.mean(0), x.std(0)).log_prob(x).sum(1).mean()
    flow = RealNVP(RealNVPConfig(event_shape=(2,), couplings=6, hidden_features=32))
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
    for _ in range(200):
        loss = -flow.log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert -loss > gaussian + 0.8
    ring = flow.eval().sample(500).norm(dim=1)
    assert (ring - 2).abs().median() < 0.4


def test_center_moves_images_to_the_middle() -> None:
    flow = make_flow("glow", event_shape=(1, 2, 2), num_scales=1, depth=1, hidden_channels=4)
    x = torch.rand(3, 1, 2, 2)
    y, log_det = flow.preprocessing(x)
    assert torch.equal(y, x - 0.5) and not F.relu(log_det.abs()).any()
