"""Family `grouped_linear`: a linear map per group of rows, for experts and adapters."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from warploom._library import Differentiable, define
from warploom.ops._autocast import autocast
from warploom.ops._check import check_dim, check_floating, check_int32, check_same, fail
from warploom.reference import grouped_linear as reference


def _dense_or_empty(x: Tensor, needed: bool) -> Tensor:
    return x.new_empty(x.shape if needed else (0,))


_grouped_linear_op = define(
    "grouped_linear",
    "(Tensor x, Tensor weight, Tensor group_offsets, bool batch_invariant) -> Tensor",
    reference=reference.grouped_linear,
    fake=lambda x, weight, group_offsets, batch_invariant: x.new_empty(
        (x.shape[0], weight.shape[1])
    ),
    triton="grouped_linear.grouped_linear:grouped_linear",
    sharding=("m K, g N K, o -> m N",),
)
_grouped_linear_backward_op = define(
    "grouped_linear_backward",
    "(Tensor grad_out, Tensor x, Tensor weight, Tensor group_offsets, bool needs_x, bool needs_weight)"
    " -> (Tensor grad_x, Tensor grad_weight)",
    reference=reference.grouped_linear_backward,
    fake=lambda grad_out, x, weight, group_offsets, needs_x, needs_weight: (
        _dense_or_empty(x, needs_x),
        _dense_or_empty(weight, needs_weight),
    ),
    triton="grouped_linear.grouped_linear_backward:grouped_linear_backward",
    sharding=("m N, m K, g N K, o -> m K if needs_x, g N K if needs_weight",),
)


def _grads(
    overload: Any, saved: Any, scalars: Any, grads: Any, needs: Any
) -> tuple[Tensor | None, ...]:
    x, weight, group_offsets = saved
    needs_x, needs_weight, _ = needs
    grad_x, grad_weight = overload(grads[0], x, weight, group_offsets, needs_x, needs_weight)
    return grad_x if needs_x else None, grad_weight if needs_weight else None, None


_function = Differentiable(
    _grouped_linear_op,
    _grouped_linear_backward_op,
    save=lambda args, outputs: tuple(args[:3]),
    backward=_grads,
)


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    group_offsets: Tensor,
    *,
    batch_invariant: bool = False,
    backend: str | None = None,
) -> Tensor:
    """A linear map per group of rows: out[i] = weight[g] x[i], group_offsets[g] <= i < group_offsets[g + 1].

    Args:
        x: [M, K], rows sorted by group; float32, float16, bfloat16 (float64 on `reference` and `cpu`).
        weight: [G, N, K], x's dtype: one matrix a group, as `torch.nn.Linear` stores it.
        group_offsets: int32 [G + 1] on x's device, rising from 0. Groups may be empty. Never read by the
            host, so that the call can be captured in a CUDA graph.
        batch_invariant: whether a row of out has the same bits whatever rows its group has beside it, in the
            forward pass. The kernels have it always, bfloat16 on a CPU too; for float32 there it takes our
            own product for groups of any size, which PyTorch's overtakes at some tens of rows, and for
            float16 and float64 PyTorch's, row by row.
        backend: one of `warploom.BACKENDS`; None chooses.

    Returns:
        [M, N] in x's dtype, contiguous, summed in float32 or wider; rows behind the last offset are 0. Under
        autocast the inputs are cast to its dtype. Differentiable in x and weight; the gradients are
        deterministic: fixed orders of sums, no atomics.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        RuntimeError: the named backend cannot serve the call; forward-mode differentiation.

    Source: Gale et al., MegaBlocks (arXiv:2211.15841).
    """
    op = "grouped_linear"
    for name, tensor, dim, layout in (("x", x, 2, "[M, K]"), ("weight", weight, 3, "[G, N, K]")):
        check_floating(op, name, tensor)
        check_dim(op, name, tensor, dim, layout)
    x, weight = autocast(x, weight)
    check_same(op, "weight", weight, "x", x)
    if weight.shape[2] != x.shape[1]:
        fail(op, "weight", f"shape (G, N, {x.shape[1]})", tuple(weight.shape))
    check_int32(op, "group_offsets", group_offsets, "x", x, (weight.shape[0] + 1,))
    out: Tensor = _function(x, weight, group_offsets, batch_invariant, backend=backend)
    return out
