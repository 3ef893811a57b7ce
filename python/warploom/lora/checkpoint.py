"""Directories of one adapter as peft has them: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from warploom.lora.config import CONFIG_NAME, LoraConfig
from warploom.lora.model import (
    adapted_layers,
    adapter_configs,
    add_adapter,
    biases,
    delete_adapter,
    set_adapter,
)
from warploom.models.checkpoint import (
    CheckpointError,
    compare_tensors,
    load_pytorch_file,
    load_safetensors,
)
from warploom.models.directory import existing_directory, replace_directory
from warploom.nn.lora_layer import LoRALayer

_WEIGHTS, _OLD_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."


def save_adapter(model: nn.Module, directory: str | Path, adapter: str = "default") -> None:
    """Saves an adapter, its copies of modules and trained biases included, for `load_adapter` and for peft.

    An adapter that began as a part of the base's weight ("pissa", "olora") is saved as what it changes in
    the original weight, B A - B_0 A_0: an ordinary adapter of twice the rank. One of "loftq" belongs to the
    quantised base, which loading makes again. Files of other names in the directory stay.

    Raises:
        ValueError: no adapter of that name.
    """
    configs = adapter_configs(model)
    if adapter not in configs:
        raise ValueError(f"save_adapter: adapter: expected one of {[*configs]}, got {adapter!r}")
    config, tensors = configs[adapter], _adapter_tensors(model, adapter)
    if config.changes_base and config.init_lora_weights != "loftq":
        config = _doubled(config)
        for name, layer in adapted_layers(model):
            if isinstance(layer, LoRALayer) and adapter in layer.r:
                keys = [key for key in layer.adapter_parameters(adapter) if "magnitude" not in key]
                pairs = zip(keys, _difference(layer, adapter), strict=True)
                tensors |= {f"{_PREFIX}{name}.{key}": value for key, value in pairs}
    owned = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    replaced = (CONFIG_NAME, _WEIGHTS, _OLD_WEIGHTS)
    with replace_directory(directory, drop=lambda name: name in replaced) as staging:
        config.save_pretrained(staging)
        save_file(owned, staging / _WEIGHTS, metadata={"format": "pt"})


@torch.no_grad()
def load_adapter(
    model: nn.Module,
    directory: str | Path,
    adapter: str = "default",
    *,
    trainable: bool = False,
    autocast_adapter_dtype: bool = True,
    dropout_rng: str | None = None,
) -> LoraConfig:
    """Puts an adapter that `save_adapter` or peft has saved on a model, in place; it then acts.

    Args:
        model: the base, or one that has other adapters.
        adapter: its new name.
        trainable: whether it is trained further; a base without adapters is frozen either way.
        autocast_adapter_dtype, dropout_rng: as in `warploom.lora.add_adapter`.

    Returns:
        Its config.

    Raises:
        FileNotFoundError: no such directory or file.
        CheckpointError: a file that is cut, a kind of adapter that is not served, tensors that are missing,
            unexpected or of other shapes; the model then has no such adapter.
    """
    directory = existing_directory(directory)
    config, tensors = LoraConfig.from_pretrained(directory), _read(directory)
    add_adapter(
        model,
        config,
        adapter,
        autocast_adapter_dtype=autocast_adapter_dtype,
        dropout_rng=dropout_rng,
    )
    expected = _adapter_tensors(model, adapter)
    bases = {
        f"{_PREFIX}{name}": tensor for name, tensor in model.state_dict(keep_vars=True).items()
    }
    # peft saves the weight of an embedding beside its adapter.
    expected |= {key: bases[key] for key in tensors if key in bases and ".base_layer." in key}
    try:
        compare_tensors(directory, expected, tensors)
    except CheckpointError:
        delete_adapter(model, adapter)
        raise
    for key, parameter in expected.items():
        parameter.copy_(tensors[key])
    set_adapter(model, adapter, trainable=trainable)
    return config


def _adapter_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """The tensors of an adapter under peft's names."""
    tensors: dict[str, Tensor] = {}
    for name, layer in adapted_layers(model):
        if isinstance(layer, LoRALayer):
            found: Mapping[str, Tensor] = (
                layer.adapter_parameters(adapter) if adapter in layer.r else {}
            )
        else:
            copies = layer.modules_to_save
            found = copies[adapter].state_dict(keep_vars=True) if adapter in copies else {}
        tensors |= {f"{_PREFIX}{name}.{key}": tensor for key, tensor in found.items()}
    trained = biases(model, adapter_configs(model)[adapter].bias)
    return tensors | {f"{_PREFIX}{name}": bias for name, bias in trained.items()}


def _difference(layer: LoRALayer, adapter: str) -> tuple[Tensor, Tensor]:
    """A and B of twice the rank, of what the adapter changes in the weight that the base had before it."""
    lora_a, lora_b = layer.factors(adapter)
    first_a, first_b = layer.initial.get(
        adapter, (torch.zeros_like(lora_a), torch.zeros_like(lora_b))
    )
    return torch.cat((lora_a, first_a.to(lora_a))), torch.cat((lora_b, -first_b.to(lora_b)), dim=1)


def _doubled(config: LoraConfig) -> LoraConfig:
    """The config of those: twice the rank, the same scaling."""
    factor = math.sqrt(2.0) if config.use_rslora else 2
    return dataclasses.replace(
        config,
        r=2 * config.r,
        lora_alpha=factor * config.lora_alpha,
        rank_pattern={name: 2 * rank for name, rank in config.rank_pattern.items()},
        alpha_pattern={name: factor * alpha for name, alpha in config.alpha_pattern.items()},
        init_lora_weights=True,
    )


def _read(directory: Path) -> dict[str, Tensor]:
    path = directory / _WEIGHTS
    if not path.is_file() and (directory / _OLD_WEIGHTS).is_file():
        return load_pytorch_file(directory / _OLD_WEIGHTS)
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: expected {_WEIGHTS} or {_OLD_WEIGHTS}, got neither")
    return load_safetensors(path)
