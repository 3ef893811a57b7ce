"""Every op at the size of a small model: what serves it, how exact and how fast it is."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from warploom._library import OPS
from warploom.recipes._extras import require
from warploom.recipes.op_arguments import Arguments
from warploom.recipes.op_cases import OpCase


@dataclass(frozen=True)
class OpResult:
    """A row of the table. Errors are max |out - float64 result|; times are medians."""

    name: str
    shape: str
    dtype: str
    backend: str
    backward_backend: str
    error: float
    pytorch_error: float
    forward_ms: float
    forward_speedup: float  # PyTorch's time / ours, the median over interleaved pairs
    training_ms: float | None  # forward and backward; None of an op without gradients
    training_speedup: float | None


#: Forward ops whose backward op has another name than ``<op>_backward``.
_BACKWARD_OPS = {
    "add_rms_norm": "rms_norm_backward",
    "apply_rotary": "apply_rotary",
    "linear_cross_entropy": "linear_cross_entropy",
    "squeeze": "squeeze",
}


def chosen_backends(case: OpCase, arguments: Arguments) -> tuple[str, str]:
    """The backends that serve the forward and the backward of a call without ``backend=``."""
    forward = OPS[case.op].choose(*arguments)
    if not case.inputs:
        return forward, ""
    backward = OPS[_BACKWARD_OPS.get(case.op, f"{case.op}_backward")]
    return forward, backward.choose_backward(forward, *arguments)


def measure(
    case: OpCase, dtype: torch.dtype, *, size: int = 1024, pairs: int = 11, device: str = "cpu"
) -> OpResult:
    """Error and speed of one op beside plain PyTorch, on random inputs of ``size`` tokens.

    The time is taken ``pairs`` times for both, one right after the other, in alternating order.
    """
    torch.manual_seed(0)
    arguments = tuple(
        value.to(device) if isinstance(value, Tensor) else value for value in case.make(size, dtype)
    )
    wide = tuple(
        value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in arguments
    )
    with torch.no_grad():
        exact = _outputs(case.eager(*wide))
        errors = [
            max(float((out.double() - right).abs().max()) for out, right in zip(outputs, exact))
            for outputs in (_outputs(case.call(*arguments)), _outputs(case.eager(*arguments)))
        ]
        forward_ms, forward_speedup = _compare(
            lambda: case.call(*arguments), lambda: case.eager(*arguments), pairs, device
        )
    training_ms = training_speedup = None
    if case.inputs:
        leaves = tuple(
            value.detach().requires_grad_() if index < case.inputs else value
            for index, value in enumerate(arguments)
        )
        training_ms, training_speedup = _compare(
            lambda: _forward_and_backward(case.call, leaves, case.inputs),
            lambda: _forward_and_backward(case.eager, leaves, case.inputs),
            pairs,
            device,
        )
    forward, backward = chosen_backends(case, arguments)
    return OpResult(
        case.name,
        case.shape.replace("S", str(size), 1),
        str(dtype).removeprefix("torch."),
        forward,
        backward,
        errors[0],
        errors[1],
        forward_ms,
        forward_speedup,
        training_ms,
        training_speedup,
    )


def _outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _forward_and_backward(function: Callable[..., Any], arguments: Arguments, inputs: int) -> Any:
    outputs = _outputs(function(*arguments))
    return torch.autograd.grad(outputs, arguments[:inputs], [out.detach() for out in outputs])


def _compare(
    ours: Callable[[], Any], theirs: Callable[[], Any], pairs: int, device: str
) -> tuple[float, float]:
    """Our median time in milliseconds and the median of their time / ours."""
    functions = (ours, theirs)
    for function in functions:
        function()
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(pairs):
        for which in (0, 1) if index % 2 == 0 else (1, 0):
            times[which].append(_time(functions[which], device))
    ratios = [their / our for our, their in zip(*times)]
    return 1e3 * statistics.median(times[0]), statistics.median(ratios)


def _time(function: Callable[[], Any], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def write_results(results: list[OpResult], directory: Path) -> None:
    """Write ``ops.json`` and ``ops.png`` into ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = [asdict(result) for result in results]
    (directory / "ops.json").write_text(json.dumps(rows, indent=2) + "\n")
    plot_results(results, directory / "ops.png")


def print_results(results: list[OpResult], console: Any) -> None:
    """Print the table on a ``rich`` console."""
    title = "Ops beside eager PyTorch (x PyTorch: its time / ours)"
    box = require("rich.box").SIMPLE_HEAD
    table = require("rich.table").Table(title=title, title_justify="left", box=box, padding=(0, 1))
    for column in ("op", "dtype", "backend"):
        table.add_column(column, no_wrap=True)
    for column in ("error", "PyTorch's", "forward", "x PyTorch", "+ backward", "x PyTorch"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            result.name,
            result.dtype,
            result.backend,
            f"{result.error:.1e}",
            f"{result.pytorch_error:.1e}",
            f"{result.forward_ms:.2f} ms",
            f"{result.forward_speedup:.2f}",
            "-" if result.training_ms is None else f"{result.training_ms:.2f} ms",
            "-" if result.training_speedup is None else f"{result.training_speedup:.2f}",
        )
    console.print(table)


def plot_results(results: list[OpResult], path: Path) -> None:
    """Draw the speed-ups over PyTorch as a PNG, forward and training, on a logarithmic scale."""
    require("matplotlib").use("Agg")
    pyplot = require("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.45 * len(results)), layout="constrained")
    positions = range(len(results), 0, -1)
    for offset, color, label, values in (
        (0.18, "tab:blue", "forward", [result.forward_speedup for result in results]),
        (
            -0.18,
            "tab:orange",
            "forward and backward",
            [result.training_speedup or float("nan") for result in results],
        ),
    ):
        heights = [position + offset for position in positions]
        bars = axes.barh(
            heights, [value - 1.0 for value in values], 0.34, left=1.0, color=color, label=label
        )
        labels = ["" if math.isnan(value) else f" {value:.2f} " for value in values]
        axes.bar_label(bars, labels, fontsize=8)
    axes.set(
        xscale="log",
        xlabel="PyTorch's time / warploom's time (right of the line: faster)",
        title="Ops beside eager PyTorch on this machine",
    )
    names = [f"{result.name}\n{result.dtype}, {result.backend}" for result in results]
    axes.set_yticks(list(positions), names, fontsize=8)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
