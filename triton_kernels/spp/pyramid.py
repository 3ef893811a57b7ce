"""The tables of a pyramid of bins over regions: windows, and the cuts between cells."""

from __future__ import annotations

import torch

_PACKED_PIXELS = 512


def _axis_windows(
    bin_mode: str,
    bins: int,
    start: torch.Tensor,
    extent: torch.Tensor,
    limit: torch.Tensor,
) -> torch.Tensor:
    """Begin, end and span [R, bins, 3] of the windows over [start, start + extent), cut to [0, limit)."""
    index = torch.arange(bins, device=start.device)
    start, extent, limit = (value[:, None] for value in (start, extent, limit))
    most = (extent + bins - 1) // bins
    span = None
    if bin_mode == "adaptive":
        begin, end = index * extent // bins, ((index + 1) * extent + bins - 1) // bins
    elif bin_mode == "caffe":
        padding = (most * bins - extent + 1) // 2
        begin = index * most - padding
        end = torch.minimum(begin + most, extent + padding)
        span = end - begin
    elif bin_mode == "sppnet":
        begin = index * (extent // bins)
        end = begin + most
    else:
        # In float32, as torchvision's roi_pool divides: rounding moves some bins. By a tensor: on a
        # GPU PyTorch multiplies by the reciprocal of a number.
        size = extent.float() / torch.full_like(extent, bins, dtype=torch.float32)
        begin, end = (index * size).floor().long(), ((index + 1) * size).ceil().long()
    begin, end = (torch.minimum((start + place).clamp(min=0), limit) for place in (begin, end))
    return torch.stack((begin, end, end - begin if span is None else span), dim=-1)


def _cuts(windows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The ends of all windows [R, C], rising, each once and then the last; and the gaps between them [R]."""
    ends = torch.cat([window[..., :2].flatten(1) for window in windows], dim=1).sort(dim=1).values
    is_repeated = torch.zeros_like(ends, dtype=torch.bool)
    is_repeated[:, 1:] = ends[:, 1:] == ends[:, :-1]
    cuts = torch.where(is_repeated, ends[:, -1:], ends).sort(dim=1).values
    return cuts, (~is_repeated).sum(1) - 1


class Pyramid:
    """The tables of a call: where images lie, what cuts them, and the windows of the bins."""

    def __init__(
        self,
        x: torch.Tensor,
        regions: torch.Tensor | None,
        offsets: torch.Tensor | None,
        levels: list[int],
        bin_mode: str,
        channel_major: bool,
    ) -> None:
        """x: the images, or their gradient: its strides count."""
        self.listed = regions is not None
        device = x.device
        if regions is None:
            image = torch.arange(x.shape[0], device=device)
            top = left = torch.zeros_like(image)
            rows, columns = (torch.full_like(image, size) for size in x.shape[2:])
            height, width = rows, columns
        else:
            image, top, left, rows, columns, height, width = regions.long().unbind(1)
        if offsets is None:
            self.pixel_stride = x.stride(3)
            height, width = height.clamp(max=x.shape[2]), width.clamp(max=x.shape[3])
            pitch = torch.full_like(image, x.shape[3])
            # A region of an image that is not there has no pixels.
            height = height.masked_fill((image < 0) | (image >= x.shape[0]), 0)
            first, row_stride = image * x.stride(0), torch.full_like(image, x.stride(2))
            count = x.shape[0]
            starts = torch.arange(count, device=device) * x.stride(0)
            sizes = torch.full_like(starts, x.shape[2] * x.shape[3])
            self.typical_pixels = x.shape[2] * x.shape[3]
        else:
            self.pixel_stride = x.stride(0)
            bounds = offsets.long()
            starts, sizes = bounds[:-1] * x.stride(0), bounds.diff()
            pitch = width
            # Rows that the image does not have are cut off.
            height = torch.minimum(height, sizes[image] // width.clamp(min=1))
            first, row_stride = starts[image], width * x.stride(0)
            # Their sizes are on the device: programs take further tiles by a stride.
            self.typical_pixels = _PACKED_PIXELS
        self.planes = torch.stack((starts, sizes), dim=1).contiguous()
        self.images = torch.stack((first, row_stride, pitch), dim=1).contiguous()
        down = [_axis_windows(bin_mode, bins, top, rows, height).int() for bins in levels[::2]]
        across = [
            _axis_windows(bin_mode, bins, left, columns, width).int() for bins in levels[1::2]
        ]
        self.row_cuts, bands = _cuts(down)
        reach = self.row_cuts[:, [0, -1]] * pitch[:, None]
        self.regions = torch.cat((torch.stack((image, pitch), dim=1), reach), dim=1)
        self.column_cuts, cells = _cuts(across)
        self.counts = torch.stack((bands, cells), dim=1).int()
        tables, places = [], []
        counts = [h * w for h, w in zip(levels[::2], levels[1::2])]
        self.bins = sum(counts)
        before = 0
        for vertical, horizontal, count in zip(down, across, counts):
            vertical = vertical[:, :, None].expand(-1, -1, horizontal.shape[1], -1)
            horizontal = horizontal[:, None].expand(-1, vertical.shape[1], -1, -1)
            area = (vertical[..., 2:] * horizontal[..., 2:]).clamp(min=1)
            table = torch.cat((vertical[..., :2], horizontal[..., :2], area), dim=-1)
            tables.append(table.flatten(1, 2))
            first_place = before if channel_major else before * x.shape[1]
            distance = self.bins if channel_major else count
            places += [(first_place + index, distance) for index in range(count)]
            before += count
        self.windows = torch.cat(tables, dim=1).contiguous()
        self.places = torch.tensor(places, dtype=torch.int32, device=device)
