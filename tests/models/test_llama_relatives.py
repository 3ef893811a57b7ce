"""Mistral, Qwen2 and Qwen3 in Llama against transformers' own classes, both ways."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from torch.nn import functional as F
from warploom.models.llama import Llama
from warploom.models.llama_config import LlamaConfig

MIXED = ["full_attention", "sliding_attention", "full_attention"]
RELATIVES = {
    "mistral": ("Mistral", {"sliding_window": 7}),
    "mistral-no-window": ("Mistral", {"sliding_window": None}),
    "mistral-wide-heads": ("Mistral", {"sliding_window": 30, "head_dim": 24}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "qwen3-biases-windows": (
        "Qwen3",
        {"attention_bias": True, "use_sliding_window": True, "sliding_window": 5,
         "layer_types": MIXED, "head_dim": 16},
    ),
}  # fmt: skip
IDS = torch.arange(100).view(2, 50) * 7 % 192


@pytest.fixture(params=RELATIVES)
def relative(request, tmp_path):
    """A random model of transformers, norms and biases included, and the Llama of its directory."""
    family, changes = RELATIVES[request.param]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=192,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.0625,
        bos_token_id=None,
        eos_token_id=None,
        **changes,
    )
    torch.manual_seed(0)
    peer = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    peer.save_pretrained(tmp_path / "peer")
    return peer, Llama.from_pretrained(tmp_path / "peer").eval()


def test_logits_equal_transformers(relative):
    peer, ours = relative
    torch.testing.assert_close(ours(IDS), peer(IDS).logits, rtol=0, atol=1e-5)


def test_gradients_equal_transformers(relative):
    peer, ours = relative
    for logits in (peer(IDS).logits, ours(IDS)):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    expected = dict(peer.named_parameters())
    assert expected.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        reference = expected[name].grad
        torch.testing.assert_close(
            parameter.grad, reference, rtol=1e-4, atol=1e-5 * reference.abs().max().item(), msg=name
        )


@pytest.mark.parametrize("cache", ["paged", "static"])
def test_greedy_tokens_equal_transformers(relative, cache):
    peer, ours = relative
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 24}
    expected = peer.generate(IDS, do_sample=False, pad_token_id=0, **options)
    assert torch.equal(ours.generate(IDS, cache=cache, **options), expected)


def test_a_directory_saved_here_loads_in_transformers(relative, tmp_path):
    peer, ours = relative
    ours.save_pretrained(tmp_path / "ours")
    again = type(peer).from_pretrained(tmp_path / "ours")
    assert type(again.config) is type(peer.config)
    torch.testing.assert_close(again(IDS).logits, peer(IDS).logits, rtol=0, atol=1e-5)
    assert LlamaConfig.from_dict(ours.config.to_dict()) == ours.config


def test_copies_keep_the_function(relative):
    _, ours = relative
    expected = ours(IDS)
    empty = Llama(ours.config, device="meta")
    empty.load_state_dict(ours.state_dict(), assign=True)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), empty):
        assert torch.equal(other(IDS), expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gemma2"}, "model_type: expected one of llama, mistral, qwen2, qwen3, got 'gemma2'"),
        ({"sliding_window": 4}, "sliding_window: expected None for model_type 'llama'"),
        ({"model_type": "mistral", "layer_types": MIXED}, "layer_types: expected None for 'mistral'"),
        (
            {"model_type": "qwen2", "layer_types": MIXED},
            "layer_types: expected 2 of full_attention, sliding_attention, got",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention", "chunked_attention"]},
            r"layer_types: expected 2 of .*chunked_attention",
        ),
    ],
    ids=lambda value: value.get("model_type", "llama") if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_is_not_served_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig(num_hidden_layers=2, **fields)


def test_metas_layout_has_no_place_for_relatives(tmp_path):
    config = LlamaConfig(
        vocab_size=192, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, model_type="mistral", sliding_window=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match="no place for model_type 'mistral', sliding_window 4"):
        Llama(config).save_pretrained(tmp_path, layout="meta")
