"""Which model a directory or a name stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from warploom.models import checkpoint as files
from warploom.models import deepseek_v2_config, llama_config
from warploom.models.causal_lm import CausalLanguageModel
from warploom.models.deepseek_v2 import DeepseekV2
from warploom.models.directory import existing_directory
from warploom.models.llama import Llama

_DEEPSEEK_TYPES = ("deepseek_v2", "deepseek_v3")


def model_type(directory: str | Path) -> type[CausalLanguageModel]:
    """The class for a model directory: `DeepseekV2` where its config.json says so, else `Llama`.

    `Llama` says of a model type that it does not know which ones it does.
    """
    path = existing_directory(directory) / "config.json"
    if path.is_file() and files.read_json(path).get("model_type") in _DEEPSEEK_TYPES:
        return DeepseekV2
    return Llama


def load_model(
    directory: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> CausalLanguageModel:
    """`from_pretrained` of the class that the directory is for."""
    return model_type(directory).from_pretrained(directory, device=device, dtype=dtype)


def read_config(model: str | Path) -> Any:
    """The config of a model directory, or the published shape of that name.

    Raises:
        ValueError: neither; the message lists the names.
    """
    for config_type, presets in (
        (llama_config.LlamaConfig, llama_config.PRESETS),
        (deepseek_v2_config.DeepseekV2Config, deepseek_v2_config.PRESETS),
    ):
        if str(model) in presets:
            return config_type.preset(str(model))
    if not Path(model).is_dir():
        names = ", ".join([*llama_config.PRESETS, *deepseek_v2_config.PRESETS])
        raise ValueError(f"model: expected a model directory or one of {names}, got {str(model)!r}")
    kind = model_type(model)
    return files.read_config(Path(model) / "config.json", kind.config_type.from_dict)
