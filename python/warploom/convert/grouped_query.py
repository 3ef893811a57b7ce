"""Grouped-query attention from multi-head attention."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from warploom.convert._build import build_model
from warploom.models.llama import Llama


@torch.no_grad()
def mha_to_gqa(model: Llama, num_key_value_heads: int) -> Llama:
    """The model with fewer key/value heads, each the mean of those whose place it takes.

    Ainslie et al., GQA (arXiv:2305.13245), section 2.1. Exact where the heads of a group are the same.

    Args:
        model: left as it is.
        num_key_value_heads: a divisor of the model's.
    """
    config = model.config
    heads = config.num_key_value_heads
    if num_key_value_heads < 1 or heads % num_key_value_heads:
        raise ValueError(
            f"mha_to_gqa: num_key_value_heads: expected a divisor of {heads}, got "
            f"{num_key_value_heads}"
        )

    def pool(tensor: Tensor) -> Tensor:
        """[heads head_dim, ...] -> [num_key_value_heads head_dim, ...]"""
        groups: Tensor = tensor.unflatten(0, (num_key_value_heads, -1, config.head_dim))
        return groups.double().mean(1).flatten(0, 1).to(tensor.dtype)

    tensors = {
        name: pool(tensor) if ".k_proj." in name or ".v_proj." in name else tensor
        for name, tensor in model.state_dict().items()
    }
    changed = dataclasses.replace(config, num_key_value_heads=num_key_value_heads)
    return build_model(Llama, changed, tensors, like=model)
