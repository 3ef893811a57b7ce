"""Softmax attention with grouped key/value heads in plain PyTorch: dense, packed, paged, merged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from warploom.reference.dropout import keep_mask


@dataclass
class _Scoring:
    """What turns products of queries and keys into probabilities, for one dense batch.

    bias [B, H, Sq, Sk], alibi_slopes [B, H], key_padding_mask bool [B, Sk] (true: hidden) and seed may be
    None. `first_batch` is the place of the batch's first entry in the whole call.
    """

    softmax_scale: float
    window_left: int
    window_right: int
    softcap: float = 0.0
    dropout_p: float = 0.0
    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    key_padding_mask: Tensor | None = None
    seed: Tensor | None = None
    first_batch: int = 0

    def distance(self, q: Tensor, k: Tensor) -> Tensor:
        """[Sq, Sk]: key j - (i + Sk - Sq), how far a key lies behind its query."""
        queries, keys = q.shape[1], k.shape[1]
        rows = torch.arange(queries, device=q.device) + (keys - queries)
        return torch.arange(keys, device=q.device) - rows.unsqueeze(-1)

    def scores(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
        """Masked scores [B, H, Sq, Sk] in at least float32, and their derivative by the scaled product."""
        wide = torch.promote_types(q.dtype, torch.float32)
        group = q.shape[2] // k.shape[2]
        keys = k.to(wide).repeat_interleave(group, dim=2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), keys) * self.softmax_scale
        slope = None
        if self.softcap > 0:
            capped = torch.tanh(scores / self.softcap)
            scores, slope = capped * self.softcap, 1 - capped * capped
        if self.bias is not None:
            scores = scores + self.bias.to(wide)
        distance = self.distance(q, k)
        if self.alibi_slopes is not None:
            scores = scores - self.alibi_slopes[:, :, None, None].to(wide) * distance.abs()
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if self.window_left >= 0:
            hidden = hidden | (distance < -self.window_left)
        if self.window_right >= 0:
            hidden = hidden | (distance > self.window_right)
        hidden = hidden.expand(scores.shape)
        if self.key_padding_mask is not None:
            hidden = hidden | self.key_padding_mask[:, None, None, :]
        return scores.masked_fill(hidden, float("-inf")), slope

    def dropout_factors(self, scores: Tensor) -> Tensor | None:
        """[B, H, Sq, Sk]: 1 / (1 - p) where a probability stays, else 0; None without dropout."""
        if self.seed is None or self.dropout_p == 0:
            return None
        batch, heads, queries, keys = scores.shape
        kept = keep_mask(
            self.seed, self.dropout_p, self.first_batch * heads, batch * heads, queries, keys
        )
        return kept.view(scores.shape).to(scores.dtype) / (1 - self.dropout_p)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse); a row without any visible key (lse -inf) is all 0."""
    seen = ~torch.isneginf(lse)
    return torch.exp(scores - lse.masked_fill(~seen, 0.0).unsqueeze(-1))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scoring: _Scoring
) -> tuple[Tensor, Tensor]:
    scores, _ = scoring.scores(q, k)
    lse = torch.logsumexp(scores, dim=-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype).view(1, -1, 1))
    probabilities = _probabilities(scores, lse)
    factors = scoring.dropout_factors(scores)
    if factors is not None:
        probabilities = probabilities * factors
    values = v.to(scores.dtype).repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    out = torch.einsum("bhqk,bkhd->bqhd", probabilities, values)
    return out.to(q.dtype).contiguous(), lse.contiguous()


def gather_pages(cache: Tensor, block_table: Tensor, length: int) -> Tensor:
    """Rows [1, length, Hkv, D] of one sequence of a cache [num_blocks, page_size, Hkv, D].

    block_table [max_blocks]: the block that holds its rows from page_size * place on.
    """
    positions = torch.arange(length, device=cache.device)
    blocks = block_table[positions // cache.shape[1]].long()
    return cache[blocks, positions % cache.shape[1]].unsqueeze(0)


def _sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """Place, query rows and key rows of each packed sequence."""
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for place in range(len(bounds_q) - 1):
        yield (
            place,
            slice(bounds_q[place], bounds_q[place + 1]),
            slice(bounds_k[place], bounds_k[place + 1]),
        )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_table: Tensor | None,
    dropout_seed: Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> tuple[Tensor, Tensor]:
    """out = dropout(softmax(scores)) v, lse = log(exp(sink) + sum over visible keys of exp(score)).

    score = softcap tanh(softmax_scale q k^T / softcap) + bias - slope |j - i - Sk + Sq|, seen where
    -window_left <= j - i - Sk + Sq <= window_right (-1: no limit) and the key is no padding.
    Dense: q [B, Sq, H, D], k [B, Sk, Hkv, D], v [B, Sk, Hkv, Dv] -> out [B, Sq, H, Dv], lse [B, H, Sq].
    Packed (cu_seqlens int32 [B + 1]): q [Tq, H, D], k [Tk, Hkv, D] or, with block_table int32
    [B, max_blocks], pages [num_blocks, page_size, Hkv, D] -> out [Tq, H, Dv], lse [H, Tq].
    Sources: Vaswani et al. 2017, eq. 1; Ainslie et al. 2023 (groups); Press et al. 2021 (ALiBi); Gemma 2,
    2024 (soft-cap); Xiao et al. 2023 and gpt-oss, 2025 (sinks).
    """
    scoring = _Scoring(
        softmax_scale, window_left, window_right, softcap, dropout_p, bias, alibi_slopes,
        key_padding_mask, dropout_seed,
    )  # fmt: skip
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return _forward(q, k, v, sinks, scoring)
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros((*q.shape[:2], v.shape[-1]))
    lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=wide)
    for place, rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k):
        if block_table is not None:
            length, pages = keys.stop - keys.start, block_table[place]
            one_k, one_v = (gather_pages(cache, pages, length) for cache in (k, v))
        else:
            one_k, one_v = k[keys].unsqueeze(0), v[keys].unsqueeze(0)
        scoring.first_batch = place
        if alibi_slopes is not None:
            scoring.alibi_slopes = alibi_slopes[place : place + 1]
        one_out, one_lse = _forward(q[rows].unsqueeze(0), one_k, one_v, sinks, scoring)
        out[rows], lse[:, rows] = one_out[0], one_lse[0]
    return out, lse


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    scoring: _Scoring,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad_q, grad_k, grad_v, the gradient of the biased scores, and its distance-weighted row sums."""
    scores, slope = scoring.scores(q, k)
    wide = scores.dtype
    group = q.shape[2] // k.shape[2]
    keys, values = (tensor.to(wide).repeat_interleave(group, dim=2) for tensor in (k, v))
    probabilities = _probabilities(scores, lse.to(wide))
    grad = grad_out.to(wide)
    delta = (grad * out.to(wide)).sum(-1).transpose(1, 2)
    if grad_lse is not None:
        delta = delta - grad_lse.to(wide)
    grad_probabilities = torch.einsum("bqhd,bkhd->bhqk", grad, values)
    dropped, factors = probabilities, scoring.dropout_factors(scores)
    if factors is not None:
        grad_probabilities = grad_probabilities * factors
        dropped = probabilities * factors
    grad_biased = probabilities * (grad_probabilities - delta.unsqueeze(-1))
    grad_scores = grad_biased if slope is None else grad_biased * slope
    grad_scores = grad_scores * scoring.softmax_scale
    per_head = (*k.shape[:3], group)
    grad_q = torch.einsum("bhqk,bkhd->bqhd", grad_scores, keys)
    grad_k = torch.einsum("bhqk,bqhd->bkhd", grad_scores, q.to(wide))
    grad_v = torch.einsum("bhqk,bqhd->bkhd", dropped, grad)
    grad_k = grad_k.view(*per_head, k.shape[-1]).sum(3)
    grad_v = grad_v.view(*per_head, v.shape[-1]).sum(3)
    by_distance = -(grad_biased * scoring.distance(q, k).abs()).sum(-1)
    return grad_q, grad_k, grad_v, grad_biased, by_distance


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    dropout_seed: Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    max_seqlen_q: int,
    max_seqlen_k: int,
    needs_bias: bool,
    needs_distance: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dS = P (dP - rowsum(dO O) + dlse), P = exp(score - lse); dq = s dS k, dk = s dS^T q, dv = P^T dO.

    Returns grad_q, grad_k, grad_v like q, k, v; grad_bias [B, H, Sq, Sk] like q, or empty unless
    `needs_bias`; grad_distance (lse's shape and dtype): the sum over keys of -|j - i - Sk + Sq| dS, which
    the ALiBi slopes multiply, or empty unless `needs_distance`. Sinks need nothing: they are in lse.
    """
    scoring = _Scoring(
        softmax_scale, window_left, window_right, softcap, dropout_p, bias, alibi_slopes,
        key_padding_mask, dropout_seed,
    )  # fmt: skip
    if cu_seqlens_q is None or cu_seqlens_k is None:
        grad_q, grad_k, grad_v, grad_bias, grad_distance = _backward(
            grad_out, q, k, v, out, lse, grad_lse, scoring
        )
    else:
        grad_q, grad_k, grad_v = (torch.zeros_like(tensor, dtype=lse.dtype) for tensor in (q, k, v))
        grad_distance = torch.zeros_like(lse)
        grad_bias = lse.new_empty(0)
        for place, rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k):
            scoring.first_batch = place
            if alibi_slopes is not None:
                scoring.alibi_slopes = alibi_slopes[place : place + 1]
            parts = _backward(
                grad_out[rows].unsqueeze(0),
                q[rows].unsqueeze(0),
                k[keys].unsqueeze(0),
                v[keys].unsqueeze(0),
                out[rows].unsqueeze(0),
                lse[:, rows].unsqueeze(0),
                None if grad_lse is None else grad_lse[:, rows].unsqueeze(0),
                scoring,
            )
            grad_q[rows], grad_k[keys], grad_v[keys] = (part[0] for part in parts[:3])
            grad_distance[:, rows] = parts[4][0]
    grads = [grad.to(q.dtype).contiguous() for grad in (grad_q, grad_k, grad_v)]
    grad_bias = grad_bias.to(q.dtype) if needs_bias else q.new_empty(0)
    grad_distance = grad_distance.contiguous() if needs_distance else lse.new_empty(0)
    return grads[0], grads[1], grads[2], grad_bias.contiguous(), grad_distance


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    num_splits: int,
    split_size: int,
) -> tuple[Tensor, Tensor]:
    """Attention of q [B, Sq, H, D] on the first cache_seqlens[b] rows of each cache.

    k_cache [B, S, Hkv, D] and v_cache [B, S, Hkv, Dv], or pages [num_blocks, page_size, Hkv, ...] with
    block_table int32 [B, max_blocks] -> out [B, Sq, H, Dv], lse [B, H, Sq]. How the keys are split changes
    only the order of sums.
    """
    batch, queries, heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty((batch, queries, heads, v_cache.shape[-1]))
    lse = q.new_empty((batch, heads, queries), dtype=wide)
    for row, length in enumerate(cache_seqlens.tolist()):
        if block_table is not None:
            k, v = (gather_pages(cache, block_table[row], length) for cache in (k_cache, v_cache))
        else:
            k, v = (cache[row : row + 1, :length] for cache in (k_cache, v_cache))
        slopes = None if alibi_slopes is None else alibi_slopes[row : row + 1]
        scoring = _Scoring(softmax_scale, window_left, window_right, softcap, alibi_slopes=slopes)
        one_out, one_lse = _forward(q[row : row + 1], k, v, sinks, scoring)
        out[row], lse[row] = one_out[0], one_lse[0]
    return out, lse


def attention_cache_append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
) -> None:
    """Writes k [B, S, Hkv, D], rotated at its positions where cos and sin are given, and v [B, S, Hkv, Dv]
    to the rows cache_seqlens[b] + i of the caches (their layouts: `attention_decode`).

    A row beyond the cache's capacity, or of a negative block, is not written.
    """
    batch, count = k.shape[:2]
    steps = torch.arange(count, device=k.device)
    positions = cache_seqlens.long().unsqueeze(1) + steps  # [B, S]
    if cos is not None and sin is not None:
        k = rotate_at(k, cos, sin, positions, interleaved)
    page_size = k_cache.shape[1]
    if block_table is None:
        blocks = torch.arange(batch, device=k.device).unsqueeze(1).expand(batch, count)
        slots, valid = positions, positions < page_size
    else:
        places = positions // page_size
        valid = places < block_table.shape[1]
        blocks = block_table.long().gather(1, places.clamp(max=block_table.shape[1] - 1))
        slots, valid = positions % page_size, valid & (blocks >= 0)
    index = (blocks[valid], slots[valid])
    k_cache[index] = k[valid].to(k_cache.dtype)
    v_cache[index] = v[valid].to(v_cache.dtype)


def rotate_at(k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """k [B, S, Hkv, D] with its first 2 * cos.shape[1] features rotated; one rounding at the end."""
    rotary_dim = 2 * cos.shape[1]
    rows = positions.clamp(max=cos.shape[0] - 1)
    cos, sin = cos[rows].unsqueeze(2), sin[rows].unsqueeze(2)
    wide = k[..., :rotary_dim].to(cos.dtype)
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = wide.chunk(2, dim=-1)
    parts = (first * cos - second * sin, second * cos + first * sin)
    rotated = torch.stack(parts, dim=-1).flatten(-2) if interleaved else torch.cat(parts, dim=-1)
    return torch.cat((rotated.to(k.dtype), k[..., rotary_dim:]), dim=-1)


def merge_attention(
    out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor
) -> tuple[Tensor, Tensor]:
    """lse = log(exp(lse1) + exp(lse2)), out = exp(lse1 - lse) out1 + exp(lse2 - lse) out2.

    out1, out2 [B, S, H, D], lse1, lse2 [B, H, S]: attention to two disjoint sets of keys becomes attention to
    their union. A part without keys has lse -inf and weighs nothing, whatever its out; +inf counts as -inf.
    """
    lse, weights = _merge_weights(lse1, lse2)
    parts = [
        torch.where(weight == 0, 0.0, weight * part.to(lse.dtype))
        for weight, part in zip(weights, (out1, out2))
    ]
    return (parts[0] + parts[1]).to(out1.dtype).contiguous(), lse.contiguous()


def _merge_weights(lse1: Tensor, lse2: Tensor) -> tuple[Tensor, list[Tensor]]:
    """lse [B, H, S] and the two weights [B, S, H, 1], 0 where a part has no keys."""
    parts = [part.masked_fill(torch.isposinf(part), float("-inf")) for part in (lse1, lse2)]
    lse = torch.logaddexp(*parts)
    shift = lse.masked_fill(torch.isneginf(lse), 0.0)
    return lse, [torch.exp(part - shift).transpose(1, 2).unsqueeze(-1) for part in parts]


def merge_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out1: Tensor,
    lse1: Tensor,
    out2: Tensor,
    lse2: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d out_n = w_n d out, d lse_n = w_n (d out . (out_n - out) + d lse), w_n = exp(lse_n - lse).

    out_1 - out is w_2 (out_1 - out_2): so the rounding of out does not come in.
    """
    _, weights = _merge_weights(lse1, lse2)
    wide = lse1.dtype
    grad = grad_out.to(wide)
    first, second = (
        torch.where(weight == 0, 0.0, part.to(wide)) for weight, part in zip(weights, (out1, out2))
    )
    difference = (grad * (first - second)).sum(-1, keepdim=True)
    upstream = 0.0 if grad_lse is None else grad_lse.transpose(1, 2).unsqueeze(-1)
    changes = (
        weights[0] * (weights[1] * difference + upstream),
        weights[1] * (upstream - weights[0] * difference),
    )
    grads: list[Tensor] = []
    for weight, change in zip(weights, changes):
        grads += [(weight * grad).to(out1.dtype).contiguous()]
        grads += [change.squeeze(-1).transpose(1, 2).contiguous()]
    return grads[0], grads[1], grads[2], grads[3]
