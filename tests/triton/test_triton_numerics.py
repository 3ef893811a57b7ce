"""`cast` rounds to nearest even and `dot` keeps all bits, on the interpreter as on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from warploom.triton_kernels.common.launch import INTERPRETED, next_power_of_2, warp_count
from warploom.triton_kernels.common.numerics import cast, dot

BLOCK = 64


@triton.jit
def _cast_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, cast(tl.load(x_ptr + offsets), out_ptr.dtype.element_ty))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    product = dot(tl.load(a_ptr + offsets), tl.load(b_ptr + offsets), tl.load(c_ptr + offsets))
    tl.store(out_ptr + offsets, product)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(BLOCK, dtype=dtype, device=x.device)
    _cast_kernel[(1,)](x, out, BLOCK=BLOCK)
    return out


def _values(generator: torch.Generator) -> Tensor:
    """float32 values of all magnitudes, ties between bfloat16 neighbours, and the special ones."""
    mantissas = torch.randn(40, generator=generator)
    exponents = torch.randint(-120, 120, (40,), generator=generator)
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), -(1 + 3 * 2**-8), 257.0, 259.0])
    specials = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, -1e-45])
    near_limits = torch.tensor([3.4028e38, -3.4028e38, 65504.0, 65519.0, 65520.0, 6e-8, 2.9e-8])
    values = torch.cat([torch.ldexp(mantissas, exponents), ties, specials, near_limits])
    return torch.nn.functional.pad(values, (0, BLOCK - len(values)), value=1.5)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("source", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("target", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_cast_agrees_with_torch_bit_for_bit(
    source: torch.dtype, target: torch.dtype, generator: torch.Generator
) -> None:
    x = _values(generator).to(source)
    torch.testing.assert_close(_cast(x, target), x.to(target), rtol=0, atol=0, equal_nan=True)


def test_cast_to_bfloat16_rounds_ties_to_even() -> None:
    x = torch.full((BLOCK,), 1 + 2**-8)  # half way between 1 and 1 + 2^-7
    x[1::2] = 1 + 3 * 2**-8  # half way between 1 + 2^-7 and 1 + 2^-6
    out = _cast(x, torch.bfloat16).float()
    assert (out[0::2] == 1).all()
    assert (out[1::2] == 1 + 2**-6).all()


def test_every_nan_stays_nan_in_bfloat16() -> None:
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], dtype=torch.int32)
    x = bits.view(torch.float32).repeat(BLOCK // 4)
    assert _cast(x, torch.bfloat16).isnan().all()


def test_dot_accumulates_in_float32(
    dtype: torch.dtype, random: Callable[..., Tensor], assert_close: Callable[..., None]
) -> None:
    a, b = (random(BLOCK, BLOCK, dtype=dtype) for _ in range(2))
    c = random(BLOCK, BLOCK)
    out = torch.empty((BLOCK, BLOCK), dtype=torch.float32, device=c.device)
    _dot_kernel[(1,)](a, b, c, out, BLOCK=BLOCK)
    exact = c.double() + a.double() @ b.double()
    # 64 products and 65 additions, each with a relative error of 2^-24 of what is summed.
    bound = 65 * 2**-24 * (c.double().abs() + a.double().abs() @ b.double().abs())
    assert ((out.double() - exact).abs() <= bound).all()


@pytest.mark.skipif(not INTERPRETED, reason="of the interpreter alone")
def test_interpreted_dot_rounds_once(random: Callable[..., Tensor]) -> None:
    """So that a product's bits do not depend on the tile that it is part of."""
    a, b = random(BLOCK, BLOCK), random(BLOCK, BLOCK)
    out = torch.empty_like(a)
    _dot_kernel[(1,)](a, b, torch.zeros_like(a), out, BLOCK=BLOCK)
    assert torch.equal(out, (a.double() @ b.double()).float())


@pytest.mark.parametrize(
    ("n", "power"), ((0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128), (65536, 65536))
)
def test_next_power_of_2(n: int, power: int) -> None:
    assert next_power_of_2(n) == power


@pytest.mark.parametrize("elements", (1, 512, 4096, 16384, 65536))
def test_warp_count_is_a_power_of_two_that_hardware_has(elements: int) -> None:
    assert warp_count(elements) in (4, 8, 16)
