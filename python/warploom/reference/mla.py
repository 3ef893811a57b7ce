"""Multi-head latent attention in plain PyTorch: the absorbed form on a cache, its gradient, the cache's rows.

A row of a cache is one token: the normalised latent [d_latent], which is key and value of all heads, and the
rotated key [d_rope] that they share. In a compressed cache (dtype float8_e4m3fn or int8) a row is bytes:
d_latent numbers of that dtype, a float32 scale for each 128 of them, and the rotated key in bfloat16;
656 bytes at (512, 64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from warploom.reference.attention import rotate_at

#: Latent features that share a scale in a compressed cache.
SCALE_GROUP = 128
#: The largest number of each compressed dtype: what a group's largest magnitude becomes.
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def scale_count(d_latent: int) -> int:
    return -(-d_latent // SCALE_GROUP)


def compressed_row_bytes(d_latent: int, d_rope: int) -> int:
    return d_latent + 4 * scale_count(d_latent) + 2 * d_rope


def compress_rows(latent: Tensor, k_rope: Tensor, dtype: torch.dtype) -> Tensor:
    """latent [..., d_latent], k_rope [..., d_rope] -> [..., compressed_row_bytes] in `dtype`.

    scale = largest magnitude of the group / LARGEST[dtype] (1 for a group of zeros), number = latent / scale,
    rounded to nearest, ties to even.
    """
    d_latent = latent.shape[-1]
    padded = torch.nn.functional.pad(latent.float(), (0, -d_latent % SCALE_GROUP))
    groups = padded.unflatten(-1, (-1, SCALE_GROUP))
    largest = groups.abs().amax(-1, keepdim=True)
    scales = torch.where(largest == 0, 1.0, largest / LARGEST[dtype])
    numbers = groups / scales
    if dtype == torch.int8:
        numbers = numbers.round()
    codes = numbers.to(dtype).flatten(-2)[..., :d_latent].contiguous()
    parts = (codes, scales.squeeze(-1).contiguous(), k_rope.to(torch.bfloat16).contiguous())
    return torch.cat([part.view(torch.uint8) for part in parts], dim=-1).view(dtype)


def expand_rows(rows: Tensor, d_latent: int) -> Tensor:
    """Rows of any cache as [..., d_latent + d_rope]: compressed ones in float32, others as they are."""
    if rows.dtype not in LARGEST:
        return rows
    scales_end = d_latent + 4 * scale_count(d_latent)
    codes = rows[..., :d_latent].float()
    raw = rows.contiguous().view(torch.uint8)
    scales = raw[..., d_latent:scales_end].clone().view(torch.float32)
    k_rope = raw[..., scales_end:].clone().view(torch.bfloat16)
    spread = scales.repeat_interleave(SCALE_GROUP, dim=-1)[..., :d_latent]
    return torch.cat((codes * spread, k_rope.float()), dim=-1)


def gather_rows(kv_cache: Tensor, block_table: Tensor | None, row: int, length: int) -> Tensor:
    """The first `length` rows of sequence `row` of a cache, contiguous or in pages."""
    if block_table is None:
        return kv_cache[row, :length]
    positions = torch.arange(length, device=kv_cache.device)
    blocks = block_table[row][positions // kv_cache.shape[1]].long()
    return kv_cache[blocks, positions % kv_cache.shape[1]]


def _scores(q: Tensor, kv: Tensor, softmax_scale: float, causal: bool) -> Tensor:
    """[H, Sq, Sk] of q [Sq, H, D] and kv [Sk, D], -inf where a key is not seen."""
    scores = torch.einsum("qhd,kd->hqk", q, kv) * softmax_scale
    if causal:
        queries, keys = q.shape[0], kv.shape[0]
        last = torch.arange(queries, device=q.device) + (keys - queries)
        hidden = torch.arange(keys, device=q.device) > last.unsqueeze(-1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    return torch.exp(scores - lse.masked_fill(torch.isneginf(lse), 0.0).unsqueeze(-1))


def mla_decode(
    q: Tensor,
    kv_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    d_latent: int,
    softmax_scale: float,
    causal: bool,
    num_splits: int,
    split_size: int,
) -> tuple[Tensor, Tensor]:
    """out = softmax(softmax_scale q c^T) c[:d_latent] over the first cache_seqlens[b] rows c of a cache.

    q [B, Sq, H, d_latent + d_rope]; kv_cache [B, S, d_latent + d_rope], or pages [num_blocks, page_size, ...]
    with block_table int32 [B, max_blocks], q's dtype or compressed -> out [B, Sq, H, d_latent], lse
    [B, H, Sq]. Query i sees the keys j <= i + cache_seqlens[b] - Sq, or all. How the keys are split changes
    only the order of sums. Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1 and appendix C, absorbed.
    """
    batch, queries, heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty((batch, queries, heads, d_latent))
    lse = q.new_empty((batch, heads, queries), dtype=wide)
    for row, length in enumerate(cache_seqlens.tolist()):
        kv = expand_rows(gather_rows(kv_cache, block_table, row, length), d_latent).to(wide)
        scores = _scores(q[row].to(wide), kv, softmax_scale, causal)
        lse[row] = torch.logsumexp(scores, dim=-1)
        probabilities = _probabilities(scores, lse[row])
        out[row] = torch.einsum("hqk,kd->qhd", probabilities, kv[:, :d_latent]).to(q.dtype)
    return out, lse


def mla_absorbed_backward(
    grad_out: Tensor,
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    kv_seqlens: Tensor,
    d_latent: int,
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """dS = P (dO c^T - rowsum(dO O) + dlse), dq = s dS c, dc = s dS^T q, plus P^T dO in its latent part.

    grad_out, out [B, Sq, H, d_latent], q [B, Sq, H, D], kv [B, Sk, D] of which kv_seqlens[b] rows count,
    lse, grad_lse [B, H, Sq] -> grad_q like q and grad_kv like kv, 0 in rows that do not count.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_kv = torch.zeros_like(kv, memory_format=torch.contiguous_format)
    for row, length in enumerate(kv_seqlens.tolist()):
        one_q, one_kv, grad = q[row].to(wide), kv[row, :length].to(wide), grad_out[row].to(wide)
        scores = _scores(one_q, one_kv, softmax_scale, causal)
        probabilities = _probabilities(scores, lse[row].to(wide))
        delta = (grad * out[row].to(wide)).sum(-1).T
        if grad_lse is not None:
            delta = delta - grad_lse[row].to(wide)
        products = torch.einsum("qhd,kd->hqk", grad, one_kv[:, :d_latent])
        grad_scores = probabilities * (products - delta.unsqueeze(-1)) * softmax_scale
        grad_q[row] = torch.einsum("hqk,kd->qhd", grad_scores, one_kv).to(q.dtype)
        one_grad = torch.einsum("hqk,qhd->kd", grad_scores, one_q)
        one_grad[:, :d_latent] += torch.einsum("hqk,qhd->kd", probabilities, grad)
        grad_kv[row, :length] = one_grad.to(kv.dtype)
    return grad_q, grad_kv


def mla_cache_append(
    compressed_kv: Tensor,
    norm_weight: Tensor,
    kv_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    cu_seqlens: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    interleaved: bool,
) -> None:
    """Writes new tokens to a cache: the latent normalised, the shared key rotated at its position.

    compressed_kv [B, S, d_latent + d_rope], d_latent = the size of norm_weight, goes to the rows
    cache_seqlens[b] + i; packed [T, ...] with cu_seqlens int32 [B + 1] likewise, sequence by sequence.
    latent / sqrt(mean(latent^2) + eps) * norm_weight; cos, sin [P, d_rope / 2]. A row beyond the cache's
    capacity, or of a negative block, is not written.
    """
    batch, d_latent = cache_seqlens.shape[0], norm_weight.shape[0]
    wide = torch.promote_types(compressed_kv.dtype, torch.float32)
    if cu_seqlens is None:
        count = compressed_kv.shape[1]
        owner = torch.arange(batch, device=compressed_kv.device).repeat_interleave(count)
        place = torch.arange(count, device=compressed_kv.device).repeat(batch)
        tokens = compressed_kv.flatten(0, 1)
    else:
        lengths = cu_seqlens.diff().long()
        owner = torch.arange(batch, device=compressed_kv.device).repeat_interleave(lengths)
        tokens = compressed_kv[: owner.shape[0]]
        place = torch.arange(owner.shape[0], device=owner.device) - cu_seqlens.long()[owner]
    positions = cache_seqlens.long()[owner] + place
    latent, k_rope = tokens.split([d_latent, tokens.shape[-1] - d_latent], dim=-1)
    latent = latent.to(wide)
    latent = latent * torch.rsqrt(latent.square().mean(-1, keepdim=True) + eps)
    latent = latent * norm_weight.to(wide)
    if cos is not None and sin is not None:
        heads = k_rope[:, None, None, :]  # [T, 1, 1, d_rope]
        k_rope = rotate_at(heads, cos, sin, positions.unsqueeze(1), interleaved)[:, 0, 0]
    if kv_cache.dtype in LARGEST:
        rows = compress_rows(latent, k_rope, kv_cache.dtype)
    else:
        rows = torch.cat((latent.to(kv_cache.dtype), k_rope.to(kv_cache.dtype)), dim=-1)
    page_size = kv_cache.shape[1]
    if block_table is None:
        blocks, slots, valid = owner, positions, positions < page_size
    else:
        places = positions // page_size
        valid = places < block_table.shape[1]
        blocks = block_table.long()[owner, places.clamp(max=block_table.shape[1] - 1)]
        slots, valid = positions % page_size, valid & (blocks >= 0)
    # Bytes: index_put has no float8.
    held = kv_cache.view(torch.uint8) if kv_cache.dtype in LARGEST else kv_cache
    held[blocks[valid], slots[valid]] = rows[valid].view(held.dtype)
