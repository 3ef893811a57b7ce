"""Family `attention`: softmax attention with grouped key/value heads."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from warploom._library import Differentiable, define
from warploom.ops._check import check_dim, check_floating, check_same, check_shape, fail
from warploom.reference import attention as reference


def _dense(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty((batch, queries, heads, v.shape[-1]))
    return out, q.new_empty((batch, heads, queries), dtype=wide)


def _triton_why_not(*args: Any) -> list[str]:
    from warploom.triton_kernels.attention import attention as kernels

    reasons: list[str] = kernels.why_not(*args)
    return reasons


def _cuda_why_not(q: Tensor, k: Tensor, v: Tensor, *scalars: Any) -> list[str]:
    reasons = []
    if max(q.shape[-1], v.shape[-1]) > 256:
        reasons.append(f"head dims up to 256, got {q.shape[-1]} and {v.shape[-1]}")
    return reasons


_attention_op = define(
    "attention",
    "(Tensor q, Tensor k, Tensor v, bool causal, float softmax_scale) -> (Tensor out, Tensor lse)",
    reference=reference.attention,
    fake=_fake_forward,
    triton="attention.attention:attention",
    why_not={
        "triton": _triton_why_not,
        "cuda": _cuda_why_not,
        "simt": _cuda_why_not,
        "simt_instrumented": _cuda_why_not,
    },
)
_attention_backward_op = define(
    "attention_backward",
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? grad_lse,"
    " bool causal, float softmax_scale) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    reference=reference.attention_backward,
    fake=lambda grad_out, q, k, v, *rest: (_dense(q), _dense(k), _dense(v)),
    native=("cpu",),
    triton="attention.attention_backward:attention_backward",
    why_not={"triton": _triton_why_not},
)


def _grads(overload: Any, saved: Any, scalars: Any, grads: Any) -> tuple[Tensor, ...]:
    q, k, v, out, lse = saved
    grad_out, grad_lse = grads
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grad_q, grad_k, grad_v = overload(grad_out, q, k, v, out, lse, grad_lse, *scalars)
    return grad_q, grad_k, grad_v


_attention = Differentiable(
    _attention_op,
    _attention_backward_op,
    save=lambda args, outputs: (*args[:3], *outputs),
    backward=_grads,
)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast floating inputs to the autocast dtype where autocast is on: attention is a product."""
    device_type = tensors[0].device.type
    # Meta tensors know no autocast; asking torch whether a device does breaks the graph on 2.11.
    if device_type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(tensor.to(dtype) for tensor in tensors)


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention: out = softmax(softmax_scale * q k^T + mask) v.

    MHA, GQA and MQA: query head h reads key/value head h // (H // Hkv).

    Args:
        q: [B, Sq, H, D], float32, float16, bfloat16 (float64 on `reference` and `cpu`), any strides with a
            contiguous last dimension (others are copied). PyTorch's SDPA has [B, H, S, D].
        k: [B, Sk, Hkv, D] and v: [B, Sk, Hkv, Dv], q's dtype; H a multiple of Hkv.
        causal: aligned bottom-right: query i sees the keys j <= i + Sk - Sq (PyTorch's SDPA aligns top-left).
        softmax_scale: default D ** -0.5.
        return_lse: also return the natural log-sum-exp of the scaled scores.
        backend: one of `warploom.BACKENDS`; None chooses.

    Returns:
        out [B, Sq, H, Dv] in q's dtype, contiguous; with `return_lse` also lse [B, H, Sq] in float32 (float64
        for float64). A query that sees no key gets out = 0 and lse = -inf. Under autocast the inputs are
        cast to its dtype. Both outputs are differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or head ratio.
        RuntimeError: the named backend cannot serve the call; forward-mode differentiation.

    Source: Vaswani et al. (2017), equation 1; Ainslie et al., GQA (2023); Dao, FlashAttention-2 (2023).
    """
    op = "attention"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_floating(op, name, tensor)
        check_dim(op, name, tensor, 4, "[B, S, H, D]")
    q, k, v = _autocast(q, k, v)
    check_same(op, "k", k, "q", q)
    check_same(op, "v", v, "q", q)
    batch, _, heads, dim = q.shape
    check_shape(op, "k", k, (batch, k.shape[1], k.shape[2], dim))
    check_shape(op, "v", v, (batch, k.shape[1], k.shape[2], v.shape[3]))
    if k.shape[2] == 0 or heads % k.shape[2]:
        fail(op, "k", f"a head count that divides q's {heads}", k.shape[2])
    if dim == 0 or v.shape[3] == 0:
        fail(op, "q" if dim == 0 else "v", "a head dim of at least 1", 0)
    scale = dim**-0.5 if softmax_scale is None else float(softmax_scale)
    out, lse = _attention(q, k, v, bool(causal), scale, backend=backend)
    return (out, lse) if return_lse else out
