"""RoIAlign (He et al., Mask R-CNN, arXiv:1703.06870) in plain PyTorch, one region after the other."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class _Axis(NamedTuple):
    """Samples of all bins along an axis: the pixels beside each and their weights, 0 outside; and the samples
    of a bin."""

    low: Tensor
    high: Tensor
    low_weight: Tensor
    high_weight: Tensor
    samples: int

    def weights(self, size: int) -> Tensor:
        """[samples of all bins, size]"""
        dense = self.low_weight.new_zeros(len(self.low), size)
        dense.scatter_(1, self.low[:, None], self.low_weight[:, None])
        high = torch.zeros_like(dense).scatter_(1, self.high[:, None], self.high_weight[:, None])
        return dense + high


def _axis(
    first: float,
    last: float,
    bins: int,
    size: int,
    like: Tensor,
    scale: float,
    ratio: int,
    aligned: bool,
) -> _Axis:
    offset = 0.5 if aligned else 0.0
    start = first * scale - offset
    length = last * scale - offset - start
    length = length if aligned else max(length, 1.0)
    samples = 0
    if abs(start) + abs(length) < 2.0**50:
        samples = ratio if ratio > 0 else max(math.ceil(length / bins), 0)
    index = torch.arange(bins * samples, dtype=torch.float64, device=like.device)
    position = start + (index + 0.5) * (length / bins / max(samples, 1))
    inside = ((position >= -1) & (position <= size)).double()
    position = position.clamp(0, size - 1)
    low = position.floor()
    high_weight = (position - low) * inside
    low_weight = inside - high_weight
    pixel = low.long()
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return _Axis(
        pixel,
        (pixel + 1).clamp(max=size - 1),
        low_weight.to(dtype),
        high_weight.to(dtype),
        samples,
    )


def _axes(
    roi: list[float],
    x: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> tuple[_Axis, _Axis]:
    _, x1, y1, x2, y2 = roi
    height, width = x.shape[2:]
    options = (spatial_scale, sampling_ratio, aligned)
    rows = _axis(y1, y2, pooled_height, height, x, *options)
    return rows, _axis(x1, x2, pooled_width, width, x, *options)


def roi_align(
    x: Tensor,
    rois: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """x [B, C, H, W], rois [K, 5] (sample, x1, y1, x2, y2) -> [K, C, pooled_height, pooled_width].

    A bin is the mean of bilinear samples in a regular grid, sampling_ratio^2 of them, or one a pixel at
    least; samples beyond -1 and the size are 0, those beyond the outer pixels are clamped to them.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = x.new_zeros(len(rois), x.shape[1], pooled_height, pooled_width, dtype=wide)
    options = (pooled_height, pooled_width, spatial_scale, sampling_ratio, aligned)
    for index, roi in enumerate(rois.tolist()):
        rows, columns = _axes(roi, x, *options)
        if rows.samples == 0 or columns.samples == 0:
            continue
        plane = x[int(roi[0])].to(wide)
        low, high = (
            plane[:, pixels][:, :, columns.low] * columns.low_weight
            + plane[:, pixels][:, :, columns.high] * columns.high_weight
            for pixels in (rows.low, rows.high)
        )
        samples = low * rows.low_weight[:, None] + high * rows.high_weight[:, None]
        bins = samples.unflatten(2, (pooled_width, -1)).unflatten(1, (pooled_height, -1))
        out[index] = bins.mean((2, 4))
    return out.to(x.dtype)


def roi_align_backward(
    grad_out: Tensor,
    x: Tensor,
    rois: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """The gradient of x, of which only the shape is used: regions are added in their order."""
    wide = torch.float64 if grad_out.dtype == torch.float64 else torch.float32
    grad_x = grad_out.new_zeros(x.shape, dtype=wide)
    options = (pooled_height, pooled_width, spatial_scale, sampling_ratio, aligned)
    for index, roi in enumerate(rois.tolist()):
        rows, columns = _axes(roi, x, *options)
        if rows.samples == 0 or columns.samples == 0:
            continue
        height, width = x.shape[2:]
        down = rows.weights(height).unflatten(0, (pooled_height, -1)).mean(1)
        across = columns.weights(width).unflatten(0, (pooled_width, -1)).mean(1)
        grad_x[int(roi[0])] += down.T @ grad_out[index].to(wide) @ across
    return grad_x.to(grad_out.dtype)
