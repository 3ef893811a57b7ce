"""Every module of warploom.nn against the class whose constructor and state dict it has."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from warploom.nn import (
    GroupedQueryAttention,
    LayerNorm,
    PagedKeyValueCache,
    RMSNorm,
    RotaryEmbedding,
    SwiGLU,
)

HIDDEN, HEADS, KEY_VALUE_HEADS, DIM = 32, 4, 2, 8
ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


WINDOW = 2  # keys before a token that it sees in the cases with a window


def peer_config(family: type = transformers.LlamaConfig, **changes: Any) -> Any:
    config = family(
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        head_dim=DIM,
        max_position_embeddings=64,
        rope_parameters={"rope_theta": 10000.0, **ROPE},
        **changes,
    )
    config._attn_implementation = "eager"
    return config


def peer_attention(x: torch.Tensor, peer: nn.Module) -> torch.Tensor:
    """transformers' attention layer with its rotary table and a causal mask."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    length = x.shape[1]
    tables = LlamaRotaryEmbedding(peer_config())(x, torch.arange(length)[None])
    if isinstance(peer, GptOssAttention):
        tables = tuple(table[..., : DIM // 2] for table in tables)
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    if getattr(peer, "sliding_window", None):
        hidden |= torch.ones_like(hidden).tril(-peer.sliding_window)
    mask = torch.zeros(length, length, dtype=x.dtype).masked_fill(hidden, -torch.inf)[None, None]
    return peer(x, position_embeddings=tables, attention_mask=mask)[0]


def our_attention(x: torch.Tensor, module: GroupedQueryAttention) -> torch.Tensor:
    rotary = RotaryEmbedding(DIM, 64, ROPE)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return module(x, rotary.table(x.shape[1], x.device, wide))


def apply(x: torch.Tensor, module: nn.Module) -> torch.Tensor:
    return module(x)


@dataclass(frozen=True)
class Case:
    make: Any  # (**factory) -> module
    make_peer: Any  # () -> the class that it replaces, or None
    call: Any = apply
    call_peer: Any = apply
    shape: tuple[int, ...] = (2, 5, HIDDEN)


CASES = {
    "RMSNorm": Case(lambda **f: RMSNorm(HIDDEN, 1e-3, **f), lambda: nn.RMSNorm(HIDDEN, 1e-3)),
    "RMSNorm-default-eps": Case(lambda **f: RMSNorm(HIDDEN, **f), lambda: nn.RMSNorm(HIDDEN)),
    "RMSNorm-two-dims": Case(
        lambda **f: RMSNorm((5, HIDDEN), **f), lambda: nn.RMSNorm((5, HIDDEN))
    ),
    "RMSNorm-no-weight": Case(
        lambda **f: RMSNorm(HIDDEN, elementwise_affine=False, **f),
        lambda: nn.RMSNorm(HIDDEN, elementwise_affine=False),
    ),
    "LayerNorm": Case(lambda **f: LayerNorm(HIDDEN, **f), lambda: nn.LayerNorm(HIDDEN)),
    "LayerNorm-two-dims": Case(
        lambda **f: LayerNorm([5, HIDDEN], **f), lambda: nn.LayerNorm([5, HIDDEN])
    ),
    "LayerNorm-no-bias": Case(
        lambda **f: LayerNorm(HIDDEN, bias=False, **f), lambda: nn.LayerNorm(HIDDEN, bias=False)
    ),
    "LayerNorm-no-weight": Case(
        lambda **f: LayerNorm(HIDDEN, elementwise_affine=False, **f),
        lambda: nn.LayerNorm(HIDDEN, elementwise_affine=False),
    ),
    "SwiGLU": Case(lambda **f: SwiGLU(HIDDEN, 48, **f), lambda: LlamaMLP(peer_config())),
    "SwiGLU-bias": Case(
        lambda **f: SwiGLU(HIDDEN, 48, bias=True, **f),
        lambda: LlamaMLP(peer_config(mlp_bias=True)),
    ),
    "GroupedQueryAttention": Case(
        lambda **f: GroupedQueryAttention(HIDDEN, HEADS, KEY_VALUE_HEADS, **f),
        lambda: LlamaAttention(peer_config(), 0),
        our_attention,
        peer_attention,
    ),
    "GroupedQueryAttention-bias": Case(
        lambda **f: GroupedQueryAttention(HIDDEN, HEADS, KEY_VALUE_HEADS, bias=True, **f),
        lambda: LlamaAttention(peer_config(attention_bias=True), 0),
        our_attention,
        peer_attention,
    ),
    "GroupedQueryAttention-qk-norm": Case(
        lambda **f: GroupedQueryAttention(HIDDEN, HEADS, KEY_VALUE_HEADS, qk_norm_eps=1e-6, **f),
        lambda: Qwen3Attention(peer_config(transformers.Qwen3Config), 0),
        our_attention,
        peer_attention,
    ),
    "GroupedQueryAttention-sinks-window": Case(
        lambda **f: GroupedQueryAttention(
            HIDDEN, HEADS, KEY_VALUE_HEADS, bias=True, sinks=True, window=(WINDOW, -1), **f
        ),
        lambda: GptOssAttention(
            peer_config(transformers.GptOssConfig, attention_bias=True, sliding_window=WINDOW + 1),
            0,
        ),
        our_attention,
        peer_attention,
    ),
    "GroupedQueryAttention-softcap": Case(
        lambda **f: GroupedQueryAttention(HIDDEN, HEADS, KEY_VALUE_HEADS, softcap=1.5, **f),
        lambda: Gemma2Attention(
            peer_config(
                transformers.Gemma2Config,
                attn_logit_softcapping=1.5,
                query_pre_attn_scalar=DIM,
                layer_types=["full_attention"],
            ),
            0,
        ),
        our_attention,
        peer_attention,
    ),
    "RotaryEmbedding": Case(
        lambda **f: RotaryEmbedding(DIM, 64, ROPE), None, shape=(2, 5, HEADS, DIM)
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(0)
    return CASES[request.param]


@pytest.fixture
def module(case):
    """A module whose weights are all random."""
    module = case.make()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.5, 0.5)
    return module


@pytest.fixture
def x(case):
    return torch.randn(case.shape)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.make_peer])
def test_output_and_gradients_are_those_of_the_class_it_replaces(name):
    torch.manual_seed(0)
    case = CASES[name]
    ours, peer = case.make(), case.make_peer()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.normal_(0.1, 0.2)
    ours.load_state_dict(peer.state_dict())
    x = torch.randn(case.shape)
    gradients = []
    for module, call in ((ours, case.call), (peer, case.call_peer)):
        own = x.clone().requires_grad_()
        out = call(own, module)
        out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape))
        gradients.append([out, own.grad, *(p.grad for p in module.parameters())])
    for actual, expected in zip(*gradients, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * scale)


def test_deepcopy_and_pickle_keep_the_function(case, module, x):
    expected = case.call(x, module)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(case.call(x, other), expected)


def test_a_state_dict_round_trip_keeps_the_function(case, module, x):
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = case.make()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(case.call(x, other), case.call(x, module))


def test_meta_initialisation_then_assigned_weights(case, module, x):
    other = case.make(device="meta")
    assert all(parameter.is_meta for parameter in other.parameters())
    other.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(case.call(x, other), case.call(x, module))


def test_meta_initialisation_by_the_context_manager_then_to_empty(case, module, x):
    with torch.device("meta"):
        other = case.make()
    other.to_empty(device="cpu").load_state_dict(module.state_dict())
    assert torch.equal(case.call(x, other), case.call(x, module))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_to_another_dtype_after_use(case, module, x, dtype):
    wide = case.call(x, module)
    narrow = case.call(x.to(dtype), module.to(dtype))
    assert narrow.dtype == dtype
    scale = wide.abs().max().item()
    # Rounding of the inputs, the weights and each product: a few units of the narrow dtype.
    unit = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(narrow.to(wide.dtype), wide, rtol=0, atol=12 * unit * scale)


def test_the_factory_dtype_is_that_of_the_parameters(case):
    module = case.make(dtype=torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in module.parameters())


def test_it_compiles_without_a_graph_break(case, module, x):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: case.call(x, module), fullgraph=True, backend="aot_eager", dynamic=False
    )
    torch.testing.assert_close(compiled(x), case.call(x, module))


# ---------------------------------------------------------------- what the peers do not have


def test_rms_norm_returns_the_sum_with_the_residual():
    torch.manual_seed(0)
    norm = RMSNorm(HIDDEN)
    x, residual = torch.randn(2, 3, HIDDEN), torch.randn(2, 3, HIDDEN)
    out, total = norm(x, residual)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(out, nn.RMSNorm(HIDDEN)(x + residual))


@pytest.mark.parametrize("module", [RMSNorm(8), LayerNorm(8)], ids=["RMSNorm", "LayerNorm"])
def test_a_wrong_last_dimension_is_named(module):
    name = type(module).__name__
    with pytest.raises(ValueError, match=rf"{name}: x: expected .* ending in \(8,\), got \(2, 9\)"):
        module(torch.ones(2, 9))


def test_a_residual_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"RMSNorm: residual: expected shape \(2, 8\), got \(8,\)"):
        RMSNorm(8)(torch.ones(2, 8), torch.ones(8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((30, 4), "hidden_size: expected a multiple of num_attention_heads 4, got 30"),
        ((32, 4, 3), "num_key_value_heads: expected a divisor of num_attention_heads 4, got 3"),
        ((32, 4, 0), "num_key_value_heads: expected a divisor of num_attention_heads 4, got 0"),
    ],
    ids=["hidden-size", "ratio", "no-key-value-heads"],
)
def test_attention_shapes_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        GroupedQueryAttention(*arguments)


def test_attention_that_is_not_causal_sees_later_tokens():
    torch.manual_seed(0)
    module = GroupedQueryAttention(HIDDEN, HEADS, causal=False)
    x = torch.randn(1, 6, HIDDEN)
    changed = x.clone()
    changed[:, -1] += 1
    assert not torch.allclose(module(x)[:, 0], module(changed)[:, 0])
    module.causal = True
    assert torch.equal(module(x)[:, 0], module(changed)[:, 0])
    with pytest.raises(ValueError, match="cache: expected a causal module"):
        module.causal = False
        module(x, cache=PagedKeyValueCache(1, 1))


# ---------------------------------------------------------------- the cache


def poisoned(cache: PagedKeyValueCache) -> None:
    """Fills every slot that no row uses with NaN."""
    used = set()
    for row, length in enumerate(cache.lengths):
        for position in range(length):
            block = int(cache.block_table[row, position // cache.page_size])
            used.add(block * cache.page_size + position % cache.page_size)
    for layer in cache._layers:
        for pages in layer:
            slots = pages.flatten(0, 1)
            slots[[slot for slot in range(len(slots)) if slot not in used]] = torch.nan


@torch.no_grad()
def test_rows_of_unequal_length_attend_to_their_own_tokens_alone():
    torch.manual_seed(0)
    module = GroupedQueryAttention(HIDDEN, HEADS, KEY_VALUE_HEADS)
    lengths, steps = [1, 4, 4, 70], 70
    table = RotaryEmbedding(DIM).table(200, "cpu")
    rows = [torch.randn(1, length + steps, HIDDEN) for length in lengths]
    padded = torch.zeros(4, 70, HIDDEN)
    for row, (whole, length) in enumerate(zip(rows, lengths, strict=True)):
        padded[row, :length] = whole[0, :length]
    cache = PagedKeyValueCache(1, 4)
    module(padded, table, cache.positions(70), cache)
    cache.advance(lengths)
    outs = []
    for step in range(steps):
        poisoned(cache)
        x = torch.cat([w[:, n + step, None] for w, n in zip(rows, lengths, strict=True)])
        outs.append(module(x, table, cache.positions(1), cache))
        cache.advance(1)
    for row, (whole, length) in enumerate(zip(rows, lengths, strict=True)):
        actual = torch.cat([out[row] for out in outs])
        torch.testing.assert_close(actual, module(whole, table)[0, length:], rtol=0, atol=1e-5)


@torch.no_grad()
def test_selected_rows_go_on_as_before():
    torch.manual_seed(0)
    module = GroupedQueryAttention(HIDDEN, HEADS, KEY_VALUE_HEADS)
    x, token = torch.randn(3, 9, HIDDEN), torch.randn(3, 1, HIDDEN)
    expected = module(torch.cat((x, token), 1))[:, -1:]
    cache = PagedKeyValueCache(1, 3)
    module(x, cache=cache)
    cache.advance(9)
    cache.select([2, 0])
    torch.testing.assert_close(module(token[[2, 0]], cache=cache), expected[[2, 0]])


@torch.no_grad()
def test_an_empty_batch_has_an_empty_cache():
    module = GroupedQueryAttention(HIDDEN, HEADS)
    assert module(torch.empty(0, 1, HIDDEN), cache=PagedKeyValueCache(1, 0)).shape == (0, 1, HIDDEN)
