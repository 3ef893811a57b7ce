"""Family `norm`: RMSNorm, RMSNorm of a residual sum, LayerNorm, rows of unit length."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from warploom._library import Differentiable, define
from warploom.ops._check import (
    check_device,
    check_floating,
    check_same,
    check_shape,
    check_tensor,
    fail,
)
from warploom.ops._fakes import dense, statistics_dtype
from warploom.reference import norm as reference


def _statistics(x: Tensor) -> Tensor:
    """Where a row's mean or rstd goes: float32 (float64 for float64 x), x's shape without the last."""
    return x.new_empty(x.shape[:-1], dtype=statistics_dtype(x))


_rms_norm_op = define(
    "rms_norm",
    "(Tensor x, Tensor weight, float eps) -> (Tensor out, Tensor rstd)",
    reference=reference.rms_norm,
    fake=lambda x, weight, eps: (dense(x), _statistics(x)),
    triton="norm.rms_norm:rms_norm",
    sharding=("... n, n -> ... n, ...",),
)
_add_rms_norm_op = define(
    "add_rms_norm",
    "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor out, Tensor sum, Tensor rstd)",
    reference=reference.add_rms_norm,
    fake=lambda x, residual, weight, eps: (dense(x), dense(x), _statistics(x)),
    triton="norm.rms_norm:add_rms_norm",
    sharding=("... n, ... n, n -> ... n, ... n, ...",),
)
_rms_norm_backward_op = define(
    "rms_norm_backward",
    "(Tensor grad_out, Tensor x, Tensor weight, Tensor rstd, Tensor? grad_sum)"
    " -> (Tensor grad_x, Tensor grad_weight)",
    reference=reference.rms_norm_backward,
    fake=lambda grad_out, x, weight, rstd, grad_sum: (dense(x), torch.empty_like(weight)),
    triton="norm.rms_norm:rms_norm_backward",
    sharding=("... n, ... n, n, ..., ... n -> ... n, n",),
)
_layer_norm_op = define(
    "layer_norm",
    "(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor out, Tensor mean, Tensor rstd)",
    reference=reference.layer_norm,
    fake=lambda x, weight, bias, eps: (dense(x), _statistics(x), _statistics(x)),
    triton="norm.layer_norm:layer_norm",
    sharding=("... n, n, n -> ... n, ..., ...",),
)
_layer_norm_backward_op = define(
    "layer_norm_backward",
    "(Tensor grad_out, Tensor x, Tensor weight, Tensor mean, Tensor rstd)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    reference=reference.layer_norm_backward,
    fake=lambda grad_out, x, weight, mean, rstd: (
        dense(x),
        torch.empty_like(weight),
        torch.empty_like(weight),
    ),
    triton="norm.layer_norm:layer_norm_backward",
    sharding=("... n, ... n, n, ..., ... -> ... n, n, n",),
)


_l2_norm_op = define(
    "l2_norm",
    "(Tensor x, float eps) -> (Tensor out, Tensor rnorm)",
    reference=reference.l2_norm,
    fake=lambda x, eps: (dense(x), _statistics(x)),
    triton="norm.l2_norm:l2_norm",
    sharding=("... n -> ... n, ...",),
)
_l2_norm_backward_op = define(
    "l2_norm_backward",
    "(Tensor grad_out, Tensor x, Tensor rnorm) -> Tensor",
    reference=reference.l2_norm_backward,
    fake=lambda grad_out, x, rnorm: dense(x),
    triton="norm.l2_norm:l2_norm_backward",
    sharding=("... n, ... n, ... -> ... n",),
)


def _rms_norm_grads(
    overload: Any, saved: Any, scalars: Any, grads: Any, needs: Any
) -> tuple[Tensor, ...]:
    x, weight, rstd = saved
    grad_x, grad_weight = overload(grads[0], x, weight, rstd, None)
    return grad_x, grad_weight


def _add_rms_norm_grads(
    overload: Any, saved: Any, scalars: Any, grads: Any, needs: Any
) -> tuple[Tensor, ...]:
    total, weight, rstd = saved
    grad_out, grad_sum, _ = grads
    if grad_out is None:
        return grad_sum, grad_sum, torch.zeros_like(weight)
    grad_x, grad_weight = overload(grad_out, total, weight, rstd, grad_sum)
    return grad_x, grad_x, grad_weight


def _layer_norm_grads(
    overload: Any, saved: Any, scalars: Any, grads: Any, needs: Any
) -> tuple[Tensor, ...]:
    x, weight, mean, rstd = saved
    grad_x, grad_weight, grad_bias = overload(grads[0], x, weight, mean, rstd)
    return grad_x, grad_weight, grad_bias


_rms_norm = Differentiable(
    _rms_norm_op,
    _rms_norm_backward_op,
    save=lambda args, outputs: (args[0], args[1], outputs[1]),
    backward=_rms_norm_grads,
    constants=(1,),
)
_add_rms_norm = Differentiable(
    _add_rms_norm_op,
    _rms_norm_backward_op,
    save=lambda args, outputs: (outputs[1], args[2], outputs[2]),
    backward=_add_rms_norm_grads,
    constants=(2,),
)
_layer_norm = Differentiable(
    _layer_norm_op,
    _layer_norm_backward_op,
    save=lambda args, outputs: (args[0], args[1], outputs[1], outputs[2]),
    backward=_layer_norm_grads,
    constants=(1, 2),
)


_l2_norm = Differentiable(
    _l2_norm_op,
    _l2_norm_backward_op,
    save=lambda args, outputs: (args[0], outputs[1]),
    backward=lambda overload, saved, scalars, grads, needs: (overload(grads[0], *saved),),
    constants=(1,),
)


def _check_input(op: str, x: Tensor, eps: float) -> None:
    check_floating(op, "x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        fail(op, "x", "at least 1 dimension, the last one at least 1 long", tuple(x.shape))
    if not eps >= 0:
        fail(op, "eps", "a number >= 0", eps)


def _parameter(op: str, name: str, value: Tensor | None, x: Tensor, fill: float) -> Tensor:
    """The parameter `value` [N] in x's dtype or float32, or a constant one in its place."""
    columns = x.shape[-1]
    if value is None:
        return x.new_full((columns,), fill)
    check_tensor(op, name, value)
    if value.dtype not in (x.dtype, torch.float32):
        raise TypeError(
            f"{op}: {name}: expected dtype {x.dtype} or torch.float32, got {value.dtype}"
        )
    check_shape(op, name, value, (columns,))
    check_device(op, name, value, "x", x)
    return value


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    residual: None = None,
    backend: str | None = None,
) -> Tensor: ...


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    residual: Tensor,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Root mean square normalisation over the last dimension, with an optional fused residual add.

    out = x * rstd * weight, rstd = (mean(x^2) + eps)^(-1/2); with `residual`, x is replaced by
    sum = x + residual, rounded to x's dtype, which is returned too.

    Args:
        x: [..., N], float32, float16, bfloat16 (float64 on `reference` and `cpu`), any strides.
        weight: [N], x's dtype or float32; None means ones.
        eps: added to the mean square; default 1e-6.
        residual: x's shape, dtype and device.
        backend: one of `warploom.BACKENDS`; None chooses.

    Returns:
        out [..., N] in x's dtype, contiguous; with `residual` the pair (out, sum).
        Arithmetic is in float32 (float64 for float64) with one rounding at the end.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        RuntimeError: the named backend cannot serve the call; forward-mode differentiation.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019), equation 4.
    """
    _check_input("rms_norm", x, eps)
    weight = _parameter("rms_norm", "weight", weight, x, 1.0)
    if residual is None:
        out: Tensor = _rms_norm(x, weight, float(eps), backend=backend)[0]
        return out
    check_same("rms_norm", "residual", residual, "x", x)
    check_shape("rms_norm", "residual", residual, x.shape)
    out, total, _ = _add_rms_norm(x, residual, weight, float(eps), backend=backend)
    return out, total


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """Layer normalisation over the last dimension.

    out = (x - mean) * rstd * weight + bias, rstd = (var + eps)^(-1/2), var biased.

    Args:
        x: [..., N], float32, float16, bfloat16 (float64 on `reference` and `cpu`), any strides.
        weight, bias: [N], x's dtype or float32, both of one dtype; None means ones and zeros.
        eps: added to the variance; default 1e-5.
        backend: one of `warploom.BACKENDS`; None chooses.

    Returns:
        out [..., N] in x's dtype, contiguous; float32 arithmetic, one rounding.

    Raises:
        TypeError, ValueError, RuntimeError: as `rms_norm`.

    Source: Ba, Kiros and Hinton, Layer Normalization (2016), equation 4.
    """
    _check_input("layer_norm", x, eps)
    weight = _parameter("layer_norm", "weight", weight, x, 1.0)
    bias = _parameter("layer_norm", "bias", bias, x, 0.0)
    if weight.dtype != bias.dtype:
        weight, bias = weight.float(), bias.float()
    out: Tensor = _layer_norm(x, weight, bias, float(eps), backend=backend)[0]
    return out


def l2_norm(x: Tensor, *, eps: float = 1e-12, backend: str | None = None) -> Tensor:
    """Rows of unit length: embeddings to be compared by cosine, normalised queries and keys.

    out = x * rnorm, rnorm = (sum(x^2) + eps)^(-1/2). A row of zeros stays zero for eps > 0.

    Args:
        x: [..., N], float32, float16, bfloat16 (float64 on `reference` and `cpu`), any strides.
        eps: added to the sum of squares; default 1e-12.
        backend: one of `warploom.BACKENDS`; None chooses.

    Returns:
        out [..., N] in x's dtype, contiguous; float32 arithmetic, one rounding.

    Raises:
        TypeError, ValueError, RuntimeError: as `rms_norm`.
    """
    _check_input("l2_norm", x, eps)
    out: Tensor = _l2_norm(x, float(eps), backend=backend)[0]
    return out
