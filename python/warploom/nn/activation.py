"""Gated feed-forward modules over `warploom.ops.activation`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from warploom.ops.activation import swiglu


class SwiGLU(nn.Module):
    """LLaMA's feed-forward block, down_proj(silu(gate_proj(x)) * up_proj(x)).

    Shazeer, "GLU Variants Improve Transformer" (arXiv:2002.05202), equation 6. The state dict is
    that of transformers' `LlamaMLP`: gate_proj, up_proj [intermediate, hidden] and down_proj
    [hidden, intermediate].

    Args:
        hidden_size: features of the input and of the output.
        intermediate_size: features between the projections.
        bias: whether the three projections have a bias.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias, device, dtype)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias, device, dtype)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden_size] -> [..., hidden_size]."""
        out: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return out
