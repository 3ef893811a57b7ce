"""A module that adapters train as a whole."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


class SavedModule(nn.Module):
    """A frozen module and a trained copy of it an adapter (peft's `modules_to_save`), one of which acts.

    State dict: original_module.* and modules_to_save.<adapter>.*. What is not found here is looked for in
    the one that acts.
    """

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__()
        self.original_module = original_module.requires_grad_(False)
        self.modules_to_save = nn.ModuleDict()
        self.active_adapter: str | None = None
        self.disabled = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.acting, name)

    @property
    def acting(self) -> nn.Module:
        if self.active_adapter is None or self.disabled:
            original: nn.Module = self.original_module
            return original
        return self.modules_to_save[self.active_adapter]

    def add_adapter(self, adapter: str, dtype: torch.dtype | None = None) -> None:
        """A copy of the original for this adapter, its floating tensors in `dtype`; it does not act yet."""
        trained = copy.deepcopy(self.original_module)
        self.modules_to_save[adapter] = trained.to(dtype).requires_grad_(False)

    def delete_adapter(self, adapter: str) -> None:
        if adapter in self.modules_to_save:
            del self.modules_to_save[adapter]
            self.active_adapter = None if self.active_adapter == adapter else self.active_adapter

    def set_adapter(self, adapters: list[str], trainable: bool) -> None:
        """At most one of them can have a copy here."""
        names = [name for name in adapters if name in self.modules_to_save]
        if len(names) > 1:
            raise ValueError(f"SavedModule: adapters: expected one that has a copy, got {names}")
        self.active_adapter = names[0] if names else None
        for name, module in self.modules_to_save.items():
            module.requires_grad_(trainable and name in names)

    def disable(self, disabled: bool = True) -> None:
        self.disabled = disabled

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.acting(*args, **kwargs)
