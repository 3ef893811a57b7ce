"""Family `mla`: multi-head latent attention, expanded for prefill and training, absorbed for decoding.

A token is kept as one latent [d_latent], normalised, and one rotated key [d_rope] that all heads share
(DeepSeek-V2, arXiv:2405.04434). Expanded, head h has the key [W_UK,h latent; k_rope] and the value
W_UV,h latent. Absorbed, the query becomes [W_UK,h^T q_nope; q_rope], and the latent itself is key and value
of all heads: d_latent + d_rope wide as a key, d_latent wide as a value.

|         | here                                       | FlashMLA                  | FlashInfer         |
|---------|--------------------------------------------|---------------------------|--------------------|
| q       | [B, Sq, H, d_latent + d_rope], latent first | the same                  | q_nope, q_pe apart |
| cache   | [blocks, page_size, d_latent + d_rope],     | [blocks, 64, 1, 576]      | ckv, kpe apart     |
|         | or [B, S, ...]                              |                           |                    |
| sizes   | multiples of 16                             | 512 + 64                  | 512 + 64           |
| scale   | given: (d_nope + d_rope) ** -0.5 and YaRN's | default 576 ** -0.5       | given              |
| lse     | natural, [B, H, Sq], no key: -inf           | natural, +inf             | base 2             |
| fp8 row | d_latent e4m3, a float32 scale for each     | the same (656 bytes)      | -                  |
|         | 128, d_rope bfloat16                        |                           |                    |

Compressed caches have dtype float8_e4m3fn or int8 and rows of `compressed_row_bytes` bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from warploom.ops import _mla_ops as ops
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
from warploom.ops._mla_prefix import Prefix, expand_latent
from warploom.ops.attention import attention, attention_varlen
from warploom.reference.mla import LARGEST, compressed_row_bytes


def _check_cache(op: str, kv_cache: Tensor, like: Tensor, width: int, d_latent: int) -> None:
    """`like`'s dtype with rows of `width`, or a compressed cache with rows of bytes."""
    check_tensor(op, "kv_cache", kv_cache)
    check_dim(op, "kv_cache", kv_cache, 3, "[B, S, D] or [num_blocks, page_size, D]")
    check_device(op, "kv_cache", kv_cache, "the first tensor", like)
    if not 0 < d_latent <= width:
        fail(op, "d_latent", f"1 to {width}", d_latent)
    if kv_cache.dtype in LARGEST:
        width = compressed_row_bytes(d_latent, width - d_latent)
    elif kv_cache.dtype != like.dtype:
        dtype = str(like.dtype).removeprefix("torch.")
        got = str(kv_cache.dtype).removeprefix("torch.")
        raise TypeError(f"{op}: kv_cache: expected dtype {dtype}, float8_e4m3fn or int8, got {got}")
    if kv_cache.shape[-1] != width:
        fail(op, "kv_cache", f"rows of {width}", tuple(kv_cache.shape))


def _check_table(
    op: str, kv_cache: Tensor, block_table: Tensor | None, like: Tensor, batch: int
) -> None:
    if block_table is not None:
        check_int32(op, "block_table", block_table, "the first tensor", like, (batch, None))
        if not 1 <= kv_cache.shape[1] <= 256:
            fail(op, "kv_cache", "pages of 1 to 256 rows", tuple(kv_cache.shape))
    elif kv_cache.shape[0] != batch:
        fail(op, "kv_cache", f"a batch of {batch}", tuple(kv_cache.shape))


def mla_decode(
    q: Tensor,
    kv_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    *,
    d_latent: int,
    softmax_scale: float,
    causal: bool = True,
    num_splits: int = 0,
    split_size: int = 0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Absorbed latent attention of a few new queries on a cache: out = softmax(scale q c^T) c[:d_latent].

    Args:
        q: [B, Sq, H, d_latent + d_rope], the last Sq tokens of each sequence: W_UK^T q_nope, then the
            rotated q_rope. float32, float16, bfloat16 (float64 on `reference` and `cpu`).
        kv_cache: [B, S, d_latent + d_rope], or with `block_table` pages [num_blocks, page_size, ...],
            page_size from 1 to 256, q's dtype; or compressed, dtype float8_e4m3fn or int8, with rows of
            `compressed_row_bytes(d_latent, d_rope)` bytes. Rows beyond a length may hold anything.
        cache_seqlens: int32 [B] on q's device: tokens that each sequence holds, the new ones included; 0 is a
            length. Never read by the host.
        block_table: int32 [B, max_blocks]: row b's tokens p page_size to (p + 1) page_size lie in block
            block_table[b, p]. Places behind the last token may hold anything.
        d_latent: features of the latent. The kernels take multiples of 16, up to 512 (d_rope: to 256).
        softmax_scale: (d_nope + d_rope) ** -0.5, times YaRN's mscale squared; never
            (d_latent + d_rope) ** -0.5, which is why there is no default.
        causal: query i sees the keys j <= i + cache_seqlens[b] - Sq.
        num_splits: parts that the tokens of a sequence are cut into; 0: a scheduler on the device shares all
            tokens of the batch among its multiprocessors.
        split_size: instead, parts of this many tokens (a multiple of 64): a sequence's result then does not
            depend, to the bit, on what else is in the batch.
        return_lse: also return the natural log-sum-exp of the scores.
        backend: one of `warploom.BACKENDS`; None chooses.

    Returns:
        out [B, Sq, H, d_latent] in q's dtype, to be multiplied by W_UV; with `return_lse` also lse
        [B, H, Sq], float32 (float64 for float64). A query that sees no key gets 0 and -inf. Not
        differentiable: `mla_absorbed` is.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
        RuntimeError: a tensor that needs a gradient; the named backend cannot serve the call.

    Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1, appendix C.
    """
    op = "mla_decode"
    check_floating(op, "q", q)
    check_dim(op, "q", q, 4, "[B, Sq, H, d_latent + d_rope]")
    _check_cache(op, kv_cache, q, q.shape[-1], d_latent)
    for name, tensor in (("q", q), ("kv_cache", kv_cache)):
        refuse_gradient(op, name, tensor, "decoding is not differentiable, `mla_absorbed` is")
    batch = q.shape[0]
    check_int32(op, "cache_seqlens", cache_seqlens, "q", q, (batch,))
    _check_table(op, kv_cache, block_table, q, batch)
    check_splits(op, num_splits, split_size)
    args = (
        q,
        kv_cache,
        cache_seqlens,
        block_table,
        int(d_latent),
        float(softmax_scale),
        bool(causal),
        int(num_splits),
        int(split_size),
    )
    chosen = ops.mla_decode_op.choose(*args, backend=backend)
    out, lse = ops.mla_decode_op.overloads[chosen](*args)
    return (out, lse) if return_lse else out


def mla_absorbed(
    q: Tensor,
    kv: Tensor,
    *,
    d_latent: int,
    softmax_scale: float,
    causal: bool = True,
    kv_seqlens: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Absorbed latent attention for training: `mla_decode` on latents that need gradients.

    Nothing is expanded: keys and values cost d_latent + d_rope numbers a token whatever the heads.

    Args:
        q: [B, Sq, H, d_latent + d_rope], as in `mla_decode`.
        kv: [B, Sk, d_latent + d_rope], q's dtype: latents, then rotated keys.
        d_latent, softmax_scale, causal, return_lse, backend: as in `mla_decode`.
        kv_seqlens: int32 [B] on q's device: rows of kv that count; None: all. Never read by the host.

    Returns:
        out [B, Sq, H, d_latent], and lse [B, H, Sq] with `return_lse`. Differentiable in q and kv, in both
        outputs; deterministic. Under autocast the inputs are cast to its dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
        RuntimeError: the named backend cannot serve the call; forward-mode differentiation.

    Source: DeepSeek-V2 (arXiv:2405.04434), appendix C, absorbed; the gradient is `reference.mla`'s.
    """
    op = "mla_absorbed"
    check_floating(op, "q", q)
    check_floating(op, "kv", kv)
    check_dim(op, "q", q, 4, "[B, Sq, H, d_latent + d_rope]")
    check_dim(op, "kv", kv, 3, "[B, Sk, d_latent + d_rope]")
    q, kv = autocast(q, kv)
    check_same(op, "kv", kv, "q", q)
    check_shape(op, "kv", kv, (q.shape[0], kv.shape[1], q.shape[-1]))
    if not 0 < d_latent <= q.shape[-1]:
        fail(op, "d_latent", f"1 to {q.shape[-1]}", d_latent)
    if kv_seqlens is None:
        kv_seqlens = torch.full((q.shape[0],), kv.shape[1], dtype=torch.int32, device=q.device)
    check_int32(op, "kv_seqlens", kv_seqlens, "q", q, (q.shape[0],))
    out, lse = ops.mla_absorbed_function(
        q, kv, kv_seqlens, None, int(d_latent), float(softmax_scale), bool(causal), 0, 0, backend=backend
    )  # fmt: skip
    return (out, lse) if return_lse else out


def mla_cache_append(
    compressed_kv: Tensor,
    norm_weight: Tensor,
    kv_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    *,
    rotary: tuple[Tensor, Tensor] | None = None,
    interleaved: bool = True,
    eps: float = 1e-6,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Write new tokens to a latent cache, in place: RMSNorm of the latent, rotary of the shared key.

    Args:
        compressed_kv: [B, S, d_latent + d_rope], what `kv_a_proj_with_mqa` gives; or, with `cu_seqlens`,
            [T, d_latent + d_rope], the new tokens of the sequences one after another.
        norm_weight: [d_latent], compressed_kv's dtype or float32.
        kv_cache: as in `mla_decode`, dense in compressed_kv's dtype, or compressed.
        cache_seqlens: int32 [B]: tokens that each sequence held before; the new ones go behind them. Rows
            beyond the capacity, or of a negative block, are not written. Never read by the host.
        block_table: int32 [B, max_blocks], as in `mla_decode`.
        rotary: cos and sin [P, d_rope / 2], float32 (float64 for float64); None: no rotation. A position
            beyond P takes the last row.
        interleaved: pairs of the rotation are neighbours (DeepSeek's), not the two halves.
        eps: added to the mean of squares.
        cu_seqlens: int32 [B + 1], rising from 0.
        backend: one of `warploom.BACKENDS`; None chooses.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        RuntimeError: a tensor that needs a gradient; the named backend cannot serve the call.

    Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1.3 and 3.1.2; Zhang and Sennrich, RMSNorm (2019).
    """
    op = "mla_cache_append"
    check_floating(op, "compressed_kv", compressed_kv)
    packed = cu_seqlens is not None
    layout = "[T, d_latent + d_rope]" if packed else "[B, S, d_latent + d_rope]"
    check_dim(op, "compressed_kv", compressed_kv, 2 if packed else 3, layout)
    check_floating(op, "norm_weight", norm_weight)
    check_dim(op, "norm_weight", norm_weight, 1, "[d_latent]")
    check_device(op, "norm_weight", norm_weight, "compressed_kv", compressed_kv)
    _check_cache(op, kv_cache, compressed_kv, compressed_kv.shape[-1], norm_weight.shape[0])
    for name, tensor in (("compressed_kv", compressed_kv), ("norm_weight", norm_weight)):
        refuse_gradient(op, name, tensor, "a cache is not differentiable, use torch.no_grad()")
    check_int32(op, "cache_seqlens", cache_seqlens, "compressed_kv", compressed_kv, (None,))
    batch = cache_seqlens.shape[0]
    _check_table(op, kv_cache, block_table, compressed_kv, batch)
    if cu_seqlens is not None:
        check_int32(op, "cu_seqlens", cu_seqlens, "compressed_kv", compressed_kv, (batch + 1,))
    elif compressed_kv.shape[0] != batch:
        fail(op, "compressed_kv", f"a batch of {batch}", tuple(compressed_kv.shape))
    cos, sin = (None, None) if rotary is None else rotary
    d_rope = compressed_kv.shape[-1] - norm_weight.shape[0]
    for name, table in (("cos", cos), ("sin", sin)):
        if table is not None:
            check_floating(op, name, table)
            check_dim(op, name, table, 2, "[P, d_rope / 2]")
            if 2 * table.shape[1] != d_rope:
                fail(op, name, f"shape (P, {d_rope // 2})", tuple(table.shape))
    args = (
        compressed_kv,
        norm_weight,
        kv_cache,
        cache_seqlens,
        block_table,
        cu_seqlens,
        cos,
        sin,
        float(eps),
        bool(interleaved),
    )
    chosen = ops.mla_cache_append_op.choose(*args, backend=backend)
    ops.mla_cache_append_op.overloads[chosen](*args)


def mla_prefill(
    q: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    kv_b_weight: Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    kv_cache: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    block_table: Tensor | None = None,
    max_cache_seqlen: int = 0,
    chunk_size: int = 4096,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Expanded latent attention: keys and values of all heads made from the latents, then `attention`.

    Args:
        q: [B, S, H, d_nope + d_rope], rotated; or, with `cu_seqlens`, packed [T, H, d_nope + d_rope].
        latent: [B, S, d_latent] or [T, d_latent], normalised; k_rope: [..., d_rope], rotated. q's dtype.
        kv_b_weight: [H (d_nope + d_value), d_latent], `kv_b_proj`'s: for each head W_UK, then W_UV.
        softmax_scale: as in `mla_decode`.
        causal: a query sees no token behind its own.
        cu_seqlens: int32 [B + 1]: the tokens are B sequences one after another.
        max_seqlen: at least the longest of them.
        kv_cache, block_table: as in `mla_decode`: a prefix that every query of its sequence sees. It is
            expanded chunk by chunk and merged by the log-sum-exp. Not differentiable.
        cache_seqlens: int32 [B]: the prefix's tokens; needed with kv_cache.
        max_cache_seqlen: at least the longest prefix: says how many chunks there are; 0: the capacity.
        chunk_size: tokens of a sequence that are expanded at one time, a multiple of 256.
        return_lse: also return the natural log-sum-exp of the scores.
        backend: one of `warploom.BACKENDS`; None chooses.

    Returns:
        out [..., H, d_value] in q's dtype, and lse [B, H, S] (packed [H, T]) with `return_lse`.
        Differentiable in q, latent, k_rope and kv_b_weight, where there is no prefix.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
        RuntimeError: a tensor that needs a gradient beside a prefix; the named backend cannot serve the call.

    Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1.2 and appendix C.
    """
    op = "mla_prefill"
    packed = cu_seqlens is not None
    check_floating(op, "q", q)
    check_dim(op, "q", q, 3 if packed else 4, "[T, H, D]" if packed else "[B, S, H, D]")
    *rows, heads, width = q.shape
    d_latent, d_rope = latent.shape[-1], k_rope.shape[-1]
    check_shape(op, "latent", latent, (*rows, d_latent))
    check_shape(op, "k_rope", k_rope, (*rows, d_rope))
    check_dim(op, "kv_b_weight", kv_b_weight, 2, "[H (d_nope + d_value), d_latent]")
    d_value = kv_b_weight.shape[0] // max(heads, 1) - (width - d_rope)
    if d_rope >= width or d_value < 1 or kv_b_weight.shape[0] % heads:
        fail(
            op,
            "kv_b_weight",
            f"{heads} heads of more than d_nope {width - d_rope} rows",
            tuple(kv_b_weight.shape),
        )
    check_shape(op, "kv_b_weight", kv_b_weight, (kv_b_weight.shape[0], d_latent))
    k, v = expand_latent(latent, k_rope, kv_b_weight, heads, d_value)
    scores: dict[str, Any] = {
        "softmax_scale": softmax_scale,
        "return_lse": True,
        "backend": backend,
    }
    if cu_seqlens is None:
        out, lse = attention(q, k, v, causal=causal, **scores)
    else:
        out, lse = attention_varlen(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=causal, **scores
        )
    if kv_cache is not None:
        batch = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else rows[0]
        if cache_seqlens is None:
            raise ValueError(f"{op}: cache_seqlens: expected a tensor beside kv_cache, got None")
        if chunk_size < 256 or chunk_size % 256:
            fail(op, "chunk_size", "a multiple of 256", chunk_size)
        check_int32(op, "cache_seqlens", cache_seqlens, "q", q, (batch,))
        _check_cache(op, kv_cache, q, d_latent + d_rope, d_latent)
        _check_table(op, kv_cache, block_table, q, batch)
        prefix = Prefix(kv_cache, cache_seqlens, block_table, max_cache_seqlen, chunk_size)
        part = (q, kv_b_weight, d_latent, d_value, softmax_scale, cu_seqlens, max_seqlen, backend)
        out, lse = prefix.merge(out, lse, *part)
    return (out, lse) if return_lse else out
