"""What plain PyTorch makes of the arguments of every op (`op_arguments`)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from warploom.recipes import op_arguments as given


def coupling(x: Tensor, params: Tensor, *_: Any) -> Tensor:
    """z as Glow has it."""
    passing, moved = x.chunk(2, dim=1)
    log_scale = F.logsigmoid(params[:, 1::2] + 2)
    return torch.cat((passing, (moved + params[:, 0::2]) * torch.exp(log_scale)), dim=1)


def coupling_linear(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    kept, moved = x.chunk(2, dim=1)
    shift, log_scale = F.linear(hidden, weight, bias).chunk(2, dim=1)
    return torch.cat((kept, moved * log_scale.exp() + shift), dim=1), log_scale.sum(1)


def lcs_lengths(tokens: Tensor, others: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The table of the dynamic programme in Python, as ROUGE-L is usually computed."""
    lengths, first = [], tokens.tolist()
    for begin, end in pairwise(cu_seqlens.tolist()):
        row = [0] * (len(first) + 1)
        for token in others[begin:end].tolist():
            above, row = row, [0]
            for column, own in enumerate(first):
                best = above[column] + 1 if own == token else max(above[column + 1], row[-1])
                row.append(best)
        lengths.append(row[-1])
    return torch.tensor(lengths, dtype=torch.int32, device=tokens.device)


def sppf(x: Tensor, kernel_size: int, channels_last: bool) -> Tensor:
    slices = [x]
    for _ in range(3):
        slices.append(F.max_pool2d(slices[-1], kernel_size, 1, kernel_size // 2))
    return torch.cat(slices, 1)


def roi_align(x: Tensor, rois: Tensor, bins: int, _: int, *rest: Any) -> Tensor:
    """As one writes it without torchvision: `F.grid_sample` where the samples lie."""
    (height, width), samples = x.shape[2:], rest[1]
    places = (torch.arange(bins * samples, device=x.device, dtype=rois.dtype) + 0.5) / samples
    regions = []
    for _, x1, y1, x2, y2 in rois:
        across = x1 - 0.5 + places * (x2 - x1) / bins
        down = y1 - 0.5 + places * (y2 - y1) / bins
        # Its -1 and 1 are the outer pixels' outer edges.
        grid = torch.stack(
            torch.broadcast_tensors(
                (2 * across + 1) / width - 1, ((2 * down + 1) / height - 1)[:, None]
            ),
            -1,
        )
        grid = grid.to(x.dtype)[None]
        sampled = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
        regions.append(F.avg_pool2d(sampled, samples))
    return torch.cat(regions)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, (given.WIDTH,), weight, eps), total


def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, positions: None, interleaved: bool, conjugate: bool
) -> Tensor:
    cos, sin = (table[:, None, :].to(x.dtype) for table in (cos, sin))  # [S, 1, D/2]
    first, second = x.view(*x.shape[:-1], -1, 2).unbind(-1) if interleaved else x.chunk(2, -1)
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)


def attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def sinks(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    """As transformers has it: the sink is one more column of the scores."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    k, v = (tensor.repeat_interleave(given.HEADS // given.KEY_VALUE_HEADS, 1) for tensor in (k, v))
    scores = q @ k.transpose(2, 3) * given.HEAD_DIM**-0.5
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    sinks = rest[2].to(q.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    scores = torch.cat((scores.masked_fill(hidden, float("-inf")), sinks), dim=-1)
    return (torch.softmax(scores, dim=-1)[..., :-1] @ v).transpose(1, 2)


def decode(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


def append(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> Any:
    row = torch.arange(k.shape[0], device=k.device)
    k_cache[row, rest[0].long()], v_cache[row, rest[0].long()] = k[:, 0], v[:, 0]
    return k_cache, v_cache


def merge(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(lse1, lse2)
    weights = ((part - lse).exp().transpose(1, 2).unsqueeze(-1) for part in (lse1, lse2))
    first, second = (weight * out for weight, out in zip(weights, (out1, out2)))
    return (first + second).to(out1.dtype), lse


def experts(x: Tensor, weight: Tensor, group_offsets: Tensor, *_: Any) -> Tensor:
    bounds = group_offsets.tolist()
    parts = zip(pairwise(bounds), weight)
    return torch.cat([F.linear(x[first:end], w) for (first, end), w in parts])


def norm_shrink(
    x: Tensor, residual: Tensor, weight: Tensor, lora_a: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    out, total = add_rms_norm(x, residual, weight, eps)
    return out, total, F.linear(out, lora_a)


def swiglu_shrink(
    gate: Tensor, up: Tensor, lora_a: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    out = F.silu(gate) * up
    return out, F.linear(out, lora_a)


def lora(
    x: Tensor, weight: Tensor, scale: None, bias: None, lora_a: Tensor, lora_b: Tensor, *_: Any
) -> Tensor:
    return F.linear(x, weight) + F.linear(F.linear(x, lora_a), lora_b) * given.SCALING


def latent_decode(q: Tensor, cache: Tensor, *_: Any) -> Tensor:
    scores = torch.einsum("bqhd,bkd->bhqk", q, cache) * given.LATENT_SCALE
    return torch.einsum("bhqk,bkd->bqhd", scores.softmax(-1), cache[..., : given.LATENT])


def latent_append(*arguments: Any) -> Tensor:
    new, weight, cache, lengths = arguments[:4]
    latent, k_rope = new[:, 0].split([given.LATENT, given.ROPE], dim=-1)
    row = torch.cat((F.rms_norm(latent, (given.LATENT,), weight, 1e-6), k_rope), dim=-1)
    cache[torch.arange(4, device=new.device), lengths.long()] = row
    written: Tensor = cache
    return written


def pyramid(x: Tensor, *_: Any) -> Tensor:
    return torch.cat([F.adaptive_max_pool2d(x, level).flatten(1) for level in (1, 2, 4)], 1)
