"""Rows of a latent cache: where they lie, how they are read, what a compressed one is made of.

A row is one token: the latent [L], then the rotated key [R]. Compressed it is bytes: L codes, a
float32 scale for each SCALE_GROUP of them, little-endian, and R numbers in bfloat16. Nothing is
assumed of the alignment of a compressed row, whose numbers are put together from bytes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from warploom.triton_kernels.common.launch import next_power_of_2, why_not_tensors
from warploom.triton_kernels.common.numerics import cast

MAX_LATENT, MAX_ROPE = 512, 256

# Latent features that share a scale.
SCALE_GROUP: tl.constexpr = tl.constexpr(128)

# What a row is made of: numbers of the query's dtype, or codes of one of two kinds.
DENSE: tl.constexpr = tl.constexpr(0)
FLOAT8_E4M3: tl.constexpr = tl.constexpr(1)
INT8: tl.constexpr = tl.constexpr(2)
_FORMATS = {torch.float8_e4m3fn: FLOAT8_E4M3.value, torch.int8: INT8.value}

# A float16 has e4m3's exponent and fraction 7 bits higher, and a bias of 15 instead of 7.
_E4M3_UNIT: tl.constexpr = tl.constexpr(256.0)


def cache_format(kv_cache: torch.Tensor) -> int:
    return _FORMATS.get(kv_cache.dtype, DENSE.value)


def is_compressed(kv_cache: torch.Tensor) -> bool:
    return kv_cache.dtype in _FORMATS


def as_kernels_see(kv_cache: torch.Tensor) -> torch.Tensor:
    """A compressed cache as bytes, any other as it is."""
    return kv_cache.view(torch.uint8) if is_compressed(kv_cache) else kv_cache


def without_codes(kv_cache: torch.Tensor) -> list[torch.Tensor]:
    """The cache where its dtype is one that kernels compute in."""
    return [] if is_compressed(kv_cache) else [kv_cache]


def capacity(kv_cache: torch.Tensor, block_table: torch.Tensor | None) -> int:
    """The most rows that a sequence can have."""
    return kv_cache.shape[1] * (1 if block_table is None else block_table.shape[1])


def row_constants(d_latent: int, d_rope: int) -> dict[str, Any]:
    """The parts of a row, and of the tiles that hold them: powers of two, one product deep."""
    return {
        "L": d_latent,
        "R": d_rope,
        "BLOCK_L": max(16, next_power_of_2(d_latent)),
        "BLOCK_R": max(16, next_power_of_2(d_rope)) if d_rope > 0 else 0,
    }


def why_not_latents(d_latent: int, d_rope: int, *args: object) -> list[str]:
    """What no kernel of this family can do with such rows, or with the tensors among `args`."""
    reasons = why_not_tensors(*args)
    for name, size, most in (("latents", d_latent, MAX_LATENT), ("rotary keys", d_rope, MAX_ROPE)):
        if size > most:
            reasons.append(f"{name} of {size} features (takes up to {most})")
    return reasons


@triton.jit
def packed_rows(first, Sq, H, BLOCK_M: tl.constexpr):
    """The queries, the heads (int64) and whether they are there, of BLOCK_M rows from row `first`
    on: a row is a query and a head, the heads of a query one after another."""
    packed = first + tl.arange(0, BLOCK_M)
    rows = packed // H
    return rows, (packed % H).to(tl.int64), rows < Sq


@triton.jit
def row_offsets(keys, mask, batch_offset, stride_b, stride_s, pages, PAGE_SIZE: tl.constexpr):
    """int64, where rows `keys` of one sequence begin.

    batch_offset: of the sequence in the cache; pages: (block_table or None, the sequence's offset
    in it), of which only the entries of keys in `mask` are read.
    """
    block_table_ptr, block_table_offset = pages
    if block_table_ptr is None:
        return batch_offset + keys.to(tl.int64) * stride_s
    else:
        p_block = block_table_ptr + block_table_offset + keys // PAGE_SIZE
        b_block = tl.load(p_block, mask=mask, other=0).to(tl.int64)
        return b_block * stride_b + (keys % PAGE_SIZE).to(tl.int64) * stride_s


@triton.jit
def load_features(p_rows, mask, first, end, WIDTH: tl.constexpr):
    """[rows, WIDTH]: features first, first + 1, ... before `end` of the rows in `mask`, else 0."""
    features = first + tl.arange(0, WIDTH)[None, :]
    return tl.load(p_rows[:, None] + features, mask=mask[:, None] & (features < end), other=0)


@triton.jit
def load_latents(
    p_rows, mask, dtype: tl.constexpr, L: tl.constexpr, BLOCK_L: tl.constexpr, FORMAT: tl.constexpr
):
    """[rows, BLOCK_L] in `dtype`, 0 outside of the mask and beyond L."""
    # [rows, BLOCK_L]
    b_codes = load_features(p_rows, mask, 0, L, BLOCK_L)
    if FORMAT == DENSE:
        return b_codes
    else:
        if FORMAT == INT8:
            b_numbers = b_codes.to(tl.int8, bitcast=True).to(tl.float32)
        else:
            b_numbers = _e4m3_numbers(b_codes)
        ROWS: tl.constexpr = b_codes.shape[0]
        WIDTH: tl.constexpr = min(BLOCK_L, SCALE_GROUP)
        GROUPS: tl.constexpr = BLOCK_L // WIDTH
        groups = tl.arange(0, GROUPS)[None, :]
        p_scale = p_rows[:, None] + L + 4 * groups
        scale_mask = mask[:, None] & (groups * WIDTH < L)
        # [rows, GROUPS]
        b_scale = tl.zeros([ROWS, GROUPS], dtype=tl.uint32)
        for i_byte in tl.static_range(4):
            b_byte = tl.load(p_scale + i_byte, mask=scale_mask, other=0)
            b_scale |= b_byte.to(tl.uint32) << (8 * i_byte)
        b_scale = b_scale.to(tl.float32, bitcast=True)
        b_grouped = tl.reshape(b_numbers, [ROWS, GROUPS, WIDTH]) * b_scale[:, :, None]
        return cast(tl.reshape(b_grouped, [ROWS, BLOCK_L]), dtype)


@triton.jit
def load_rope(
    p_rows,
    mask,
    dtype: tl.constexpr,
    L: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """[rows, BLOCK_R] in `dtype`, 0 outside of the mask and beyond R."""
    if FORMAT == DENSE:
        return load_features(p_rows, mask, L, L + R, BLOCK_R)
    else:
        START: tl.constexpr = L + 4 * ((L + SCALE_GROUP - 1) // SCALE_GROUP)
        # [rows, 2 BLOCK_R]
        b_bytes = load_features(p_rows, mask, START, START + 2 * R, 2 * BLOCK_R)
        b_low, b_high = tl.split(tl.reshape(b_bytes, [b_bytes.shape[0], BLOCK_R, 2]))
        b_bits = b_low.to(tl.uint16) | (b_high.to(tl.uint16) << 8)
        return cast(b_bits.to(tl.bfloat16, bitcast=True), dtype)


@triton.jit
def _e4m3_numbers(b_codes):
    """float32 of codes (uint8): sign, 4 bits of exponent, 3 of fraction; all ones are NaN."""
    b_magnitude = (b_codes & 0x7F).to(tl.uint16)
    b_bits = (b_magnitude << 7) | ((b_codes & 0x80).to(tl.uint16) << 8)
    b_numbers = b_bits.to(tl.float16, bitcast=True).to(tl.float32) * _E4M3_UNIT
    return tl.where(b_magnitude == 0x7F, float("nan"), b_numbers)


@triton.jit
def _e4m3_codes(b_numbers):
    """uint8: float32 numbers of magnitudes up to 448, rounded to nearest, ties to even."""
    b_bits = b_numbers.to(tl.uint32, bitcast=True)
    b_sign = (b_bits >> 24) & 0x80
    b_bits = b_bits & 0x7FFFFFFF
    # Normal numbers: 20 bits of fraction go, the bias falls from 127 to 7.
    b_normal = ((b_bits + 0x7FFFF + ((b_bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes count steps of 2^-9, the last place of 2^14.
    b_small = b_bits.to(tl.float32, bitcast=True) + 16384.0
    b_small = b_small.to(tl.uint32, bitcast=True) - 0x46800000
    b_code = tl.where(b_bits < 0x3C800000, b_small, b_normal)
    b_code = tl.where(b_bits > 0x7F800000, 0x7F, b_code)
    return (b_code | b_sign).to(tl.uint8)


@triton.jit
def _int8_codes(b_numbers):
    """uint8, two's complement: float32 numbers up to 127, rounded to nearest, ties to even."""
    # 1.5 * 2^23, whose last place is 1: what is added stands in the lowest bits.
    b_bits = (b_numbers + 12582912.0).to(tl.uint32, bitcast=True)
    return (b_bits & 0xFF).to(tl.uint8)


@triton.jit
def store_latents(
    p_row,
    b_latent,  # [BLOCK_L] float32, 0 beyond L
    L: tl.constexpr,
    BLOCK_L: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """The latent of one row: rounded, or as codes and scales."""
    features = tl.arange(0, BLOCK_L)
    if FORMAT == DENSE:
        b_latent = cast(b_latent, p_row.dtype.element_ty)
        tl.store(p_row + features, b_latent, mask=features < L)
    else:
        WIDTH: tl.constexpr = min(BLOCK_L, SCALE_GROUP)
        GROUPS: tl.constexpr = BLOCK_L // WIDTH
        LARGEST: tl.constexpr = 127.0 if FORMAT == INT8 else 448.0
        b_grouped = tl.reshape(b_latent, [GROUPS, WIDTH])
        # [GROUPS]
        b_largest = tl.max(tl.abs(b_grouped), axis=1)
        b_scale = tl.div_rn(b_largest, tl.full([GROUPS], LARGEST, dtype=tl.float32))
        b_scale = tl.where(b_largest == 0.0, 1.0, b_scale)
        b_spread = tl.broadcast_to(b_scale[:, None], [GROUPS, WIDTH])
        b_numbers = tl.reshape(tl.div_rn(b_grouped, b_spread), [BLOCK_L])
        b_codes = _int8_codes(b_numbers) if FORMAT == INT8 else _e4m3_codes(b_numbers)
        tl.store(p_row + features, b_codes, mask=features < L)
        groups = tl.arange(0, GROUPS)
        b_bits = b_scale.to(tl.uint32, bitcast=True)
        _store_bytes(p_row + L + 4 * groups, b_bits, groups * WIDTH < L, 4)


@triton.jit
def store_rope(p_row, features, b_values, mask, L: tl.constexpr, FORMAT: tl.constexpr):
    """Features of the rotated key of one row."""
    if FORMAT == DENSE:
        tl.store(p_row + L + features, cast(b_values, p_row.dtype.element_ty), mask=mask)
    else:
        START: tl.constexpr = L + 4 * ((L + SCALE_GROUP - 1) // SCALE_GROUP)
        b_bits = cast(b_values, tl.bfloat16).to(tl.uint16, bitcast=True)
        _store_bytes(p_row + START + 2 * features, b_bits, mask, 2)


@triton.jit
def _store_bytes(pointers, b_bits, mask, COUNT: tl.constexpr):
    """The COUNT lowest bytes of unsigned integers, the lowest first."""
    for i_byte in tl.static_range(COUNT):
        tl.store(pointers + i_byte, ((b_bits >> (8 * i_byte)) & 0xFF).to(tl.uint8), mask=mask)
