"""Adapters on layers and models: what acts, what is trained, merging, quantised bases, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from warploom import lora
from warploom.lora.model import adapted_layers
from warploom.models.deepseek_v2 import DeepseekV2
from warploom.nn import LoRAEmbedding, LoRALinear, QuantizedLinear
from warploom.nn.lora_layer import LoRALayer
from warploom.nn.quantized_linear import quantize_linears

from tests.models.tiny_deepseek import tiny_deepseek
from tests.models.tiny_llama import tiny_llama

ALL = {"r": 5, "lora_alpha": 7, "target_modules": "all-linear", "init_lora_weights": False}


def adapted(**fields: Any) -> Any:
    return lora.get_lora_model(tiny_llama(), lora.LoraConfig(**{**ALL, **fields}))


def tokens(batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 192, (batch, 9))


def drawn(layer: LoRALayer) -> LoRALayer:
    """With adapters whose updates are not zero."""
    with torch.no_grad():
        for name in layer.r:
            for parameter in layer.adapter_parameters(name).values():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def test_a_new_adapter_changes_nothing():
    base = tiny_llama()
    ids = tokens()
    expected = base(ids)
    for dora in (False, True):
        model = lora.get_lora_model(
            copy.deepcopy(base), lora.LoraConfig(target_modules="all-linear", use_dora=dora)
        )
        torch.testing.assert_close(model(ids), expected, rtol=1e-5, atol=1e-6)


def test_the_adapter_alone_is_trained():
    model = adapted(target_modules=["q_proj", "embed_tokens"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    model(tokens()).sum().backward()
    assert all(
        (parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters()
    )
    count, total = lora.parameter_counts(model)
    assert count == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert total == sum(p.numel() for p in model.parameters())


def test_the_head_is_no_target_of_all_linear():
    model = adapted()
    assert type(model.lm_head) is nn.Linear
    assert type(model.model.layers[0].mlp.up_proj) is LoRALinear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_on_16_bits_are_float32_unless_told_otherwise(dtype):
    config = lora.LoraConfig(**{**ALL, "use_dora": True, "modules_to_save": ["lm_head"]})
    for autocast, expected in ((True, torch.float32), (False, dtype)):
        model = lora.get_lora_model(tiny_llama().to(dtype), config, autocast_adapter_dtype=autocast)
        trained = {p.dtype for p in model.model.parameters() if p.requires_grad}
        assert trained == {expected}
        assert model.model(tokens()).dtype == dtype


def test_adapters_are_exchanged_and_switched_off():
    model = adapted()
    ids = tokens()
    first = model(ids)
    lora.add_adapter(model, lora.LoraConfig(**{**ALL, "r": 2}), "second")
    assert torch.equal(model(ids), first), "a new adapter does not act by itself"
    lora.set_adapter(model, "second")
    assert not torch.allclose(model(ids), first)
    assert {
        name.split(".")[-2]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    } == {"second"}
    with lora.disable_adapter(model):
        torch.testing.assert_close(model(ids), tiny_llama()(ids))
    lora.delete_adapter(model, "second")
    lora.set_adapter(model, "default")
    assert torch.equal(model(ids), first)
    assert not any("second" in name for name in model.state_dict())


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_a_base_that_was_kept_restores_its_bits(dtype, dora):
    layer = drawn(LoRALinear(16, 12, 5, 7, use_dora=dora, dtype=dtype))
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(3, 16, dtype=dtype)
    before = layer(x)
    assert layer.merge() == 0.0
    assert layer.state_dict().keys() == state.keys()
    torch.testing.assert_close(layer(x), before, rtol=0.02, atol=0.05)
    layer.disable()
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.disable(False)
    layer.unmerge()
    assert torch.equal(layer(x), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_overwriting_the_base_tells_the_error_that_unmerging_leaves(kind, dora):
    options: Any = {"use_dora": dora, "dtype": torch.bfloat16}
    layer: LoRALayer = (
        LoRALinear(16, 12, 5, 7, **options)
        if kind == "linear"
        else LoRAEmbedding(16, 12, 5, 7, **options)
    )
    drawn(layer)
    original = layer.weight.clone()
    error = layer.merge(keep_base=False)
    assert not torch.equal(layer.weight, original)
    with pytest.raises(RuntimeError, match="unmerge first"):
        layer.disable()
    layer.unmerge()
    assert 0 < error < 0.1
    assert (layer.weight.double() - original.double()).abs().max().item() == error


def test_a_merged_model_generates_the_same_tokens():
    model = adapted().eval()
    prompts = [[1, 2, 3], [4, 5]]
    expected = model.generate(prompts, 6, do_sample=False)
    base = tiny_llama().eval().generate(prompts, 6, do_sample=False)
    assert expected != base
    lora.merge_adapter(model)
    assert model.generate(prompts, 6, do_sample=False) == expected
    lora.unmerge_adapter(model)
    with lora.disable_adapter(model):
        assert model.generate(prompts, 6, do_sample=False) == base
    unloaded = lora.merge_and_unload(model)
    assert unloaded.generate(prompts, 6, do_sample=False) == expected
    assert unloaded.state_dict().keys() == tiny_llama().state_dict().keys()


def test_philox_dropout_draws_anew_and_is_repeated_by_checkpointing():
    model = adapted(lora_dropout=0.5).train()
    ids = tokens()

    def run(checkpointing: bool) -> tuple[torch.Tensor, torch.Tensor]:
        model.gradient_checkpointing = checkpointing
        model.zero_grad()
        torch.manual_seed(4)
        out = model(ids)
        out.square().sum().backward()
        return out, model.model.layers[0].mlp.up_proj.lora_A["default"].weight.grad.clone()

    out, grad = run(False)
    again, same = run(True)
    assert torch.equal(out, again)
    torch.testing.assert_close(grad, same)
    assert not torch.equal(model(ids), out)
    assert torch.equal(model.eval()(ids), model(ids))


def test_latent_attention_reads_the_adapted_weight():
    """Its absorbed form multiplies with kv_b_proj's parts, and never calls the layer."""
    torch.manual_seed(1)
    base = tiny_deepseek().eval()
    config = lora.LoraConfig(**{**ALL, "target_modules": ["kv_b_proj", "o_proj"], "use_dora": True})
    model: DeepseekV2 = lora.get_lora_model(copy.deepcopy(base), config)
    for _, layer in adapted_layers(model):
        drawn(layer)
    ids = tokens()
    out = model(ids)
    out.sum().backward()
    attention = model.model.layers[0].self_attn
    assert attention.kv_b_proj.lora_A["default"].weight.grad.abs().max() > 0
    assert not torch.allclose(out, base(ids))
    for layer in model.model.layers:
        layer.self_attn.mode = "absorbed"
    torch.testing.assert_close(model(ids), out, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(lora.merge_and_unload(model)(ids), out, rtol=1e-3, atol=1e-4)


def test_latent_attention_refuses_dropout_of_the_weight_it_reads():
    config = lora.LoraConfig(**{**ALL, "target_modules": ["kv_b_proj"], "lora_dropout": 0.1})
    model = lora.get_lora_model(tiny_deepseek(), config).train()
    with pytest.raises(RuntimeError, match="kv_b_proj"):
        model(tokens())


def dequantised(model: nn.Module) -> nn.Module:
    """A copy in which quantised layers are ordinary ones of the same values."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantizedLinear):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
            linear.weight = nn.Parameter(layer.effective_weight())
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, linear)
    return model


@pytest.mark.parametrize("double", [False, True], ids=["scales", "compressed scales"])
@pytest.mark.parametrize("format", ["nf4", "int8", "fp8_e4m3"])
def test_a_quantised_base_stays_frozen_under_its_adapters(format, double):
    model = quantize_linears(tiny_llama(), format, 16, double_quantize=double)
    dense = dequantised(model)
    assert type(model.lm_head) is nn.Linear
    torch.manual_seed(5)
    lora.get_lora_model(model, lora.LoraConfig(**ALL, use_dora=True))
    torch.manual_seed(5)
    lora.get_lora_model(dense, lora.LoraConfig(**ALL, use_dora=True))
    ids = tokens()
    torch.testing.assert_close(model(ids), dense(ids), rtol=1e-4, atol=1e-5)
    for one in (model, dense):
        one(ids).square().sum().backward()
    trained = [[p for p in one.parameters() if p.requires_grad] for one in (model, dense)]
    for one, other in zip(*trained, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4)
    out = model(ids)
    torch.testing.assert_close(lora.merge_and_unload(model)(ids), out, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("double", [False, True], ids=["scales", "compressed scales"])
def test_a_quantised_layer_keeps_its_weight_through_casts_and_files(double):
    linear, options = nn.Linear(64, 12), {"double_quantize": double}
    layer = QuantizedLinear.from_linear(linear, "fp8_e4m3", 16, **options)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), linear(x), rtol=0.1, atol=0.1)
    cast = copy.deepcopy(layer).to(torch.bfloat16)
    assert torch.equal(cast.weight.dequantize(), layer.weight.dequantize())
    assert cast.dtype == torch.bfloat16 and cast(x.bfloat16()).dtype == torch.bfloat16
    other = QuantizedLinear.from_linear(nn.Linear(64, 12), "fp8_e4m3", 16, **options)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    with pytest.raises(ValueError, match="weight_values"):
        QuantizedLinear.from_linear(linear, "int8", 16).load_state_dict(layer.state_dict())


@pytest.mark.parametrize("rslora", [False, True], ids=["LoRA", "rsLoRA"])
@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_is_nearer_to_the_weight_than_quantisation(bits, rslora):
    linear = nn.Linear(64, 48)
    plain = QuantizedLinear.from_linear(linear, {4: "nf4", 8: "int8"}[bits]).effective_weight()
    distances = [(plain - linear.weight).norm()]
    for iterations in (1, 4):
        config = lora.LoraConfig(
            r=8, lora_alpha=7, target_modules=["0"], use_rslora=rslora, init_lora_weights="loftq",
            loftq_config={"loftq_bits": bits, "loftq_iter": iterations},
        )  # fmt: skip
        model = lora.get_lora_model(nn.Sequential(copy.deepcopy(linear)), config)
        assert isinstance(model[0].base_layer, QuantizedLinear)
        distances.append((model[0].adapted_weight() - linear.weight).norm())
    assert distances[0] > distances[1] > distances[2]


def test_lora_plus_gives_b_a_rate_of_its_own():
    model = adapted(use_dora=True, modules_to_save=["lm_head"])
    slow, fast = lora.lora_plus_groups(model, lr=1e-3, ratio=8)
    assert (slow["lr"], fast["lr"]) == (1e-3, 8e-3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(".lora_B." in names[id(parameter)] for parameter in fast["params"])
    given = [id(parameter) for group in (slow, fast) for parameter in group["params"]]
    assert sorted(given) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_lora_fa_trains_b_alone():
    model = adapted()
    lora.freeze_lora_a(model)
    lora.set_adapter(model, "default")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_B." in name for name in trained)
    lora.freeze_lora_a(model, False)
    assert len([p for p in model.parameters() if p.requires_grad]) == 2 * len(trained)


def test_a_module_trained_as_a_whole_acts_with_its_adapter():
    model = adapted(modules_to_save=["lm_head"])
    ids = tokens()
    with torch.no_grad():
        model.lm_head.modules_to_save["default"].weight.zero_()
        assert model(ids).abs().max() == 0
        with lora.disable_adapter(model):
            assert model(ids).abs().max() > 0
        assert model.generate([[1, 2]], 2, do_sample=False) == [[1, 2, 0, 0]]
    assert lora.merge_and_unload(model).lm_head.weight.abs().max() == 0


def test_a_tied_weight_is_not_overwritten():
    model = tiny_llama(tie_word_embeddings=True)
    lora.get_lora_model(model, lora.LoraConfig(**{**ALL, "target_modules": ["embed_tokens"]}))
    ids = tokens()
    out = model(ids)
    lora.merge_adapter(model)
    torch.testing.assert_close(model(ids), out)
    lora.unmerge_adapter(model)
    for change in (lora.merge_and_unload, lambda model: lora.merge_adapter(model, keep_base=False)):
        with pytest.raises(ValueError, match="tied to"):
            change(model)
    untied = tiny_llama(tie_word_embeddings=True)
    with pytest.raises(ValueError, match="pissa.*lm_head"):
        config = lora.LoraConfig(target_modules=["lm_head"], init_lora_weights="pissa")
        lora.get_lora_model(untied, config)


def test_a_layer_compiles_whole():
    layer = drawn(LoRALinear(16, 12, 5, 7, use_dora=True))
    x = torch.randn(3, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["nowhere"]}, "target_modules: expected names of modules"),
        ({"target_modules": ["mlp"]}, r"model\.layers\.0\.mlp: expected a linear layer"),
        ({"target_modules": []}, "target_modules: expected names"),
        ({"target_modules": ".*", "layers_to_transform": 1}, "layers_to_transform"),
        ({"r": 0}, "r: expected 1 or more"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"bias": "some"}, "bias: expected none, all or lora_only"),
        ({"init_lora_weights": "eva"}, "init_lora_weights: expected True"),
    ],
)
def test_a_config_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        adapted(**fields)


def test_adapters_that_cannot_be_are_refused():
    model = adapted(use_dora=True)
    with pytest.raises(ValueError, match="expected a new name, got 'default'"):
        lora.add_adapter(model, lora.LoraConfig(**ALL), "default")
    with pytest.raises(ValueError, match="some of"):
        lora.set_adapter(model, "nobody")
    lora.add_adapter(model, lora.LoraConfig(**ALL), "second")
    for act in (lora.set_adapter, lora.merge_adapter):
        with pytest.raises(ValueError, match="a DoRA adapter alone"):
            act(model, ["default", "second"])
    lora.add_adapter(model, lora.LoraConfig(**ALL, bias="all"), "third")
    with pytest.raises(ValueError, match="third alone"):
        lora.set_adapter(model, ["second", "third"])
    with pytest.raises(ValueError, match="without dots"):
        LoRALinear(4, 4, 2, 2).add_adapter("a.b", 2, 2)
