"""Affine coupling layers of normalising flows (Dinh et al. 2017), forward and backward, in plain PyTorch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from warploom.reference._channel_affine import channel_affine as channel_affine
from warploom.reference._channel_affine import (
    channel_affine_backward as channel_affine_backward,
)
from warploom.reference._channel_affine import in_layout_of
from warploom.reference._spline import (
    rational_quadratic_spline as rational_quadratic_spline,
)
from warploom.reference._spline import (
    rational_quadratic_spline_backward as rational_quadratic_spline_backward,
)
from warploom.reference._squeeze import squeeze as squeeze

#: What FrEIA has for 2 / pi.
ATAN_SLOPE = 0.636


class _Half(NamedTuple):
    """What is transformed of x [B, C, *spatial], and with which parameters, each in a shape like x's."""

    moved: Tensor  # bool, broadcasts to x
    slots: Tensor  # int64 [C]: the parameters' channel of each channel
    shift: Tensor
    raw_scale: Tensor


def _split(
    params: Tensor, raw_scale: Tensor | None, layout: str, scale: str
) -> tuple[Tensor, Tensor]:
    """(shift, raw scale) of `params`, [B, k, *spatial] each; an additive coupling has no scale."""
    if scale == "additive":
        return params, torch.zeros_like(params)
    if raw_scale is not None:
        return params, raw_scale
    if layout == "interleaved":
        return params[:, 0::2], params[:, 1::2]
    first, second = params.chunk(2, dim=1)
    return (first, second) if layout == "shift_scale" else (second, first)


def _join(shift: Tensor, raw_scale: Tensor, layout: str) -> Tensor:
    """The inverse of `_split` for one tensor of both."""
    if layout == "interleaved":
        return torch.stack((shift, raw_scale), dim=2).flatten(1, 2)
    return torch.cat((shift, raw_scale) if layout == "shift_scale" else (raw_scale, shift), dim=1)


def _unpack(packed: Tensor, parity: int) -> Tensor:
    """[B, C, H, W // 2] to [B, C, H, W]: column j of a row to its j-th pixel with (h + w) % 2 = parity."""
    full = packed.new_zeros(*packed.shape[:-1], 2 * packed.shape[-1])
    for row in (0, 1):
        full[:, :, row::2, (parity + row) % 2 :: 2] = packed[:, :, row::2]
    return full


def _pack(full: Tensor, parity: int) -> Tensor:
    packed = full.new_empty(*full.shape[:-1], full.shape[-1] // 2)
    for row in (0, 1):
        packed[:, :, row::2] = full[:, :, row::2, (parity + row) % 2 :: 2]
    return packed


def _half(
    x: Tensor, params: Tensor, raw_scale: Tensor | None, places: Tensor | None,
    mask: str, first: int, count: int, layout: str, scale: str,
) -> _Half:  # fmt: skip
    wide = torch.promote_types(x.dtype, torch.float32)
    shift, raw = (part.to(wide) for part in _split(params, raw_scale, layout, scale))
    channels = torch.arange(x.shape[1], device=x.device)
    column = (-1, *[1] * (x.dim() - 2))
    if mask in ("range", "slots"):
        slots = channels - first if places is None else places.long()
        moved = (slots >= 0) & (slots < count)
        slots = slots.clamp(0, max(count - 1, 0))
        if count == 0:
            return _Half(
                moved.view(column),
                slots,
                torch.zeros_like(x, dtype=wide),
                torch.zeros_like(x, dtype=wide),
            )
        return _Half(moved.view(column), slots, shift[:, slots], raw[:, slots])
    if mask == "free":
        assert places is not None
        return _Half(places, channels, shift, raw)
    if mask == "checkerboard_packed":
        shift, raw = _unpack(shift, first), _unpack(raw, first)
    rows, columns = (torch.arange(size, device=x.device) for size in x.shape[2:])
    return _Half((rows[:, None] + columns) % 2 == first, channels, shift, raw)


def _log_scale(u: Tensor, scale: str, clamp: float, eps: float) -> tuple[Tensor, Tensor]:
    """L(u) without the learned weight, and its derivative."""
    if scale == "exp":
        return u, torch.ones_like(u)
    if scale == "tanh":
        tanh = torch.tanh(u)
        return clamp * tanh, clamp * (1 - tanh * tanh)
    if scale == "atan":
        return clamp * ATAN_SLOPE * torch.atan(u), clamp * ATAN_SLOPE / (1 + u * u)
    if scale == "centered_sigmoid":
        sigmoid = torch.sigmoid(u)
        return clamp * (2 * sigmoid - 1), 2 * clamp * sigmoid * torch.sigmoid(-u)
    if scale == "sigmoid":
        u = u + 2
        sigmoid, rest = torch.sigmoid(u), torch.sigmoid(-u)
        if eps == 0:
            return F.logsigmoid(u), rest
        return torch.log(sigmoid + eps), sigmoid * rest / (sigmoid + eps)
    if scale == "softclip":
        limit = 1 + torch.abs(u / math.log(clamp))
        return u / limit, 1 / (limit * limit)
    return torch.zeros_like(u), torch.zeros_like(u)


def _center(values: Tensor, center: str, count: int) -> Tensor:
    """`values`, which are 0 where x passes, without their mean over the places that are transformed."""
    if center == "none" or count == 0:
        return values
    if center == "channel":
        return values - values.sum(1, keepdim=True) / count
    pixels = math.prod(values.shape[2:])
    return values - values.flatten(1).sum(1).view(-1, *[1] * (values.dim() - 1)) / (count * pixels)


def affine_coupling(
    x: Tensor, params: Tensor, raw_scale: Tensor | None, places: Tensor | None,
    scale_weight: Tensor | None, log_det_in: Tensor | None, mask: str, first: int, count: int,
    layout: str, scale: str, clamp: float, eps: float, params_scale: float, add_first: bool,
    shift_sign: int, log_sign: int, center: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(z, log_det) of x [B, C, *spatial]: at the transformed places, with t and u the parameters,

      z = s x + q t, or where `add_first` s (x + q t);  s = exp(p L), L = w L(u), log_det [B] = p sum L,

    q = shift_sign and p = log_sign, 1 or -1; elsewhere z = x.

    mask "range": channels first to first + count; "slots": `places` int32 [C], the parameters' channel of
    each channel, -1 where it passes; "checkerboard": pixels with (h + w) % 2 = first, "checkerboard_packed":
    with parameters for these alone; "free": `places` bool, shape x.shape[1:]. params [B, 2k, *spatial] holds
    shift and raw scale by `layout`, or is the shift alone beside `raw_scale` and for scale "additive";
    k = count for channels, else C. scale_weight w [k], float32 or wider, is for "tanh". `center`: L less its
    mean over the k channels of a pixel or over the sample.
    """
    half = _half(x, params, raw_scale, places, mask, first, count, layout, scale)
    wide = half.shift.dtype
    log_scale, _ = _log_scale(half.raw_scale * params_scale, scale, clamp, eps)
    if scale_weight is not None:
        log_scale = log_scale * scale_weight.to(wide)[half.slots].view(-1, *[1] * (x.dim() - 2))
    log_scale = _center(torch.where(half.moved, log_scale, 0.0), center, count)
    factor = torch.exp(log_sign * log_scale)
    shift = shift_sign * params_scale * half.shift
    z = factor * (x.to(wide) + shift) if add_first else factor * x.to(wide) + shift
    log_det = torch.zeros(x.shape[0], dtype=wide, device=x.device)
    if center == "none":
        log_det = log_sign * log_scale.flatten(1).sum(1)
    if log_det_in is not None:
        log_det = log_det + log_det_in
    return in_layout_of(torch.where(half.moved, z.to(x.dtype), x), x), log_det


def affine_coupling_out(out: Tensor, *args: Tensor) -> Tensor:
    """`affine_coupling` of the further arguments, with z put into `out`; returns log_det."""
    z, log_det = affine_coupling(*args)  # type: ignore[arg-type]
    out.copy_(z)
    return log_det


def affine_coupling_backward(
    grad_z: Tensor | None, grad_log_det: Tensor | None, source: Tensor, params: Tensor,
    raw_scale: Tensor | None, places: Tensor | None, scale_weight: Tensor | None, mask: str,
    first: int, count: int, layout: str, scale: str, clamp: float, eps: float, params_scale: float,
    add_first: bool, shift_sign: int, log_sign: int, center: str, from_output: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(grad_x, grad_params, grad_raw_scale, grad_weight): `source` is z where `from_output`, else x.

    With g the gradient of z, and s x = z - q t (s (x + q t) = z where `add_first`):
      grad_x = g s, grad_t = q g (q g s), grad_L = p (g s x + grad_log_det), grad_u = grad_L L'(u).
    grad_raw_scale is empty without `raw_scale`; grad_weight [B, k] has the sums over the pixels of a
    sample of the weight's gradient, in float32 or wider, and is empty without `scale_weight`.
    """
    half = _half(source, params, raw_scale, places, mask, first, count, layout, scale)
    wide = half.shift.dtype
    column = (-1, *[1] * (source.dim() - 2))
    base, slope = _log_scale(half.raw_scale * params_scale, scale, clamp, eps)
    log_scale = base
    if scale_weight is not None:
        weight = scale_weight.to(wide)[half.slots].view(column)
        log_scale, slope = base * weight, slope * weight
    log_scale = _center(torch.where(half.moved, log_scale, 0.0), center, count)
    factor = torch.exp(log_sign * log_scale)
    shift = shift_sign * params_scale * half.shift
    data = source.to(wide)
    if from_output:
        scaled = data if add_first else data - shift
    else:
        scaled = factor * (data + shift) if add_first else factor * data
    if grad_z is None:
        upstream, grad_log = torch.zeros_like(data), torch.zeros_like(data)
    else:
        upstream = grad_z.to(wide)
        grad_log = upstream * scaled
    if grad_log_det is not None and center == "none":
        grad_log = grad_log + grad_log_det.view(-1, *[1] * (source.dim() - 1))
    grad_log = _center(torch.where(half.moved, log_sign * grad_log, 0.0), center, count)
    grad_in = upstream * factor if grad_z is not None else upstream
    grad_x = torch.where(half.moved, grad_in, upstream).to(source.dtype)
    grad_shift = shift_sign * params_scale * (grad_in if add_first else upstream)

    def to_params(values: Tensor) -> Tensor:
        values = torch.where(half.moved, values, 0.0)
        if mask in ("range", "slots"):
            used = half.moved.flatten().nonzero()[:, 0]
            out = values.new_zeros(len(values), count, *values.shape[2:])
            return out.index_copy(1, half.slots[used], values[:, used])
        return _pack(values, first) if mask == "checkerboard_packed" else values

    parts = (to_params(grad_shift), to_params(params_scale * grad_log * slope))
    grad_shift, grad_raw = (part.to(params.dtype) for part in parts)
    grad_weight = source.new_empty(0, dtype=wide)
    if scale_weight is not None:
        terms = torch.where(half.moved, grad_log * base, 0.0).unsqueeze(-1).flatten(2).sum(2)
        grad_weight = terms.new_zeros(len(terms), len(scale_weight))
        used = half.moved.flatten().nonzero()[:, 0] if mask in ("range", "slots") else half.slots
        grad_weight = grad_weight.index_copy(1, half.slots[used], terms[:, used])
    no_raw = params.new_empty(0)
    if scale == "additive":
        return in_layout_of(grad_x, source), in_layout_of(grad_shift, source), no_raw, grad_weight
    if raw_scale is not None:
        return (
            in_layout_of(grad_x, source),
            in_layout_of(grad_shift, source),
            in_layout_of(grad_raw, source),
            grad_weight,
        )
    joined = _join(grad_shift, grad_raw, layout)
    return in_layout_of(grad_x, source), in_layout_of(joined, source), no_raw, grad_weight
