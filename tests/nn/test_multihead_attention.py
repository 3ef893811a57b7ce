"""warploom.nn.MultiheadAttention against torch.nn.MultiheadAttention with the same weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from warploom.nn import MultiheadAttention

SIZE, HEADS, BATCH, QUERIES, KEYS = 24, 4, 3, 5, 7

SHAPES = {
    "plain": {},
    "batch-first": {"batch_first": True},
    "no-bias": {"bias": False},
    "key-value-dims": {"kdim": 10, "vdim": 14, "batch_first": True},
    "key-dim-no-bias": {"kdim": 10, "bias": False},
    "bias-key-value": {"add_bias_kv": True},
    "zero-key": {"add_zero_attn": True, "batch_first": True},
    "everything": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 10, "batch_first": True},
}


def make_pair(**options):
    """torch's module and ours with its weights, biases random too, in float64."""
    options = {"dtype": torch.float64, **options}
    peer, ours = (
        nn.MultiheadAttention(SIZE, HEADS, **options),
        MultiheadAttention(SIZE, HEADS, **options),
    )
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.normal_(0, 0.4)
    ours.load_state_dict(peer.state_dict())
    return peer, ours


def make_inputs(module, batched=True, keys=KEYS):
    sizes = ((QUERIES, SIZE), (keys, module.kdim), (keys, module.vdim))
    dtype = module.out_proj.weight.dtype
    if not batched:
        return [torch.randn(rows, size, dtype=dtype) for rows, size in sizes]
    inputs = [torch.randn(BATCH, rows, size, dtype=dtype) for rows, size in sizes]
    return inputs if module.batch_first else [x.transpose(0, 1).contiguous() for x in inputs]


def make_masks(name, batched=True, keys=KEYS):
    """The mask arguments of a case; no query is left without a key."""
    hidden = torch.rand(QUERIES, keys) < 0.4
    hidden[:, 0] = False
    each = torch.rand((BATCH if batched else 1) * HEADS, QUERIES, keys) < 0.4
    each[..., 0] = False
    padding = torch.zeros(BATCH, keys, dtype=torch.bool)
    padding[0, 2:], padding[1, -1:] = True, True
    padding = padding if batched else padding[0]
    rows = torch.zeros(padding.shape, dtype=torch.float64).masked_fill(padding, -torch.inf)
    added = torch.randn(QUERIES, keys, dtype=torch.float64)
    return {
        "none": {},
        "bool-2d": {"attn_mask": hidden},
        "float-2d": {"attn_mask": added},
        "bool-3d": {"attn_mask": each},
        "float-3d": {"attn_mask": torch.randn(each.shape, dtype=torch.float64)},
        "padding": {"key_padding_mask": padding},
        "float-padding": {"key_padding_mask": rows + 0.5},
        "both": {"attn_mask": hidden, "key_padding_mask": padding},
        "both-float": {"attn_mask": added, "key_padding_mask": rows - 0.25},
    }[name]


MASKS = ["none", "bool-2d", "float-2d", "bool-3d", "float-3d", "padding", "float-padding", "both",
         "both-float"]  # fmt: skip


def run(module, inputs, **arguments):
    """out, weights, and the gradients of the inputs, of a floating attn_mask and of the parameters."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    mask = arguments.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        arguments["attn_mask"] = mask.clone().requires_grad_()
        leaves.append(arguments["attn_mask"])
    out, weights = module(*leaves[:3], **arguments)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    loss = (out * upstream).sum()
    if weights is not None:
        loss = loss + (weights * weights.detach().cos()).sum()
    grads = torch.autograd.grad(loss, [*leaves, *module.parameters()])
    return [out, *([] if weights is None else [weights]), *grads]


def assert_equal_results(peer, ours, inputs, **arguments):
    for actual, expected in zip(
        run(ours, inputs, **arguments), run(peer, inputs, **arguments), strict=True
    ):
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("need_weights", [False, True], ids=["fused", "weights"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_equal_torch(shape, mask, need_weights):
    peer, ours = make_pair(**SHAPES[shape])
    arguments = {**make_masks(mask), "need_weights": need_weights}
    assert_equal_results(peer, ours, make_inputs(ours), **arguments)


@pytest.mark.parametrize("need_weights", [False, True], ids=["fused", "weights"])
@pytest.mark.parametrize("mask", MASKS)
def test_inputs_without_a_batch_equal_torch(mask, need_weights):
    peer, ours = make_pair(add_bias_kv=True, batch_first=True)
    arguments = {**make_masks(mask, batched=False), "need_weights": need_weights}
    assert_equal_results(peer, ours, make_inputs(ours, batched=False), **arguments)


@pytest.mark.parametrize("average", [False, True], ids=["per-head", "average"])
@pytest.mark.parametrize("batched", [False, True])
def test_weights_equal_torch(average, batched):
    peer, ours = make_pair(add_zero_attn=True)
    inputs = make_inputs(ours, batched)
    assert_equal_results(peer, ours, inputs, average_attn_weights=average)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("need_weights", [False, True], ids=["fused", "weights"])
@pytest.mark.parametrize("shape", ["batch-first", "bias-key-value", "zero-key"])
@pytest.mark.parametrize("keys", [QUERIES, KEYS])
def test_the_causal_hint_changes_no_result(shape, keys, need_weights, padded):
    peer, ours = make_pair(**SHAPES[shape])
    mask = torch.ones(QUERIES, keys, dtype=torch.bool).triu(1)
    arguments = {"attn_mask": mask, "need_weights": need_weights}
    if padded:
        arguments["key_padding_mask"] = make_masks("padding", keys=keys)["key_padding_mask"]
    inputs = make_inputs(ours, keys=keys)
    expected = run(peer, inputs, **arguments)
    actual = run(ours, inputs, is_causal=True, **arguments)
    for ours_, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("same", ["all", "key-value"])
def test_inputs_that_are_one_tensor_equal_torch(same):
    peer, ours = make_pair(batch_first=True)
    x, y = torch.randn(2, BATCH, QUERIES, SIZE, dtype=torch.float64)
    inputs = (x, x, x) if same == "all" else (x, y, y)
    for module in (peer, ours):
        module.eval()
    for need_weights in (False, True):
        torch.testing.assert_close(
            ours(*inputs, need_weights=need_weights), peer(*inputs, need_weights=need_weights)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("need_weights", [False, True], ids=["fused", "weights"])
def test_every_dtype_is_as_close_to_float64_as_torch(dtype, need_weights):
    exact, _ = make_pair(batch_first=True)
    exact = exact.to(dtype).double()
    peer, ours = make_pair(batch_first=True, dtype=dtype)
    for module in (peer, ours):
        module.load_state_dict(exact.state_dict())
    inputs = make_inputs(ours)
    mask = make_masks("bool-2d")["attn_mask"]
    expected, _ = exact(*(x.double() for x in inputs), attn_mask=mask)
    errors = []
    for module in (ours, peer):
        out, _ = module(*inputs, attn_mask=mask, need_weights=need_weights)
        assert out.dtype == dtype
        errors.append((out.double() - expected).abs().max().item())
    assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps * expected.abs().max().item()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_initial_weights_are_those_of_torch(shape):
    states = []
    for kind in (nn.MultiheadAttention, MultiheadAttention):
        torch.manual_seed(3)
        states.append(kind(SIZE, HEADS, **SHAPES[shape]).state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("need_weights", [False, True], ids=["fused", "weights"])
def test_a_query_whose_keys_are_all_hidden_attends_to_nothing(need_weights):
    _, ours = make_pair(batch_first=True)
    query, key, value = make_inputs(ours)
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[1] = True
    out, weights = ours(query, key, value, key_padding_mask=padding, need_weights=need_weights)
    torch.testing.assert_close(out[1], ours.out_proj.bias.expand(QUERIES, SIZE))
    assert weights is None or (weights[1] == 0).all()
    assert torch.isfinite(torch.autograd.grad(out.sum(), ours.in_proj_weight)[0]).all()


@pytest.mark.parametrize("need_weights", [False, True], ids=["fused", "weights"])
def test_dropout_drops_in_training_alone(need_weights):
    _, ours = make_pair(dropout=0.5)
    inputs = make_inputs(ours)
    first, second = (ours(*inputs, need_weights=need_weights)[0] for _ in range(2))
    assert not torch.equal(first, second)
    repeated = []
    for _ in range(2):
        torch.manual_seed(5)
        repeated.append(ours(*inputs, need_weights=need_weights)[0])
    assert torch.equal(*repeated)
    peer, _ = make_pair()
    peer.load_state_dict(ours.state_dict())
    ours.eval()
    torch.testing.assert_close(
        ours(*inputs, need_weights=need_weights)[0], peer(*inputs)[0], rtol=1e-10, atol=1e-11
    )


def test_dropped_weights_are_those_that_made_the_output():
    _, ours = make_pair(dropout=0.5, batch_first=True)
    query, key, value = make_inputs(ours)
    out, weights = ours(query, key, value, average_attn_weights=False)
    assert (weights == 0).any()
    v = nn.functional.linear(value, ours.in_proj_weight[2 * SIZE :], ours.in_proj_bias[2 * SIZE :])
    heads = weights @ v.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    torch.testing.assert_close(out, ours.out_proj(heads.transpose(1, 2).flatten(2)))


# ---------------------------------------------------------------- the module's life


@pytest.mark.parametrize("shape", SHAPES)
def test_copies_keep_the_function(shape):
    _, ours = make_pair(**SHAPES[shape])
    inputs = make_inputs(ours)
    expected = ours(*inputs, need_weights=False)[0]
    empty = MultiheadAttention(SIZE, HEADS, device="meta", **SHAPES[shape])
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.load_state_dict(ours.state_dict(), assign=True)
    with torch.device("meta"):
        context = MultiheadAttention(SIZE, HEADS, dtype=torch.float64, **SHAPES[shape])
    context.to_empty(device="cpu").load_state_dict(ours.state_dict())
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), empty, context):
        assert type(other) is MultiheadAttention
        assert torch.equal(other(*inputs, need_weights=False)[0], expected)


def test_to_another_dtype():
    _, ours = make_pair()
    inputs = make_inputs(ours)
    expected = ours(*inputs)[0]
    narrow = ours.to(torch.float32)(*(x.float() for x in inputs))[0]
    torch.testing.assert_close(narrow.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("need_weights", [False, True], ids=["fused", "weights"])
@pytest.mark.parametrize("shape", ["plain", "everything"])
def test_it_compiles_without_a_graph_break(shape, need_weights):
    torch._dynamo.reset()
    _, ours = make_pair(**SHAPES[shape])
    inputs, masks = make_inputs(ours), make_masks("both")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=False)
    actual = run(compiled, inputs, need_weights=need_weights, **masks)
    expected = run(ours, inputs, need_weights=need_weights, **masks)
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-11)


def test_a_transformer_layer_of_torch_trains_on_it():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(SIZE, HEADS, 32, 0.0, batch_first=True, dtype=torch.float64)
    ours = copy.deepcopy(layer)
    for name in ("self_attn", "multihead_attn"):
        module = MultiheadAttention(SIZE, HEADS, batch_first=True, dtype=torch.float64)
        module.load_state_dict(getattr(layer, name).state_dict())
        setattr(ours, name, module)
    x, memory = torch.randn(2, BATCH, QUERIES, SIZE, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(QUERIES, dtype=torch.float64)
    results = []
    for one in (ours, layer):
        out = one(x, memory, tgt_mask=mask, tgt_is_causal=True)
        results.append([out, *torch.autograd.grad(out.square().sum(), [*one.parameters()])])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.ones(2, 3, 5)}, r"query: expected 2 or 3 dimensions, the last of 24"),
        ({"key": torch.ones(4, 24)}, r"key: expected 3 dimensions, the last of 24, got \(4, 24\)"),
        ({"key": torch.ones(2, 4, 24)}, r"key: expected query's batch size 3, got 2"),
        ({"value": torch.ones(3, 4, 24)}, r"value: expected key's .* \(3, 7\), got \(3, 4\)"),
        (
            {"attn_mask": torch.ones(5, 6)},
            r"attn_mask: expected shape \(5, 7\) or \(12, 5, 7\), got",
        ),
        ({"attn_mask": torch.ones(5, 7).long()}, "attn_mask: expected a bool or floating tensor"),
        ({"key_padding_mask": torch.ones(2, 7)}, r"key_padding_mask: expected shape \(3, 7\)"),
        ({"is_causal": True}, "attn_mask: expected the causal mask beside is_causal, got None"),
        (
            {"query": torch.nested.nested_tensor([torch.ones(2, 24), torch.ones(3, 24)])},
            "query: expected a dense tensor, got a nested one",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(change, message):
    module = MultiheadAttention(SIZE, HEADS, batch_first=True)
    arguments = dict(zip(("query", "key", "value"), make_inputs(module), strict=True))
    with pytest.raises(ValueError, match=f"MultiheadAttention: {message}"):
        module(**{**arguments, **change})
