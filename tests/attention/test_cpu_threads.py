"""The C++ code for CPUs: the same bits whatever the number of threads."""

from __future__ import annotations

import pytest
import torch
from warploom._library import OPS
from warploom.ops.attention import attention, attention_decode

from tests.backends import BACKENDS

pytestmark = pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the CPU code")


@pytest.fixture
def with_threads():
    """Calls a function with 1 and with 2 threads; both results."""
    before = torch.get_num_threads()

    def run(function):
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(function())
        return results

    yield run
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_forward_and_backward(with_threads, dtype, kv_heads):
    q = torch.randn(2, 300, 4, 24).to(dtype).requires_grad_()
    k, v = (torch.randn(2, 333, kv_heads, 24).to(dtype).requires_grad_() for _ in range(2))
    bias = torch.randn(1, 4, 300, 333).to(dtype).requires_grad_()
    seed = torch.tensor([3])

    def run():
        out = attention(
            q, k, v, causal=True, bias=bias, dropout_p=0.1, seed=seed, softcap=4.0, backend="cpu"
        )
        return [out, *torch.autograd.grad(out.float().square().sum(), (q, k, v, bias))]

    one, two = with_threads(run)
    assert all(torch.equal(*pair) for pair in zip(one, two))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_decode(with_threads, dtype):
    q = torch.randn(2, 2, 4, 40).to(dtype)
    k, v = (torch.randn(2, 1500, 2, 40).to(dtype) for _ in range(2))
    lengths = torch.tensor([1500, 257], dtype=torch.int32)
    one, two = with_threads(lambda: attention_decode(q, k, v, lengths, causal=True, backend="cpu"))
    assert torch.equal(one, two)


@pytest.mark.parametrize("split_size", [0, 64])
def test_a_sequence_decodes_alike_alone_and_in_a_batch(split_size):
    q = torch.randn(3, 1, 4, 32)
    k, v = (torch.randn(3, 700, 2, 32) for _ in range(2))
    lengths = torch.tensor([700, 3, 300], dtype=torch.int32)
    decode = OPS["attention_decode"].overloads["cpu"]

    def run(rows):
        caches = (q[rows], k[rows], v[rows], lengths[rows])
        return decode(*caches, None, None, None, 0.2, -1, 0, 0.0, 0, split_size)

    for row in range(3):
        alone, together = run(slice(row, row + 1)), run(slice(0, 3))
        assert torch.equal(alone[0][0], together[0][row])
        assert torch.equal(alone[1][0], together[1][row])
