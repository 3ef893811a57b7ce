"""Rotary frequencies of every scaling rule against transformers, and the table's life."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from warploom.nn import RotaryEmbedding
from warploom.nn.rope import inverse_frequencies

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}
RULES = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": LLAMA3,
    "llama3.2": {**LLAMA3, "factor": 32.0},
    "yarn": YARN,
    "yarn-betas": {**YARN, "beta_fast": 20, "beta_slow": 2},
    "yarn-not-truncated": {**YARN, "truncate": False},
    "yarn-attention-factor": {**YARN, "attention_factor": 0.7},
    "yarn-mscale": {**YARN, "mscale": 0.9, "mscale_all_dim": 0.6},
    "yarn-factor-1": {**YARN, "factor": 1.0},
    "partial": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
}


def peer_config(rule, head_dim=64):
    return transformers.LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        max_position_embeddings=65536,
        rope_parameters={"rope_theta": 10000.0, **rule},
    )


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("rule", RULES)
def test_frequencies_equal_transformers_bit_for_bit(rule, head_dim):
    config = peer_config(RULES[rule], head_dim)
    if rule == "default":
        expected, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[RULES[rule]["rope_type"]](config)
    module = RotaryEmbedding(head_dim, 65536, RULES[rule])
    assert torch.equal(module.inv_freq, expected)
    assert inverse_frequencies(module.dim, RULES[rule])[1] == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "partial"])
def test_tables_equal_transformers(rule):
    cos, sin = LlamaRotaryEmbedding(peer_config(RULES[rule]))(
        torch.empty(0), torch.arange(3000)[None]
    )
    table = RotaryEmbedding(64, 65536, RULES[rule]).table(3000, "cpu")
    torch.testing.assert_close(table[0][:3000], cos[0, :, :32], rtol=0, atol=1e-6)
    torch.testing.assert_close(table[1][:3000], sin[0, :, :32], rtol=0, atol=1e-6)


def test_dynamic_scaling_beyond_the_context_equals_transformers():
    config = peer_config(RULES["dynamic"])
    config.max_position_embeddings = 128
    module = RotaryEmbedding(64, 128, RULES["dynamic"])
    for length in (100, 128, 129, 200):
        cos, _ = LlamaRotaryEmbedding(config)(torch.empty(0), torch.arange(length)[None])
        actual = module.table(length, "cpu")[0][:length]
        # transformers computes the new base in float32: angles differ by up to 200 * 2^-24.
        torch.testing.assert_close(actual, cos[0, :, :32], rtol=0, atol=1.2e-5)


def test_the_table_grows_and_earlier_rows_stay():
    module = RotaryEmbedding(8)
    small = module.table(10, "cpu")[0].clone()
    large = module.table(5000, "cpu")[0]
    assert large.shape[0] >= 5000
    assert torch.equal(large[: small.shape[0]], small)
    assert module.table(4000, "cpu")[0] is large


def test_the_table_is_float32_in_a_narrow_module_and_under_a_default_dtype():
    module = RotaryEmbedding(8).to(torch.bfloat16)
    torch.set_default_dtype(torch.float64)
    try:
        cos, _ = module.table(300, "cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    assert cos.dtype == torch.float32
    assert torch.equal(cos, RotaryEmbedding(8).table(300, "cpu")[0])


def test_a_table_made_in_inference_mode_serves_training():
    module = RotaryEmbedding(8)
    with torch.inference_mode():
        module(torch.randn(1, 4, 2, 8))
    x = torch.randn(1, 4, 2, 8, requires_grad=True)
    module(x).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach(), msg="a rotation keeps the length")


def test_it_is_not_part_of_a_state_dict_nor_of_a_pickle():
    module = RotaryEmbedding(64)
    module.table(4096, "cpu")
    assert module.state_dict() == {}
    assert module.__getstate__()["_tables"] == {}


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
def test_positions_and_offset_say_the_same(interleaved):
    module = RotaryEmbedding(8, interleaved=interleaved)
    x = torch.randn(2, 5, 3, 8)
    positions = (torch.arange(5) + 700).expand(2, 5)
    assert torch.equal(module(x, positions), module(x, position_offset=700))


def test_partial_rotation_leaves_the_other_features():
    module = RotaryEmbedding(8, rope_parameters={"partial_rotary_factor": 0.5})
    x = torch.randn(1, 6, 2, 8)
    out = module(x)
    assert torch.equal(out[..., 4:], x[..., 4:])
    assert not torch.equal(out[:, 1:, :, :4], x[:, 1:, :, :4])


def test_scores_depend_on_the_distance_alone():
    module = RotaryEmbedding(16)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(i, j):
        return (module(q, position_offset=i) * module(k, position_offset=j)).sum()

    torch.testing.assert_close(score(3, 1), score(503, 501), rtol=1e-4, atol=1e-4)


def test_explicit_frequencies_are_those_that_are_listed():
    listed = RotaryEmbedding(16, 4096, LLAMA3).inv_freq
    rule = {"rope_type": "explicit", "inverse_frequencies": listed.tolist()}
    module = RotaryEmbedding(16, rope_parameters=rule)
    assert torch.equal(module.inv_freq, listed)
    for held, expected in zip(
        module.table(9, "cpu"), RotaryEmbedding(16, 4096, LLAMA3).table(9, "cpu")
    ):
        assert torch.equal(held, expected)


@pytest.mark.parametrize(
    ("head_dim", "rule", "message"),
    [
        (8, {"rope_type": "longrope"}, "rope_type: expected one of default, .* got 'longrope'"),
        (8, {"rope_type": "linear"}, "rope_type 'linear' needs factor"),
        (8, {"rope_type": "llama3", "factor": 8.0}, "needs low_freq_factor, high_freq_factor"),
        (8, {"rope_type": "explicit"}, "rope_type 'explicit' needs inverse_frequencies"),
        (
            8,
            {"rope_type": "explicit", "inverse_frequencies": [1.0, 0.5]},
            "inverse_frequencies: expected 4 numbers, got 2",
        ),
        (7, {}, "rotary dimension: expected a positive even number, got 7"),
    ],
    ids=["unknown", "factor", "llama3", "explicit", "explicit count", "odd"],
)
def test_wrong_parameters_are_named_when_the_module_is_made(head_dim, rule, message):
    with pytest.raises(ValueError, match=message):
        RotaryEmbedding(head_dim, rope_parameters=rule)
