"""One case or more of every op: representative inputs, the public function, plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    squeeze,
)
from warploom.ops.grouped_linear import grouped_linear
from warploom.ops.lora import lora_linear, lora_shrink, rms_norm_shrink, swiglu_shrink
from warploom.ops.mla import mla_cache_append, mla_decode
from warploom.ops.norm import l2_norm, layer_norm, rms_norm
from warploom.ops.rope import apply_rotary
from warploom.ops.spp import roi_align, spatial_pyramid_pool, sppf
from warploom.ops.vocab import lcs_lengths, linear_cross_entropy
from warploom.recipes import op_arguments as given
from warploom.recipes import op_eager as eager
from warploom.recipes.op_arguments import Arguments
from warploom.reference import coupling as coupling_reference


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


def _append(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> Any:
    arguments = (k, v, k_cache, v_cache, *rest)
    op = OPS["attention_cache_append"]
    op.overloads[op.choose(*arguments)](*arguments)
    return k_cache, v_cache


def _latent_append(*arguments: Any) -> Tensor:
    new, weight, cache, lengths = arguments[:4]
    mla_cache_append(new, weight, cache, lengths)
    written: Tensor = cache
    return written


def _rows_loss(*arguments: Any) -> Tensor:
    op = OPS["cross_entropy_rows"]
    loss: Tensor = op.overloads[op.choose(*arguments)](*arguments)
    return loss


def _block_state(logits: Tensor, state: Tensor, *rest: Any) -> Tensor:
    op = OPS["cross_entropy_block"]
    overload = op.overloads[op.choose(logits, state, *rest)]
    state.zero_()[:, 0] = float("-inf")
    overload(logits, state, *rest)
    return state[:, 0] + state[:, 1].log()


_ROWS_SHAPE = f"[S, {given.WIDTH}]"
_HEADS_SHAPE = f"[1, S, {given.HEADS}, {given.HEAD_DIM}]"

#: One case or more for every forward op of the library.
CASES = (
    OpCase(
        "rms_norm",
        "rms_norm",
        _ROWS_SHAPE,
        lambda size, dtype: (
            *given.rows(size, dtype, 1),
            torch.rand(given.WIDTH).to(dtype) + 0.5,
            1e-6,
        ),
        lambda x, weight, eps: rms_norm(x, weight, eps=eps),
        lambda x, weight, eps: F.rms_norm(x, (given.WIDTH,), weight, eps),
        inputs=2,
    ),
    OpCase(
        "rms_norm + residual",
        "add_rms_norm",
        _ROWS_SHAPE,
        lambda size, dtype: (
            *given.rows(size, dtype, 2),
            torch.rand(given.WIDTH).to(dtype) + 0.5,
            1e-6,
        ),
        lambda x, residual, weight, eps: rms_norm(x, weight, eps=eps, residual=residual),
        eager.add_rms_norm,
        inputs=3,
    ),
    OpCase(
        "layer_norm",
        "layer_norm",
        _ROWS_SHAPE,
        lambda size, dtype: (
            *given.rows(size, dtype, 1),
            torch.rand(given.WIDTH).to(dtype) + 0.5,
            torch.randn(given.WIDTH).to(dtype),
            1e-5,
        ),
        lambda x, weight, bias, eps: layer_norm(x, weight, bias, eps=eps),
        lambda x, weight, bias, eps: F.layer_norm(x, (given.WIDTH,), weight, bias, eps),
        inputs=3,
    ),
    OpCase(
        "l2_norm",
        "l2_norm",
        _ROWS_SHAPE,
        lambda size, dtype: (*given.rows(size, dtype, 1), 1e-12),
        lambda x, eps: l2_norm(x, eps=eps),
        lambda x, eps: F.normalize(x, dim=-1),
        inputs=1,
    ),
    OpCase(
        "apply_rotary (halves)",
        "apply_rotary",
        _HEADS_SHAPE,
        lambda size, dtype: given.rotary_arguments(size, dtype, interleaved=False),
        lambda x, cos, sin, positions, interleaved, conjugate: apply_rotary(x, cos, sin),
        eager.rotary,
        inputs=1,
    ),
    OpCase(
        "apply_rotary (interleaved)",
        "apply_rotary",
        _HEADS_SHAPE,
        lambda size, dtype: given.rotary_arguments(size, dtype, interleaved=True),
        lambda x, cos, sin, positions, interleaved, conjugate: apply_rotary(
            x, cos, sin, interleaved=True
        ),
        eager.rotary,
        inputs=1,
    ),
    OpCase(
        "swiglu",
        "gated_activation",
        _ROWS_SHAPE,
        lambda size, dtype: (*given.rows(size, dtype, 2), "silu"),
        lambda gate, up, activation: swiglu(gate, up),
        lambda gate, up, activation: F.silu(gate) * up,
        inputs=2,
    ),
    OpCase(
        "geglu",
        "gated_activation",
        _ROWS_SHAPE,
        lambda size, dtype: (*given.rows(size, dtype, 2), "gelu"),
        lambda gate, up, activation: geglu(gate, up),
        lambda gate, up, activation: F.gelu(gate) * up,
        inputs=2,
    ),
    OpCase(
        "grouped_linear",
        "grouped_linear",
        f"[{given.CHOSEN} x S, {given.WIDTH}] by {given.EXPERTS} experts "
        f"[{given.EXPERT_WIDTH}, {given.WIDTH}]",
        given.expert_arguments,
        lambda x, weight, group_offsets, batch_invariant: grouped_linear(x, weight, group_offsets),
        eager.experts,
        inputs=2,
    ),
    OpCase(
        "rms_norm_shrink + residual",
        "rms_norm_shrink",
        f"{_ROWS_SHAPE}, rank {given.RANK}",
        given.norm_shrink_arguments,
        lambda x, residual, weight, lora_a, eps: rms_norm_shrink(
            x, weight, lora_a, residual, eps=eps
        ),
        eager.norm_shrink,
        inputs=4,
    ),
    OpCase(
        "swiglu_shrink",
        "gated_activation_shrink",
        f"{_ROWS_SHAPE}, rank {given.RANK}",
        lambda size, dtype: (*given.rows(size, dtype, 2), given.adapter(dtype), "silu"),
        lambda gate, up, lora_a, activation: swiglu_shrink(gate, up, lora_a),
        eager.swiglu_shrink,
        inputs=3,
    ),
    OpCase(
        "lora_shrink",
        "lora_shrink",
        f"{_ROWS_SHAPE}, rank {given.RANK}",
        lambda size, dtype: (
            *given.rows(size, dtype, 1),
            (torch.randn(given.RANK, given.WIDTH) * given.WIDTH**-0.5).to(dtype),
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
        f"{_ROWS_SHAPE} by [{given.WIDTH}, {given.WIDTH}], rank {given.RANK}",
        given.adapter_arguments,
        lambda x, weight, scale, bias, lora_a, lora_b, *rest: lora_linear(
            x, weight, bias, lora_a, lora_b, given.SCALING
        ),
        eager.lora,
        inputs=2,
    ),
    OpCase(
        "attention (causal GQA)",
        "attention",
        f"{_HEADS_SHAPE} over {given.KEY_VALUE_HEADS} heads",
        lambda size, dtype: given.attention_arguments(size, dtype, sinks=False),
        lambda q, k, v, *rest: attention(q, k, v, causal=True),
        eager.attention,
        inputs=3,
    ),
    OpCase(
        "attention (causal GQA, sinks)",
        "attention",
        f"{_HEADS_SHAPE} over {given.KEY_VALUE_HEADS} heads",
        lambda size, dtype: given.attention_arguments(size, dtype, sinks=True),
        lambda q, k, v, *rest: attention(q, k, v, causal=True, sinks=rest[2]),
        eager.sinks,
        inputs=3,
    ),
    OpCase(
        "attention_decode",
        "attention_decode",
        f"[4, 1, {given.HEADS}, {given.HEAD_DIM}] over S keys of {given.KEY_VALUE_HEADS} heads",
        given.decode_arguments,
        lambda q, k, v, lengths, *rest: attention_decode(q, k, v, lengths),
        eager.decode,
        inputs=0,
    ),
    OpCase(
        "attention_cache_append",
        "attention_cache_append",
        f"one token to [4, S, {given.KEY_VALUE_HEADS}, {given.HEAD_DIM}]",
        given.append_arguments,
        _append,
        eager.append,
        inputs=0,
    ),
    OpCase(
        "mla_decode",
        "mla_decode",
        f"[4, 1, {given.HEADS}, {given.LATENT + given.ROPE}] over S latents",
        given.latent_arguments,
        lambda q, cache, lengths, *rest: mla_decode(
            q, cache, lengths, d_latent=given.LATENT, softmax_scale=given.LATENT_SCALE
        ),
        eager.latent_decode,
        inputs=0,
    ),
    OpCase(
        "mla_cache_append",
        "mla_cache_append",
        f"one token to [4, S, {given.LATENT + given.ROPE}]",
        given.latent_append_arguments,
        _latent_append,
        eager.latent_append,
        inputs=0,
    ),
    OpCase(
        "merge_attention",
        "merge_attention",
        _HEADS_SHAPE,
        given.merge_arguments,
        merge_attention,
        eager.merge,
        inputs=4,
    ),
    OpCase(
        "cross_entropy_rows",
        "cross_entropy_rows",
        f"[S, {given.CLASSES}]",
        given.logits_arguments,
        _rows_loss,
        lambda logits, targets, *_: F.cross_entropy(logits, targets, reduction="none"),
        inputs=0,
    ),
    OpCase(
        "cross_entropy_block",
        "cross_entropy_block",
        f"[S, {given.CLASSES}]",
        given.block_arguments,
        _block_state,
        lambda logits, *_: torch.logsumexp(logits, 1),
        inputs=0,
    ),
    OpCase(
        "linear_cross_entropy",
        "linear_cross_entropy",
        f"[S, {given.CLASS_WIDTH}] by [{given.CLASSES}, {given.CLASS_WIDTH}]",
        given.loss_arguments,
        lambda hidden, weight, targets, *_: linear_cross_entropy(hidden, weight, targets),
        lambda hidden, weight, targets, *_: F.cross_entropy(hidden @ weight.T, targets),
        inputs=2,
    ),
    OpCase(
        "lcs_lengths",
        "lcs_lengths",
        "24 tokens and S times 24",
        given.texts,
        lcs_lengths,
        eager.lcs_lengths,
        inputs=0,
    ),
    OpCase(
        "rational_quadratic_spline",
        "rational_quadratic_spline",
        "[S, 64], 8 bins",
        given.spline_arguments,
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
        given.maps,
        lambda x, *_: spatial_pyramid_pool(x),
        eager.pyramid,
        inputs=1,
    ),
    OpCase(
        "affine_coupling",
        "affine_coupling",
        f"[S / 64, {given.CHANNELS}, 32, 32]",
        given.coupling_arguments,
        lambda x, params, *_: affine_coupling(x, params, **PRESETS["openai_glow"])[0],
        eager.coupling,
        inputs=2,
    ),
    OpCase(
        "affine_coupling_linear",
        "affine_coupling_linear",
        f"[S, {given.ROW}] by [{given.ROW}, {given.CONDITIONER}]",
        given.coupling_linear_arguments,
        lambda x, hidden, weight, bias, *_: affine_coupling_linear(x, hidden, weight, bias),
        eager.coupling_linear,
        inputs=4,
    ),
    OpCase(
        "channel_affine",
        "channel_affine",
        "[1, 64, S / 32, 32]",
        lambda size, dtype: (
            given.feature_map(size, dtype),
            *torch.rand(2, 64).to(dtype),
            "mul_add",
            False,
        ),
        lambda x, scale, shift, *_: channel_affine(x, scale, shift),
        lambda x, scale, shift, *_: torch.addcmul(shift[:, None, None], x, scale[:, None, None]),
        inputs=3,
    ),
    OpCase(
        "squeeze",
        "squeeze",
        "[1, 64, S / 32, 32]",
        lambda size, dtype: (given.feature_map(size, dtype), 2, "channel_major", False),
        lambda x, factor, order, inverse: squeeze(x, factor),
        lambda x, factor, order, inverse: torch.pixel_unshuffle(x, factor),
        inputs=1,
    ),
    OpCase(
        "sppf",
        "sppf",
        "[1, 64, S / 32, 32]",
        lambda size, dtype: (given.feature_map(size, dtype), 5, False),
        lambda x, kernel_size, channels_last: sppf(x, kernel_size),
        eager.sppf,
        inputs=1,
    ),
    OpCase(
        "roi_align",
        "roi_align",
        "[1, 64, S / 32, 32], S / 32 regions",
        given.region_arguments,
        lambda x, rois, height, width, scale, ratio, aligned: roi_align(
            x, rois, (height, width), spatial_scale=scale, sampling_ratio=ratio, aligned=aligned
        ),
        eager.roi_align,
        inputs=1,
    ),
)
