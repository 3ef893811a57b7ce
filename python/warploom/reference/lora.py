"""Linear maps with a low-rank update in plain PyTorch.

LoRA (Hu et al., arXiv:2106.09685): y = x W^T + bias + scaling drop(x) A^T B^T, with lora_a A [R, K] and
lora_b B [N, R]. The product with A is called shrink, the one with B expand. DoRA (Liu et al.,
arXiv:2402.09353) scales the columns: y = column_scale (x W^T + scaling drop(x) A^T B^T) + bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from warploom.reference import activation as activations
from warploom.reference import norm
from warploom.reference.dropout import keep_mask
from warploom.reference.quantization import dequantize


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def drop(x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """x [M, K] with elements dropped and the others divided by 1 - dropout_p, in x's dtype or float32.

    Element (i, j) is drawn by Philox at (seed; 0, i, j), `keep_mask`; a seed of None drops nothing.
    """
    if seed is None:
        return x
    keep = keep_mask(seed, dropout_p, 0, 1, *x.shape)[0]
    return torch.where(keep, x.to(_wide(x)) / (1.0 - dropout_p), 0.0)


def lora_shrink(x: Tensor, lora_a: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """drop(x) A^T: x [M, K], lora_a [R, K] (x's dtype or float32) -> [M, R] in x's dtype."""
    wide = _wide(x)
    return (drop(x, seed, dropout_p).to(wide) @ lora_a.to(wide).T).to(x.dtype)


def lora_shrink_backward(
    grad_shrunk: Tensor,
    x: Tensor,
    lora_a: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    needs_x: bool,
    needs_a: bool,
) -> tuple[Tensor, Tensor]:
    """grad_x = drop(grad_shrunk A), with x's mask, and grad_a = grad_shrunk^T drop(x).

    A gradient that is not asked for is empty.
    """
    wide = _wide(x)
    grad = grad_shrunk.to(wide)
    grad_x, grad_a = x.new_empty(0), lora_a.new_empty(0)
    if needs_x:
        grad_x = drop(grad @ lora_a.to(wide), seed, dropout_p).to(x.dtype)
    if needs_a:
        grad_a = (grad.T @ drop(x, seed, dropout_p).to(wide)).to(lora_a.dtype)
    return grad_x, grad_a


def lora_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    column_scale: Tensor | None,
    shrunk: Tensor | None,
    seed: Tensor | None,
    weight_format: str,
    scaling: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [M, N], shrunk [M, R], unscaled [M, N]); see the module.

    x [M, K]; weight [N, K] in x's dtype, or quantised as `quantization.dequantize` reads it; bias [N]; lora_a
    [R, K] and lora_b [N, R] in x's dtype or float32; column_scale float32 [N]. With `shrunk` [M, R] given in
    place of lora_a, that is drop(x) A^T; without lora_b there is no update. The second output is empty where
    lora_a is None; the third, what column_scale is multiplied with, where that is None.
    """
    wide = _wide(x)
    base = x.to(wide) @ dequantize(weight, weight_scale, weight_format, x.dtype).to(wide).T
    made = x.new_empty(0)
    if lora_a is not None:
        shrunk = made = lora_shrink(x, lora_a, seed, dropout_p)
    if lora_b is not None and shrunk is not None:
        base = base + scaling * (shrunk.to(wide) @ lora_b.to(wide).T)
    unscaled = x.new_empty(0)
    if column_scale is not None:
        unscaled = base.to(x.dtype)
        base = base * column_scale
    if bias is not None:
        base = base + bias
    return base.to(x.dtype), made, unscaled


def lora_linear_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, lora_a, lora_b, column_scale and shrunk; empty where not asked for.

    `shrunk` is the forward's second output, or its argument. With g = column_scale grad_out:
      grad_shrunk = scaling g B,   grad_b = scaling g^T shrunk,   grad_a = grad_shrunk^T drop(x),
      grad_x = g W + drop(grad_shrunk A),   grad_weight = g^T x,   grad_bias = sum of grad_out's rows,
      grad_column_scale = sum of the rows of grad_out unscaled.
    grad_a and grad_b have their parameter's dtype, grad_bias x's.
    """
    wide = _wide(x)
    empty = x.new_empty(0)
    grad_bias = grad_out.to(wide).sum(0).to(x.dtype) if needs_bias else empty
    grad = grad_out.to(wide)
    grad_column_scale = empty.to(wide)
    if column_scale is not None:
        if needs_column_scale and unscaled is not None:
            grad_column_scale = (grad * unscaled.to(wide)).sum(0)
        grad = (grad * column_scale).to(x.dtype).to(wide)
    grad_x = grad_weight = grad_shrunk = empty
    grad_a = empty if lora_a is None else lora_a.new_empty(0)
    grad_b = empty if lora_b is None else lora_b.new_empty(0)
    update: Tensor | None = None
    if lora_b is not None and shrunk is not None:
        inner = (scaling * (grad @ lora_b.to(wide))).to(x.dtype)
        if needs_shrunk:
            grad_shrunk = inner
        if needs_b:
            grad_b = (scaling * (grad.T @ shrunk.to(wide))).to(lora_b.dtype)
        if lora_a is not None:
            if needs_a:
                grad_a = (inner.to(wide).T @ drop(x, seed, dropout_p).to(wide)).to(lora_a.dtype)
            update = drop(inner.to(wide) @ lora_a.to(wide), seed, dropout_p)
    if needs_x:
        wide_x = grad @ dequantize(weight, weight_scale, weight_format, x.dtype).to(wide)
        grad_x = (wide_x if update is None else wide_x + update).to(x.dtype)
    if needs_weight:
        grad_weight = (grad.T @ x.to(wide)).to(weight.dtype)
    return grad_x, grad_weight, grad_bias, grad_a, grad_b, grad_column_scale, grad_shrunk


def rms_norm_shrink(
    x: Tensor, residual: Tensor | None, weight: Tensor, lora_a: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, shrunk, rstd, sum): sum = x + residual, out = weight sum rstd, shrunk = out A^T.

    x and residual [M, K], weight [K], lora_a [R, K] -> [M, K], [M, R], float32 [M], [M, K]. Without a
    residual the sum is x and the fourth output empty.
    """
    if residual is None:
        (out, rstd), total = norm.rms_norm(x, weight, eps), x.new_empty(0)
    else:
        out, total, rstd = norm.add_rms_norm(x, residual, weight, eps)
    return out, lora_shrink(out, lora_a, None, 0.0), rstd, total


def gated_activation_shrink(
    gate: Tensor, up: Tensor, lora_a: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """(out, shrunk): out = act(gate) up, shrunk = out A^T; gate and up [M, K], lora_a [R, K]."""
    out = activations.gated_activation(gate, up, activation)
    return out, lora_shrink(out, lora_a, None, 0.0)
