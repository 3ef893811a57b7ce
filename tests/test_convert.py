"""Conversions of a Llama's attention: exact where they say so, the best of their rank elsewhere."""

from __future__ import annotations

import itertools

import pytest
import torch
from warploom.convert import gqa_to_mla, mha_to_gqa
from warploom.convert._factors import joint_factors, keep_pairs, moment_roots, separate_pairs
from warploom.models.auto import load_model
from warploom.models.deepseek_v2 import DeepseekV2

from tests.models.tiny_llama import ROPE, tiny_llama

#: Two key/value heads of two query heads each, weights that make attention attend.
SHAPE = {"hidden_size": 64, "head_dim": 16, "initializer_range": 0.2}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def llama(dtype=torch.float64, **changes):
    return tiny_llama(**{**SHAPE, **changes}).to(dtype).eval()


def tokens(*shape):
    return torch.randint(0, 192, shape, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def error(model, changed):
    """The largest of the logits, by their size."""
    expected, got = model(tokens(3, 40)), changed(tokens(3, 40))
    return ((got - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def distance(model, changed):
    """Of all logits."""
    return (changed(tokens(3, 40)) - model(tokens(3, 40))).norm().item()


# ---------------------------------------------------------------- grouped-query attention


def test_a_groups_head_is_the_mean_of_its_heads():
    model = llama(num_key_value_heads=4, attention_bias=True)
    changed = mha_to_gqa(model, 2)
    assert changed.config.num_key_value_heads == 2
    expected = model.state_dict()
    for name, tensor in changed.state_dict().items():
        if ".k_proj." in name or ".v_proj." in name:
            heads = expected[name].unflatten(0, (4, 16))
            pairs = [(heads[0] + heads[1]) / 2, (heads[2] + heads[3]) / 2]
            torch.testing.assert_close(tensor, torch.cat(pairs), rtol=1e-14, atol=1e-14)
        else:
            assert torch.equal(tensor, expected[name])


@torch.no_grad()
def test_pooling_equal_heads_changes_nothing():
    model = llama()
    wide = mha_to_gqa(model, 2)
    for layer in wide.model.layers:
        for project in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            project.weight.copy_(project.weight[:16].repeat(2, 1))
    assert error(wide, mha_to_gqa(wide, 1)) < 1e-12
    assert error(model, mha_to_gqa(model, 2)) == 0


# ---------------------------------------------------------------- latent attention, exact


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("rope", ["default", "linear", "llama3"])
def test_all_pairs_and_the_full_rank_are_exact(rope, heads, dtype):
    model = llama(dtype, num_key_value_heads=heads, rope_parameters=ROPE[rope])
    changed = gqa_to_mla(model)
    assert changed.config.qk_rope_head_dim == 16 * heads
    assert changed.config.kv_lora_rank == 16 * heads
    assert error(model, changed) < TOLERANCE[dtype]
    assert error(model, gqa_to_mla(model, calibration=tokens(2, 9))) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True, "mlp_bias": True},
        {"rope_parameters": {**ROPE["default"], "partial_rotary_factor": 0.5}},
        {"head_dim": 10},
        {"head_dim": 24, "hidden_size": 20, "num_key_value_heads": 4},
    ],
    ids=["tied", "partly rotated", "small heads", "more heads than input"],
)
def test_other_shapes_are_exact(changes):
    model = llama(**changes)
    changed = gqa_to_mla(model)
    sizes = vars(changed.config)
    assert not any(
        sizes[name] % 16 for name in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim")
    )
    assert error(model, changed) < 1e-10


def test_yarns_temperature_goes_to_the_queries():
    """Its table is rounded to float32 with the temperature, the query's weights are not."""
    model = llama(rope_parameters=ROPE["yarn"])
    assert error(model, gqa_to_mla(model)) < 1e-6


@pytest.mark.parametrize("d_rope", [16, 32, 48])
def test_pairs_that_do_not_turn_need_no_place(d_rope):
    still = {"rope_type": "explicit", "inverse_frequencies": [0.0] * 8}
    model = llama(num_key_value_heads=4, rope_parameters=still)
    changed = gqa_to_mla(model, d_rope=d_rope)
    assert changed.config.qk_rope_head_dim == d_rope
    assert error(model, changed) < 1e-10


@torch.no_grad()
def test_a_latent_of_the_weights_rank_is_enough():
    model = llama(num_key_value_heads=4)
    for layer in model.model.layers:
        attention = layer.self_attn
        low = torch.randn(16, 64, dtype=torch.float64)
        attention.v_proj.weight.copy_(0.02 * torch.randn(64, 16, dtype=torch.float64) @ low)
    assert error(model, gqa_to_mla(model, d_latent=16)) < 1e-10
    assert error(model, gqa_to_mla(model, d_latent=16, calibration=tokens(1, 20))) < 1e-10


@pytest.mark.parametrize("kind", ["paged", "static"])
def test_generation_is_the_same(kind):
    model = llama()
    prompts = [tokens(5).tolist(), tokens(11).tolist()]
    expected = model.generate(prompts, 12)
    assert gqa_to_mla(model).generate(prompts, 12, cache=kind) == expected


def test_the_directory_holds_the_same_model(tmp_path):
    model = llama(torch.float32)
    changed = gqa_to_mla(model, d_rope=16)
    changed.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert isinstance(loaded, DeepseekV2) and loaded.config == changed.config
    assert not any("kv_a_layernorm" in name for name in loaded.state_dict())
    assert torch.equal(loaded(tokens(1, 9)), changed(tokens(1, 9)))


@pytest.mark.parametrize("convert", [gqa_to_mla, lambda model: mha_to_gqa(model, 1)])
def test_the_model_is_left_alone_and_the_new_one_trains(convert):
    model = llama(torch.bfloat16).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = convert(model)
    assert changed.training and changed.lm_head.weight.dtype == torch.bfloat16
    changed(tokens(1, 9)).float().square().mean().backward()
    with torch.no_grad():
        for parameter in changed.parameters():
            assert parameter.grad is not None
            parameter.zero_()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


# ---------------------------------------------------------------- latent attention, approximate


@pytest.mark.parametrize("calibration", [None, tokens(4, 50)], ids=["weights", "activations"])
@pytest.mark.parametrize("d_rope", [None, 16])
def test_a_larger_latent_is_nearer(d_rope, calibration):
    model = llama(num_key_value_heads=4)
    whole = gqa_to_mla(model, d_rope=d_rope, calibration=calibration)
    distances = []
    for d_latent in (16, 32, 48):
        cut = gqa_to_mla(model, d_rope=d_rope, d_latent=d_latent, calibration=calibration)
        assert cut.config.kv_lora_rank == d_latent
        distances.append(distance(whole, cut))
    assert distances[0] > distances[1] > distances[2] > 0


def test_more_rotary_pairs_are_nearer():
    model = llama(num_key_value_heads=4)
    distances = [distance(model, gqa_to_mla(model, d_rope=d_rope)) for d_rope in (16, 32, 48, 64)]
    assert distances[0] > distances[1] > distances[2] > distances[3]


def test_factors_are_the_best_of_their_rank():
    keys, values = 30 * torch.randn(20, 24).double(), torch.randn(12, 24).double()
    balanced = torch.cat((keys / (keys.norm() / values.norm()), values))
    singular = torch.linalg.svdvals(balanced)
    for rank in (1, 5, 23, 24, 32):
        down, up_keys, up_values = joint_factors(keys, values, rank)
        assert down.shape == (rank, 24)
        got = torch.cat((up_keys @ down / (keys.norm() / values.norm()), up_values @ down))
        expected = singular[rank:].square().sum().sqrt()
        torch.testing.assert_close((got - balanced).norm(), expected, rtol=1e-6, atol=1e-12)


def test_factors_of_activations_are_the_best_for_these():
    inputs = torch.randn(500, 24).double() * torch.logspace(0, -3, 24).double()
    root = torch.linalg.cholesky(inputs.T @ inputs / 500)
    values = torch.randn(32, 24).double()

    def distance(*arguments):
        down, _, up = joint_factors(values[:0], values, 8, *arguments)
        return ((up @ down - values) @ inputs.T).norm() / 500**0.5

    best = torch.linalg.svdvals(values @ root)[8:].square().sum().sqrt()
    torch.testing.assert_close(distance(root), best)
    assert distance() > 3 * best


def test_the_kept_pairs_have_the_largest_sum():
    """Against every choice: for each pair how many heads keep it, in each layer its best ones."""
    scores = torch.rand(2, 3, 3, dtype=torch.float64)
    for count in (1, 4, 7):
        pair, owner = keep_pairs(scores, count)
        assert len({*zip(owner[0].tolist(), pair.tolist())}) == count
        got = sum(scores[layer, owner[layer], pair].sum() for layer in range(2))
        ranked = scores.sort(dim=1, descending=True).values
        best = max(
            sum(ranked[:, :kept, place].sum() for place, kept in enumerate(numbers))
            for numbers in itertools.product(range(4), repeat=3)
            if sum(numbers) == count
        )
        torch.testing.assert_close(got, best)


def test_kept_pairs_turn_by_their_own_frequencies():
    model = llama(num_key_value_heads=4)
    own = model.model.rotary_emb.inv_freq
    kept = gqa_to_mla(model, d_rope=32).model.rotary_emb.inv_freq
    assert len(kept) == 16 and {*kept.tolist()} <= {*own.tolist()}


def test_separated_pairs_lie_side_by_side():
    """Two key heads, 1 and 2, with features of which 0 to 5 are the pairs (0, 3), (1, 4), (2, 5)."""
    weight = torch.arange(8.0) + 10 * torch.tensor([[1.0], [2.0]])
    pair, owner = torch.tensor([0, 0, 2]), torch.tensor([1, 0, 1])
    nope, rope = separate_pairs(weight[:, None, :, None], pair, owner, 6, 7, 8)
    assert nope[:, 0, :, 0].tolist() == [[11, 12, 14, 15, 16, 17, 0], [21, 24, 26, 27, 0, 0, 0]]
    assert rope[:, 0, :, 0].tolist() == [
        [0, 0, 10, 13, 0, 0, 0, 0],
        [20, 23, 0, 0, 22, 25, 0, 0],
    ]


@torch.no_grad()
def test_moments_are_those_of_each_layers_input():
    model, ids = llama(), tokens(3, 50)
    roots = moment_roots(model, ids)
    first = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids)).flatten(0, 1)
    torch.testing.assert_close(roots[0] @ roots[0].T, first.T @ first / 150, rtol=1e-3, atol=1e-3)
    assert len(roots) == 2 and not torch.allclose(roots[0], roots[1])
    assert not any(layer.self_attn._forward_pre_hooks for layer in model.model.layers)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"attention_bias": True}, {}, "attention_bias: expected false, got true"),
        ({"model_type": "qwen3"}, {}, "expected one without norms of q and k, got 'qwen3'"),
        (
            {"model_type": "mistral", "sliding_window": 8},
            {},
            "sliding_window: expected None, got 8",
        ),
        ({"rope_parameters": ROPE["dynamic"]}, {}, "rope_type: expected .*, got 'dynamic'"),
        ({}, {"d_latent": 0}, "d_latent: expected 1 or more, got 0"),
        ({}, {"d_rope": 0}, "d_rope: expected 1 or more, got 0"),
        ({}, {"calibration": torch.zeros(5)}, r"calibration: expected .*, got \(5,\)"),
    ],
)
def test_what_latents_have_no_place_for_is_named(changes, options, message):
    with pytest.raises(ValueError, match=message):
        gqa_to_mla(llama(**changes), **options)


@pytest.mark.parametrize("heads", [0, 3, 8])
def test_groups_must_divide_the_heads(heads):
    with pytest.raises(
        ValueError, match=f"num_key_value_heads: expected a divisor of 4, got {heads}"
    ):
        mha_to_gqa(llama(num_key_value_heads=4), heads)
