"""How everything is timed: peers and the floor in turn, round after round, medians of the rounds.

A timing here is worth nothing by itself on a busy machine, so each round times every contestant once,
in an order that rotates, and what is reported is the median of the per-round ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]

#: Each row compiles peers of its own, some of which share their code: past the limit they would run eagerly.
torch._dynamo.config.recompile_limit = 256


@dataclass(frozen=True)
class Case:
    """One row: what is run, against whom, and what it must move and compute at the least.

    `run` is ours and `peers` the others by name; all compute the same. `verify` raises where ours is
    wrong: such a row is not reported. `bytes` and `flops` are the least that any implementation needs.
    """

    family: str
    op: str
    shape: str
    dtype: torch.dtype
    run: Run
    peers: dict[str, Run]
    verify: Callable[[], None]
    bytes: int
    flops: int = 0


@dataclass
class Row:
    family: str
    op: str
    shape: str
    dtype: str
    seconds: float
    floor_seconds: float
    floor: str
    ratio_to_floor: float
    gigabytes_per_second: float
    teraflops_per_second: float
    ratio_to_peer: dict[str, float] = field(default_factory=dict)
    host_seconds: float = 0.0


class Clock:
    """Seconds of one call on the device, and those that the host needs to issue it.

    On a GPU between events, with the L2 cache flushed before. The device first waits until the host has
    issued all of the call: what is timed are the kernels and not the gaps between them.
    """

    #: Cycles of the device: about 1.5 ms, longer than the host needs for one call.
    WAIT = 3_000_000

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            self.flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device)

    def __call__(self, run: Run) -> tuple[float, float]:
        if not self.cuda:
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            return seconds, seconds
        self.flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(self.WAIT)
        begin.record()
        start = time.perf_counter()
        run()
        issued = time.perf_counter() - start
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3, issued


def copy_floor(size: int, device: str) -> Run:
    """A copy that moves `size` bytes, half of them read and half written."""
    source = torch.randint(0, 100, (max(1, size // 2),), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def product_floor(flops: int, dtype: torch.dtype, device: str) -> Run:
    """A square matrix product of `flops` operations, by the vendor's library."""
    size = max(16, round((flops / 2) ** (1 / 3)))
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda: left @ right


def measure(case: Case, device: str, rounds: int) -> Row:
    """Time one verified case against its peers and its floor."""
    case.verify()
    clock = Clock(device)
    contestants: dict[str, Run] = {
        "ours": case.run,
        **case.peers,
        "copy": copy_floor(case.bytes, device),
    }
    if case.flops:
        contestants["product"] = product_floor(case.flops, case.dtype, device)
    names = list(contestants)
    for run in contestants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    issued: list[float] = []
    for index in range(rounds):
        start = index % len(names)
        for name in names[start:] + names[:start]:
            device_seconds, host_seconds = clock(contestants[name])
            seconds[name].append(device_seconds)
            if name == "ours":
                issued.append(host_seconds)
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    floor = max(("copy", "product") if case.flops else ("copy",), key=lambda name: middle[name])

    def ratio(name: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds["ours"], seconds[name]))

    return Row(
        family=case.family,
        op=case.op,
        shape=case.shape,
        dtype=str(case.dtype).removeprefix("torch."),
        seconds=middle["ours"],
        floor_seconds=middle[floor],
        floor=floor,
        ratio_to_floor=ratio(floor),
        gigabytes_per_second=case.bytes / middle["ours"] / 1e9,
        teraflops_per_second=case.flops / middle["ours"] / 1e12,
        ratio_to_peer={name: ratio(name) for name in case.peers},
        host_seconds=statistics.median(issued),
    )


def training(function: Callable[..., Tensor], inputs: list[Tensor]) -> Run:
    """Forward and backward of `function` with one fixed upstream gradient."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.no_grad():
        upstream = torch.randn_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, upstream)


def close_to(
    function: Callable[..., Tensor], oracle: Callable[..., Tensor], inputs: list[Tensor]
) -> Callable[[], None]:
    """A check of a case: ours against float64, to what the dtype can hold."""

    def verify() -> None:
        got = function(*inputs).double()
        want = oracle(*(tensor.double() for tensor in inputs))
        tolerance = 8 * torch.finfo(inputs[0].dtype).eps
        torch.testing.assert_close(
            got, want, rtol=tolerance, atol=tolerance * want.abs().max().item()
        )

    return verify
