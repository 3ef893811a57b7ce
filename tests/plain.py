"""Each op as plain mathematics in whatever dtype it is given, no upcasts: oracle and yardstick.

In float64 it is what everything is judged against; in a narrow dtype it says what error is usual there.
"""

from __future__ import annotations

import itertools
import math
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
            seen = torch.ones_like(scores, dtype=torch.bool).tril(length - queries)
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


def rational_quadratic_spline(
    x: Tensor,
    params: Tensor,
    *,
    num_bins: int,
    tails: str | None = None,
    bounds: tuple[float, float, float, float] = (0.0, 1.0, 0.0, 1.0),
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    logit_scale: float = 1.0,
    convention: str = "nflows",
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Of params [*x.shape, M]: all knots first, then the bin of each element. log_det in a wide dtype."""
    left, right, bottom, top = bounds
    widths, heights, logits = params.tensor_split((num_bins, 2 * num_bins), dim=-1)
    widths, heights = widths * logit_scale, heights * logit_scale
    if convention == "zuko":
        slope = math.log(min_derivative)
        widths, heights = (a / (1 + (2 * a / slope).abs()) for a in (widths, heights))
        derivatives = (logits / (1 + (logits / slope).abs())).exp()
        min_bin_width = min_bin_height = 0.0
    else:
        derivatives = min_derivative + F.softplus(logits)
    if tails == "linear":
        derivatives = F.pad(derivatives, (1, 1), value=1.0)
    elif tails == "circular":
        derivatives = torch.cat([derivatives, derivatives[..., :1]], -1)

    def knots(sizes: Tensor, least: float, low: float, high: float) -> Tensor:
        sizes = least + (1 - least * num_bins) * sizes.softmax(-1)
        # Not cumsum, which adds up float32 in double on a CPU.
        sums = list(itertools.accumulate(sizes.unbind(-1)))
        return low + (high - low) * F.pad(torch.stack(sums, -1), (1, 0))

    xs = knots(widths, min_bin_width, left, right)
    ys = knots(heights, min_bin_height, bottom, top)
    low, high = (bottom, top) if inverse else (left, right)
    inside = (x >= low) & (x <= high)
    clipped = x.clamp(low, high)
    sought = ys if inverse else xs
    bins = (clipped[..., None] >= sought[..., 1:-1]).sum(-1, keepdim=True)

    def at(values: Tensor, step: int) -> Tensor:
        return values.gather(-1, bins + step).squeeze(-1)

    x0, x1, y0, y1 = at(xs, 0), at(xs, 1), at(ys, 0), at(ys, 1)
    d0, d1 = at(derivatives, 0), at(derivatives, 1)
    s = (y1 - y0) / (x1 - x0)
    if inverse:
        bend = (clipped - y0) * (d0 + d1 - 2 * s)
        a, b, c = (y1 - y0) * (s - d0) + bend, (y1 - y0) * d0 - bend, s * (y0 - clipped)
        t = 2 * c / (-b - (b * b - 4 * a * c).clamp_min(0).sqrt())
    else:
        t = (clipped - x0) / (x1 - x0)
    q = t * (1 - t)
    denominator = s + (d0 + d1 - 2 * s) * q
    log_det = (s * s * (d1 * t * t + 2 * s * q + d0 * (1 - t) ** 2)).log() - 2 * denominator.log()
    if inverse:
        y, log_det = x0 + (x1 - x0) * t, -log_det
    else:
        y = y0 + (y1 - y0) * (s * t * t + d0 * q) / denominator
    if tails is not None:
        y, log_det = torch.where(inside, y, x), torch.where(inside, log_det, 0.0)
    return y, log_det.to(torch.promote_types(x.dtype, torch.float32))


def sppf(x: Tensor, kernel_size: int = 5) -> Tensor:
    slices = [x]
    for _ in range(3):
        slices.append(F.max_pool2d(slices[-1], kernel_size, 1, kernel_size // 2))
    return torch.cat(slices, 1)


def coupling_log_scale(u: Tensor, scale: str, clamp: float = 1.0, eps: float = 0.0) -> Tensor:
    if scale == "exp":
        return u
    if scale == "tanh":
        return clamp * torch.tanh(u)
    if scale == "atan":
        return clamp * 0.636 * torch.atan(u)
    if scale == "centered_sigmoid":
        return clamp * (2 / (1 + torch.exp(-u)) - 1)
    if scale == "sigmoid":
        return torch.log(torch.sigmoid(u + 2) + eps) if eps else F.logsigmoid(u + 2)
    return u / (1 + torch.abs(u / math.log(clamp)))


def affine_coupling(
    x: Tensor,
    params: Tensor | tuple[Tensor, Tensor],
    *,
    mask: Any = "channel",
    layout: str = "shift_scale",
    scale: str = "exp",
    clamp: float = 1.0,
    eps: float = 0.0,
    params_scale: float = 1.0,
    scale_weight: Tensor | None = None,
    order: str = "mul_add",
    center: str = "none",
    inverse: bool = False,
    log_det_in: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The formulas on the transformed elements alone, [B, K] of x seen as [B, C * pixels]."""
    channels, spatial = x.shape[1], x.shape[2:]
    moved = coupling_mask(mask, x).flatten()
    if scale == "additive":
        t, u = params, None
    elif isinstance(params, tuple):
        t, u = params
    elif layout == "interleaved":
        t, u = params[:, 0::2], params[:, 1::2]
    else:
        t, u = params.chunk(2, dim=1) if layout == "shift_scale" else params.chunk(2, dim=1)[::-1]
    kept = torch.ones(t.shape[1:], dtype=torch.bool, device=x.device).flatten()
    if t.shape[1] == channels and t.shape[2:] == spatial:
        kept = moved
    b = x.flatten(1)[:, moved]
    t = params_scale * t.flatten(1)[:, kept]
    log_scale = 0 * t
    if u is not None:
        log_scale = coupling_log_scale(params_scale * u.flatten(1)[:, kept], scale, clamp, eps)
    if scale_weight is not None:
        weight = scale_weight.to(x.dtype).expand(u.shape[1])
        weight = weight.view(-1, *[1] * len(spatial)).expand(u.shape[1:]).flatten()[kept]
        log_scale = log_scale * weight
    if center == "channel":
        per_pixel = log_scale.view(len(x), -1, math.prod(spatial))
        log_scale = (per_pixel - per_pixel.mean(1, keepdim=True)).flatten(1)
    if center == "sample":
        log_scale = log_scale - log_scale.mean(1, keepdim=True)
    sign = -1 if (order == "div_add") != inverse else 1
    s = torch.exp(sign * log_scale)
    y = {
        ("mul_add", False): lambda: s * b + t,
        ("add_mul", False): lambda: s * (b + t),
        ("div_add", False): lambda: s * b + t,
        ("mul_add", True): lambda: s * (b - t),
        ("add_mul", True): lambda: s * b - t,
        ("div_add", True): lambda: s * (b - t),
    }[order, inverse]()
    z = x.flatten(1).index_copy(1, moved.nonzero()[:, 0], y).view(x.shape)
    log_det = (sign if center == "none" else 0) * log_scale.sum(1)
    return z, log_det if log_det_in is None else log_det + log_det_in


def coupling_mask(mask: Any, x: Tensor) -> Tensor:
    """What is transformed: bool, x's shape without B."""
    shape, channels = x.shape[1:], x.shape[1]
    moved = torch.zeros(shape, dtype=torch.bool, device=x.device)
    kept = channels - channels // 2
    if isinstance(mask, Tensor):
        column = mask.view(-1, *[1] * (x.dim() - 2)) if mask.dim() == 1 else mask
        return column.expand(shape)
    if mask == "channel_inverse":
        moved[:kept] = True
    elif mask in ("checkerboard", "checkerboard_inverse"):
        for h in range(shape[1]):
            for w in range(shape[2]):
                moved[:, h, w] = (h + w) % 2 == (1 if mask == "checkerboard" else 0)
    else:
        moved[kept if mask == "channel" else mask :] = True
    return moved


def roi_align(
    x: Tensor,
    rois: list[list[float]],
    output_size: tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = True,
) -> Tensor:
    """torchvision's documented maths, one sample after the other."""
    height, width = x.shape[2:]
    offset = 0.5 if aligned else 0.0

    def pixels(position: float, size: int) -> list[tuple[int, float]]:
        position = max(position, 0.0)
        low = int(position)
        if low >= size - 1:
            return [(size - 1, 1.0)]
        return [(low, low + 1 - position), (low + 1, position - low)]

    def sample(plane: Tensor, y: float, x: float) -> Tensor:
        if not (-1 <= y <= height and -1 <= x <= width):
            return torch.zeros_like(plane[:, 0, 0])
        corners = [
            plane[:, row, column] * (row_weight * column_weight)
            for row, row_weight in pixels(y, height)
            for column, column_weight in pixels(x, width)
        ]
        return torch.stack(corners).sum(0)

    regions = []
    for index, x1, y1, x2, y2 in rois:
        starts = [edge * spatial_scale - offset for edge in (y1, x1)]
        ends = [edge * spatial_scale - offset for edge in (y2, x2)]
        lengths = [end - start for start, end in zip(starts, ends)]
        if not aligned:
            lengths = [max(length, 1.0) for length in lengths]
        sizes = [length / bins for length, bins in zip(lengths, output_size)]
        grid = [sampling_ratio if sampling_ratio > 0 else max(math.ceil(size), 0) for size in sizes]
        for row in range(output_size[0]):
            for column in range(output_size[1]):
                samples = [
                    sample(
                        x[int(index)],
                        starts[0] + (row + (i + 0.5) / grid[0]) * sizes[0],
                        starts[1] + (column + (j + 0.5) / grid[1]) * sizes[1],
                    )
                    for i in range(grid[0])
                    for j in range(grid[1])
                ]
                if not samples:
                    samples = [torch.zeros_like(x[0, :, 0, 0])]
                regions.append(torch.stack(samples).sum(0) / len(samples))
    return torch.stack(regions).view(len(rois), *output_size, x.shape[1]).permute(0, 3, 1, 2)
