"""A model of given weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from warploom.models.causal_lm import CausalLanguageModel

_Model = TypeVar("_Model", bound=CausalLanguageModel)


def build_model(
    kind: type[_Model], config: Any, tensors: Mapping[str, Tensor], like: CausalLanguageModel
) -> _Model:
    """A `kind` of copies of the tensors, in the mode (training, checkpointing) of `like`."""
    model = kind(config, gradient_checkpointing=like.gradient_checkpointing, device="meta")
    copies = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    model.load_state_dict(copies, assign=True)
    model.tie_weights()
    return model.train(like.training)
