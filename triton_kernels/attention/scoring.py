"""What makes scores of products, which keys a query sees, and which probabilities are dropped.

Kernels hand these functions tuples, in each a pointer that may be None and where the sequence and
the head begin in it:

    sizes    Sq, Sk of the sequence
    window   left, right
    pages    block_table or None, offset of the sequence
    bias     [B, H, Sq, Sk] or None, offset of the head, strides of queries and keys
    alibi    slopes [B, H] or None, offset of the head (or of each query's)
    padding  [B, Sk] bytes, not 0 where hidden, or None; offset of the sequence
    dropout  the seed or None, b H + h, threshold (common.dropout)

Queries `rows` and `keys` are shaped so that they broadcast, whichever stands
first. Scores are times log2(e): exp(x) = exp2(x log2(e)).
"""

from __future__ import annotations

import triton
import triton.language as tl
from warploom.triton_kernels.attention import tiles
from warploom.triton_kernels.common.numerics import cast

LOG2_E: tl.constexpr = tl.constexpr(tiles.LOG2_E)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)

# tanh(x) = x + x^3 P(x^2) for |x| <= 0.625, P fitted to a relative error of 4e-9.
_P0: tl.constexpr = tl.constexpr(-0.33333282)
_P1: tl.constexpr = tl.constexpr(0.13331442)
_P2: tl.constexpr = tl.constexpr(-0.05373968)
_P3: tl.constexpr = tl.constexpr(0.020639)
_P4: tl.constexpr = tl.constexpr(-0.0057049)


@triton.jit
def tanh(x):
    """To about two units in the last place: a soft-cap multiplies small ones by a large number."""
    square = x * x
    polynomial = (((square * _P4 + _P3) * square + _P2) * square + _P1) * square + _P0
    # 1 - tanh would cancel for small x, and exp overflow for large ones.
    power = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    quotient = (1.0 - power) / (1.0 + power)
    large = tl.where(x < 0.0, -quotient, quotient)
    return tl.where(tl.abs(x) <= 0.625, x + x * (square * polynomial), large)


@triton.jit
def biased_scores(
    b_product,  # q k^T
    rows,
    keys,
    sizes,
    bias,
    alibi,
    score_scale,  # softmax_scale log2(e); with SOFTCAP softmax_scale / softcap
    softcap_log2,  # softcap log2(e)
    SOFTCAP: tl.constexpr,
):
    """(softcap tanh(softmax_scale q k^T / softcap) + bias - slope |distance|) log2(e), and tanh."""
    Sq, Sk = sizes
    bias_ptr, bias_offset, bias_stride_q, bias_stride_k = bias
    alibi_ptr, alibi_offset = alibi
    b_score = b_product * score_scale
    b_tanh = b_score
    if SOFTCAP:
        b_tanh = tanh(b_score)
        b_score = b_tanh * softcap_log2
    if bias_ptr is not None:
        p_bias = bias_ptr + bias_offset + rows.to(tl.int64) * bias_stride_q
        p_bias = p_bias + keys.to(tl.int64) * bias_stride_k
        b_bias = tl.load(p_bias, mask=(rows < Sq) & (keys < Sk), other=0.0)
        b_score += cast(b_bias, tl.float32) * LOG2_E
    if alibi_ptr is not None:
        b_slope = tl.load(alibi_ptr + alibi_offset) * LOG2_E
        b_score -= distances(rows, keys, sizes) * b_slope
    return b_score, b_tanh


@triton.jit
def distances(rows, keys, sizes):
    """|j - (i + Sk - Sq)| in float32: how far key j lies from query i."""
    Sq, Sk = sizes
    return tl.abs(keys - (rows + (Sk - Sq))).to(tl.float32)


@triton.jit
def seen_keys(rows, keys, sizes, window, padding, LEFT: tl.constexpr):
    """Whether query and key are there, the key in the query's window (LEFT: it has a left end) and
    no padding."""
    Sq, Sk = sizes
    left, right = window
    padding_ptr, padding_offset = padding
    position = rows + (Sk - Sq)
    seen = keys <= tl.minimum(position + right, Sk - 1)
    if LEFT:
        seen = seen & (keys >= position - left)
    if padding_ptr is not None:
        b_hidden = tl.load(padding_ptr + padding_offset + keys, mask=keys < Sk, other=1)
        seen = seen & (b_hidden == 0)
    return seen


@triton.jit
def key_range(first_row, sizes, window, LEFT: tl.constexpr, BLOCK_M, BLOCK_N):
    """The keys [start, end) that queries [first_row, first_row + BLOCK_M) see, and of them
    [whole_start, whole_end), tiles that each of the queries sees whole.

    All but `end` are multiples of BLOCK_N; start <= whole_start <= whole_end.
    """
    Sq, Sk = sizes
    left, right = window
    first = first_row + (Sk - Sq)
    last = tl.minimum(first_row + BLOCK_M, Sq) - 1 + (Sk - Sq)
    end = tl.minimum(tl.maximum(last + right + 1, 0), Sk)
    whole_end = tl.minimum(tl.maximum(first + right + 1, 0), Sk) // BLOCK_N * BLOCK_N
    start = tl.cast(0, tl.int32)
    whole_start = start
    if LEFT:
        start = tl.maximum(first - left, 0) // BLOCK_N * BLOCK_N
        whole_start = tl.cdiv(tl.maximum(last - left, 0), BLOCK_N) * BLOCK_N
    return start, whole_start, tl.maximum(whole_start, whole_end), end


@triton.jit
def sequence(cu_seqlens_q_ptr, cu_seqlens_k_ptr, i_b, Sq, Sk):
    """First query row, first key row and the sizes of sequence i_b; dense: 0, 0, Sq, Sk."""
    if cu_seqlens_q_ptr is None:
        return tl.cast(0, tl.int64), tl.cast(0, tl.int64), Sq, Sk
    else:
        q_start = tl.load(cu_seqlens_q_ptr + i_b)
        k_start = tl.load(cu_seqlens_k_ptr + i_b)
        q_end = tl.load(cu_seqlens_q_ptr + i_b + 1)
        k_end = tl.load(cu_seqlens_k_ptr + i_b + 1)
        return q_start.to(tl.int64), k_start.to(tl.int64), q_end - q_start, k_end - k_start


@triton.jit
def query_range(first_key, sizes, window, LEFT: tl.constexpr, BLOCK_M, BLOCK_N):
    """`key_range` the other way round: the queries that see keys of a tile, in tiles of BLOCK_M.

    Queries beyond Sq and keys beyond Sk count as seen: what they give is 0 and what they get is
    not stored. Without LEFT whole_end is end.
    """
    Sq, Sk = sizes
    left, right = window
    first = first_key - (Sk - Sq)
    last = first + BLOCK_N - 1
    start = tl.maximum(first - right, 0) // BLOCK_M * BLOCK_M
    whole_start = tl.cdiv(tl.maximum(last - right, 0), BLOCK_M) * BLOCK_M
    end = Sq
    whole_end = Sq
    if LEFT:
        end = tl.minimum(tl.maximum(last + left + 1, 0), Sq)
        whole_end = tl.minimum(tl.maximum(first + left + 1, 0), Sq) // BLOCK_M * BLOCK_M
    return start, whole_start, tl.maximum(whole_start, whole_end), end
