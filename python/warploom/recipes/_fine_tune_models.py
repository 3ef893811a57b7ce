"""The models that fine-tuning trains: all of a model's parameters, or adapters on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh

from warploom.lora import LoraConfig, adapter_configs, get_lora_model
from warploom.models.auto import load_model
from warploom.models.causal_lm import CausalLanguageModel
from warploom.models.parallel import fully_shard_model
from warploom.nn.quantized_linear import QuantizedLinear

if TYPE_CHECKING:
    from warploom.recipes.alpaca import FineTuneConfig

METHODS = ("full", "lora", "qlora")
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def build_model(config: FineTuneConfig, device: torch.device, shards: int) -> CausalLanguageModel:
    """The model to train, with adapters on it and sharded over the processes where asked."""
    dtype = DTYPES[config.dtype]
    model = load_model(config.model, device="cpu" if shards > 1 else device, dtype=dtype)
    model.gradient_checkpointing = config.gradient_checkpointing
    if config.method == "qlora":
        quantize_layers(model, config.quantization)
    if config.method != "full":
        get_lora_model(model, adapter_config(config))
    if shards > 1:
        half = torch.bfloat16 if config.bfloat16 else None
        mesh = init_device_mesh(device.type, (shards,))
        fully_shard_model(model, mesh, param_dtype=half, reduce_dtype=torch.float32)
    return model.train()


def adapter_config(config: FineTuneConfig) -> LoraConfig:
    """peft's config of the adapter that a run trains."""
    targets: list[str] | str = config.lora_target_modules.split(",")
    if len(targets) == 1:
        targets = config.lora_target_modules  # "all-linear", a name, or an expression
        targets = targets if targets == "all-linear" or not targets.isidentifier() else [targets]
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(config.model),
    )


def quantize_layers(model: CausalLanguageModel, weight_format: str) -> None:
    """The linear layers of the decoder's layers, their weights in 4 or 8 bits; embedding, norms and head
    stay as they are."""
    for name, module in list(model.model.layers.named_modules()):
        if type(module) is nn.Linear:
            owner, _, leaf = name.rpartition(".")
            quantized = QuantizedLinear.from_linear(module, weight_format)
            setattr(model.model.layers.get_submodule(owner), leaf, quantized)


def whole_model(model: CausalLanguageModel) -> CausalLanguageModel:
    """Of a sharded model one that rank 0 can save: what is trained is there, the rest on the meta device.

    Every process calls this.
    """
    gather = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=gather)
    whole = type(model)(model.config, device="meta")
    if hasattr(model, "lora_configs"):
        for name, config in adapter_configs(model).items():
            get_lora_model(whole, config, name)
    whole.load_state_dict(state, strict=False, assign=True)
    if not hasattr(model, "lora_configs"):
        whole.tie_weights()
    return whole
