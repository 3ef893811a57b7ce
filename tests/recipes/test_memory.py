"""The memory calculator, against published figures, what autograd saves, and the peak of a process."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from warploom.models.llama import Llama
from warploom.models.llama_config import LlamaConfig
from warploom.recipes.memory import PROJECTIONS, state_memory, training_memory

GB = 1e9
#: Qwen 1's shapes, of its config.json files; the biases of q, k and v are left out.
QWEN_7B = LlamaConfig(vocab_size=151936, hidden_size=4096, intermediate_size=11008)
QWEN_72B = LlamaConfig(
    vocab_size=152064,
    hidden_size=8192,
    intermediate_size=24576,
    num_hidden_layers=80,
    num_attention_heads=64,
)


@pytest.mark.parametrize(
    ("parameters", "precision", "gigabytes"),
    [
        # ZeRO (arXiv:1910.02054), figure 1: 7.5 billion parameters, Adam in mixed precision.
        pytest.param(7.5e9, "mixed", 120, id="ZeRO 7.5B"),
        # The same 16 bytes for a nominal 7B and 72B: what is quoted for them, 112 GB and 1.15 ("1.2") TB.
        pytest.param(7e9, "mixed", 112, id="7B"),
        pytest.param(72e9, "mixed", 1152, id="72B"),
        # QLoRA (arXiv:2305.14314), abstract: "more than 780 GB" for 65B in 16 bits: no master copy, 12 bytes.
        pytest.param(65e9, "mixed-without-master", 780, id="QLoRA paper 65B"),
        # GaLore (arXiv:2403.03507), section 1: LLaMA 7B in bfloat16, 14 GB of weights and 42 GB of Adam's
        # moments and gradients (its 2 GB of activations are another matter).
        pytest.param(7e9, "bfloat16", 14 + 42, id="GaLore 7B"),
    ],
)
def test_state_of_full_fine_tuning_is_the_literatures(
    parameters: float, precision: str, gigabytes: float
) -> None:
    assert state_memory(int(parameters), precision=precision).total == gigabytes * GB


def test_gpt_3_with_lora_is_the_papers() -> None:
    """LoRA (arXiv:2106.09685), section 4.2: from 1.2 TB to 350 GB. The second is 175 billion frozen weights
    in 16 bits. Of the first the paper gives no parts: it lies between Adam without stored gradients, 6 bytes
    a parameter, and with them, 8."""
    parameters = 175_000_000_000
    adapters = 18_900_000  # table 4: rank 1 on q and v takes 4.7 million, rank 4 four times that
    assert state_memory(adapters, parameters, "mixed").total == pytest.approx(350 * GB, rel=0.01)
    whole = state_memory(parameters, precision="bfloat16")
    assert whole.total - whole.gradients < 1200 * GB < whole.total


def test_qlora_of_65b_fits_the_papers_gpu() -> None:
    """Less than 48 GB (QLoRA, abstract): NF4 with double quantisation, 4.127 bits a weight (section 3), rank
    64 on all projections (section 4), gradient checkpointing."""
    memory = training_memory(
        "llama-65b",
        "qlora",
        precision="mixed-without-master",
        lora_r=64,
        gradient_checkpointing=True,
        quantized_bytes=4.127 / 8,
    )
    assert 40 * GB < memory.total < 48 * GB


@pytest.mark.parametrize(
    ("config", "method", "measured"),
    [
        pytest.param(QWEN_7B, "full", 139.2, id="7B full"),
        pytest.param(QWEN_7B, "lora", 20.1, id="7B LoRA"),
        pytest.param(QWEN_7B, "qlora", 11.5, id="7B QLoRA"),
        pytest.param(QWEN_72B, "qlora", 61.4, id="72B QLoRA"),
    ],
)
def test_qwens_measured_peaks_are_ours_and_some_overhead(
    config: LlamaConfig, method: str, measured: float
) -> None:
    """Qwen's README, "Profiling of Memory and Speed": peaks on A100s, one sequence of 256 tokens. A process
    has besides a context, workspaces and its allocator's slack: 2 to 3 GB, and ZeRO's buffers on two GPUs."""
    estimated = training_memory(
        config, method, sequence_length=256, lora_r=64, gradient_checkpointing=True
    )
    assert 0.75 * measured * GB < estimated.total < measured * GB


SMALL: dict[str, Any] = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def saved_bytes(config: LlamaConfig, batch: int, length: int) -> int:
    """Bytes of the tensors that autograd saves in a forward pass, each storage once, parameters left out."""
    model = Llama(config)
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in storages:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.model(torch.randint(config.vocab_size, (batch, length)))
    assert hidden.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_activations_are_what_autograd_saves() -> None:
    """But for the token ids and the rotary tables, which grow with the length alone."""
    config = LlamaConfig(**SMALL)
    settings = {"precision": "float32", "sequence_length": 96}
    one, two = (training_memory(config, batch_size=b, **settings).activations for b in (2, 4))
    hidden = 2 * 4 * 64 * 96 * 2  # the hidden states and their gradient are the loss's
    measured = saved_bytes(config, 4, 96) - saved_bytes(config, 2, 96)
    assert two - one - hidden == measured - 8 * 96 * 2


STEP = """
import torch
from warploom.models.llama import Llama
from warploom.models.llama_config import LlamaConfig
def resident(which):  # of getrusage the peak is the parent's, where that was larger when it forked
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(which))
def run(tokens, **shape):
    model = Llama(LlamaConfig(**shape))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(2):  # gradients are kept, as where they are accumulated
        model.loss(tokens[:, :-1], tokens[:, 1:], fused=False).backward()
        optimizer.step()
run(torch.zeros(1, 9, dtype=torch.int64), {small})
before = resident("VmRSS")
run(torch.zeros({batch}, {length} + 1, dtype=torch.int64), {shape})
print(resident("VmHWM") - before)
"""


def test_the_peak_of_a_process_is_near() -> None:
    """Of weights, gradients and AdamW's moments, with few tokens; within a quarter, for workspaces."""
    shape = {**SMALL, "num_hidden_layers": 6, "hidden_size": 512, "intermediate_size": 1408}
    program = STEP.format(small=_keywords(SMALL), shape=_keywords(shape), batch=1, length=16)
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    estimated = training_memory(
        LlamaConfig(**shape), precision="float32", sequence_length=16, fused_loss=False
    )
    assert int(run.stdout) == pytest.approx(estimated.total, rel=0.25)


def _keywords(shape: dict[str, int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in shape.items())


def test_checkpointing_and_frozen_projections_keep_less() -> None:
    config = LlamaConfig(**SMALL)
    whole = training_memory(config, "lora").activations
    assert training_memory(config, "lora", gradient_checkpointing=True).activations < whole
    assert training_memory(config, "lora", target_modules=("q_proj", "v_proj")).activations < whole
    assert (
        training_memory(config, fused_loss=False).activations > training_memory(config).activations
    )


def test_qlora_quantises_the_projections_alone() -> None:
    config = LlamaConfig(**SMALL)
    model = Llama(config, device="meta")
    count = sum(p.numel() for p in model.parameters())
    inside = sum(
        p.numel() for name, p in model.named_parameters() if name.split(".")[-2] in PROJECTIONS
    )
    lora, qlora = (training_memory(config, method).weights for method in ("lora", "qlora"))
    assert lora - qlora == pytest.approx((2 - 0.5625) * inside)
    assert lora > 2 * count


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "half"}, "method: expected one of full, lora, qlora, got 'half'"),
        ({"precision": "int8"}, "precision: expected one of mixed, .* got 'int8'"),
        ({"target_modules": ("lm_head",)}, "target_modules: expected some of q_proj.* 'lm_head'"),
    ],
)
def test_unknown_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"memory: {message}"):
        training_memory(LlamaConfig(**SMALL), **arguments)
