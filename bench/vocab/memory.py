"""How far one training step of a head raises the peak of memory: python -m bench.vocab.memory

On a CPU each loss runs in a process of its own, whose resident set is read; on a GPU the allocator is.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from bench.vocab.peers import Loss, losses

SHAPES = ((512, 512, 32000), (64, 2048, 32000), (2048, 1024, 32000), (1024, 512, 151936))


def peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # getrusage has the parent's, where that was larger when it forked.
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def step(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    loss(hidden, weight, targets).backward()


def measure(name: str, shape: tuple[int, int, int], head: bool, device: str) -> int:
    """Bytes above those of hidden, weight and targets, gradients included."""
    tokens, features, classes = shape
    loss = losses(device)[name]
    small = (torch.randn(4, 8, device=device, requires_grad=True) for _ in range(2))
    step(loss, *small, torch.zeros(4, dtype=torch.long, device=device))
    hidden = torch.randn(tokens, features, device=device, requires_grad=True)
    weight = torch.randn(classes, features, device=device, requires_grad=head)
    targets = torch.randint(classes, (tokens,), device=device)
    before = peak(device)
    step(loss, hidden, weight, targets)
    return peak(device) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--one", nargs=5, help="a loss, three sizes and whether the head is trained"
    )
    options = parser.parse_args()
    if options.one:
        name, tokens, features, classes, head = options.one
        shape = (int(tokens), int(features), int(classes))
        print(measure(name, shape, head == "True", options.device))
        return
    for shape in SHAPES:
        for head in (False, True):
            for name in losses(options.device):
                sizes = map(str, (name, *shape, head))
                command = [sys.executable, "-m", "bench.vocab.memory", "--device", options.device]
                done = subprocess.run([*command, "--one", *sizes], capture_output=True, text=True)
                text = f"{int(done.stdout) / 2**20:8.1f} MiB" if done.returncode == 0 else "failed"
                kind = "trained head" if head else "frozen head"
                print(f"{' x '.join(map(str, shape)):20s} {kind:13s} {name:14s} {text}", flush=True)


if __name__ == "__main__":
    main()
