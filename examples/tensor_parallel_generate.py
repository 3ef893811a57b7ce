"""Continues a text with a language model whose layers are cut over all processes.

    torchrun --nproc-per-node 2 examples/tensor_parallel_generate.py out/fsdp "The kernel"

The directory is one that `warploom.models.auto.load_model` reads, a LLaMA or a DeepSeek; without a
tokenizer.json in it a token is a byte.
Over nccl where there are GPUs, one a process, else over gloo.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from warploom.models.auto import load_model
from warploom.models.parallel import tensor_parallel
from warploom.recipes.text_corpus import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="directory of the model")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument(
        "--temperature", type=float, default=None, help="default: the likeliest token"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    model = tensor_parallel(load_model(args.directory), mesh)

    tokenizer = None
    if (args.directory / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(args.directory)
    prompt = tokenizer.encode(args.prompt).ids if tokenizer else list(args.prompt.encode())
    [tokens] = model.generate(
        [prompt],
        args.max_new_tokens,
        temperature=args.temperature,
        # Every rank draws the same tokens.
        generator=torch.Generator(device).manual_seed(args.seed),
    )
    if dist.get_rank() == 0:
        print(tokenizer.decode(tokens) if tokenizer else bytes(tokens).decode(errors="replace"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
