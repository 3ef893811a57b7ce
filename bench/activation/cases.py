"""SwiGLU and GeGLU, forward and training, against PyTorch's eager formula."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from warploom.ops.activation import geglu, swiglu

from bench.harness import Case, close_to, training

ROWS, COLUMNS = 4096, 4096


def cases(device: str) -> list[Case]:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [torch.randn(ROWS, COLUMNS, device=device).to(dtype) for _ in range(2)]
        size = inputs[0].numel() * inputs[0].element_size()
        shared = {"family": "activation", "shape": f"{ROWS} x {COLUMNS}", "dtype": dtype}
        for op, ours, theirs in (
            ("swiglu", swiglu, lambda gate, up: F.silu(gate) * up),
            ("geglu", geglu, lambda gate, up: F.gelu(gate) * up),
        ):
            verify = close_to(ours, theirs, inputs)
            found.append(
                Case(
                    op=op,
                    run=lambda f=ours, i=inputs: f(*i),
                    peers={"torch": lambda f=theirs, i=inputs: f(*i)},
                    verify=verify,
                    bytes=3 * size,
                    **shared,
                )
            )
            # Forward reads two and writes one; backward reads three and writes two.
            found.append(
                Case(
                    op=f"{op} forward+backward",
                    run=training(ours, inputs),
                    peers={"torch": training(theirs, inputs)},
                    verify=verify,
                    bytes=8 * size,
                    **shared,
                )
            )
    return found
