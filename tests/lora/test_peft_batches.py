"""peft is the oracle, in float64: one batch of several adapters, and experts stored as one tensor."""

from __future__ import annotations

import copy
from typing import Any

import peft
import torch
from torch import Tensor, nn
from warploom.ops.lora import Adapter, lora_expert_linear, multi_lora_linear

from tests.lora.test_peft_parity import FIELDS, OneLayer, assert_close

SCALING = FIELDS["lora_alpha"] / FIELDS["r"]


def test_a_batch_of_several_adapters_is_pefts():
    """Ranks 5 and 9, and rows of none: peft serves it in evaluation, adapter after adapter."""
    model = OneLayer("linear with bias")
    config = {**FIELDS, "target_modules": ["layer"]}
    theirs: Any = peft.get_peft_model(
        model, peft.LoraConfig(**config), "first", autocast_adapter_dtype=False
    )
    theirs.add_adapter(
        "second", peft.LoraConfig(**{**config, "r": 9}), autocast_adapter_dtype=False
    )
    names = ["second", "__base__", "first", "first", "second", "__base__"]
    layer = theirs.base_model.model.layer
    adapters = [
        Adapter(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
        for name in ("first", "second")
    ]
    ids = torch.tensor([{"first": 0, "second": 1, "__base__": -1}[name] for name in names])
    x = torch.randn(6, 4, 23, dtype=torch.float64)
    ours = multi_lora_linear(x, layer.weight, layer.bias, adapters, ids)
    assert_close(ours, theirs.eval()(x, adapter_names=names))


class Experts(nn.Module):
    """One tensor of all experts' weights, as in transformers' mixtures of experts."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, 12, 23, dtype=torch.float64))

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        parts = zip(x.split(sizes), self.weight)
        return torch.cat([rows @ weight.T for rows, weight in parts])


class ExpertLayer(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = Experts(experts)

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        return self.experts(x, sizes)


def test_experts_are_pefts():
    """Outputs and gradients, from the adapter as peft stores it; the second expert has no rows."""
    model, sizes = ExpertLayer(3), [4, 0, 5]
    weight = copy.deepcopy(model.experts.weight)
    config = peft.LoraConfig(**FIELDS, target_parameters=["experts.weight"], target_modules=[])
    theirs: Any = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    factors = [p for name, p in theirs.named_parameters() if "lora_" in name]
    x, upstream = (torch.randn(9, size, dtype=torch.float64) for size in (23, 12))
    expected = theirs(x, sizes)
    gradients = torch.autograd.grad(expected, factors, upstream)

    lora_a, lora_b = (factor.detach().requires_grad_() for factor in factors)
    offsets = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    ours = lora_expert_linear(x, weight.detach(), offsets, lora_a, lora_b, SCALING)
    assert_close(ours, expected)
    for own, other in zip(torch.autograd.grad(ours, (lora_a, lora_b), upstream), gradients):
        assert_close(own, other, "gradient")
