"""What a flow has beside couplings: a scale and shift per channel, 1x1 products, squeezing."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from warploom._library import Differentiable, define
from warploom.ops._autocast import without_autocast
from warploom.ops._check import (
    check_floating,
    check_parameter,
    check_shape,
    fail,
)
from warploom.ops._fakes import dense_like_lines, statistics_dtype
from warploom.reference import coupling as reference

ORDERS = ("mul_add", "add_mul")
#: Of x, for tables, sequences, images and volumes.
_LAYOUTS = ("B C", "B C L", "B C H W", "B C D H W")

_channel_affine_op = define(
    "channel_affine",
    "(Tensor x, Tensor scale, Tensor shift, str order, bool inverse) -> Tensor",
    reference=reference.channel_affine,
    fake=lambda x, scale, shift, order, inverse: dense_like_lines(x.shape, x),
    triton="coupling.channel_affine:channel_affine",
    sharding=tuple(f"{x}, C, C -> {x}" for x in _LAYOUTS),
)
_channel_affine_backward_op = define(
    "channel_affine_backward",
    "(Tensor grad_z, Tensor x, Tensor scale, Tensor shift, str order, bool inverse)"
    " -> (Tensor grad_x, Tensor grad_scale, Tensor grad_shift)",
    reference=reference.channel_affine_backward,
    fake=lambda grad_z, x, scale, shift, order, inverse: (
        dense_like_lines(x.shape, x),
        torch.empty_like(scale),
        torch.empty_like(shift),
    ),
    triton="coupling.channel_affine:channel_affine_backward",
    sharding=tuple(f"{x}, {x}, C, C -> {x}, C, C" for x in _LAYOUTS),
)


def _channel_affine_grads(
    overload: Any, saved: Any, scalars: Any, grads: Any, needs: Any
) -> tuple[Tensor, ...]:
    grad_x, grad_scale, grad_shift = overload(grads[0], *saved, *scalars)
    return grad_x, grad_scale, grad_shift


_channel_affine = Differentiable(
    _channel_affine_op,
    _channel_affine_backward_op,
    save=lambda args, outputs: (args[0], args[1], args[2]),
    backward=_channel_affine_grads,
)


def _check_input(op: str, x: Tensor) -> None:
    check_floating(op, "x", x)
    if x.dim() < 2:
        fail(op, "x", "at least 2 dimensions [B, C, *spatial]", tuple(x.shape))


def _check_per_channel(op: str, name: str, value: Tensor, x: Tensor) -> None:
    check_parameter(op, name, value, x)
    check_shape(op, name, value, (x.shape[1],))


def channel_affine(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    order: str = "mul_add",
    inverse: bool = False,
    backend: str | None = None,
) -> Tensor:
    """A scale and a shift per channel (dimension 1).

    order="mul_add": z = x * scale + shift, inverse (x - shift) / scale.
    order="add_mul": z = (x + shift) * scale, inverse x / scale - shift.

    Args:
        x: [B, C, *spatial], float32, float16, bfloat16 (float64 on `reference` and `cpu`), any strides.
        scale, shift: [C], x's dtype or float32, both of one dtype.
        order: "mul_add" (default) or "add_mul".
        inverse: the inverse map in place of the map; default False.
        backend: one of `warploom.BACKENDS`; None chooses.

    Returns:
        z, of x's shape and dtype, contiguous (channels-last where x is so); float32 arithmetic (float64 for
        float64), one rounding.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value.
        RuntimeError: the named backend cannot serve the call; forward-mode or second differentiation.
    """
    _check_input("channel_affine", x)
    _check_per_channel("channel_affine", "scale", scale, x)
    _check_per_channel("channel_affine", "shift", shift, x)
    if order not in ORDERS:
        fail("channel_affine", "order", " or ".join(map(repr, ORDERS)), repr(order))
    if scale.dtype != shift.dtype:
        scale, shift = (value.to(statistics_dtype(x)) for value in (scale, shift))
    out: Tensor = _channel_affine(x, scale, shift, order, bool(inverse), backend=backend)
    return out


def _per_sample(log_det: Tensor, x: Tensor) -> Tensor:
    """log_det of one pixel, a scalar -> that of each sample [B]."""
    pixels = x.shape[2:].numel()
    return (log_det.to(statistics_dtype(x)) * pixels).repeat(x.shape[0])


def actnorm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    scale_form: str = "log",
    order: str = "mul_add",
    inverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`channel_affine` with its log-determinant: pixels * sum log |scale|, negated by `inverse`.

    Args:
        x: [B, C, *spatial].
        scale: [C], its logarithm (scale_form="log", the default) or itself (scale_form="raw", not 0).
        shift: [C].
        order, inverse, backend: as `channel_affine`'s.

    Returns:
        (z, log_det): z of x's shape and dtype; log_det [B] in float32 (float64 beside float64).

    Raises:
        TypeError, ValueError, RuntimeError: as `channel_affine`.

    Source: Kingma and Dhariwal, Glow (2018), table 1.
    """
    if scale_form not in ("log", "raw"):
        fail("actnorm", "scale_form", "'log' or 'raw'", repr(scale_form))
    _check_input("actnorm", x)
    _check_per_channel("actnorm", "scale", scale, x)
    wide = scale.to(statistics_dtype(x))
    log_scale = wide if scale_form == "log" else wide.abs().log()
    factor = wide.exp() if scale_form == "log" else wide
    if shift.dtype != factor.dtype and shift.is_floating_point():
        shift = shift.to(factor.dtype)
    z = channel_affine(x, factor, shift, order=order, inverse=inverse, backend=backend)
    log_det = log_scale.sum()
    return z, _per_sample(-log_det if inverse else log_det, x)


def lu_weight(
    lower: Tensor,
    upper: Tensor,
    log_diagonal: Tensor,
    sign: Tensor,
    permutation: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The matrix P L U of triangular factors, and log |det| of it, which is the sum of log_diagonal.

    L = tril(lower, -1) + I, U = triu(upper, 1) + diag(sign * exp(log_diagonal)).

    Args:
        lower, upper: [C, C], of which the strict triangles count.
        log_diagonal, sign: [C], the diagonal of U.
        permutation: P [C, C]; None means the identity.

    Returns:
        (weight [C, C], log_abs_det []).

    Source: Kingma and Dhariwal, Glow (2018), equation 10.
    """
    count = lower.shape[0]
    for name, value in (("lower", lower), ("upper", upper)):
        check_shape("lu_weight", name, value, (count, count))
    identity = torch.eye(count, dtype=lower.dtype, device=lower.device)
    left = lower.tril(-1) + identity
    right = upper.triu(1) + torch.diag(sign * log_diagonal.exp())
    with without_autocast(lower):
        weight = left @ right
        weight = weight if permutation is None else permutation @ weight
    return weight, log_diagonal.sum()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """weight @ x + bias at each place, in x's dtype: x [B, C, *spatial] -> the same shape."""
    if x.dim() == 2:
        return F.linear(x, weight, bias)
    if x.is_cuda:  # cuDNN's convolutions of float32 are TF32 unless a global flag forbids it
        if x.stride(1) == 1 and x.stride(-1) != 1:
            return F.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)
        rows = weight @ x.flatten(2)
        return (rows if bias is None else rows + bias[:, None]).view(x.shape)
    if x.dim() == 4:
        return F.conv2d(x, weight[:, :, None, None], bias)
    out: Tensor = F.conv1d(x.flatten(2), weight[:, :, None], bias)
    return out.view(x.shape[0], -1, *x.shape[2:])


def invertible_1x1(
    x: Tensor,
    weight: Tensor,
    *,
    actnorm: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    log_abs_det: Tensor | None = None,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """z = W (scale * x + shift) + bias at each place, in one product.

    log_det = pixels * (log |det W| + sum log |scale|), negated by `inverse`.

    Args:
        x: [B, C, *spatial].
        weight: W [C, C], x's dtype.
        actnorm: (scale [C], shift [C]) of a `channel_affine` before the product; None: 1 and 0.
        bias: [C], added after the product; None: 0.
        log_abs_det: log |det W|, a scalar; None computes it (`torch.linalg.slogdet`).
        inverse: the inverse map; W is inverted in float64. Default False.

    Returns:
        (z, log_det): z of x's shape and dtype, autocast or not: a map in 16 bits is not invertible; log_det
        [B] in float32 (float64 beside float64).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.
        torch.linalg.LinAlgError: the inverse of a singular weight.

    Source: Kingma and Dhariwal, Glow (2018), section 3.2.
    """
    op = "invertible_1x1"
    _check_input(op, x)
    check_floating(op, "weight", weight)
    check_shape(op, "weight", weight, (x.shape[1], x.shape[1]))
    with without_autocast(x):
        wide = weight.to(statistics_dtype(x))
        log_det = torch.linalg.slogdet(wide)[1] if log_abs_det is None else log_abs_det
        product = torch.linalg.inv(weight.double()) if inverse else weight
        offset = None
        if bias is not None:
            check_shape(op, "bias", bias, (x.shape[1],))
            offset = -product @ bias.to(product.dtype) if inverse else bias
        if actnorm is not None:
            scale, shift = (value.to(product.dtype) for value in actnorm)
            check_shape(op, "actnorm[0]", scale, (x.shape[1],))
            check_shape(op, "actnorm[1]", shift, (x.shape[1],))
            added = -shift if inverse else product @ shift
            offset = added if offset is None else offset + added
            if inverse:
                offset, product = offset / scale, product / scale[:, None]
            else:
                product = product * scale
            log_det = log_det + actnorm[0].to(wide.dtype).abs().log().sum()
        z = _product(x, product.to(x.dtype), None if offset is None else offset.to(x.dtype))
    return z, _per_sample(-log_det if inverse else log_det, x)
