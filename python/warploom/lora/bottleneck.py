"""Bottleneck adapters: a small residual network behind a sublayer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from warploom.lora.modules import Model, find_modules, replace_module

_ACTIVATIONS: dict[str, Any] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


class Bottleneck(nn.Module):
    """A frozen module and an adapter behind it: h = base(x), y = h + up(act(down(h))).

    Houlsby et al., arXiv:1902.00751, section 2.1. `up` is zero at first, so that y = h.

    Args:
        base_layer: a module that returns one tensor [..., features].
        features: features of that.
        size: features in between.
        activation: "gelu", "relu" or "silu".
    """

    def __init__(
        self,
        base_layer: nn.Module,
        features: int,
        size: int,
        activation: str = "gelu",
        **factory: Any,
    ) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"Bottleneck: activation: expected one of {', '.join(_ACTIVATIONS)}, got {activation!r}"
            )
        self.base_layer = base_layer.requires_grad_(False)
        self.activation = activation
        self.down = nn.Linear(features, size, **factory)
        self.up = nn.Linear(size, features, **factory)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """base_layer(...) in its dtype; the adapter computes in its own."""
        hidden: Tensor = self.base_layer(*args, **kwargs)
        inner = _ACTIVATIONS[self.activation](self.down(hidden.to(self.down.weight.dtype)))
        update: Tensor = self.up(inner).to(hidden.dtype)
        return hidden + update


def add_bottlenecks(
    model: Model,
    size: int,
    after: Sequence[str] | str = ("o_proj", "down_proj"),
    activation: str = "gelu",
) -> Model:
    """Freezes a model and puts an adapter behind linear layers, in place.

    Args:
        size: features of the bottleneck.
        after: the layers, by default the last of attention and of the feed-forward block, as in the paper:
            names, or an expression for whole names, as in `LoraConfig`.
        activation: as in `Bottleneck`. Parameters are float32 where the base has 16 bits.
    """
    model.requires_grad_(False)
    for name, module in find_modules(model, after):
        if not isinstance(module, nn.Linear):
            raise ValueError(
                f"add_bottlenecks: {name}: expected nn.Linear, got {type(module).__name__}"
            )
        dtype = torch.promote_types(module.weight.dtype, torch.float32)
        factory: dict[str, Any] = {"device": module.weight.device, "dtype": dtype}
        replace_module(
            model, name, Bottleneck(module, module.out_features, size, activation, **factory)
        )
    return model
