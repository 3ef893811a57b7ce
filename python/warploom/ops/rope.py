"""Family `rope`: rotary position embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from warploom._library import Differentiable, define
from warploom.ops._check import (
    check_device,
    check_dim,
    check_floating,
    check_shape,
    check_tensor,
    fail,
)
from warploom.ops._fakes import dense
from warploom.reference import rope as reference

_apply_rotary_op = define(
    "apply_rotary",
    "(Tensor x, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool conjugate) -> Tensor",
    reference=reference.apply_rotary,
    fake=lambda x, cos, sin, positions, interleaved, conjugate: dense(x),
    triton="rope.rotary:apply_rotary",
    sharding=(
        "B s H d, p r, p r, - -> B s H d",
        "B S H d, p r, p r, B S -> B S H d",
    ),
)


def _grads(
    overload: Any, saved: Any, scalars: Any, grads: Any, needs: Any
) -> tuple[Tensor | None, ...]:
    """The transpose of a rotation is the rotation the other way."""
    cos, sin, positions = saved
    interleaved, conjugate = scalars[-2:]
    grad_x = overload(grads[0], cos, sin, positions, interleaved, not conjugate)
    return grad_x, None, None, None


_apply_rotary = Differentiable(
    _apply_rotary_op,
    _apply_rotary_op,
    save=lambda args, outputs: (args[1], args[2], args[3]),
    backward=_grads,
)


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    position_offset: int = 0,
    interleaved: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Turn pairs of channels of x by the angle that belongs to each token's position.

    (y1, y2) = (x1 cos - x2 sin, x2 cos + x1 sin) for every pair among the first R channels; the other
    D - R are copied (partial rotary).

    Args:
        x: [B, S, H, D], float32, float16, bfloat16 (float64 on `reference` and `cpu`), any strides.
        cos, sin: [P, R/2] in float32 (float64 for float64 x), row p for position p; R <= D. They get no
            gradient. `warploom.nn.RotaryEmbedding` makes them, scaled variants included.
        positions: int64 or int32 [B, S], each in [0, P); None means position_offset + 0..S-1.
        position_offset: position of the first token where `positions` is None; default 0.
        interleaved: pairs (2i, 2i+1) as in GPT-J and Meta's LLaMA; the default False pairs (i, i + R/2)
            as in GPT-NeoX and Hugging Face's LLaMA.
        backend: one of `warploom.BACKENDS`; None chooses.

    Returns:
        [B, S, H, D] in x's dtype, contiguous; float32 arithmetic, one rounding.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or too few rows in
            cos and sin for the positions asked for.
        RuntimeError, IndexError: the backend cannot serve the call; a position outside [0, P) (CPU).

    Source: Su et al., RoFormer (2021), equation 34.
    """
    op = "apply_rotary"
    check_floating(op, "x", x)
    check_dim(op, "x", x, 4, "[B, S, H, D]")
    batch, sequence, _, dim = x.shape
    table_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(op, name, table)
        check_dim(op, name, table, 2, "[P, R/2]")
        check_device(op, name, table, "x", x)
        if table.dtype != table_dtype:
            raise TypeError(f"{op}: {name}: expected dtype {table_dtype}, got {table.dtype}")
        if table.requires_grad:
            fail(op, name, "a constant table (it gets no gradient)", "requires_grad=True")
    check_shape(op, "sin", sin, cos.shape)
    if 2 * cos.shape[1] > dim:
        fail(op, "cos", f"[P, R/2] with R <= D = {dim}", tuple(cos.shape))
    if positions is None:
        if position_offset < 0 or position_offset + sequence > cos.shape[0]:
            fail(
                op,
                "cos",
                f"rows for the positions {position_offset} to {position_offset + sequence - 1}",
                f"{cos.shape[0]} rows",
            )
        if position_offset:
            cos, sin = cos[position_offset:], sin[position_offset:]
    else:
        check_tensor(op, "positions", positions)
        if positions.dtype not in (torch.int64, torch.int32):
            raise TypeError(
                f"{op}: positions: expected dtype int64 or int32, got {positions.dtype}"
            )
        check_shape(op, "positions", positions, (batch, sequence))
        check_device(op, "positions", positions, "x", x)
        if position_offset:
            fail(op, "position_offset", "0 where positions are given", position_offset)
    out: Tensor = _apply_rotary(x, cos, sin, positions, bool(interleaved), False, backend=backend)
    return out
