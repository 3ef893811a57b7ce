"""Low-rank updates of blocks, batches, experts, embeddings, against written-out formulas in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from warploom.ops.lora import (
    Adapter,
    expert_factors,
    lora_embedding,
    lora_expert_linear,
    lora_qkv,
    lora_swiglu_mlp,
    multi_lora_linear,
)

from tests.backends import DEVICE, every_backend, every_dtype
from tests.numerics import check_against_float64

WIDTH, SCALING = 40, 7 / 5


def parameters(sizes: Sequence[int], ranks: Sequence[int], width: int = WIDTH) -> list[Tensor]:
    """weight, lora_a and lora_b of each map, the last two of rank 0 where there is no update."""
    tensors = []
    for size, rank in zip(sizes, ranks):
        tensors += [
            torch.randn(size, width, device=DEVICE) * width**-0.5,
            torch.randn(rank, width, device=DEVICE) * width**-0.5,
            torch.randn(size, rank, device=DEVICE) * 0.2,
        ]
    return tensors


def triples(tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    return list(zip(tensors[0::3], tensors[1::3], tensors[2::3]))


def adapter_of(lora_a: Tensor, lora_b: Tensor) -> Adapter | None:
    return Adapter(lora_a, lora_b, SCALING) if len(lora_a) else None


def plain_linear(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    return x @ weight.T + SCALING * (x @ lora_a.T) @ lora_b.T


@every_backend
@every_dtype
@pytest.mark.parametrize("ranks", [(3, 16, 5), (4, 0, 7), (0, 0, 0)], ids=str)
def test_members_of_different_ranks_and_widths(backend, dtype, ranks):
    x = torch.randn(2, 5, WIDTH, device=DEVICE)

    def ours(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights, lora_a, lora_b = zip(*triples(tensors))
        adapters = [adapter_of(a, b) for a, b in zip(lora_a, lora_b)]
        outs = lora_qkv(x, weights, [None] * 3, adapters, backend=backend)
        unused = sum(t.sum() for pair in zip(lora_a, lora_b) for t in pair if t.numel() == 0)
        return tuple(out + unused for out in outs)

    def plain(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(plain_linear(x, *triple) for triple in triples(tensors))

    tensors = [x, *parameters((24, 8, 17), ranks)]
    check_against_float64(ours, plain, [tensor.to(dtype) for tensor in tensors])


@every_backend
@pytest.mark.parametrize("ranks", [(3, 16, 5), (4, 4, 0), (0, 0, 6)], ids=str)
def test_swiglu_mlp(backend, ranks):
    x = torch.randn(7, WIDTH, device=DEVICE)
    tensors = [x, *parameters((24, 24), ranks[:2]), *parameters((WIDTH,), ranks[2:], 24)]

    def ours(x: Tensor, *tensors: Tensor) -> Tensor:
        weights, lora_a, lora_b = zip(*triples(tensors))
        adapters = [adapter_of(a, b) for a, b in zip(lora_a, lora_b)]
        unused = sum(t.sum() for pair in zip(lora_a, lora_b) for t in pair if t.numel() == 0)
        return lora_swiglu_mlp(x, weights, [None] * 3, adapters, backend=backend) + unused

    def plain(x: Tensor, *tensors: Tensor) -> Tensor:
        gate, up, down = triples(tensors)
        return plain_linear(F.silu(plain_linear(x, *gate)) * plain_linear(x, *up), *down)

    check_against_float64(ours, plain, tensors)


def test_members_drop_different_elements():
    x = torch.eye(64, dtype=torch.float64)
    weight, lora_a = torch.zeros(64, 64, dtype=torch.float64), torch.eye(64, dtype=torch.float64)
    seeds = [torch.tensor([seed]) for seed in (3, 4, 3)]
    adapters = [Adapter(lora_a, lora_a, 1.0)] * 3
    first, second, again = lora_qkv(
        x, [weight] * 3, [None] * 3, adapters, dropout_p=0.5, seeds=seeds
    )
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert set(first.unique().tolist()) == {0.0, 2.0}


ADAPTER_IDS = {
    "mixed, some without": [2, -1, 0, 0, 2, -1, 1, 2, 0],
    "an adapter without a token": [0, 2, 2, 0, 0, 2, 2, 0, 2],
    "all on one": [1] * 9,
    "none has one": [-1] * 9,
    "one token": [1],
    "no tokens": [],
}


@every_backend
@every_dtype
@pytest.mark.parametrize("ids", ADAPTER_IDS.values(), ids=ADAPTER_IDS)
def test_many_adapters_in_one_batch(backend, dtype, ids):
    """Each row is what its own adapter makes of it alone, and so are all gradients."""
    adapter_ids = torch.tensor(ids, dtype=torch.int64, device=DEVICE)
    x = torch.randn(len(ids), WIDTH, device=DEVICE)
    weight, *adapters = parameters((24,), (9,))[:1] + [
        part for rank in (4, 9, 1) for part in parameters((24,), (rank,))[1:]
    ]

    def ours(x: Tensor, weight: Tensor, *adapters: Tensor) -> Tensor:
        several = [Adapter(a, b, SCALING) for a, b in zip(adapters[0::2], adapters[1::2])]
        return multi_lora_linear(x, weight, None, several, adapter_ids, backend=backend)

    def plain(x: Tensor, weight: Tensor, *adapters: Tensor) -> Tensor:
        out = x @ weight.T + 0 * sum(part.sum() for part in adapters)
        for index, (a, b) in enumerate(zip(adapters[0::2], adapters[1::2])):
            update = SCALING * (x @ a.T) @ b.T
            out = out + update * (adapter_ids == index)[:, None]
        return out

    tensors = [x, weight, *adapters]
    check_against_float64(ours, plain, [tensor.to(dtype) for tensor in tensors])


@every_backend
@every_dtype
def test_a_row_does_not_depend_on_its_batch(backend, dtype):
    x = torch.randn(70, WIDTH, device=DEVICE).to(dtype)
    weight = torch.randn(24, WIDTH, device=DEVICE).to(dtype)
    parts = [[part.to(dtype) for part in parameters((24,), (rank,))[1:]] for rank in (4, 9)]
    adapters = [Adapter(*pair, SCALING) for pair in parts]
    ids = torch.arange(70, device=DEVICE) % 3 - 1
    together = multi_lora_linear(x, weight, None, adapters, ids, backend=backend)
    for rows in (slice(0, 1), slice(5, 8), slice(20, 61)):
        alone = multi_lora_linear(x[rows], weight, None, adapters, ids[rows], backend=backend)
        assert torch.equal(alone, together[rows])


def test_many_adapters_with_magnitudes():
    """Beside an adapter with a magnitude (DoRA) one without keeps its columns."""
    torch.manual_seed(0)
    weight, a, b, _, a2, b2 = (t.double() for t in parameters((24, 24), (4, 3)))
    magnitude, x = torch.rand(24).to(weight), torch.randn(5, WIDTH).to(weight)
    ids = torch.tensor([0, 1, -1, 0, 1], device=DEVICE)
    adapters = [Adapter(a, b, SCALING, magnitude), Adapter(a2, b2, SCALING)]
    out = multi_lora_linear(x, weight, None, adapters, ids)
    scale = magnitude / (weight + SCALING * b @ a).norm(dim=1)
    exact = torch.stack(
        (plain_linear(x, weight, a, b) * scale, plain_linear(x, weight, a2, b2), x @ weight.T)
    )[torch.where(ids < 0, 2, ids), torch.arange(5, device=DEVICE)]
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-12)


def test_adapter_ids_of_whole_sequences():
    x, weight = torch.randn(3, 4, WIDTH), torch.randn(8, WIDTH)
    adapters = [Adapter(torch.randn(2, WIDTH), torch.randn(8, 2), SCALING)]
    ids = torch.tensor([0, -1, 0])
    out = multi_lora_linear(x, weight, None, adapters, ids)
    assert torch.equal(out, multi_lora_linear(x, weight, None, adapters, ids[:, None].expand(3, 4)))


@pytest.mark.parametrize("ids", [[0, 1, 5], [0, -2, 1]], ids=["above", "below"])
def test_an_adapter_that_is_not_there_is_named(ids):
    adapters = [Adapter(torch.randn(2, WIDTH), torch.randn(8, 2), SCALING)] * 2
    x, weight = torch.randn(3, WIDTH), torch.randn(8, WIDTH)
    with pytest.raises(
        ValueError, match="multi_lora_linear: adapter_ids: expected numbers from -1"
    ):
        multi_lora_linear(x, weight, None, adapters, torch.tensor(ids))


@every_backend
def test_experts_in_the_layout_of_peft(backend):
    """lora_a has an expert's rows together, lora_b the experts of a column side by side."""
    experts, rank, out_features = 3, 4, 24
    offsets = torch.tensor([0, 4, 4, 9], dtype=torch.int32, device=DEVICE)
    tensors = [
        torch.randn(9, WIDTH),
        torch.randn(experts, out_features, WIDTH),
        torch.randn(experts * rank, WIDTH),
        torch.randn(out_features, rank * experts),
    ]

    def ours(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_expert_linear(x, weight, offsets, a, b, SCALING, backend=backend)

    def plain(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        outs = []
        for expert, (first, end) in enumerate([(0, 4), (4, 4), (4, 9)]):
            delta = b[:, expert::experts] @ a[expert * rank : (expert + 1) * rank]
            outs.append(x[first:end] @ (weight[expert] + SCALING * delta).T)
        return torch.cat(outs)

    check_against_float64(ours, plain, [tensor.to(DEVICE) for tensor in tensors])


def test_expert_factors_name_a_rank_that_does_not_fit():
    with pytest.raises(ValueError, match="expert_factors: lora_a: expected a multiple of 4 rows"):
        expert_factors(torch.zeros(10, 8), torch.zeros(6, 10), 4)


def test_embedding():
    ids = torch.tensor([[1, 5, 5], [0, 2, 9]])
    tensors = [torch.randn(10, 12), torch.randn(3, 10), torch.randn(12, 3)]

    def ours(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_embedding(ids, weight, a, b, SCALING)

    def plain(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (weight + SCALING * (b @ a).T)[ids]

    check_against_float64(ours, plain, tensors)
