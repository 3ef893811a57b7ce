"""A stack of invertible layers trained in memory that does not grow with its depth."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Map = Callable[..., tuple[Tensor, Tensor]]


@dataclass
class _Step:
    """A layer in one direction: its map and the inverse of that."""

    name: str
    layer: nn.Module
    run: Map
    undo: Map


def _autocast_as_now(device_type: str) -> Callable[[], AbstractContextManager[Any]]:
    """Makes contexts in which autocast is as it is at this call."""
    if device_type not in ("cpu", "cuda"):
        return nullcontext
    enabled = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, enabled=enabled)


@contextmanager
def _without_tf32() -> Iterator[None]:
    """cuDNN's convolutions in float32.

    TF32 rounds their inputs to 11 bits: a reconstructed input that is off by 1e-7 then moves a coupling's
    scale by up to 1e-3, and the next reconstruction by more.
    """
    cudnn: Any = torch.backends.cudnn
    before = cudnn.conv.fp32_precision
    cudnn.conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        cudnn.conv.fp32_precision = before


class _Run(torch.autograd.Function):
    """Runs the steps and keeps the last output alone; backward undoes them one by one.

    Tensor arguments: x, context or None, then the stack's parameters, whose gradients it returns.
    """

    @staticmethod
    def forward(
        ctx: Any,
        stack: ReversibleStack,
        inverse: bool,
        x: Tensor,
        context: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        steps = stack.steps(inverse)
        kept: dict[int, Tensor] = {}
        stream, total = x, None
        for index, step in enumerate(steps):
            if stack.keeps(index):
                kept[index] = stream
            with _without_tf32():
                stream, log_det = step.run(stream, context)
            if stream.dtype != x.dtype:
                raise TypeError(
                    f"reversible: layer {step.name}: expected a stream of dtype {x.dtype}, got {stream.dtype}"
                )
            total = log_det if total is None else total + log_det
        assert total is not None
        ctx.stack, ctx.inverse, ctx.kept_indices = stack, inverse, list(kept)
        ctx.autocast = _autocast_as_now(x.device.type)
        ctx.versions = [parameter._version for parameter in parameters]
        ctx.parameters = parameters
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(stream, context, *kept.values())
        return stream, total

    @staticmethod
    def backward(
        ctx: Any, grad_stream: Tensor | None, grad_log_det: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "reversible: differentiated once only: create_graph=True is not supported"
            )
        if [parameter._version for parameter in ctx.parameters] != ctx.versions:
            raise RuntimeError(
                "reversible: a parameter was changed in place between forward and backward: "
                "the inputs of the layers cannot be recomputed"
            )
        stream, context, *values = ctx.saved_tensors
        kept = dict(zip(ctx.kept_indices, values))
        needs_x, needs_context, *needs = ctx.needs_input_grad[2:]
        wanted = {id(parameter) for parameter, need in zip(ctx.parameters, needs) if need}
        sums: dict[int, Tensor] = {}
        grad_context: Tensor | None = None
        steps = ctx.stack.steps(ctx.inverse)
        for index in range(len(steps) - 1, -1, -1):
            step = steps[index]
            parameters = [value for value in step.layer.parameters() if id(value) in wanted]
            with ctx.autocast(), _without_tf32(), torch.no_grad():
                stream = ctx.stack.reconstruct(step, stream, context, kept.pop(index, None))
            with ctx.autocast(), _without_tf32(), torch.enable_grad():
                grad_stream, grad_condition, grads = _gradients(
                    step.run,
                    stream.detach().requires_grad_(index > 0 or needs_x),
                    None if context is None else context.detach().requires_grad_(needs_context),
                    parameters,
                    (grad_stream, grad_log_det),
                )
            grad_context = _add(grad_context, grad_condition)
            for parameter, grad in zip(parameters, grads):
                sums[id(parameter)] = _add(sums.get(id(parameter)), grad)
        return (
            None,
            None,
            grad_stream,
            grad_context,
            *(sums.get(id(parameter)) for parameter in ctx.parameters),
        )


def _gradients(
    run: Map,
    x: Tensor,
    context: Tensor | None,
    parameters: Sequence[Tensor],
    upstream: tuple[Tensor | None, Tensor | None],
) -> tuple[Any, Any, Sequence[Any]]:
    """Those of x, of the context and of the parameters, each None where there is none."""
    pairs = [
        (out, grad)
        for out, grad in zip(run(x, context), upstream)
        if grad is not None and out.requires_grad
    ]
    inputs = [
        value for value in (x, context, *parameters) if value is not None and value.requires_grad
    ]
    if not pairs or not inputs:
        return None, None, [None] * len(parameters)
    outputs, grads = zip(*pairs)
    found = dict(
        zip(map(id, inputs), torch.autograd.grad(outputs, inputs, grads, allow_unused=True))
    )
    return found.get(id(x)), found.get(id(context)), [found[id(value)] for value in parameters]


def _add(sum_: Any, term: Any) -> Any:
    """sum_ + term, where either may be absent."""
    if sum_ is None or term is None:
        return term if sum_ is None else sum_
    return sum_ + term


class ReversibleStack(nn.Module):
    """What `reversible` makes; `layers` is the list of its layers."""

    def __init__(
        self, layers: Iterable[nn.Module], checkpoint_every: int, max_error: float | None
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        if not len(self.layers):
            raise ValueError("reversible: layers: expected at least one layer, got none")
        for index, layer in enumerate(self.layers):
            if not callable(getattr(layer, "inverse", None)):
                raise TypeError(
                    f"reversible: layers[{index}]: expected a module with a method `inverse`, got "
                    f"{type(layer).__name__}"
                )
        if checkpoint_every < 0:
            raise ValueError(
                f"reversible: checkpoint_every: expected a number >= 0, got {checkpoint_every}"
            )
        self.checkpoint_every, self.max_error = checkpoint_every, max_error

    def steps(self, inverse: bool) -> Sequence[_Step]:
        """The layers in the order in which they run."""
        steps = []
        layers: Any = self.layers
        for index, layer in enumerate(layers):
            run, undo = (layer.inverse, layer) if inverse else (layer, layer.inverse)
            steps.append(_Step(f"{index} ({type(layer).__name__})", layer, run, undo))
        return steps[::-1] if inverse else steps

    def keeps(self, index: int) -> bool:
        """Whether the input of step `index` is kept for backward."""
        if self.checkpoint_every:
            return index % self.checkpoint_every == 0
        return index == 0 and self.max_error is not None

    def reconstruct(
        self, step: _Step, stream: Tensor, context: Tensor | None, kept: Tensor | None
    ) -> Tensor:
        """The input of a step from its output, or the kept one after comparing the two."""
        if kept is None:
            return step.undo(stream, context)[0]
        if self.max_error is not None:
            difference = (step.undo(stream, context)[0] - kept).abs()
            error = float((difference / kept.abs().clamp(min=1)).max()) if kept.numel() else 0.0
            # Written so that a NaN raises.
            if not error <= self.max_error:
                raise RuntimeError(
                    f"reversible: layer {step.name}: its input is reconstructed with error {error:.2e}, more "
                    f"than max_error {self.max_error:.2e}: keep inputs more often (checkpoint_every), or "
                    "bound the scales of the layers"
                )
        return kept

    def _run(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        if x.dtype in (torch.float16, torch.bfloat16):
            warnings.warn(
                f"reversible: x: a stream in {x.dtype} cannot be reconstructed: it is kept in float32",
                stacklevel=3,
            )
            x = x.float()
        out: tuple[Tensor, Tensor] = _Run.apply(  # type: ignore[no-untyped-call]
            self, inverse, x, context, *self.parameters()
        )
        return out

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(x, context, False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(z, context, True)

    def extra_repr(self) -> str:
        return f"checkpoint_every={self.checkpoint_every}, max_error={self.max_error}"


def reversible(
    layers: Iterable[nn.Module], *, checkpoint_every: int = 0, max_error: float | None = 1e-3
) -> ReversibleStack:
    """A stack of invertible layers whose training memory does not grow with its depth.

    Forward keeps the last output alone; backward goes from layer to layer, recomputes its input by the
    inverse and its graph by a second evaluation. A step costs one more evaluation of each layer, and one
    inverse. Both directions of the stack are differentiable in this way.

    The layers must be deterministic (no dropout) and each the exact inverse of its own inverse; what they
    compute depends on x, the context and their own parameters only.

    Args:
        layers: modules with forward(x, context) -> (z, log_det) and inverse(z, context) -> (x, log_det).
        checkpoint_every: k > 0 keeps the input of every k-th layer, so that errors of reconstruction do not
            grow past k layers; default 0, none.
        max_error: the largest |reconstructed - kept| / max(1, |kept|) that is accepted of a kept input;
            default 1e-3. Without checkpoints it keeps, and compares, the input of the stack. Each comparison
            reads one number from the device; None compares nothing.

    Returns:
        A module (x, context=None) -> (z, log_det) with `inverse`. x float32 or float64; x in 16 bits is
        converted to float32 with a warning, since a stream in 16 bits cannot be reconstructed. Under autocast
        the layers' conditioners may compute in 16 bits.

    Raises:
        TypeError, ValueError: no layers, a layer without `inverse`; a layer that changes the stream's dtype.
        RuntimeError: in backward, an error of reconstruction larger than `max_error` (the message names the
            layer), parameters changed since forward, or create_graph=True.

    Source: Gomez et al., The Reversible Residual Network (2017), algorithm 1.
    """
    return ReversibleStack(layers, checkpoint_every, max_error)
