"""DeepseekV2 against transformers' DeepseekV2ForCausalLM and DeepseekV3ForCausalLM, same random weights."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from torch._dynamo.testing import CompileCounterWithBackend
from warploom.models.checkpoint import CheckpointError
from warploom.models.deepseek_v2 import DeepseekV2
from warploom.models.deepseek_v2_config import DeepseekV2Config

from tests.models.tiny_deepseek import VARIANTS, pair, tiny_deepseek

every_variant = pytest.mark.parametrize("variant", VARIANTS)
transformers.utils.logging.disable_progress_bar()


def loss(logits, ids):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


@every_variant
def test_logits_equal_transformers_to_1e_5(tmp_path, variant):
    peer, ours = pair(variant, tmp_path)
    ids = torch.randint(0, 192, (2, 70))
    torch.testing.assert_close(ours(ids), peer(ids).logits, rtol=0, atol=1e-5)


@every_variant
def test_gradients_equal_transformers(tmp_path, variant):
    peer, ours = pair(variant, tmp_path)
    ids = torch.randint(0, 192, (2, 50))
    loss(peer(ids).logits, ids).backward()
    loss(ours(ids), ids).backward()
    expected = dict(peer.named_parameters())
    assert expected.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        reference = expected[name].grad
        torch.testing.assert_close(
            parameter.grad, reference, rtol=1e-4, atol=1e-5 * reference.abs().max().item(), msg=name
        )


@every_variant
@pytest.mark.parametrize("cache", ["paged", "static"])
def test_64_greedy_tokens_equal_transformers(tmp_path, variant, cache):
    peer, ours = pair(variant, tmp_path)
    ids = torch.randint(1, 192, (3, 37))  # transformers takes 0 for padding
    expected = peer.generate(ids, max_new_tokens=64, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(ids, max_new_tokens=64, cache=cache), expected)


@pytest.mark.parametrize("variant", ["v2", "v3"])
def test_a_saved_directory_opens_in_transformers_and_here(tmp_path, variant):
    peer, ours = pair(variant, tmp_path / "peer")
    ours.save_pretrained(tmp_path / "ours", max_shard_size="100KB")
    again = DeepseekV2.from_pretrained(tmp_path / "ours")
    theirs = type(peer).from_pretrained(tmp_path / "ours")
    ids = torch.randint(0, 192, (2, 20))
    for one, two in (
        (ours.state_dict(), again.state_dict()),
        (peer.state_dict(), theirs.state_dict()),
    ):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
    torch.testing.assert_close(theirs(ids).logits, again(ids), rtol=0, atol=1e-5)


def test_experts_are_tensors_of_their_own_on_disk(tmp_path):
    tiny_deepseek().save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = {*file.keys()}
        assert "model.layers.1.mlp.experts.7.down_proj.weight" in names
        up = file.get_tensor("model.layers.1.mlp.experts.3.up_proj.weight")
    model = DeepseekV2.from_pretrained(tmp_path)
    assert torch.equal(model.model.layers[1].mlp.experts.gate_up_proj[3, 24:], up)
    assert not any("gate_up_proj" in name for name in names)


def test_a_missing_expert_is_named(tmp_path):
    tiny_deepseek().save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del tensors["model.layers.1.mlp.experts.5.down_proj.weight"]
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"missing tensors: model\.layers\.1\.mlp\.experts\.down_proj"
    ):
        DeepseekV2.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("deepseek-v2", 235_741_434_880, 21.4e9),
        ("deepseek-v2-lite", 15_706_484_224, 2.66e9),
        ("deepseek-v3", 671_026_419_200, 37.6e9),
    ],
)
def test_published_parameter_counts(name, total, active):
    """Correction biases included; V3's multi-token-prediction layer, which its files have beside, is not."""
    model = DeepseekV2(DeepseekV2Config.preset(name), device="meta")
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == total
    config = model.config
    visited = config.num_experts_per_tok / config.n_routed_experts
    per_token = sum(
        parameter.numel() * (visited if ".experts." in path else 1)
        for path, parameter in model.named_parameters()
    )
    assert per_token == pytest.approx(active, rel=0.01)


def test_packed_documents_do_not_see_each_other():
    model = tiny_deepseek().eval()
    first, second = torch.randint(0, 192, (1, 9)), torch.randint(0, 192, (1, 14))
    bounds = torch.tensor([0, 9, 23], dtype=torch.int32)
    packed = model(torch.cat((first, second), 1), cu_seqlens=bounds, max_seqlen=14)
    torch.testing.assert_close(packed[:, :9], model(first), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed[:, 9:], model(second), rtol=1e-4, atol=1e-5)


def test_a_row_does_not_depend_on_its_batch():
    model = tiny_deepseek().eval()
    prompts = [torch.randint(0, 192, (length,)).tolist() for length in (5, 30, 11)]
    together = model.generate(prompts, max_new_tokens=12)
    assert together == [model.generate([prompt], max_new_tokens=12)[0] for prompt in prompts]


def test_compiled_decoding_is_one_graph_for_all_steps():
    torch._dynamo.reset()
    model = tiny_deepseek(initializer_range=0.3).eval()
    prompts = [torch.randint(0, 192, (length,)).tolist() for length in (5, 30, 11)]
    counter = CompileCounterWithBackend("aot_eager")
    expected = model.generate(prompts, max_new_tokens=12)
    model.model.compile(fullgraph=True, backend=counter)
    for _ in range(2):
        assert model.generate(prompts, max_new_tokens=12, cache="static") == expected
        assert counter.frame_count == 2  # the prompts, and every step after them


@pytest.mark.parametrize("cache", ["paged", "static"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float8_e4m3fn, 0.1), (torch.int8, 0.03)])
@torch.no_grad()
def test_generation_from_compressed_latents(cache, dtype, bound):
    model, ids = tiny_deepseek().eval(), torch.randint(0, 192, (2, 40))
    exact = model(ids)[:, 30:]
    model.cache_dtype = dtype
    held = model.make_cache(cache, 2, 40)
    model(ids[:, :30], held)
    held.advance(30)
    error = model(ids[:, 30:], held) - exact
    assert 0 < error.square().mean().sqrt() < bound * exact.square().mean().sqrt()
    assert model.generate(ids, max_new_tokens=3, cache=cache).shape == (2, 43)


def test_gradient_checkpointing_changes_nothing():
    model, ids = (
        tiny_deepseek(balance_alphas=(0.1, 0.0, 0.0)).train(),
        torch.randint(0, 192, (2, 12)),
    )
    loss(model(ids), ids).backward()
    plain = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing = True
    loss(model(ids), ids).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name])


def test_a_config_that_is_not_served_is_refused(tmp_path):
    tiny_deepseek().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for name, value in (("hidden_act", "gelu"), ("model_type", "llama"), ("topk_method", "random")):
        path.write_text(json.dumps({**values, name: value}))
        with pytest.raises(CheckpointError, match=name):
            DeepseekV2.from_pretrained(tmp_path)
