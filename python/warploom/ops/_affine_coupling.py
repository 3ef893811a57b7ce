"""Affine coupling: an affine map of one half of the elements, by parameters that the other half decides."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from warploom._library import Differentiable, define
from warploom.ops._check import (
    check_choice,
    check_device,
    check_floating,
    check_same,
    check_shape,
    check_tensor,
    fail,
)
from warploom.ops._fakes import dense_like_lines, statistics_dtype
from warploom.reference import coupling as reference

SCALES = ("additive", "exp", "tanh", "atan", "centered_sigmoid", "sigmoid", "softclip")
LAYOUTS = ("shift_scale", "scale_shift", "interleaved")
CENTERS = ("none", "channel", "sample")

#: (order, inverse) -> (add_first, shift_sign, log_sign) of `reference.affine_coupling`.
FORMS = {
    ("mul_add", False): (False, 1, 1),
    ("mul_add", True): (True, -1, -1),
    ("add_mul", False): (True, 1, 1),
    ("add_mul", True): (False, -1, -1),
    ("div_add", False): (False, 1, -1),
    ("div_add", True): (True, -1, 1),
}

#: The conventions of other libraries, as keyword arguments of `affine_coupling`. Their `forward` is ours;
#: which of data and latent it starts from differs. "normflows_masked" and "rle" are given a free mask and a
#: pair of parameters, "zuko" a pair.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "normflows": {"layout": "interleaved", "scale": "exp"},
    "normflows_sigmoid": {"layout": "interleaved", "scale": "sigmoid", "order": "div_add"},
    "normflows_sigmoid_inverse": {"layout": "interleaved", "scale": "sigmoid"},
    "normflows_masked": {"scale": "exp"},
    "nflows": {"layout": "shift_scale", "scale": "sigmoid", "eps": 1e-3},
    "freia": {"layout": "scale_shift", "scale": "atan", "clamp": 2.0},
    "freia_tanh": {"layout": "scale_shift", "scale": "tanh", "clamp": 2.0},
    "freia_sigmoid": {"layout": "scale_shift", "scale": "centered_sigmoid", "clamp": 2.0},
    "freia_all_in_one": {
        "layout": "scale_shift", "scale": "tanh", "clamp": 2.0, "params_scale": 0.1,
    },
    "freia_gin": {"layout": "scale_shift", "scale": "atan", "clamp": 2.0, "center": "channel"},
    "openai_glow": {"layout": "interleaved", "scale": "sigmoid", "order": "add_mul"},
    "glow_pytorch": {"layout": "scale_shift", "scale": "sigmoid", "order": "add_mul"},
    "ffjord": {"layout": "scale_shift", "scale": "sigmoid"},
    "memcnn": {"layout": "interleaved", "scale": "sigmoid"},
    "zuko": {"scale": "softclip", "clamp": 1e-3},
    "rle": {"scale": "tanh"},
})  # fmt: skip

_OPTIONS = (
    "str mask, int first, int count, str layout, str scale, float clamp, float eps, "
    "float params_scale, bool add_first, int shift_sign, int log_sign, str center"
)
_FORWARD = (
    "Tensor x, Tensor params, Tensor? raw_scale, Tensor? places, Tensor? scale_weight, "
    f"Tensor? log_det_in, {_OPTIONS}"
)


def _log_det(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], dtype=statistics_dtype(x))


def _backward_fake(
    grad_z: Tensor | None, grad_log_det: Tensor | None, source: Tensor, params: Tensor,
    raw_scale: Tensor | None, places: Tensor | None, scale_weight: Tensor | None, *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return (
        dense_like_lines(source.shape, source),
        dense_like_lines(params.shape, source),
        source.new_empty(0) if raw_scale is None else dense_like_lines(raw_scale.shape, source),
        source.new_empty(
            0 if scale_weight is None else (len(source), len(scale_weight)),
            dtype=statistics_dtype(source),
        ),
    )


_affine_coupling_op = define(
    "affine_coupling",
    f"({_FORWARD}) -> (Tensor z, Tensor log_det)",
    reference=reference.affine_coupling,
    fake=lambda x, *rest: (dense_like_lines(x.shape, x), _log_det(x)),
    triton="coupling.affine_coupling:affine_coupling",
)
_affine_coupling_out_op = define(
    "affine_coupling_out",
    f"(Tensor(a!) out, {_FORWARD}) -> Tensor",
    reference=reference.affine_coupling_out,
    fake=lambda out, x, *rest: _log_det(x),
    triton="coupling.affine_coupling:affine_coupling_out",
)
_affine_coupling_backward_op = define(
    "affine_coupling_backward",
    "(Tensor? grad_z, Tensor? grad_log_det, Tensor source, Tensor params, Tensor? raw_scale, "
    f"Tensor? places, Tensor? scale_weight, {_OPTIONS}, bool from_output)"
    " -> (Tensor grad_x, Tensor grad_params, Tensor grad_raw_scale, Tensor grad_weight)",
    reference=reference.affine_coupling_backward,
    fake=_backward_fake,
    triton="coupling.affine_coupling_backward:affine_coupling_backward",
)


def _differentiable(recompute: bool) -> Differentiable:
    def save(args: Any, outputs: Any) -> tuple[Tensor | None, ...]:
        return (outputs[0] if recompute else args[0], *args[1:5])

    def gradients(
        overload: Any, saved: Any, scalars: Any, grads: Any, needs: Any
    ) -> tuple[Tensor | None, ...]:
        _, _, raw_scale, _, scale_weight = saved
        grad_x, grad_params, grad_raw, grad_weight = overload(*grads, *saved, *scalars, recompute)
        return (
            grad_x,
            grad_params,
            None if raw_scale is None else grad_raw,
            None,
            None if scale_weight is None else grad_weight.sum(0),
            grads[1] if needs[5] else None,
        )

    return Differentiable(
        _affine_coupling_op, _affine_coupling_backward_op, save=save, backward=gradients
    )


_recomputing, _saving = _differentiable(True), _differentiable(False)


def channel_slots(mask: Tensor) -> Tensor:
    """int32 [C] of a bool [C]: the rank of each True among the Trues, -1 for False.

    `affine_coupling` takes either as its mask; the ranks, made once, save it that work in every call.
    """
    return torch.where(mask, mask.cumsum(0) - 1, -1).to(torch.int32)


def parse_mask(
    op: str, mask: str | int | Tensor, x: Tensor, params: Tensor, halves: int
) -> tuple[Tensor | None, str, int, int]:
    """(places, mask, first, count) of the op. `halves`: of how many the channels of params consist."""
    channels = x.shape[1]
    kept = channels - channels // 2
    if isinstance(mask, Tensor):
        check_device(op, "mask", mask, "x", x)
        if mask.dim() == 1 and mask.dtype in (torch.bool, torch.int32):
            check_shape(op, "mask", mask, (channels,))
            slots = channel_slots(mask) if mask.dtype == torch.bool else mask
            return slots, "slots", 0, params.shape[1] // halves
        if mask.dtype != torch.bool:
            raise TypeError(f"{op}: mask: expected dtype torch.bool, got {mask.dtype}")
        try:
            return mask.expand(x.shape[1:]), "free", 0, channels
        except RuntimeError:
            fail(op, "mask", f"a shape that broadcasts to {tuple(x.shape[1:])}", tuple(mask.shape))
    if isinstance(mask, int) and not isinstance(mask, bool):
        if not 0 <= mask <= channels:
            fail(op, "mask", f"a number of channels from 0 to {channels}", mask)
        return None, "range", mask, channels - mask
    if mask == "channel":
        return None, "range", kept, channels - kept
    if mask == "channel_inverse":
        return None, "range", 0, kept
    if mask not in ("checkerboard", "checkerboard_inverse"):
        names = "'channel', 'channel_inverse', 'checkerboard', 'checkerboard_inverse'"
        fail(op, "mask", f"{names}, a number of channels or a bool tensor", repr(mask))
    if x.dim() != 4:
        fail(op, "x", "shape [B, C, H, W] for a checkerboard", tuple(x.shape))
    packed = params.dim() == 4 and 2 * params.shape[3] == x.shape[3]
    name = "checkerboard_packed" if packed else "checkerboard"
    return None, name, int(mask == "checkerboard"), channels


def _widened(params: Tensor, x: Tensor) -> Tensor:
    """16-bit parameters, which a conditioner gives under autocast, in the dtype of a float32 x."""
    narrow = params.dtype in (torch.float16, torch.bfloat16)
    return params.float() if narrow and x.dtype == torch.float32 else params


def check_map(op: str, layout: str, scale: str, order: str, clamp: float, eps: float) -> None:
    """What every op of affine maps is told of them."""
    check_choice(op, "layout", layout, LAYOUTS)
    check_choice(op, "scale", scale, SCALES)
    check_choice(op, "order", order, ("mul_add", "add_mul", "div_add"))
    if not eps >= 0:
        fail(op, "eps", "a number >= 0", eps)
    if scale == "softclip" and not 0 < clamp < 1:
        fail(op, "clamp", "a number between 0 and 1 for softclip", clamp)


def check_sums(
    op: str, x: Tensor, scale: str, scale_weight: Tensor | None, log_det_in: Tensor | None, count: int
) -> Tensor | None:  # fmt: skip
    """The learned weight as the ops take it, [count]; both arguments checked."""
    statistics = statistics_dtype(x)
    if scale_weight is not None:
        if scale != "tanh":
            fail(op, "scale_weight", f"None for scale {scale!r}", "a tensor")
        check_floating(op, "scale_weight", scale_weight)
        check_device(op, "scale_weight", scale_weight, "x", x)
        if tuple(scale_weight.shape) != (1,):
            check_shape(op, "scale_weight", scale_weight, (count,))
        scale_weight = scale_weight.to(statistics).expand(count)
    if log_det_in is not None:
        check_tensor(op, "log_det_in", log_det_in)
        check_device(op, "log_det_in", log_det_in, "x", x)
        if log_det_in.dtype != statistics:
            raise TypeError(
                f"{op}: log_det_in: expected dtype {statistics}, got {log_det_in.dtype}"
            )
        check_shape(op, "log_det_in", log_det_in, (x.shape[0],))
    return scale_weight


def affine_coupling(
    x: Tensor,
    params: Tensor | tuple[Tensor, Tensor],
    *,
    mask: str | int | Tensor = "channel",
    layout: str = "shift_scale",
    scale: str = "exp",
    clamp: float = 1.0,
    eps: float = 0.0,
    params_scale: float = 1.0,
    scale_weight: Tensor | None = None,
    order: str = "mul_add",
    center: str = "none",
    inverse: bool = False,
    log_det_in: Tensor | None = None,
    out: Tensor | None = None,
    recompute: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """An affine map of the transformed elements of x, and the logarithm of its determinant.

    With shift t and raw scale u of each transformed element b, log s = L(u):

      order "mul_add": s b + t;  "add_mul": s (b + t);  "div_add": b / s + t;  log_det = sum L (-sum L for
      "div_add"); `inverse`: the inverse map of that order, with the negated log_det.
      scale "additive": L = 0;  "exp": u;  "tanh": clamp tanh(u) w;  "atan": 0.636 clamp atan(u);
      "centered_sigmoid": clamp (2 sigmoid(u) - 1);  "sigmoid": log(sigmoid(u + 2) + eps);
      "softclip": u / (1 + |u / log(clamp)|).

    Args:
        x: [B, C, *spatial], any number of spatial dimensions, float32, float16, bfloat16 (float64 on
            `reference` and `cpu`); contiguous and channels-last memory is read as it is, other is copied.
        params: [B, 2k, *spatial], x's dtype: shift and raw scale of the k transformed channels in their
            order, arranged by `layout`; [B, k, *spatial] for "additive"; or a pair (shift, raw scale) of
            [B, k, *spatial]. For checkerboards and free masks k = C, and what stands at places that pass is
            not used. For checkerboards of even width also packed [B, 2C, H, W // 2], column j of a row for
            its j-th transformed pixel. 16 bits beside a float32 x are widened.
        mask: what is transformed. "channel" (default): all but the first C - C // 2 channels;
            "channel_inverse": these alone; an int n: all but the first n; bool [C]: where True (or its
            `channel_slots`); "checkerboard": pixels with odd h + w; "checkerboard_inverse": with even; a bool
            tensor of 2 or more dimensions that broadcasts to [C, *spatial]: where True.
        layout: "shift_scale" (default), "scale_shift": halves of dimension 1; "interleaved": shift at even
            channels, raw scale at odd ones.
        scale, clamp, eps, order, inverse: see the formulas; "exp", 1.0, 0.0, "mul_add", False.
        params_scale: multiplies t and u; default 1.0.
        scale_weight: w of "tanh", [k] or [1], x's dtype or float32; None: 1.
        center: "channel": L less its mean over the transformed channels of a pixel; "sample": of the sample;
            log_det then is 0. For masks over channels. Default "none".
        log_det_in: [B], float32 (float64 of float64), added to log_det.
        out: takes z, x's shape, dtype and memory layout, may be x itself; for calls without gradients.
        recompute: True (default): the backward takes s b from z, and nothing but z and params is saved;
            False: from x, which is saved, the choice for 16-bit z.
        backend: one of `warploom.BACKENDS`; None chooses.

    Returns:
        z, x's shape and dtype, contiguous (channels-last where x is so), and log_det [B] in float32 (float64
        of float64). Float32 arithmetic, one rounding. Elements that are not finite affect their own place
        and log_det alone. Differentiable once in x, params, scale_weight and log_det_in.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        RuntimeError: the named backend cannot serve the call; `out` beside gradients; forward mode.

    Source: Dinh, Sohl-Dickstein and Bengio, Density estimation using Real NVP (2017), equations 4 to 8;
    Dinh, Krueger and Bengio, NICE (2015), section 3.2 for "additive"; Sorrenson, Rother and Koethe,
    Disentanglement by Nonlinear ICA with General Incompressible-flow Networks (2020) for `center`.
    """
    op = "affine_coupling"
    check_floating(op, "x", x)
    if x.dim() < 2:
        fail(op, "x", "at least 2 dimensions [B, C, ...]", tuple(x.shape))
    check_map(op, layout, scale, order, clamp, eps)
    check_choice(op, "center", center, CENTERS)
    shift, raw_scale = params if isinstance(params, tuple) else (params, None)
    name = "params" if raw_scale is None else "params[0]"
    check_tensor(op, name, shift)
    if raw_scale is not None and scale == "additive":
        fail(op, "params", "one tensor for an additive coupling", "a pair")
    shift = _widened(shift, x)
    check_same(op, name, shift, "x", x)
    halves = 1 if raw_scale is not None or scale == "additive" else 2
    places, mask_name, first, count = parse_mask(op, mask, x, shift, halves)
    if center != "none" and mask_name not in ("range", "slots"):
        fail(op, "center", "'none' for a mask that is not over channels", repr(center))
    spatial = list(x.shape[2:])
    if mask_name == "checkerboard_packed":
        spatial[1] //= 2
    check_shape(op, name, shift, (x.shape[0], halves * count, *spatial))
    if raw_scale is not None:
        check_tensor(op, "params[1]", raw_scale)
        raw_scale = _widened(raw_scale, x)
        check_same(op, "params[1]", raw_scale, "x", x)
        check_shape(op, "params[1]", raw_scale, shift.shape)
    scale_weight = check_sums(op, x, scale, scale_weight, log_det_in, count)
    args = (
        x, shift, raw_scale, places, scale_weight, log_det_in, mask_name, first, count, layout, scale,
        float(clamp), float(eps), float(params_scale), *FORMS[order, inverse], center,
    )  # fmt: skip
    if out is None:
        z, log_det = (_recomputing if recompute else _saving)(*args, backend=backend)
        return z, log_det
    check_same(op, "out", out, "x", x)
    check_shape(op, "out", out, x.shape)
    tensors = (x, shift, raw_scale, scale_weight, log_det_in, out)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(f"{op}: out: expected None where a tensor needs a gradient")
    chosen = _affine_coupling_out_op.choose(out, *args, backend=backend)
    return out, _affine_coupling_out_op.overloads[chosen](out, *args)
