"""The ops of family `attention`: schemas, fakes, what each backend cannot do, gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from warploom._library import Differentiable, WhyNot, define
from warploom.ops._fakes import dense, statistics_dtype
from warploom.reference import attention as reference

#: The largest head dim of the kernels; the reference and C++ take any.
MAX_HEAD_DIM = 256


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *rows, heads, _ = q.shape  # [B, Sq] or [Tq]
    out = q.new_empty((*rows, heads, v.shape[-1]))
    lse_shape = (*rows[:-1], heads, rows[-1])
    return out, q.new_empty(lse_shape, dtype=statistics_dtype(q))


def _fake_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    needs_bias, needs_distance = rest[-2:]
    bias_shape = (*lse.shape, k.shape[1]) if needs_bias else (0,)
    grad_bias = q.new_empty(bias_shape)
    grad_distance = lse.new_empty(lse.shape if needs_distance else (0,))
    return dense(q), dense(k), dense(v), grad_bias, grad_distance


def _head_dims(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> list[str]:
    widest = max(q.shape[-1], v.shape[-1])
    if widest > MAX_HEAD_DIM:
        return [f"head dims up to {MAX_HEAD_DIM}, got {q.shape[-1]} and {v.shape[-1]}"]
    return []


_KERNELS: dict[str, WhyNot] = dict.fromkeys(("cuda", "simt", "simt_instrumented"), _head_dims)

_FEATURES = (
    " float softmax_scale, int window_left, int window_right, float softcap, float dropout_p,"
    " int max_seqlen_q, int max_seqlen_k"
)
_attention_op = define(
    "attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks,"
    " Tensor? key_padding_mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? block_table,"
    f" Tensor? dropout_seed,{_FEATURES}) -> (Tensor out, Tensor lse)",
    reference=reference.attention,
    fake=_fake_forward,
    triton="attention.attention:attention",
    why_not=_KERNELS,
    sharding=(
        "B s H d, B t H d, B t H e, B H s t, B H, H, B t, -, -, -, - -> B s H e, B H s",
        "t H d, u H d, u H e, -, b H, H, -, b, b, -, - -> t H e, H t",
        "t H d, p z H d, p z H e, -, b H, H, -, b, b, b m, - -> t H e, H t",
    ),
)
_attention_backward_op = define(
    "attention_backward",
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? grad_lse,"
    " Tensor? bias, Tensor? alibi_slopes, Tensor? key_padding_mask, Tensor? cu_seqlens_q,"
    f" Tensor? cu_seqlens_k, Tensor? dropout_seed,{_FEATURES}, bool needs_bias, bool needs_distance)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias, Tensor grad_distance)",
    reference=reference.attention_backward,
    fake=_fake_backward,
    triton="attention.attention_backward:attention_backward",
    why_not=_KERNELS,
    sharding=(
        "B s H e, B s H d, B t H d, B t H e, B s H e, B H s, B H s, B H s t, B H, B t, -, -, -"
        " -> B s H d, B t H d, B t H e, B H s t if needs_bias, B H s if needs_distance",
        "t H e, t H d, u H d, u H e, t H e, H t, H t, -, b H, -, b, b, -"
        " -> t H d, u H d, u H e, -, H t if needs_distance",
    ),
)


def _save(args: Any, outputs: Any) -> tuple[Tensor | None, ...]:
    q, k, v, bias, alibi_slopes, sinks, mask, cu_seqlens_q, cu_seqlens_k, _, seed = args[:11]
    out, lse = outputs
    return q, k, v, out, lse, bias, alibi_slopes, sinks, mask, cu_seqlens_q, cu_seqlens_k, seed


def _grads(
    overload: Any, saved: Any, scalars: Any, grads: Any, needs: Any
) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, bias, alibi_slopes, sinks, *rest = saved
    grad_out, grad_lse = grads
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    needs_bias, needs_slopes, needs_sinks = needs[3:6]
    grad_q, grad_k, grad_v, grad_bias, grad_distance = overload(
        grad_out, q, k, v, out, lse, grad_lse, bias, alibi_slopes, *rest, *scalars, needs_bias, needs_slopes
    )  # fmt: skip
    grad_slopes = grad_sinks = None
    if needs_slopes:
        grad_slopes = _slope_gradients(grad_distance, alibi_slopes, rest[1])
    if needs_sinks:
        # A sink is a key with a value of 0: d sink = exp(sink - lse) (0 - delta), over all rows.
        delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1).transpose(-1, -2)
        if grad_lse is not None:
            delta = delta - grad_lse
        weights = torch.exp(sinks.unsqueeze(-1) - lse.masked_fill(torch.isneginf(lse), 0.0))
        grad_sinks = -(weights * delta).sum(-1)
        grad_sinks = grad_sinks.sum(0) if grad_sinks.dim() == 2 else grad_sinks
    optional = (grad_bias if needs_bias else None, grad_slopes, grad_sinks)
    return (grad_q, grad_k, grad_v, *optional, None, None, None, None, None)


def _slope_gradients(
    grad_distance: Tensor, alibi_slopes: Tensor, cu_seqlens_q: Tensor | None
) -> Tensor:
    """[B, H] from the rows' sums: [B, H, Sq], or packed [H, Tq]."""
    if cu_seqlens_q is None:
        return grad_distance.sum(-1)
    row = torch.arange(grad_distance.shape[1], device=grad_distance.device, dtype=torch.int32)
    owner = torch.searchsorted(cu_seqlens_q[1:].contiguous(), row, right=True)
    belongs = owner.unsqueeze(0) == torch.arange(
        alibi_slopes.shape[0], device=row.device
    ).unsqueeze(1)
    return belongs.to(grad_distance.dtype) @ grad_distance.transpose(0, 1)


attention_function = Differentiable(
    _attention_op, _attention_backward_op, save=_save, backward=_grads
)
#: For callers that keep the output alone: nothing is computed of the gradient of an lse that nothing uses.
attention_without_lse_function = Differentiable(
    _attention_op, _attention_backward_op, save=_save, backward=_grads, constants=(1,)
)

attention_decode_op = define(
    "attention_decode",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor? block_table,"
    " Tensor? alibi_slopes, Tensor? sinks, float softmax_scale, int window_left, int window_right,"
    " float softcap, int num_splits, int split_size) -> (Tensor out, Tensor lse)",
    reference=reference.attention_decode,
    fake=_fake_forward,
    triton="attention.attention_decode:attention_decode",
    why_not=_KERNELS,
    sharding=(
        "B s H d, B t H d, B t H e, B, -, B H, H -> B s H e, B H s",
        "B s H d, p z H d, p z H e, B, B m, B H, H -> B s H e, B H s",
    ),
)
attention_cache_append_op = define(
    "attention_cache_append",
    "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens,"
    " Tensor? block_table, Tensor? cos, Tensor? sin, bool interleaved) -> ()",
    reference=reference.attention_cache_append,
    fake=lambda *args: None,
    triton="attention.attention_cache_append:attention_cache_append",
    sharding=(
        "B s H d, B s H e, B t H d, B t H e, B, -, p r, p r ->",
        "b s H d, b s H e, p z H d, p z H e, b, b m, p r, p r ->",
    ),
)
_merge_attention_op = define(
    "merge_attention",
    "(Tensor out1, Tensor lse1, Tensor out2, Tensor lse2) -> (Tensor out, Tensor lse)",
    reference=reference.merge_attention,
    fake=lambda out1, lse1, out2, lse2: (dense(out1), dense(lse1)),
    triton="attention.merge_attention:merge_attention",
    sharding=("B S H d, B H S, B S H d, B H S -> B S H d, B H S",),
)
_merge_attention_backward_op = define(
    "merge_attention_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor out1, Tensor lse1, Tensor out2, Tensor lse2)"
    " -> (Tensor grad_out1, Tensor grad_lse1, Tensor grad_out2, Tensor grad_lse2)",
    reference=reference.merge_attention_backward,
    fake=lambda grad_out, grad_lse, out1, lse1, out2, lse2: (
        dense(out1),
        dense(lse1),
        dense(out2),
        dense(lse2),
    ),
    triton="attention.merge_attention:merge_attention_backward",
    sharding=("B S H d, B H S, B S H d, B H S, B S H d, B H S -> B S H d, B H S, B S H d, B H S",),
)


def _merge_grads(
    overload: Any, saved: Any, scalars: Any, grads: Any, needs: Any
) -> tuple[Tensor, ...]:
    grad_out, grad_lse = grads
    if grad_out is None:
        grad_out = torch.zeros_like(saved[0])
    results: tuple[Tensor, ...] = tuple(overload(grad_out, grad_lse, *saved))
    return results


merge_attention_function = Differentiable(
    _merge_attention_op,
    _merge_attention_backward_op,
    save=lambda args, outputs: tuple(args),
    backward=_merge_grads,
)
