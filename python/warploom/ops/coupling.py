"""Family `coupling`: invertible layers of normalising flows, with the logarithm of their determinants."""

from __future__ import annotations

from warploom.ops._affine_coupling import PRESETS, affine_coupling, channel_slots
from warploom.ops._affine_coupling_linear import affine_coupling_linear
from warploom.ops._channel_affine import (
    actnorm,
    channel_affine,
    invertible_1x1,
    lu_weight,
)
from warploom.ops._spline import rational_quadratic_spline, spline_coupling
from warploom.ops._squeeze import squeeze

__all__ = [
    "PRESETS",
    "actnorm",
    "affine_coupling",
    "affine_coupling_linear",
    "channel_affine",
    "channel_slots",
    "invertible_1x1",
    "lu_weight",
    "rational_quadratic_spline",
    "spline_coupling",
    "squeeze",
]
