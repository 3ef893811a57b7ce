"""The loss of a language model: fused, from all logits, and with an adapter on its head."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from warploom.lora import LoraConfig, get_lora_model, merge_adapter

from tests.models.tiny_llama import tiny_llama


@pytest.mark.parametrize(
    "adapter",
    [
        pytest.param(None, id="no adapter"),
        pytest.param({}, id="LoRA"),
        pytest.param({"use_dora": True}, id="DoRA"),
        pytest.param({"lora_dropout": 0.5}, id="dropout in evaluation"),
        pytest.param({"merged": True}, id="merged"),
    ],
)
def test_fused_or_not_it_is_the_cross_entropy_of_the_logits(adapter):
    model = tiny_llama(initializer_range=0.2).double().eval()
    if adapter is not None:
        merged = adapter.pop("merged", False)
        config = LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=False, **adapter)
        get_lora_model(model, config)
        if merged:
            merge_adapter(model)
    tokens = torch.randint(192, (2, 9))
    targets = torch.randint(192, (2, 9))
    targets[0, :4] = -100
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    for fused in (True, False):
        loss = model.loss(tokens, targets, fused=fused)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
        total = model.loss(tokens, targets, fused=fused, reduction="sum")
        torch.testing.assert_close(total, expected * 14, rtol=1e-10, atol=0)


def test_the_fused_loss_trains_a_heads_adapter():
    gradients = []
    for fused in (True, False):
        model = tiny_llama(initializer_range=0.2).double()
        torch.manual_seed(5)
        config = LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=False)
        get_lora_model(model, config)
        tokens = torch.arange(18).view(2, 9)
        model.loss(tokens, tokens, fused=fused).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(gradients[0]) == 2
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        assert one.abs().max() > 0
