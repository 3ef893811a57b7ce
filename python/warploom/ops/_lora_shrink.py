"""Norms and activations that emit lora_shrink of their output while a row of it is at hand."""

from __future__ import annotations

from typing import overload

from torch import Tensor

from warploom.ops import _lora_ops
from warploom.ops._autocast import autocast
from warploom.ops._check import (
    check_dim,
    check_floating,
    check_parameter,
    check_same,
    check_shape,
    fail,
)


def _check_rows(op: str, argument: str, x: Tensor, lora_a: Tensor) -> None:
    """x [..., K] and an adapter of at least one row [R, K]."""
    check_floating(op, argument, x)
    if x.dim() == 0 or x.shape[-1] == 0:
        fail(op, argument, "at least 1 dimension, the last one at least 1 long", tuple(x.shape))
    check_parameter(op, "lora_a", lora_a, x)
    check_dim(op, "lora_a", lora_a, 2, "[R, K]")
    check_shape(op, "lora_a", lora_a, (max(lora_a.shape[0], 1), x.shape[-1]))


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _like(x: Tensor, shrunk: Tensor) -> Tensor:
    """[..., R] for rows of x, in the dtype that autocast gives to products."""
    (shrunk,) = autocast(shrunk.view(*x.shape[:-1], shrunk.shape[-1]))
    return shrunk


@overload
def rms_norm_shrink(
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    residual: None = None,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def rms_norm_shrink(
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    residual: Tensor,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...


def rms_norm_shrink(
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """`rms_norm`, and the `lora_shrink` of its output for the linear maps behind it.

    out = x * rstd * weight, rstd = (mean(x^2) + eps)^(-1/2), shrunk = out A^T; with `residual`, x is replaced
    by sum = x + residual, rounded to x's dtype, which is returned too. The maps behind take `shrunk` in the
    place of their lora_a (`lora_linear`), their lora_a stacked where they are several.

    Args:
        x: [..., K], float32, float16, bfloat16 (float64 on `reference` and `cpu`), any strides.
        weight: [K], x's dtype or float32; None means ones.
        lora_a: [R, K], R >= 1, in x's dtype, or in float32, then rounded to x's in the product.
        residual: x's shape, dtype and device.
        eps: added to the mean square; default 1e-6.
        backend: one of `warploom.BACKENDS`; None chooses.

    Returns:
        (out [..., K], shrunk [..., R]), with `residual` (out, sum, shrunk): contiguous, in x's dtype, but
        that autocast casts shrunk to its own. The product is that of out as rounded, summed in float32.
        Differentiable; gradients are deterministic, those of weight and lora_a in their own dtypes.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        RuntimeError: the named backend cannot serve the call; forward-mode differentiation.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019), equation 4; Hu et al.,
    arXiv:2106.09685.
    """
    op = "rms_norm_shrink"
    _check_rows(op, "x", x, lora_a)
    if not eps >= 0:
        fail(op, "eps", "a number >= 0", eps)
    columns = x.shape[-1]
    if weight is None:
        weight = x.new_ones((columns,))
    check_parameter(op, "weight", weight, x)
    check_shape(op, "weight", weight, (columns,))
    if residual is not None:
        check_same(op, "residual", residual, "x", x)
        check_shape(op, "residual", residual, x.shape)
        residual = _rows(residual)
    out, shrunk, _, total = _lora_ops.rms_norm_shrink(
        _rows(x), residual, weight, lora_a, float(eps), backend=backend
    )
    if residual is None:
        return out.view(x.shape), _like(x, shrunk)
    return out.view(x.shape), total.view(x.shape), _like(x, shrunk)


def swiglu_shrink(
    gate: Tensor, up: Tensor, lora_a: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """`swiglu`, and the `lora_shrink` of its output for the linear map behind it.

    out = silu(gate) * up, silu(z) = z / (1 + exp(-z)), shrunk = out A^T.

    Args:
        gate, up: [..., K], one shape and dtype: float32, float16, bfloat16 (float64 on `reference` and
            `cpu`); any strides, so the two halves of one projection do.
        lora_a, backend: as in `rms_norm_shrink`.

    Returns:
        (out [..., K], shrunk [..., R]), otherwise as `rms_norm_shrink`.

    Raises:
        TypeError, ValueError, RuntimeError: as `rms_norm_shrink`.

    Source: Shazeer, GLU Variants Improve Transformer (2020), equation 6; Hu et al., arXiv:2106.09685.
    """
    op = "swiglu_shrink"
    _check_rows(op, "gate", gate, lora_a)
    check_same(op, "up", up, "gate", gate)
    check_shape(op, "up", up, gate.shape)
    out, shrunk = _lora_ops.gated_activation_shrink(
        _rows(gate), _rows(up), lora_a, "silu", backend=backend
    )
    return out.view(gate.shape), _like(gate, shrunk)
