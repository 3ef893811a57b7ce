"""An affine coupling of rows whose parameters are the conditioner's last linear layer, in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from warploom.reference import coupling


def _params(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden weight^T + bias, in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide))


def affine_coupling_linear(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, places: Tensor | None,
    scale_weight: Tensor | None, log_det_in: Tensor | None, *options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`coupling.affine_coupling` of x [B, C] with params = hidden weight^T + bias.

    hidden [B, H], weight [2k, H] (or [k, H] where additive), bias [2k]; `options`: the further arguments
    up to log_sign. The parameters are not rounded to x's dtype.
    """
    params = _params(x, hidden, weight, bias)
    arguments: tuple[Any, ...] = (
        x,
        params,
        None,
        places,
        scale_weight,
        log_det_in,
        *options,
        "none",
    )
    return coupling.affine_coupling(*arguments)


def linear_gradients(
    grad_params: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_hidden, grad_weight, grad_bias) of params = hidden weight^T + bias; the last may be empty."""
    grad_bias = grad_params.new_empty(0) if bias is None else grad_params.sum(0)
    return grad_params @ weight, grad_params.T @ hidden, grad_bias


def affine_coupling_linear_backward(
    grad_z: Tensor | None, grad_log_det: Tensor | None, source: Tensor, hidden: Tensor, weight: Tensor,
    bias: Tensor | None, places: Tensor | None, scale_weight: Tensor | None, *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(grad_x, grad_hidden, grad_weight, grad_bias, grad_scale_weight [B, k]); `options` as in the forward,
    and whether `source` is z rather than x. grad_bias, grad_scale_weight: empty without their tensors."""
    *forward_options, from_output = options
    params = _params(source, hidden, weight, bias)
    wide_grad = None if grad_z is None else grad_z.to(params.dtype)
    source_and_params = (source.to(params.dtype), params, None, places, scale_weight)
    last = (*forward_options, "none", from_output)
    arguments: tuple[Any, ...] = (wide_grad, grad_log_det, *source_and_params, *last)
    grad_x, grad_params, _, grad_scale = coupling.affine_coupling_backward(*arguments)
    grads = linear_gradients(grad_params, hidden.to(params.dtype), weight.to(params.dtype), bias)
    dtypes = (hidden.dtype, weight.dtype, weight.dtype)
    grad_hidden, grad_weight, grad_bias = (grad.to(dtype) for grad, dtype in zip(grads, dtypes))
    return grad_x.to(source.dtype), grad_hidden, grad_weight, grad_bias, grad_scale
