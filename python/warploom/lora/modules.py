"""The modules of a model by their names: found, and exchanged in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from torch import nn

from warploom.lora.config import matches
from warploom.lora.saved_module import SavedModule
from warploom.nn.lora_layer import LoRALayer

Model = TypeVar("Model", bound=nn.Module)


def outermost(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules with their names, without what is inside of layers that have adapters."""
    for name, child in model.named_children():
        yield f"{prefix}{name}", child
        if not isinstance(child, LoRALayer | SavedModule):
            yield from outermost(child, f"{prefix}{name}.")


def find_modules(model: nn.Module, patterns: Sequence[str] | str) -> list[tuple[str, nn.Module]]:
    """The modules of these names, or of a name that an expression matches; as `LoraConfig.target_modules`."""
    found = [pair for pair in outermost(model) if matches(patterns, pair[0])]
    return expect_some(model, patterns, found)


def expect_some(
    model: nn.Module, patterns: object, found: list[tuple[str, nn.Module]]
) -> list[tuple[str, nn.Module]]:
    """`found`, or ValueError where that is empty."""
    if not found:
        ends = sorted({name.rpartition(".")[2] for name, _ in outermost(model)})
        raise ValueError(
            f"target_modules: expected names of modules ({', '.join(ends)}), got {patterns!r}, which no "
            "module is called"
        )
    return found


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of the one that has this name."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)
