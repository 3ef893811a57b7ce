"""Mixtures of experts: routing against its definition, experts against a loop, balance losses."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from warploom.nn.assignments import expert_load
from warploom.nn.grouped_linear import RoutedExperts
from warploom.nn.moe import BalanceLoss, MixtureOfExperts, Routing, TopKRouter

T, HIDDEN, WIDTH, E, K = 11, 24, 20, 8, 3


def router(**options):
    made = TopKRouter(HIDDEN, E, K, dtype=torch.float64, **options)
    torch.nn.init.normal_(made.weight)
    return made


def experts():
    made = RoutedExperts(HIDDEN, WIDTH, E, dtype=torch.float64)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


def loop_over_experts(module, x, chosen, weights):
    out = torch.zeros_like(x)
    for token in range(x.shape[0]):
        for expert, weight in zip(chosen[token].tolist(), weights[token]):
            gate, up = (module.gate_up_proj[expert] @ x[token]).chunk(2)
            out[token] += weight * (module.down_proj[expert] @ (F.silu(gate) * up))
    return out


def test_experts_equal_a_loop_over_tokens_with_gradients():
    module, x = experts(), torch.randn(T, HIDDEN, dtype=torch.float64, requires_grad=True)
    chosen = torch.stack(
        [torch.randperm(E - 2)[:K] for _ in range(T)]
    )  # two experts without tokens
    weights = torch.rand(T, K, dtype=torch.float64, requires_grad=True)
    ours, plain = module(x, chosen, weights), loop_over_experts(module, x, chosen, weights)
    torch.testing.assert_close(ours, plain)
    upstream = torch.randn_like(ours)
    tensors = [x, weights, *module.parameters()]
    for got, want in zip(
        torch.autograd.grad(ours, tensors, upstream), torch.autograd.grad(plain, tensors, upstream)
    ):
        torch.testing.assert_close(got, want)


def test_an_expert_that_is_not_here_adds_nothing():
    """Where experts are spread over ranks, the others' tokens have the number E."""
    module, x = experts(), torch.randn(T, HIDDEN, dtype=torch.float64)
    chosen, weights = torch.full((T, K), E), torch.ones(T, K, dtype=torch.float64)
    chosen[2, 1] = 5
    out = module(x, chosen, weights)
    assert (out[torch.arange(T) != 2] == 0).all()
    torch.testing.assert_close(
        out[2], loop_over_experts(module, x[2:3], chosen[2:3, 1:2], weights)[0]
    )


def test_no_tokens():
    assert experts()(
        torch.zeros(0, HIDDEN, dtype=torch.float64),
        torch.zeros(0, K, dtype=torch.int64),
        torch.zeros(0, K, dtype=torch.float64),
    ).shape == (0, HIDDEN)


def test_greedy_routing_takes_the_best_affinities():
    made, x = router(scale=1.5), torch.randn(T, HIDDEN, dtype=torch.float64)
    routing = made(x)
    affinities = torch.softmax(x @ made.weight.T, -1)
    best = affinities.sort(-1, descending=True)
    assert torch.equal(routing.experts.sort(-1)[0], best[1][:, :K].sort(-1)[0])
    torch.testing.assert_close(routing.weights, 1.5 * affinities.gather(1, routing.experts))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_a_token_stays_within_its_best_groups(scoring):
    made = router(scoring=scoring, num_groups=4, top_groups=2, normalize=True)
    x = torch.randn(T, HIDDEN, dtype=torch.float64)
    routing = made(x)
    grouped = routing.affinities.view(T, 4, 2)
    worth = grouped.amax(-1) if scoring == "softmax" else grouped.sum(-1)
    allowed = worth.topk(2, -1)[1]
    for token in range(T):
        assert {*(routing.experts[token] // 2).tolist()} <= {*allowed[token].tolist()}
    torch.testing.assert_close(routing.weights.sum(1), torch.ones(T, dtype=torch.float64))


def test_the_correction_bias_changes_the_choice_and_not_the_weights():
    made, x = router(scoring="sigmoid"), torch.randn(T, HIDDEN, dtype=torch.float64)
    made.e_score_correction_bias[6] = 10.0
    routing = made(x)
    assert (routing.experts == 6).any(1).all()
    torch.testing.assert_close(routing.weights, routing.affinities.gather(1, routing.experts))
    assert routing.weights.max() <= 1


def test_the_bias_moves_towards_an_even_load():
    made = router(scoring="sigmoid")
    chosen = torch.tensor([[0, 1, 2], [0, 1, 3], [0, 2, 4]])
    made.update_bias(chosen, 0.01)
    load = torch.tensor([3, 2, 2, 1, 1, 0, 0, 0])
    assert torch.equal(expert_load(chosen, E), load)
    expected = 0.01 * torch.sign(load.float().mean() - load)
    torch.testing.assert_close(made.e_score_correction_bias, expected)
    with pytest.raises(ValueError, match="TopKRouter: update_bias: expected scoring 'sigmoid'"):
        router().update_bias(chosen, 0.01)


def test_balance_losses_follow_the_equations():
    """DeepSeek-V2, equations 23 to 31, token by token."""
    affinities = torch.rand(T, E, dtype=torch.float64)
    chosen = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    groups, most = 4, 2
    f = [E / (K * T) * sum(e in row for row in chosen.tolist()) for e in range(E)]
    p = [affinities[:, e].sum().item() / T for e in range(E)]
    members = [range(d * E // groups, (d + 1) * E // groups) for d in range(groups)]
    by_group = [sum(p[e] for e in member) for member in members]
    sent = [
        groups / (most * T) * sum(any(e in row for e in member) for row in chosen.tolist())
        for member in members
    ]
    expected = {
        "expert": sum(one * two for one, two in zip(f, p)),
        "device": sum(
            sum(f[e] for e in member) / len(member) * by for member, by in zip(members, by_group)
        ),
        "communication": sum(one * two for one, two in zip(sent, by_group)),
    }
    routing = Routing(chosen, affinities.gather(1, chosen), affinities)
    for name, value in expected.items():
        loss = BalanceLoss(**{name: 0.3}, num_groups=groups, top_groups=most)(routing)
        assert loss.item() == pytest.approx(0.3 * value)


def test_the_balance_loss_joins_the_backward_pass_in_training_alone():
    made = router()
    layer = MixtureOfExperts(
        made, HIDDEN, WIDTH, 1, balance=BalanceLoss(expert=0.5), dtype=torch.float64
    )
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 5, HIDDEN, dtype=torch.float64)

    def gradient(extra):
        made.weight.grad = None
        (layer(x).square().sum() + extra).backward()
        return made.weight.grad

    with_loss = gradient(0.0)
    layer.eval()
    by_hand = gradient(layer.balance(made(x.flatten(0, 1))))
    torch.testing.assert_close(with_loss, by_hand)
    assert not torch.allclose(with_loss, gradient(0.0))


def test_it_compiles_into_one_graph():
    layer = MixtureOfExperts(router(), HIDDEN, WIDTH, 1, dtype=torch.float64)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scoring": "relu"}, "scoring: expected softmax or sigmoid"),
        ({"num_groups": 3}, "num_groups, top_groups: expected a divisor of 8"),
        ({"num_groups": 4, "top_groups": 1}, "top_k: expected experts that a token reaches"),
    ],
)
def test_errors_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        router(**options)
