"""A spline coupling of half the channels against PyTorch, eager and compiled: forward, and with backward."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from warploom.ops.coupling import spline_coupling
from warploom.reference.coupling import rational_quadratic_spline

from bench.harness import Case, Run

SHAPE, BINS, BOUND = (64, 96, 64, 64), 8, 3.0

Function = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def ours(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    return spline_coupling(x, params, num_bins=BINS, tail_bound=BOUND)


def eager(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    """The formula, the bins found by comparison with the knots."""
    (batch, channels), size = x.shape[:2], x[0, 0].numel()
    rows, logits = x.view(batch, channels, size), params.view(batch, -1, 3 * BINS - 1, size)
    bounds = (-BOUND, BOUND) * 2
    sizes = (1e-3, 1e-3, 1e-3, 1.0)
    z, log_det = rational_quadratic_spline(
        rows, logits, channels - channels // 2, BINS, False, "linear", *bounds, *sizes, "nflows", False
    )  # fmt: skip
    return z.view(x.shape), log_det.sum((1, 2))


def trained(function: Function, inputs: list[Tensor]) -> Run:
    """Forward and backward with fixed upstream gradients of both results."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    upstream = [torch.randn_like(inputs[0]), torch.randn(len(inputs[0]), device=inputs[0].device)]
    return lambda: torch.autograd.grad(function(*leaves), leaves, upstream)


def cases_of(batch: int, dtype: torch.dtype, device: str) -> list[Case]:
    _, channels, *spatial = SHAPE
    x = torch.randn(batch, channels, *spatial, device=device).to(dtype)
    params = torch.randn(batch, channels // 2 * (3 * BINS - 1), *spatial, device=device).to(dtype)
    inputs = [x, params]
    peers: dict[str, Function] = {"eager": eager, "compile": torch.compile(eager)}
    few = [tensor[:1, :, :4].contiguous() for tensor in inputs]

    def verify() -> None:
        """A spline is as rough as its narrowest bin: near the formula's own largest error in this dtype."""
        exact = eager(*(tensor.double() for tensor in few))[0]
        error, own = ((f(*few)[0].double() - exact).abs().max() for f in (ours, eager))
        assert error <= 4 * own + torch.finfo(dtype).eps, f"error {error:.1e}, eager's {own:.1e}"

    def case(op: str, bind: Callable[[Function], Run], moved: int) -> Case:
        return Case(
            family="coupling",
            op=op,
            shape=f"{'x'.join(map(str, x.shape))}, {BINS} bins",
            dtype=dtype,
            run=bind(ours),
            peers={name: bind(peer) for name, peer in peers.items()},
            verify=verify,
            bytes=moved * x.element_size(),
        )

    # x and params are read and z written; then grad_z, half of x and params read, their gradients written.
    forward = 2 * x.numel() + params.numel()
    both = forward + 5 * x.numel() // 2 + 2 * params.numel()
    return [
        case("spline_coupling", lambda f: functools.partial(f, *inputs), forward),
        case("spline_coupling forward+backward", lambda f: trained(f, inputs), both),
    ]


def cases(device: str) -> list[Case]:
    """On a CPU an eighth of the batch: eager PyTorch needs some 40 times the memory of its inputs."""
    if device == "cpu":
        return cases_of(SHAPE[0] // 8, torch.float32, device)
    return [
        case
        for dtype in (torch.float32, torch.bfloat16)
        for case in cases_of(SHAPE[0], dtype, device)
    ]
