"""(IA)^3: learned vectors that scale keys, values and the inside of the feed-forward block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from warploom.lora.modules import Model, find_modules, replace_module


class IA3Linear(nn.Module):
    """A frozen linear layer whose output, or for a feed-forward layer whose input, is scaled by ia3_l.

    Liu et al., arXiv:2205.05638, section 3.3. Output: y = ia3_l (x W^T + bias), ia3_l [N, 1]; input:
    y = (ia3_l x) W^T + bias, ia3_l [1, K]; ones at first. The name and the shapes are peft's.
    """

    def __init__(self, base_layer: nn.Linear, feedforward: bool) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.feedforward = feedforward
        shape = (1, base_layer.in_features) if feedforward else (base_layer.out_features, 1)
        dtype = torch.promote_types(base_layer.weight.dtype, torch.float32)
        self.ia3_l = nn.Parameter(torch.ones(shape, dtype=dtype, device=base_layer.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        scale = self.ia3_l.flatten()
        if self.feedforward:
            x = (x * scale).to(x.dtype)
        out: Tensor = self.base_layer(x)
        return out if self.feedforward else (out * scale).to(out.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The base with the vector in its weight, and in its bias where the output is scaled."""
        weight, bias = self.base_layer.weight, self.base_layer.bias
        weight.copy_((weight * self.ia3_l).to(weight.dtype))
        if bias is not None and not self.feedforward:
            bias.copy_((bias * self.ia3_l.flatten()).to(bias.dtype))
        return self.base_layer


def get_ia3_model(
    model: Model,
    target_modules: Sequence[str] | str = ("k_proj", "v_proj", "down_proj"),
    feedforward_modules: Sequence[str] | str = ("down_proj",),
) -> Model:
    """Freezes a model and scales the targets' outputs, or inputs (`feedforward_modules`), in place.

    Both arguments are names, or an expression for whole names, as in `LoraConfig`.
    """
    model.requires_grad_(False)
    feedforward = {name for name, _ in find_modules(model, feedforward_modules)}
    for name, module in find_modules(model, target_modules):
        if not isinstance(module, nn.Linear):
            raise ValueError(
                f"get_ia3_model: {name}: expected nn.Linear, got {type(module).__name__}"
            )
        replace_module(model, name, IA3Linear(module, name in feedforward))
    return model


def merge_ia3(model: Model) -> Model:
    """The model with the vectors in its weights and ordinary layers."""
    for name, module in list(model.named_modules()):
        if isinstance(module, IA3Linear):
            replace_module(model, name, module.merged())
    return model
