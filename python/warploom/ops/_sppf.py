"""The cascade of max pools behind the YOLO family's SPPF."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from warploom._library import Differentiable, define
from warploom.ops._check import check_dim, check_floating, fail
from warploom.reference import _sppf as reference

#: Of the CUDA kernels, whose tiles hold the windows of all stages.
_LARGEST_KERNEL_SIZE = 19


def _why_not(*args: Any) -> list[str]:
    kernel_size = args[-2]
    if kernel_size <= _LARGEST_KERNEL_SIZE:
        return []
    return [f"kernel_size {kernel_size} (takes up to {_LARGEST_KERNEL_SIZE})"]


def _with_channels(x: Tensor, channels: int, channels_last: bool) -> Tensor:
    batch, *rest = x.shape
    inner = (*rest[:-1], channels) if channels_last else (channels, *rest[1:])
    return x.new_empty((batch, *inner))


def _fake(x: Tensor, kernel_size: int, channels_last: bool) -> Tensor:
    channels = x.shape[3 if channels_last else 1]
    return _with_channels(x, (reference.STAGES + 1) * channels, channels_last)


def _backward_fake(grad_out: Tensor, out: Tensor, kernel_size: int, channels_last: bool) -> Tensor:
    channels = out.shape[3 if channels_last else 1]
    return _with_channels(out, channels // (reference.STAGES + 1), channels_last)


_RULES = dict.fromkeys(("cuda", "simt", "simt_instrumented"), _why_not)

_sppf_op = define(
    "sppf",
    "(Tensor x, int kernel_size, bool channels_last) -> Tensor",
    reference=reference.sppf,
    fake=_fake,
    triton="spp.sppf:sppf",
    why_not=_RULES,
    sharding=("B c h w -> B d h w",),
)
_sppf_backward_op = define(
    "sppf_backward",
    "(Tensor grad_out, Tensor out, int kernel_size, bool channels_last) -> Tensor",
    reference=reference.sppf_backward,
    fake=_backward_fake,
    triton="spp.sppf:sppf_backward",
    why_not=_RULES,
    sharding=("B d h w, B d h w -> B c h w",),
)

# The output itself is what backward needs: it holds what each pool was given, and whoever reads it next keeps
# it anyway. The places of maxima would be written in every training step and read once.
_sppf = Differentiable(
    _sppf_op,
    _sppf_backward_op,
    save=lambda args, outputs: (outputs[0],),
    backward=lambda overload, saved, scalars, grads, needs: (overload(grads[0], *saved, *scalars),),
)


def sppf(x: Tensor, kernel_size: int = 5, *, backend: str | None = None) -> Tensor:
    """out = concatenation of x, p(x), p(p(x)) and p(p(p(x))) over the channels.

    p(y) = max_pool2d(y, kernel_size, stride=1, padding=kernel_size // 2). The same bits as PyTorch's cascade:
    a NaN wins, of NaNs the last in row-major order, of equal numbers the first.

    Args:
        x: [B, C, H, W], of at least one channel and pixel; float32, float16, bfloat16 (float64 on `reference`
            and `cpu`); contiguous or channels-last, others are copied.
        kernel_size: odd, at least 3; at most 19 on `cuda`.
        backend: one of `warploom.BACKENDS`; None chooses.

    Returns:
        [B, 4 C, H, W] in x's dtype; channels-last if x is, else contiguous. The gradient goes where each
        maximum came from, as PyTorch's does, with float32 sums rounded once; the output is kept for it.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        RuntimeError: the named backend cannot serve the call; forward-mode differentiation.

    Source: He et al., Spatial Pyramid Pooling in Deep Convolutional Networks (arXiv:1406.4729); the cascade
    is YOLOv5's (Jocher et al. 2020): its pools are those of 5, 9 and 13 pixels.
    """
    check_floating("sppf", "x", x)
    check_dim("sppf", "x", x, 4, "[B, C, H, W]")
    if 0 in x.shape[1:]:
        fail("sppf", "x", "at least one channel and one pixel", f"shape {tuple(x.shape)}")
    if kernel_size < 3 or kernel_size % 2 == 0:
        fail("sppf", "kernel_size", "an odd number >= 3", kernel_size)
    # Between the two layouts stand tensors of one pixel, which are both.
    if x.stride(1) == 1 and x.stride(3) != 1:
        last: Tensor = _sppf(x.permute(0, 2, 3, 1), kernel_size, True, backend=backend)
        return last.permute(0, 3, 1, 2)
    out: Tensor = _sppf(x, kernel_size, False, backend=backend)
    return out
