"""Spatial pyramid pooling modules over `warploom.ops.spp`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from warploom.ops.spp import spatial_pyramid_pool, sppf

Level = int | tuple[int, int]


def _count_bins(levels: Sequence[Level]) -> int:
    sides = [(level, level) if isinstance(level, int) else level for level in levels]
    return sum(height * width for height, width in sides)


class SpatialPyramidPool(nn.Module):
    """Maps of any size to vectors of one length: pooled into n x n bins for each level n, flattened.

    He et al., "Spatial Pyramid Pooling in Deep Convolutional Networks" (arXiv:1406.4729), section 2.2. It
    has no parameters.

    Args:
        levels: bins along each side of the map, a level each, or (height, width) pairs.
        mode: "max" or "avg".
        bin_mode: which pixels a bin takes; see `spatial_pyramid_pool`.
        flatten: "level_major" or "channel_major".

    Attributes:
        bins: values of the output for each channel.
    """

    def __init__(
        self,
        levels: Sequence[Level] = (1, 2, 4),
        mode: str = "max",
        bin_mode: str = "adaptive",
        flatten: str = "level_major",
    ) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.bins = _count_bins(levels)
        self.mode = mode
        self.bin_mode = bin_mode
        self.flatten = flatten

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        """x [B, C, H, W] -> [B, C bins].

        Args:
            sizes: [B, 2], the height and width of each map of a padded batch; the padding is never read.
        """
        return spatial_pyramid_pool(
            x,
            self.levels,
            mode=self.mode,
            bin_mode=self.bin_mode,
            sizes=sizes,
            flatten=self.flatten,
        )

    def extra_repr(self) -> str:
        return (
            f"levels={self.levels}, mode={self.mode!r}, bin_mode={self.bin_mode!r}, "
            f"flatten={self.flatten!r}"
        )


class RoISpatialPyramidPool(nn.Module):
    """The pyramid of each region of interest: one vector of one length for each box.

    arXiv:1406.4729, section 4.1; a level's bins are those of torchvision's `roi_pool`.

    Args:
        levels: bins along each side of a region; the default is the paper's 50 bins.
        spatial_scale: what the boxes' coordinates are multiplied by, 1 / stride of the map.

    Attributes:
        bins: values of the output for each channel.
    """

    def __init__(self, levels: Sequence[Level] = (6, 3, 2, 1), spatial_scale: float = 1.0) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.bins = _count_bins(levels)
        self.spatial_scale = spatial_scale

    def forward(self, x: Tensor, rois: Tensor | list[Tensor]) -> Tensor:
        """x [B, C, H, W] -> [K, C bins].

        Args:
            rois: [K, 5], rows (index in the batch, x1, y1, x2, y2), or a list of B tensors [L, 4].
        """
        return spatial_pyramid_pool(
            x, self.levels, bin_mode="roi", rois=rois, spatial_scale=self.spatial_scale
        )

    def extra_repr(self) -> str:
        return f"levels={self.levels}, spatial_scale={self.spatial_scale}"


class _Conv(nn.Module):
    """SiLU(bn(conv(x))) with a 1 x 1 convolution: ultralytics' `Conv`, its names and constants."""

    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, 1, bias=False)
        self.bn = nn.BatchNorm2d(c2, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.bn(self.conv(x)))
        return out


class SPPF(nn.Module):
    """The YOLO family's pyramid: y = cv1(x); cv2 of y and of its 1, 2 and 3 poolings, concatenated.

    The stride is 1, so that k = 5 pools over 5, 9 and 13 pixels. Constructor and state dict are those of
    ultralytics' `SPPF`: cv1.conv, cv1.bn [c1 // 2], cv2.conv, cv2.bn [c2].

    Args:
        c1: channels of the input.
        c2: channels of the output.
        k: side of the pooling window, odd.
    """

    def __init__(self, c1: int, c2: int, k: int = 5) -> None:
        super().__init__()
        hidden = c1 // 2
        self.cv1 = _Conv(c1, hidden)
        self.cv2 = _Conv(4 * hidden, c2)
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        """x [B, c1, H, W] -> [B, c2, H, W]."""
        out: Tensor = self.cv2(sppf(self.cv1(x), self.k))
        return out

    def extra_repr(self) -> str:
        return f"k={self.k}"
