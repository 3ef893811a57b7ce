"""The loss of a language model's head beside unfused and chunked ones; longest common subsequences.

`python -m bench.vocab.memory` measures the peak of memory of the same.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from warploom.ops.vocab import lcs_lengths, linear_cross_entropy

from bench.harness import Case, Run, close_to
from bench.vocab.peers import Loss, losses, unfused

#: (tokens, features, classes)
CPU_SHAPES = ((512, 512, 32000), (2048, 1024, 32000))
GPU_SHAPES = ((4096, 4096, 32000), (8192, 4096, 128256))


def forward(loss: Loss, tensors: tuple[Tensor, ...]) -> Run:
    return lambda: loss(*tensors)


def trained(loss: Loss, tensors: tuple[Tensor, ...], head: bool) -> Run:
    hidden, weight, targets = tensors
    leaves = [hidden.detach().requires_grad_()]
    matrix = weight
    if head:
        matrix = weight.detach().requires_grad_()
        leaves.append(matrix)
    return lambda: torch.autograd.grad(loss(leaves[0], matrix, targets), leaves)


def cases_of(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> list[Case]:
    tokens, features, classes = shape
    hidden = torch.randn(tokens, features, device=device).to(dtype)
    weight = (torch.randn(classes, features, device=device) * features**-0.5).to(dtype)
    targets = torch.randint(classes, (tokens,), device=device)
    tensors = (hidden, weight, targets)
    others = losses(device)
    ours = others.pop("warploom")
    size = (hidden.numel() + weight.numel()) * hidden.element_size()

    def loss_of(function: Loss, x: Tensor, w: Tensor) -> Tensor:
        return function(x, w, targets)

    found = []
    for op, bind, products in (
        ("linear_cross_entropy", forward, 1),
        ("frozen head forward+backward", functools.partial(trained, head=False), 2),
        ("forward+backward", functools.partial(trained, head=True), 3),
    ):
        found.append(
            Case(
                family="vocab",
                op=op,
                shape=f"{tokens} x {features} to {classes}",
                dtype=dtype,
                run=bind(ours, tensors),
                peers={name: bind(peer, tensors) for name, peer in others.items()},
                verify=close_to(
                    functools.partial(loss_of, linear_cross_entropy),
                    functools.partial(loss_of, unfused),
                    [hidden, weight],
                ),
                bytes=products * size,
                flops=products * 2 * tokens * features * classes,
            )
        )
    return found


def lcs_case(length: int, sequences: int) -> Case:
    """Against ROUGE's usual table in Python, for a tenth of a percent of the sequences."""
    tokens = torch.randint(200, (length,))
    others = torch.randint(200, (sequences * length,))
    bounds = torch.arange(sequences + 1, dtype=torch.int32) * length
    few = slice(0, sequences // 1000 + 1)

    def table() -> list[int]:
        first = tokens.tolist()
        return [
            table_length(first, others[a:b].tolist()) for a, b in zip(bounds[few], bounds[1:][few])
        ]

    def verify() -> None:
        got = lcs_lengths(tokens, others, bounds)
        assert got[: len(table())].tolist() == table()

    return Case(
        family="vocab",
        op="lcs_lengths",
        shape=f"{length} tokens, {sequences} others",
        dtype=torch.int64,
        run=lambda: lcs_lengths(tokens, others, bounds),
        peers={"a 1000th in Python": table},
        verify=verify,
        bytes=others.numel() * 8,
    )


def table_length(first: list[int], second: list[int]) -> int:
    row = [0] * (len(second) + 1)
    for token in first:
        above, row = row, [0]
        for column, other in enumerate(second):
            row.append(above[column] + 1 if token == other else max(above[column + 1], row[column]))
    return row[-1]


def cases(device: str) -> list[Case]:
    found = []
    if device == "cpu":
        found += [lcs_case(length, 50000) for length in (24, 200)]
    dtypes = (torch.float32,) if device == "cpu" else (torch.bfloat16, torch.float32)
    for shape in CPU_SHAPES if device == "cpu" else GPU_SHAPES:
        for dtype in dtypes:
            found += cases_of(shape, dtype, device)
    return found
