"""torch.nn.attention's registry: aten's ops of flash attention, on CPU tensors, where torch has no kernels.

`scaled_dot_product_attention` calls them for CUDA tensors alone; what it would call is called here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import attention as registry
from warploom.integrations import torch_attention as route

from tests import plain
from tests.numerics import check_against_float64

DENSE = torch.ops.aten._scaled_dot_product_flash_attention
PACKED = torch.ops.aten._flash_attention_forward


@pytest.fixture(autouse=True)
def _active() -> Iterator[None]:
    route.activate()
    yield
    registry.restore_flash_attention_impl(_raise_warn=False)


def states(*lead: int, heads: int = 4, kv_heads: int = 2, dim: int = 16) -> list[Tensor]:
    """q, k, v with `lead` dimensions, then heads and a head dim."""
    return [torch.randn(*lead, count, dim) for count in (heads, kv_heads, kv_heads)]


def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """[B, S, H, D] through aten's op of [B, H, S, D]; float64, which no flash kernel takes, is plain."""
    if q.dtype == torch.float64:
        return plain.attention(q, k, v, causal=causal)[0]
    out: Tensor = DENSE(*(x.transpose(1, 2) for x in (q, k, v)), 0.0, causal)[0]
    return out.transpose(1, 2)


def test_registration() -> None:
    assert "warploom" in registry.list_flash_attention_impls()
    assert registry.current_flash_attention_impl() == "warploom"
    route.register()
    route.activate()
    q = torch.randn(1, 2, 3, 8)
    DENSE(q, q, q)
    registry.restore_flash_attention_impl()
    assert registry.current_flash_attention_impl() is None
    with pytest.raises(NotImplementedError):
        DENSE(q, q, q)
    registry.activate_flash_attention_impl("warploom")
    DENSE(q, q, q)


def test_a_torch_without_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(registry, "register_flash_attention_impl")
    with pytest.raises(RuntimeError, match="torch: expected 2.11 or newer"):
        route.register()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_scaled_dot_product(causal: bool, dtype: torch.dtype) -> None:
    tensors = [x.to(dtype) for x in states(2, 9)]
    check_against_float64(
        lambda q, k, v: dense(q, k, v, causal),
        lambda q, k, v: plain.attention(q, k, v, causal=causal)[0],
        tensors,
    )


def test_outputs_are_as_torch_infers_them() -> None:
    """Every output's shape, dtype and strides, for both memory layouts of the inputs."""
    for transposed in (False, True):
        q, k, v = (x.transpose(1, 2) if transposed else x for x in (torch.randn(2, 5, 5, 16),) * 3)
        outputs = DENSE(q, k, v, 0.0, True)
        inferred = DENSE(*(x.to("meta") for x in (q, k, v)), 0.0, True)
        for actual, expected in zip(outputs, inferred):
            if isinstance(expected, Tensor):
                assert actual.shape == expected.shape and actual.dtype == expected.dtype
                assert actual.stride() == expected.stride()
            else:
                assert actual == expected
        torch.testing.assert_close(
            outputs[1], plain.attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)[1]
        )


def test_compiled() -> None:
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in states(2, 9))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *x: DENSE(*x, 0.0, True)[0], fullgraph=True, backend="aot_eager"
    )
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    actual = compiled(q, k, v)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad)
    )


def test_dropout_is_one_mask_in_forward_and_backward() -> None:
    """The output is linear in the values: its gradient's product with them is the output again."""
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in states(1, 40, kv_heads=4))
    torch.manual_seed(3)
    out = DENSE(q, k, v, 0.4)[0]
    grad = torch.randn_like(out)
    grad_v = torch.autograd.grad(out, v, grad)[0]
    torch.testing.assert_close((grad_v * v).sum(), (grad * out).sum())
    torch.manual_seed(3)
    assert torch.equal(DENSE(q, k, v, 0.4)[0], out)
    assert not torch.equal(DENSE(q, k, v, 0.4)[0], out)


LENGTHS = [(5, 5), (0, 3), (1, 7), (4, 4)]
WINDOWS = [(-1, -1), (-1, 0), (3, 0), (2, 1)]


def packed() -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v of LENGTHS, [T, H, D], and their cu_seqlens."""
    counts = [torch.tensor(side) for side in zip(*LENGTHS)]
    bounds = [F.pad(count.cumsum(0), (1, 0)).to(torch.int32) for count in counts]
    q = torch.randn(int(bounds[0][-1]), 4, 16)
    k, v = (torch.randn(int(bounds[1][-1]), 2, 16) for _ in range(2))
    return [q, k, v], bounds


def plain_packed(
    q: Tensor, k: Tensor, v: Tensor, bounds: list[Tensor], window: tuple[int, int]
) -> Tensor:
    outputs = []
    for place, (queries, keys) in enumerate(LENGTHS):
        first_q, first_k = (int(bound[place]) for bound in bounds)
        rows, columns = slice(first_q, first_q + queries), slice(first_k, first_k + keys)
        outputs.append(
            plain.attention(q[None, rows], k[None, columns], v[None, columns], window=window)[0][0]
        )
    return torch.cat(outputs)


@pytest.mark.parametrize("window", WINDOWS)
def test_packed(window: tuple[int, int]) -> None:
    tensors, bounds = packed()

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Any:
        if q.dtype == torch.float64:
            return plain_packed(q, k, v, bounds, window)
        sides = {"window_size_left": window[0], "window_size_right": window[1]}
        return PACKED(q, k, v, *bounds, 5, 7, 0.0, window == (-1, 0), False, **sides)[0]

    check_against_float64(ours, lambda *x: plain_packed(*x, bounds, window), tensors)


@pytest.mark.parametrize("window", WINDOWS)
def test_varlen_attn(window: tuple[int, int]) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    if torch.__version__ < (2, 13):
        pytest.skip("varlen_attn without grouped heads")
    tensors, bounds = packed()
    leaves = [x.requires_grad_() for x in tensors]
    actual = varlen.varlen_attn(*leaves, *bounds, 5, 7, window_size=window, enable_gqa=True)
    expected = plain_packed(*leaves, bounds, window)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, leaves, grad), torch.autograd.grad(expected, leaves, grad)
    )


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="no pages in this torch's op")
@pytest.mark.parametrize("paged", [False, True])
def test_keys_in_use(paged: bool) -> None:
    """seqused_k: the first keys of each slot of a cache, whose other rows hold NaN; slots or pages."""
    page_size, used = 4, torch.tensor([3, 8, 1], dtype=torch.int32)
    q, cache_k, cache_v = torch.randn(3, 4, 16), torch.randn(24, 2, 16), torch.randn(24, 2, 16)
    expected = []
    for place, length in enumerate(used.tolist()):
        rows = slice(8 * place, 8 * place + length)
        expected.append(
            plain.attention(q[None, place, None], cache_k[None, rows], cache_v[None, rows])[0][0]
        )
        for cache in (cache_k, cache_v):
            cache[8 * place + length : 8 * place + 8] = float("nan")
    bounds = [torch.arange(4, dtype=torch.int32), 8 * torch.arange(4, dtype=torch.int32)]
    options: dict[str, Any] = {"seqused_k": used}
    if paged:
        order = torch.randperm(6)
        pages = [torch.empty(6, page_size, 2, 16) for _ in range(2)]
        for page, cache in zip(pages, (cache_k, cache_v)):
            page[order] = cache.view(6, page_size, 2, 16)
        cache_k, cache_v = pages
        options["block_table"] = order.view(3, 2).to(torch.int32)
    actual = PACKED(q, cache_k, cache_v, *bounds, 1, 8, 0.0, False, False, **options)[0]
    torch.testing.assert_close(actual, torch.cat(expected))
    out = torch.empty_like(q)
    torch.ops.aten._flash_attention_forward_no_dropout_inplace(
        out, q, cache_k, cache_v, *bounds, 1, 8, 0.0, False, False, **options
    )
    assert torch.equal(out, actual)


def test_refuses() -> None:
    q = torch.randn(1, 3, 2, 8)
    call = (None, None, 3, 3, 0.0, False)
    with pytest.raises(ValueError, match="return_debug_mask"):
        PACKED(q, q, q, *call, True)
    with pytest.raises(ValueError, match="alibi_slopes"):
        PACKED(q, q, q, *call, False, alibi_slopes=torch.ones(2))
    with pytest.raises(ValueError, match="seqused_k"):
        PACKED(q, q, q, *call, False, seqused_k=torch.ones(1, dtype=torch.int32))
    with pytest.raises(ValueError, match="value: expected query's head dim 8"):
        PACKED(q, q, torch.randn(1, 3, 2, 16), *call, False)
