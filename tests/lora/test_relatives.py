"""Bottleneck adapters, (IA)^3, prompt and prefix tuning: their training, and peft where it has them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from warploom.lora.bottleneck import add_bottlenecks
from warploom.lora.ia3 import get_ia3_model, merge_ia3
from warploom.lora.prompt import PrefixTuning, PromptTuning
from warploom.lora.trained import load_trained, save_trained, trained_parameters
from warploom.models.checkpoint import CheckpointError
from warploom.models.llama import Llama

from tests.integrations.tiny_models import VOCABULARY, build
from tests.lora.test_peft_parity import assert_close
from tests.models.tiny_deepseek import tiny_deepseek
from tests.models.tiny_llama import ROPE, tiny_llama

P = 5
#: Each as a function that adapts a Llama.
RELATIVES: dict[str, Callable[[Llama], nn.Module]] = {
    "bottleneck": lambda model: add_bottlenecks(model, 4),
    "(IA)^3": get_ia3_model,
    "prompt tuning": lambda model: PromptTuning(model, P),
    "prefix tuning": lambda model: PrefixTuning(model, P),
}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Any, Llama]:
    """A random LlamaForCausalLM in float64 and the Llama of the same weights."""
    peer = build("llama").double()
    peer.save_pretrained(tmp_path)
    return peer, Llama.from_pretrained(tmp_path).eval()


def ids(vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randint(1, vocabulary, (2, 9))


def drawn(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("relative", RELATIVES)
def test_it_alone_is_trained_and_the_loss_falls(relative):
    model = RELATIVES[relative](tiny_llama(initializer_range=0.2))
    tokens = ids(192)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert 0 < sum(p.numel() for p in parameters) < 0.2 * sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.03)
    losses = []
    for _ in range(15):
        logits = model(tokens)[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
        loss.backward()
        assert all(p.grad is not None for p in parameters)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses


@pytest.mark.parametrize("relative", RELATIVES)
def test_what_was_trained_is_one_file(relative, tmp_path):
    tokens = ids(192)
    model = drawn(RELATIVES[relative](tiny_llama()))
    save_trained(model, tmp_path / "trained.safetensors")
    again = RELATIVES[relative](tiny_llama())
    load_trained(again, tmp_path / "trained.safetensors")
    assert torch.equal(again(tokens), model(tokens))
    other = add_bottlenecks(tiny_llama(), 3)
    with pytest.raises(CheckpointError, match="expected shape|missing tensor"):
        load_trained(other, tmp_path / "trained.safetensors")


@pytest.mark.parametrize("cache", ["paged", "static"])
@pytest.mark.parametrize("relative", RELATIVES)
def test_it_generates_what_its_forward_says(relative, cache):
    model: Any = drawn(RELATIVES[relative](tiny_llama())).eval()
    prompts = [[1, 2, 3, 4], [5, 6]]
    generated = model.generate(prompts, 5, do_sample=False, cache=cache)
    for row, prompt in zip(generated, prompts, strict=True):
        tokens = list(prompt)
        while len(tokens) < len(row):
            with torch.no_grad():
                tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
        assert row == tokens


@pytest.mark.parametrize("relative", RELATIVES)
def test_on_16_bits_it_is_float32(relative):
    model = RELATIVES[relative](tiny_llama().bfloat16())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(ids(192)).dtype == torch.bfloat16


def test_a_new_bottleneck_changes_nothing():
    tokens, model = ids(192), tiny_llama()
    expected = model(tokens)
    assert torch.equal(add_bottlenecks(model, 4)(tokens), expected)


def test_a_bottleneck_is_a_residual_network_behind_the_layer():
    model = drawn(add_bottlenecks(nn.Sequential(nn.Linear(6, 8)), 3, ["0"], "relu"))
    x, adapter = torch.randn(4, 6), model[0]
    hidden = adapter.base_layer(x)
    inner = torch.relu(hidden @ adapter.down.weight.T + adapter.down.bias)
    expected = hidden + inner @ adapter.up.weight.T + adapter.up.bias
    torch.testing.assert_close(model(x), expected)


def test_ia3_is_pefts():
    peer = build("llama").double()
    ours = copy.deepcopy(peer)
    config = peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    theirs = peft.get_peft_model(peer, config, autocast_adapter_dtype=False)
    get_ia3_model(ours)
    drawn(theirs)
    state = {
        name.removeprefix("base_model.model."): tensor
        for name, tensor in peft.get_peft_model_state_dict(theirs).items()
    }
    vectors = trained_parameters(ours)
    assert state.keys() == vectors.keys()
    for name, vector in vectors.items():
        vector.copy_(state[name])
    tokens = ids()
    out, expected = ours(tokens).logits, theirs(input_ids=tokens).logits
    assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert_close(parameter.grad, grads[f"base_model.model.{name}.default"], name)
    assert_close(merge_ia3(ours)(tokens).logits, out.detach(), "merged")
    assert not any("ia3" in name for name in ours.state_dict())


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_are_pefts(kind, pair):
    peer, base = pair
    options: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": P}
    ours: PromptTuning | PrefixTuning
    if kind == "prompt":
        config, ours = peft.PromptTuningConfig(**options), PromptTuning(base, P)
    else:
        config, ours = peft.PrefixTuningConfig(**options), PrefixTuning(base, P)
    theirs = peft.get_peft_model(peer, config).double().eval()
    embeddings = peft.get_peft_model_state_dict(theirs)["prompt_embeddings"]
    with torch.no_grad():
        ours.prompt_embeddings.copy_(embeddings)
    tokens = ids()
    out, expected = ours(tokens), theirs(input_ids=tokens).logits[:, -tokens.shape[1] :]
    # transformers takes its norms and rotary tables in float32.
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(out, expected, **close)
    out.square().sum().backward()
    expected.square().sum().backward()
    (grad,) = (p.grad for p in theirs.parameters() if p.grad is not None)
    torch.testing.assert_close(ours.prompt_embeddings.grad, grad.view_as(embeddings), **close)


def test_a_prompt_starts_as_the_tokens_it_is_given():
    base = tiny_llama()
    prompt = PromptTuning(base, 5, initial_tokens=[7, 8])
    assert torch.equal(prompt.prompt_embeddings, base.model.embed_tokens.weight[[7, 8, 7, 8, 7]])
    tokens = torch.tensor([[1, 2, 3]])
    whole = torch.tensor([[7, 8, 7, 8, 7, 1, 2, 3]])
    torch.testing.assert_close(prompt(tokens), base(whole)[:, 5:])


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 4, "model_type": "mistral"},
        {"rope_parameters": ROPE["dynamic"], "max_position_embeddings": 8},
    ],
    ids=["windows", "frequencies that depend on the length"],
)
@torch.no_grad()
def test_a_prefix_of_the_keys_and_values_of_a_text_acts_as_that_text(changes):
    model = tiny_llama(**changes).eval()
    text, tokens = torch.randint(0, 192, (1, P)), torch.randint(0, 192, (1, 6))
    prefix, cache = PrefixTuning(model, P), model.make_cache("paged", 1, P)
    model(text, cache)
    rows = [
        torch.stack([page[cache.block_table[0, 0], :P] for page in pages])
        for pages in cache._layers
    ]
    prefix.prompt_embeddings.copy_(torch.stack(rows).permute(2, 0, 1, 3, 4).flatten(1))
    cache.advance(P)
    torch.testing.assert_close(prefix(tokens), model(tokens, cache), rtol=1e-4, atol=1e-5)


def test_latent_attention_has_prompts_and_no_prefixes():
    model = tiny_deepseek().eval()
    prompt = PromptTuning(model, P)
    assert prompt(ids(192)).shape == (2, 9, 192)
    assert len(prompt.generate([1, 2], 3)[0]) == 5
    with pytest.raises(TypeError, match="expected layers of GroupedQueryAttention"):
        PrefixTuning(model, P)


def test_layers_that_cannot_be_adapted_are_named():
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp: expected nn\.Linear, got SwiGLU"):
        get_ia3_model(tiny_llama(), ["mlp"])
    with pytest.raises(ValueError, match=r"input_layernorm: expected nn\.Linear"):
        add_bottlenecks(tiny_llama(), 4, ["input_layernorm"])
    with pytest.raises(ValueError, match="expected names of modules"):
        add_bottlenecks(tiny_llama(), 4, ["nowhere"])
