"""Writing new keys, rotated where tables are given, and values behind a cache's rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from warploom.triton_kernels.attention.arguments import Launch, head_strides
from warploom.triton_kernels.common.launch import (
    AheadOfTimeCase,
    cdiv,
    next_power_of_2,
    on_own_device,
    warp_count,
    why_not_tensors,
    with_unit_last_stride,
)
from warploom.triton_kernels.common.numerics import cast

_TILE_ELEMENTS = 2048


@triton.jit(do_not_specialize=["M", "S", "H", "CAPACITY", "P"])
def _cache_append_kernel(
    k_ptr,  # [B, S, H, D], strides k_stride_{b,s,h}, 1
    v_ptr,  # [B, S, H, DV], strides v_stride_{b,s,h}, 1
    k_cache_ptr,  # [B, CAPACITY, H, D], strides k_cache_stride_{b,s,h}, 1; or pages
    v_cache_ptr,  # [B, CAPACITY, H, DV], strides v_cache_stride_{b,s,h}, 1; or pages
    cache_seqlens_ptr,  # [B] int32
    block_table_ptr,  # [B, max_blocks] int32, row stride block_table_stride; or None: no pages
    cos_ptr,  # [P, R / 2] float32, contiguous; None without rotation
    sin_ptr,  # [P, R / 2] float32, contiguous; None without rotation
    M,  # B * S * H
    S,
    H,
    CAPACITY,  # the most rows that a sequence can have
    P,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    k_cache_stride_b,  # with pages: of blocks
    k_cache_stride_s,
    k_cache_stride_h,
    v_cache_stride_b,
    v_cache_stride_s,
    v_cache_stride_h,
    block_table_stride,
    D: tl.constexpr,
    DV: tl.constexpr,
    R: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Row cache_seqlens[b] + s of the caches of b = (k[b, s] rotated at it, v[b, s]), unless it lies
    beyond the capacity or in a negative block.

    Grid: [cdiv(B * S * H, BLOCK_M)]; BLOCK_R >= R / 2; BLOCK_TAIL >= D - R, 0 where R == D.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    row_mask = rows < M
    i_h = rows % H
    i_s = rows // H % S
    i_b = rows // H // S
    # [BLOCK_M, 1]
    b_length = tl.load(cache_seqlens_ptr + i_b, mask=row_mask, other=0)
    b_position = b_length.to(tl.int64) + i_s
    row_mask = row_mask & (b_position < CAPACITY)
    if block_table_ptr is None:
        b_block = i_b
        slots = b_position
    else:
        p_block = block_table_ptr + i_b * block_table_stride + b_position // PAGE_SIZE
        b_block = tl.load(p_block, mask=row_mask, other=-1).to(tl.int64)
        slots = b_position % PAGE_SIZE
        row_mask = row_mask & (b_block >= 0)
    p_k = k_ptr + i_b * k_stride_b + i_s * k_stride_s + i_h * k_stride_h
    p_v = v_ptr + i_b * v_stride_b + i_s * v_stride_s + i_h * v_stride_h
    p_k_cache = k_cache_ptr + b_block * k_cache_stride_b + slots * k_cache_stride_s
    p_k_cache = p_k_cache + i_h * k_cache_stride_h
    p_v_cache = v_cache_ptr + b_block * v_cache_stride_b + slots * v_cache_stride_s
    p_v_cache = p_v_cache + i_h * v_cache_stride_h

    if cos_ptr is not None:
        pairs = tl.arange(0, BLOCK_R)[None, :]
        mask = row_mask & (pairs < R // 2)
        i_table = tl.minimum(b_position, P - 1) * (R // 2) + pairs
        # [BLOCK_M, BLOCK_R]
        b_cos = tl.load(cos_ptr + i_table, mask=mask, other=0.0)
        b_sin = tl.load(sin_ptr + i_table, mask=mask, other=0.0)
        if INTERLEAVED:
            first = 2 * pairs
            second = first + 1
        else:
            first = pairs
            second = pairs + R // 2
        b_x1 = cast(tl.load(p_k + first, mask=mask, other=0.0), tl.float32)
        b_x2 = cast(tl.load(p_k + second, mask=mask, other=0.0), tl.float32)
        b_y1 = cast(b_x1 * b_cos - b_x2 * b_sin, k_cache_ptr.dtype.element_ty)
        b_y2 = cast(b_x2 * b_cos + b_x1 * b_sin, k_cache_ptr.dtype.element_ty)
        tl.store(p_k_cache + first, b_y1, mask=mask)
        tl.store(p_k_cache + second, b_y2, mask=mask)
    if BLOCK_TAIL > 0:
        tail = R + tl.arange(0, BLOCK_TAIL)[None, :]
        tail_mask = row_mask & (tail < D)
        # [BLOCK_M, BLOCK_TAIL]
        b_tail = tl.load(p_k + tail, mask=tail_mask, other=0.0)
        tl.store(p_k_cache + tail, b_tail, mask=tail_mask)
    value_features = tl.arange(0, BLOCK_DV)[None, :]
    v_mask = row_mask & (value_features < DV)
    # [BLOCK_M, BLOCK_DV]
    b_v = tl.load(p_v + value_features, mask=v_mask, other=0.0)
    tl.store(p_v_cache + value_features, b_v, mask=v_mask)


def _launch(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
) -> Launch:
    b, s, h, d = k.shape
    dv = v.shape[3]
    r = 0 if cos is None else 2 * cos.shape[1]
    widest = next_power_of_2(max(d, dv))
    block_rows = max(1, min(32, _TILE_ELEMENTS // widest))
    page_size = k_cache.shape[1]
    arguments = {
        **{"k_ptr": k, "v_ptr": v, "k_cache_ptr": k_cache, "v_cache_ptr": v_cache},
        "cache_seqlens_ptr": cache_seqlens.contiguous(),
        "block_table_ptr": None if block_table is None else block_table.contiguous(),
        "block_table_stride": 0 if block_table is None else block_table.shape[1],
        "cos_ptr": None if cos is None or r == 0 else cos.contiguous(),
        "sin_ptr": None if sin is None or r == 0 else sin.contiguous(),
        **{"M": b * s * h, "S": s, "H": h},
        "CAPACITY": page_size * (1 if block_table is None else block_table.shape[1]),
        "P": 1 if cos is None else cos.shape[0],
        **head_strides("k", k, packed=False),
        **head_strides("v", v, packed=False),
        **head_strides("k_cache", k_cache, packed=False),
        **head_strides("v_cache", v_cache, packed=False),
    }
    constants = {
        **{"D": d, "DV": dv, "R": r, "INTERLEAVED": interleaved},
        "PAGE_SIZE": 1 if block_table is None else page_size,
        "BLOCK_M": block_rows,
        "BLOCK_R": next_power_of_2(r // 2),
        "BLOCK_TAIL": next_power_of_2(d - r) if d > r else 0,
        "BLOCK_DV": next_power_of_2(dv),
    }
    grid = (cdiv(b * s * h, block_rows),)
    return Launch(_cache_append_kernel, grid, arguments, constants, warp_count(block_rows * widest))


@on_own_device
def attention_cache_append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
) -> None:
    """The op `attention_cache_append`, whose reference says what the arguments are; in place."""
    k, v = with_unit_last_stride(k), with_unit_last_stride(v)
    if k.numel() > 0:
        _launch(k, v, k_cache, v_cache, cache_seqlens, block_table, cos, sin, interleaved).run()


def why_not(*args: object) -> list[str]:
    """What this kernel cannot do with the arguments of `attention_cache_append`."""
    reasons = why_not_tensors(*args)
    for name, cache in (("k_cache", args[2]), ("v_cache", args[3])):
        # A copy would not be the caller's cache.
        if isinstance(cache, torch.Tensor) and cache.shape[-1] > 1 and cache.stride(-1) != 1:
            reasons.append(f"{name} with a last stride of {cache.stride(-1)} (takes 1)")
    return reasons


def aot_cases() -> list[AheadOfTimeCase]:
    def tensor(*shape: int, of: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    cases = []
    for name, r, page_size, interleaved in (
        ("bf16 D=128 R=128 halves", 128, 0, False),
        ("bf16 D=128 R=64 interleaved, pages", 64, 16, True),
    ):
        cache = tensor(64, page_size or 1024, 2, 128)
        table = tensor(1024, r // 2, of=torch.float32) if r else None
        blocks = tensor(2, 64, of=torch.int32) if page_size else None
        new, lengths = tensor(2, 1, 2, 128), tensor(2, of=torch.int32)
        launch = _launch(new, new, cache, cache, lengths, blocks, table, table, interleaved)
        cases.append(launch.ahead_of_time(name))
    return cases
