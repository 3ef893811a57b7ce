"""Latent attention: decoding beside eager (expanded and absorbed), SDPA and FlashInfer; training; prefill.

The shapes of DeepSeek-V2: latents of 512, rotary keys of 64, heads of 128 + 64 and 128.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from warploom.ops.mla import mla_absorbed, mla_cache_append, mla_decode, mla_prefill

from bench.harness import Case, training

D_LATENT, D_ROPE, D_NOPE, D_VALUE = 512, 64, 128, 128
SCALE = (D_NOPE + D_ROPE) ** -0.5
#: Scores and expanded keys of eager peers: none where they take more than this.
MOST_EAGER_BYTES = 16 * 2**30


def absorbed_eager(q: Tensor, kv: Tensor, causal: bool = False) -> Tensor:
    """The absorbed form as einsums: q [B, Sq, H, 576], kv [B, Sk, 576]."""
    scores = torch.einsum("bqhd,bkd->bhqk", q, kv) * SCALE
    if causal:
        queries, keys = scores.shape[-2:]
        seen = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        scores = scores.masked_fill(~seen, float("-inf"))
    return torch.einsum("bhqk,bkd->bqhd", scores.softmax(-1), kv[..., :D_LATENT])


def absorbed_sdpa(q: Tensor, kv: Tensor) -> Tensor:
    """The absorbed form as multi-query attention of PyTorch's."""
    keys = kv.unsqueeze(1)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys, keys[..., :D_LATENT], scale=SCALE, enable_gqa=True
    )
    return out.transpose(1, 2)


def expanded_eager(q_nope: Tensor, q_rope: Tensor, kv: Tensor, weight: Tensor) -> Tensor:
    """Keys and values of every head from the cached latents, then attention, in plain PyTorch."""
    heads = q_nope.shape[2]
    latent, k_rope = kv.split([D_LATENT, D_ROPE], -1)
    k_nope, v = F.linear(latent, weight).unflatten(-1, (heads, -1)).split([D_NOPE, D_VALUE], -1)
    k = torch.cat((k_nope, k_rope.unsqueeze(2).expand(-1, -1, heads, -1)), -1)
    q = torch.cat((q_nope, q_rope), -1)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * SCALE
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def _judge(
    ours: Callable[[], Tensor], theirs: Callable[[], Tensor], dtype: torch.dtype, steps: int = 8
) -> None:
    """Within so many steps of the dtype at the largest element."""
    want = theirs()
    tolerance = steps * torch.finfo(dtype).eps
    limit = tolerance * want.abs().max().item()
    torch.testing.assert_close(ours().double(), want, rtol=tolerance, atol=limit)


def _decode(device: str, dtype: torch.dtype, backend: str, shape: tuple[int, ...]) -> list[Case]:
    """The op alone, and with the products that absorb the query and expand the output."""
    batch, queries, heads, length = shape
    kv = torch.randn(batch, length, D_LATENT + D_ROPE, device=device).to(dtype)
    lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
    q_nope, q_rope = (
        torch.randn(batch, queries, heads, size, device=device).to(dtype)
        for size in (D_NOPE, D_ROPE)
    )
    weight = (torch.randn(heads * (D_NOPE + D_VALUE), D_LATENT, device=device) / 22).to(dtype)
    per_head = weight.view(heads, D_NOPE + D_VALUE, D_LATENT)

    def absorb() -> Tensor:
        absorbed = torch.einsum("bqhn,hnl->bqhl", q_nope, per_head[:, :D_NOPE])
        return torch.cat((absorbed, q_rope), -1)

    q = absorb()

    def ours(q: Tensor) -> Tensor:
        out: Tensor = mla_decode(
            q, kv, lengths, d_latent=D_LATENT, softmax_scale=SCALE, causal=False, backend=backend
        )
        return out

    def end_to_end() -> Tensor:
        latents = ours(absorb()).flatten(0, 1).permute(1, 2, 0)  # [H, d_latent, B Sq]
        out = per_head[:, D_NOPE:] @ latents
        return out.permute(2, 0, 1).unflatten(0, (batch, queries))

    peers: dict[str, Callable[[], Any]] = {"eager absorbed": lambda: absorbed_eager(q, kv)}
    # Where no fused kernel takes heads this wide, SDPA repeats the keys for every head, in float32.
    if batch * heads * length * (D_LATENT + D_ROPE) * 4 <= MOST_EAGER_BYTES:
        peers["SDPA absorbed"] = lambda: absorbed_sdpa(q, kv)
    expanded_bytes = batch * length * heads * (D_NOPE + D_ROPE + D_VALUE) * q.element_size()
    whole_peers = {}
    if expanded_bytes <= MOST_EAGER_BYTES:
        whole_peers["eager expanded"] = lambda: expanded_eager(q_nope, q_rope, kv, weight)
    if device == "cuda":
        peers |= _flashinfer(q, kv)
    name = "mla_decode" if device == "cpu" else f"mla_decode ({backend})"
    label = f"B{batch} Sq{queries} H{heads} S{length}"
    size = kv.numel() * kv.element_size()
    flops = 2 * batch * queries * heads * length * (2 * D_LATENT + D_ROPE)
    exact = functools.partial(absorbed_eager, q.double(), kv.double())
    verify = functools.partial(_judge, functools.partial(ours, q), exact, dtype)
    alone = Case("mla", name, label, dtype, functools.partial(ours, q), peers, verify, size, flops)

    def whole_exact() -> Tensor:
        return expanded_eager(*(tensor.double() for tensor in (q_nope, q_rope, kv, weight)))

    whole = Case(
        "mla",
        f"{name} end to end",
        label,
        dtype,
        end_to_end,
        whole_peers,
        functools.partial(_judge, end_to_end, whole_exact, dtype),
        size + weight.numel() * weight.element_size(),
        flops + 2 * batch * queries * weight.numel(),
    )
    return [alone, whole] if whole_peers else [alone]


def _flashinfer(q: Tensor, kv: Tensor) -> dict[str, Callable[[], Any]]:
    """FlashInfer's MLA on the same tensors, as pages of 64, where it is installed."""
    try:
        mla = importlib.import_module("flashinfer.mla")
    except ImportError:
        return {}
    batch, queries, heads, _ = q.shape
    length, page_size = kv.shape[1], 64
    pages = -(-length // page_size)
    integers = {"dtype": torch.int32, "device": q.device}
    work = torch.empty(128 * 2**20, dtype=torch.int8, device=q.device)
    wrapper = mla.BatchMLAPagedAttentionWrapper(work)
    wrapper.plan(
        torch.arange(batch + 1, **integers) * queries,
        torch.arange(batch + 1, **integers) * pages,
        torch.arange(batch * pages, **integers),
        torch.full((batch,), length, **integers),
        heads,
        D_LATENT,
        D_ROPE,
        page_size,
        False,
        SCALE,
        q.dtype,
        kv.dtype,
    )
    cache = kv.view(batch * pages, page_size, -1)
    flat = q.flatten(0, 1)
    parts = (flat[..., :D_LATENT].contiguous(), flat[..., D_LATENT:].contiguous())
    caches = (cache[..., :D_LATENT].contiguous(), cache[..., D_LATENT:].contiguous())
    return {"FlashInfer": lambda: wrapper.run(*parts, *caches)}


def _compressed(
    device: str, dtype: torch.dtype, backend: str, shape: tuple[int, ...]
) -> list[Case]:
    """Decoding from float8 and int8 rows of 656 bytes, beside the dense cache."""
    batch, queries, heads, length = shape
    width = D_LATENT + D_ROPE
    rows = torch.randn(batch, length, width, device=device).to(dtype)
    start = torch.zeros(batch, dtype=torch.int32, device=device)
    q = torch.randn(batch, queries, heads, width, device=device).to(dtype)
    weight = torch.ones(D_LATENT, device=device, dtype=dtype)
    caches = {
        form: torch.empty(batch, length, 656, dtype=torch.uint8, device=device).view(form)
        for form in (torch.float8_e4m3fn, torch.int8)
    }
    dense = torch.empty_like(rows)
    for cache in (dense, *caches.values()):
        mla_cache_append(rows, weight, cache, start)

    def decode(cache: Tensor) -> Tensor:
        out: Tensor = mla_decode(
            q, cache, start + length, d_latent=D_LATENT, softmax_scale=SCALE, backend=backend
        )
        return out

    found = []
    for form, cache in caches.items():
        name = f"mla_decode {str(form).removeprefix('torch.')}"

        def verify(cache: Tensor = cache) -> None:
            """Within the error that 3 bits of fraction, or 127 steps, leave in a mean of latents."""
            torch.testing.assert_close(decode(cache), decode(dense), rtol=0.1, atol=0.05)

        found.append(
            Case(
                "mla",
                name if device == "cpu" else f"{name} ({backend})",
                f"B{batch} Sq{queries} H{heads} S{length}",
                dtype,
                functools.partial(decode, cache),
                {"dense cache": functools.partial(decode, dense)},
                verify,
                cache.numel(),
                2 * batch * queries * heads * length * (2 * D_LATENT + D_ROPE),
            )
        )
    return found


def _training(device: str, dtype: torch.dtype, backend: str, shape: tuple[int, ...]) -> Case:
    """mla_absorbed forward and backward beside autograd through the einsums."""
    batch, length, heads = shape
    width = D_LATENT + D_ROPE
    inputs = [
        torch.randn(batch, length, heads, width, device=device).to(dtype),
        torch.randn(batch, length, width, device=device).to(dtype),
    ]

    def ours(q: Tensor, kv: Tensor) -> Tensor:
        out: Tensor = mla_absorbed(q, kv, d_latent=D_LATENT, softmax_scale=SCALE, backend=backend)
        return out

    def eager(q: Tensor, kv: Tensor) -> Tensor:
        return absorbed_eager(q, kv, causal=True)

    exact = functools.partial(eager, *(tensor.double() for tensor in inputs))
    size = 3 * sum(tensor.numel() * tensor.element_size() for tensor in inputs)
    flops = batch * heads * length * length * (5 * width + 4 * D_LATENT)
    return Case(
        "mla",
        "mla_absorbed forward+backward" + ("" if device == "cpu" else f" ({backend})"),
        f"B{batch} S{length} H{heads}",
        dtype,
        training(ours, inputs),
        {"eager absorbed": training(eager, inputs)},
        functools.partial(_judge, functools.partial(ours, *inputs), exact, dtype),
        size,
        flops,
    )


def _prefill(device: str, dtype: torch.dtype, backend: str, shape: tuple[int, ...]) -> Case:
    """The expanded form, forward and backward, beside the same in plain PyTorch with SDPA."""
    batch, length, heads = shape
    inputs = [
        torch.randn(batch, length, heads, D_NOPE + D_ROPE, device=device).to(dtype),
        torch.randn(batch, length, D_LATENT, device=device).to(dtype),
        torch.randn(batch, length, D_ROPE, device=device).to(dtype),
        (torch.randn(heads * (D_NOPE + D_VALUE), D_LATENT, device=device) / 22).to(dtype),
    ]

    def ours(*tensors: Tensor) -> Tensor:
        out: Tensor = mla_prefill(*tensors, softmax_scale=SCALE, backend=backend)
        return out

    def sdpa(q: Tensor, latent: Tensor, k_rope: Tensor, weight: Tensor) -> Tensor:
        kv = F.linear(latent, weight).unflatten(-1, (heads, -1))
        k_nope, v = kv.split([D_NOPE, D_VALUE], -1)
        k = torch.cat((k_nope, k_rope.unsqueeze(2).expand(-1, -1, heads, -1)), -1)
        parts = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return F.scaled_dot_product_attention(*parts, is_causal=True, scale=SCALE).transpose(1, 2)

    exact = functools.partial(sdpa, *(tensor.double() for tensor in inputs))
    size = 3 * sum(tensor.numel() * tensor.element_size() for tensor in inputs)
    attention = batch * heads * length * length * (D_NOPE + D_ROPE + D_VALUE)
    return Case(
        "mla",
        "mla_prefill forward+backward" + ("" if device == "cpu" else f" ({backend})"),
        f"B{batch} S{length} H{heads}",
        dtype,
        training(ours, inputs),
        {"SDPA expanded": training(sdpa, inputs)},
        functools.partial(_judge, functools.partial(ours, *inputs), exact, dtype),
        size,
        attention * 7 // 2 + 6 * batch * length * inputs[3].numel(),
    )


def _module(device: str, dtype: torch.dtype) -> list[Case]:
    """One token on a cached text: `MultiheadLatentAttention` beside transformers' DeepseekV2Attention."""
    transformers = importlib.import_module("transformers")
    peers = importlib.import_module("transformers.models.deepseek_v2.modeling_deepseek_v2")
    from warploom.nn import MultiheadLatentAttention, PagedLatentCache, RotaryEmbedding

    length, hidden, heads = 4096, 2048, 16
    config = transformers.DeepseekV2Config(
        hidden_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=heads,
        q_lora_rank=None,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="sdpa",
    )
    peer = peers.DeepseekV2Attention(config, 0).to(device, dtype).eval()
    ours = MultiheadLatentAttention(
        hidden,
        heads,
        kv_lora_rank=D_LATENT,
        qk_nope_head_dim=D_NOPE,
        qk_rope_head_dim=D_ROPE,
        v_head_dim=D_VALUE,
        device=device,
        dtype=dtype,
    ).eval()
    ours.load_state_dict(peer.state_dict())
    tables = RotaryEmbedding(D_ROPE).table(2 * length, device)
    text = torch.randn(1, length, hidden, device=device).to(dtype)
    token = torch.randn(1, 1, hidden, device=device).to(dtype)
    rotary = peers.DeepseekV2RotaryEmbedding(config).to(device)
    cache = PagedLatentCache(1, 1, device=device)
    held = transformers.DynamicCache(config=config)
    with torch.no_grad():
        ours(text, tables, cache=cache)
        cache.advance(length)
        where = rotary(text, torch.arange(length, device=device)[None])
        mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
        peer(text, mask, held, where)
        now = rotary(token, torch.full((1, 1), length, device=device))

    def run() -> Tensor:
        with torch.no_grad():
            out: Tensor = ours(token, tables, cache=cache)
            return out

    def run_peer() -> Tensor:
        with torch.no_grad():
            out: Tensor = peer(token, None, held, now)[0]
        held.crop(-1)
        return out

    exact = run_peer().double()
    size = sum(parameter.numel() for parameter in ours.parameters()) * token.element_size()
    size += length * (D_LATENT + D_ROPE) * token.element_size()
    return [
        Case(
            "mla",
            "MultiheadLatentAttention decode",
            f"H{heads} S{length}",
            dtype,
            run,
            {"transformers": run_peer},
            # Both are rounded, several products deep.
            functools.partial(_judge, run, lambda: exact, dtype, 64),
            size,
        )
    ]


def cases(device: str) -> Iterator[Case]:
    torch.manual_seed(0)
    backends = ("cuda", "triton") if device == "cuda" else ("cpu",)
    dtypes = (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16)
    if device == "cpu":
        decodes, prefill, train = [(2, 1, 16, 4096)], (1, 1024, 16), (1, 512, 16)
    else:
        decodes = [
            (128, 1, 128, 4096),
            (128, 1, 128, 8192),
            (128, 2, 128, 8192),
            (128, 1, 64, 8192),
            (128, 1, 16, 8192),
        ]
        prefill, train = (1, 8192, 16), (1, 4096, 16)
    for dtype in dtypes:
        for backend in backends:
            yield from _decode(device, dtype, backend, decodes[0])
            yield _prefill(device, dtype, backend, prefill)
            yield _training(device, dtype, backend, train)
            yield from _compressed(device, dtype, backend, decodes[0])
        yield from _module(device, dtype)
        for shape in decodes[1:]:
            for backend in backends:
                yield from _decode(device, dtype, backend, shape)
