"""Defines every op once, chooses the backend of a call, and joins forward and backward.

`define` makes one overload per backend from one schema string:
`torch.ops.warploom.rms_norm.{reference,cpu,triton,cuda,simt,simt_instrumented}`. Python registers the
reference, Triton and fake implementations here; loading `warploom._C` (or `_simt*`) adds the native ones.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from warploom import _backends, _sharding

_library = torch.library.Library("warploom", "DEF")

#: The extension's own table of kernels, JSON; implemented by `warploom._C` alone.
_library.define("kernel_table() -> str")

#: Every op by name.
OPS: dict[str, Operator] = {}

WhyNot = Callable[..., list[str]]

#: Where the overloads of a backend are registered.
_DISPATCH_KEYS = {
    "cpu": ("CPU",),
    "cuda": ("CUDA",),
    "triton": ("CPU", "CUDA"),
    "simt": ("CPU",),
    "simt_instrumented": ("CPU",),
}


class Operator:
    """One op: its schema, its overloads, and the rules that choose among them.

    `why_not[backend](*args)` lists what that backend cannot do, from dtypes, shapes, strides and devices
    alone, so that it can be traced. It is given the forward's arguments for a backward op too.
    """

    def __init__(
        self,
        name: str,
        backends: Sequence[str],
        why_not: dict[str, WhyNot],
        sharding: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.backends = tuple(backends)
        self.why_not_rules = why_not
        self.sharding = tuple(sharding)
        packet = getattr(torch.ops.warploom, name)
        self.overloads = {backend: getattr(packet, backend) for backend in backends}
        schema = self.overloads["reference"]._schema
        #: Per argument whether it is a tensor, also where an optional one is None.
        self.tensor_slots = tuple("Tensor" in str(arg.type) for arg in schema.arguments)

    def why_not(self, backend: str, *args: Any) -> list[str]:
        """Every reason why `backend` cannot serve a call with these arguments; empty if it can."""
        if backend not in self.overloads:
            return [f"{self.name} has no {backend} implementation"]
        first = next(arg for arg in args if isinstance(arg, Tensor))
        if reason := _backends.unavailable(backend, first.device.type):
            return [reason]
        reasons = []
        if first.is_floating_point() and first.dtype not in _backends.DTYPES[backend]:
            reasons.append(f"no {first.dtype} kernels")
        rule = self.why_not_rules.get(backend)
        if rule is not None:
            reasons += rule(*args)
        return reasons

    def choose(self, *args: Any, backend: str | None = None) -> str:
        """The backend that serves a call: the one named, else the first with nothing against it."""
        if backend is None:
            backend = _backends.selected_backend()
        if backend is not None:
            _backends.check_backend(backend)
            reasons = self.why_not(backend, *args)
            if reasons:
                raise RuntimeError(
                    f"{self.name}: backend {backend!r} cannot serve this call: "
                    f"{'; '.join(reasons)} (arguments: {describe(args)})"
                )
            return backend
        device_type = next(arg for arg in args if isinstance(arg, Tensor)).device.type
        # The fake and other devices (meta) run no kernel: the reference overload carries their shapes.
        candidates = _backends.AUTOMATIC.get(device_type, ("reference",))
        for candidate in candidates[:-1]:
            if not self.why_not(candidate, *args):
                return candidate
        if len(candidates) > 1:
            self._warn_slow(candidates, args)
        return candidates[-1]

    def choose_backward(self, forward_backend: str, *args: Any) -> str:
        """The forward's backend where it can, else the automatic choice: same residuals for all."""
        if not self.why_not(forward_backend, *args):
            return forward_backend
        device_type = next(arg for arg in args if isinstance(arg, Tensor)).device.type
        for candidate in _backends.AUTOMATIC.get(device_type, ()):
            if not self.why_not(candidate, *args):
                return candidate
        return "reference"

    def _warn_slow(self, candidates: Sequence[str], args: Sequence[Any]) -> None:
        if torch.compiler.is_compiling() or self.name in _warned:
            return
        _warned.add(self.name)
        tried = "; ".join(
            f"{candidate}: {', '.join(self.why_not(candidate, *args))}"
            for candidate in candidates[:-1]
        )
        warnings.warn(f"{self.name} falls back to the reference ({tried})", stacklevel=4)


_warned: set[str] = set()


def describe(args: Sequence[Any]) -> str:
    """Shapes, dtypes and strides of the tensors among the arguments, for error messages."""
    parts = []
    for arg in args:
        if isinstance(arg, Tensor):
            dtype = str(arg.dtype).removeprefix("torch.")
            parts.append(f"{dtype}{list(arg.shape)} strides {list(arg.stride())} {arg.device}")
        else:
            parts.append(repr(arg))
    return ", ".join(parts)


def define(
    name: str,
    signature: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    native: Sequence[str] = ("cpu", "cuda", "simt", "simt_instrumented"),
    triton: str | None = None,
    composed: Callable[..., Any] | None = None,
    why_not: dict[str, WhyNot] | None = None,
    sharding: Sequence[str] = (),
) -> Operator:
    """Define op `name` with one overload per backend.

    `signature` is the schema without the name; `native` names the backends that the compiled modules
    implement; `triton` is "family.module:function", imported at the first call, and the module's `why_not` is
    that backend's rule; `why_not` has the rules of the others; `sharding` says how DTensors may be sharded
    (`_sharding`), beside being replicated. With `composed`, Python has every overload but the reference's:
    `composed(backend, *args)` is made of that backend's overloads of other ops, and `why_not["triton"]` is
    the rule of theirs.
    """
    backends = ["reference", *native]
    if triton is not None or composed is not None:
        backends.append("triton")
    for backend in backends:
        overload = f"{name}.{backend}"
        _library.define(f"{overload}{signature}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"warploom::{overload}", fake, lib=_library)
    _library.impl(f"{name}.reference", _below_autocast(reference), "CompositeExplicitAutograd")
    if triton is not None:
        launcher = _lazy_triton(triton)
        for key in _DISPATCH_KEYS["triton"]:
            _library.impl(f"{name}.triton", launcher, key)
    if composed is not None:
        for backend in backends[1:]:
            for key in _DISPATCH_KEYS[backend]:
                implementation = _below_autocast(partial(composed, backend))
                _library.impl(f"{name}.{backend}", implementation, key)
    rules = dict(why_not or {})
    if triton is not None:
        rules["triton"] = _triton_rule(triton)
    operator = Operator(name, backends, rules, sharding)
    _sharding.register(list(operator.overloads.values()), sharding)
    OPS[name] = operator
    return operator


def _below_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose operations take their arguments as they are: the public function has cast them."""

    def run(*args: Any) -> Any:
        with torch._C._DisableAutocast():
            return function(*args)

    return run


def _triton_rule(path: str) -> WhyNot:
    module_name = path.partition(":")[0]

    def why_not(*args: Any) -> list[str]:
        module = importlib.import_module(f"warploom.triton_kernels.{module_name}")
        reasons: list[str] = module.why_not(*args)
        return reasons

    return why_not


def _lazy_triton(path: str) -> Callable[..., Any]:
    module_name, function = path.split(":")
    launchers: list[Callable[..., Any]] = []

    def launch(*args: Any) -> Any:
        if not launchers:
            module = importlib.import_module(f"warploom.triton_kernels.{module_name}")
            launchers.append(getattr(module, function))
        return launchers[0](*args)

    return launch


class Differentiable:
    """A forward op with its backward op, callable on tensors that may need gradients.

    save(args, outputs) -> the tensors kept for backward, the same for every backend.
    backward(overload, saved, scalars, grads, needs) -> one gradient per tensor argument of the forward's
    schema, in order, optional ones included; `overload` is the backward op of the chosen backend, `scalars`
    are the non-tensor arguments, `needs` says of each tensor argument whether its gradient is asked for.
    """

    def __init__(
        self,
        forward: Operator,
        backward_op: Operator,
        *,
        save: Callable[..., tuple[Tensor | None, ...]],
        backward: Callable[..., tuple[Tensor | None, ...]],
        constants: Sequence[int] = (),
    ) -> None:
        """`constants`: indices of outputs that carry no gradient (saved statistics)."""
        self.forward_op = forward
        self.backward_op = backward_op
        self.plain, self.functorch = _make_functions(
            forward, backward_op, save, backward, constants
        )

    def __call__(self, *args: Any, backend: str | None = None) -> Any:
        chosen = self.forward_op.choose(*args, backend=backend)
        # A tangent would be dropped without a word where no input requires a gradient.
        if forward_ad._current_level >= 0:
            raise RuntimeError(
                f"{self.forward_op.name}: forward-mode differentiation (jvp) is not supported; "
                "use reverse mode, or the functions of warploom.reference"
            )
        if torch.is_grad_enabled() and any(
            isinstance(arg, Tensor) and arg.requires_grad for arg in args
        ):
            chosen_backward = self.backward_op.choose_backward(chosen, *args)
            if torch.compiler.is_compiling():
                args = _distinct(args)
            elif torch._C._are_functorch_transforms_active():
                return self.functorch.apply(chosen, chosen_backward, *args)
            return self.plain.apply(chosen, chosen_backward, *args)
        return self.forward_op.overloads[chosen](*args)


def _distinct(args: Sequence[Any]) -> tuple[Any, ...]:
    """The same arguments with a view in place of a repeated tensor, which Dynamo refuses."""
    distinct: list[Any] = []
    for arg in args:
        repeated = isinstance(arg, Tensor) and any(arg is other for other in distinct)
        distinct.append(arg.view_as(arg) if repeated else arg)
    return tuple(distinct)


def _make_functions(
    forward_op: Operator,
    backward_op: Operator,
    save: Callable[..., tuple[Tensor | None, ...]],
    backward: Callable[..., tuple[Tensor | None, ...]],
    constants: Sequence[int],
) -> tuple[Any, Any]:
    """The two forms of one autograd.Function: the cheap one, and the one that functorch needs."""
    slots = forward_op.tensor_slots

    def keep(ctx: Any, chosen_backward: str, args: Sequence[Any], outputs: Any) -> None:
        results = outputs if isinstance(outputs, tuple) else (outputs,)
        ctx.save_for_backward(*save(args, results))
        ctx.chosen_backward = chosen_backward
        ctx.scalars = [arg for arg, is_tensor in zip(args, slots) if not is_tensor]
        ctx.set_materialize_grads(False)
        if constants:
            ctx.mark_non_differentiable(*(results[index] for index in constants))

    class Once(torch.autograd.Function):
        """The backward with a history whose own backward raises, so that no second derivative is lost.

        `once_differentiable` raises only where the upstream gradient has a history: a gradient penalty
        on a linear loss would lack its term without a word.
        """

        generate_vmap_rule = True

        @staticmethod
        def forward(
            overload: Any, scalars: Any, needs: Any, count: int, *tensors: Tensor | None
        ) -> Any:
            return backward(overload, tensors[:count], scalars, tensors[count:], needs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            raise RuntimeError(
                f"{forward_op.name}: differentiated once only: a second derivative is not supported"
            )

    def run_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        overload = backward_op.overloads[ctx.chosen_backward]
        # A traced backward is given zeros for them, beside DTensors plain ones.
        grads = tuple(None if index in constants else grad for index, grad in enumerate(grads))
        if all(grad is None for grad in grads):
            return (None,) * (2 + len(slots))
        saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        needs = [need for need, is_tensor in zip(needed, slots) if is_tensor]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            once: Any = Once
            results = once.apply(overload, ctx.scalars, needs, len(saved), *saved, *grads)
        else:
            results = backward(overload, saved, ctx.scalars, grads, needs)
        per_tensor = iter(results)
        per_argument = [next(per_tensor) if is_tensor else None for is_tensor in slots]
        return (None, None, *per_argument)

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, chosen: str, chosen_backward: str, *args: Any) -> Any:
            outputs = forward_op.overloads[chosen](*args)
            keep(ctx, chosen_backward, args, outputs)
            return outputs

    class Functorch(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(chosen: str, chosen_backward: str, *args: Any) -> Any:
            return forward_op.overloads[chosen](*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            _, chosen_backward, *args = inputs
            keep(ctx, chosen_backward, args, output)

    for function in (Plain, Functorch):
        function.backward = staticmethod(run_backward)  # type: ignore[method-assign]
        function.__name__ = function.__qualname__ = f"{forward_op.name}_{function.__name__}"
    return Plain, Functorch


def explain(op: str | Callable[..., Any], *args: Any, backend: str | None = None) -> str:
    """Say which backend would serve `op` with these positional op arguments, and why not the others.

    `op` is an op's name, e.g. "rms_norm"; `args` are the arguments of its schema
    (`torch.ops.warploom.rms_norm.reference`'s).
    """
    name = op if isinstance(op, str) else op.__name__
    if name not in OPS:
        raise ValueError(f"explain: op: expected one of {', '.join(sorted(OPS))}, got {name!r}")
    operator = OPS[name]
    chosen = operator.choose(*args, backend=backend)
    lines = [f"{name}({describe(args)}) -> {chosen}"]
    for candidate in _backends.BACKENDS:
        reasons = operator.why_not(candidate, *args)
        lines.append(f"  {candidate}: {'; '.join(reasons) if reasons else 'can serve'}")
    return "\n".join(lines)
