"""Documents packed into rows: none sees another, and each has its own positions."""

from __future__ import annotations

import pytest
import torch
from warploom.nn import GroupedQueryAttention, RotaryEmbedding
from warploom.nn.packing import places

HIDDEN, HEADS, KEY_VALUE_HEADS, DIM = 32, 4, 2, 8
OPTIONS = {
    "causal": {},
    "not-causal": {"causal": False},
    "everything": {
        "window": (4, -1),
        "softcap": 3.0,
        "sinks": True,
        "qk_norm_eps": 1e-6,
        "bias": True,
    },
    "window-on-both-sides": {"causal": False, "window": (3, 2)},
}


def make_module(**options):
    module = GroupedQueryAttention(HIDDEN, HEADS, KEY_VALUE_HEADS, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.2, 0.3)
    return module


def cumulative(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def test_places_of_tokens():
    sequence, place = places(cumulative([2, 0, 3]), 6)
    assert sequence.tolist() == [0, 0, 2, 2, 2, 2]
    assert place.tolist() == [0, 1, 0, 1, 2, 3]
    assert [x.tolist() for x in places(cumulative([]), 0)] == [[], []]


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("options", OPTIONS)
def test_packed_documents_equal_documents_alone(options, rows):
    module, lengths = make_module(**OPTIONS[options]), [7, 1, 0, 12, 4]
    table = RotaryEmbedding(DIM).table(24, "cpu", torch.float64)
    documents = [torch.randn(1, length, HIDDEN, dtype=torch.float64) for length in lengths]
    upstream = torch.randn(24, HIDDEN, dtype=torch.float64)
    x = torch.cat(documents, 1).view(rows, 24 // rows, HIDDEN)
    outs = []
    for max_seqlen in (None, 12):
        out = module(x, table, cu_seqlens=cumulative(lengths), max_seqlen=max_seqlen)
        assert out.shape == x.shape
        out = out.flatten(0, 1)
        outs.append([out, *torch.autograd.grad((out * upstream).sum(), [*module.parameters()])])
    alone = torch.cat([module(document, table)[0] for document in documents])
    expected = [alone, *torch.autograd.grad((alone * upstream).sum(), [*module.parameters()])]
    for actual in outs:
        for left, right in zip(actual, expected, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-10)


def test_it_compiles_without_a_graph_break():
    torch._dynamo.reset()
    module = make_module(window=(4, -1), sinks=True)
    table = RotaryEmbedding(DIM).table(24, "cpu", torch.float64)
    x = torch.randn(1, 24, HIDDEN, dtype=torch.float64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for lengths in ([7, 1, 16], [10, 10, 4]):
        expected = module(x, table, cu_seqlens=cumulative(lengths))
        torch.testing.assert_close(compiled(x, table, cu_seqlens=cumulative(lengths)), expected)
