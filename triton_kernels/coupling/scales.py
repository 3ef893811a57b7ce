"""The maps u -> log s of affine couplings, and their slopes, float32."""

from __future__ import annotations

import triton
import triton.language as tl
from warploom.triton_kernels.attention.scoring import tanh

# 2 / pi, as FrEIA rounds it.
_ATAN_SLOPE: tl.constexpr = tl.constexpr(0.636)
_HALF_PI: tl.constexpr = tl.constexpr(1.5707963267948966)

# atan(x) = x P(x^2) for |x| <= 1: Abramowitz and Stegun 4.4.49, error 2e-8.
_A0: tl.constexpr = tl.constexpr(-0.3333314528)
_A1: tl.constexpr = tl.constexpr(0.1999355085)
_A2: tl.constexpr = tl.constexpr(-0.1420889944)
_A3: tl.constexpr = tl.constexpr(0.1065626393)
_A4: tl.constexpr = tl.constexpr(-0.0752896400)
_A5: tl.constexpr = tl.constexpr(0.0429096138)
_A6: tl.constexpr = tl.constexpr(-0.0161657367)
_A7: tl.constexpr = tl.constexpr(0.0028662257)


@triton.jit
def _atan(x):
    size = tl.abs(x)
    small = tl.where(size > 1.0, 1.0 / tl.maximum(size, 1.0), size)
    square = small * small
    polynomial = ((square * _A7 + _A6) * square + _A5) * square + _A4
    polynomial = (((polynomial * square + _A3) * square + _A2) * square + _A1) * square + _A0
    angle = small + small * square * polynomial
    angle = tl.where(size > 1.0, _HALF_PI - angle, angle)
    return tl.where(x < 0.0, -angle, angle)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _log_sigmoid(x):
    """Finite where the sigmoid itself is 0."""
    power = tl.exp(-tl.abs(x))
    rounded = 1.0 + power
    # log(1 + power): the quotient takes back what the sum has rounded off.
    kept = tl.where(rounded == 1.0, 1.0, rounded - 1.0)
    rest = tl.where(rounded == 1.0, power, tl.log(rounded) * (power / kept))
    return tl.where(x > 0.0, 0.0, x) - rest


@triton.jit
def log_scale(u, clamp, eps, SCALE: tl.constexpr, HAS_EPS: tl.constexpr):
    """L(u) and dL / du of every scale but the additive one, whose L is 0.

    exp: u; tanh: clamp tanh(u); atan: 0.636 clamp atan(u); centered_sigmoid: clamp (2 sigmoid(u) - 1);
    sigmoid: log(sigmoid(u + 2) + eps); softclip: u / (1 + |u| / clamp), clamp the bound |log c|.
    """
    if SCALE == "exp":
        return u, tl.full(u.shape, 1.0, tl.float32)
    elif SCALE == "tanh":
        value = tanh(u)
        return value * clamp, (1.0 - value * value) * clamp
    elif SCALE == "atan":
        return _atan(u) * (clamp * _ATAN_SLOPE), clamp * _ATAN_SLOPE / (1.0 + u * u)
    elif SCALE == "centered_sigmoid":
        # 2 sigmoid(u) - 1 without its cancellation.
        value = tanh(u * 0.5)
        return value * clamp, (1.0 - value * value) * (0.5 * clamp)
    elif SCALE == "sigmoid":
        rest = _sigmoid(-2.0 - u)
        if HAS_EPS:
            scale = _sigmoid(u + 2.0)
            return tl.log(scale + eps), scale * rest / (scale + eps)
        else:
            return _log_sigmoid(u + 2.0), rest
    else:
        tl.static_assert(SCALE == "softclip", "scale: none of the coupling's")
        divisor = 1.0 + tl.abs(u) / clamp
        return u / divisor, 1.0 / (divisor * divisor)
