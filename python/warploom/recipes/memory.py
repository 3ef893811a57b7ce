"""How many bytes a training step needs: full fine-tuning, LoRA and QLoRA.

State, a parameter: its weight and, where it is trained, a gradient, AdamW's two moments and maybe a float32
master copy (Rajbhandari et al., ZeRO, arXiv:1910.02054, section 3.1: 2 + 2 + 4 + 8 = 16 bytes).

Activations of a LLaMA, a token: what its backward pass reads. With h = hidden_size, q and k the features of
the queries and of the keys, m = intermediate_size and s bytes an element, a layer keeps

  s (2 h [residual sums] + h [input of q, k, v] + 2 q + 2 k [attention] + h [input of gate and up]
     + 2 m [swiglu] + m [input of down]) + 4 heads [log-sum-exp] + 8 [two norms' statistics]

A projection that is frozen and has no adapter keeps no input; an adapter keeps s r more. With gradient
checkpointing a layer keeps its two inputs, 2 h s, and one layer at a time all the above. The fused loss
keeps the gradient of the hidden states, s h; without it float32 logits and their gradient, 8 V, and the
logits as they were, s V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from warploom.models.auto import read_config
from warploom.models.llama import Llama
from warploom.models.llama_config import LlamaConfig
from warploom.recipes._extras import require

METHODS = ("full", "lora", "qlora")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NF4_BYTES = 0.5 + 4 / 64  # a code, and a float32 scale for 64 of them


@dataclass(frozen=True)
class Precision:
    """Bytes a parameter that is trained, and an element of the activations."""

    weight: int
    gradient: int
    master: int
    moments: int
    activation: int

    @property
    def trained(self) -> int:
        return self.weight + self.gradient + self.master + self.moments


PRECISIONS = {
    "mixed": Precision(2, 2, 4, 8, 2),
    "mixed-without-master": Precision(2, 2, 0, 8, 2),
    "bfloat16": Precision(2, 2, 0, 4, 2),
    "float32": Precision(4, 4, 0, 8, 4),
    # `warploom sft --bfloat16` on float32 weights: those are the master copy, and autocast makes the other.
    "autocast": Precision(2, 4, 4, 8, 2),
}


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step. The sum is reached where gradients are accumulated; without that gradients
    come as activations go."""

    weights: float
    master: float
    gradients: float
    optimizer: float
    activations: float = 0.0

    @property
    def total(self) -> float:
        return float(sum(getattr(self, field.name) for field in fields(self)))


def state_memory(
    trained: int, frozen: int = 0, precision: str = "mixed", frozen_bytes: float = 2.0
) -> Memory:
    """The bytes that do not depend on the batch.

    Args:
        trained, frozen: parameters.
        precision: a key of `PRECISIONS`.
        frozen_bytes: bytes a frozen parameter; 2 for 16 bits, `NF4_BYTES` for NF4.
    """
    if precision not in PRECISIONS:
        raise ValueError(
            f"memory: precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}"
        )
    each = PRECISIONS[precision]
    return Memory(
        weights=trained * each.weight + frozen * frozen_bytes,
        master=trained * each.master,
        gradients=trained * each.gradient,
        optimizer=trained * each.moments,
    )


def training_memory(
    model: str | Path | LlamaConfig,
    method: str = "full",
    *,
    batch_size: int = 1,
    sequence_length: int = 512,
    precision: str = "mixed",
    lora_r: int = 16,
    target_modules: Sequence[str] = PROJECTIONS,
    gradient_checkpointing: bool = False,
    fused_loss: bool = True,
    quantized_bytes: float = NF4_BYTES,
) -> Memory:
    """The bytes of a training step of a LLaMA or a relative; the formulas are the module's.

    Args:
        model: a Hugging Face directory, a published shape's name, or a config.
        method: "full", "lora" or "qlora": with the projections of the layers in 4 bits.
        batch_size, sequence_length: of one forward pass.
        precision: a key of `PRECISIONS`; frozen parameters take the bytes of an activation.
        lora_r, target_modules: the adapters' rank, and the projections that have one.
        gradient_checkpointing, fused_loss: as in ``warploom sft``.
        quantized_bytes: bytes a weight that QLoRA quantises.
    """
    config = model if isinstance(model, LlamaConfig) else read_config(model)
    if not isinstance(config, LlamaConfig):
        raise ValueError(f"memory: model: expected a LLaMA or a relative, got {model}")
    if method not in METHODS:
        raise ValueError(f"memory: method: expected one of {', '.join(METHODS)}, got {method!r}")
    if unknown := [name for name in target_modules if name not in PROJECTIONS]:
        raise ValueError(
            f"memory: target_modules: expected some of {', '.join(PROJECTIONS)}, got {unknown[0]!r}"
        )
    targets = () if method == "full" else tuple(target_modules)
    count, quantisable, adapters = _parameters(config, lora_r, targets)
    element = PRECISIONS[precision].activation if precision in PRECISIONS else 0
    if method == "full":
        state = state_memory(count, 0, precision)
    else:
        frozen_bytes = float(element)
        if method == "qlora":
            frozen_bytes += (quantized_bytes - element) * quantisable / count
        state = state_memory(adapters, count, precision, frozen_bytes)
    kept = _layer_bytes(config, element, method == "full", lora_r, targets)
    per_token = config.num_hidden_layers * kept
    if gradient_checkpointing:
        per_token = 2 * config.num_hidden_layers * config.hidden_size * element + kept
    # The last norm, the hidden states, and the loss.
    per_token += 2 * config.hidden_size * element + 4
    per_token += config.hidden_size * element if fused_loss else config.vocab_size * (8 + element)
    activations = batch_size * sequence_length * per_token
    return Memory(state.weights, state.master, state.gradients, state.optimizer, activations)


def _parameters(config: LlamaConfig, rank: int, targets: Sequence[str]) -> tuple[int, int, int]:
    """Parameters of the model, of its projections, and of adapters on the targets."""
    model = Llama(config, device="meta")
    matrices = [
        (name.rpartition(".")[2], module.in_features, module.out_features)
        for name, module in model.model.layers.named_modules()
        if name.endswith(PROJECTIONS)
    ]
    return (
        sum(parameter.numel() for parameter in model.parameters()),
        sum(inputs * outputs for _, inputs, outputs in matrices),
        sum(rank * (inputs + outputs) for name, inputs, outputs in matrices if name in targets),
    )


def _layer_bytes(
    config: LlamaConfig, element: int, full: bool, rank: int, targets: Sequence[str]
) -> int:
    """Bytes that a layer keeps of a token for its backward pass."""

    def kept(*names: str) -> bool:
        return full or any(name in targets for name in names)

    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    elements = 2 * hidden + 2 * queries + 2 * keys + 2 * inner + rank * len(targets)
    elements += hidden * kept("q_proj", "k_proj", "v_proj")
    elements += hidden * kept("gate_proj", "up_proj")
    elements += inner * kept("down_proj")
    return element * elements + 4 * config.num_attention_heads + 8


def print_memory(memories: dict[str, Memory], console: Any) -> None:
    """A line for each method, in GB (10^9 bytes)."""
    table = require("rich.table").Table()
    table.add_column("GB")
    for field in fields(Memory):
        table.add_column(field.name, justify="right")
    table.add_column("in all", justify="right")
    for method, memory in memories.items():
        parts = [getattr(memory, field.name) for field in fields(Memory)]
        table.add_row(method, *(f"{part / 1e9:,.2f}" for part in (*parts, memory.total)))
    console.print(table)
