"""Latent attention whose heads are on two ranks: outputs, gradients and steps with a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from warploom.nn import MultiheadLatentAttention, PagedLatentCache, RotaryEmbedding

pytestmark = pytest.mark.xdist_group("distributed")


def make(query_rank: int | None, mode: Any) -> MultiheadLatentAttention:
    torch.manual_seed(1)
    return MultiheadLatentAttention(
        32,
        4,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=12,
        q_lora_rank=query_rank,
        mode=mode,
        dtype=torch.float64,
    )


def parallelize(module: MultiheadLatentAttention) -> Any:
    """Every parameter distributed, and the placing of the input."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, distribute_module
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (2,))
    by_columns = {name: ColwiseParallel() for name in ("q_proj", "q_b_proj", "kv_b_proj")}
    plan = {name: style for name, style in by_columns.items() if hasattr(module, name)}
    parallelize_module(module, mesh, {**plan, "o_proj": RowwiseParallel()})
    for name in ("q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm"):
        if hasattr(module, name):
            distribute_module(getattr(module, name), mesh)
    return lambda x: DTensor.from_local(x, mesh, run_check=False)


def compare(query_rank: int | None, mode: str) -> None:
    module, parallel = (make(query_rank, mode) for _ in range(2))
    place = parallelize(parallel)
    table = RotaryEmbedding(8).table(64, "cpu", torch.float64)
    x, upstream = (torch.randn(2, 12, 32, dtype=torch.float64) for _ in range(2))
    results: list[list[Tensor]] = []
    for one, inputs in ((module, x.clone()), (parallel, x.clone())):
        inputs.requires_grad_()
        out = one(place(inputs) if one is parallel else inputs, table)
        (out * upstream).sum().backward()
        grads = [inputs.grad, *(parameter.grad for parameter in one.parameters())]
        whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
        results.append([out.detach(), *whole])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    caches = [PagedLatentCache(1, 2) for _ in range(2)]
    with torch.no_grad():
        for part in x.split([9, 2, 1], dim=1):
            expected, actual = (
                one(place(part) if one is parallel else part, table, cache=cache)
                for one, cache in zip((module, parallel), caches, strict=True)
            )
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
            for cache in caches:
                cache.advance(part.shape[1])


@pytest.mark.parametrize("mode", ["expanded", "absorbed"])
@pytest.mark.parametrize("query_rank", [None, 24])
def test_heads_on_two_ranks(ranks, query_rank, mode):
    ranks.run(compare, query_rank, mode)
