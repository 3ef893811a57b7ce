"""The operators of family `lora`: schemas, fakes, what is saved, and how gradients are handed back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# The ops of these families are parts of those composed here.
import warploom.ops.activation
import warploom.ops.norm  # noqa: F401
from warploom._library import OPS, Differentiable, define
from warploom.ops._fakes import dense, statistics_dtype
from warploom.reference import lora as reference


def _matrix(x: Tensor, columns: Tensor | None) -> Tensor:
    """[M, the first size of `columns`], or nothing."""
    return x.new_empty(0 if columns is None else (x.shape[0], columns.shape[0]))


def _like(tensor: Tensor | None, x: Tensor, needed: bool) -> Tensor:
    return x.new_empty(0) if tensor is None or not needed else dense(tensor)


def _empty_unless(tensor: Tensor, needed: bool) -> Tensor:
    return dense(tensor) if needed else tensor.new_empty(0)


_lora_shrink_op = define(
    "lora_shrink",
    "(Tensor x, Tensor lora_a, Tensor? seed, float dropout_p) -> Tensor",
    reference=reference.lora_shrink,
    fake=lambda x, lora_a, seed, dropout_p: _matrix(x, lora_a),
    triton="lora.lora_shrink:lora_shrink",
)
_lora_shrink_backward_op = define(
    "lora_shrink_backward",
    "(Tensor grad_shrunk, Tensor x, Tensor lora_a, Tensor? seed, float dropout_p, bool needs_x, bool needs_a)"
    " -> (Tensor grad_x, Tensor grad_a)",
    reference=reference.lora_shrink_backward,
    fake=lambda grad_shrunk, x, lora_a, seed, dropout_p, needs_x, needs_a: (
        _empty_unless(x, needs_x),
        _empty_unless(lora_a, needs_a),
    ),
    triton="lora.lora_shrink:lora_shrink_backward",
)


def _lora_linear_fake(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    column_scale: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    out = _matrix(x, weight)
    return out, _matrix(x, lora_a), x.new_empty(0) if column_scale is None else dense(out)


_lora_linear_op = define(
    "lora_linear",
    "(Tensor x, Tensor weight, Tensor? weight_scale, Tensor? bias, Tensor? lora_a, Tensor? lora_b,"
    " Tensor? column_scale, Tensor? shrunk, Tensor? seed, str weight_format, float scaling, float dropout_p)"
    " -> (Tensor out, Tensor shrunk_out, Tensor unscaled)",
    reference=reference.lora_linear,
    fake=_lora_linear_fake,
    triton="lora.lora_linear:lora_linear",
)


def _lora_linear_backward_fake(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    column_scale: Tensor | None,
    shrunk: Tensor | None,
    seed: Tensor | None,
    unscaled: Tensor | None,
    weight_format: str,
    scaling: float,
    dropout_p: float,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
    needs_a: bool,
    needs_b: bool,
    needs_column_scale: bool,
    needs_shrunk: bool,
) -> tuple[Tensor, ...]:
    columns = (weight.shape[0],)
    return (
        _like(x, x, needs_x),
        _like(weight, x, needs_weight),
        x.new_empty(columns if needs_bias else 0),
        _like(lora_a, x if lora_a is None else lora_a, needs_a),
        _like(lora_b, x if lora_b is None else lora_b, needs_b),
        x.new_empty(columns if needs_column_scale else 0, dtype=statistics_dtype(x)),
        _like(shrunk, x, needs_shrunk),
    )


_lora_linear_backward_op = define(
    "lora_linear_backward",
    "(Tensor grad_out, Tensor x, Tensor weight, Tensor? weight_scale, Tensor? lora_a, Tensor? lora_b,"
    " Tensor? column_scale, Tensor? shrunk, Tensor? seed, Tensor? unscaled, str weight_format, float scaling,"
    " float dropout_p, bool needs_x, bool needs_weight, bool needs_bias, bool needs_a, bool needs_b,"
    " bool needs_column_scale, bool needs_shrunk)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_a, Tensor grad_b,"
    " Tensor grad_column_scale, Tensor grad_shrunk)",
    reference=reference.lora_linear_backward,
    fake=_lora_linear_backward_fake,
    triton="lora.lora_linear_backward:lora_linear_backward",
)


def _save_lora_linear(args: Any, outputs: Any) -> tuple[Tensor | None, ...]:
    x, weight, weight_scale, _, lora_a, lora_b, column_scale, shrunk, seed, *_ = args
    made, unscaled = outputs[1:]
    scaled = None if column_scale is None else unscaled
    given = shrunk if lora_a is None else made
    return x, weight, weight_scale, lora_a, lora_b, column_scale, given, seed, scaled


def _lora_linear_grads(
    overload: Any, saved: Any, scalars: Any, grads: Any, needs: Any
) -> tuple[Tensor | None, ...]:
    needs_x, needs_weight, _, needs_bias, needs_a, needs_b, needs_scale, needs_shrunk, _ = needs
    asked = (needs_x, needs_weight, needs_bias, needs_a, needs_b, needs_scale, needs_shrunk)
    results = overload(grads[0], *saved, *scalars, *asked)
    x, weight, bias, a, b, scale, shrunk = (
        grad if asked_for else None for grad, asked_for in zip(results, asked)
    )
    return x, weight, None, bias, a, b, scale, shrunk, None


def _lora_shrink_grads(
    overload: Any, saved: Any, scalars: Any, grads: Any, needs: Any
) -> tuple[Tensor | None, ...]:
    needs_x, needs_a, _ = needs
    grad_x, grad_a = overload(grads[0], *saved, *scalars, needs_x, needs_a)
    return grad_x if needs_x else None, grad_a if needs_a else None, None


lora_shrink = Differentiable(
    _lora_shrink_op,
    _lora_shrink_backward_op,
    save=lambda args, outputs: tuple(args[:3]),
    backward=_lora_shrink_grads,
)
lora_linear = Differentiable(
    _lora_linear_op,
    _lora_linear_backward_op,
    save=_save_lora_linear,
    backward=_lora_linear_grads,
    constants=(1, 2),
)


def _through_shrink(
    backend: str, out: Tensor, lora_a: Tensor, grad_out: Tensor | None, grad_shrunk: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What reaches `out` by itself and through its product with lora_a, and lora_a's gradient."""
    if grad_shrunk is None:
        grad = torch.zeros_like(out) if grad_out is None else grad_out
        return grad, lora_a.new_zeros(lora_a.shape)
    shrink_backward = OPS["lora_shrink_backward"].overloads[backend]
    grad, grad_a = shrink_backward(grad_shrunk, out, lora_a, None, 0.0, True, True)
    return grad if grad_out is None else grad + grad_out, grad_a


def _rms_norm_shrink_backward(
    backend: str,
    grad_out: Tensor | None,
    grad_shrunk: Tensor | None,
    grad_sum: Tensor | None,
    out: Tensor,
    total: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, grad_a = _through_shrink(backend, out, lora_a, grad_out, grad_shrunk)
    norm_backward = OPS["rms_norm_backward"].overloads[backend]
    grad_x, grad_weight = norm_backward(grad, total, weight, rstd, grad_sum)
    return grad_x, grad_weight, grad_a


def _gated_shrink_backward(
    backend: str,
    grad_out: Tensor | None,
    grad_shrunk: Tensor | None,
    out: Tensor,
    gate: Tensor,
    up: Tensor,
    lora_a: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, grad_a = _through_shrink(backend, out, lora_a, grad_out, grad_shrunk)
    gated_backward = OPS["gated_activation_backward"].overloads[backend]
    grad_gate, grad_up = gated_backward(grad, gate, up, activation)
    return grad_gate, grad_up, grad_a


_rms_norm_shrink_op = define(
    "rms_norm_shrink",
    "(Tensor x, Tensor? residual, Tensor weight, Tensor lora_a, float eps)"
    " -> (Tensor out, Tensor shrunk, Tensor rstd, Tensor sum)",
    reference=reference.rms_norm_shrink,
    fake=lambda x, residual, weight, lora_a, eps: (
        dense(x),
        _matrix(x, lora_a),
        x.new_empty(x.shape[0], dtype=statistics_dtype(x)),
        _like(residual, x, True),
    ),
    triton="lora.rms_norm_shrink:rms_norm_shrink",
)
_rms_norm_shrink_backward_op = define(
    "rms_norm_shrink_backward",
    "(Tensor? grad_out, Tensor? grad_shrunk, Tensor? grad_sum, Tensor out, Tensor sum, Tensor weight,"
    " Tensor lora_a, Tensor rstd) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_a)",
    reference=lambda *args: _rms_norm_shrink_backward("reference", *args),
    fake=lambda grad_out, grad_shrunk, grad_sum, out, total, weight, lora_a, rstd: (
        dense(out),
        torch.empty_like(weight),
        dense(lora_a),
    ),
    composed=_rms_norm_shrink_backward,
)
_gated_activation_shrink_op = define(
    "gated_activation_shrink",
    "(Tensor gate, Tensor up, Tensor lora_a, str activation) -> (Tensor out, Tensor shrunk)",
    reference=reference.gated_activation_shrink,
    fake=lambda gate, up, lora_a, activation: (dense(gate), _matrix(gate, lora_a)),
    triton="lora.gated_activation_shrink:gated_activation_shrink",
)
_gated_activation_shrink_backward_op = define(
    "gated_activation_shrink_backward",
    "(Tensor? grad_out, Tensor? grad_shrunk, Tensor out, Tensor gate, Tensor up, Tensor lora_a,"
    " str activation) -> (Tensor grad_gate, Tensor grad_up, Tensor grad_a)",
    reference=lambda *args: _gated_shrink_backward("reference", *args),
    fake=lambda grad_out, grad_shrunk, out, gate, up, lora_a, activation: (
        dense(gate),
        dense(up),
        dense(lora_a),
    ),
    composed=_gated_shrink_backward,
)


def _save_rms_norm_shrink(args: Any, outputs: Any) -> tuple[Tensor, ...]:
    x, residual, weight, lora_a, _ = args
    out, _, rstd, total = outputs
    return out, x if residual is None else total, weight, lora_a, rstd


def _rms_norm_shrink_grads(
    overload: Any, saved: Any, scalars: Any, grads: Any, needs: Any
) -> tuple[Tensor | None, ...]:
    grad_out, grad_shrunk, _, grad_sum = grads
    # A traced backward is given zeros for the output that is empty without a residual.
    if grad_sum is not None and grad_sum.dim() == 1:
        grad_sum = None
    grad_x, grad_weight, grad_a = overload(grad_out, grad_shrunk, grad_sum, *saved)
    return grad_x, grad_x if needs[1] else None, grad_weight, grad_a


rms_norm_shrink = Differentiable(
    _rms_norm_shrink_op,
    _rms_norm_shrink_backward_op,
    save=_save_rms_norm_shrink,
    backward=_rms_norm_shrink_grads,
    constants=(2,),
)
gated_activation_shrink = Differentiable(
    _gated_activation_shrink_op,
    _gated_activation_shrink_backward_op,
    save=lambda args, outputs: (outputs[0], *args[:3]),
    backward=lambda overload, saved, scalars, grads, needs: overload(*grads, *saved, *scalars),
)
