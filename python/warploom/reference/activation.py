"""Gated activations (Shazeer 2020, GLU variants) in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def _activate(x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    # Written out: F.gelu turns an infinity into NaN in float32.
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def _derivative(x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        sigmoid = torch.sigmoid(x)
        return sigmoid * (1 + x * (1 - sigmoid))
    if activation == "gelu":
        density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density
    scale = math.sqrt(2 / math.pi)
    tanh = torch.tanh(scale * (x + 0.044715 * x**3))
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * scale * (1 + 3 * 0.044715 * x * x)


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """out = act(gate) * up, act one of silu, gelu (erf), gelu_tanh; one rounding at the end."""
    wide = torch.float64 if gate.dtype == torch.float64 else torch.float32
    out = _activate(gate.to(wide), activation) * up.to(wide)
    return out.to(gate.dtype).contiguous()


def gated_activation_backward(
    grad_out: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """grad_gate = grad_out * up * act'(gate), grad_up = grad_out * act(gate)."""
    wide = torch.float64 if gate.dtype == torch.float64 else torch.float32
    upstream, gate_wide = grad_out.to(wide), gate.to(wide)
    grad_gate = upstream * up.to(wide) * _derivative(gate_wide, activation)
    grad_up = upstream * _activate(gate_wide, activation)
    return grad_gate.to(gate.dtype).contiguous(), grad_up.to(up.dtype).contiguous()
