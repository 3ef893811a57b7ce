"""How the ops run on DTensors: one line per op says which dimensions may be sharded.

A rule names the dimensions of every tensor of an op's schema, in order:

    "B s H d, B t H d, B t H e -> B s H e, B H s"

A capital dimension may be sharded: each tensor that has it is sharded there, and every other is replicated
if it is an input, Partial if it is an output, for an output without the dimension is a sum over it.
`...` stands for any number of leading dimensions, all of which may be sharded. `-` is an optional argument
that has to be None, or an output that is empty; `B t if flag` is one that is empty where the op's argument
`flag` is false.

An op may have several rules, of which the first that fits the arguments holds (dense or packed, contiguous
or paged). Replicating everything is always correct and always offered.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch


class Rule(NamedTuple):
    """The layouts of the tensor arguments and of the outputs: names of dimensions, "-" or "names if flag"."""

    inputs: list[str]
    outputs: list[str]

    @classmethod
    def parse(cls, text: str) -> Rule:
        inputs, outputs = text.split("->")
        return cls(
            *(
                [part.strip() for part in side.split(",") if part.strip()]
                for side in (inputs, outputs)
            )
        )


def _dimensions(layout: str, leading: int) -> list[str]:
    """Names of the dimensions, `leading` of them for "..."."""
    names = layout.split()
    if names[:1] == ["..."]:
        names[:1] = [f"...{index}" for index in range(leading)]
    return names


def _fit(rule: Rule, tensors: Sequence[Any]) -> tuple[list[list[str]], int] | None:
    """Each tensor's dimensions and the length of "...", or None where the rule does not fit."""
    leading = 0
    fitted: list[list[str]] = []
    for layout, tensor in zip(rule.inputs, tensors, strict=True):
        if tensor is None:
            fitted.append([])
            continue
        if layout.startswith("..."):
            leading = tensor.ndim - len(layout.split()) + 1
        names = _dimensions(layout, leading)
        if layout == "-" or len(names) != tensor.ndim:
            return None
        fitted.append(names)
    return fitted, leading


def _divides(sizes: set[int], mesh_shape: Sequence[int]) -> bool:
    """Whether a dimension is cut at the same places in all tensors, over whichever mesh dimensions.

    That is so where its sizes are equal, or (query heads and key/value heads) where no cut leaves a rest.
    Cuts into more parts than the smallest size are never made.
    """
    if len(sizes) == 1:
        return True
    cuts = [
        math.prod(chosen)
        for count in range(1, len(mesh_shape) + 1)
        for chosen in combinations(mesh_shape, count)
    ]
    made = [cut for cut in cuts if cut <= min(sizes)]
    return bool(made) and not any(size % cut for cut in made for size in sizes)


def placements(rules: Sequence[Rule], schema: Any, args: Sequence[Any]) -> list[tuple[Any, Any]]:
    """(output placements, argument placements) of one mesh dimension that the op can run with.

    `args` are the op's arguments, each tensor as its DTensorSpec.
    """
    from torch.distributed.tensor import Replicate

    is_tensor = ["Tensor" in str(argument.type) for argument in schema.arguments]
    tensors = [arg for arg, tensor in zip(args, is_tensor) if tensor]
    flags = {argument.name: arg for argument, arg in zip(schema.arguments, args)}
    whole = [None if tensor is None else Replicate() for tensor in tensors]
    found: list[tuple[Any, Any]] = [([Replicate() for _ in schema.returns], whole)]
    for rule in rules:
        if (fit := _fit(rule, tensors)) is not None:
            found += _sharded(rule, *fit, tensors, flags)
            break

    def among_scalars(per_tensor: Sequence[Any]) -> list[Any]:
        rest = iter(per_tensor)
        return [next(rest) if tensor else None for tensor in is_tensor]

    return [(outs, among_scalars(ins)) for outs, ins in found]


def _sharded(
    rule: Rule,
    inputs: list[list[str]],
    leading: int,
    tensors: Sequence[Any],
    flags: dict[str, Any],
) -> Iterator[tuple[list[Any], list[Any]]]:
    """(output placements, tensor placements) for every dimension that may be sharded."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    def is_empty(layout: str) -> bool:
        flag = layout.partition(" if ")[2]
        return layout == "-" or bool(flag and not flags[flag])

    outputs = [
        None if is_empty(layout) else _dimensions(layout.partition(" if ")[0], leading)
        for layout in rule.outputs
    ]
    sizes: dict[str, set[int]] = {}
    for names, tensor in zip(inputs, tensors):
        for name, size in zip(names, tensor.shape if names else ()):
            sizes.setdefault(name, set()).add(size)
    mesh_shape = next(tensor for tensor in tensors if tensor is not None).mesh.shape
    for name in sizes:
        may_shard = name.isupper() or name.startswith("...")
        if not may_shard or not _divides(sizes[name], mesh_shape):
            continue

        def place(names: list[str], otherwise: Any, name: str = name) -> Any:
            return Shard(names.index(name)) if name in names else otherwise

        yield (
            [Replicate() if names is None else place(names, Partial()) for names in outputs],
            [
                None if tensor is None else place(names, Replicate())
                for names, tensor in zip(inputs, tensors)
            ],
        )


def _keeping_mutated(
    found: list[tuple[Any, Any]], schema: Any, args: Sequence[Any]
) -> list[tuple[Any, Any]]:
    """Those that leave what the op writes to where it is: a redistributed copy would be lost."""
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            held = args[index].placements
            kept = [(outs, ins) for outs, ins in found if ins[index] in held]
            if not kept:
                allowed = ", ".join(sorted({str(ins[index]) for _, ins in found}))
                raise ValueError(
                    f"{schema.name}: {argument.name}: expected placements among {allowed}, "
                    f"got {held}"
                )
            found = kept
    return found


def register(overloads: Sequence[Any], rules: Sequence[str]) -> None:
    """Tell DTensor the rules of an op's overloads.

    At definition, not at first use: that may be inside a traced graph. And torch.distributed.tensor is loaded
    by then in any case, by `torch._dynamo`.
    """
    if not torch.distributed.is_available():
        return
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.experimental import register_sharding

    parsed = [Rule.parse(rule) for rule in rules]
    schema = overloads[0]._schema

    @register_sharding(list(overloads))  # type: ignore[untyped-decorator]
    def strategy(*args: Any) -> list[tuple[Any, Any]]:
        return _keeping_mutated(placements(parsed, schema, args), schema, args)

    # DTensor remembers decisions by the tensors and by the scalars from the first int on. Flags decide too.
    flags = [index for index, arg in enumerate(schema.arguments) if str(arg.type) == "bool"]
    for overload in overloads:
        known = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info[overload]
        known.static_argnum = min([known.static_argnum, *flags])
