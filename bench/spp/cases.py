"""Pyramids of bins, cascades of pools, and regions of interest."""

from __future__ import annotations

from bench.harness import Case
from bench.spp import pool_cases, roi_align_cases, sppf_cases


def cases(device: str) -> list[Case]:
    families = (pool_cases, sppf_cases, roi_align_cases)
    return [case for family in families for case in family.cases(device)]
