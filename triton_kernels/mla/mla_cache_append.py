"""Writing new tokens to a latent cache: the latent normalised, the shared key rotated."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from warploom.triton_kernels.attention.arguments import Launch
from warploom.triton_kernels.common.launch import (
    AheadOfTimeCase,
    on_own_device,
    with_unit_last_stride,
)
from warploom.triton_kernels.common.numerics import cast
from warploom.triton_kernels.mla.latent_rows import (
    as_kernels_see,
    cache_format,
    capacity,
    row_constants,
    store_latents,
    store_rope,
    why_not_latents,
    without_codes,
)

_NUM_WARPS = 4


@triton.jit
def _sequence_of(token, cu_seqlens_ptr, B):
    """The sequence that a packed token belongs to: how many end before it; B for none."""
    first = tl.cast(0, tl.int32)
    last = first + B
    while first < last:
        middle = (first + last) // 2
        if tl.load(cu_seqlens_ptr + middle + 1) <= token:
            first = middle + 1
        else:
            last = middle
    return first


@triton.jit(do_not_specialize=["B", "S", "CAPACITY", "P"])
def _cache_append_kernel(
    x_ptr,  # [B, S, L + R], strides x_stride_{b,s}, 1; or packed [T, L + R]
    weight_ptr,  # [L], contiguous
    kv_ptr,  # [B, CAPACITY, row], strides kv_stride_{b,s}, 1; or pages [num_blocks, PAGE_SIZE, row]
    cache_seqlens_ptr,  # [B] int32
    block_table_ptr,  # [B, max_blocks] int32, row stride block_table_stride; or None: no pages
    cu_seqlens_ptr,  # [B + 1] int32; or None: not packed
    cos_ptr,  # [P, R / 2] float32, contiguous; None without rotation
    sin_ptr,  # [P, R / 2] float32, contiguous; None without rotation
    B,
    S,  # packed: T
    CAPACITY,  # the most rows that a sequence can have
    P,
    x_stride_b,
    x_stride_s,
    kv_stride_b,  # with pages: of blocks
    kv_stride_s,
    block_table_stride,
    eps,
    L: tl.constexpr,
    R: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    FORMAT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Row cache_seqlens[b] + s of the cache of b = (x[b, s] normalised, rotated at that position),
    unless it lies beyond the capacity or in a negative block.

    Grid: [B * S]: a token each.
    """
    token = tl.program_id(0)
    if cu_seqlens_ptr is None:
        i_b = token // S
        i_s = token % S
        x_row = i_s.to(tl.int64) * x_stride_s + i_b.to(tl.int64) * x_stride_b
        there = True
    else:
        i_b = _sequence_of(token, cu_seqlens_ptr, B)
        there = i_b < B
        i_s = token - tl.load(cu_seqlens_ptr + i_b, mask=there, other=0)
        x_row = token.to(tl.int64) * x_stride_s
    position = tl.load(cache_seqlens_ptr + i_b, mask=there, other=0) + i_s
    there = there & (position < CAPACITY)
    if block_table_ptr is None:
        i_block = i_b.to(tl.int64)
        slot = position
    else:
        p_block = block_table_ptr + i_b.to(tl.int64) * block_table_stride + position // PAGE_SIZE
        i_block = tl.load(p_block, mask=there, other=-1).to(tl.int64)
        slot = position % PAGE_SIZE
        there = there & (i_block >= 0)
    if not there:
        return
    p_x = x_ptr + x_row
    p_row = kv_ptr + i_block * kv_stride_b + slot.to(tl.int64) * kv_stride_s

    features = tl.arange(0, BLOCK_L)
    # [BLOCK_L]
    b_x = cast(tl.load(p_x + features, mask=features < L, other=0.0), tl.float32)
    b_weight = cast(tl.load(weight_ptr + features, mask=features < L, other=0.0), tl.float32)
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=0) / L + eps)
    store_latents(p_row, b_x * b_rstd * b_weight, L, BLOCK_L, FORMAT)

    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if cos_ptr is not None:
        pairs = tl.arange(0, BLOCK_R // 2)
        mask = pairs < R // 2
        i_table = tl.minimum(position, P - 1).to(tl.int64) * (R // 2) + pairs
        # [BLOCK_R / 2]
        b_cos = tl.load(cos_ptr + i_table, mask=mask, other=0.0)
        b_sin = tl.load(sin_ptr + i_table, mask=mask, other=0.0)
        if INTERLEAVED:
            first = 2 * pairs
            second = first + 1
        else:
            first = pairs
            second = pairs + R // 2
        b_x1 = cast(tl.load(p_x + L + first, mask=mask, other=0.0), tl.float32)
        b_x2 = cast(tl.load(p_x + L + second, mask=mask, other=0.0), tl.float32)
        b_y1 = cast(b_x1 * b_cos - b_x2 * b_sin, dtype)
        b_y2 = cast(b_x2 * b_cos + b_x1 * b_sin, dtype)
        store_rope(p_row, first, b_y1, mask, L, FORMAT)
        store_rope(p_row, second, b_y2, mask, L, FORMAT)
    elif R > 0:
        features = tl.arange(0, BLOCK_R)
        mask = features < R
        b_rope = tl.load(p_x + L + features, mask=mask, other=0.0)
        store_rope(p_row, features, b_rope, mask, L, FORMAT)


def _launch(
    compressed_kv: torch.Tensor,
    norm_weight: torch.Tensor,
    kv_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    eps: float,
    interleaved: bool,
) -> Launch:
    tokens, d = compressed_kv.shape[-2:]
    b, d_latent = cache_seqlens.shape[0], norm_weight.shape[0]
    rotates = cos is not None and d > d_latent
    widths = row_constants(d_latent, d - d_latent)
    arguments = {
        **{"x_ptr": compressed_kv, "weight_ptr": norm_weight.contiguous()},
        "kv_ptr": as_kernels_see(kv_cache),
        "cache_seqlens_ptr": cache_seqlens.contiguous(),
        "block_table_ptr": None if block_table is None else block_table.contiguous(),
        "block_table_stride": 0 if block_table is None else block_table.shape[1],
        "cu_seqlens_ptr": None if cu_seqlens is None else cu_seqlens.contiguous(),
        "cos_ptr": cos.contiguous() if rotates else None,
        "sin_ptr": sin.contiguous() if rotates else None,
        **{"B": b, "S": tokens, "CAPACITY": capacity(kv_cache, block_table)},
        "P": cos.shape[0] if rotates else 1,
        "x_stride_b": 0 if cu_seqlens is not None else compressed_kv.stride(0),
        "x_stride_s": compressed_kv.stride(-2),
        **{"kv_stride_b": kv_cache.stride(0), "kv_stride_s": kv_cache.stride(1)},
        "eps": eps,
    }
    constants = {
        **widths,
        "PAGE_SIZE": 1 if block_table is None else kv_cache.shape[1],
        **{"FORMAT": cache_format(kv_cache), "INTERLEAVED": interleaved},
    }
    grid = (tokens if cu_seqlens is not None else b * tokens,)
    return Launch(_cache_append_kernel, grid, arguments, constants, _NUM_WARPS)


@on_own_device
def mla_cache_append(
    compressed_kv: torch.Tensor,
    norm_weight: torch.Tensor,
    kv_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    eps: float,
    interleaved: bool,
) -> None:
    """The op `mla_cache_append`, whose reference says what the arguments are; in place."""
    compressed_kv = with_unit_last_stride(compressed_kv)
    if compressed_kv.numel() > 0 and cache_seqlens.shape[0] > 0:
        _launch(
            compressed_kv, norm_weight, kv_cache, cache_seqlens, block_table, cu_seqlens, cos, sin,
            eps, interleaved,
        ).run()  # fmt: skip


def why_not(*args: object) -> list[str]:
    """What this kernel cannot do with the arguments of `mla_cache_append`."""
    compressed_kv, norm_weight, kv_cache, *rest = args
    d_latent = norm_weight.shape[0]
    others = (compressed_kv, norm_weight, *without_codes(kv_cache), *rest)
    reasons = why_not_latents(d_latent, compressed_kv.shape[-1] - d_latent, *others)
    if kv_cache.shape[-1] > 1 and kv_cache.stride(-1) != 1:
        # A copy would not be the caller's cache.
        reasons.append(f"kv_cache with a last stride of {kv_cache.stride(-1)} (takes 1)")
    return reasons


def aot_cases() -> list[AheadOfTimeCase]:
    def tensor(*shape: int, of: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    cases = []
    for name, cache_dtype, row, packed in (
        ("bf16 512+64 pages", torch.bfloat16, 576, False),
        ("bf16 512+64 e4m3, packed", torch.float8_e4m3fn, 656, True),
        ("bf16 512+64 int8", torch.int8, 656, False),
    ):
        launch = _launch(
            tensor(*((8, 576) if packed else (2, 4, 576)), of=torch.bfloat16),
            tensor(512, of=torch.bfloat16),
            tensor(64, 64, row, of=cache_dtype),
            tensor(2, of=torch.int32),
            tensor(2, 32, of=torch.int32),
            tensor(3, of=torch.int32) if packed else None,
            tensor(1024, 32),
            tensor(1024, 32),
            1e-6,
            True,
        )
        cases.append(launch.ahead_of_time(name))
    return cases
