"""What was trained of a model, as one file: for bottleneck adapters, (IA)^3 and virtual tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from warploom.models.checkpoint import compare_tensors, load_safetensors


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that need gradients, by their names in the state dict."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def save_trained(model: nn.Module, path: str | Path) -> None:
    """Writes them to a safetensors file."""
    save_file({name: p.contiguous() for name, p in trained_parameters(model).items()}, path)


@torch.no_grad()
def load_trained(model: nn.Module, path: str | Path) -> None:
    """Reads them into a model that has been adapted in the same way.

    Raises:
        FileNotFoundError, CheckpointError: no such file, one that is cut, or other names and shapes.
    """
    expected, given = trained_parameters(model), load_safetensors(Path(path))
    compare_tensors(path, expected, given)
    for name, parameter in expected.items():
        parameter.copy_(given[name])
