"""One linear map with a low-rank update, and its parts; `warploom.ops.lora` has them all."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from warploom.ops import _lora_ops
from warploom.ops._autocast import autocast
from warploom.ops._check import (
    check_device,
    check_dim,
    check_floating,
    check_parameter,
    check_same,
    check_shape,
    fail,
)
from warploom.ops._dropout import dropout_seed
from warploom.ops._fakes import statistics_dtype
from warploom.ops._quantized import QuantizedWeight
from warploom.reference import lora as reference


def _check_input(op: str, x: Tensor, columns: int) -> None:
    check_floating(op, "x", x)
    if x.dim() == 0 or x.shape[-1] != columns:
        fail(op, "x", f"shape (..., {columns})", tuple(x.shape))


def _cast_weight(
    op: str, x: Tensor, weight: Tensor | QuantizedWeight
) -> tuple[Tensor, Tensor, Tensor | None, str]:
    """x, and the weight's values, scales and format, after autocast."""
    if isinstance(weight, QuantizedWeight):
        (x,) = autocast(x)
        check_device(op, "weight", weight.values, "x", x)
        return x, weight.values.view(torch.uint8), weight.block_scale, weight.format
    check_floating(op, "weight", weight)
    check_dim(op, "weight", weight, 2, "[N, K]")
    x, weight = autocast(x, weight)
    check_same(op, "weight", weight, "x", x)
    return x, weight, None, "dense"


def lora_shrink(
    x: Tensor,
    lora_a: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """drop(x) A^T, the first product of one or, their lora_a stacked, of several low-rank updates of one
    input.

    Args:
        x: [..., K]; float32, float16, bfloat16 (float64 on `reference` and `cpu`).
        lora_a: [R, K] in x's dtype, or in float32, then rounded to x's in the product.
        dropout_p: each element of x is dropped with this probability, the others divided by 1 - dropout_p.
            The mask is Philox at (seed; row, column) of x as a matrix, the same on every backend; it is never
            stored.
        seed: int64 tensor of one element on x's device; default: drawn from torch's generator.
        backend: one of `warploom.BACKENDS`; None chooses.

    Returns:
        [..., R] in x's dtype. Differentiable; gradients are deterministic, lora_a's in its own dtype. Under
        autocast x is cast to its dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        RuntimeError: the named backend cannot serve the call; forward-mode differentiation.
    """
    op = "lora_shrink"
    check_floating(op, "lora_a", lora_a)
    check_dim(op, "lora_a", lora_a, 2, "[R, K]")
    _check_input(op, x, lora_a.shape[1])
    (x,) = autocast(x)
    check_parameter(op, "lora_a", lora_a, x)
    check_shape(op, "lora_a", lora_a, (lora_a.shape[0], x.shape[-1]))
    seed = dropout_seed(op, dropout_p, seed, "x", x)
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = _lora_ops.lora_shrink(rows, lora_a, seed, float(dropout_p), backend=backend)
    return out.view(*x.shape[:-1], lora_a.shape[0])


def weight_squares(weight: Tensor | QuantizedWeight) -> Tensor:
    """||W_n||^2 of every row of a weight [N, K], float32 [N]."""
    dense = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
    wide = statistics_dtype(dense)
    norms: Tensor = torch.linalg.vector_norm(dense.detach(), dim=1, dtype=wide)
    return norms.square()


def lora_weight_norm(
    weight: Tensor | QuantizedWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    squares: Tensor | None = None,
) -> Tensor:
    """DoRA's row norms ||W_n + scaling (B A)_n||, float32 [N], without gradient and without the product B A.

    norm^2 = ||W_n||^2 + 2 scaling (W A^T)_n . B_n + scaling^2 B_n (A A^T) B_n, one product with W instead of
    one of W's size. Source: Liu et al., arXiv:2402.09353, equation 5, and its section 4.3 (detached).

    Args:
        squares: `weight_squares(weight)`, which a frozen weight has once and for all; default: computed.
    """
    with torch.no_grad():
        if isinstance(weight, QuantizedWeight):
            stored = (
                weight.values.view(torch.uint8),
                weight.block_scale,
                *(None,) * 6,
                weight.format,
            )
            product, _, _ = _lora_ops.lora_linear(lora_a.float(), *stored, 0.0, 0.0)
            inner = product.T
        else:
            inner = _lora_ops.lora_shrink(weight, lora_a.to(weight.dtype), None, 0.0)
        wide = statistics_dtype(inner)
        a, b, inner = lora_a.to(wide), lora_b.to(wide), inner.to(wide)
        square: Tensor = weight_squares(weight) if squares is None else squares
        square = square + 2 * scaling * (inner * b).sum(1)
        square = square + scaling**2 * ((b @ (a @ a.T)) * b).sum(1)
        norm: Tensor = square.clamp_min(0).sqrt()
        return norm


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    dropout_rng: str = "philox",
    magnitude: Tensor | None = None,
    weight_norm: Tensor | None = None,
    shrunk: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = x W^T + bias + scaling drop(x) A^T B^T, the update summed in the base product's own accumulators.

    With `magnitude` m it is DoRA: y = (m / norm) (x W^T + scaling x A^T B^T) + bias, norm the rows' lengths
    of W + scaling B A, held constant (arXiv:2402.09353, equation 5 and section 4.3). With dropout, as in
    peft, y = x W^T + bias + (m / norm - 1) drop(x) W^T + (m / norm) scaling drop(x) A^T B^T.

    Args:
        x: [..., K]; float32, float16, bfloat16 (float64 on `reference` and `cpu`).
        weight: [N, K] in x's dtype, or a `QuantizedWeight` (no gradient).
        bias: [N] in x's dtype, or None.
        lora_a, lora_b: [R, K] and [N, R] of any rank R >= 1, in x's dtype or in float32: products round them
            to x's dtype, their gradients come in their own from float32 sums. lora_b of None: no update.
        scaling: lora_alpha / R, or lora_alpha / sqrt(R) (rsLoRA, arXiv:2312.03732).
        dropout_p, seed: as in `lora_shrink`; the mask is drawn again in the backward pass, never stored.
        dropout_rng: "philox", or "torch": `torch.nn.functional.dropout`'s own mask, as peft draws it, at the
            price of a second x.
        magnitude: [N], or None. Differentiable.
        weight_norm: `lora_weight_norm(...)`; default: computed.
        shrunk: drop(x) A^T [..., R], made by `lora_shrink` or by the op before (`rms_norm_shrink`), in place
            of lora_a, which must be None; its gradient carries on to lora_a.
        backend: one of `warploom.BACKENDS`; None chooses.

    Returns:
        [..., N] in x's dtype, contiguous. Differentiable in x, weight, bias, lora_a, lora_b, magnitude and
        shrunk; x's gradient is one product with the update's part summed into it. Deterministic: no atomics.
        Under autocast x and weight are cast to its dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        RuntimeError: the named backend cannot serve the call; forward-mode differentiation.
    """
    op = "lora_linear"
    out_features, in_features = weight.shape
    _check_input(op, x, in_features)
    if isinstance(weight, Tensor):
        check_floating(op, "weight", weight)
    cast, values, weight_scale, weight_format = _cast_weight(op, x, weight)
    if bias is not None:
        bias = bias.to(cast.dtype)
        check_device(op, "bias", bias, "x", x)
        check_shape(op, "bias", bias, (out_features,))
    if lora_b is None and (lora_a is not None or shrunk is not None or magnitude is not None):
        fail(op, "lora_b", "a matrix beside lora_a, shrunk or magnitude", None)
    if lora_b is not None:
        if (lora_a is None) == (shrunk is None):
            fail(op, "lora_a", "either lora_a or shrunk", "both" if lora_a is not None else "none")
        check_dim(op, "lora_b", lora_b, 2, "[N, R]")
        rank = lora_b.shape[1]
        check_parameter(op, "lora_b", lora_b, cast)
        check_shape(op, "lora_b", lora_b, (out_features, rank))
        if lora_a is not None:
            check_parameter(op, "lora_a", lora_a, cast)
            check_shape(op, "lora_a", lora_a, (rank, in_features))
    if dropout_rng not in ("philox", "torch"):
        fail(op, "dropout_rng", "'philox' or 'torch'", repr(dropout_rng))
    column_scale = None
    if magnitude is not None:
        check_floating(op, "magnitude", magnitude)
        check_shape(op, "magnitude", magnitude, (out_features,))
        if weight_norm is None:
            if lora_a is None or lora_b is None:
                fail(op, "weight_norm", "the rows' norms beside magnitude and shrunk", None)
            else:
                weight_norm = lora_weight_norm(weight, lora_a, lora_b, scaling)
        assert weight_norm is not None
        column_scale = magnitude.to(statistics_dtype(cast)) / weight_norm
    rows = cast.reshape(-1, in_features)
    if shrunk is not None:
        check_shape(
            op, "shrunk", shrunk, (*x.shape[:-1], lora_b.shape[1] if lora_b is not None else 0)
        )
        shrunk = shrunk.reshape(-1, shrunk.shape[-1])
    dropped, remainder = rows, None
    if dropout_p and lora_a is not None and (magnitude is not None or dropout_rng == "torch"):
        if dropout_rng == "torch":
            dropped = F.dropout(rows, dropout_p)
        else:
            mask_seed = dropout_seed(op, dropout_p, seed, "x", x)
            dropped = reference.drop(rows, mask_seed, dropout_p).to(rows.dtype)
        dropout_p = 0.0
        if magnitude is None:
            shrunk = _lora_ops.lora_shrink(dropped, lora_a, None, 0.0, backend=backend)
            lora_a, dropped = None, rows
        else:
            # x W^T - drop(x) W^T, beside which drop(x) takes x's place in all the rest.
            remainder = rows - dropped
    seed = dropout_seed(op, dropout_p if lora_a is not None else 0.0, seed, "x", x)
    frozen = (weight_format, float(scaling), float(dropout_p))
    out, _, _ = _lora_ops.lora_linear(
        dropped, values, weight_scale, bias, lora_a, lora_b, column_scale, shrunk, seed, *frozen,
        backend=backend,
    )  # fmt: skip
    if remainder is not None:
        base, _, _ = _lora_ops.lora_linear(
            remainder, values, weight_scale, None, None, None, None, None, None, *frozen,
            backend=backend,
        )  # fmt: skip
        out = out + base
    result: Tensor = out.view(*x.shape[:-1], out_features)
    return result
