"""Latent attention: transformers' modules, its two forms, and its caches, all the same function."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
from warploom.nn import (
    MultiheadLatentAttention,
    PagedKeyValueCache,
    PagedLatentCache,
    RotaryEmbedding,
    StaticLatentCache,
)
from warploom.nn.mla import prefers_absorbed
from warploom.nn.rope import yarn_softmax_factor
from warploom.ops.mla import mla_prefill
from warploom.reference.mla import compressed_row_bytes, expand_rows

HIDDEN, HEADS, LATENT, NOPE, ROPE, VALUE = 48, 4, 32, 16, 16, 24
SIZES = {
    "kv_lora_rank": LATENT,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": VALUE,
}
MODES = ["expanded", "absorbed"]
KINDS = ["paged", "static"]
#: Errors of compressed latents by their own size: int8's is 1/254 of the largest, some four times that.
COMPRESSED = {torch.float8_e4m3fn: 1 / 16, torch.int8: 4 / 254}
every_mode = pytest.mark.parametrize("mode", MODES)
every_kind = pytest.mark.parametrize("kind", KINDS)


def yarn(mscale, **changes):
    return {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale,
        **changes,
    }


@torch.no_grad()
def draw(module):
    """Weights that leave no score, norm or bias near a trivial value."""
    for parameter in module.parameters():
        parameter.normal_(0.0 if parameter.dim() > 1 else 1.0, 0.2)
    return module


def make_module(**options):
    torch.manual_seed(0)
    return draw(MultiheadLatentAttention(HIDDEN, HEADS, **SIZES, **options))


def make_cache(kind, rows, capacity=400, page_size=16, dtype=None):
    if kind == "paged":
        return PagedLatentCache(1, rows, page_size=page_size, dtype=dtype)
    return StaticLatentCache(1, rows, capacity, dtype=dtype)


def make_table(length=400, dtype=torch.float32):
    return RotaryEmbedding(ROPE).table(length, "cpu", dtype)


def cumulative(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def outputs_and_gradients(module, x, upstream, *args, **options):
    x = x.detach().requires_grad_()
    out = module(x, *args, **options)
    tensors = {"x": x, **dict(module.named_parameters())}
    grads = torch.autograd.grad((out * upstream).sum(), [*tensors.values()])
    return {"out": out.detach(), **dict(zip(tensors, grads, strict=True))}


def assert_all_close(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        error = (actual[name] - want).abs().max().item()
        assert error <= tolerance * max(want.abs().max().item(), 1.0), f"{name}: {error:.3e}"


# ---------------------------------------------------------------- transformers' modules


def peer(version, rope, query_rank, bias):
    """transformers' module, its rotary embedding, and ours with the same weights."""
    config_type, modeling = {"v2": (DeepseekV2Config, v2), "v3": (DeepseekV3Config, v3)}[version]
    prefix = f"Deepseek{version.upper()}"
    rope = dict(rope or {"rope_type": "default", "rope_theta": 10000.0})
    config = config_type(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=query_rank,
        attention_bias=bias,
        rope_parameters=rope,
        max_position_embeddings=256,
        attn_implementation="eager",
        **SIZES,
    )
    theirs = getattr(modeling, f"{prefix}Attention")(config, 0)
    scale = (NOPE + ROPE) ** -0.5 * yarn_softmax_factor(rope)
    ours = MultiheadLatentAttention(
        HIDDEN, HEADS, **SIZES, q_lora_rank=query_rank, bias=bias, softmax_scale=scale
    )
    draw(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, getattr(modeling, f"{prefix}RotaryEmbedding")(config), ours, rope


@every_mode
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("query_rank", [None, 20])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "yarn"])
@pytest.mark.parametrize("version", ["v2", "v3"])
def test_outputs_and_gradients_equal_transformers(version, scaled, query_rank, bias, mode):
    torch.manual_seed(1)
    rope = yarn(0.707 if version == "v2" else 1.0) if scaled else None
    theirs, their_rotary, ours, rope = peer(version, rope, query_rank, bias)
    ours.mode = mode
    # Position 0 turns nothing and one key needs no scale: rows start elsewhere, and steps differ.
    positions = torch.stack((torch.arange(3, 23), torch.arange(0, 60, 3) + 40))
    x, upstream = torch.randn(2, 20, HIDDEN), torch.randn(2, 20, HIDDEN)
    mask = torch.full((20, 20), -math.inf).triu(1)[None, None]
    table = RotaryEmbedding(ROPE, 256, rope).table(256, "cpu")

    def run_theirs(x):
        turned = their_rotary(x, positions)
        return theirs(x, attention_mask=mask, position_embeddings=turned)[0]

    run_theirs.named_parameters = theirs.named_parameters
    expected = outputs_and_gradients(run_theirs, x, upstream)
    actual = outputs_and_gradients(ours, x, upstream, table, positions)
    assert_all_close(actual, expected, 2e-5)


@pytest.mark.parametrize(
    "changes", [{"mscale_all_dim": 0}, {"mscale_all_dim": None}, {"factor": 1.0}]
)
def test_the_softmax_scale_has_no_factor_without_yarns_temperature(changes):
    assert yarn_softmax_factor(yarn(1.0, **changes)) == 1.0
    assert yarn_softmax_factor(None) == 1.0
    assert yarn_softmax_factor({"rope_type": "default", "mscale_all_dim": 1.0}) == 1.0


def test_the_published_softmax_factors():
    assert yarn_softmax_factor(yarn(0.707)) == pytest.approx(1.58963, abs=5e-6)
    assert yarn_softmax_factor(yarn(1.0)) == pytest.approx(1.87385, abs=5e-6)


# ---------------------------------------------------------------- the two forms


@pytest.mark.parametrize("query_rank", [None, 20])
def test_absorbed_equals_expanded_to_1e_12(query_rank):
    module = make_module(q_lora_rank=query_rank, bias=True, dtype=torch.float64)
    table = make_table(dtype=torch.float64)
    x, upstream = (torch.randn(2, 30, HIDDEN, dtype=torch.float64) for _ in range(2))
    results = []
    for module.mode in MODES:
        results.append(outputs_and_gradients(module, x, upstream, table))
    assert_all_close(*results, 1e-12)


@every_mode
def test_heads_of_kv_b_are_not_interchangeable(mode):
    module = make_module(mode=mode)
    x, table = torch.randn(1, 12, HIDDEN), make_table()
    before = module(x, table)
    with torch.no_grad():
        heads = module.kv_b_proj.weight.unflatten(0, (HEADS, NOPE + VALUE))
        heads.copy_(heads.flip(0).clone())
    assert (module(x, table) - before).abs().max() > 1e-2 * before.abs().max()


@every_mode
def test_the_default_softmax_scale_counts_the_expanded_head(mode):
    module = make_module(mode=mode)
    explicit = make_module(mode=mode, softmax_scale=(NOPE + ROPE) ** -0.5)
    x, table = torch.randn(1, 12, HIDDEN), make_table()
    assert torch.equal(module(x, table), explicit(x, table))


@every_mode
@pytest.mark.parametrize("rows", [1, 2])
def test_packed_documents_equal_documents_alone(rows, mode):
    module, lengths = make_module(mode=mode, dtype=torch.float64), [7, 1, 0, 12, 4]
    table = make_table(24, torch.float64)
    documents = [torch.randn(1, length, HIDDEN, dtype=torch.float64) for length in lengths]
    upstream = torch.randn(24, HIDDEN, dtype=torch.float64)
    x = torch.cat(documents, 1).view(rows, 24 // rows, HIDDEN)
    outs = []
    for max_seqlen in (None, 12):
        out = module(x, table, cu_seqlens=cumulative(lengths), max_seqlen=max_seqlen)
        assert out.shape == x.shape
        out = out.flatten(0, 1)
        outs.append([out, *torch.autograd.grad((out * upstream).sum(), [*module.parameters()])])
    alone = torch.cat([module(document, table)[0] for document in documents])
    expected = [alone, *torch.autograd.grad((alone * upstream).sum(), [*module.parameters()])]
    for actual in outs:
        for left, right in zip(actual, expected, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-10)


# ---------------------------------------------------------------- caches


def poison(cache):
    """NaN in every row of the pages that no token uses."""
    for pages in cache._layers[0] or ():
        unused = torch.ones(pages.shape[0] * cache.page_size, dtype=torch.bool)
        for row, length in enumerate(cache.cache_seqlens.tolist()):
            position = torch.arange(length)
            block = cache.block_table[row, position // cache.page_size]
            unused[block * cache.page_size + position % cache.page_size] = False
        raw = pages.view(torch.uint8).flatten(0, 1)
        raw[unused] = 0xFF  # NaN in every dtype but int8, whose scales are
        pages.copy_(raw.view(pages.dtype).view_as(pages))


@torch.no_grad()
def run_steps(module, cache, wholes, table, packed, uniform):
    """Each row's outputs: steps of `packed` lengths, then steps in which all rows get as many tokens."""
    outs, done = [[] for _ in wholes], [0] * len(wholes)

    def take(counts):
        pieces = [whole[at : at + n] for whole, at, n in zip(wholes, done, counts, strict=True)]
        done[:] = [at + n for at, n in zip(done, counts, strict=True)]
        return pieces

    for lengths in packed:
        cu_seqlens, max_seqlen = cache.pack(lengths)
        poison(cache)
        x = torch.cat(take(lengths)).unsqueeze(0)
        step = module(x, table, None, cache, 0, cu_seqlens, max_seqlen)
        cache.advance(lengths)
        for out, part in zip(outs, step[0].split(lengths), strict=True):
            out.append(part)
    for count in uniform:
        poison(cache)
        step = module(torch.stack(take([count] * len(wholes))), table, cache=cache)
        cache.advance(count)
        for out, part in zip(outs, step, strict=True):
            out.append(part)
    return [torch.cat(out) for out in outs]


PACKED = [[5, 70, 16, 33], [31, 0, 40, 0]]
UNIFORM = [12, 3, *[1] * 12]
TOTALS = [sum(lengths) + sum(UNIFORM) for lengths in zip(*PACKED, strict=True)]


@every_kind
@pytest.mark.parametrize("mode", ["auto", *MODES])
def test_steps_equal_whole_sequences(kind, mode):
    module, table = make_module(mode=mode, q_lora_rank=20), make_table()
    wholes = [torch.randn(total, HIDDEN) for total in TOTALS]
    outs = run_steps(module, make_cache(kind, 4), wholes, table, PACKED, UNIFORM)
    module.mode = "expanded"
    for whole, out in zip(wholes, outs, strict=True):
        expected = module(whole.unsqueeze(0), table)[0]
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@every_kind
@every_mode
def test_steps_equal_whole_sequences_to_1e_12(kind, mode):
    module, table = make_module(mode=mode, dtype=torch.float64), make_table(dtype=torch.float64)
    wholes = [torch.randn(total, HIDDEN, dtype=torch.float64) for total in TOTALS]
    outs = run_steps(module, make_cache(kind, 4), wholes, table, PACKED, [12, 3, 1, 1])
    for whole, out in zip(wholes, outs, strict=True):
        expected = module(whole[: len(out)].unsqueeze(0), table)[0]
        scale = expected.abs().max().item()
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12 * scale)


@every_kind
@torch.no_grad()
def test_a_prefix_longer_than_a_page_of_expanded_rows(kind):
    module, table = make_module(mode="expanded"), make_table(700)
    wholes = [torch.randn(total, HIDDEN) for total in (620, 350)]
    outs = run_steps(module, make_cache(kind, 2, 700), wholes, table, [[300, 9], [290, 311]], [30])
    for whole, out in zip(wholes, outs, strict=True):
        expected = module(whole.unsqueeze(0), table)[0]
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_a_row_of_the_cache_is_the_latent_and_the_shared_key():
    module = make_module(dtype=torch.float64)
    table, x = make_table(dtype=torch.float64), torch.randn(1, 9, HIDDEN, dtype=torch.float64)
    cache = make_cache("static", 1)
    with torch.no_grad():
        module(x, table, cache=cache)
        latent, k_rope = module.kv_a_proj_with_mqa(x).split([LATENT, ROPE], dim=-1)
        latent = module.kv_a_layernorm(latent)
    (pages,) = cache._layers[0]
    assert pages.shape[-1] == LATENT + ROPE
    torch.testing.assert_close(pages[0, :9, :LATENT], latent[0])
    angles = torch.arange(9)[:, None] * RotaryEmbedding(ROPE).inv_freq
    turned = torch.view_as_complex(k_rope[0].unflatten(-1, (-1, 2))) * torch.polar(
        torch.ones_like(angles), angles
    )
    expected = torch.view_as_real(turned).flatten(-2)
    torch.testing.assert_close(pages[0, :9, LATENT:], expected, rtol=1e-6, atol=1e-6)


def test_deepseeks_rows_take_576_numbers_or_656_bytes():
    for dtype, width in ((None, 576), (torch.float8_e4m3fn, 656), (torch.int8, 656)):
        cache = make_cache("paged", 1, dtype=dtype)
        cache.append(0, torch.randn(1, 3, 576), torch.ones(512))
        assert cache._layers[0][0].shape[-1] == width


@every_kind
@every_mode
@pytest.mark.parametrize("dtype", COMPRESSED)
def test_compressed_caches_stay_within_their_error(dtype, mode, kind):
    module, table = make_module(mode=mode), make_table()
    wholes = [torch.randn(total, HIDDEN) for total in TOTALS]
    steps = (wholes, table, PACKED, [12, 3, 1, 1])
    dense = run_steps(module, make_cache(kind, 4), *steps)
    outs = run_steps(module, make_cache(kind, 4, dtype=dtype), *steps)
    for out, expected in zip(outs, dense, strict=True):
        error = (out - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert 0 < error < COMPRESSED[dtype]


@every_kind
@pytest.mark.parametrize("dtype", COMPRESSED)
def test_a_compressed_row_is_off_by_no_more_than_is_said(dtype, kind):
    latents, weight = torch.randn(2, 50, LATENT + ROPE), torch.randn(LATENT)
    caches = [make_cache(kind, 2, dtype=kept) for kept in (None, dtype)]
    for cache in caches:
        cache.append(0, latents, weight)
    exact, stored = (
        expand_rows(cache._layers[0][0][cache.block_table.long()], LATENT).flatten(1, 2)[:, :50]
        for cache in caches
    )
    assert caches[1]._layers[0][0].shape[-1] == compressed_row_bytes(LATENT, ROPE)
    error = (stored - exact)[..., :LATENT].abs()
    largest = exact[..., :LATENT].abs().amax(-1, keepdim=True)
    if dtype == torch.int8:
        assert (error <= largest / 254 * (1 + 1e-5)).all()
    else:  # below e4m3's smallest normal number, 2^-6 of 448, steps have one size
        assert (error <= exact[..., :LATENT].abs().clamp(min=largest / 448 / 64) / 16).all()
    torch.testing.assert_close(stored[..., LATENT:], exact[..., LATENT:], rtol=2**-8, atol=0)


@torch.no_grad()
def test_pages_of_rows_that_leave_are_used_again():
    module, table, cache = make_module(), make_table(), make_cache("paged", 4)
    wholes = [torch.randn(90, HIDDEN) for _ in range(4)]
    run_steps(module, cache, wholes, table, [[60] * 4], [])
    cache.select([3, 1])
    size, outs = cache._num_blocks, []
    for at in range(60, 90):
        poison(cache)
        outs.append(
            module(torch.stack((wholes[3][at], wholes[1][at]))[:, None], table, cache=cache)
        )
        cache.advance(1)
    assert cache._num_blocks == size
    for place, row in enumerate((3, 1)):
        expected = module(wholes[row][None], table)[0, 60:]
        torch.testing.assert_close(torch.cat(outs, 1)[place], expected, rtol=1e-4, atol=1e-4)


@every_kind
@torch.no_grad()
@pytest.mark.parametrize("dtype", COMPRESSED)
def test_a_compressed_cache_is_read_as_its_rows_expanded(dtype, kind):
    caches = [make_cache(kind, 2, dtype=kept) for kept in (dtype, None)]
    tokens, norm = torch.randn(2, 84, LATENT + ROPE), torch.randn(LATENT)
    for cache in caches:
        cache.append(0, tokens[:, :80], norm)
        cache.advance(80)
        cache.append(0, tokens[:, 80:], norm)
    caches[1]._layers[0][0].copy_(expand_rows(caches[0]._layers[0][0], LATENT))
    q = torch.randn(2, 4, HEADS, LATENT + ROPE)
    outs = [cache.decode(0, q, d_latent=LATENT, softmax_scale=0.2) for cache in caches]
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)
    q, weight = torch.randn(2, 4, HEADS, NOPE + ROPE), torch.randn(HEADS * (NOPE + VALUE), LATENT)
    new = torch.randn(2, 4, LATENT), torch.randn(2, 4, ROPE)
    outs = [mla_prefill(q, *new, weight, softmax_scale=0.2, **cache.prefix(0)) for cache in caches]
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)


@every_kind
@torch.no_grad()
def test_a_row_has_the_same_bits_whatever_is_beside_it(kind):
    """After the projections, whose own rounding may change with their shapes."""
    tokens, q = torch.randn(3, 601, LATENT + ROPE), torch.randn(3, 1, HEADS, LATENT + ROPE)
    norm, lengths, results = torch.ones(LATENT), [7, 520, 300], []
    for rows in ([0, 1, 2], [1]):
        cache = make_cache(kind, len(rows), 700)
        own = [lengths[row] for row in rows]
        packed = torch.cat([tokens[row, :n] for row, n in zip(rows, own, strict=True)])[None]
        cache.append(0, packed, norm, cu_seqlens=cache.pack(own)[0])
        cache.advance(own)
        cache.append(0, tokens[rows, 600:], norm)
        out = cache.decode(0, q[rows], d_latent=LATENT, softmax_scale=0.1)
        results.append(out[rows.index(1)])
    assert torch.equal(*results)


@every_kind
@torch.no_grad()
def test_a_copy_goes_on_by_itself(kind):
    module, table, cache = make_module(), make_table(), make_cache(kind, 2)
    x = torch.randn(2, 30, HIDDEN)
    module(x[:, :20], table, cache=cache)
    cache.advance(20)
    outs = []
    for one in (cache, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        for at in range(20, 30):
            out = module(x[:, at : at + 1], table, cache=one)
            one.advance(1)
        outs.append(out)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@every_mode
@torch.no_grad()
def test_a_static_cache_starts_again_in_its_tensors(mode):
    module, table, cache = make_module(mode=mode), make_table(), make_cache("static", 2)
    x = torch.randn(2, 30, HIDDEN)
    expected = module(x, table, cache=cache)
    cache.advance(30)
    (pages,) = cache._layers[0]
    cache.reset()
    assert torch.equal(module(x, table, cache=cache), expected)
    assert cache._layers[0][0] is pages


@pytest.mark.parametrize("dtype", [None, *COMPRESSED])
@torch.no_grad()
def test_a_static_step_is_one_graph_for_every_length(dtype):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    module, table = make_module(q_lora_rank=20), make_table(256)
    x = torch.randn(3, 120, HIDDEN)

    def step(token, cache):
        out = module(token, table, cache=cache)
        cache.advance(1)
        return out

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    caches = [make_cache("static", 3, 200, dtype=dtype) for _ in range(2)]
    results = []
    for cache, one in zip(caches, (step, compiled), strict=True):
        module(x[:, :90], table, cache=cache)
        cache.advance([90, 90, 90])
        results.append(torch.cat([one(x[:, at : at + 1], cache) for at in range(90, 120)], 1))
    torch.testing.assert_close(*results)
    assert len(graphs) == 1
    assert caches[1].cache_seqlens.tolist() == [120] * 3


@every_mode
def test_it_compiles_without_a_graph_break(mode):
    torch._dynamo.reset()
    module, table = make_module(mode=mode), make_table()
    x = torch.randn(1, 24, HIDDEN)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for lengths in ([7, 1, 16], [10, 10, 4]):
        packing = {"cu_seqlens": cumulative(lengths), "max_seqlen": 16}
        torch.testing.assert_close(compiled(x, table, **packing), module(x, table, **packing))
    torch.testing.assert_close(compiled(x, table), module(x, table))


@torch.no_grad()
def test_auto_absorbs_where_a_cache_gets_few_new_tokens(monkeypatch):
    module, table = make_module(), make_table()
    decoded = []
    monkeypatch.setattr(
        StaticLatentCache,
        "decode",
        lambda self, layer, q, **options: decoded.append(q.shape[1]) or q[..., :LATENT],
    )
    cpu = torch.device("cpu")
    many = next(count for count in range(1, 1000) if not prefers_absorbed(cpu, count))
    for count in (1, many - 1, many):
        module(torch.randn(1, count, HIDDEN), table, cache=make_cache("static", 1))
    cache = make_cache("static", 2)
    module(torch.randn(1, 5, HIDDEN), table, None, cache, 0, *cache.pack([2, 3]))
    module(torch.randn(1, 5, HIDDEN), table)
    assert decoded == [1, many - 1]


@every_mode
def test_autocast_gives_its_dtype_and_gradients(mode):
    module, table = make_module(mode=mode), make_table()
    x = torch.randn(2, 12, HIDDEN)
    expected, cache = module(x, table), make_cache("paged", 2)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x, table)
        with torch.no_grad():
            for part in x.split([9, 3], dim=1):
                step = module(part, table, cache=cache)
                cache.advance(part.shape[1])
    assert out.dtype == step.dtype == cache._layers[0][0].dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.1)
    torch.testing.assert_close(step.float(), expected[:, 9:], rtol=0.05, atol=0.1)
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


# ---------------------------------------------------------------- errors


def test_an_unknown_mode_is_refused():
    with pytest.raises(
        ValueError, match="mode: expected 'auto', 'expanded' or 'absorbed', got 'f'"
    ):
        make_module(mode="f")


def test_a_cache_of_keys_and_values_is_refused():
    with pytest.raises(TypeError, match="cache: expected a LatentCache, got PagedKeyValueCache"):
        make_module()(torch.randn(1, 3, HIDDEN), cache=PagedKeyValueCache(1, 1))


@pytest.mark.parametrize("kind", [PagedLatentCache, StaticLatentCache])
def test_a_dtype_that_is_no_compression_is_refused(kind):
    with pytest.raises(TypeError, match=f"{kind.__name__}: dtype: expected float8_e4m3fn, int8 or"):
        kind(1, 2, **({} if kind is PagedLatentCache else {"capacity": 8}), dtype=torch.float16)


@pytest.mark.parametrize("page_size", [0, 257])
def test_a_page_size_that_no_kernel_reads_is_refused(page_size):
    with pytest.raises(ValueError, match=f"PagedLatentCache: page_size: .* got {page_size}"):
        PagedLatentCache(1, 2, page_size=page_size)


@every_kind
@every_mode
def test_tensors_that_need_a_gradient_are_refused(kind, mode):
    with pytest.raises(RuntimeError, match=r"is not differentiable, use torch.no_grad"):
        make_module(mode=mode)(torch.randn(1, 3, HIDDEN), cache=make_cache(kind, 1))


def test_decoding_before_appending_is_refused():
    cache = make_cache("paged", 1)
    q = torch.randn(1, 1, HEADS, LATENT + ROPE)
    with pytest.raises(RuntimeError, match="layer 0: expected `append` first"):
        cache.decode(0, q, d_latent=LATENT, softmax_scale=1.0)
