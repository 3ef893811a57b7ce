"""A Llama on many devices: tensor parallelism and fully sharded data parallelism, by torch.distributed alone.

Both change the model in place, and compose: first `tensor_parallel` over one dimension of a mesh, then
`fully_shard_model` over another. The optimizer is made afterwards, for the parameters are new.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    Placement,
    Replicate,
    Shard,
    distribute_module,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from warploom.models.llama import Llama


class _NormParallel(ParallelStyle):
    """A norm whose weight is replicated, of local tensors x or (x, residual) placed as `layout`.

    The normalised tensor leaves as `output_layout`, its sum with the residual as it came. The first stays a
    DTensor unless `use_local_output`: gradients of several projections of it are then summed before they
    are reduced, once.
    """

    def __init__(
        self, layout: Placement, output_layout: Placement, *, use_local_output: bool = True
    ) -> None:
        super().__init__()
        self.layout = layout
        self.output_layout = output_layout
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def distribute(_: Any, inputs: tuple[Any, ...], mesh: DeviceMesh) -> Any:
            return tuple(
                DTensor.from_local(tensor, mesh, [self.layout], run_check=False)
                for tensor in inputs
            )

        def place(_: Any, outputs: Any, mesh: DeviceMesh) -> Any:
            normed, *total = outputs if isinstance(outputs, tuple) else (outputs,)
            normed = normed.redistribute(placements=[self.output_layout])
            if self.use_local_output:
                normed = normed.to_local()
            return (normed, total[0].to_local()) if total else normed

        return distribute_module(module, device_mesh, None, distribute, place)


def tensor_parallel(model: Llama, mesh: DeviceMesh, *, sequence_parallel: bool = False) -> Llama:
    """Shards the heads, the feed-forward features and the vocabulary over a one-dimensional mesh.

    Each layer costs two all-reduces in the forward pass and two in the backward pass. Every rank calls the
    model with the same tokens and gets all logits. `generate` works as before; ranks that sample need
    generators of one seed.

    Args:
        model: every rank's is made with the same weights (those of the mesh's first rank are taken).
        mesh: one dimension, whose size divides the query heads and the key/value heads.
        sequence_parallel: also shard the residual stream and the norms over the sequence: an all-reduce
            becomes a reduce-scatter and an all-gather, and activations take less memory. The sequence length
            has to be a multiple of the mesh's size, so that this is for training, not for decoding.

    Returns:
        The model, changed in place.

    Source: Shoeybi et al., Megatron-LM (2019); Korthikanti et al. (2022), section 4.2, for the sequence.
    """
    config = model.config
    for name in ("num_attention_heads", "num_key_value_heads"):
        if mesh.ndim != 1 or getattr(config, name) % mesh.size():
            raise ValueError(
                f"tensor_parallel: mesh: expected one dimension whose size divides {name} "
                f"{getattr(config, name)}, got shape {tuple(mesh.shape)}"
            )
    stream = Shard(1) if sequence_parallel else Replicate()
    layer: dict[str, ParallelStyle] = {
        "input_layernorm": _NormParallel(stream, Replicate(), use_local_output=False),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(output_layouts=stream),
        "post_attention_layernorm": _NormParallel(stream, Replicate(), use_local_output=False),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=stream),
    }
    if config.qk_norm_eps is not None:  # q and k [B, S, H, D], sharded on the heads
        layer["self_attn.q_norm"] = layer["self_attn.k_norm"] = _NormParallel(Shard(2), Shard(2))
    plan = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=stream),
        **{f"model.layers.*.{name}": style for name, style in layer.items()},
        "model.norm": _NormParallel(stream, Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan)
    model.tie_weights()
    return model


def fully_shard_model(
    model: Llama,
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
) -> Llama:
    """Shards parameters, gradients and the optimizer's state over a mesh (FSDP2), layer by layer.

    Each rank calls the model with its own part of the batch; gradients are averaged.

    Args:
        model: every rank's has the same weights, or `tensor_parallel` was applied to it.
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
    for layer in model.model.layers:
        fully_shard(
            layer, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard_after_forward
        )
    fully_shard(model, mesh=mesh, mp_policy=precision)
    register_fsdp_forward_method(model, "generate")
    return model


def save_pretrained(model: Llama, directory: str | Path, **options: Any) -> None:
    """`Llama.save_pretrained` of a model that is sharded: all ranks call it, rank 0 writes.

    The whole model has to fit into the memory of rank 0's host.
    """
    gather = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=gather)
    if dist.get_rank() == 0:
        whole = Llama(model.config, device="meta")
        whole.load_state_dict(weights, assign=True)
        whole.tie_weights()
        whole.save_pretrained(directory, **options)
    dist.barrier()
