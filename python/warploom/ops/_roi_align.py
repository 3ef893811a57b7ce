"""RoIAlign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from warploom._library import Differentiable, define
from warploom.ops._check import (
    check_device,
    check_dim,
    check_floating,
    fail,
    refuse_gradient,
)
from warploom.ops._fakes import dense, statistics_dtype
from warploom.reference import _roi_align as reference

#: Bins of an axis that the CUDA backward has room for.
_MOST_BINS = 64


def _why_not(*args: Any) -> list[str]:
    pooled_height, pooled_width = args[-5:-3]
    if max(pooled_height, pooled_width) <= _MOST_BINS:
        return []
    return [f"output_size ({pooled_height}, {pooled_width}) (takes up to {_MOST_BINS} a side)"]


_RULES = dict.fromkeys(("cuda", "simt", "simt_instrumented"), _why_not)
_OPTIONS = (
    "int pooled_height, int pooled_width, float spatial_scale, int sampling_ratio, bool aligned"
)

_roi_align_op = define(
    "roi_align",
    f"(Tensor x, Tensor rois, {_OPTIONS}) -> Tensor",
    reference=reference.roi_align,
    fake=lambda x, rois, height, width, *rest: x.new_empty(
        (rois.shape[0], x.shape[1], height, width)
    ),
    triton="spp.roi_align:roi_align",
    why_not=_RULES,
    sharding=("b C h w, k n -> k C p q",),
)
_roi_align_backward_op = define(
    "roi_align_backward",
    f"(Tensor grad_out, Tensor x, Tensor rois, {_OPTIONS}) -> Tensor",
    reference=reference.roi_align_backward,
    fake=lambda grad_out, x, *rest: dense(x),
    triton="spp.roi_align:roi_align_backward",
    why_not=_RULES,
    sharding=("k C p q, b C h w, k n -> b C h w",),
)

# Of x backward needs the shape: one element stands for all.
_roi_align = Differentiable(
    _roi_align_op,
    _roi_align_backward_op,
    save=lambda args, outputs: (args[0].new_zeros(()).expand(args[0].shape), args[1]),
    backward=lambda overload, saved, scalars, grads, needs: (
        overload(grads[0], *saved, *scalars),
        None,
    ),
)


def _as_tensor(x: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
    """rois as [K, 5], of a list's boxes with the place in the list in front."""
    if isinstance(rois, Tensor):
        check_floating("roi_align", "rois", rois)
        if rois.dim() != 2 or rois.shape[1] != 5:
            fail("roi_align", "rois", "shape (K, 5) or a list of (L, 4)", tuple(rois.shape))
        return rois
    if len(rois) != len(x):
        fail("roi_align", "rois", f"boxes of each of {len(x)} images", f"a list of {len(rois)}")
    parts = []
    for sample, boxes in enumerate(rois):
        check_floating("roi_align", f"rois[{sample}]", boxes)
        if boxes.dim() != 2 or boxes.shape[1] != 4:
            fail("roi_align", f"rois[{sample}]", "shape (L, 4)", tuple(boxes.shape))
        parts.append(torch.cat((torch.full_like(boxes[:, :1], sample), boxes), 1))
    return torch.cat(parts) if parts else x.new_empty(0, 5)


def roi_align(
    x: Tensor,
    rois: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    *,
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Each region of x cut into bins, each the mean of bilinear samples in a regular grid.

    A region reaches from (x1, y1) spatial_scale - offset to (x2, y2) spatial_scale - offset, offset = 0.5 if
    aligned, in coordinates whose integers are pixels; unless aligned, it is at least one pixel long. A bin
    has sampling_ratio samples along each axis, or ceil(its length), whose places divide it evenly. A sample
    beyond -1 or the size is 0, one beyond an outer pixel is that pixel. Regions are laid out in float64.

    Args:
        x: [B, C, H, W], of at least one channel and pixel; float32, float16, bfloat16 (float64 on `reference`
            and `cpu`).
        rois: [K, 5] of (place in the batch, x1, y1, x2, y2), or a list of B tensors [L, 4] of (x1, y1, x2,
            y2); of any floating dtype, read as float32 (float64 beside float64). A place that the batch does
            not have is an error on the CPU, and gives 0 on a GPU. A region that is no number gives 0.
        output_size: bins (ph, pw), or one number for both; at most 64 on `cuda`.
        spatial_scale: pixels of x for one of the boxes' coordinates.
        sampling_ratio: samples of a bin along an axis; 0 or less: as many as the bin has pixels, rounded up.
        aligned: pixels lie at their centres; False as in Detectron's first version.
        backend: one of `warploom.BACKENDS`; None chooses.

    Returns:
        [K, C, ph, pw] in x's dtype, contiguous; sums in float32, rounded once. Backward adds the regions of
        an image in their order, without atomics.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        RuntimeError: rois that need a gradient, of which there is none; the named backend cannot serve the
            call; forward-mode differentiation.

    Source: He et al., Mask R-CNN (arXiv:1703.06870), section 3; the details are torchvision.ops.roi_align's.
    """
    check_floating("roi_align", "x", x)
    check_dim("roi_align", "x", x, 4, "[B, C, H, W]")
    if 0 in x.shape[1:]:
        fail("roi_align", "x", "at least one channel and one pixel", f"shape {tuple(x.shape)}")
    boxes = _as_tensor(x, rois)
    check_device("roi_align", "rois", boxes, "x", x)
    refuse_gradient("roi_align", "rois", boxes, "regions are not differentiated")
    height, width = (output_size, output_size) if isinstance(output_size, int) else output_size
    if min(height, width) < 1:
        fail("roi_align", "output_size", "numbers >= 1", output_size)
    boxes = boxes.to(statistics_dtype(x))
    options = (height, width, float(spatial_scale), max(sampling_ratio, 0), aligned)
    out: Tensor = _roi_align(x, boxes, *options, backend=backend)
    return out
