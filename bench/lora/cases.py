"""A linear map with a low-rank update against its base alone and the ways in which others write it.

512 tokens, 4096 features to 4096, the base frozen: ranks 8 to 256, dropout, DoRA; forward, and training of x,
lora_a and lora_b, and of DoRA's magnitude.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from warploom.ops.lora import lora_linear
from warploom.reference.lora import drop

from bench.harness import Case, Run, close_to, training
from bench.lora import multi_lora_cases, norm_shrink_cases

TOKENS, FEATURES = 512, 4096
SCALING = 2.0

#: (x, lora_a, lora_b and, of DoRA, magnitude) -> out
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Variant:
    name: str
    rank: int
    dropout_p: float = 0.0
    dora: bool = False


VARIANTS = (
    *(Variant("lora", rank) for rank in (8, 16, 64, 256)),
    Variant("lora, dropout", 16, dropout_p=0.05),
    Variant("dora", 16, dora=True),
)


class AddedInPlace(torch.autograd.Function):
    """The product, then `addmm_`: three lines each way, no second large sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        shrunk = x @ lora_a.T
        ctx.save_for_backward(x, weight, lora_a, lora_b, shrunk)
        return (x @ weight.T).addmm_(shrunk, lora_b.T, alpha=SCALING)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        x, weight, lora_a, lora_b, shrunk = ctx.saved_tensors
        grad_shrunk = grad @ lora_b * SCALING
        grad_x = (grad @ weight).addmm_(grad_shrunk, lora_a)
        return grad_x, None, grad_shrunk.T @ x, grad.T @ shrunk * SCALING


def eager(variant: Variant, weight: Tensor, x: Tensor, *adapter: Tensor) -> Tensor:
    """peft's formulas; DoRA makes the weight with its update for its rows' lengths."""
    lora_a, lora_b, *magnitude = adapter
    dropped = F.dropout(x, variant.dropout_p) if variant.dropout_p else x
    out, update = F.linear(x, weight), F.linear(F.linear(dropped, lora_a), lora_b) * SCALING
    if not variant.dora:
        return out + update
    merged = weight + SCALING * (lora_b @ lora_a)
    scale = magnitude[0] / torch.linalg.vector_norm(merged, dim=1).detach()
    return out + ((scale - 1) * out + scale * update)


def ours(variant: Variant, weight: Tensor, seed: Tensor | None, *tensors: Tensor) -> Tensor:
    x, lora_a, lora_b, *magnitude = tensors
    return lora_linear(
        x, weight, None, lora_a, lora_b, SCALING, dropout_p=variant.dropout_p, seed=seed,
        magnitude=magnitude[0] if magnitude else None,
    )  # fmt: skip


def peft_layer(variant: Variant, weight: Tensor) -> Function | None:
    """peft's own layer on this weight; None where peft is not installed."""
    try:
        from peft import LoraConfig
        from peft.tuners.lora import Linear
    except ImportError:
        return None
    alpha = SCALING * variant.rank
    config = LoraConfig(
        r=variant.rank, lora_alpha=alpha, lora_dropout=variant.dropout_p, use_dora=variant.dora
    )
    base = torch.nn.Linear(FEATURES, FEATURES, bias=False, device="meta")
    base.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer = Linear(base, "default", config, r=variant.rank, lora_alpha=alpha)
    names = [f"{part}.default.weight" for part in ("lora_A", "lora_B", "lora_magnitude_vector")]

    def run(x: Tensor, *adapter: Tensor) -> Tensor:
        out: Tensor = functional_call(layer, dict(zip(names, adapter)), (x,))
        return out

    return run


def exactly(variant: Variant, weight: Tensor, seed: Tensor | None, *tensors: Tensor) -> Tensor:
    """The oracle: of dropout, the mask that the seed stands for."""
    x, lora_a, lora_b, *_ = tensors
    if seed is None:
        return eager(variant, weight.to(x.dtype), *tensors)
    update = drop(x, seed, variant.dropout_p) @ lora_a.T @ lora_b.T
    return F.linear(x, weight.to(x.dtype)) + SCALING * update


def cases_of(variant: Variant, weight: Tensor) -> list[Case]:
    device, dtype, rank = str(weight.device), weight.dtype, variant.rank

    def make(*shape: int) -> Tensor:
        return (torch.randn(shape, device=device) * shape[-1] ** -0.5).to(dtype)

    tensors = [make(TOKENS, FEATURES), make(rank, FEATURES), make(FEATURES, rank)]
    if variant.dora:
        tensors.append(torch.rand(FEATURES, device=device).to(dtype) + 0.5)
    seed = torch.tensor([7], device=device) if variant.dropout_p else None
    function = functools.partial(ours, variant, weight)
    plainly = functools.partial(eager, variant, weight)
    peers: dict[str, Function] = {"eager": plainly, "compiled": torch.compile(plainly)}
    if not variant.dropout_p and not variant.dora:
        peers["addmm_"] = lambda x, lora_a, lora_b: AddedInPlace.apply(x, weight, lora_a, lora_b)
    if (layer := peft_layer(variant, weight)) is not None:
        peers["peft"] = layer
    verify = close_to(
        functools.partial(function, seed),
        functools.partial(exactly, variant, weight, seed),
        tensors,
    )
    base, update = 2 * TOKENS * FEATURES**2, 4 * TOKENS * FEATURES * rank
    moved = (FEATURES**2 + 2 * TOKENS * FEATURES + 2 * rank * FEATURES) * weight.element_size()

    def case(
        op: str, bind: Callable[[Function, list[Tensor]], Run], bytes: int, flops: int
    ) -> Case:
        runs = {name: bind(peer, tensors) for name, peer in peers.items()}
        return Case(
            family="lora",
            op=op,
            shape=f"{TOKENS} x {FEATURES} x {FEATURES}, rank {rank}",
            dtype=dtype,
            run=bind(functools.partial(function, None), tensors),
            peers={"base": bind(lambda x: F.linear(x, weight), tensors[:1]), **runs},
            verify=verify,
            bytes=bytes,
            flops=flops,
        )

    return [
        case(variant.name, lambda f, given: functools.partial(f, *given), moved, base + update),
        case(f"{variant.name} forward+backward", training, 2 * moved, 2 * base + 3 * update),
    ]


def cases(device: str) -> list[Case]:
    found = []
    for dtype in (torch.float32,) if device == "cpu" else (torch.bfloat16, torch.float32):
        weight = (torch.randn(FEATURES, FEATURES, device=device) * FEATURES**-0.5).to(dtype)
        for variant in VARIANTS:
            found += cases_of(variant, weight)
    return [*found, *multi_lora_cases.cases(device), *norm_shrink_cases.cases(device)]
