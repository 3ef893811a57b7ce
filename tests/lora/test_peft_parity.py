"""peft is the oracle: outputs, gradients, merged weights and masks in float64, with alpha no power of two."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from warploom import lora
from warploom.nn.lora_layer import LoRALayer

from tests.integrations.tiny_models import VOCABULARY, build

FIELDS: dict[str, Any] = {"r": 5, "lora_alpha": 7, "init_lora_weights": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "rsLoRA and DoRA": {"use_rslora": True, "use_dora": True},
}
DROPOUT = {"no dropout": 0.0, "dropout": 0.3}


def assert_close(ours: Tensor, theirs: Tensor, what: str = "result") -> None:
    """To 1e-12 of the largest element, or of 1."""
    assert ours.shape == theirs.shape, what
    bound = 1e-12 * max(1.0, theirs.abs().max().item())
    assert (ours - theirs).abs().max().item() <= bound, what


class OneLayer(nn.Module):
    """A linear layer or an embedding called `layer`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "embedding":
            self.layer: nn.Module = nn.Embedding(23, 12, padding_idx=3, dtype=torch.float64)
        else:
            self.layer = nn.Linear(23, 12, bias=kind == "linear with bias", dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def pair(model: nn.Module, *, dropout_rng: str = "torch", **fields: Any) -> tuple[Any, nn.Module]:
    """peft's model and ours over the same base, with the same random adapter."""
    fields = {**FIELDS, **fields}
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(**fields), autocast_adapter_dtype=False
    )
    ours = lora.get_lora_model(
        copy.deepcopy(model),
        lora.LoraConfig(**fields),
        autocast_adapter_dtype=False,
        dropout_rng=dropout_rng,
    )
    copy_adapter(theirs, ours)
    return theirs, ours


@torch.no_grad()
def copy_adapter(theirs: Any, ours: nn.Module, adapter: str = "default") -> None:
    """Draws an adapter, a magnitude too, and gives it to both."""
    their_layers = [module for module in theirs.modules() if isinstance(module, LoraLayer)]
    our_layers = [module for module in ours.modules() if isinstance(module, LoRALayer)]
    assert len(their_layers) == len(our_layers) > 0
    for one, other in zip(their_layers, our_layers, strict=True):
        for held, own in their_parameters(one, other, adapter):
            held.add_(0.3 * torch.randn_like(held))
            own.copy_(held)


def their_parameters(one: Any, other: LoRALayer, adapter: str) -> list[tuple[Tensor, Tensor]]:
    pairs = []
    for key, own in other.adapter_parameters(adapter).items():
        held = getattr(one, key.partition(".")[0])[adapter]
        pairs.append((held.weight if isinstance(held, nn.Module) else held, own))
    return pairs


def compare(theirs: Any, ours: nn.Module, x: Tensor) -> None:
    """Outputs for x, and the gradients of x and of every parameter of the adapters."""
    outs = []
    for model in (theirs, ours):
        leaf = x.clone().requires_grad_(x.is_floating_point())
        torch.manual_seed(11)
        out = model(leaf)
        out = out if isinstance(out, Tensor) else out.logits
        torch.manual_seed(12)
        (out * torch.randn_like(out)).sum().backward()
        outs.append((out, leaf.grad))
    assert_close(outs[1][0], outs[0][0], "output")
    if x.is_floating_point():
        assert_close(outs[1][1], outs[0][1], "gradient of x")
    layers = zip(
        (module for module in theirs.modules() if isinstance(module, LoraLayer)),
        (module for module in ours.modules() if isinstance(module, LoRALayer)),
        strict=True,
    )
    for one, other in layers:
        for adapter in other.active_adapters:
            for held, own in their_parameters(one, other, adapter):
                assert_close(own.grad, held.grad, "gradient of the adapter")


def inputs(kind: str) -> Tensor:
    if kind == "embedding":
        return torch.randint(0, 23, (2, 7))
    return torch.randn(2, 7, 23, dtype=torch.float64)


@pytest.mark.parametrize("dropout", DROPOUT)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["linear", "linear with bias", "embedding"])
def test_a_layer_is_pefts(kind, variant, dropout):
    fields = {**VARIANTS[variant], "lora_dropout": DROPOUT[dropout]}
    theirs, ours = pair(OneLayer(kind), target_modules=["layer"], **fields)
    compare(theirs, ours, inputs(kind))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["linear with bias", "embedding"])
def test_merged_weights_are_pefts(kind, variant):
    theirs, ours = pair(OneLayer(kind), target_modules=["layer"], **VARIANTS[variant])
    x = inputs(kind)
    separate = ours(x)
    lora.merge_adapter(ours)
    assert_close(ours(x), separate, "merged output")
    merged = lora.merge_and_unload(ours).layer.weight
    assert_close(merged, theirs.merge_and_unload().layer.weight, "merged weight")


@pytest.mark.parametrize("dropout", DROPOUT)
@pytest.mark.parametrize("kind", ["linear with bias", "embedding"])
def test_the_updates_of_several_active_adapters_are_summed(kind, dropout):
    fields = {"target_modules": ["layer"], "lora_dropout": DROPOUT[dropout]}
    theirs, ours = pair(OneLayer(kind), **fields)
    second = {**FIELDS, **fields, "r": 3, "use_rslora": True}
    theirs.add_adapter("second", peft.LoraConfig(**second), autocast_adapter_dtype=False)
    lora.add_adapter(ours, lora.LoraConfig(**second), "second", autocast_adapter_dtype=False)
    copy_adapter(theirs, ours, "second")
    x = inputs(kind)
    with torch.no_grad():
        assert_close(ours.eval()(x), theirs.eval()(x), "the first alone")
    theirs.train(), ours.train()
    theirs.base_model.set_adapter(["default", "second"])
    lora.set_adapter(ours, ["default", "second"])
    compare(theirs, ours, x)
    lora.merge_adapter(ours)
    theirs.base_model.merge_adapter()
    assert_close(ours(x), theirs(x), "both merged")
    with theirs.disable_adapter(), lora.disable_adapter(ours):
        assert_close(ours(x), theirs(x), "the base")


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "use_dora": True, "lora_dropout": 0.1},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_rslora": True},
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": r".*\.1\..*_proj", "exclude_modules": ["up_proj"]},
        {"target_modules": ["down_proj", "k_proj"], "layers_to_transform": [1]},
        {"target_modules": ["down_proj", "k_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\..*": 2},
            "alpha_pattern": {"0.self_attn.q_proj": 11},
        },
    ],
    ids=[
        "all linear layers", "DoRA with dropout", "embedding and head", "a module trained as a whole",
        "expression without some", "one layer", "one layer by pattern", "ranks of their own",
    ],
)  # fmt: skip
def test_a_transformers_llama_is_pefts(fields):
    theirs, ours = pair(build("llama").double().train(), **fields)
    adapted = {name for name, module in ours.named_modules() if isinstance(module, LoRALayer)}
    assert adapted == {
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if isinstance(module, LoraLayer)
    }
    compare(theirs, ours, torch.randint(1, VOCABULARY, (2, 9)))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_the_biases_that_are_trained_are_pefts(bias):
    model = build("qwen2").double()
    theirs, ours = pair(model, target_modules=["q_proj", "o_proj"], bias=bias)
    trained = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if name.endswith(".bias")} == {
        name.removeprefix("base_model.model.")
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad and name.endswith(".bias")
    }


@pytest.mark.parametrize("method", ["pissa", "olora", "gaussian", True])
@pytest.mark.parametrize("variant", ["LoRA", "DoRA"])
def test_initial_weights_are_pefts(method, variant):
    base = OneLayer("linear with bias").float()
    config = {
        **FIELDS,
        **VARIANTS[variant],
        "target_modules": ["layer"],
        "init_lora_weights": method,
    }
    torch.manual_seed(3)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))
    torch.manual_seed(3)
    ours = lora.get_lora_model(copy.deepcopy(base), lora.LoraConfig(**config))
    one, other = theirs.base_model.model.layer, ours.layer
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(other.weight, one.base_layer.weight, **close)
    a, b = other.factors("default")
    their_a, their_b = one.lora_A["default"].weight, one.lora_B["default"].weight
    torch.testing.assert_close(b @ a, their_b @ their_a, **close)
    x = torch.randn(5, 23)
    torch.testing.assert_close(ours(x), base(x), **close)
    if method in ("gaussian", True):
        assert a.std().item() == pytest.approx(their_a.std().item(), rel=0.5)
