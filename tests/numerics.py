"""The rule by which every result is judged against float64 (docs/numerics.md).

error <= factor * (error of the plain computation in that dtype, without upcasts) + floor,
floor = 2 max|((exact + 0.3) - 0.3) - exact| taken in that dtype; factor 2, for gradients 3.

Where a result has few elements, the largest error of the plain one is chance: there it is the largest of
those for several inputs near by, or for a gradient of those for several upstream gradients. They are
computed only where the plain error of the test's own inputs does not decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

FORWARD, GRADIENT = 2.0, 3.0
#: Results of fewer elements are few: their plain errors differ from one machine's BLAS to another's.
FEW, FURTHER_DRAWS = 8192, 24


def assert_within(
    actual: Tensor,
    exact: Tensor,
    plain: Tensor,
    *,
    factor: float,
    what: str = "result",
    plain_elsewhere: Callable[[], float] = float,
) -> None:
    """`actual` obeys the rule; infinities and NaN stand exactly where the exact result has them.

    `plain_elsewhere`: gives an error of the plain computation on other draws, where it is needed.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}"
    wide = actual.detach().double()
    finite = torch.isfinite(exact)
    same_special = torch.equal(
        torch.nan_to_num(wide[~finite], nan=7.25), torch.nan_to_num(exact[~finite], nan=7.25)
    )
    assert same_special, f"{what}: infinities or NaN differ"
    if not finite.any():
        return
    rounded = exact[finite].to(actual.dtype)
    floor = 2 * ((rounded + 0.3) - 0.3 - rounded).double().abs().max()
    plain_error = (plain.detach().double()[finite] - exact[finite]).abs().max().item()
    bound = factor * plain_error + floor.item()
    error = (wide[finite] - exact[finite]).abs().max().item()
    if not error <= bound:
        bound = max(bound, factor * plain_elsewhere() + floor.item())
    # Written so that a NaN fails.
    assert error <= bound, f"{what}: error {error:.3e} exceeds {bound:.3e} ({actual.dtype})"


def _run(
    function: Callable[..., Any], tensors: Sequence[Tensor], upstream: Sequence[Tensor] | None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs, and the gradients of the inputs for the given upstream gradients."""
    leaves = [tensor.detach().requires_grad_(upstream is not None) for tensor in tensors]
    outputs = function(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    if upstream is None:
        return outputs, []
    grads = torch.autograd.grad(
        outputs, leaves, [grad.to(out.dtype) for grad, out in zip(upstream, outputs)]
    )
    return outputs, list(grads)


def error_near_by(
    plain: Callable[..., Any], tensors: Sequence[Tensor], outputs: Sequence[Tensor], index: int
) -> float:
    """The largest plain error of output `index` for inputs a hundredth off; 0 where it has many elements."""
    largest = 0.0
    for _ in range(FURTHER_DRAWS if 0 < outputs[index].numel() < FEW else 0):
        factors = [1 + 0.01 * torch.randn_like(tensor, dtype=torch.float64) for tensor in tensors]
        moved = [
            (tensor.detach().double() * factor).to(tensor.dtype)
            for tensor, factor in zip(tensors, factors)
        ]
        exact = _run(plain, [tensor.double() for tensor in moved], None)[0][index]
        rough = _run(plain, moved, None)[0][index]
        finite = torch.isfinite(exact)
        difference = (rough.detach().double() - exact)[finite].abs()
        largest = max(largest, difference.amax().item() if finite.any() else 0.0)
    return largest


def _further_error(
    plain: Callable[..., Any],
    tensors: Sequence[Tensor],
    upstream: Sequence[Tensor],
    index: int,
    draw: Callable[[], Sequence[Tensor]] | None,
) -> float:
    """The largest plain error of gradient `index` for further upstream gradients, and inputs of `draw`."""
    largest = 0.0
    for _ in range(FURTHER_DRAWS if 0 < tensors[index].numel() < FEW else 0):
        drawn = [torch.randn_like(grad).to(tensors[0].dtype).double() for grad in upstream]
        if draw is not None:
            tensors = draw()
        exact = _run(plain, [tensor.detach().double() for tensor in tensors], drawn)[1][index]
        rough = _run(plain, tensors, drawn)[1][index]
        largest = max(largest, (rough.detach().double() - exact).abs().max().item())
    return largest


def check_against_float64(
    function: Callable[..., Any],
    plain: Callable[..., Any],
    tensors: Sequence[Tensor],
    *,
    gradients: bool = True,
    draw: Callable[[], Sequence[Tensor]] | None = None,
) -> None:
    """`function` and its gradients obey the rule; `plain` is the same maths for any dtype.

    The exact result is `plain` on float64 copies, the yardstick `plain` in the inputs' own dtypes. `draw`:
    inputs like `tensors`, for functions whose gradients are as rough as the worst of a few elements: the
    yardstick is the largest error over further ones.
    """
    exact_inputs = [tensor.detach().double() for tensor in tensors]
    exact, _ = _run(plain, exact_inputs, None)
    upstream = [torch.randn_like(out) for out in exact] if gradients else None
    if upstream is not None:
        # Round once, so that all three runs see the same upstream gradients.
        upstream = [grad.to(tensors[0].dtype).double() for grad in upstream]
    exact, exact_grads = _run(plain, exact_inputs, upstream)
    rough, rough_grads = _run(plain, tensors, upstream)
    actual, actual_grads = _run(function, tensors, upstream)
    assert len(actual) == len(exact)
    for index, (got, want, yardstick) in enumerate(zip(actual, exact, rough)):
        assert_within(
            got,
            want.detach(),
            yardstick,
            factor=FORWARD,
            what=f"output {index}",
            plain_elsewhere=partial(error_near_by, plain, tensors, exact, index),
        )
    for index, (got, want, yardstick) in enumerate(zip(actual_grads, exact_grads, rough_grads)):
        assert_within(
            got,
            want,
            yardstick,
            factor=GRADIENT,
            what=f"gradient {index}",
            plain_elsewhere=partial(_further_error, plain, tensors, upstream or [], index, draw),
        )


def inside_larger(tensor: Tensor) -> Tensor:
    """The same values as an unaligned slice of a larger buffer of NaN: what lies around stays unread."""
    margin = 3
    shape = [size + 2 * margin for size in tensor.shape]
    buffer = torch.full(shape, float("nan"), dtype=tensor.dtype, device=tensor.device)
    view = buffer[tuple(slice(margin, margin + size) for size in tensor.shape)]
    view.copy_(tensor)
    return view
