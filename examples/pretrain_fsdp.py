"""Pretrains a small byte-level LLaMA, its parameters and optimizer sharded over all processes.

    torchrun --nproc-per-node 2 examples/pretrain_fsdp.py README.md out/fsdp --steps 20
    torchrun --nproc-per-node 8 examples/pretrain_fsdp.py corpus.txt out/fsdp --tensor-parallel 2

Over nccl where there are GPUs, one a process, else over gloo. `examples/tensor_parallel_generate.py`
reads the result.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from warploom.models.llama import Llama
from warploom.models.llama_config import LlamaConfig
from warploom.models.parallel import fully_shard_model, save_pretrained, tensor_parallel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="file to learn from")
    parser.add_argument("output", type=Path, help="directory of the model")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8, help="rows of each data-parallel rank")
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--tensor-parallel", type=int, default=1, help="processes a model is cut over"
    )
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    shape = (dist.get_world_size() // args.tensor_parallel, args.tensor_parallel)
    mesh = init_device_mesh(device, shape, mesh_dim_names=("data", "tensor"))

    torch.manual_seed(0)  # every process draws the same weights
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = Llama(config, device=device)
    if args.tensor_parallel > 1:
        tensor_parallel(model, mesh["tensor"], sequence_parallel=True)
    precision = torch.bfloat16 if device == "cuda" else None
    fully_shard_model(model, mesh["data"], param_dtype=precision, reduce_dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=0.1)

    text = torch.frombuffer(bytearray(args.text.read_bytes()), dtype=torch.uint8)
    windows = text.unfold(0, args.sequence_length + 1, 1)
    # The ranks of one tensor-parallel group read the same rows.
    draw = torch.Generator().manual_seed(mesh.get_local_rank("data"))
    for step in range(1, args.steps + 1):
        rows = windows[torch.randint(len(windows), (args.batch_size,), generator=draw)]
        rows = rows.to(device, torch.int64)
        logits = model(rows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == args.steps:
            mean = loss.detach() / dist.get_world_size()
            dist.all_reduce(mean)
            if dist.get_rank() == 0:
                print(f"step {step}/{args.steps}: loss {mean.item():.3f}", flush=True)
    save_pretrained(model, args.output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
