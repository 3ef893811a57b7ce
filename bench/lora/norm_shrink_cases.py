"""RMSNorm and SwiGLU that emit lora_shrink of their output, against the two steps one after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from warploom.ops.activation import swiglu
from warploom.ops.lora import lora_shrink, rms_norm_shrink, swiglu_shrink
from warploom.ops.norm import rms_norm

from bench.harness import Case, close_to

#: Three maps of rank 16 behind one norm, one behind the activation.
ROWS, COLUMNS, RANKS = 2048, (2048, 4096), (16, 48)
Outputs = tuple[Tensor, Tensor]


def torch_norm(x: Tensor, weight: Tensor, lora_a: Tensor) -> Outputs:
    out = F.rms_norm(x, x.shape[-1:], weight, 1e-6)
    return out, F.linear(out, lora_a)


def norm_then_shrink(x: Tensor, weight: Tensor, lora_a: Tensor) -> Outputs:
    out = rms_norm(x, weight)
    return out, lora_shrink(out, lora_a)


def torch_swiglu(gate: Tensor, up: Tensor, lora_a: Tensor) -> Outputs:
    out = F.silu(gate) * up
    return out, F.linear(out, lora_a)


def swiglu_then_shrink(gate: Tensor, up: Tensor, lora_a: Tensor) -> Outputs:
    out = swiglu(gate, up)
    return out, lora_shrink(out, lora_a)


def product_of(function: Callable[..., Outputs]) -> Callable[..., Tensor]:
    return lambda *tensors: function(*tensors)[1]


def cases(device: str) -> list[Case]:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for columns in COLUMNS:
            for rank in RANKS:
                rows = [torch.randn(ROWS, columns, device=device).to(dtype) for _ in range(2)]
                weight = torch.randn(columns, device=device).to(dtype)
                lora_a = (torch.randn(rank, columns, device=device) / columns**0.5).to(dtype)
                for op, ours, theirs, steps, inputs in (
                    ("rms_norm_shrink", rms_norm_shrink, torch_norm, norm_then_shrink,
                     [rows[0], weight, lora_a]),
                    ("swiglu_shrink", swiglu_shrink, torch_swiglu, swiglu_then_shrink,
                     [*rows, lora_a]),
                ):  # fmt: skip
                    large = sum(tensor.shape == rows[0].shape for tensor in inputs) + 1
                    found.append(
                        Case(
                            family="lora",
                            op=op,
                            shape=f"{ROWS} x {columns}, rank {rank}",
                            dtype=dtype,
                            run=lambda f=ours, i=inputs: f(*i),
                            peers={
                                "torch": lambda f=theirs, i=inputs: f(*i),
                                "two steps": lambda f=steps, i=inputs: f(*i),
                            },
                            verify=close_to(product_of(ours), product_of(theirs), inputs),
                            bytes=(large * rows[0].numel() + lora_a.numel())
                            * rows[0].element_size(),
                            flops=2 * ROWS * columns * rank,
                        )
                    )
    return found
