"""Where the samples of RoIAlign lie: the tables of a call.

In float64: how many samples a bin has and which of them lie outside does not depend on rounding.
"""

from __future__ import annotations

import torch


class _Axis:
    """Along one axis: `of_bins` [K, bins, 4] and `reach` [K, 2], parts of those of `Samples`."""

    def __init__(
        self,
        first: torch.Tensor,
        last: torch.Tensor,
        exists: torch.Tensor,
        bins: int,
        size: int,
        spatial_scale: float,
        sampling_ratio: int,
        aligned: bool,
    ) -> None:
        """first, last: a region's coordinates [K]."""
        offset = 0.5 if aligned else 0.0
        start = first.double() * spatial_scale - offset
        length = last.double() * spatial_scale - offset - start
        length = length if aligned else length.clamp(min=1.0)
        # Beyond, samples could not be counted; of what is not a number there are none either.
        is_usable = exists & (start.abs() + length.abs() < 2.0**50)
        start, length = start.where(is_usable, 0.0)[:, None], length.where(is_usable, 0.0)[:, None]
        # By a tensor: on a GPU PyTorch multiplies by the reciprocal of a number.
        bin_length = length / torch.full_like(length, bins)
        samples = bin_length.ceil().clamp(min=0.0)
        if sampling_ratio > 0:
            samples = torch.full_like(samples, sampling_ratio)
        samples = samples * is_usable[:, None]
        step = bin_length / samples.clamp(min=1.0)
        base = start + torch.arange(bins, device=first.device) * bin_length
        # Of samples that may lie in the plane; where they do not rise, of all.
        begin = ((-1.0 - base) / step - 1.5).floor().clamp(min=0.0).where(step > 0.0, 0.0)
        end = ((size - base) / step + 1.5).ceil().minimum(samples).where(step > 0.0, samples)
        place = base + (begin + 0.5) * step
        count = (end - begin).clamp(min=0.0)
        share = 1.0 / samples.clamp(min=1.0)
        self.of_bins = torch.stack(torch.broadcast_tensors(place, step, count, share), dim=2)
        ends = torch.cat((start, start + length), dim=1)
        reach = torch.stack((ends.amin(1).floor(), ends.amax(1).floor() + 2.0), dim=1)
        lowest = torch.tensor([0.0, 1.0], dtype=torch.float64, device=first.device)
        self.reach = reach.maximum(lowest).minimum(lowest + (size - 1)).int()


class Samples:
    """The tables of a call.

    regions [K, 3] int32: image, or -1 where there is none, first row and last row + 1 of what may have a part
    in it. of_bins [K, bins, 4] float64: the place of a bin's first sample that may lie in the plane, the
    step to the next, how many these are, and a sample's share of the mean; the bins of the rows, then those
    of the columns.
    """

    def __init__(
        self,
        x: torch.Tensor,
        rois: torch.Tensor,
        pooled_height: int,
        pooled_width: int,
        *options: float,
    ) -> None:
        image, x1, y1, x2, y2 = rois.unbind(1)
        exists = (image >= 0) & (image < x.shape[0])
        rows = _Axis(y1, y2, exists, pooled_height, x.shape[2], *options)
        columns = _Axis(x1, x2, exists, pooled_width, x.shape[3], *options)
        image = image.where(exists, -1.0).int()[:, None]
        self.regions = torch.cat((image, rows.reach), dim=1)
        self.of_bins = torch.cat((rows.of_bins, columns.of_bins), dim=1)
