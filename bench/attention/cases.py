"""Causal GQA prefill and decode against PyTorch's scaled_dot_product_attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from warploom.ops.attention import attention

from bench.harness import Case, close_to, training

#: batch, queries, keys, heads, kv_heads, head_dim
PREFILL = (1, 2048, 2048, 16, 4, 64)
DECODE = (4, 1, 4096, 32, 8, 128)


def cases(device: str) -> list[Case]:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for batch, queries, keys, heads, kv_heads, head_dim in (PREFILL, DECODE):
            causal = queries == keys
            q = torch.randn(batch, queries, heads, head_dim, device=device).to(dtype)
            k, v = (
                torch.randn(batch, keys, kv_heads, head_dim, device=device).to(dtype)
                for _ in range(2)
            )
            inputs = [q, k, v]
            size = (2 * q.numel() + 2 * k.numel()) * q.element_size()
            flops = 4 * batch * heads * queries * keys * head_dim // (2 if causal else 1)
            shape = f"B{batch} Sq{queries} Sk{keys} H{heads}/{kv_heads} D{head_dim}"

            def ours(q: Tensor, k: Tensor, v: Tensor, causal: bool = causal) -> Tensor:
                return attention(q, k, v, causal=causal)

            def theirs(q: Tensor, k: Tensor, v: Tensor, causal: bool = causal) -> Tensor:
                out = F.scaled_dot_product_attention(
                    *(tensor.transpose(1, 2) for tensor in (q, k, v)),
                    is_causal=causal,
                    enable_gqa=True,
                )
                return out.transpose(1, 2)

            verify = close_to(ours, theirs, inputs)
            name = "attention prefill" if causal else "attention decode"
            found.append(
                Case(
                    "attention",
                    name,
                    shape,
                    dtype,
                    lambda f=ours, i=inputs: f(*i),
                    {"torch": lambda f=theirs, i=inputs: f(*i)},
                    verify,
                    size,
                    flops,
                )
            )
            if causal:
                found.append(
                    Case(
                        "attention",
                        f"{name} forward+backward",
                        shape,
                        dtype,
                        training(ours, inputs),
                        {"torch": training(theirs, inputs)},
                        verify,
                        3 * size,
                        flops * 7 // 2,
                    )
                )
    return found
