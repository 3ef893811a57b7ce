"""Llama against transformers' LlamaForCausalLM with the same random weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from warploom.models.llama import Llama
from warploom.models.llama_config import LlamaConfig

from tests.models.tiny_llama import ROPE, tiny_llama


def loss(logits, ids):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


@pytest.mark.parametrize("rope", ROPE)
def test_logits_equal_transformers_to_1e_5(pair, rope):
    peer, ours = pair(rope)
    ids = torch.randint(0, 192, (2, 120))
    torch.testing.assert_close(ours(ids), peer(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True},
        {"head_dim": 24},
    ],
    ids=["mha", "mqa", "biases", "tied", "wide-heads"],
)
def test_logits_equal_transformers_for_every_shape(pair, changes):
    peer, ours = pair("yarn", **changes)
    ids = torch.randint(0, 192, (2, 50))
    torch.testing.assert_close(ours(ids), peer(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rope", ["llama3", "yarn"])
def test_gradients_equal_transformers(pair, rope):
    peer, ours = pair(rope)
    ids = torch.randint(0, 192, (2, 70))
    loss(peer(ids).logits, ids).backward()
    loss(ours(ids), ids).backward()
    expected = dict(peer.named_parameters())
    assert expected.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        reference = expected[name].grad
        torch.testing.assert_close(
            parameter.grad, reference, rtol=1e-4, atol=1e-5 * reference.abs().max().item(), msg=name
        )


@pytest.mark.parametrize("rope", ["llama3", "yarn", "default"])
def test_64_greedy_tokens_equal_transformers(pair, rope):
    peer, ours = pair(rope)
    ids = torch.randint(0, 192, (3, 37))
    expected = peer.generate(ids, max_new_tokens=64, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(ids, max_new_tokens=64), expected)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama-7b", 6_738_415_616),
        ("llama-13b", 13_015_864_320),
        ("llama-30b", 32_528_943_616),
        ("llama-65b", 65_285_660_672),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3.1-405b", 405_853_388_800),
        ("llama-3.2-1b", 1_235_814_400),
    ],
)
def test_published_sizes_have_the_published_parameter_counts(name, count):
    model = Llama(LlamaConfig.preset(name), device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_padding_behind_a_row_changes_nothing_before_it():
    model = tiny_llama()
    ids = torch.randint(0, 192, (1, 20))
    padded = torch.cat((ids, torch.full((1, 7), 5)), 1)
    torch.testing.assert_close(model(padded)[:, :20], model(ids), rtol=0, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("window", [None, 6])
def test_packed_documents_give_the_loss_and_gradients_of_documents_alone(window, checkpointing):
    model = tiny_llama(model_type="mistral", sliding_window=window)
    model.gradient_checkpointing = checkpointing
    documents = [torch.randint(0, 192, (1, length)) for length in (13, 2, 30, 5)]
    cu_seqlens = torch.tensor([0, 13, 15, 45, 50], dtype=torch.int32)
    packed = model(torch.cat(documents, 1).view(2, 25), cu_seqlens=cu_seqlens, max_seqlen=30)
    alone = [model(ids) for ids in documents]
    torch.testing.assert_close(packed.view(1, 50, 192), torch.cat(alone, 1), rtol=0, atol=1e-5)
    losses = [
        [loss(logits, ids) for logits, ids in zip(parts, documents, strict=True)]
        for parts in (packed.view(1, 50, 192).split([13, 2, 30, 5], 1), alone)
    ]
    gradients = [torch.autograd.grad(sum(parts), [*model.parameters()]) for parts in losses]
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16-autocast"])
def test_gradient_checkpointing_gives_the_same_gradients(autocast):
    model, ids = tiny_llama(), torch.randint(0, 192, (2, 20))
    gradients = []
    for switch in (False, True):
        model.gradient_checkpointing = switch
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(model(ids), ids)
        value.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for kept, recomputed in zip(*gradients, strict=True):
        assert torch.equal(kept, recomputed)


def test_gradient_checkpointing_runs_every_layer_twice():
    calls = []
    for switch, expected in ((False, 2), (True, 4)):
        model, ids = tiny_llama(), torch.randint(0, 192, (1, 8))
        model.gradient_checkpointing = switch
        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        loss(model(ids), ids).backward()
        assert len(calls) == expected
        calls.clear()


def test_the_residual_stream_stays_float32_under_autocast():
    model, ids = tiny_llama(), torch.randint(0, 192, (1, 8))
    seen = []
    model.model.norm.register_forward_hook(lambda _, args, out: seen.append(out[1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(ids).dtype == torch.bfloat16
    assert seen == [torch.float32]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_forward_and_backward_compile_without_a_graph_break(checkpointing):
    torch._dynamo.reset()
    model, ids = tiny_llama(), torch.randint(0, 192, (2, 20))
    expected = torch.autograd.grad(loss(model(ids), ids), [*model.parameters()])
    model.gradient_checkpointing = checkpointing
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(loss(compiled(ids), ids), [*model.parameters()])
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)


def test_training_works_after_a_forward_in_inference_mode():
    model, ids = tiny_llama(), torch.randint(0, 192, (1, 8))
    with torch.inference_mode():
        model(ids)
    loss(model(ids), ids).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_deepcopy_pickle_and_state_dict_keep_the_function(tied):
    model, ids = tiny_llama(tie_word_embeddings=tied), torch.randint(0, 192, (2, 9))
    expected = model(ids)
    fresh = tiny_llama(tie_word_embeddings=tied, initializer_range=0.5)
    fresh.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        assert torch.equal(other(ids), expected)
        assert (other.lm_head.weight is other.model.embed_tokens.weight) == tied


def test_to_bfloat16_and_back_changes_the_weights_alone():
    model, ids = tiny_llama(), torch.randint(0, 192, (1, 200))
    model(ids)
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    assert narrow(ids).dtype == torch.bfloat16
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.bfloat16())
    assert torch.equal(narrow.float()(ids), rounded(ids))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=["no-rows", "no-tokens"])
def test_empty_batches_give_empty_logits(shape):
    assert tiny_llama()(torch.zeros(shape, dtype=torch.int64)).shape == (*shape, 192)


@pytest.mark.parametrize(
    "ids", [torch.zeros(3, dtype=torch.int64), torch.zeros(1, 3)], ids=["1-d", "float32"]
)
def test_wrong_input_ids_are_named(ids):
    with pytest.raises(ValueError, match=r"Llama: input_ids: expected .*\[batch, sequence\], got"):
        tiny_llama()(ids)
