"""Absorbed latent attention on a cache, its tokens split among programs (Flash-Decoding, 2023).

A row of the cache is key and value of all heads: a tile of rows is read once and used twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from warploom.triton_kernels.attention.arguments import (
    UNLIMITED,
    UNSPECIALIZED,
    Launch,
    head_strides,
)
from warploom.triton_kernels.attention.attend import finish, initial_state
from warploom.triton_kernels.attention.decode_merge import merge_splits
from warploom.triton_kernels.attention.scoring import LN_2, LOG2_E, key_range, seen_keys
from warploom.triton_kernels.common.launch import (
    AheadOfTimeCase,
    cdiv,
    on_own_device,
    persistent_programs,
    with_unit_last_stride,
)
from warploom.triton_kernels.common.numerics import cast, dot, dot_of_rows
from warploom.triton_kernels.mla.latent_rows import (
    as_kernels_see,
    cache_format,
    capacity,
    is_compressed,
    load_features,
    load_latents,
    load_rope,
    packed_rows,
    row_constants,
    row_offsets,
    why_not_latents,
    without_codes,
)
from warploom.triton_kernels.mla.tiles import MlaTile, decode_tile

# Splits are made until this many programs share a multiprocessor, and none is below so many tiles
# of keys: its result has to be written and read again.
_PROGRAMS_PER_MULTIPROCESSOR = 2
_LEAST_TILES = 4
_MOST_SPLITS = 128


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "num_splits", "split_size"])
def _decode_kernel(
    q_ptr,  # [B, Sq, H, L + R], strides q_stride_{b,s,h}, 1
    kv_ptr,  # [B, Sk, row], strides kv_stride_{b,s}, 1; or pages [num_blocks, PAGE_SIZE, row]
    cache_seqlens_ptr,  # [B] int32
    block_table_ptr,  # [B, max_blocks] int32, row stride block_table_stride; or None: no pages
    out_ptr,  # [num_splits, B, Sq, H, L], contiguous: float32, without MERGED as q
    lse_ptr,  # [num_splits, B, H, Sq] float32, contiguous: base 2 with MERGED, else base e
    H,
    Sq,
    Sk,  # the most rows that a sequence can have
    num_splits,
    split_size,  # of every split; or 0: equal splits
    q_stride_b,
    q_stride_s,
    q_stride_h,
    kv_stride_b,  # with pages: of blocks
    kv_stride_s,
    block_table_stride,
    window_right,  # 0: causal
    score_scale,  # softmax_scale log2(e)
    L: tl.constexpr,
    R: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    FORMAT: tl.constexpr,
    MERGED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Softmax attention to one split of the rows of a sequence, and its log-sum-exp.

    The rows of a tile are queries times all heads.
    Grid: [B * cdiv(Sq * H, BLOCK_M), num_splits]: the last tile (causally the longest) first.
    """
    i_split = tl.program_id(1)
    tiles = tl.cdiv(Sq * H, BLOCK_M)
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    first_packed = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    rows, heads, row_mask = packed_rows(first_packed, Sq, H, BLOCK_M)
    wide_rows = rows.to(tl.int64)
    p_q = q_ptr + i_b * q_stride_b + wide_rows * q_stride_s + heads * q_stride_h
    # [BLOCK_M, BLOCK_L]
    b_q = load_features(p_q, row_mask, 0, L, BLOCK_L)
    if R > 0:
        # [BLOCK_M, BLOCK_R]
        b_q_rope = load_features(p_q, row_mask, L, L + R, BLOCK_R)

    Sk = tl.minimum(tl.load(cache_seqlens_ptr + i_b), Sk)
    sizes = (Sq, Sk)
    window = (0, window_right)
    pages = (block_table_ptr, i_b * block_table_stride)
    # The queries that the tile's rows belong to.
    first_row = first_packed // H
    row_count = (first_packed + BLOCK_M - 1) // H - first_row + 1
    end = key_range(first_row, sizes, window, False, row_count, BLOCK_N)[3]
    if split_size > 0:
        split = split_size
    else:
        split = tl.cdiv(tl.cdiv(end, BLOCK_N), num_splits) * BLOCK_N
    start = i_split * split
    end = tl.minimum(end, start + split)

    b_max, b_sum, b_out = initial_state(
        tl.full([BLOCK_M], float("-inf"), dtype=tl.float32), BLOCK_M, BLOCK_L
    )
    for first in range(start, end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        key_mask = keys < end
        p_rows = kv_ptr + row_offsets(
            keys, key_mask, i_b * kv_stride_b, kv_stride_b, kv_stride_s, pages, PAGE_SIZE
        )
        # [BLOCK_N, BLOCK_L]
        b_latent = load_latents(p_rows, key_mask, b_q.dtype, L, BLOCK_L, FORMAT)
        # [BLOCK_M, BLOCK_N]
        b_score = dot_of_rows(b_q, b_latent)
        if R > 0:
            # [BLOCK_N, BLOCK_R]
            b_rope = load_rope(p_rows, key_mask, b_q.dtype, L, R, BLOCK_R, FORMAT)
            b_score = dot(b_q_rope, tl.trans(b_rope), b_score)
        seen = seen_keys(rows[:, None], keys[None, :], sizes, window, (None, 0), False)
        b_score = tl.where(seen, b_score * score_scale, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_score, axis=1))
        # A query that has seen no key yet: exp2(-inf - 0) is 0, exp2(-inf - -inf) would be NaN.
        b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_p = tl.exp2(b_score - b_shift[:, None])
        b_rescale = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_rescale + tl.sum(b_p, axis=1)
        b_out = dot(cast(b_p, b_latent.dtype), b_latent, b_out * b_rescale[:, None])
        b_max = b_new_max

    b_out, b_lse = finish((b_max, b_sum, b_out))
    if not MERGED:
        b_lse = b_lse * LN_2
    i_part = i_split.to(tl.int64) * (tl.num_programs(0) // tiles) + i_b
    features = tl.arange(0, BLOCK_L)[None, :]
    p_out = out_ptr + ((i_part * Sq + wide_rows) * H + heads)[:, None] * L + features
    b_out = cast(b_out, out_ptr.dtype.element_ty)
    tl.store(p_out, b_out, mask=row_mask[:, None] & (features < L))
    tl.store(lse_ptr + (i_part * H + heads) * Sq + wide_rows, b_lse, mask=row_mask)


def _launch(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None,
    softmax_scale: float,
    causal: bool,
    num_splits: int,
    split_size: int,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> Launch:
    b, sq, h, d = q.shape
    d_latent = out.shape[-1]
    tile = _tile(q, kv_cache, d_latent)
    arguments = {
        **{"q_ptr": q, "kv_ptr": as_kernels_see(kv_cache), "out_ptr": out, "lse_ptr": lse},
        "cache_seqlens_ptr": cache_seqlens.contiguous(),
        "block_table_ptr": None if block_table is None else block_table.contiguous(),
        "block_table_stride": 0 if block_table is None else block_table.shape[1],
        **{"H": h, "Sq": sq, "Sk": capacity(kv_cache, block_table)},
        **{"num_splits": num_splits, "split_size": split_size},
        **head_strides("q", q, packed=False),
        **{"kv_stride_b": kv_cache.stride(0), "kv_stride_s": kv_cache.stride(1)},
        **{"window_right": 0 if causal else UNLIMITED, "score_scale": softmax_scale * LOG2_E.value},
    }
    constants = {
        **row_constants(d_latent, d - d_latent),
        "PAGE_SIZE": 1 if block_table is None else kv_cache.shape[1],
        "FORMAT": cache_format(kv_cache),
        "MERGED": num_splits > 1,
        **{"BLOCK_M": tile.rows, "BLOCK_N": tile.keys},
    }
    grid = (b * cdiv(sq * h, tile.rows), num_splits)
    return Launch(_decode_kernel, grid, arguments, constants, tile.num_warps, tile.num_stages)


def _tile(q: torch.Tensor, kv_cache: torch.Tensor, d_latent: int) -> MlaTile:
    _, sq, h, d = q.shape
    return decode_tile(q.dtype, d_latent, d - d_latent, sq * h, is_compressed(kv_cache))


def _splits(
    q: torch.Tensor, tile: MlaTile, most_keys: int, num_splits: int, split_size: int
) -> int:
    """How many splits, from sizes and the device alone: lengths are not read by the host."""
    if split_size > 0:
        return max(1, cdiv(most_keys, split_size))
    if num_splits > 0:
        return num_splits
    b, sq, h, _ = q.shape
    programs = b * cdiv(sq * h, tile.rows)
    room = persistent_programs(q.device, most_keys + programs, _PROGRAMS_PER_MULTIPROCESSOR)
    most = min(_MOST_SPLITS, most_keys // (_LEAST_TILES * tile.keys))
    return max(1, min(room // programs, most))


@on_own_device
def mla_decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None,
    d_latent: int,
    softmax_scale: float,
    causal: bool,
    num_splits: int,
    split_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of the op `mla_decode`, whose reference says what the arguments are."""
    q, kv_cache = with_unit_last_stride(q), with_unit_last_stride(kv_cache)
    b, sq, h, _ = q.shape
    out = torch.empty((b, sq, h, d_latent), dtype=q.dtype, device=q.device)
    lse = torch.empty((b, h, sq), dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    tile = _tile(q, kv_cache, d_latent)
    splits = _splits(q, tile, capacity(kv_cache, block_table), num_splits, split_size)
    of_splits = (out, lse)
    if splits > 1:
        of_splits = (
            torch.empty((splits, *out.shape), dtype=torch.float32, device=q.device),
            torch.empty((splits, *lse.shape), dtype=torch.float32, device=q.device),
        )
    _launch(
        q, kv_cache, cache_seqlens, block_table, softmax_scale, causal, splits, split_size,
        *of_splits,
    ).run()  # fmt: skip
    if splits > 1:
        merge_splits(*of_splits, out, lse).run()
    return out, lse


def why_not(*args: object) -> list[str]:
    """What these kernels cannot do with the arguments of `mla_decode`."""
    q, kv_cache, *rest = args
    d_latent = rest[2]
    return why_not_latents(d_latent, q.shape[-1] - d_latent, q, *without_codes(kv_cache), *rest)


def aot_cases() -> list[AheadOfTimeCase]:
    def tensor(*shape: int, of: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    cases = []
    b, pages = 2, 64
    for name, dtype, cache_dtype, h, d_latent, d, row, page_size in (
        ("bf16 512+64 pages of 64", torch.bfloat16, torch.bfloat16, 16, 512, 576, 576, 64),
        ("bf16 512+64 128 heads", torch.bfloat16, torch.bfloat16, 128, 512, 576, 576, 0),
        ("fp16 448+128", torch.float16, torch.float16, 16, 448, 576, 576, 0),
        ("bf16 256+0 128 heads", torch.bfloat16, torch.bfloat16, 128, 256, 256, 256, 1),
        ("bf16 512+64 e4m3", torch.bfloat16, torch.float8_e4m3fn, 16, 512, 576, 656, 64),
        ("fp16 512+64 int8", torch.float16, torch.int8, 128, 512, 576, 656, 64),
        ("fp32 512+64 e4m3", torch.float32, torch.float8_e4m3fn, 16, 512, 576, 656, 0),
        ("fp32 512+64", torch.float32, torch.float32, 16, 512, 576, 576, 64),
    ):
        launch = _launch(
            tensor(b, 1, h, d, of=dtype),
            tensor(pages, page_size or 1024, row, of=cache_dtype),
            tensor(b, of=torch.int32),
            tensor(b, pages, of=torch.int32) if page_size else None,
            0.1,
            True,
            4,
            0,
            tensor(4, b, 1, h, d_latent),
            tensor(4, b, h, 1),
        )
        cases.append(launch.ahead_of_time(name))
    return cases
