"""Products and conversions between number formats: the only two places where they may be written.

On a GPU `dot` is `tl.dot` and `cast` is `.to`. Triton's interpreter cannot multiply bfloat16 and
truncates when it narrows to it, so there `cast` goes through float32 and rounds to nearest even. Its
products are those of a BLAS, whose order of sums depends on the shape of the tile: the scores of
attention's backward would not be the forward's, as they are on a GPU. So `dot` goes through float64.
"""

from __future__ import annotations

import triton
import triton.language as tl
from warploom.triton_kernels.common import launch

# Kernels can read this as a compile-time constant.
INTERPRETED: tl.constexpr = tl.constexpr(launch.INTERPRETED)


@triton.jit
def mean(total, count):
    """total / count, float32, rounded to nearest. `/` is up to two units off on a GPU, where even x / 1 need
    not be x."""
    return tl.div_rn(total, tl.cast(count, tl.float32))


@triton.jit
def cast(x, dtype: tl.constexpr):
    """Converts x to `dtype`, rounding to nearest, ties to even; infinities and NaN survive."""
    if INTERPRETED:
        return _cast_interpreted(x, dtype)
    else:
        return x.to(dtype)


@triton.jit
def dot(a, b, accumulator=None):
    """accumulator + a @ b, accumulated in float32.

    a [M, K], b [K, N], of one dtype; accumulator [M, N] float32 or None. float32 operands keep all
    their bits (no TF32).
    """
    if INTERPRETED:
        product = tl.dot(
            _cast_interpreted(a, tl.float32).to(tl.float64),
            _cast_interpreted(b, tl.float32).to(tl.float64),
            out_dtype=tl.float64,
        ).to(tl.float32)
        if accumulator is None:
            return product
        else:
            return accumulator + product
    elif accumulator is None or a.dtype != tl.float32:
        return tl.dot(a, b, acc=accumulator, input_precision="ieee")
    else:
        # A tile's products are summed on their own: one chain over all of K loses three times as much as
        # a vendor's product. As an fma, because the compiler turns a sum back into the chain.
        product = tl.dot(a, b, input_precision="ieee")
        return tl.fma(product, tl.full(product.shape, 1.0, tl.float32), accumulator)


@triton.jit
def dot_of_rows(a, b):
    """a @ b^T, accumulated in float32; a [M, K], b [N, K], of one dtype.

    A float32 product of 64 columns or more is summed in four chains, for `dot`'s reason: of every fourth
    column. Exchanging a and b changes no bit.
    """
    if INTERPRETED or a.dtype != tl.float32 or a.shape[1] < 64:
        return dot(a, tl.trans(b))
    else:
        a_even, a_odd = _alternate_columns(a)
        b_even, b_odd = _alternate_columns(b)
        return _dot_of_halves(a_even, b_even, _dot_of_halves(a_odd, b_odd, None))


@triton.jit
def _dot_of_halves(a, b, accumulator):
    a_even, a_odd = _alternate_columns(a)
    b_even, b_odd = _alternate_columns(b)
    return dot(a_even, tl.trans(b_even), dot(a_odd, tl.trans(b_odd), accumulator))


@triton.jit
def _alternate_columns(x):
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def _cast_interpreted(x, dtype: tl.constexpr):
    if x.dtype == dtype:
        return x
    elif x.dtype == tl.bfloat16:
        # bfloat16 is the upper half of a float32.
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True).to(dtype)
    elif dtype == tl.bfloat16:
        wide = x.to(tl.float32)
        bits = wide.to(tl.uint32, bitcast=True)
        # Adding half of the last kept place carries into it exactly when rounding goes up; the
        # kept place's own lowest bit decides a tie.
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # The carry would turn some NaN into infinity: those become the quiet NaN.
        rounded = tl.where(wide == wide, rounded, 0x7FC0)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)
