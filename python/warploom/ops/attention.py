"""Family `attention`: softmax attention with grouped key/value heads: dense, packed, decoding from a cache.

Conventions of all functions here, beside those of other libraries:

|         | here                            | flash-attn  | PyTorch's SDPA   | FlashInfer   |
|---------|---------------------------------|-------------|------------------|--------------|
| layout  | [B, S, H, D], packed [T, H, D]  | the same    | [B, H, S, D]     | [T, H, D]    |
| causal  | bottom-right: j <= i + Sk - Sq  | the same    | top-left: j <= i | bottom-right |
| window  | (left, right), included; -1 all | the same    | -                | left alone   |
| no key  | out 0, lse -inf                 | 0, lse +inf | NaN or 0         | 0, lse -inf  |
| lse     | natural, sinks included         | no sinks    | natural          | base 2       |
|         | float32 [B, H, S], [H, T]       | the same    | [B, H, S]        | [T, H]       |
| padding | key_padding_mask, true: hidden  | -           | mask, true: seen | custom mask  |
| pages   | [blocks, page_size, Hkv, D],    | the same    | -                | [pages, 2,   |
|         | int32 table [B, max_blocks]     |             |                  | ...], CSR    |

Scores are softcap tanh(softmax_scale q k^T / softcap) + bias - slope |j - i - Sk + Sq|, then keys are hidden.
Every backward is deterministic: fixed orders of sums, no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from warploom.ops import _attention_arguments as arguments
from warploom.ops import _attention_ops as ops
from warploom.ops._autocast import autocast
from warploom.ops._check import (
    check_device,
    check_dim,
    check_floating,
    check_int32,
    check_same,
    check_shape,
    check_splits,
    check_tensor,
    fail,
    refuse_gradient,
)
from warploom.ops._dropout import dropout_seed
from warploom.ops._fakes import statistics_dtype

_ALL_KEYS = (-1, -1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window: Sequence[int] = _ALL_KEYS,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    backend: str | None = None,
) -> Any:
    """Scaled dot-product attention: out = dropout(softmax(scores)) v; the module says what scores are.

    MHA, GQA and MQA: query head h reads key/value head h // (H // Hkv).

    Args:
        q: [B, Sq, H, D], float32, float16, bfloat16 (float64 on `reference` and `cpu`), any strides with a
            contiguous last dimension (others are copied).
        k: [B, Sk, Hkv, D] and v: [B, Sk, Hkv, Dv], q's dtype; H a multiple of Hkv.
        causal: query i sees the keys j <= i + Sk - Sq.
        softmax_scale: default D ** -0.5.
        window: (left, right): query i sees i + Sk - Sq - left <= j <= i + Sk - Sq + right; -1: no limit.
        softcap: scores become softcap tanh(scores / softcap); 0: they do not.
        sinks: [H], floating: the logit of one more key per head whose value is 0.
        bias: added to the scores, q's dtype, broadcast to [B, H, Sq, Sk].
        alibi_slopes: [H] or [B, H], floating: slope |j - i - Sk + Sq| is subtracted from the scores.
        key_padding_mask: bool [B, Sk], true where a key is padding (torch.nn.MultiheadAttention's meaning).
        dropout_p: each probability is dropped with this probability, the others divided by 1 - dropout_p. The
            mask is Philox at (seed; b H + h, i, j), the same on every backend.
        seed: int64 tensor of one element on q's device; default: drawn from torch's generator.
        return_lse: also return the natural log-sum-exp of the scores, sinks included.
        deterministic: for callers of other libraries: the backward is deterministic either way.
        backend: one of `warploom.BACKENDS`; None chooses.

    Returns:
        out [B, Sq, H, Dv] in q's dtype, contiguous; with `return_lse` also lse [B, H, Sq] in float32 (float64
        for float64). A query that sees no key gets out = 0 and lse = -inf (the sink with sinks). Under
        autocast the inputs are cast to its dtype. Differentiable in every floating input, in both outputs.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
        RuntimeError: the named backend cannot serve the call; forward-mode differentiation.

    Source: Vaswani et al. (2017), equation 1; Ainslie et al., GQA (2023); Dao, FlashAttention-2 (2023).
    """
    op = "attention"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_floating(op, name, tensor)
        check_dim(op, name, tensor, 4, "[B, S, H, D]")
    if bias is None:
        q, k, v = autocast(q, k, v)
    else:
        check_floating(op, "bias", bias)
        q, k, v, bias = autocast(q, k, v, bias)
        check_same(op, "bias", bias, "q", q)
    check_same(op, "k", k, "q", q)
    check_same(op, "v", v, "q", q)
    batch, queries, heads, dim = q.shape
    keys = k.shape[1]
    check_shape(op, "k", k, (batch, keys, k.shape[2], dim))
    arguments.check_heads(op, q, k, v, ("k", "v"))
    if bias is not None:
        full = (batch, heads, queries, keys)
        if bias.dim() != 4 or any(have not in (1, want) for have, want in zip(bias.shape, full)):
            fail(op, "bias", f"a shape that broadcasts to {full}", tuple(bias.shape))
        bias = bias.expand(full)
    if key_padding_mask is not None:
        check_tensor(op, "key_padding_mask", key_padding_mask)
        if key_padding_mask.dtype != torch.bool:
            raise TypeError(
                f"{op}: key_padding_mask: expected dtype bool, got {key_padding_mask.dtype}"
            )
        check_device(op, "key_padding_mask", key_padding_mask, "q", q)
        check_shape(op, "key_padding_mask", key_padding_mask, (batch, keys))
    function = ops.attention_function if return_lse else ops.attention_without_lse_function
    out, lse = function(
        q,
        k,
        v,
        bias,
        arguments.slopes(op, alibi_slopes, q, batch),
        arguments.sinks(op, sinks, q),
        key_padding_mask,
        None,
        None,
        None,
        dropout_seed(op, dropout_p, seed, "q", q),
        arguments.scale(softmax_scale, dim),
        *arguments.window(op, causal, window),
        arguments.softcap(op, softcap),
        float(dropout_p),
        queries,
        keys,
        backend=backend,
    )
    return (out, lse) if return_lse else out


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    block_table: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    window: Sequence[int] = _ALL_KEYS,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    backend: str | None = None,
) -> Any:
    """`attention` of sequences packed one after another: sequence b attends to itself alone.

    Args:
        q: [Tq, H, D]; k: [Tk, Hkv, D] and v: [Tk, Hkv, Dv], or, with `block_table`, pages
            [num_blocks, page_size, Hkv, D] and [..., Dv], page_size from 1 to 256.
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1] on q's device, rising from 0: sequence b has the query rows
            cu_seqlens_q[b] to cu_seqlens_q[b + 1] and that many keys as cu_seqlens_k says. Lengths may be 0.
        max_seqlen_q, max_seqlen_k: at least the longest lengths. No length is read by the host, so that the
            call can be captured in a CUDA graph.
        block_table: int32 [B, max_blocks]: sequence b's keys p page_size to (p + 1) page_size lie in block
            block_table[b, p]. Places behind the last key may hold anything. Not differentiable.
        alibi_slopes: [H] or [B, H]. The others: as in `attention`.

    Returns:
        out [Tq, H, Dv]; with `return_lse` also lse [H, Tq]. Rows that belong to no sequence are 0.

    Raises, source: as `attention`.
    """
    op = "attention_varlen"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_floating(op, name, tensor)
    check_dim(op, "q", q, 3, "[Tq, H, D]")
    layout = "[Tk, Hkv, D]" if block_table is None else "[num_blocks, page_size, Hkv, D]"
    for name, tensor in (("k", k), ("v", v)):
        check_dim(op, name, tensor, 3 if block_table is None else 4, layout)
    q, k, v = autocast(q, k, v)
    check_same(op, "k", k, "q", q)
    check_same(op, "v", v, "q", q)
    arguments.check_heads(op, q, k, v, ("k", "v"))
    check_int32(op, "cu_seqlens_q", cu_seqlens_q, "q", q, (None,))
    batch = cu_seqlens_q.shape[0] - 1
    if batch < 0:
        fail(op, "cu_seqlens_q", "at least 1 element", 0)
    check_int32(op, "cu_seqlens_k", cu_seqlens_k, "q", q, (batch + 1,))
    if block_table is not None:
        check_int32(op, "block_table", block_table, "q", q, (batch, None))
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
            raise RuntimeError(
                f"{op}: block_table: expected tensors that need no gradient, got one that does: "
                "pages are not differentiable"
            )
    for name, value in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if value < 0:
            fail(op, name, "a length >= 0", value)
    function = ops.attention_function if return_lse else ops.attention_without_lse_function
    out, lse = function(
        q,
        k,
        v,
        None,
        arguments.slopes(op, alibi_slopes, q, batch),
        arguments.sinks(op, sinks, q),
        None,
        cu_seqlens_q,
        cu_seqlens_k,
        block_table,
        dropout_seed(op, dropout_p, seed, "q", q),
        arguments.scale(softmax_scale, q.shape[-1]),
        *arguments.window(op, causal, window),
        arguments.softcap(op, softcap),
        float(dropout_p),
        int(max_seqlen_q),
        int(max_seqlen_k),
        backend=backend,
    )
    return (out, lse) if return_lse else out


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    interleaved: bool = False,
    causal: bool = True,
    softmax_scale: float | None = None,
    window: Sequence[int] = _ALL_KEYS,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    split_size: int = 0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention of a few new queries on a cache of keys and values, which k and v may extend first.

    Args:
        q: [B, Sq, H, D], the last Sq tokens of each sequence.
        k_cache: [B, S, Hkv, D] and v_cache: [B, S, Hkv, Dv], q's dtype; or, with `block_table`, pages
            [num_blocks, page_size, Hkv, D] and [..., Dv], page_size from 1 to 256. Rows beyond a sequence's
            length may hold anything, NaN included.
        cache_seqlens: int32 [B] on q's device: the rows that each sequence holds, before k and v are added.
            0 is a length. Never read by the host.
        block_table: int32 [B, max_blocks], as in `attention_varlen`.
        k, v: [B, Sq, Hkv, D] and [B, Sq, Hkv, Dv]: written to the caches, in place, behind those rows; what
            does not fit is not written. None: the caches hold them already.
        rotary: cos and sin [P, R / 2], float32: q and k are rotated at their positions first; needs k.
        interleaved: pairs of the rotation are neighbours, not the two halves.
        causal, softmax_scale, window, softcap, sinks, alibi_slopes: as in `attention`; the key length is
            cache_seqlens[b], plus Sq with k.
        num_splits: parts that the keys of a sequence are cut into, each a block's work; 0 chooses by the
            batch and the device.
        split_size: instead, parts of this many keys (a multiple of 64): a sequence's result then does not
            depend, to the bit, on what else is in the batch.

    Returns:
        out [B, Sq, H, Dv] in q's dtype; with `return_lse` also lse [B, H, Sq]. Not differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
        RuntimeError: a tensor that needs a gradient; the named backend cannot serve the call.

    Source: Dao et al., Flash-Decoding (2023); Kwon et al., PagedAttention (2023).
    """
    op = "attention_decode"
    given = [("q", q), ("k_cache", k_cache), ("v_cache", v_cache)]
    given += [(name, tensor) for name, tensor in (("k", k), ("v", v)) if tensor is not None]
    for name, tensor in given:
        check_floating(op, name, tensor)
        check_dim(op, name, tensor, 4, "[B, S, H, D]")
        check_same(op, name, tensor, "q", q)
        refuse_gradient(op, name, tensor, "decoding is not differentiable, `attention` is")
    batch, queries, _, dim = q.shape
    arguments.check_heads(op, q, k_cache, v_cache, ("k_cache", "v_cache"))
    check_int32(op, "cache_seqlens", cache_seqlens, "q", q, (batch,))
    if block_table is not None:
        check_int32(op, "block_table", block_table, "q", q, (batch, None))
    elif k_cache.shape[0] != batch:
        fail(op, "k_cache", f"q's batch {batch}", tuple(k_cache.shape))
    check_splits(op, num_splits, split_size)
    if (k is None) != (v is None):
        fail(op, "v" if v is None else "k", "a tensor beside the other one", None)
    if rotary is not None and k is None:
        fail(op, "rotary", "None without k", "a pair of tables")
    if k is not None and v is not None:
        q = _append(
            op, q, k, v, k_cache, v_cache, cache_seqlens, block_table, rotary, interleaved, backend
        )
        cache_seqlens = cache_seqlens + queries
    args = (
        q,
        k_cache,
        v_cache,
        cache_seqlens,
        block_table,
        arguments.slopes(op, alibi_slopes, q, batch),
        arguments.sinks(op, sinks, q),
        arguments.scale(softmax_scale, dim),
        *arguments.window(op, causal, window),
        arguments.softcap(op, softcap),
        int(num_splits),
        int(split_size),
    )
    chosen = ops.attention_decode_op.choose(*args, backend=backend)
    out, lse = ops.attention_decode_op.overloads[chosen](*args)
    return (out, lse) if return_lse else out


def _append(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    rotary: tuple[Tensor, Tensor] | None,
    interleaved: bool,
    backend: str | None,
) -> Tensor:
    """Writes k, rotated, and v behind each sequence's rows; returns q, rotated."""
    from warploom.ops.rope import apply_rotary

    batch, queries = q.shape[:2]
    check_shape(op, "k", k, (batch, queries, *k_cache.shape[2:]))
    check_shape(op, "v", v, (batch, queries, *v_cache.shape[2:]))
    cos, sin = (None, None) if rotary is None else rotary
    if cos is not None and sin is not None:
        steps = torch.arange(queries, device=q.device, dtype=torch.int32)
        positions = cache_seqlens.unsqueeze(1) + steps
        q = apply_rotary(q, cos, sin, positions=positions, interleaved=interleaved, backend=backend)
    args = (k, v, k_cache, v_cache, cache_seqlens, block_table, cos, sin, bool(interleaved))
    chosen = ops.attention_cache_append_op.choose(*args, backend=backend)
    ops.attention_cache_append_op.overloads[chosen](*args)
    return q


def merge_attention(
    out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Attention to two disjoint sets of keys, joined: out = exp(lse1 - lse) out1 + exp(lse2 - lse) out2.

    Args:
        out1, out2: [B, S, H, D] (packed: [T, H, D]), one shape and dtype.
        lse1, lse2: [B, H, S] (packed: [H, T]), float32 (float64 for float64), as the functions here return
            them. A part whose lse is -inf, or +inf as flash-attn has it, weighs nothing.
        backend: one of `warploom.BACKENDS`; None chooses.

    Returns:
        out like out1 and lse = log(exp(lse1) + exp(lse2)), contiguous. Differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax (2018), section 3.1.
    """
    op = "merge_attention"
    check_floating(op, "out1", out1)
    packed = out1.dim() == 3
    if not packed:
        check_dim(op, "out1", out1, 4, "[B, S, H, D]")
    check_same(op, "out2", out2, "out1", out1)
    check_shape(op, "out2", out2, out1.shape)
    *rows, heads, _ = out1.shape
    for name, lse in (("lse1", lse1), ("lse2", lse2)):
        check_tensor(op, name, lse)
        if lse.dtype != statistics_dtype(out1):
            raise TypeError(f"{op}: {name}: expected {statistics_dtype(out1)}, got {lse.dtype}")
        check_device(op, name, lse, "out1", out1)
        check_shape(op, name, lse, (*rows[:-1], heads, rows[-1]))
    if packed:
        out1, out2 = out1.unsqueeze(0), out2.unsqueeze(0)
        lse1, lse2 = lse1.unsqueeze(0), lse2.unsqueeze(0)
    out, lse = ops.merge_attention_function(out1, lse1, out2, lse2, backend=backend)
    return (out.squeeze(0), lse.squeeze(0)) if packed else (out, lse)
