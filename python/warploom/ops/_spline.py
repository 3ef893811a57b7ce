"""Rational-quadratic splines, elementwise and as a coupling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from warploom._library import Differentiable, define
from warploom.ops._check import check_floating, check_same, check_shape, check_tensor, fail
from warploom.ops._fakes import dense, statistics_dtype
from warploom.reference import _spline as reference

_MOST_BINS = 64
_OPTIONS = (
    "int first, int num_bins, bool params_last, str tails, float left, float right, float bottom, float top,"
    " float min_bin_width, float min_bin_height, float min_derivative, float logit_scale, str convention,"
    " bool inverse"
)


def _fake(x: Tensor, params: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], params.shape[1], x.shape[2])
    return dense(x), x.new_empty(shape, dtype=statistics_dtype(x))


_spline_op = define(
    "rational_quadratic_spline",
    f"(Tensor x, Tensor params, {_OPTIONS}) -> (Tensor y, Tensor log_det)",
    reference=reference.rational_quadratic_spline,
    fake=_fake,
    triton="coupling.spline:rational_quadratic_spline",
    sharding=("A c s, A k m n -> A c s, A k s",),
)
_spline_backward_op = define(
    "rational_quadratic_spline_backward",
    f"(Tensor? grad_y, Tensor? grad_log_det, Tensor x, Tensor params, {_OPTIONS})"
    " -> (Tensor grad_x, Tensor grad_params)",
    reference=reference.rational_quadratic_spline_backward,
    fake=lambda grad_y, grad_log_det, x, params, *options: (dense(x), dense(params)),
    triton="coupling.spline:rational_quadratic_spline_backward",
    sharding=("A c s, A k t, A c s, A k m n -> A c s, A k m n",),
)

_spline = Differentiable(
    _spline_op,
    _spline_backward_op,
    save=lambda args, outputs: (args[0], args[1]),
    backward=lambda overload, saved, scalars, grads, needs: overload(*grads, *saved, *scalars),
)

Bounds = tuple[float, float, float, float]


def _num_params(num_bins: int, tails: str | None) -> int:
    return 3 * num_bins + {None: 1, "linear": -1, "circular": 0}[tails]


def _bounds(
    op: str, tails: str | None, convention: str, bounds: Bounds | None, tail_bound: float | None
) -> Bounds:
    """left, right, bottom, top."""
    if bounds is not None and tail_bound is not None:
        fail(op, "tail_bound", "None beside bounds", tail_bound)
    if bounds is None:
        if tails is None and tail_bound is None:
            return (0.0, 1.0, 0.0, 1.0)
        bound = tail_bound if tail_bound is not None else 5.0 if convention == "zuko" else 1.0
        bounds = (-bound, bound, -bound, bound)
    left, right, bottom, top = bounds
    if not (left < right and bottom < top):
        fail(op, "bounds", "left < right and bottom < top", bounds)
    if tails is not None and (left, right) != (bottom, top):
        fail(op, "bounds", "one interval on both axes, where tails are the identity", bounds)
    return bounds


def _options(
    op: str,
    num_bins: int,
    tails: str | None,
    bounds: Bounds | None,
    tail_bound: float | None,
    min_bin_width: float,
    min_bin_height: float,
    min_derivative: float,
    logit_scale: float,
    convention: str,
) -> tuple[Any, ...]:
    """From tails to convention, as in the op's schema."""
    if not 1 <= num_bins <= _MOST_BINS:
        fail(op, "num_bins", f"1 to {_MOST_BINS}", num_bins)
    if tails not in (None, "linear", "circular"):
        fail(op, "tails", "None, 'linear' or 'circular'", repr(tails))
    if convention not in ("nflows", "zuko"):
        fail(op, "convention", "'nflows' or 'zuko'", repr(convention))
    if logit_scale <= 0:
        fail(op, "logit_scale", "a number > 0", logit_scale)
    if not 0 < min_derivative < 1:
        fail(op, "min_derivative", "a number between 0 and 1", min_derivative)
    if convention == "zuko":
        min_bin_width = min_bin_height = 0.0
    for argument, least in (("min_bin_width", min_bin_width), ("min_bin_height", min_bin_height)):
        if not 0 <= least * num_bins <= 1:
            fail(op, argument, "a number of at least 0, at most 1 / num_bins", least)
    interval = _bounds(op, tails, convention, bounds, tail_bound)
    sizes = (min_bin_width, min_bin_height, min_derivative, logit_scale)
    return (tails or "none", *map(float, (*interval, *sizes)), convention)


def rational_quadratic_spline(
    x: Tensor,
    params: Tensor,
    *,
    num_bins: int,
    tails: str | Sequence[str] | None = None,
    bounds: Bounds | None = None,
    tail_bound: float | Tensor | None = None,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    logit_scale: float = 1.0,
    convention: str = "nflows",
    params_dim: int = -1,
    inverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A monotonic rational-quadratic spline of every element, with its parameters.

    Between the knots (x0, y0) and (x0 + w, y0 + h) of its bin, with derivatives d0 and d1 there, s = h / w,
    t = (x - x0) / w and q = t (1 - t):

        y = y0 + h (s t^2 + d0 q) / (s + (d0 + d1 - 2 s) q)
        log_det = log(dy/dx) = log(s^2 (d1 t^2 + 2 s q + d0 (1 - t)^2) / (s + (d0 + d1 - 2 s) q)^2)

    The parameters are logits [W | H | D]. convention="nflows" (normflows' too): widths are
    (right - left) (min_bin_width + (1 - min_bin_width K) softmax(logit_scale W)), heights alike, derivatives
    min_derivative + softplus(D). convention="zuko": softmax of a / (1 + |2 a / log m|) with
    m = min_derivative, without a least width or height, and derivatives exp(a / (1 + |a / log m|)).

    Args:
        x: any shape; float32, float16, bfloat16 (float64 on `reference` and `cpu`).
        params: x's dtype; [*x.shape, M], or with params_dim=2 [B, C, M, *spatial] for x [B, C, *spatial].
            M = 2 K + (K + 1 without tails, K - 1 for linear, K for circular tails).
        num_bins: K, 1 to 64.
        tails: what lies outside of the interval. None: nothing, x is clipped, with a gradient of 0. "linear":
            the identity, derivatives at the ends 1. "circular": the identity, the last derivative is the
            first. A sequence of both gives each feature its own (x's last dimension, the second for
            params_dim=2); then D has K + 1 logits for all: of linear features the first and last are not
            used, of circular ones the last.
        bounds: (left, right, bottom, top); with tails the same interval on both axes.
        tail_bound: B instead of bounds, for (-B, B, -B, B); a tensor that broadcasts to x scales x and y.
            Without both: [0, 1] without tails, else B = 1, with "zuko" 5.
        min_bin_width, min_bin_height: at most 1 / num_bins; unused by "zuko".
        min_derivative: see above.
        logit_scale: factor of W and H; nflows' coupling has 1 / sqrt(hidden features).
        params_dim: -1 or 2.
        inverse: x of y, with the negated log_det; the discriminant is clamped at 0.
        backend: one of `warploom.BACKENDS`; None chooses.

    Returns:
        y, x's shape and dtype, and log_det, x's shape, float32 (float64 beside float64), contiguous. NaN
        stays in its element.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value.
        RuntimeError: the named backend cannot serve the call; forward-mode differentiation.

    Source: Durkan et al., Neural Spline Flows (arXiv:1906.04032), equations 4 to 8.
    """
    op = "rational_quadratic_spline"
    check_floating(op, "x", x)
    check_same(op, "params", params, "x", x)
    if params_dim not in (-1, 2) or (params_dim == 2 and x.dim() < 2):
        fail(op, "params_dim", "-1, or 2 for x of at least 2 dimensions", params_dim)
    settings = (min_bin_width, min_bin_height, min_derivative, logit_scale, convention)
    shared: dict[str, Any] = {
        "num_bins": num_bins,
        "min_bin_width": min_bin_width,
        "min_bin_height": min_bin_height,
        "min_derivative": min_derivative,
        "logit_scale": logit_scale,
        "convention": convention,
        "params_dim": params_dim,
        "inverse": inverse,
        "backend": backend,
    }
    if isinstance(tail_bound, Tensor):
        # A spline on [-B, B] is B f(x / B), f that on [-1, 1].
        scaled = x / tail_bound
        y, log_det = rational_quadratic_spline(
            scaled, params, tails=tails, bounds=bounds, tail_bound=1.0, **shared
        )
        return y * tail_bound, log_det
    if tails is not None and not isinstance(tails, str):
        return _spline_of_features(x, params, tails, bounds, tail_bound, shared)
    options = _options(op, num_bins, tails, bounds, tail_bound, *settings)
    count = _num_params(num_bins, tails)
    if params_dim == -1:
        check_shape(op, "params", params, (*x.shape, count))
        size = x.numel()
        rows, logits = x.reshape(1, size, 1), params.reshape(1, size, 1, count)
    else:
        check_shape(op, "params", params, (*x.shape[:2], count, *x.shape[2:]))
        shape = (*x.shape[:2], math.prod(x.shape[2:]))
        rows, logits = x.reshape(shape), params.reshape(*shape[:2], count, shape[2])
    last = params_dim == -1
    y, log_det = _spline(rows, logits, 0, num_bins, last, *options, inverse, backend=backend)
    return y.view(x.shape), log_det.view(x.shape)


def _spline_of_features(
    x: Tensor,
    params: Tensor,
    tails: Sequence[str],
    bounds: Bounds | None,
    tail_bound: float | None,
    shared: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """The features of each kind of tails by themselves."""
    op, count = "rational_quadratic_spline", shared["num_bins"]
    feature, logits_dim = (1, 2) if shared["params_dim"] == 2 else (x.dim() - 1, -1)
    if x.dim() == 0 or len(tails) != x.shape[feature]:
        fail(op, "tails", f"one for each feature of x {tuple(x.shape)}", f"{len(tails)} of them")
    y, log_det = torch.empty_like(x), torch.empty_like(x, dtype=statistics_dtype(x))
    for kind in dict.fromkeys(tails):
        chosen = [index for index, other in enumerate(tails) if other == kind]
        index = torch.tensor(chosen, device=x.device)
        used = 2 * count + (torch.arange(1, count) if kind == "linear" else torch.arange(count))
        used = torch.cat([torch.arange(2 * count), used]).to(x.device)
        logits = params.index_select(feature, index).index_select(logits_dim, used)
        part, part_log_det = rational_quadratic_spline(
            x.index_select(feature, index), logits, tails=kind, bounds=bounds, tail_bound=tail_bound, **shared
        )  # fmt: skip
        y = y.index_copy(feature, index, part)
        log_det = log_det.index_copy(feature, index, part_log_det)
    return y, log_det


def _channels(op: str, mask: str | int | Tensor, channels: int) -> range | Tensor:
    """The transformed channels: neighbours, or the mask [C]."""
    if isinstance(mask, Tensor):
        if mask.dtype != torch.bool or tuple(mask.shape) != (channels,):
            fail(op, "mask", f"bool ({channels},)", f"{mask.dtype} {tuple(mask.shape)}")
        return mask
    kept = channels - channels // 2
    if mask == "channel":
        return range(kept, channels)
    if mask == "channel_inverse":
        return range(kept)
    if isinstance(mask, str) or not 0 <= mask <= channels:
        fail(op, "mask", f"'channel', 'channel_inverse', 0 to {channels} or a bool tensor", mask)
    return range(int(mask), channels)


def spline_coupling(
    x: Tensor,
    params: Tensor,
    *,
    num_bins: int,
    mask: str | int | Tensor = "channel",
    tails: str | None = "linear",
    bounds: Bounds | None = None,
    tail_bound: float | None = None,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    logit_scale: float = 1.0,
    convention: str = "nflows",
    params_dim: int = 2,
    inverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Some channels through `rational_quadratic_spline`, the others as they are.

    Args:
        x: [B, C, *spatial], any number of spatial dimensions, also none; dtypes as there.
        params: [B, k, M, *spatial] or [B, k M, *spatial] with params_dim=2, [B, k, *spatial, M] with -1, k
            the number of transformed channels, in their order; M as there.
        mask: what is transformed. "channel": all but the first C - C // 2 channels. "channel_inverse": those.
            An int: all but as many first channels. A bool tensor [C]: where it is True.
        num_bins, tails, bounds, tail_bound, min_bin_width, min_bin_height, min_derivative, logit_scale,
            convention, inverse, backend: as there.

    Returns:
        z, x's shape and dtype, contiguous, and log_det [B], the sum over a sample, float32 (float64 beside
        float64), the same bits in every run.

    Raises: as there.

    Source: Durkan et al., Neural Spline Flows (arXiv:1906.04032), section 3.
    """
    op = "spline_coupling"
    check_floating(op, "x", x)
    check_same(op, "params", params, "x", x)
    if x.dim() < 2:
        fail(op, "x", "at least 2 dimensions [B, C, *spatial]", f"shape {tuple(x.shape)}")
    if params_dim not in (-1, 2):
        fail(op, "params_dim", "-1 or 2", params_dim)
    settings = (min_bin_width, min_bin_height, min_derivative, logit_scale, convention)
    options = _options(op, num_bins, tails, bounds, tail_bound, *settings)
    chosen = _channels(op, mask, x.shape[1])
    batch, _, *spatial = x.shape
    size, count = math.prod(spatial), _num_params(num_bins, tails)
    rows = x.reshape(*x.shape[:2], size)
    if isinstance(chosen, Tensor):
        # Their number without asking the mask, whose values a graph being traced does not know.
        transformed = params.shape[1] // (
            count if params.dim() == x.dim() and params_dim == 2 else 1
        )
        if not torch.compiler.is_compiling() and int(chosen.sum()) != transformed:
            fail(op, "params", f"logits of {int(chosen.sum())} channels", f"of {transformed}")
        index = torch.argsort(~chosen, stable=True)[:transformed].to(x.device)
        first, part = 0, rows.index_select(1, index)
    else:
        transformed, first, part = len(chosen), chosen.start, rows
    last = params_dim == -1
    if last:
        check_shape(op, "params", params, (batch, transformed, *spatial, count))
        logits = params.reshape(batch, transformed, size, count)
    else:
        check_tensor(op, "params", params)
        joined = (batch, transformed * count, *spatial)
        if tuple(params.shape) != joined:
            check_shape(op, "params", params, (batch, transformed, count, *spatial))
        logits = params.reshape(batch, transformed, count, size)
    z, log_det = _spline(part, logits, first, num_bins, last, *options, inverse, backend=backend)
    if isinstance(chosen, Tensor):
        z = rows.contiguous().index_copy(1, index, z)
    return z.view(x.shape), log_det.sum((1, 2))
