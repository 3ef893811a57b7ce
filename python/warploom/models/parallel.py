"""A language model on many devices: tensor, expert and fully sharded data parallelism, by torch.distributed.

All change the model in place. The first two exclude each other, and compose with the third: first
`tensor_parallel` over one dimension of a mesh, then `fully_shard_model` over another; or `expert_parallel`
and `fully_shard_model` over the same. The optimizer is made afterwards, for the parameters are new.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from warploom.models.causal_lm import CausalLanguageModel
from warploom.models.deepseek_v2 import DeepseekV2
from warploom.models.parallel_styles import (
    ExpertsOfAllTokens,
    ExpertsOfOwnTokens,
    NormParallel,
    PlacedOutput,
    Replicated,
    RouterParallel,
)
from warploom.nn import GroupedQueryAttention, MultiheadLatentAttention, SwiGLU
from warploom.nn.grouped_linear import RoutedExperts
from warploom.nn.moe import MixtureOfExperts

Model = TypeVar("Model", bound=CausalLanguageModel)


Plan = dict[str, ParallelStyle]


def _grouped_query_attention(attention: Any, stream: Placement) -> Plan:
    plan: Plan = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
    plan["o_proj"] = RowwiseParallel(output_layouts=stream)
    if attention.q_norm is not None:  # q and k [B, S, H, D], sharded on the heads
        plan["q_norm"] = plan["k_norm"] = NormParallel(Shard(2), Shard(2))
    return plan


def _latent_attention(attention: Any, stream: Placement) -> Plan:
    plan: Plan = {"kv_a_proj_with_mqa": Replicated(), "kv_a_layernorm": Replicated()}
    if attention.q_lora_rank is None:
        plan["q_proj"] = ColwiseParallel()
    else:
        plan |= {"q_a_proj": Replicated(), "q_a_layernorm": Replicated()}
        plan["q_b_proj"] = ColwiseParallel()
    plan |= {"kv_b_proj": ColwiseParallel(), "o_proj": RowwiseParallel(output_layouts=stream)}
    return plan


def _swiglu(_: Any, stream: Placement) -> Plan:
    plan: Plan = {name: ColwiseParallel() for name in ("gate_proj", "up_proj")}
    plan["down_proj"] = RowwiseParallel(output_layouts=stream)
    return plan


def _mixture_of_experts(mixture: Any, stream: Placement) -> Plan:
    """Routed and shared experts each make a part of the output on every rank: reduced together, once."""
    plan: Plan = {"gate": RouterParallel(), "experts": ExpertsOfAllTokens()}
    if mixture.shared_experts is not None:
        plan |= {f"shared_experts.{name}": ColwiseParallel() for name in ("gate_proj", "up_proj")}
        plan["shared_experts.down_proj"] = RowwiseParallel(
            output_layouts=Partial(), use_local_output=False
        )
    plan[""] = PlacedOutput(stream)
    return plan


#: How the parts of a layer are cut, given the placement of the residual stream.
_PLANS: dict[type[nn.Module], Callable[[Any, Placement], Plan]] = {
    GroupedQueryAttention: _grouped_query_attention,
    MultiheadLatentAttention: _latent_attention,
    SwiGLU: _swiglu,
    MixtureOfExperts: _mixture_of_experts,
}
#: Fields of a config, where it has them, that the size of the mesh divides.
_DIVIDED = ("num_attention_heads", "num_key_value_heads", "n_routed_experts")


def tensor_parallel(model: Model, mesh: DeviceMesh, *, sequence_parallel: bool = False) -> Model:
    """Shards the heads, the feed-forward features, the experts and the vocabulary over a mesh.

    Each layer costs two all-reduces in the forward pass and two in the backward pass. Every rank calls the
    model with the same tokens and gets all logits. `generate` works as before; ranks that sample need
    generators of one seed. Experts stay whole, each on one rank, which computes its part of all tokens.

    Args:
        model: every rank's is made with the same weights (those of the mesh's first rank are taken).
        mesh: one dimension, whose size divides the query heads, the key/value heads and the experts.
        sequence_parallel: also shard the residual stream and the norms over the sequence: an all-reduce
            becomes a reduce-scatter and an all-gather, and activations take less memory. The sequence length
            has to be a multiple of the mesh's size, so that this is for training, not for decoding.

    Returns:
        The model, changed in place.

    Source: Shoeybi et al., Megatron-LM (2019); Korthikanti et al. (2022), section 4.2, for the sequence.
    """
    _check("tensor_parallel", model, mesh, _DIVIDED)
    stream = Shard(1) if sequence_parallel else Replicate()
    embedding = RowwiseParallel(input_layouts=Replicate(), output_layouts=stream)
    plan: Plan = {
        "model.embed_tokens": embedding,
        "model.norm": NormParallel(stream, Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    for norm in ("input_layernorm", "post_attention_layernorm"):
        plan[f"model.layers.*.{norm}"] = NormParallel(stream, Replicate(), use_local_output=False)
    parallelize_module(model, mesh, plan)
    for layer in model.model.layers.children():
        for part in (layer.get_submodule("self_attn"), layer.get_submodule("mlp")):
            parallelize_module(part, mesh, _PLANS[type(part)](part, stream))
    model.tie_weights()
    return model


def expert_parallel(model: DeepseekV2, mesh: DeviceMesh) -> DeepseekV2:
    """Spreads the routed experts over ranks that have tokens of their own: data-parallel ones.

    Tokens travel to their experts and back (all-to-all, two of [T k, hidden] in the forward pass of a layer
    and two in the backward pass). The host waits for each layer's router, to learn how many go where.
    `fully_shard_model` over the same mesh then shards all other parameters, and gradients of both are the
    mean over the ranks. Every rank calls the model equally often.

    Args:
        model: every rank's is made with the same weights, and is not distributed yet.
        mesh: one dimension, whose size divides the experts.

    Returns:
        The model, changed in place.

    Source: Lepikhin et al., GShard (2020), section 3.
    """
    _check("expert_parallel", model, mesh, ("n_routed_experts",))
    for module in list(model.modules()):
        if isinstance(module, RoutedExperts):
            parallelize_module(module, mesh, ExpertsOfOwnTokens())
    return model


def _check(name: str, model: CausalLanguageModel, mesh: DeviceMesh, divided: Sequence[str]) -> None:
    for field in divided:
        count = getattr(model.config, field, None)
        if count is not None and (mesh.ndim != 1 or count % mesh.size()):
            raise ValueError(
                f"{name}: mesh: expected one dimension whose size divides {field} {count}, got "
                f"shape {tuple(mesh.shape)}"
            )
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(f"{name}: model: expected one that is not distributed yet")


def fully_shard_model(
    model: Model,
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
) -> Model:
    """Shards parameters, gradients and the optimizer's state over a mesh (FSDP2), layer by layer.

    Each rank calls the model with its own part of the batch; gradients are averaged.

    Args:
        model: every rank's has the same weights, or `tensor_parallel` was applied to it, or
            `expert_parallel` over the same mesh; its experts are not sharded again.
        mesh: one dimension, or two: sharded over the second, replicated over the first.
        param_dtype: dtype of the gathered parameters, and so of the computation and the logits; None: as
            stored.
        reduce_dtype: dtype in which gradients are reduced; None: param_dtype.
        reshard_after_forward: free a layer's gathered parameters after its forward pass and gather them
            again in the backward pass.

    Returns:
        The model, changed in place.

    Source: Zhao et al., PyTorch FSDP (2023).
    """
    # Inputs are not cast: the tables of the rotary embedding are float32 whatever the parameters are.
    precision = MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
    )
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": precision}
    options["ignored_params"] = _spread_experts(model, mesh)
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **options)
    fully_shard(model, **options)
    for method in ("generate", "loss"):
        register_fsdp_forward_method(model, method)
    return model


def _spread_experts(model: CausalLanguageModel, mesh: DeviceMesh) -> set[nn.Parameter]:
    """The parameters that `expert_parallel` has spread: it alone leaves others undistributed."""
    spread: set[Any] = {
        parameter for parameter in model.parameters() if isinstance(parameter, DTensor)
    }
    if len(spread) == len(list(model.parameters())):
        return set()
    if any(parameter.device_mesh != mesh for parameter in spread):
        raise ValueError(
            "fully_shard_model: mesh: expected the one that the experts are spread over, got "
            f"another, {mesh}"
        )
    return spread


def save_pretrained(model: CausalLanguageModel, directory: str | Path, **options: Any) -> None:
    """`save_pretrained` of a model that is sharded: all ranks call it, rank 0 writes.

    The whole model has to fit into the memory of rank 0's host.
    """
    gather = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=gather)
    if dist.get_rank() == 0:
        whole = type(model)(model.config, device="meta")
        whole.load_state_dict(weights, assign=True)
        whole.tie_weights()
        whole.save_pretrained(directory, **options)
    dist.barrier()
