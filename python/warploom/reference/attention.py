"""Softmax attention with grouped key/value heads in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def _scores(q: Tensor, k: Tensor, causal: bool, softmax_scale: float) -> Tensor:
    """Masked scores [B, Hkv, G, Sq, Sk] in at least float32, -inf where a key is not seen."""
    batch, queries, heads, dim = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).reshape(batch, queries, kv_heads, heads // kv_heads, dim)
    scores = torch.einsum("bqhgd,bkhd->bhgqk", grouped, k.to(wide)) * softmax_scale
    if causal:
        last_seen = torch.arange(queries, device=q.device) + (keys - queries)
        hidden = torch.arange(keys, device=q.device) > last_seen.unsqueeze(-1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """softmax from scores and their log-sum-exp; a fully masked row (lse -inf) is all 0."""
    seen = torch.isfinite(lse)
    return torch.exp(scores - lse.masked_fill(~seen, 0.0).unsqueeze(-1))


def attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """out = softmax(softmax_scale * q k^T + mask) v (Vaswani et al. 2017, eq. 1; groups: Ainslie 2023).

    q [B, Sq, H, D], k [B, Sk, Hkv, D], v [B, Sk, Hkv, Dv] -> out [B, Sq, H, Dv], lse [B, H, Sq].
    `causal` is aligned bottom-right: query i sees the keys j <= i + Sk - Sq.
    """
    batch, queries, heads, _ = q.shape
    scores = _scores(q, k, causal, softmax_scale)
    lse = torch.logsumexp(scores, dim=-1)
    out = torch.einsum("bhgqk,bkhd->bqhgd", _probabilities(scores, lse), v.to(scores.dtype))
    out = out.reshape(batch, queries, heads, v.shape[-1]).to(q.dtype)
    return out.contiguous(), lse.reshape(batch, heads, queries).contiguous()


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    causal: bool,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dS = P (dP - rowsum(dO * O) + dlse); dq = scale dS k, dk = scale dS^T q, dv = P^T dO."""
    batch, queries, heads, dim = q.shape
    kv_heads = k.shape[2]
    group = (batch, queries, kv_heads, heads // kv_heads)
    scores = _scores(q, k, causal, softmax_scale)
    wide = scores.dtype
    rows = (batch, kv_heads, heads // kv_heads, queries)
    probabilities = _probabilities(scores, lse.to(wide).reshape(rows))
    value_dim = v.shape[-1]
    grad = grad_out.to(wide).reshape(*group, value_dim)
    delta = (grad * out.to(wide).reshape(*group, value_dim)).sum(-1)
    delta = delta.permute(0, 2, 3, 1)  # [B, Hkv, G, Sq]
    if grad_lse is not None:
        delta = delta - grad_lse.to(wide).reshape(rows)
    grad_probabilities = torch.einsum("bqhgd,bkhd->bhgqk", grad, v.to(wide))
    grad_scores = probabilities * (grad_probabilities - delta.unsqueeze(-1)) * softmax_scale
    grad_q = torch.einsum("bhgqk,bkhd->bqhgd", grad_scores, k.to(wide)).reshape(q.shape)
    grad_k = torch.einsum("bhgqk,bqhgd->bkhd", grad_scores, q.to(wide).reshape(*group, dim))
    grad_v = torch.einsum("bhgqk,bqhgd->bkhd", probabilities, grad)
    return (
        grad_q.to(q.dtype).contiguous(),
        grad_k.to(k.dtype).contiguous(),
        grad_v.to(v.dtype).contiguous(),
    )
