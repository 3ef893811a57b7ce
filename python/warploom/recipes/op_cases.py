"""Representative inputs of every op, and what plain PyTorch makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from warploom._library import OPS
from warploom.ops.activation import geglu, swiglu
from warploom.ops.attention import attention, attention_decode, merge_attention
from warploom.ops.coupling import (
    PRESETS,
    affine_coupling,
    affine_coupling_linear,
    channel_affine,
    rational_quadratic_spline,
)
from warploom.ops.grouped_linear import grouped_linear
from warploom.ops.lora import lora_linear, lora_shrink, rms_norm_shrink, swiglu_shrink
from warploom.ops.mla import mla_cache_append, mla_decode
from warploom.ops.norm import l2_norm, layer_norm, rms_norm
from warploom.ops.rope import apply_rotary
from warploom.ops.spp import roi_align, spatial_pyramid_pool, sppf
from warploom.ops.vocab import lcs_lengths, linear_cross_entropy
from warploom.reference import coupling as coupling_reference

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class OpCase:
    """One op with representative inputs.

    ``make(size, dtype)`` gives the arguments of the op's schema, where ``size`` is a number of
    tokens; ``call`` (the public function) and ``eager`` (plain PyTorch) take them too. The first
    ``inputs`` of them get gradients; 0 of an op that has none.
    """

    name: str
    op: str
    shape: str
    make: Callable[[int, torch.dtype], Arguments]
    call: Callable[..., Any]
    eager: Callable[..., Any]
    inputs: int


_WIDTH = 2048
_HEADS, _KEY_VALUE_HEADS, _HEAD_DIM = 16, 4, 64
_LATENT, _ROPE = 512, 64
_LATENT_SCALE = 192**-0.5  # heads of 128 features and 64 rotated ones
_EXPERTS, _CHOSEN, _EXPERT_WIDTH = 16, 2, 704
_CLASSES, _CLASS_WIDTH = 8192, 256
_LOSS_OPTIONS = (-100, 0.0, 0.0, 0.0)  # ignore_index, label_smoothing, z_loss, softcap
_RANK, _SCALING = 16, 2.0
_CHANNELS = 96
_ROW, _CONDITIONER = 64, 128  # channels of a tabular coupling, features of its conditioner


def _rows(size: int, dtype: torch.dtype, count: int) -> list[Tensor]:
    return [torch.randn(size, _WIDTH).to(dtype) for _ in range(count)]


def _rotary_arguments(size: int, dtype: torch.dtype, interleaved: bool) -> Arguments:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    angles = torch.rand(size, _HEAD_DIM // 2, dtype=wide) * 6.28
    x = torch.randn(1, size, _HEADS, _HEAD_DIM).to(dtype)
    return x, angles.cos(), angles.sin(), None, interleaved, False


def _attention_arguments(size: int, dtype: torch.dtype, sinks: bool) -> Arguments:
    q = torch.randn(1, size, _HEADS, _HEAD_DIM).to(dtype)
    k, v = (torch.randn(1, size, _KEY_VALUE_HEADS, _HEAD_DIM).to(dtype) for _ in range(2))
    logits = torch.randn(_HEADS, dtype=_statistics_dtype(dtype)) if sinks else None
    tensors = (None, None, logits, None, None, None, None, None)
    return q, k, v, *tensors, _HEAD_DIM**-0.5, -1, 0, 0.0, 0.0, size, size


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _cache(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Key and value caches of four sequences of `size` tokens, and their lengths."""
    shape = (4, size, _KEY_VALUE_HEADS, _HEAD_DIM)
    k, v = (torch.randn(shape).to(dtype) for _ in range(2))
    return k, v, torch.full((4,), size, dtype=torch.int32)


def _decode_arguments(size: int, dtype: torch.dtype) -> Arguments:
    q = torch.randn(4, 1, _HEADS, _HEAD_DIM).to(dtype)
    return q, *_cache(size, dtype), None, None, None, _HEAD_DIM**-0.5, -1, 0, 0.0, 0, 0


def _append_arguments(size: int, dtype: torch.dtype) -> Arguments:
    k_cache, v_cache, lengths = _cache(size, dtype)
    k, v = (torch.randn(4, 1, _KEY_VALUE_HEADS, _HEAD_DIM).to(dtype) for _ in range(2))
    return k, v, k_cache, v_cache, lengths - 1, None, None, None, False


def _merge_arguments(size: int, dtype: torch.dtype) -> Arguments:
    def part() -> tuple[Tensor, Tensor]:
        out = torch.randn(1, size, _HEADS, _HEAD_DIM).to(dtype)
        return out, torch.randn(1, _HEADS, size, dtype=_statistics_dtype(dtype))

    return *part(), *part()


def _expert_arguments(size: int, dtype: torch.dtype) -> Arguments:
    """Every token's row once for each of the experts that it chose, sorted by expert."""
    chosen = torch.rand(size, _EXPERTS).topk(_CHOSEN, dim=-1).indices
    offsets = torch.zeros(_EXPERTS + 1, dtype=torch.int32)
    offsets[1:] = torch.bincount(chosen.flatten(), minlength=_EXPERTS).cumsum(0)
    weight = torch.randn(_EXPERTS, _EXPERT_WIDTH, _WIDTH) * (_WIDTH**-0.5 / 2)
    return torch.randn(size * _CHOSEN, _WIDTH).to(dtype), weight.to(dtype), offsets, False


def _adapter(dtype: torch.dtype) -> Tensor:
    lora_a: Tensor = torch.randn(_RANK, _WIDTH) * _WIDTH**-0.5
    return lora_a.to(dtype)


def _norm_shrink_arguments(size: int, dtype: torch.dtype) -> Arguments:
    weight = torch.rand(_WIDTH).to(dtype) + 0.5
    return *_rows(size, dtype, 2), weight, _adapter(dtype), 1e-6


def _adapter_arguments(size: int, dtype: torch.dtype) -> Arguments:
    """A linear map as wide as long, and an adapter of it."""
    shapes = ((size, _WIDTH), (_WIDTH, _WIDTH), (_RANK, _WIDTH), (_WIDTH, _RANK))
    x, weight, lora_a, lora_b = (
        (torch.randn(shape) * shape[1] ** -0.5).to(dtype) for shape in shapes
    )
    tensors = x, weight, None, None, lora_a, lora_b, None, None, None
    return *tensors, "dense", _SCALING, 0.0


def _latent_cache(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Latents of four sequences of `size` tokens, with rotated keys, and their lengths."""
    cache = torch.randn(4, size, _LATENT + _ROPE).to(dtype)
    return cache, torch.full((4,), size, dtype=torch.int32)


def _latent_arguments(size: int, dtype: torch.dtype) -> Arguments:
    q = torch.randn(4, 1, _HEADS, _LATENT + _ROPE).to(dtype)
    return q, *_latent_cache(size, dtype), None, _LATENT, _LATENT_SCALE, True, 0, 0


def _latent_append_arguments(size: int, dtype: torch.dtype) -> Arguments:
    cache, lengths = _latent_cache(size, dtype)
    new, weight = torch.randn(4, 1, _LATENT + _ROPE).to(dtype), torch.rand(_LATENT).to(dtype) + 0.5
    return new, weight, cache, lengths - 1, None, None, None, None, 1e-6, True


def _logits_arguments(size: int, dtype: torch.dtype) -> Arguments:
    logits, targets = torch.randn(size, _CLASSES).to(dtype), torch.randint(_CLASSES, (size,))
    return logits, targets, None, *_LOSS_OPTIONS, False


def _loss_arguments(size: int, dtype: torch.dtype) -> Arguments:
    hidden = torch.randn(size, _CLASS_WIDTH).to(dtype)
    weight = (torch.randn(_CLASSES, _CLASS_WIDTH) * _CLASS_WIDTH**-0.5).to(dtype)
    tensors = (hidden, weight, torch.randint(_CLASSES, (size,)), None, None, None, None)
    return *tensors, 1.0, *_LOSS_OPTIONS, True, False, False, False, False, False


def _coupling_arguments(size: int, dtype: torch.dtype) -> Arguments:
    """`size` // 64 images of 32 x 32 pixels, and their parameters."""
    images = [torch.randn(max(1, size // 64), _CHANNELS, 32, 32).to(dtype) for _ in range(2)]
    options = ("range", _CHANNELS // 2, _CHANNELS // 2, "interleaved", "sigmoid", 1.0, 0.0, 1.0)
    return *images, None, None, None, None, *options, True, 1, 1, "none"


def _eager_coupling(x: Tensor, params: Tensor, *_: Any) -> Tensor:
    """z as Glow has it."""
    passing, moved = x.chunk(2, dim=1)
    log_scale = F.logsigmoid(params[:, 1::2] + 2)
    return torch.cat((passing, (moved + params[:, 0::2]) * torch.exp(log_scale)), dim=1)


def _texts(size: int, dtype: torch.dtype) -> Arguments:
    """A text of 24 tokens and `size` others of as many."""
    bounds = torch.arange(size + 1, dtype=torch.int32) * 24
    return torch.randint(50, (24,)), torch.randint(50, (size * 24,)), bounds


def _feature_map(size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(1, 64, max(8, size // 32), 32).to(dtype)


def _region_arguments(size: int, dtype: torch.dtype) -> Arguments:
    """As many regions of one feature map as it has rows, each of 7 x 7 bins of 2 x 2 samples."""
    x = _feature_map(size, dtype)
    rows = x.shape[2]
    # Inside of the outer pixels' centres, where both sides mean the same.
    corners = 1 + torch.rand(rows, 2, 2) * torch.tensor([29.0, rows - 3])
    boxes = torch.cat((corners.amin(1), corners.amax(1) + 1), 1)
    rois = torch.cat((torch.zeros(rows, 1), boxes), 1).to(_statistics_dtype(dtype))
    return x, rois, 7, 7, 1.0, 2, True


def _rows_loss(*arguments: Any) -> Tensor:
    op = OPS["cross_entropy_rows"]
    loss: Tensor = op.overloads[op.choose(*arguments)](*arguments)
    return loss


def _block_arguments(size: int, dtype: torch.dtype) -> Arguments:
    logits, targets, *_ = _logits_arguments(size, dtype)
    state = logits.new_zeros(len(logits), 4, dtype=_statistics_dtype(dtype))
    return logits, state, targets, 0, _CLASSES, -100, 0.0, False


def _block_state(logits: Tensor, state: Tensor, *rest: Any) -> Tensor:
    op = OPS["cross_entropy_block"]
    overload = op.overloads[op.choose(logits, state, *rest)]
    state.zero_()[:, 0] = float("-inf")
    overload(logits, state, *rest)
    return state[:, 0] + state[:, 1].log()


def _spline_arguments(size: int, dtype: torch.dtype) -> Arguments:
    """All of 64 features of a row, with the logits of 8 bins."""
    x, params = torch.randn(size, 64, 1).to(dtype), (torch.randn(size, 64, 1, 23) / 8).to(dtype)
    interval = (-3.0, 3.0, -3.0, 3.0)
    return x, params, 0, 8, True, "linear", *interval, 1e-3, 1e-3, 1e-3, 1.0, "nflows", False


def _coupling_linear_arguments(size: int, dtype: torch.dtype) -> Arguments:
    x, hidden = torch.randn(size, _ROW), torch.randn(size, _CONDITIONER)
    weight, bias = torch.randn(_ROW, _CONDITIONER) / _CONDITIONER, torch.randn(_ROW) / 4
    half = _ROW // 2
    options = ("range", half, half, "shift_scale", "exp", 1.0, 0.0, 1.0, False, 1, 1)
    tensors = (tensor.to(dtype) for tensor in (x, hidden, weight, bias))
    return *tensors, None, None, None, *options


def _eager_coupling_linear(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    kept, moved = x.chunk(2, dim=1)
    shift, log_scale = F.linear(hidden, weight, bias).chunk(2, dim=1)
    return torch.cat((kept, moved * log_scale.exp() + shift), dim=1), log_scale.sum(1)


def _eager_lcs_lengths(tokens: Tensor, others: Tensor, cu_seqlens: Tensor) -> Tensor:
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


def _eager_sppf(x: Tensor, kernel_size: int, channels_last: bool) -> Tensor:
    slices = [x]
    for _ in range(3):
        slices.append(F.max_pool2d(slices[-1], kernel_size, 1, kernel_size // 2))
    return torch.cat(slices, 1)


def _eager_roi_align(x: Tensor, rois: Tensor, bins: int, _: int, *rest: Any) -> Tensor:
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


def _eager_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, (_WIDTH,), weight, eps), total


def _eager_rotary(
    x: Tensor, cos: Tensor, sin: Tensor, positions: None, interleaved: bool, conjugate: bool
) -> Tensor:
    cos, sin = (table[:, None, :].to(x.dtype) for table in (cos, sin))  # [S, 1, D/2]
    first, second = x.view(*x.shape[:-1], -1, 2).unbind(-1) if interleaved else x.chunk(2, -1)
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)


def _eager_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def _eager_sinks(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    """As transformers has it: the sink is one more column of the scores."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    k, v = (tensor.repeat_interleave(_HEADS // _KEY_VALUE_HEADS, 1) for tensor in (k, v))
    scores = q @ k.transpose(2, 3) * _HEAD_DIM**-0.5
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    sinks = rest[2].to(q.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    scores = torch.cat((scores.masked_fill(hidden, float("-inf")), sinks), dim=-1)
    return (torch.softmax(scores, dim=-1)[..., :-1] @ v).transpose(1, 2)


def _eager_decode(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


def _append(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> Any:
    arguments = (k, v, k_cache, v_cache, *rest)
    op = OPS["attention_cache_append"]
    op.overloads[op.choose(*arguments)](*arguments)
    return k_cache, v_cache


def _eager_append(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> Any:
    row = torch.arange(k.shape[0], device=k.device)
    k_cache[row, rest[0].long()], v_cache[row, rest[0].long()] = k[:, 0], v[:, 0]
    return k_cache, v_cache


def _eager_merge(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(lse1, lse2)
    weights = ((part - lse).exp().transpose(1, 2).unsqueeze(-1) for part in (lse1, lse2))
    first, second = (weight * out for weight, out in zip(weights, (out1, out2)))
    return (first + second).to(out1.dtype), lse


def _eager_experts(x: Tensor, weight: Tensor, group_offsets: Tensor, *_: Any) -> Tensor:
    bounds = group_offsets.tolist()
    parts = zip(pairwise(bounds), weight)
    return torch.cat([F.linear(x[first:end], w) for (first, end), w in parts])


def _eager_norm_shrink(
    x: Tensor, residual: Tensor, weight: Tensor, lora_a: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    out, total = _eager_add_rms_norm(x, residual, weight, eps)
    return out, total, F.linear(out, lora_a)


def _eager_swiglu_shrink(
    gate: Tensor, up: Tensor, lora_a: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    out = F.silu(gate) * up
    return out, F.linear(out, lora_a)


def _eager_lora(
    x: Tensor, weight: Tensor, scale: None, bias: None, lora_a: Tensor, lora_b: Tensor, *_: Any
) -> Tensor:
    return F.linear(x, weight) + F.linear(F.linear(x, lora_a), lora_b) * _SCALING


def _eager_latent_decode(q: Tensor, cache: Tensor, *_: Any) -> Tensor:
    scores = torch.einsum("bqhd,bkd->bhqk", q, cache) * _LATENT_SCALE
    return torch.einsum("bhqk,bkd->bqhd", scores.softmax(-1), cache[..., :_LATENT])


def _latent_append(*arguments: Any) -> Tensor:
    new, weight, cache, lengths = arguments[:4]
    mla_cache_append(new, weight, cache, lengths)
    written: Tensor = cache
    return written


def _eager_latent_append(*arguments: Any) -> Tensor:
    new, weight, cache, lengths = arguments[:4]
    latent, k_rope = new[:, 0].split([_LATENT, _ROPE], dim=-1)
    row = torch.cat((F.rms_norm(latent, (_LATENT,), weight, 1e-6), k_rope), dim=-1)
    cache[torch.arange(4, device=new.device), lengths.long()] = row
    written: Tensor = cache
    return written


def _maps(size: int, dtype: torch.dtype) -> Arguments:
    levels = [1, 1, 2, 2, 4, 4]
    return (
        torch.randn(size, 32, 13, 13).to(dtype),
        None,
        None,
        levels,
        "max",
        "adaptive",
        False,
        False,
    )


def _eager_pyramid(x: Tensor, *_: Any) -> Tensor:
    return torch.cat([F.adaptive_max_pool2d(x, level).flatten(1) for level in (1, 2, 4)], 1)


_ROWS_SHAPE = f"[S, {_WIDTH}]"
_HEADS_SHAPE = f"[1, S, {_HEADS}, {_HEAD_DIM}]"

#: One case or more for every forward op of the library.
CASES = (
    OpCase(
        "rms_norm",
        "rms_norm",
        _ROWS_SHAPE,
        lambda size, dtype: (*_rows(size, dtype, 1), torch.rand(_WIDTH).to(dtype) + 0.5, 1e-6),
        lambda x, weight, eps: rms_norm(x, weight, eps=eps),
        lambda x, weight, eps: F.rms_norm(x, (_WIDTH,), weight, eps),
        inputs=2,
    ),
    OpCase(
        "rms_norm + residual",
        "add_rms_norm",
        _ROWS_SHAPE,
        lambda size, dtype: (*_rows(size, dtype, 2), torch.rand(_WIDTH).to(dtype) + 0.5, 1e-6),
        lambda x, residual, weight, eps: rms_norm(x, weight, eps=eps, residual=residual),
        _eager_add_rms_norm,
        inputs=3,
    ),
    OpCase(
        "layer_norm",
        "layer_norm",
        _ROWS_SHAPE,
        lambda size, dtype: (
            *_rows(size, dtype, 1),
            torch.rand(_WIDTH).to(dtype) + 0.5,
            torch.randn(_WIDTH).to(dtype),
            1e-5,
        ),
        lambda x, weight, bias, eps: layer_norm(x, weight, bias, eps=eps),
        lambda x, weight, bias, eps: F.layer_norm(x, (_WIDTH,), weight, bias, eps),
        inputs=3,
    ),
    OpCase(
        "l2_norm",
        "l2_norm",
        _ROWS_SHAPE,
        lambda size, dtype: (*_rows(size, dtype, 1), 1e-12),
        lambda x, eps: l2_norm(x, eps=eps),
        lambda x, eps: F.normalize(x, dim=-1),
        inputs=1,
    ),
    OpCase(
        "apply_rotary (halves)",
        "apply_rotary",
        _HEADS_SHAPE,
        lambda size, dtype: _rotary_arguments(size, dtype, interleaved=False),
        lambda x, cos, sin, positions, interleaved, conjugate: apply_rotary(x, cos, sin),
        _eager_rotary,
        inputs=1,
    ),
    OpCase(
        "apply_rotary (interleaved)",
        "apply_rotary",
        _HEADS_SHAPE,
        lambda size, dtype: _rotary_arguments(size, dtype, interleaved=True),
        lambda x, cos, sin, positions, interleaved, conjugate: apply_rotary(
            x, cos, sin, interleaved=True
        ),
        _eager_rotary,
        inputs=1,
    ),
    OpCase(
        "swiglu",
        "gated_activation",
        _ROWS_SHAPE,
        lambda size, dtype: (*_rows(size, dtype, 2), "silu"),
        lambda gate, up, activation: swiglu(gate, up),
        lambda gate, up, activation: F.silu(gate) * up,
        inputs=2,
    ),
    OpCase(
        "geglu",
        "gated_activation",
        _ROWS_SHAPE,
        lambda size, dtype: (*_rows(size, dtype, 2), "gelu"),
        lambda gate, up, activation: geglu(gate, up),
        lambda gate, up, activation: F.gelu(gate) * up,
        inputs=2,
    ),
    OpCase(
        "grouped_linear",
        "grouped_linear",
        f"[{_CHOSEN} x S, {_WIDTH}] by {_EXPERTS} experts [{_EXPERT_WIDTH}, {_WIDTH}]",
        _expert_arguments,
        lambda x, weight, group_offsets, batch_invariant: grouped_linear(x, weight, group_offsets),
        _eager_experts,
        inputs=2,
    ),
    OpCase(
        "rms_norm_shrink + residual",
        "rms_norm_shrink",
        f"{_ROWS_SHAPE}, rank {_RANK}",
        _norm_shrink_arguments,
        lambda x, residual, weight, lora_a, eps: rms_norm_shrink(
            x, weight, lora_a, residual, eps=eps
        ),
        _eager_norm_shrink,
        inputs=4,
    ),
    OpCase(
        "swiglu_shrink",
        "gated_activation_shrink",
        f"{_ROWS_SHAPE}, rank {_RANK}",
        lambda size, dtype: (*_rows(size, dtype, 2), _adapter(dtype), "silu"),
        lambda gate, up, lora_a, activation: swiglu_shrink(gate, up, lora_a),
        _eager_swiglu_shrink,
        inputs=3,
    ),
    OpCase(
        "lora_shrink",
        "lora_shrink",
        f"{_ROWS_SHAPE}, rank {_RANK}",
        lambda size, dtype: (
            *_rows(size, dtype, 1),
            (torch.randn(_RANK, _WIDTH) * _WIDTH**-0.5).to(dtype),
            None,
            0.0,
        ),
        lambda x, lora_a, *rest: lora_shrink(x, lora_a),
        lambda x, lora_a, *rest: F.linear(x, lora_a),
        inputs=2,
    ),
    OpCase(
        "lora_linear",
        "lora_linear",
        f"{_ROWS_SHAPE} by [{_WIDTH}, {_WIDTH}], rank {_RANK}",
        _adapter_arguments,
        lambda x, weight, scale, bias, lora_a, lora_b, *rest: lora_linear(
            x, weight, bias, lora_a, lora_b, _SCALING
        ),
        _eager_lora,
        inputs=2,
    ),
    OpCase(
        "attention (causal GQA)",
        "attention",
        f"{_HEADS_SHAPE} over {_KEY_VALUE_HEADS} heads",
        lambda size, dtype: _attention_arguments(size, dtype, sinks=False),
        lambda q, k, v, *rest: attention(q, k, v, causal=True),
        _eager_attention,
        inputs=3,
    ),
    OpCase(
        "attention (causal GQA, sinks)",
        "attention",
        f"{_HEADS_SHAPE} over {_KEY_VALUE_HEADS} heads",
        lambda size, dtype: _attention_arguments(size, dtype, sinks=True),
        lambda q, k, v, *rest: attention(q, k, v, causal=True, sinks=rest[2]),
        _eager_sinks,
        inputs=3,
    ),
    OpCase(
        "attention_decode",
        "attention_decode",
        f"[4, 1, {_HEADS}, {_HEAD_DIM}] over S keys of {_KEY_VALUE_HEADS} heads",
        _decode_arguments,
        lambda q, k, v, lengths, *rest: attention_decode(q, k, v, lengths),
        _eager_decode,
        inputs=0,
    ),
    OpCase(
        "attention_cache_append",
        "attention_cache_append",
        f"one token to [4, S, {_KEY_VALUE_HEADS}, {_HEAD_DIM}]",
        _append_arguments,
        _append,
        _eager_append,
        inputs=0,
    ),
    OpCase(
        "mla_decode",
        "mla_decode",
        f"[4, 1, {_HEADS}, {_LATENT + _ROPE}] over S latents",
        _latent_arguments,
        lambda q, cache, lengths, *rest: mla_decode(
            q, cache, lengths, d_latent=_LATENT, softmax_scale=_LATENT_SCALE
        ),
        _eager_latent_decode,
        inputs=0,
    ),
    OpCase(
        "mla_cache_append",
        "mla_cache_append",
        f"one token to [4, S, {_LATENT + _ROPE}]",
        _latent_append_arguments,
        _latent_append,
        _eager_latent_append,
        inputs=0,
    ),
    OpCase(
        "merge_attention",
        "merge_attention",
        _HEADS_SHAPE,
        _merge_arguments,
        merge_attention,
        _eager_merge,
        inputs=4,
    ),
    OpCase(
        "cross_entropy_rows",
        "cross_entropy_rows",
        f"[S, {_CLASSES}]",
        _logits_arguments,
        _rows_loss,
        lambda logits, targets, *_: F.cross_entropy(logits, targets, reduction="none"),
        inputs=0,
    ),
    OpCase(
        "cross_entropy_block",
        "cross_entropy_block",
        f"[S, {_CLASSES}]",
        _block_arguments,
        _block_state,
        lambda logits, *_: torch.logsumexp(logits, 1),
        inputs=0,
    ),
    OpCase(
        "linear_cross_entropy",
        "linear_cross_entropy",
        f"[S, {_CLASS_WIDTH}] by [{_CLASSES}, {_CLASS_WIDTH}]",
        _loss_arguments,
        lambda hidden, weight, targets, *_: linear_cross_entropy(hidden, weight, targets),
        lambda hidden, weight, targets, *_: F.cross_entropy(hidden @ weight.T, targets),
        inputs=2,
    ),
    OpCase(
        "lcs_lengths",
        "lcs_lengths",
        "24 tokens and S times 24",
        _texts,
        lcs_lengths,
        _eager_lcs_lengths,
        inputs=0,
    ),
    OpCase(
        "rational_quadratic_spline",
        "rational_quadratic_spline",
        "[S, 64], 8 bins",
        _spline_arguments,
        lambda x, params, *_: rational_quadratic_spline(
            x, params, num_bins=8, tails="linear", tail_bound=3.0
        ),
        coupling_reference.rational_quadratic_spline,
        inputs=0,
    ),
    OpCase(
        "spatial_pyramid_pool",
        "spatial_pyramid_pool",
        "[S, 32, 13, 13], levels 1, 2, 4",
        _maps,
        lambda x, *_: spatial_pyramid_pool(x),
        _eager_pyramid,
        inputs=1,
    ),
    OpCase(
        "affine_coupling",
        "affine_coupling",
        f"[S / 64, {_CHANNELS}, 32, 32]",
        _coupling_arguments,
        lambda x, params, *_: affine_coupling(x, params, **PRESETS["openai_glow"])[0],
        _eager_coupling,
        inputs=2,
    ),
    OpCase(
        "affine_coupling_linear",
        "affine_coupling_linear",
        f"[S, {_ROW}] by [{_ROW}, {_CONDITIONER}]",
        _coupling_linear_arguments,
        lambda x, hidden, weight, bias, *_: affine_coupling_linear(x, hidden, weight, bias),
        _eager_coupling_linear,
        inputs=4,
    ),
    OpCase(
        "channel_affine",
        "channel_affine",
        "[1, 64, S / 32, 32]",
        lambda size, dtype: (
            _feature_map(size, dtype),
            *torch.rand(2, 64).to(dtype),
            "mul_add",
            False,
        ),
        lambda x, scale, shift, *_: channel_affine(x, scale, shift),
        lambda x, scale, shift, *_: torch.addcmul(shift[:, None, None], x, scale[:, None, None]),
        inputs=3,
    ),
    OpCase(
        "sppf",
        "sppf",
        "[1, 64, S / 32, 32]",
        lambda size, dtype: (_feature_map(size, dtype), 5, False),
        lambda x, kernel_size, channels_last: sppf(x, kernel_size),
        _eager_sppf,
        inputs=1,
    ),
    OpCase(
        "roi_align",
        "roi_align",
        "[1, 64, S / 32, 32], S / 32 regions",
        _region_arguments,
        lambda x, rois, height, width, scale, ratio, aligned: roi_align(
            x, rois, (height, width), spatial_scale=scale, sampling_ratio=ratio, aligned=aligned
        ),
        _eager_roi_align,
        inputs=1,
    ),
)
