"""Spatial pyramid pooling: all levels of bins in one read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from warploom._library import Differentiable, define
from warploom.ops._check import (
    check_choice,
    check_device,
    check_dim,
    check_floating,
    check_shape,
    check_tensor,
    fail,
)
from warploom.reference import spp as reference

_OP = "spatial_pyramid_pool"
#: Of all levels along one axis: what the kernels keep of a band of rows is proportional to them.
MAX_BINS = 32


def _fake(
    x: Tensor,
    regions: Tensor | None,
    offsets: Tensor | None,
    levels: Sequence[int],
    mode: str,
    bin_mode: str,
    channel_major: bool,
    needs_index: bool,
) -> tuple[Tensor, Tensor]:
    count = x.shape[0] if regions is None else regions.shape[0]
    shape = (count, x.shape[1] * sum(h * w for h, w in zip(levels[::2], levels[1::2])))
    index = x.new_empty(shape if needs_index else (0,), dtype=reference.index_dtype(x))
    return x.new_empty(shape), index


def _backward_fake(grad_out: Tensor, x: Tensor, *rest: object) -> Tensor:
    layout = torch.channels_last if reference.is_channels_last(x) else torch.contiguous_format
    return torch.empty_like(x, memory_format=layout)


_spatial_pyramid_pool_op = define(
    _OP,
    "(Tensor x, Tensor? regions, Tensor? offsets, int[] levels, str mode, str bin_mode,"
    " bool channel_major, bool needs_index) -> (Tensor out, Tensor argmax)",
    reference=reference.spatial_pyramid_pool,
    fake=_fake,
    triton="spp.spatial_pyramid_pool:spatial_pyramid_pool",
    sharding=("B c h w, -, - -> B k, B k if needs_index",),
)
_spatial_pyramid_pool_backward_op = define(
    f"{_OP}_backward",
    "(Tensor grad_out, Tensor x, Tensor? argmax, Tensor? regions, Tensor? offsets, int[] levels,"
    " str mode, str bin_mode, bool channel_major) -> Tensor",
    reference=reference.spatial_pyramid_pool_backward,
    fake=_backward_fake,
    triton="spp.spatial_pyramid_pool:spatial_pyramid_pool_backward",
    sharding=("B k, B c h w, B k, -, - -> B c h w",),
)
_spatial_pyramid_pool = Differentiable(
    _spatial_pyramid_pool_op,
    _spatial_pyramid_pool_backward_op,
    save=lambda args, outputs: (args[0], outputs[1] if args[4] == "max" else None, *args[1:3]),
    backward=lambda overload, saved, scalars, grads, needs: (
        overload(grads[0], *saved, *scalars[:-1]),
        None,
        None,
    ),
    constants=(1,),
)


def _flat_levels(levels: Sequence[int | tuple[int, int]]) -> list[int]:
    """Height and width of each level, one after the other."""
    flat: list[int] = []
    for level in levels:
        flat += (level, level) if isinstance(level, int) else level
    if not flat or len(flat) % 2 or min(flat) < 1:
        fail(_OP, "levels", "numbers >= 1 or (height, width) pairs, at least one", levels)
    if max(sum(flat[::2]), sum(flat[1::2])) > MAX_BINS:
        fail(_OP, "levels", f"at most {MAX_BINS} bins of all levels along an axis", levels)
    return flat


def _check_integers(argument: str, value: object, x: Tensor, shape: tuple[int, ...]) -> None:
    check_tensor(_OP, argument, value)
    assert isinstance(value, Tensor)
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{_OP}: {argument}: expected dtype int32 or int64, "
            f"got {str(value.dtype).removeprefix('torch.')}"
        )
    check_device(_OP, argument, value, "x", x)
    check_shape(_OP, argument, value, shape)


def _whole_images(sizes: Tensor) -> Tensor:
    """Regions [B, 7] of images of the given sizes [B, 2]."""
    sizes = sizes.to(torch.int32)
    image = torch.arange(sizes.shape[0], dtype=torch.int32, device=sizes.device)[:, None]
    return torch.cat((image, torch.zeros_like(sizes), sizes, sizes), dim=1)


def _round_half_away(value: Tensor) -> Tensor:
    whole = value.trunc()
    return whole + value.sign() * ((value - whole).abs() >= 0.5)


def roi_rows(op: str, rois: Tensor | Sequence[Tensor], x: Tensor) -> Tensor:
    """rois in either of torchvision's forms as [K, 5]: image, x1, y1, x2, y2; in float32, or float64."""
    if isinstance(rois, Tensor):
        check_floating(op, "rois", rois)
        check_dim(op, "rois", rois, 2, "[K, 5]")
        rows = rois
    else:
        if len(rois) != x.shape[0]:
            fail(op, "rois", f"one tensor [L, 4] for each of {x.shape[0]} images", len(rois))
        parts = [x.new_empty(0, 5, dtype=torch.float32)]
        for index, boxes in enumerate(rois):
            check_floating(op, "rois", boxes)
            check_dim(op, "rois", boxes, 2, "[L, 4]")
            parts.append(torch.cat((torch.full_like(boxes[:, :1], index), boxes), dim=1))
        rows = torch.cat(parts)
    check_shape(op, "rois", rows, (rows.shape[0], 5))
    check_device(op, "rois", rows, "x", x)
    return rows if rows.dtype == torch.float64 else rows.float()


def _regions_of_interest(rois: Tensor | Sequence[Tensor], x: Tensor, scale: float) -> Tensor:
    """Regions [K, 7] by the rule of torchvision's roi_pool: both corners rounded, and inside."""
    rows = roi_rows(_OP, rois, x).detach()
    # Beyond any plane, and far from where int32 ends.
    corners = _round_half_away((rows[:, 1:] * scale).clamp(-(2.0**28), 2.0**28)).to(torch.int32)
    left, top, right, bottom = corners.unbind(1)
    height, width = (
        (end - start + 1).clamp(min=1) for start, end in ((top, bottom), (left, right))
    )
    whole = (torch.full_like(top, size) for size in x.shape[2:])
    return torch.stack((rows[:, 0].to(torch.int32), top, left, height, width, *whole), dim=1)


def spatial_pyramid_pool(
    x: Tensor,
    levels: Sequence[int | tuple[int, int]] = (1, 2, 4),
    *,
    mode: str = "max",
    bin_mode: str | None = None,
    sizes: Tensor | None = None,
    offsets: Tensor | None = None,
    rois: Tensor | Sequence[Tensor] | None = None,
    spatial_scale: float = 1.0,
    flatten: str = "level_major",
    backend: str | None = None,
) -> Tensor:
    """The maxima or means of the bins of a pyramid of grids over each image, or each region of interest.

    Level n has n x n bins (level (h, w): h x w), bin i of n along an axis of `a` pixels being the window

    - "adaptive": floor(i a / n) to ceil((i + 1) a / n), as PyTorch's adaptive pools have it;
    - "caffe": k = ceil(a / n) pixels from i k - p, p = floor((k n - a + 1) / 2), cut to the image, as Caffe's
      SPPLayer has it; a mean divides by the window's size before the cut, but for what lies p beyond the end;
    - "sppnet": ceil(a / n) pixels from i floor(a / n), as in the paper;
    - "roi": floor(i (a / n)) to ceil((i + 1) (a / n)) in float32, cut to the image, as torchvision's roi_pool
      has it.

    A maximum is PyTorch's bit for bit: NaN if there is one, the sign of a zero aside. Its gradient goes to
    the first of equal pixels, of NaN to the last. A mean is summed in float32 and rounded once, and its
    gradient goes to all pixels alike. A window without pixels gives 0, and its gradient goes nowhere. Both
    directions add in a fixed order: two runs give the same bits, also where regions overlap.

    Args:
        x: [B, C, H, W] of float32, float16 or bfloat16 (float64 on `reference` and `cpu`), contiguous or
            channels-last, neither is copied; with `offsets` [N, C], image b in rows offsets[b] to
            offsets[b + 1], pixel after pixel.
        levels: numbers of bins, at most 32 of all levels along an axis.
        mode: "max" or "avg".
        bin_mode: one of the above; None is "adaptive", with `rois` "roi", which then is the only one.
        sizes: [B, 2] int32 or int64, the height and width of each image; without `offsets` image b is
            x[b, :, :height, :width], and the rest is not read.
        offsets: [B + 1] int32 or int64, rising from 0 to N.
        rois: [K, 5] (image, x1, y1, x2, y2), or a list of one [L, 4] for each image; not beside `sizes`. A
            region begins and ends at the pixels to which its corners times `spatial_scale` round, half away
            from 0, and has at least one of them.
        spatial_scale: pixels of x for one unit of `rois`.
        flatten: "level_major": level after level, channel after channel, as `torch.cat` of each level's pool,
            flattened, has it; "channel_major": channel after channel, level after level.
        backend: one of `warploom.BACKENDS`; None chooses.

    Returns:
        [B, C * bins], or [K, C * bins] of the regions, in x's dtype; bins = sum(h * w) over the levels.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        RuntimeError: sizes, offsets or images of regions beyond x (on the CPU; a GPU takes what there is of
            them); the named backend cannot serve the call; forward-mode or second derivatives.

    Source: He, Zhang, Ren, Sun, Spatial pyramid pooling in deep convolutional networks (2014), section 2.3;
    Girshick, Fast R-CNN (2015), section 2.1.
    """
    check_floating(_OP, "x", x)
    flat = _flat_levels(levels)
    check_choice(_OP, "mode", mode, ("max", "avg"))
    check_choice(_OP, "flatten", flatten, ("level_major", "channel_major"))
    if bin_mode is None:
        bin_mode = "adaptive" if rois is None else "roi"
    check_choice(_OP, "bin_mode", bin_mode, ("adaptive", "caffe", "sppnet", "roi"))
    regions = None
    if rois is not None:
        if bin_mode != "roi":
            fail(_OP, "bin_mode", "'roi' beside rois", repr(bin_mode))
        if sizes is not None or offsets is not None:
            fail(_OP, "sizes and offsets", "None beside rois", "a tensor")
        check_dim(_OP, "x", x, 4, "[B, C, H, W]")
        regions = _regions_of_interest(rois, x, spatial_scale)
    elif offsets is not None:
        check_dim(_OP, "x", x, 2, "[N, C] beside offsets")
        check_tensor(_OP, "sizes", sizes)
        assert sizes is not None
        _check_integers("offsets", offsets, x, (sizes.shape[0] + 1,))
        _check_integers("sizes", sizes, x, (sizes.shape[0], 2))
        offsets, regions = offsets.to(torch.int32), _whole_images(sizes)
    else:
        check_dim(_OP, "x", x, 4, "[B, C, H, W]")
        if sizes is not None:
            _check_integers("sizes", sizes, x, (x.shape[0], 2))
            regions = _whole_images(sizes)
    needs_index = mode == "max" and torch.is_grad_enabled() and x.requires_grad
    channel_major = flatten == "channel_major"
    out: Tensor = _spatial_pyramid_pool(
        x, regions, offsets, flat, mode, bin_mode, channel_major, needs_index, backend=backend
    )[0]
    return out
