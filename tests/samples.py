"""One sample call per op, for the tests that hold for every op alike."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from warploom.ops.activation import geglu, swiglu
from warploom.ops.attention import attention, attention_varlen, merge_attention
from warploom.ops.coupling import (
    actnorm,
    affine_coupling,
    affine_coupling_linear,
    channel_affine,
    rational_quadratic_spline,
    spline_coupling,
    squeeze,
)
from warploom.ops.grouped_linear import grouped_linear
from warploom.ops.lora import lora_linear, lora_shrink, rms_norm_shrink, swiglu_shrink
from warploom.ops.mla import mla_absorbed, mla_prefill
from warploom.ops.norm import l2_norm, layer_norm, rms_norm
from warploom.ops.rope import apply_rotary
from warploom.ops.spp import roi_align, spatial_pyramid_pool, sppf
from warploom.ops.vocab import linear_cross_entropy
from warploom.reference import attention as attention_reference
from warploom.reference import lora as lora_reference
from warploom.reference import mla as mla_reference
from warploom.reference import norm as norm_reference
from warploom.reference import spp as spp_reference


def _rms_norm_backward(make: Callable[..., Tensor]) -> tuple[Any, ...]:
    x, weight = make(3, 24), make(24)
    _, rstd = norm_reference.rms_norm(x, weight, 1e-6)
    return make(3, 24), x, weight, rstd, make(3, 24)


def _layer_norm_backward(make: Callable[..., Tensor]) -> tuple[Any, ...]:
    x, weight = make(3, 24), make(24)
    _, mean, rstd = norm_reference.layer_norm(x, weight, weight, 1e-5)
    return make(3, 24), x, weight, mean, rstd


def _l2_norm_backward(make: Callable[..., Tensor]) -> tuple[Any, ...]:
    x = make(3, 24)
    return make(3, 24), x, norm_reference.l2_norm(x, 1e-12)[1]


def _attention_backward(make: Callable[..., Tensor]) -> tuple[Any, ...]:
    q, k, v = make(2, 5, 4, 16), make(2, 7, 2, 16), make(2, 7, 2, 16)
    options = _attention_options(make)
    out, lse = attention_reference.attention(q, k, v, *options)
    bias, slopes, _, mask, *rest = options
    inputs = (make(2, 5, 4, 16), q, k, v, out, lse, torch.randn_like(lse))
    seed, *scalars = rest[3:]
    return *inputs, bias, slopes, mask, None, None, seed, *scalars, True, True


def _statistics(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _attention_options(make: Callable[..., Tensor]) -> tuple[Any, ...]:
    """What follows q [2, 5, 4, 16], k and v [2, 7, 2, 16] in the schema, every feature switched on."""
    mask = make(2, 7) > 1.0
    seed = torch.full((1,), 77, dtype=torch.int64, device=mask.device)
    slopes, sinks = _statistics(make(2, 4)), _statistics(make(4))
    tensors = (make(2, 4, 5, 7), slopes, sinks, mask, None, None, None, seed)
    return *tensors, 0.25, 3, 0, 5.0, 0.25, 5, 7


def _decode(make: Callable[..., Tensor]) -> tuple[Any, ...]:
    """Three pages of 4 rows for two sequences of 5 and 3 keys."""
    q, k, v = make(2, 2, 4, 16), make(3, 4, 2, 16), make(3, 4, 2, 16)
    lengths = torch.tensor([5, 3], dtype=torch.int32, device=q.device)
    table = torch.tensor([[2, 0], [1, -1]], dtype=torch.int32, device=q.device)
    return q, k, v, lengths, table, None, _statistics(make(4)), 0.25, 3, 0, 5.0, 2, 0


def _cache_append(make: Callable[..., Tensor]) -> tuple[Any, ...]:
    _, k_cache, v_cache, lengths, table, *_ = _decode(make)
    cos = _table(make)
    return make(2, 2, 2, 16), make(2, 2, 2, 16), k_cache, v_cache, lengths, table, cos, cos, False


def _merge(make: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    def lse() -> Tensor:
        return _statistics(make(2, 4, 5))

    return make(2, 5, 4, 16), lse(), make(2, 5, 4, 16), lse()


def _merge_backward(make: Callable[..., Tensor]) -> tuple[Any, ...]:
    parts = _merge(make)
    return make(2, 5, 4, 16), torch.randn_like(parts[1]), *parts


def _table(make: Callable[..., Tensor]) -> Tensor:
    table = make(9, 4)
    return table if table.dtype == torch.float64 else table.float()


def _mla_decode(make: Callable[..., Tensor]) -> tuple[Any, ...]:
    """Three pages of 4 rows for two sequences of 5 and 3 tokens, latents of 32 and rotary keys of 16."""
    q, cache = make(2, 2, 4, 48), make(3, 4, 48)
    lengths = torch.tensor([5, 3], dtype=torch.int32, device=q.device)
    table = torch.tensor([[2, 0], [1, -1]], dtype=torch.int32, device=q.device)
    return q, cache, lengths, table, 32, 0.25, True, 2, 0


def _mla_absorbed_backward(make: Callable[..., Tensor]) -> tuple[Any, ...]:
    q, kv = make(2, 3, 4, 48), make(2, 7, 48)
    lengths = torch.tensor([7, 4], dtype=torch.int32, device=q.device)
    out, lse = mla_reference.mla_decode(q, kv, lengths, None, 32, 0.25, True, 0, 0)
    return make(2, 3, 4, 32), q, kv, out, lse, torch.randn_like(lse), lengths, 32, 0.25, True


def _mla_cache_append(make: Callable[..., Tensor]) -> tuple[Any, ...]:
    _, cache, lengths, table, *_ = _mla_decode(make)
    cos = make(9, 8)
    cos = cos if cos.dtype == torch.float64 else cos.float()
    return make(2, 2, 48), make(32), cache, lengths, table, None, cos, cos, 1e-6, True


def _offsets(x: Tensor, *bounds: int) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32, device=x.device)


def _grouped_linear(make: Callable[..., Tensor]) -> tuple[Any, ...]:
    x, weight = make(7, 24), make(3, 16, 24)
    return x, weight, _offsets(x, 0, 4, 4, 6), False


def _grouped_linear_backward(make: Callable[..., Tensor]) -> tuple[Any, ...]:
    return make(7, 16), *_grouped_linear(make)[:3], True, True


def _rms_norm_shrink_backward(make: Callable[..., Tensor]) -> tuple[Any, ...]:
    x, weight, lora_a = make(3, 24), make(24), make(5, 24)
    out, shrunk, rstd, _ = lora_reference.rms_norm_shrink(x, None, weight, lora_a, 1e-6)
    grads = torch.randn_like(out), torch.randn_like(shrunk), torch.randn_like(x)
    return *grads, out, x, weight, lora_a, rstd


def _gated_activation_shrink_backward(make: Callable[..., Tensor]) -> tuple[Any, ...]:
    gate, up, lora_a = make(3, 24), make(3, 24), make(5, 24)
    out, shrunk = lora_reference.gated_activation_shrink(gate, up, lora_a, "gelu")
    return None, torch.randn_like(shrunk), out, gate, up, lora_a, "gelu"


def _targets(x: Tensor, rows: int, classes: int) -> Tensor:
    """Of `rows` tokens, the second of which is ignored."""
    targets = torch.arange(3, 3 + rows, device=x.device) % classes
    targets[1] = -100
    return targets


def _cross_entropy_rows(make: Callable[..., Tensor]) -> tuple[Any, ...]:
    logits = make(4, 24)
    return logits, _targets(logits, 4, 24), _statistics(make(4)), -100, 0.1, 0.01, 5.0, True


def _cross_entropy_block(make: Callable[..., Tensor]) -> tuple[Any, ...]:
    logits = make(4, 24)
    return logits, _statistics(make(4, 4)), _targets(logits, 4, 40), 5, 40, -100, 5.0, True


def _linear_cross_entropy(make: Callable[..., Tensor]) -> tuple[Any, ...]:
    hidden, weight, bias, shrunk, b = make(4, 8), make(24, 8), make(24), make(4, 3), make(24, 3)
    tensors = (hidden, weight, _targets(hidden, 4, 24), bias, shrunk, b, _statistics(make(4)))
    return *tensors, 0.5, -100, 0.1, 0.01, 5.0, False, True, True, True, True, True


def _affine_coupling_linear(make: Callable[..., Tensor]) -> tuple[Any, ...]:
    tensors = (make(3, 6), make(3, 5), make(6, 5), make(6), None, _statistics(make(3)))
    options = ("range", 3, 3, "shift_scale", "tanh", 1.0, 0.0, 1.0, False, 1, 1)
    return *tensors, _statistics(make(3)), *options


def _affine_coupling_linear_backward(make: Callable[..., Tensor]) -> tuple[Any, ...]:
    arguments = _affine_coupling_linear(make)
    return make(3, 6), _statistics(make(3)), *arguments[:6], *arguments[7:], True


def _lcs_lengths(make: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    device = make(1).device
    tokens, others = (torch.randint(5, (size,), device=device) for size in (9, 12))
    return tokens, others, _offsets(tokens, 0, 7, 7, 12)


def _pyramid_backward(make: Callable[..., Tensor]) -> tuple[Any, ...]:
    x, levels = make(2, 3, 5, 6), [1, 1, 2, 3]
    out, argmax = spp_reference.spatial_pyramid_pool(
        x, None, None, levels, "max", "adaptive", False, True
    )
    return torch.randn_like(out), x, argmax, None, None, levels, "max", "adaptive", False


def _regions(x: Tensor, backend: str | None = None) -> Tensor:
    rois = torch.tensor([[1, 0, 1, 4, 3], [0, 2, 1, 5, 4], [1, 1, 1, 3, 9.0]], device=x.device)
    return spatial_pyramid_pool(x, (1, 2), rois=rois, backend=backend)


_COUPLING = ("range", 3, 2, "interleaved", "tanh", 0.7, 0.0, 1.0, False, 1, 1, "none")


def _affine_coupling(make: Callable[..., Tensor]) -> tuple[Any, ...]:
    weight, log_det = _statistics(make(2)), _statistics(make(2))
    return make(2, 5, 2, 3), make(2, 4, 2, 3), None, None, weight, log_det, *_COUPLING


def _affine_coupling_out(make: Callable[..., Tensor]) -> tuple[Any, ...]:
    return make(2, 5, 2, 3), *_affine_coupling(make)


def _affine_coupling_backward(make: Callable[..., Tensor]) -> tuple[Any, ...]:
    weight, grad_log_det = _statistics(make(2)), _statistics(make(2))
    tensors = (make(2, 5, 2, 3), grad_log_det, make(2, 5, 2, 3), make(2, 4, 2, 3))
    return *tensors, None, None, weight, *_COUPLING, True


def _seed(x: Tensor) -> Tensor:
    return torch.tensor([2**40 + 5], dtype=torch.int64, device=x.device)


def _rois(x: Tensor) -> Tensor:
    """Three regions of two images, one of them beyond the border."""
    boxes = [[0, 0.5, 0.25, 4.0, 3.5], [1, 1.0, 1.0, 3.5, 4.0], [0, -2.0, 2.0, 9.0, 4.5]]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.tensor(boxes, dtype=dtype, device=x.device)


def _roi_align(make: Callable[..., Tensor]) -> tuple[Any, ...]:
    x = make(2, 3, 5, 6)
    return x, _rois(x), 2, 3, 0.75, 0, True


def _lora_shrink(make: Callable[..., Tensor]) -> tuple[Any, ...]:
    x = make(5, 24)
    return x, make(4, 24), _seed(x), 0.25


def _lora_linear(make: Callable[..., Tensor]) -> tuple[Any, ...]:
    """With everything but `shrunk`, which takes the place of lora_a."""
    x = make(5, 24)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    tensors = x, make(16, 24), None, make(16), make(4, 24), make(16, 4)
    return *tensors, make(16).to(wide), None, _seed(x), "dense", 0.5, 0.25


def _lora_linear_backward(make: Callable[..., Tensor]) -> tuple[Any, ...]:
    arguments = _lora_linear(make)
    x, weight, scale, _, lora_a, lora_b, column_scale, _, seed, *scalars = arguments
    _, shrunk, unscaled = lora_reference.lora_linear(*arguments)
    saved = (x, weight, scale, lora_a, lora_b, column_scale, shrunk, seed, unscaled)
    return make(5, 16), *saved, *scalars, *[True] * 7


def _spline(make: Callable[..., Tensor]) -> tuple[Any, ...]:
    """The last two of three channels."""
    options = (1, 3, False, "linear", -2.0, 2.0, -2.0, 2.0, 1e-3, 1e-3, 1e-3, 0.7, "nflows", True)
    return make(2, 3, 5), make(2, 2, 8, 5), *options


#: Arguments of `torch.ops.warploom.<name>.<backend>`.
OP_ARGS: dict[str, Callable[[Callable[..., Tensor]], tuple[Any, ...]]] = {
    "rms_norm": lambda make: (make(3, 24), make(24), 1e-6),
    "add_rms_norm": lambda make: (make(3, 24), make(3, 24), make(24), 1e-6),
    "rms_norm_backward": _rms_norm_backward,
    "layer_norm": lambda make: (make(3, 24), make(24), make(24), 1e-5),
    "layer_norm_backward": _layer_norm_backward,
    "l2_norm": lambda make: (make(3, 24), 1e-12),
    "l2_norm_backward": _l2_norm_backward,
    "apply_rotary": lambda make: (make(2, 5, 3, 12), _table(make), _table(make), None, True, False),
    "gated_activation": lambda make: (make(3, 24), make(3, 24), "silu"),
    "gated_activation_backward": lambda make: (make(3, 24), make(3, 24), make(3, 24), "gelu"),
    "attention": lambda make: (
        make(2, 5, 4, 16),
        make(2, 7, 2, 16),
        make(2, 7, 2, 16),
        *_attention_options(make),
    ),
    "attention_backward": _attention_backward,
    "attention_decode": _decode,
    "attention_cache_append": _cache_append,
    "merge_attention": _merge,
    "merge_attention_backward": _merge_backward,
    "grouped_linear": _grouped_linear,
    "grouped_linear_backward": _grouped_linear_backward,
    "rms_norm_shrink": lambda make: (make(3, 24), make(3, 24), make(24), make(5, 24), 1e-6),
    "rms_norm_shrink_backward": _rms_norm_shrink_backward,
    "gated_activation_shrink": lambda make: (make(3, 24), make(3, 24), make(5, 24), "silu"),
    "gated_activation_shrink_backward": _gated_activation_shrink_backward,
    "lora_shrink": _lora_shrink,
    "lora_shrink_backward": lambda make: (make(5, 4), *_lora_shrink(make), True, True),
    "lora_linear": _lora_linear,
    "lora_linear_backward": _lora_linear_backward,
    "mla_decode": _mla_decode,
    "mla_absorbed_backward": _mla_absorbed_backward,
    "mla_cache_append": _mla_cache_append,
    "cross_entropy_rows": _cross_entropy_rows,
    "cross_entropy_block": _cross_entropy_block,
    "linear_cross_entropy": _linear_cross_entropy,
    "lcs_lengths": _lcs_lengths,
    "rational_quadratic_spline": _spline,
    "rational_quadratic_spline_backward": lambda make: (
        make(2, 3, 5),
        _statistics(make(2, 2, 5)),
        *_spline(make),
    ),
    "spatial_pyramid_pool": lambda make: (
        *(make(2, 3, 5, 6), None, None, [1, 1, 2, 3]),
        *("max", "adaptive", False, True),
    ),
    "spatial_pyramid_pool_backward": _pyramid_backward,
    "affine_coupling": _affine_coupling,
    "affine_coupling_out": _affine_coupling_out,
    "affine_coupling_backward": _affine_coupling_backward,
    "affine_coupling_linear": _affine_coupling_linear,
    "affine_coupling_linear_backward": _affine_coupling_linear_backward,
    "channel_affine": lambda make: (make(2, 3, 5), make(3), make(3), "mul_add", False),
    "channel_affine_backward": lambda make: (
        *(make(2, 3, 5), make(2, 3, 5), make(3), make(3)),
        *("add_mul", True),
    ),
    "squeeze": lambda make: (make(2, 3, 4, 6), 2, "position_major", False),
    "sppf": lambda make: (make(2, 3, 5, 4), 3, False),
    "sppf_backward": lambda make: (make(2, 12, 5, 4), make(2, 12, 5, 4), 3, False),
    "roi_align": _roi_align,
    "roi_align_backward": lambda make: (make(3, 3, 2, 3), *_roi_align(make)),
}


def _rotate(x: Tensor, backend: str | None = None) -> Tensor:
    angles = torch.arange(9, dtype=torch.float64).unsqueeze(1) * torch.tensor([0.9, 0.4, 0.1, 0.02])
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = angles.cos().to(x.device, dtype), angles.sin().to(x.device, dtype)
    return apply_rotary(x, cos, sin, backend=backend)


def _packed(q: Tensor, k: Tensor, v: Tensor, backend: str | None = None) -> Any:
    bounds = (torch.tensor([0, 2, 5]), torch.tensor([0, 4, 7]))
    bounds_q, bounds_k = (bound.to(q.device, torch.int32) for bound in bounds)
    return attention_varlen(
        q, k, v, bounds_q, bounds_k, 3, 4, causal=True, return_lse=True, backend=backend
    )


def _loss(*tensors: Tensor, backend: str | None = None, **options: Any) -> Any:
    """Of hidden, weight and, where they are given, the bias and an adapter of the head."""
    hidden, weight, *rest = tensors
    targets = _targets(hidden, hidden.shape[0], weight.shape[0])
    if rest:
        bias, lora_a, lora_b = rest
        options.update(bias=bias, lora=(lora_a, lora_b, 0.5))
    return linear_cross_entropy(hidden, weight, targets, backend=backend, **options)


#: The public functions on differentiable tensors only: name -> (function, shapes of its tensors).
PUBLIC: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "rms_norm": (rms_norm, [(3, 24), (24,)]),
    "rms_norm with residual": (
        lambda x, r, w, backend=None: rms_norm(x, w, residual=r, backend=backend),
        [(3, 24), (3, 24), (24,)],
    ),
    "layer_norm": (layer_norm, [(3, 24), (24,), (24,)]),
    "l2_norm": (l2_norm, [(3, 24)]),
    "apply_rotary": (_rotate, [(2, 5, 3, 12)]),
    "swiglu": (swiglu, [(3, 24), (3, 24)]),
    "geglu": (geglu, [(3, 24), (3, 24)]),
    "geglu tanh": (
        lambda g, u, backend=None: geglu(g, u, approximate="tanh", backend=backend),
        [(3, 24), (3, 24)],
    ),
    "attention": (
        lambda q, k, v, backend=None: attention(q, k, v, causal=True, backend=backend),
        [(2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 8)],
    ),
    "attention with sinks, bias and slopes": (
        lambda q, k, v, sinks, bias, slopes, backend=None: attention(
            q,
            k,
            v,
            causal=True,
            window=(3, 0),
            softcap=5.0,
            sinks=sinks,
            bias=bias,
            alibi_slopes=slopes,
            backend=backend,
        ),
        [(2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 8), (4,), (1, 4, 5, 7), (4,)],
    ),
    "attention_varlen": (
        _packed,
        [(5, 4, 8), (7, 2, 8), (7, 2, 8)],
    ),
    "merge_attention": (
        merge_attention,
        [(2, 5, 4, 8), (2, 4, 5), (2, 5, 4, 8), (2, 4, 5)],
    ),
    "grouped_linear": (
        lambda x, weight, backend=None: grouped_linear(
            x, weight, _offsets(x, 0, 4, 4, 6), backend=backend
        ),
        [(7, 24), (3, 16, 24)],
    ),
    "rms_norm_shrink": (rms_norm_shrink, [(3, 24), (24,), (5, 24)]),
    "rms_norm_shrink with residual": (
        lambda x, r, w, a, backend=None: rms_norm_shrink(x, w, a, r, backend=backend),
        [(3, 24), (3, 24), (24,), (5, 24)],
    ),
    "swiglu_shrink": (swiglu_shrink, [(3, 24), (3, 24), (5, 24)]),
    "lora_shrink": (lora_shrink, [(5, 24), (4, 24)]),
    "lora_linear": (
        lambda *tensors, backend=None: lora_linear(*tensors, 0.5, backend=backend),
        [(5, 24), (16, 24), (16,), (4, 24), (16, 4)],
    ),
    "lora_linear with magnitude and shrunk": (
        lambda x, weight, lora_b, magnitude, shrunk, backend=None: lora_linear(
            x,
            weight,
            None,
            None,
            lora_b,
            0.5,
            magnitude=magnitude,
            weight_norm=torch.ones_like(magnitude),
            shrunk=shrunk,
            backend=backend,
        ),
        [(5, 24), (16, 24), (16, 4), (16,), (5, 4)],
    ),
    "mla_absorbed": (
        lambda q, kv, backend=None: mla_absorbed(
            q, kv, d_latent=32, softmax_scale=0.25, return_lse=True, backend=backend
        ),
        [(2, 3, 4, 48), (2, 7, 48)],
    ),
    "mla_prefill": (
        lambda q, latent, k_rope, weight, backend=None: mla_prefill(
            q, latent, k_rope, weight, softmax_scale=0.25, return_lse=True, backend=backend
        ),
        [(2, 5, 4, 24), (2, 5, 32), (2, 5, 8), (4 * (16 + 8), 32)],
    ),
    "linear_cross_entropy": (_loss, [(4, 8), (24, 8)]),
    "linear_cross_entropy with every option": (
        functools.partial(_loss, label_smoothing=0.1, z_loss=0.01, softcap=5.0),
        [(4, 8), (24, 8), (24,), (3, 8), (24, 3)],
    ),
    "linear_cross_entropy of each token": (
        functools.partial(_loss, reduction="none", softcap=5.0),
        [(4, 8), (24, 8), (24,), (3, 8), (24, 3)],
    ),
    "rational_quadratic_spline": (
        functools.partial(rational_quadratic_spline, num_bins=3, tails="linear"),
        [(4, 3), (4, 3, 8)],
    ),
    "spline_coupling": (
        functools.partial(spline_coupling, num_bins=3, convention="zuko"),
        [(2, 3, 4), (2, 1, 8, 4)],
    ),
    "affine_coupling": (affine_coupling, [(2, 5, 2, 3), (2, 4, 2, 3)]),
    "affine_coupling with every option": (
        lambda x, shift, raw_scale, weight, log_det_in, backend=None: affine_coupling(
            x,
            (shift, raw_scale),
            mask="checkerboard",
            scale="tanh",
            scale_weight=weight,
            order="add_mul",
            log_det_in=log_det_in,
            recompute=False,
            backend=backend,
        ),
        [(2, 3, 2, 3), (2, 3, 2, 3), (2, 3, 2, 3), (3,), (2,)],
    ),
    "affine_coupling with a centred scale": (
        functools.partial(affine_coupling, center="channel", inverse=True),
        [(2, 5, 3), (2, 4, 3)],
    ),
    "affine_coupling_linear": (affine_coupling_linear, [(3, 6), (3, 5), (6, 5), (6,)]),
    "channel_affine": (channel_affine, [(2, 3, 4), (3,), (3,)]),
    "actnorm": (
        functools.partial(actnorm, order="add_mul", inverse=True),
        [(2, 3, 4), (3,), (3,)],
    ),
    "squeeze": (squeeze, [(2, 3, 4, 6)]),
    "sppf": (lambda x, backend=None: sppf(x, 3, backend=backend), [(2, 3, 5, 4)]),
    "roi_align": (
        lambda x, backend=None: roi_align(x, _rois(x), (2, 3), backend=backend),
        [(2, 3, 5, 6)],
    ),
    "attention with lse": (
        lambda q, k, v, backend=None: attention(q, k, v, return_lse=True, backend=backend),
        [(2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 8)],
    ),
    "spatial_pyramid_pool": (spatial_pyramid_pool, [(2, 3, 5, 6)]),
    "spatial_pyramid_pool of means": (
        functools.partial(spatial_pyramid_pool, mode="avg", flatten="channel_major"),
        [(2, 3, 5, 6)],
    ),
    "spatial_pyramid_pool of regions": (_regions, [(2, 3, 5, 6)]),
}
