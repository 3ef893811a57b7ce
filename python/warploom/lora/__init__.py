"""Parameter-efficient fine-tuning of whole models: LoRA with peft's names and files, and its relatives."""

from warploom.lora.checkpoint import load_adapter, save_adapter
from warploom.lora.config import LoraConfig
from warploom.lora.model import (
    adapter_configs,
    add_adapter,
    delete_adapter,
    disable_adapter,
    freeze_lora_a,
    get_lora_model,
    lora_plus_groups,
    merge_adapter,
    merge_and_unload,
    parameter_counts,
    set_adapter,
    unmerge_adapter,
)

__all__ = [
    "LoraConfig",
    "adapter_configs",
    "add_adapter",
    "delete_adapter",
    "disable_adapter",
    "freeze_lora_a",
    "get_lora_model",
    "load_adapter",
    "lora_plus_groups",
    "merge_adapter",
    "merge_and_unload",
    "parameter_counts",
    "save_adapter",
    "set_adapter",
    "unmerge_adapter",
]
