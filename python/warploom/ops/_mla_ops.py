"""The ops of family `mla`: schemas, fakes, what each backend cannot do, gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from warploom._library import Differentiable, WhyNot, define
from warploom.ops._fakes import dense, statistics_dtype
from warploom.reference import mla as reference

#: Sizes of the kernels; the reference and C++ take any.
MAX_LATENT, MAX_ROPE, SIZE_STEP = 512, 256, 16


def _fake_decode(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    d_latent = rest[3]
    batch, queries, heads, _ = q.shape
    out = q.new_empty((batch, queries, heads, d_latent))
    return out, q.new_empty((batch, heads, queries), dtype=statistics_dtype(q))


def _sizes(d_latent: int, width: int) -> list[str]:
    d_rope = width - d_latent
    fits = d_latent % SIZE_STEP == 0 and d_rope % SIZE_STEP == 0
    if not fits or not 0 < d_latent <= MAX_LATENT or not 0 <= d_rope <= MAX_ROPE:
        return [
            f"latents up to {MAX_LATENT} and rotary keys up to {MAX_ROPE}, both multiples of {SIZE_STEP}, "
            f"got {d_latent} and {d_rope}"
        ]
    return []


def _decode_sizes(
    q: Tensor, kv_cache: Tensor, lengths: Tensor, table: Tensor | None, d_latent: int, *rest: Any
) -> list[str]:
    return _sizes(d_latent, q.shape[-1])


def _backward_sizes(*args: Any) -> list[str]:
    """Asked with the arguments of either op: those of the forward when the backend is chosen."""
    q = args[0] if isinstance(args[4], int) else args[1]
    d_latent = next(arg for arg in args if isinstance(arg, int))
    return _sizes(d_latent, q.shape[-1])


def _in_kernels(sizes: WhyNot) -> dict[str, WhyNot]:
    return dict.fromkeys(("cuda", "simt", "simt_instrumented"), sizes)


mla_decode_op = define(
    "mla_decode",
    "(Tensor q, Tensor kv_cache, Tensor cache_seqlens, Tensor? block_table, int d_latent,"
    " float softmax_scale, bool causal, int num_splits, int split_size) -> (Tensor out, Tensor lse)",
    reference=reference.mla_decode,
    fake=_fake_decode,
    triton="mla.mla_decode:mla_decode",
    why_not=_in_kernels(_decode_sizes),
    sharding=(
        "B s H d, B t e, B, - -> B s H l, B H s",
        "B s H d, p z e, B, B m -> B s H l, B H s",
    ),
)
_mla_absorbed_backward_op = define(
    "mla_absorbed_backward",
    "(Tensor grad_out, Tensor q, Tensor kv, Tensor out, Tensor lse, Tensor? grad_lse, Tensor kv_seqlens,"
    " int d_latent, float softmax_scale, bool causal) -> (Tensor grad_q, Tensor grad_kv)",
    reference=reference.mla_absorbed_backward,
    fake=lambda grad_out, q, kv, *rest: (dense(q), dense(kv)),
    triton="mla.mla_absorbed_backward:mla_absorbed_backward",
    why_not=_in_kernels(_backward_sizes),
    sharding=("B s H l, B s H d, B t d, B s H l, B H s, B H s, B -> B s H d, B t d",),
)
mla_cache_append_op = define(
    "mla_cache_append",
    "(Tensor compressed_kv, Tensor norm_weight, Tensor(a!) kv_cache, Tensor cache_seqlens,"
    " Tensor? block_table, Tensor? cu_seqlens, Tensor? cos, Tensor? sin, float eps, bool interleaved) -> ()",
    reference=reference.mla_cache_append,
    fake=lambda *args: None,
    triton="mla.mla_cache_append:mla_cache_append",
    sharding=("B s d, l, B t e, B, -, -, p r, p r ->",),
)


def _grads(
    overload: Any, saved: Any, scalars: Any, grads: Any, needs: Any
) -> tuple[Tensor | None, ...]:
    q, kv, kv_seqlens, out, lse = saved
    grad_out, grad_lse = grads
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    d_latent, softmax_scale, causal = scalars[:3]
    grad_q, grad_kv = overload(
        grad_out, q, kv, out, lse, grad_lse, kv_seqlens, d_latent, softmax_scale, causal
    )
    return grad_q, grad_kv, None, None


mla_absorbed_function = Differentiable(
    mla_decode_op,
    _mla_absorbed_backward_op,
    save=lambda args, outputs: (*args[:3], *outputs),
    backward=_grads,
)
