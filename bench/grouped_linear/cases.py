"""The linear maps of a layer of experts against a loop over the experts and PyTorch's grouped product.

64 experts, 6 of them for every token, 2048 features to 1408: decoding one token, 64 tokens, and prefill.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from warploom.ops.grouped_linear import grouped_linear

from bench.harness import Case, Run, training

EXPERTS, CHOSEN, IN_FEATURES, OUT_FEATURES = 64, 6, 2048, 1408
#: Tokens; training is timed from this many on.
CPU_TOKENS, GPU_TOKENS, TRAINED_TOKENS = (1, 64, 1024), (1, 64, 1024, 8192), 1024


def loop(x: Tensor, weight: Tensor, group_offsets: Tensor) -> Tensor:
    """As layers of experts are written: one expert after the other, whose bounds the host reads."""
    bounds = group_offsets.tolist()
    parts = zip(itertools.pairwise(bounds), weight)
    return torch.cat([F.linear(x[first:end], w) for (first, end), w in parts])


def grouped_mm(x: Tensor, weight: Tensor, group_offsets: Tensor) -> Tensor:
    return F.grouped_mm(x, weight.mT, offs=group_offsets[1:])


def offsets_of(tokens: int, device: str) -> Tensor:
    """Where the rows of each expert begin, for tokens that choose their experts at random."""
    chosen = torch.rand(tokens, EXPERTS).topk(CHOSEN, dim=-1).indices
    sizes = torch.bincount(chosen.flatten(), minlength=EXPERTS)
    return F.pad(sizes.cumsum(0), (1, 0)).to(device, torch.int32)


def verify(x: Tensor, weight: Tensor, group_offsets: Tensor) -> None:
    """Ours against float64, one expert at a time, to what the dtype can hold."""
    out = grouped_linear(x, weight, group_offsets)
    bounds = group_offsets.tolist()
    for group, (first, end) in enumerate(itertools.pairwise(bounds)):
        want = x[first:end].double() @ weight[group].double().T
        limit = 8 * torch.finfo(x.dtype).eps * (want.abs().max().item() if end > first else 0.0)
        torch.testing.assert_close(out[first:end].double(), want, rtol=0.0, atol=limit)


def peers(x: Tensor, weight: Tensor, group_offsets: Tensor) -> dict[str, Callable[..., Tensor]]:
    found: dict[str, Callable[..., Tensor]] = {"loop": loop}
    try:
        grouped_mm(x, weight, group_offsets)
    except (AttributeError, RuntimeError):  # Not in this version, or not for this dtype or device.
        return found
    return {**found, "grouped_mm": grouped_mm}


def cases_of(dtype: torch.dtype, tokens: int, weight: Tensor) -> list[Case]:
    """Forward, and training where many tokens come at a time."""
    device = str(weight.device)
    offsets = offsets_of(tokens, device)
    rows = tokens * CHOSEN
    x = torch.randn(rows, IN_FEATURES, device=device).to(dtype)
    others = peers(x, weight, offsets)
    used = int((offsets.diff() > 0).sum()) * weight[0].numel()
    size = (rows * (IN_FEATURES + OUT_FEATURES) + used) * weight.element_size()

    def forward(function: Callable[..., Tensor]) -> Run:
        return functools.partial(function, x, weight, offsets)

    def trained(function: Callable[..., Tensor]) -> Run:
        return training(lambda x, w: function(x, w, offsets), [x, weight])

    def case(op: str, bind: Callable[[Callable[..., Tensor]], Run], products: int) -> Case:
        return Case(
            family="grouped_linear",
            op=op,
            shape=f"{tokens} tokens, {CHOSEN} of {EXPERTS}",
            dtype=dtype,
            run=bind(grouped_linear),
            peers={name: bind(peer) for name, peer in others.items()},
            verify=functools.partial(verify, x, weight, offsets),
            # x, weight and out, or their gradients, take part in each product.
            bytes=products * size,
            flops=products * 2 * rows * IN_FEATURES * OUT_FEATURES,
        )

    found = [case("grouped_linear", forward, 1)]
    if tokens >= TRAINED_TOKENS:
        found.append(case("grouped_linear forward+backward", trained, 3))
    return found


def cases(device: str) -> list[Case]:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(EXPERTS, OUT_FEATURES, IN_FEATURES, device=device).to(dtype)
        for tokens in CPU_TOKENS if device == "cpu" else GPU_TOKENS:
            found += cases_of(dtype, tokens, weight)
    return found
