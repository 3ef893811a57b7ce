"""Each op as plain mathematics in whatever dtype it is given, no upcasts: oracle and yardstick.

In float64 it is what everything is judged against; in a narrow dtype it says what error is usual there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    weight = weight.to(x.dtype)
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps) * weight


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    variance = (centered * centered).mean(-1, keepdim=True)
    return centered / torch.sqrt(variance + eps) * weight.to(x.dtype) + bias.to(x.dtype)


def l2_norm(x: Tensor, eps: float = 1e-12) -> Tensor:
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + eps)


def apply_rotary(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool
) -> Tensor:
    """Multiplication of complex numbers, written out per pair; positions [B, S]."""
    rotary_dim = 2 * cos.shape[1]
    cos = cos[positions].to(x.dtype).unsqueeze(2)
    sin = sin[positions].to(x.dtype).unsqueeze(2)
    out = x.clone()
    if interleaved:
        first, second = slice(0, rotary_dim, 2), slice(1, rotary_dim, 2)
    else:
        first, second = slice(0, rotary_dim // 2), slice(rotary_dim // 2, rotary_dim)
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + torch.exp(-gate)) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate) * up


def geglu_tanh(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def shrinking(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """`function`, and behind its outputs the product of the first with lora_a, its last argument."""

    def shrunk(*tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = function(*tensors[:-1])
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return *outputs, outputs[0] @ tensors[-1].to(outputs[0].dtype).T

    return shrunk


def grouped_linear(x: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
    """One product per group of `sizes` rows; rows behind the last group give 0."""
    used = sum(sizes)
    parts = [rows @ matrix.T for rows, matrix in zip(x[:used].split(sizes), weight)]
    return torch.cat((*parts, x.new_zeros(x.shape[0] - used, weight.shape[1])))


def dropped(x: Tensor, keep: Tensor | None, dropout_p: float) -> Tensor:
    return x if keep is None else torch.where(keep, x / (1 - dropout_p), 0.0)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    lora_a, lora_b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    update = dropped(x, keep, dropout_p) @ lora_a.mT @ lora_b.mT
    return x @ weight.mT + bias + scaling * update


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    scaling: float,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """The weight W + scaling B A made, its rows' lengths without gradient; dropout as in peft."""
    merged = weight + scaling * (lora_b @ lora_a)
    scale = magnitude / torch.linalg.vector_norm(merged, dim=1).detach()
    if keep is None:
        return x @ (scale[:, None] * merged).mT + bias
    x_dropped = dropped(x, keep, dropout_p)
    base = x @ weight.mT + (scale - 1) * (x_dropped @ weight.mT)
    return base + scale * scaling * (x_dropped @ lora_a.mT @ lora_b.mT) + bias


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    key_padding_mask: Tensor | None = None,
    kept: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """One query head at a time, [B, S, H, D]; returns (out, lse).

    A sink is a further key whose value is 0. `kept` [B, H, Sq, Sk] is the mask of a dropout.
    """
    batch, queries, heads, dim = q.shape
    keys, group = k.shape[1], heads // k.shape[2]
    scale = dim**-0.5 if softmax_scale is None else softmax_scale
    behind = torch.arange(keys, device=q.device) - torch.arange(queries, device=q.device)[:, None]
    behind = behind - (keys - queries)
    visible = torch.ones(batch, queries, keys, dtype=torch.bool, device=q.device)
    left, right = window[0], 0 if causal else window[1]
    if left >= 0:
        visible = visible & (behind >= -left)
    if right >= 0:
        visible = visible & (behind <= right)
    if key_padding_mask is not None:
        visible = visible & ~key_padding_mask[:, None, :]
    outs, lses = [], []
    for head in range(heads):
        scores = q[:, :, head] @ k[:, :, head // group].transpose(1, 2) * scale
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        if bias is not None:
            scores = scores + bias.expand(batch, heads, queries, keys)[:, head]
        if alibi_slopes is not None:
            slopes = alibi_slopes.expand(batch, heads)[:, head, None, None].to(q.dtype)
            scores = scores - slopes * behind.abs()
        scores = scores.masked_fill(~visible, float("-inf"))
        seen = ~torch.isneginf(scores).all(-1, keepdim=True)
        if sinks is not None:
            sink = sinks[head].to(q.dtype).expand(batch, queries, 1)
            scores = torch.cat((scores, sink), dim=-1)
            seen = torch.ones_like(seen)
        lses.append(torch.logsumexp(scores, dim=-1))
        weights = torch.softmax(scores.masked_fill(~seen, 0.0), dim=-1)[..., :keys]
        weights = weights.masked_fill(~visible | ~seen, 0.0)
        if kept is not None:
            weights = weights * kept[:, head] / (1 - dropout_p)
        outs.append(weights @ v[:, :, head // group])
    return torch.stack(outs, dim=2), torch.stack(lses, dim=1)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths_q: list[int],
    lengths_k: list[int],
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Each sequence by itself: q [T, H, D], k and v [T, Hkv, D] -> out [T, H, D], lse [H, T]."""
    slopes = options.pop("alibi_slopes", None)
    kept = options.pop("kept", None)
    outs, lses = [], []
    parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k))
    for place, part in enumerate(parts):
        one = dict(options)
        if slopes is not None:
            one["alibi_slopes"] = slopes.expand(len(lengths_q), q.shape[1])[place : place + 1]
        if kept is not None:
            one["kept"] = kept[place]
        out, lse = attention(*(tensor.unsqueeze(0) for tensor in part), **one)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)


def latent_attention(
    q: Tensor,
    rows: Tensor,
    lengths: Any,
    d_latent: int,
    softmax_scale: float,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """q [B, Sq, H, D] on the first lengths[b] of rows [B, Sk, D], valued by their first d_latent features."""
    outs, lses = [], []
    for one_q, one_rows, length in zip(q, rows, lengths):
        queries, keys = one_q.shape[0], one_rows[:length]
        scores = torch.einsum("qhd,kd->hqk", one_q, keys) * softmax_scale
        if causal:
            seen = torch.ones(queries, length, dtype=torch.bool).tril(length - queries)
            scores = scores.masked_fill(~seen, -float("inf"))
        some = ~torch.isneginf(scores).all(-1, keepdim=True)  # no key at all: none
        weights = torch.softmax(scores.masked_fill(~some, 0.0), dim=-1) * some
        outs.append(torch.einsum("hqk,kd->qhd", weights, keys[:, :d_latent]))
        safe = torch.logsumexp(scores.masked_fill(~some, 0.0), dim=-1)
        lses.append(torch.where(some.squeeze(-1), safe, -float("inf")))
    return torch.stack(outs), torch.stack(lses)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "none",
) -> Tensor:
    """`F.cross_entropy` of capped logits, and a z-loss added."""
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    kept = targets != ignore_index
    loss = F.cross_entropy(
        logits,
        targets,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    loss = loss + z_loss * torch.logsumexp(logits, -1).square() * kept
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / kept.sum()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    **options: Any,
) -> Tensor:
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if lora is not None:
        lora_a, lora_b, scaling = lora
        logits = logits + scaling * (hidden @ lora_a.T @ lora_b.T)
    return cross_entropy(logits, targets, **options)


def lcs_length(first: list[int], second: list[int]) -> int:
    """The table of the dynamic programme, row after row."""
    row = [0] * (len(second) + 1)
    for token in first:
        above = row
        row = [0]
        for column, other in enumerate(second):
            longer = above[column] + 1 if token == other else max(above[column + 1], row[column])
            row.append(longer)
    return row[-1]
