"""The cascade of max pools of stride 1 (SPPF of YOLOv5, Jocher 2020) in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

#: Pools, each of what the one before returned.
STAGES = 3


def _channels_second(x: Tensor, channels_last: bool) -> Tensor:
    return x.permute(0, 3, 1, 2) if channels_last else x


def _dense(x: Tensor, channels_last: bool) -> Tensor:
    return (x.permute(0, 2, 3, 1) if channels_last else x).contiguous()


def sppf(x: Tensor, kernel_size: int, channels_last: bool) -> Tensor:
    """x [B, C, H, W], or [B, H, W, C] if channels_last -> the same with 4 C channels: x, p(x), p(p(x)) and
    p(p(p(x))), p(y) the maxima of windows of kernel_size^2 pixels around each, cut off at the borders."""
    slices = [_channels_second(x, channels_last)]
    for _ in range(STAGES):
        slices.append(F.max_pool2d(slices[-1], kernel_size, 1, kernel_size // 2))
    return _dense(torch.cat(slices, 1), channels_last)


def sppf_backward(grad_out: Tensor, out: Tensor, kernel_size: int, channels_last: bool) -> Tensor:
    """The gradient of x: from the last pool to the first, each pixel's gradient goes where its maximum came
    from, and is added to the gradient that the output had there."""
    wide = torch.float64 if out.dtype == torch.float64 else torch.float32
    grads = _channels_second(grad_out.to(wide), channels_last).chunk(STAGES + 1, 1)
    slices = _channels_second(out.to(wide), channels_last).chunk(STAGES + 1, 1)
    grad = grads[STAGES]
    size, stride, padding = [kernel_size] * 2, [1, 1], [kernel_size // 2] * 2
    for stage in reversed(range(STAGES)):
        given = slices[stage].contiguous()
        _, indices = F.max_pool2d(given, size, stride, padding, return_indices=True)
        pooled = torch.ops.aten.max_pool2d_with_indices_backward(
            grad.contiguous(), given, size, stride, padding, [1, 1], False, indices
        )
        grad = grads[stage] + pooled
    return _dense(grad.to(out.dtype), channels_last)
