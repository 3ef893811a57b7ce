"""The public functions on DTensors: outputs and gradients through their autograd functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from warploom.ops.rope import apply_rotary

from tests.distributed.ranks import both_ranks
from tests.samples import PUBLIC

# One worker runs them all, so that the ranks are started once.
pytestmark = pytest.mark.xdist_group("distributed")

#: case -> (name in PUBLIC, the dimension on which each tensor is sharded; None: replicated).
CASES: dict[str, tuple[str, list[int | None]]] = {
    "rms_norm": ("rms_norm", [0, None]),
    "rms_norm with residual": ("rms_norm with residual", [0, 0, None]),
    "rms_norm, residual elsewhere": ("rms_norm with residual", [0, None, None]),
    "rms_norm, columns": ("rms_norm", [1, 0]),
    "layer_norm": ("layer_norm", [0, None, None]),
    "l2_norm": ("l2_norm", [0]),
    "swiglu, rows": ("swiglu", [0, 0]),
    "geglu, columns": ("geglu", [1, 1]),
    "attention, batch": ("attention", [0, 0, 0]),
    "attention, heads": ("attention", [2, 2, 2]),
    "attention, sequence": ("attention", [1, 1, 1]),
    "attention with lse, heads": ("attention with lse", [2, 2, 2]),
    "attention, every feature": (
        "attention with sinks, bias and slopes",
        [2, 2, 2, 0, 1, 0],
    ),
    "merge_attention": ("merge_attention", [2, 1, 2, 1]),
}


def total(outputs: Any) -> Any:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum((out * out).sum() for out in outputs)


def compare(case: str, traced: bool = False) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    name, dims = CASES[case]
    function, shapes = PUBLIC[name]
    tensors = [torch.randn(*shape, requires_grad=True) for shape in shapes]
    outputs = function(*tensors)
    expected = torch.autograd.grad(total(outputs), tensors)
    sharded = [
        distribute_tensor(
            tensor.detach(), both_ranks(), [Replicate() if dim is None else Shard(dim)]
        ).requires_grad_()
        for tensor, dim in zip(tensors, dims, strict=True)
    ]
    if traced:
        torch._dynamo.reset()
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    loss = total(function(*sharded))
    torch.testing.assert_close(loss.full_tensor(), total(outputs).detach(), rtol=1e-5, atol=1e-5)
    for got, want in zip(torch.autograd.grad(loss, sharded), expected, strict=True):
        torch.testing.assert_close(got.full_tensor(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_function(ranks, case):
    ranks.run(compare, case)


def compare_rotary() -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = both_ranks()
    x, angles = torch.randn(2, 5, 4, 8, requires_grad=True), torch.randn(5, 4)
    out = apply_rotary(x, angles.cos(), angles.sin())
    out.square().sum().backward()
    sharded = distribute_tensor(x.detach(), mesh, [Shard(2)]).requires_grad_()
    tables = [distribute_tensor(t, mesh, [Replicate()]) for t in (angles.cos(), angles.sin())]
    got = apply_rotary(sharded, *tables)
    assert got.placements == (Shard(2),)
    got.square().sum().backward()
    torch.testing.assert_close(got.full_tensor(), out)
    torch.testing.assert_close(sharded.grad.full_tensor(), x.grad)


def test_rotary(ranks):
    ranks.run(compare_rotary)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    ["rms_norm", "rms_norm with residual", "attention, heads", "attention with lse, heads"],
)
def test_compiled(ranks, case):
    """The rules hold inside a traced graph."""
    ranks.run(compare, case, True)
