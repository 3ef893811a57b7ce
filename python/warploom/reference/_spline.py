"""Rational-quadratic splines (Durkan et al. 2019, Neural Spline Flows) in plain PyTorch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class _Options(NamedTuple):
    """The arguments of the op behind its tensors."""

    first: int
    num_bins: int
    params_last: bool
    tails: str
    left: float
    right: float
    bottom: float
    top: float
    min_bin_width: float
    min_bin_height: float
    min_derivative: float
    logit_scale: float
    convention: str
    inverse: bool

    @property
    def input_bounds(self) -> tuple[float, float]:
        return (self.bottom, self.top) if self.inverse else (self.left, self.right)

    @property
    def output_bounds(self) -> tuple[float, float]:
        return (self.left, self.right) if self.inverse else (self.bottom, self.top)

    @property
    def boundary_logit(self) -> float:
        """Of a derivative of 1."""
        if self.convention == "zuko":
            return 0.0
        return math.log(math.expm1(1 - self.min_derivative))


class _Axis(NamedTuple):
    """One axis of the spline, its interval as [0, 1]; [..., K] each."""

    probabilities: Tensor
    sizes: Tensor
    starts: Tensor

    def at(self, chosen: Tensor) -> _Axis:
        return _Axis(*(part.gather(-1, chosen).squeeze(-1) for part in self))


class _Bins(NamedTuple):
    """What forward and backward know of every element: its bin, and its place in it."""

    inside: Tensor  # whether the element lies in the interval
    chosen: Tensor  # [..., 1]
    widths: _Axis
    heights: _Axis
    logits: tuple[Tensor, Tensor, Tensor]  # [..., K], [..., K], [..., K + 1]
    d0: Tensor
    d1: Tensor
    s: Tensor  # height / width
    t: Tensor  # the place in the bin, in [0, 1]


def _limit(logits: Tensor, softness: float) -> Tensor:
    return logits / (1 + softness * logits.abs())


def _axis(logits: Tensor, minimum: float) -> _Axis:
    probabilities = logits.softmax(-1)
    sizes = minimum + (1 - minimum * logits.shape[-1]) * probabilities
    return _Axis(probabilities, sizes, F.pad(sizes.cumsum(-1)[..., :-1], (1, 0)))


def _softness(options: _Options) -> tuple[float, float]:
    """Of the logits of widths and heights, and of derivatives."""
    if options.convention == "nflows":
        return 0.0, 0.0
    slope = -math.log(options.min_derivative)
    return 2 / slope, 1 / slope


def _derivatives(logits: Tensor, options: _Options) -> Tensor:
    if options.convention == "zuko":
        return logits.exp()
    return options.min_derivative + F.softplus(logits)


def _place(position: Tensor, bins: tuple[Tensor, ...], inverse: bool) -> Tensor:
    """t, of a position on the x axis, or on the y axis by the root of a quadratic in [0, 1]."""
    x0, width, y0, height, s, d0, d1 = bins
    if not inverse:
        return ((position - x0) / width).clamp(0, 1)
    part = (position - y0) / height
    a = s - d0 + part * (d0 + d1 - 2 * s)
    b = d0 - part * (d0 + d1 - 2 * s)
    root = (b * b + 4 * a * s * part).clamp_min(0).sqrt()
    # Each form adds two numbers of one sign.
    t = torch.where(b < 0, (root - b) / (2 * a), 2 * s * part / (b + root))
    return t.clamp(0, 1)


def _find(part: Tensor, params: Tensor, options: _Options) -> _Bins:
    """part [A, C, S] and params of its elements, float32 or float64."""
    if not options.params_last:
        params = params.movedim(2, 3)
    count = options.num_bins
    low, high = options.input_bounds
    soft_sizes, soft_derivatives = _softness(options)
    raw_widths, raw_heights, raw_derivatives = params.tensor_split((count, 2 * count), dim=-1)
    logits_w, logits_h = (
        _limit(raw * options.logit_scale, soft_sizes) for raw in (raw_widths, raw_heights)
    )
    logits_d = _limit(raw_derivatives, soft_derivatives)
    if options.tails == "linear":
        logits_d = F.pad(logits_d, (1, 1), value=options.boundary_logit)
    elif options.tails == "circular":
        logits_d = torch.cat([logits_d, logits_d[..., :1]], -1)
    widths = _axis(logits_w, options.min_bin_width)
    heights = _axis(logits_h, options.min_bin_height)
    position = (part.clamp(low, high) - low) / (high - low)
    starts = heights.starts if options.inverse else widths.starts
    chosen = (position[..., None] >= starts[..., 1:]).sum(-1, keepdim=True)
    live_w, live_h = widths.at(chosen), heights.at(chosen)
    d0, d1 = (
        _derivatives(logits_d.gather(-1, chosen + step).squeeze(-1), options) for step in (0, 1)
    )
    ratio = (options.top - options.bottom) / (options.right - options.left)
    s = ratio * live_h.sizes / live_w.sizes
    bins = (live_w.starts, live_w.sizes, live_h.starts, live_h.sizes, s, d0, d1)
    t = _place(position, bins, options.inverse)
    inside = (part >= low) & (part <= high)
    return _Bins(inside, chosen, widths, heights, (logits_w, logits_h, logits_d), d0, d1, s, t)


def rational_quadratic_spline(x: Tensor, params: Tensor, *options: object) -> tuple[Tensor, Tensor]:
    """x [A, C, S], params [A, k, M, S] or (params_last) [A, k, S, M] -> y like x, log_det [A, k, S].

    Channels first to first + k are transformed, the others copied. In a bin of width w, height h, slope
    s = h / w, derivatives d0 and d1 at its knots, with t = (x - x0) / w and q = t (1 - t):

        y = y0 + h (s t^2 + d0 q) / D,  D = s + (d0 + d1 - 2 s) q
        log_det = log(s^2 (d1 t^2 + 2 s q + d0 (1 - t)^2) / D^2)
    """
    given = _Options(*options)  # type: ignore[arg-type]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    channels = slice(given.first, given.first + params.shape[1])
    part = x[:, channels].to(wide)
    bins = _find(part, params.to(wide), given)
    d0, d1, s, t = bins.d0, bins.d1, bins.s, bins.t
    q = t * (1 - t)
    denominator = s * (1 - 2 * q) + (d0 + d1) * q
    log_det = ((d1 * t * t + 2 * s * q + d0 * (1 - t) ** 2) * (s / denominator) ** 2).log()
    widths, heights = bins.widths.at(bins.chosen), bins.heights.at(bins.chosen)
    if given.inverse:
        position, log_det = widths.starts + widths.sizes * t, -log_det
    else:
        position = heights.starts + heights.sizes * (s * t * t + d0 * q) / denominator
    low, high = given.output_bounds
    y = low + (high - low) * position.clamp_max(1)
    if given.tails != "none":
        y = torch.where(bins.inside, y, part)
        log_det = torch.where(bins.inside, log_det, 0.0)
    out = x.clone(memory_format=torch.contiguous_format)
    out[:, channels] = y.to(x.dtype)
    return out, log_det.contiguous()


def _grad_logits(axis: _Axis, chosen: Tensor, grad_start: Tensor, grad_size: Tensor) -> Tensor:
    """Through the sums of the softmax: a start is the sum of the probabilities before it."""
    places = torch.arange(axis.probabilities.shape[-1], device=chosen.device)
    upstream = torch.where(places < chosen, grad_start[..., None], 0.0)
    upstream = torch.where(places == chosen, grad_size[..., None], upstream)
    mean = (axis.probabilities * upstream).sum(-1, keepdim=True)
    return axis.probabilities * (upstream - mean)


def rational_quadratic_spline_backward(
    grad_y: Tensor | None,
    grad_log_det: Tensor | None,
    x: Tensor,
    params: Tensor,
    *options: object,
) -> tuple[Tensor, Tensor]:
    """grad_x like x and grad_params like params, contiguous; an absent upstream gradient is 0.

    With R = (y - y0) / h and L = log_det, both functions of t, s, d0, d1, a start x0, y0 and a size w, h
    get g_y0 = g_y, g_h = g_y R + g_s / w, g_x0 = -g_t / w, g_w = -(g_t t + g_s s) / w, where
    g_t = g_y h R_t + g_L L_t and so on. The inverse is t(y) by the implicit function theorem: the same
    with g_y = -(g_x w - g_L L_t) / (h R_t), g_L negated, g_x0 = g_x and g_w = g_x t - g_s s / w.
    """
    given = _Options(*options)  # type: ignore[arg-type]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    channels = slice(given.first, given.first + params.shape[1])
    part = x[:, channels].to(wide)
    bins = _find(part, params.to(wide), given)
    d0, d1, s, t = bins.d0, bins.d1, bins.s, bins.t
    (_, w, _), (_, h, _) = bins.widths.at(bins.chosen), bins.heights.at(bins.chosen)
    zero = torch.zeros_like(part)
    upstream = zero if grad_y is None else grad_y[:, channels].to(wide)
    grad_l = zero if grad_log_det is None else grad_log_det
    q, back = t * (1 - t), 1 - t
    denominator = s * (1 - 2 * q) + (d0 + d1) * q
    slopes = d1 * t * t + 2 * s * q + d0 * back * back
    r = (s * t * t + d0 * q) / denominator
    r_t = s * slopes / denominator**2
    r_s = (t * t - r * (1 - 2 * q)) / denominator
    l_t = 2 * (d1 * t + s * (1 - 2 * t) - d0 * back) / slopes
    l_t = l_t - 2 * (d0 + d1 - 2 * s) * (1 - 2 * t) / denominator
    l_s = 2 / s + 2 * q / slopes - 2 * (1 - 2 * q) / denominator
    low_in, high_in = given.input_bounds
    low_out, high_out = given.output_bounds
    g_out = upstream * (high_out - low_out)
    if given.inverse:
        grad_position = (g_out * w - grad_l * l_t) / (h * r_t)
        g_y, grad_l, g_x0 = -grad_position, -grad_l, g_out
    else:
        g_y = g_out
        grad_position = (g_y * h * r_t + grad_l * l_t) / w
        g_x0 = -grad_position
    g_s = g_y * h * r_s + grad_l * l_s
    g_d0 = g_y * h * q * (1 - r) / denominator + grad_l * (
        back * back / slopes - 2 * q / denominator
    )
    g_d1 = -g_y * h * q * r / denominator + grad_l * (t * t / slopes - 2 * q / denominator)
    g_w, g_h = g_x0 * t - g_s * s / w, g_y * r + g_s * s / h
    logits_w, logits_h, logits_d = bins.logits
    count = given.num_bins
    grads_w = _grad_logits(bins.widths, bins.chosen, g_x0, g_w)
    grads_h = _grad_logits(bins.heights, bins.chosen, g_y, g_h)
    grads_w = grads_w * (1 - given.min_bin_width * count)
    grads_h = grads_h * (1 - given.min_bin_height * count)
    grads_d = torch.zeros_like(logits_d).scatter(-1, bins.chosen, g_d0[..., None])
    grads_d = grads_d.scatter(-1, bins.chosen + 1, g_d1[..., None])
    if given.convention == "zuko":
        grads_d = grads_d * logits_d.exp()
    else:
        grads_d = grads_d * logits_d.sigmoid()
    soft_sizes, soft_derivatives = _softness(given)
    grads_w, grads_h = (
        grads * (1 - soft_sizes * logits.abs()) ** 2 * given.logit_scale
        for grads, logits in ((grads_w, logits_w), (grads_h, logits_h))
    )
    grads_d = grads_d * (1 - soft_derivatives * logits_d.abs()) ** 2
    if given.tails == "linear":
        grads_d = grads_d[..., 1:-1]
    elif given.tails == "circular":
        grads_d = torch.cat([grads_d[..., :1] + grads_d[..., -1:], grads_d[..., 1:-1]], -1)
    grads = torch.cat([grads_w, grads_h, grads_d], -1)
    if given.tails == "none":
        grad_part = torch.where(bins.inside, grad_position / (high_in - low_in), 0.0)
    else:
        grad_part = torch.where(bins.inside, grad_position / (high_in - low_in), upstream)
        grads = torch.where(bins.inside[..., None], grads, 0.0)
    grad_x = torch.zeros_like(x) if grad_y is None else grad_y.to(x.dtype)
    grad_x = grad_x.clone(memory_format=torch.contiguous_format)
    grad_x[:, channels] = grad_part.to(x.dtype)
    grads = grads if given.params_last else grads.movedim(3, 2)
    return grad_x, grads.to(params.dtype).contiguous()
