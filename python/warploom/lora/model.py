"""Adapters on a whole model: the layers are exchanged in place, the model stays what it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from warploom.lora.config import ALL_LINEAR, LoraConfig
from warploom.lora.initialise import initialise
from warploom.lora.modules import Model, expect_some, outermost, replace_module
from warploom.lora.saved_module import SavedModule
from warploom.nn.lora import LoRALinear, wrap_layer
from warploom.nn.lora_layer import LoRALayer
from warploom.nn.quantized_linear import QuantizedLinear


def get_lora_model(
    model: Model,
    config: LoraConfig,
    adapter: str = "default",
    *,
    autocast_adapter_dtype: bool = True,
    dropout_rng: str = "philox",
) -> Model:
    """Freezes a model and puts an adapter on it that acts and is trained.

    The model is changed in place and returned: its class, its forward and `generate` stay.

    Args:
        model: any module with `torch.nn.Linear`, `QuantizedLinear` or `torch.nn.Embedding` layers: those of
            `warploom.models`, those of transformers.
        config: which layers get what.
        adapter: its name.
        autocast_adapter_dtype: whether parameters of adapters on a base of 16 bits are float32.
        dropout_rng: "philox", or "torch" for the masks that peft draws; see `warploom.ops.lora.lora_linear`.

    Raises:
        ValueError: no module is a target, or one is of a kind that is not served; the message names it.
    """
    add_adapter(
        model,
        config,
        adapter,
        autocast_adapter_dtype=autocast_adapter_dtype,
        dropout_rng=dropout_rng,
    )
    set_adapter(model, adapter)
    return model


def adapter_configs(model: nn.Module) -> dict[str, LoraConfig]:
    """The model's adapters by their names; a model that had none is frozen and can have them from now on."""
    if not hasattr(model, "lora_configs"):
        model.requires_grad_(False)
        model.lora_configs = {}  # type: ignore[assignment]
    configs: Any = model.lora_configs
    return configs  # type: ignore[no-any-return]


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer | SavedModule]]:
    """The layers that adapters are on, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer | SavedModule):
            yield name, module


def add_adapter(
    model: nn.Module,
    config: LoraConfig,
    adapter: str,
    *,
    autocast_adapter_dtype: bool = True,
    dropout_rng: str | None = None,
) -> None:
    """A further adapter, which does not act before `set_adapter`.

    Args:
        dropout_rng: of all adapters of its layers; None: as it is there.

    The other arguments are `get_lora_model`'s.
    """
    configs = adapter_configs(model)
    if adapter in configs:
        raise ValueError(f"add_adapter: adapter: expected a new name, got {adapter!r}")
    targets = _targets(model, config)
    if config.changes_base:
        _refuse_tied(
            model, [name for name, _ in targets], f"init_lora_weights {config.init_lora_weights}"
        )
    for name, module in targets:
        layer = module if isinstance(module, LoRALayer) else wrap_layer(module)
        if layer is None:
            raise ValueError(
                f"target_modules: {name}: expected a linear layer or an embedding, got "
                f"{type(module).__name__}"
            )
        layer.dropout_rng = dropout_rng or layer.dropout_rng
        layer.add_adapter(
            adapter,
            config.rank(name),
            config.alpha(name),
            config.lora_dropout,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            dtype=None if autocast_adapter_dtype else layer.base_dtype,
        )
        initialise(layer, adapter, config)
        layer.train(module.training)
        replace_module(model, name, layer)
    for name, module in outermost(model):
        if config.saves(name):
            saved = module if isinstance(module, SavedModule) else SavedModule(module)
            saved.add_adapter(adapter, _saved_dtype(module) if autocast_adapter_dtype else None)
            replace_module(model, name, saved)
    configs[adapter] = config


def set_adapter(model: nn.Module, adapters: str | Sequence[str], *, trainable: bool = True) -> None:
    """Which adapters act: one, or several whose updates are summed; they alone are trained, if at all.

    Raises:
        ValueError: a name that is not there; several with DoRA, biases or a copy of one module.
    """
    names = [adapters] if isinstance(adapters, str) else list(adapters)
    configs = adapter_configs(model)
    if not {*names} <= configs.keys():
        raise ValueError(f"set_adapter: adapters: expected some of {[*configs]}, got {names}")
    biased = [name for name in names if configs[name].bias != "none"]
    if biased and len(names) > 1:
        raise ValueError(
            f"set_adapter: adapters: expected {biased[0]} alone, it trains biases, got {names}"
        )
    for _, layer in adapted_layers(model):
        layer.set_adapter(names, trainable)
    for parameter in biases(model, "all").values():
        parameter.requires_grad_(False)
    for name in biased:
        for parameter in biases(model, configs[name].bias).values():
            parameter.requires_grad_(trainable)


def delete_adapter(model: nn.Module, adapter: str) -> None:
    """Forgets an adapter."""
    for _, layer in adapted_layers(model):
        layer.delete_adapter(adapter)
    del adapter_configs(model)[adapter]


def biases(model: nn.Module, which: str) -> dict[str, nn.Parameter]:
    """The biases that `LoraConfig.bias` names, outside copies of modules, by their names."""
    named = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] == "bias" and "modules_to_save" not in name
    }
    if which == "all":
        return named
    targets = {f"{name}.base_layer.bias" for name, _ in adapted_layers(model)}
    return {name: bias for name, bias in named.items() if which == "lora_only" and name in targets}


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Within it the model is its base (but for biases that were trained)."""
    layers = [layer for _, layer in adapted_layers(model)]
    before = [layer.disabled for layer in layers]
    try:
        for layer in layers:
            layer.disable()
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer.disable(disabled)


def merge_adapter(
    model: nn.Module, adapters: str | Sequence[str] | None = None, *, keep_base: bool = True
) -> float:
    """Puts adapters (default: the active ones) into the weights; see `LoRALayer.merge`.

    Returns:
        The largest absolute error that `unmerge_adapter` will leave in a weight: 0 with `keep_base`.
    """
    names = [adapters] if isinstance(adapters, str) else adapters
    layers = [
        (name, layer) for name, layer in adapted_layers(model) if isinstance(layer, LoRALayer)
    ]
    if not keep_base:
        _refuse_tied(model, [name for name, _ in layers], "merging without keep_base")
    errors = [
        layer.merge(
            None if names is None else [name for name in names if name in layer.r],
            keep_base=keep_base,
        )
        for _, layer in layers
    ]
    return max(errors, default=0.0)


def unmerge_adapter(model: nn.Module) -> None:
    """Undoes `merge_adapter`."""
    for _, layer in adapted_layers(model):
        if isinstance(layer, LoRALayer):
            layer.unmerge()


@torch.no_grad()
def merge_and_unload(model: Model, adapters: str | Sequence[str] | None = None) -> Model:
    """The model with adapters (default: the active ones) in its weights and without any layers of theirs.

    A quantised base becomes a dense layer. Copies of whole modules take the place of their originals.
    """
    layers = list(adapted_layers(model))
    _refuse_tied(model, [name for name, _ in layers], "merge_and_unload")
    if adapters is not None:
        set_adapter(model, adapters)
    for name, layer in layers:
        if isinstance(layer, SavedModule):
            replace_module(model, name, layer.acting)
            continue
        base, weight = layer.base_layer, nn.Parameter(layer.adapted_weight(), requires_grad=False)
        if isinstance(base, QuantizedLinear):
            base = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
            base.register_parameter("bias", layer.base_layer.bias)
            base.train(layer.training)
        base.weight = weight
        replace_module(model, name, base)
    del model.lora_configs
    return model


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """How many parameters are trained, and how many there are, values of quantised weights included."""
    parameters = list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    quantised = sum(
        module.in_features * module.out_features
        for module in model.modules()
        if isinstance(module, QuantizedLinear)
    )
    return trained, sum(parameter.numel() for parameter in parameters) + quantised


def lora_plus_groups(model: nn.Module, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
    """LoRA+ (Hayou et al., arXiv:2402.12354): parameter groups for an optimizer, in which lora_B learns
    `ratio` times as fast as all else that is trained."""
    fast: list[Tensor] = []
    slow: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (fast if ".lora_B." in f".{name}" else slow).append(parameter)
    groups = [{"params": slow, "lr": lr}, {"params": fast, "lr": lr * ratio}]
    return [group for group in groups if group["params"]]


def freeze_lora_a(model: nn.Module, frozen: bool = True) -> None:
    """LoRA-FA (Zhang et al., arXiv:2308.03303): A stays as it was drawn, B alone is trained."""
    for _, layer in adapted_layers(model):
        if isinstance(layer, LoRALayer):
            layer.freeze_a(frozen)


def _targets(model: nn.Module, config: LoraConfig) -> list[tuple[str, nn.Module]]:
    found = [(name, module) for name, module in outermost(model) if config.targets(name)]
    if config.target_modules == ALL_LINEAR:
        head: Any = getattr(
            model, "get_output_embeddings", lambda: getattr(model, "lm_head", None)
        )()
        linear = (nn.Linear, QuantizedLinear, LoRALinear)
        found = [pair for pair in found if isinstance(pair[1], linear) and pair[1] is not head]
    return expect_some(model, config.target_modules, found)


def _refuse_tied(model: nn.Module, names: Sequence[str], what: str) -> None:
    """ValueError where the base's weight of one of the layers is another module's too."""
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(
            name.removesuffix(".base_layer.weight").removesuffix(".weight")
        )
    for owners in users.values():
        tied = [name for name in owners if name in names]
        if tied and len(owners) > 1:
            raise ValueError(
                f"{what}: expected a weight of its own in {tied[0]}, got one tied to {owners}"
            )


def _saved_dtype(module: nn.Module) -> torch.dtype | None:
    """float32 where the module's parameters have 16 bits."""
    dtypes = {parameter.dtype for parameter in module.parameters()}
    return torch.float32 if dtypes & {torch.float16, torch.bfloat16} else None
