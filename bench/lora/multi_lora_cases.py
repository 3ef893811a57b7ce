"""Many adapters in one batch against their base alone, a loop over the adapters, and a loop over the tokens.

512 tokens of 32 adapters of ranks 8 and 16, 2048 features to 2048; forward, as in serving, and training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from warploom.ops.lora import Adapter, multi_lora_linear

from bench.harness import Case, Run, close_to, training

ADAPTERS, FEATURES = 32, 2048
SCALING = 2.0
RANKS = [8 if index % 2 else 16 for index in range(ADAPTERS)]

#: (x, then lora_a and lora_b of every adapter) -> out
Function = Callable[..., Tensor]


def loop(weight: Tensor, ids: Tensor, x: Tensor, *factors: Tensor) -> Tensor:
    """As peft serves a mixed batch: the rows of one adapter after the other."""
    out = F.linear(x, weight)
    for index, (lora_a, lora_b) in enumerate(zip(factors[0::2], factors[1::2])):
        rows = (ids == index).nonzero()[:, 0]
        update = F.linear(F.linear(x[rows], lora_a), lora_b) * SCALING
        out = out.index_add(0, rows, update)
    return out


def ours(weight: Tensor, ids: Tensor, batch_invariant: bool, x: Tensor, *factors: Tensor) -> Tensor:
    pairs = zip(factors[0::2], factors[1::2])
    adapters = [Adapter(lora_a, lora_b, SCALING) for lora_a, lora_b in pairs]
    return multi_lora_linear(x, weight, None, adapters, ids, batch_invariant=batch_invariant)


def cases_of(tokens: int, dtype: torch.dtype, device: str) -> list[Case]:
    def make(*shape: int) -> Tensor:
        return (torch.randn(shape, device=device) * shape[-1] ** -0.5).to(dtype)

    weight, ids = make(FEATURES, FEATURES), torch.randint(ADAPTERS, (tokens,), device=device)
    tensors = [make(tokens, FEATURES)]
    for rank in RANKS:
        tensors += [make(rank, FEATURES), make(FEATURES, rank)]
    plainly = functools.partial(loop, weight, ids)
    peers: dict[str, Function] = {
        "batch-invariant": functools.partial(ours, weight, ids, True),
        "loop": plainly,
    }
    function = functools.partial(ours, weight, ids, False)
    wide = functools.partial(loop, weight.double(), ids)
    update = 4 * tokens * FEATURES * sum(RANKS) // ADAPTERS
    base = 2 * tokens * FEATURES**2
    moved = FEATURES**2 + 2 * tokens * FEATURES + 2 * sum(RANKS) * FEATURES

    def case(op: str, bind: Callable[[Function, list[Tensor]], Run], products: int) -> Case:
        floor = bind(lambda x, *factors: F.linear(x, weight), tensors[:1])
        return Case(
            family="lora",
            op=op,
            shape=f"{tokens} tokens, {ADAPTERS} adapters",
            dtype=dtype,
            run=bind(function, tensors),
            peers={"base": floor, **{name: bind(peer, tensors) for name, peer in peers.items()}},
            verify=close_to(function, wide, tensors),
            bytes=products * moved * weight.element_size(),
            flops=products * base + (2 * products - 1) * update,
        )

    return [
        case("multi_lora", lambda f, given: functools.partial(f, *given), 1),
        case("multi_lora forward+backward", training, 2),
    ]


def cases(device: str) -> list[Case]:
    dtypes = (torch.float32, torch.bfloat16)
    return [case for dtype in dtypes for case in cases_of(512, dtype, device)]
