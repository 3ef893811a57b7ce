"""Every op at the size of a small model: what serves it, how exact and how fast it is."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from warploom._library import OPS
from warploom.ops.activation import geglu, swiglu
from warploom.ops.attention import attention
from warploom.ops.norm import l2_norm, layer_norm, rms_norm
from warploom.ops.rope import apply_rotary
from warploom.recipes._extras import require

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class OpCase:
    """One op with representative inputs.

    ``make(size, dtype)`` gives the arguments of the op's schema, where ``size`` is a number of
    tokens; ``call`` (the public function) and ``eager`` (plain PyTorch) take them too. The first
    ``inputs`` of them get gradients.
    """

    name: str
    op: str
    shape: str
    make: Callable[[int, torch.dtype], Arguments]
    call: Callable[..., Any]
    eager: Callable[..., Any]
    inputs: int


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
    training_ms: float  # forward and backward
    training_speedup: float


_WIDTH = 2048
_HEADS, _KEY_VALUE_HEADS, _HEAD_DIM = 16, 4, 64


def _rows(size: int, dtype: torch.dtype, count: int) -> list[Tensor]:
    return [torch.randn(size, _WIDTH).to(dtype) for _ in range(count)]


def _rotary_arguments(size: int, dtype: torch.dtype, interleaved: bool) -> Arguments:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    angles = torch.rand(size, _HEAD_DIM // 2, dtype=wide) * 6.28
    x = torch.randn(1, size, _HEADS, _HEAD_DIM).to(dtype)
    return x, angles.cos(), angles.sin(), None, interleaved, False


def _attention_arguments(size: int, dtype: torch.dtype) -> Arguments:
    q = torch.randn(1, size, _HEADS, _HEAD_DIM).to(dtype)
    k, v = (torch.randn(1, size, _KEY_VALUE_HEADS, _HEAD_DIM).to(dtype) for _ in range(2))
    return q, k, v, True, _HEAD_DIM**-0.5


def _eager_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, (_WIDTH,), weight, eps), total


def _eager_rotary(
    x: Tensor, cos: Tensor, sin: Tensor, positions: None, interleaved: bool, conjugate: bool
) -> Tensor:
    cos, sin = (table[:, None, :].to(x.dtype) for table in (cos, sin))  # [S, 1, D/2]
    first, second = x.view(*x.shape[:-1], -1, 2).unbind(-1) if interleaved else x.chunk(2, -1)
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)


def _eager_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, softmax_scale: float) -> Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True
    )
    return out.transpose(1, 2)


_ROWS_SHAPE = f"[S, {_WIDTH}]"
_HEADS_SHAPE = f"[1, S, {_HEADS}, {_HEAD_DIM}]"

#: One case or more for every forward op of the library.
CASES = (
    OpCase(
        "rms_norm",
        "rms_norm",
        _ROWS_SHAPE,
        lambda size, dtype: (*_rows(size, dtype, 1), torch.rand(_WIDTH).to(dtype) + 0.5, 1e-6),
        lambda x, weight, eps: rms_norm(x, weight, eps=eps),
        lambda x, weight, eps: F.rms_norm(x, (_WIDTH,), weight, eps),
        inputs=2,
    ),
    OpCase(
        "rms_norm + residual",
        "add_rms_norm",
        _ROWS_SHAPE,
        lambda size, dtype: (*_rows(size, dtype, 2), torch.rand(_WIDTH).to(dtype) + 0.5, 1e-6),
        lambda x, residual, weight, eps: rms_norm(x, weight, eps=eps, residual=residual),
        _eager_add_rms_norm,
        inputs=3,
    ),
    OpCase(
        "layer_norm",
        "layer_norm",
        _ROWS_SHAPE,
        lambda size, dtype: (
            *_rows(size, dtype, 1),
            torch.rand(_WIDTH).to(dtype) + 0.5,
            torch.randn(_WIDTH).to(dtype),
            1e-5,
        ),
        lambda x, weight, bias, eps: layer_norm(x, weight, bias, eps=eps),
        lambda x, weight, bias, eps: F.layer_norm(x, (_WIDTH,), weight, bias, eps),
        inputs=3,
    ),
    OpCase(
        "l2_norm",
        "l2_norm",
        _ROWS_SHAPE,
        lambda size, dtype: (*_rows(size, dtype, 1), 1e-12),
        lambda x, eps: l2_norm(x, eps=eps),
        lambda x, eps: F.normalize(x, dim=-1),
        inputs=1,
    ),
    OpCase(
        "apply_rotary (halves)",
        "apply_rotary",
        _HEADS_SHAPE,
        lambda size, dtype: _rotary_arguments(size, dtype, interleaved=False),
        lambda x, cos, sin, positions, interleaved, conjugate: apply_rotary(x, cos, sin),
        _eager_rotary,
        inputs=1,
    ),
    OpCase(
        "apply_rotary (interleaved)",
        "apply_rotary",
        _HEADS_SHAPE,
        lambda size, dtype: _rotary_arguments(size, dtype, interleaved=True),
        lambda x, cos, sin, positions, interleaved, conjugate: apply_rotary(
            x, cos, sin, interleaved=True
        ),
        _eager_rotary,
        inputs=1,
    ),
    OpCase(
        "swiglu",
        "gated_activation",
        _ROWS_SHAPE,
        lambda size, dtype: (*_rows(size, dtype, 2), "silu"),
        lambda gate, up, activation: swiglu(gate, up),
        lambda gate, up, activation: F.silu(gate) * up,
        inputs=2,
    ),
    OpCase(
        "geglu",
        "gated_activation",
        _ROWS_SHAPE,
        lambda size, dtype: (*_rows(size, dtype, 2), "gelu"),
        lambda gate, up, activation: geglu(gate, up),
        lambda gate, up, activation: F.gelu(gate) * up,
        inputs=2,
    ),
    OpCase(
        "attention (causal GQA)",
        "attention",
        f"{_HEADS_SHAPE} over {_KEY_VALUE_HEADS} heads",
        _attention_arguments,
        lambda q, k, v, causal, softmax_scale: attention(
            q, k, v, causal=causal, softmax_scale=softmax_scale
        ),
        _eager_attention,
        inputs=3,
    ),
)

#: Forward ops whose backward op has another name than ``<op>_backward``.
_BACKWARD_OPS = {"add_rms_norm": "rms_norm_backward", "apply_rotary": "apply_rotary"}


def chosen_backends(case: OpCase, arguments: Arguments) -> tuple[str, str]:
    """The backends that serve the forward and the backward of a call without ``backend=``."""
    forward = OPS[case.op].choose(*arguments)
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
    wide = tuple(value.double() if isinstance(value, Tensor) else value for value in arguments)
    with torch.no_grad():
        exact = _outputs(case.eager(*wide))
        errors = [
            max(float((out.double() - right).abs().max()) for out, right in zip(outputs, exact))
            for outputs in (_outputs(case.call(*arguments)), _outputs(case.eager(*arguments)))
        ]
        forward_ms, forward_speedup = _compare(
            lambda: case.call(*arguments), lambda: case.eager(*arguments), pairs, device
        )
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
            f"{result.training_ms:.2f} ms",
            f"{result.training_speedup:.2f}",
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
            [result.training_speedup for result in results],
        ),
    ):
        heights = [position + offset for position in positions]
        bars = axes.barh(
            heights, [value - 1.0 for value in values], 0.34, left=1.0, color=color, label=label
        )
        axes.bar_label(bars, [f" {value:.2f} " for value in values], fontsize=8)
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
