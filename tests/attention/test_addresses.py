"""Rows more than 2^31 elements apart: 64-bit offsets all the way. Only the pages of the rows are touched."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from warploom.ops.attention import attention, attention_decode, attention_varlen

from tests import plain
from tests.backends import DEVICE, every_backend
from tests.numerics import check_against_float64

FAR = 2**31 + 64


@pytest.fixture(scope="module")
def buffer():
    return torch.empty(3 * FAR, dtype=torch.bfloat16, device=DEVICE)


def spread(tensor, dim, place, buffer):
    """The same values in `buffer`, with a stride of FAR elements along `dim`."""
    strides = list(tensor.stride())
    strides[dim] = FAR
    view = buffer.as_strided(tensor.shape, strides, place * 2**16)
    return view.copy_(tensor)


def draw(*shape):
    return torch.randn(*shape, device=DEVICE).bfloat16()


@every_backend
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "sequence", "head"])
def test_attention_and_its_gradients(backend, dim, buffer):
    shape = [2, 2, 2, 16]
    tensors = [spread(draw(*shape), dim, place, buffer) for place in range(3)]
    check_against_float64(
        functools.partial(attention, causal=True, backend=backend),
        lambda *dense: plain.attention(*map(Tensor.contiguous, dense), causal=True)[0],
        tensors,
    )


@every_backend
def test_packed_sequences(backend, buffer):
    tensors = [spread(draw(3, 2, 16), 0, place, buffer) for place in range(3)]
    bounds = torch.tensor([0, 1, 3], dtype=torch.int32, device=DEVICE)
    check_against_float64(
        lambda q, k, v: attention_varlen(q, k, v, bounds, bounds, 2, 2, backend=backend),
        lambda *dense: plain.packed_attention(*map(Tensor.contiguous, dense), [1, 2], [1, 2])[0],
        tensors,
    )


@every_backend
def test_pages(backend, buffer):
    """Three pages of two rows; the sequence has rows in all of them, out of order."""
    pages = [spread(draw(3, 2, 2, 16), 0, place, buffer) for place in range(2)]
    table = torch.tensor([[2, 0, 1]], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([5], dtype=torch.int32, device=DEVICE)
    rows = [page[[2, 0, 1]].reshape(1, 6, 2, 16)[:, :5] for page in pages]
    check_against_float64(
        lambda q: attention_decode(q, *pages, lengths, table, backend=backend),
        lambda q: plain.attention(q, *(row.to(q.dtype) for row in rows), causal=True)[0],
        [draw(1, 1, 4, 16)],
        gradients=False,
    )
