"""Family `spp`: pooling over pyramids of bins, of images and of regions of them."""

from __future__ import annotations

from warploom.ops._roi_align import roi_align
from warploom.ops._spatial_pyramid_pool import spatial_pyramid_pool
from warploom.ops._sppf import sppf

__all__ = ["roi_align", "spatial_pyramid_pool", "sppf"]
