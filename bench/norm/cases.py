"""RMSNorm, LayerNorm and rows of unit length, forward and training, against PyTorch."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from warploom.ops.norm import l2_norm, layer_norm, rms_norm

from bench.harness import Case, close_to, training

ROWS, COLUMNS = 4096, 4096


def cases(device: str) -> list[Case]:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(ROWS, COLUMNS, device=device).to(dtype)
        weight, bias = (torch.randn(COLUMNS, device=device).to(dtype) for _ in range(2))
        size = x.numel() * x.element_size()
        shared = {"family": "norm", "shape": f"{ROWS} x {COLUMNS}", "dtype": dtype}

        def rms(x, w):  # type: ignore[no-untyped-def]
            return F.rms_norm(x, (COLUMNS,), w, 1e-6)

        def layer(x, w, b):  # type: ignore[no-untyped-def]
            return F.layer_norm(x, (COLUMNS,), w, b)

        for op, ours, theirs, inputs in (
            ("rms_norm", rms_norm, rms, [x, weight]),
            ("layer_norm", layer_norm, layer, [x, weight, bias]),
            ("l2_norm", l2_norm, lambda x: F.normalize(x, dim=-1), [x]),
        ):
            verify = close_to(ours, theirs, inputs)
            found.append(
                Case(
                    op=op,
                    run=lambda f=ours, i=inputs: f(*i),
                    peers={"torch": lambda f=theirs, i=inputs: f(*i)},
                    verify=verify,
                    bytes=2 * size,
                    **shared,
                )
            )
            # Forward reads x and writes out; backward reads grad_out and x and writes grad_x.
            found.append(
                Case(
                    op=f"{op} forward+backward",
                    run=training(ours, inputs),
                    peers={"torch": training(theirs, inputs)},
                    verify=verify,
                    bytes=5 * size,
                    **shared,
                )
            )
    return found
