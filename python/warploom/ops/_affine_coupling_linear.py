"""The affine coupling of rows joined with the linear layer that makes its parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from warploom._library import OPS, Differentiable, define
from warploom.ops._affine_coupling import FORMS, check_map, check_sums, parse_mask
from warploom.ops._autocast import autocast
from warploom.ops._check import (
    check_device,
    check_floating,
    check_same,
    check_shape,
    fail,
)
from warploom.ops._fakes import dense, statistics_dtype
from warploom.reference import _affine_coupling_linear as reference

_OPTIONS = (
    "str mask, int first, int count, str layout, str scale, float clamp, float eps, float params_scale, "
    "bool add_first, int shift_sign, int log_sign"
)


def _composed(
    backend: str, x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, places: Tensor | None,
    scale_weight: Tensor | None, log_det_in: Tensor | None, *options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if backend == "triton":
        from warploom.triton_kernels.coupling import affine_coupling_linear as kernels

        z, log_det = kernels.affine_coupling_linear(
            x, hidden, weight, bias, places, scale_weight, log_det_in, *options
        )
        return z, log_det
    params = F.linear(hidden, weight, bias).to(x.dtype)
    overload = OPS["affine_coupling"].overloads[backend]
    z, log_det = overload(x, params, None, places, scale_weight, log_det_in, *options, "none")
    return z, log_det


def _composed_backward(
    backend: str, grad_z: Tensor | None, grad_log_det: Tensor | None, source: Tensor, hidden: Tensor,
    weight: Tensor, bias: Tensor | None, places: Tensor | None, scale_weight: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The parameters once more by a product, then the coupling's backward and the layer's."""
    *forward_options, from_output = options
    params = F.linear(hidden, weight, bias).to(source.dtype)
    overload = OPS["affine_coupling_backward"].overloads[backend]
    grad_x, grad_params, _, grad_scale = overload(
        grad_z, grad_log_det, source, params, None, places, scale_weight, *forward_options, "none",
        from_output,
    )  # fmt: skip
    grads = reference.linear_gradients(grad_params.to(hidden.dtype), hidden, weight, bias)
    return grad_x, *grads, grad_scale


def _why_not_triton(*args: Any) -> list[str]:
    return OPS["affine_coupling"].why_not_rules["triton"](*args)


_affine_coupling_linear_op = define(
    "affine_coupling_linear",
    "(Tensor x, Tensor hidden, Tensor weight, Tensor? bias, Tensor? places, Tensor? scale_weight, "
    f"Tensor? log_det_in, {_OPTIONS}) -> (Tensor z, Tensor log_det)",
    reference=reference.affine_coupling_linear,
    fake=lambda x, *rest: (dense(x), x.new_empty(x.shape[0], dtype=statistics_dtype(x))),
    composed=_composed,
    why_not={"triton": _why_not_triton},
)


def _backward_fake(
    grad_z: Tensor | None, grad_log_det: Tensor | None, source: Tensor, hidden: Tensor, weight: Tensor,
    bias: Tensor | None, places: Tensor | None, scale_weight: Tensor | None, *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    learned = 0 if scale_weight is None else (len(source), len(scale_weight))
    return (
        dense(source),
        dense(hidden),
        dense(weight),
        weight.new_empty(0 if bias is None else len(bias)),
        source.new_empty(learned, dtype=statistics_dtype(source)),
    )


_affine_coupling_linear_backward_op = define(
    "affine_coupling_linear_backward",
    "(Tensor? grad_z, Tensor? grad_log_det, Tensor source, Tensor hidden, Tensor weight, Tensor? bias, "
    f"Tensor? places, Tensor? scale_weight, {_OPTIONS}, bool from_output) -> (Tensor grad_x, "
    "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, Tensor grad_scale_weight)",
    reference=reference.affine_coupling_linear_backward,
    fake=_backward_fake,
    composed=_composed_backward,
    why_not={"triton": _why_not_triton},
)


def _differentiable(recompute: bool) -> Differentiable:
    def save(args: Any, outputs: Any) -> tuple[Tensor | None, ...]:
        return (outputs[0] if recompute else args[0], *args[1:6])

    def gradients(
        overload: Any, saved: Any, scalars: Any, grads: Any, needs: Any
    ) -> tuple[Tensor | None, ...]:
        _, _, _, bias, _, scale_weight = saved
        grad_x, grad_hidden, grad_weight, grad_bias, grad_scale = overload(
            *grads, *saved, *scalars, recompute
        )
        return (
            grad_x,
            grad_hidden,
            grad_weight,
            None if bias is None else grad_bias,
            None,
            None if scale_weight is None else grad_scale.sum(0),
            grads[1] if needs[6] else None,
        )

    return Differentiable(
        _affine_coupling_linear_op,
        _affine_coupling_linear_backward_op,
        save=save,
        backward=gradients,
    )


_recomputing, _saving = _differentiable(True), _differentiable(False)


def affine_coupling_linear(
    x: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: str | int | Tensor = "channel",
    layout: str = "shift_scale",
    scale: str = "exp",
    clamp: float = 1.0,
    eps: float = 0.0,
    params_scale: float = 1.0,
    scale_weight: Tensor | None = None,
    order: str = "mul_add",
    inverse: bool = False,
    log_det_in: Tensor | None = None,
    recompute: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`affine_coupling(x, hidden weight^T + bias, ...)` of rows: the conditioner's last layer, too.

    With Triton the forward's parameters never reach memory; the backward makes them again by one product.

    Args:
        x: [B, C], float32, float16, bfloat16 (float64 on `reference` and `cpu`).
        hidden: [B, H], what the conditioner's last layer is given, x's dtype or 16 bits beside float32.
        weight: [2k, H], rows as `layout` arranges the parameters of the k transformed channels; [k, H] for
            "additive". hidden's dtype.
        bias: [2k] ([k]), hidden's dtype, or None.
        mask: one over channels, as in `affine_coupling`.
        layout, scale, clamp, eps, params_scale, scale_weight, order, inverse, log_det_in, recompute,
        backend: as in `affine_coupling`.

    Returns:
        z [B, C] contiguous in x's dtype and log_det [B] in float32 (float64 of float64). Differentiable once
        in x, hidden, weight, bias, scale_weight and log_det_in.

    Raises, source: as `affine_coupling`.
    """
    op = "affine_coupling_linear"
    check_floating(op, "x", x)
    if x.dim() != 2:
        fail(op, "x", "shape [B, C]", tuple(x.shape))
    check_map(op, layout, scale, order, clamp, eps)
    tensors = {"hidden": hidden, "weight": weight}
    if bias is not None:
        tensors["bias"] = bias
    for name, tensor in tensors.items():
        check_floating(op, name, tensor)
        check_device(op, name, tensor, "x", x)
    hidden, weight, *rest = autocast(*tensors.values())
    bias = rest[0] if rest else None
    narrow = hidden.dtype in (torch.float16, torch.bfloat16)
    if hidden.dtype != x.dtype and not (narrow and x.dtype == torch.float32):
        fail(op, "hidden", "x's dtype, or 16 bits beside float32", hidden.dtype)
    check_same(op, "weight", weight, "hidden", hidden)
    if bias is not None:
        check_same(op, "bias", bias, "hidden", hidden)
    if hidden.dim() != 2 or len(hidden) != len(x):
        fail(op, "hidden", f"shape [{len(x)}, H]", tuple(hidden.shape))
    if weight.dim() != 2:
        fail(op, "weight", "2 dimensions", tuple(weight.shape))
    halves = 1 if scale == "additive" else 2
    places, mask_name, first, count = parse_mask(op, mask, x, weight.T, halves)
    if mask_name not in ("range", "slots"):
        fail(op, "mask", "one over channels", mask_name)
    check_shape(op, "weight", weight, (halves * count, hidden.shape[1]))
    if bias is not None:
        check_shape(op, "bias", bias, (halves * count,))
    scale_weight = check_sums(op, x, scale, scale_weight, log_det_in, count)
    z, log_det = (_recomputing if recompute else _saving)(
        x, hidden, weight, bias, places, scale_weight, log_det_in, mask_name, first, count, layout, scale,
        float(clamp), float(eps), float(params_scale), *FORMS[order, inverse], backend=backend,
    )  # fmt: skip
    return z, log_det
