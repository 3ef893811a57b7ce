"""Couplings, the last layer of a conditioner with its coupling, a scale per channel, squeezing, splines."""

from __future__ import annotations

from bench.coupling import (
    affine_cases,
    affine_coupling_linear_cases,
    channel_affine_cases,
    spline_cases,
    squeeze_cases,
)
from bench.harness import Case


def cases(device: str) -> list[Case]:
    families = (
        affine_cases,
        affine_coupling_linear_cases,
        channel_affine_cases,
        spline_cases,
        squeeze_cases,
    )
    return [case for family in families for case in family.cases(device)]
