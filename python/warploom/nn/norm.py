"""Normalisation modules: torch's constructors and state dicts over `warploom.ops.norm`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from warploom.ops.norm import layer_norm, rms_norm


def _flatten_normalized(op: str, x: Tensor, normalized_shape: tuple[int, ...]) -> Tensor:
    """[..., *normalized_shape] -> [..., N], so that the op normalises over one dimension."""
    count = len(normalized_shape)
    if tuple(x.shape[x.dim() - count :]) != tuple(normalized_shape) or x.dim() < count:
        raise ValueError(
            f"{op}: x: expected a shape ending in {tuple(normalized_shape)}, got {tuple(x.shape)}"
        )
    return x if count == 1 else x.flatten(-count)


def _unflatten_normalized(x: Tensor, shape: torch.Size) -> Tensor:
    """The inverse; x itself where nothing was flattened: FSDP warns of views at the end of a layer."""
    return x if x.shape == shape else x.view(shape)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` whose forward is one op call, with the residual addition fused into it.

    Constructor and state dict are torch's; `eps=None` means the machine epsilon of the input's
    dtype. The weight may be of the input's dtype or float32.
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalises `x`, or `x + residual`.

        Args:
            x: [..., *normalized_shape], float32, float16 or bfloat16 (float64 on the CPU).
            residual: x's shape and dtype, or None.

        Returns:
            out, of x's shape and dtype; with a residual the pair (out, x + residual).
        """
        shape = x.shape
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        x = _flatten_normalized("RMSNorm", x, self.normalized_shape)
        weight = None if self.weight is None else self.weight.flatten()
        if residual is None:
            return _unflatten_normalized(rms_norm(x, weight, eps=eps), shape)
        if residual.shape != shape:
            raise ValueError(
                f"RMSNorm: residual: expected shape {tuple(shape)}, got {tuple(residual.shape)}"
            )
        out, total = rms_norm(x, weight, eps=eps, residual=residual.reshape(x.shape))
        return _unflatten_normalized(out, shape), _unflatten_normalized(total, shape)


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` whose forward is one op call; constructor and state dict are torch's."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalises x [..., *normalized_shape]; the result has its shape and dtype."""
        shape = x.shape
        x = _flatten_normalized("LayerNorm", x, self.normalized_shape)
        weight = None if self.weight is None else self.weight.flatten()
        bias = None if self.bias is None else self.bias.flatten()
        return _unflatten_normalized(layer_norm(x, weight, bias, eps=self.eps), shape)
