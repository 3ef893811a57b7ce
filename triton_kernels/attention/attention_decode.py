"""Attention of a few new queries on a cache, its keys split among programs (Flash-Decoding, 2023)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from warploom.triton_kernels.attention.arguments import (
    UNSPECIALIZED,
    Launch,
    block_constants,
    head_strides,
    score_arguments,
)
from warploom.triton_kernels.attention.attend import attend, finish, initial_state
from warploom.triton_kernels.attention.decode_merge import merge_splits
from warploom.triton_kernels.attention.scoring import LN_2, LOG2_E, key_range
from warploom.triton_kernels.attention.tiles import decode_tile, why_not_attention
from warploom.triton_kernels.common.launch import (
    AheadOfTimeCase,
    cdiv,
    on_own_device,
    persistent_programs,
    with_unit_last_stride,
)
from warploom.triton_kernels.common.numerics import cast

# Splits are made until this many programs share a multiprocessor, and none is below so many tiles
# of keys: its result has to be written and read again.
_PROGRAMS_PER_MULTIPROCESSOR = 2
_LEAST_TILES = 4
_MOST_SPLITS = 128


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "num_splits", "split_size"])
def _decode_kernel(
    q_ptr,  # [B, Sq, H, D], strides q_stride_{b,s,h}, 1
    k_ptr,  # [B, Sk, H / GROUP, D], strides k_stride_{b,s,h}, 1; or pages [num_blocks, PAGE_SIZE, ..]
    v_ptr,  # [B, Sk, H / GROUP, DV], strides v_stride_{b,s,h}, 1; or pages
    cache_seqlens_ptr,  # [B] int32
    block_table_ptr,  # [B, max_blocks] int32, row stride block_table_stride; or None: no pages
    alibi_ptr,  # [B, H] float32, contiguous; or None
    sinks_ptr,  # [H] float32; or None
    out_ptr,  # [num_splits, B, Sq, H, DV], contiguous: float32, without MERGED as q
    lse_ptr,  # [num_splits, B, H, Sq] float32, contiguous: base 2 with MERGED, else base e
    H,
    Sq,
    Sk,  # the most keys that a sequence can have
    num_splits,
    split_size,  # of every split; or 0: equal splits
    q_stride_b,
    q_stride_s,
    q_stride_h,
    k_stride_b,  # with pages: of blocks
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    block_table_stride,
    window_left,
    window_right,
    score_scale,  # softmax_scale log2(e); with SOFTCAP softmax_scale / softcap
    softcap_log2,  # softcap log2(e)
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    LEFT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MERGED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Softmax attention to one split of the keys, and its log-sum-exp; the sink is in split 0.

    The rows of a tile are queries times the heads of a group, which read the same keys.
    Grid: [B * (H / GROUP) * cdiv(Sq * GROUP, BLOCK_M), num_splits].
    """
    kv_heads = H // GROUP
    i_split = tl.program_id(1)
    tiles = tl.cdiv(Sq * GROUP, BLOCK_M)
    i_b = (tl.program_id(0) // tiles // kv_heads).to(tl.int64)
    i_kv = (tl.program_id(0) // tiles % kv_heads).to(tl.int64)
    first_packed = tl.program_id(0) % tiles * BLOCK_M
    packed = first_packed + tl.arange(0, BLOCK_M)
    rows = packed // GROUP
    row_mask = rows < Sq
    heads = i_kv * GROUP + packed % GROUP
    wide_rows = rows.to(tl.int64)
    features = tl.arange(0, BLOCK_D)[None, :]
    value_features = tl.arange(0, BLOCK_DV)[None, :]
    # [BLOCK_M, BLOCK_D]
    p_q = q_ptr + i_b * q_stride_b + wide_rows[:, None] * q_stride_s + heads[:, None] * q_stride_h
    b_q = tl.load(p_q + features, mask=row_mask[:, None] & (features < D), other=0.0)

    Sk = tl.minimum(tl.load(cache_seqlens_ptr + i_b), Sk)
    k_head = k_ptr + i_kv * k_stride_h
    v_head = v_ptr + i_kv * v_stride_h
    if block_table_ptr is None:
        k_head += i_b * k_stride_b
        v_head += i_b * v_stride_b
    key_strides = (k_stride_s, v_stride_s, k_stride_b, v_stride_b)
    pages = (block_table_ptr, i_b * block_table_stride)
    sizes = (Sq, Sk)
    window = (window_left, window_right)
    bias = (None, 0, 0, 0)
    alibi = (alibi_ptr, (i_b * H + heads)[:, None])
    padding = (None, 0)
    dropout = (None, 0, 0)
    b_sink = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    if sinks_ptr is not None:
        b_sink = tl.where(i_split == 0, tl.load(sinks_ptr + heads) * LOG2_E, b_sink)

    # The queries that the tile's rows belong to.
    first_row = first_packed // GROUP
    row_count = (first_packed + BLOCK_M - 1) // GROUP - first_row + 1
    start, whole_start, whole_end, end = key_range(
        first_row, sizes, window, LEFT, row_count, BLOCK_N
    )
    if split_size > 0:
        split_start = i_split * split_size
        split_end = split_start + split_size
    else:
        key_tiles = tl.cdiv(tl.maximum(end - start, 0), BLOCK_N)
        split = tl.cdiv(key_tiles, num_splits) * BLOCK_N
        split_start = start + i_split * split
        split_end = split_start + split
    start = tl.maximum(start, split_start)
    whole_start = tl.maximum(whole_start, start)
    end = tl.minimum(end, split_end)
    whole_end = tl.maximum(tl.minimum(whole_end, split_end), whole_start)

    state = initial_state(b_sink, BLOCK_M, BLOCK_DV)
    if LEFT:
        state = attend(
            state, b_q, k_head, v_head, key_strides, pages, rows, first_row,
            start, tl.minimum(whole_start, end), sizes, window, bias, alibi, padding, dropout,
            score_scale, softcap_log2, D, DV, PAGE_SIZE, LEFT, SOFTCAP, True,
            BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    state = attend(
        state, b_q, k_head, v_head, key_strides, pages, rows, first_row,
        whole_start, whole_end, sizes, window, bias, alibi, padding, dropout,
        score_scale, softcap_log2, D, DV, PAGE_SIZE, LEFT, SOFTCAP, False,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    state = attend(
        state, b_q, k_head, v_head, key_strides, pages, rows, first_row,
        whole_end, end, sizes, window, bias, alibi, padding, dropout,
        score_scale, softcap_log2, D, DV, PAGE_SIZE, LEFT, SOFTCAP, True,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip

    b_out, b_lse = finish(state)
    if not MERGED:
        b_lse = b_lse * LN_2
    i_part = i_split.to(tl.int64) * (tl.num_programs(0) // tiles // kv_heads) + i_b
    p_out = out_ptr + ((i_part * Sq + wide_rows) * H + heads)[:, None] * DV + value_features
    b_out = cast(b_out, out_ptr.dtype.element_ty)
    tl.store(p_out, b_out, mask=row_mask[:, None] & (value_features < DV))
    tl.store(lse_ptr + (i_part * H + heads) * Sq + wide_rows, b_lse, mask=row_mask)


def _launch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    num_splits: int,
    split_size: int,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> Launch:
    b, sq, h, d = q.shape
    kv_heads, dv = v_cache.shape[2:]
    group = h // kv_heads
    tile = decode_tile(q.dtype, d, dv, sq * group)
    scores, switches = score_arguments(
        alibi_slopes, softmax_scale, window_left, window_right, softcap
    )
    arguments = {
        **{"q_ptr": q, "k_ptr": k_cache, "v_ptr": v_cache, "out_ptr": out, "lse_ptr": lse},
        "cache_seqlens_ptr": cache_seqlens.contiguous(),
        "block_table_ptr": None if block_table is None else block_table.contiguous(),
        "block_table_stride": 0 if block_table is None else block_table.shape[1],
        "sinks_ptr": None if sinks is None else sinks.contiguous(),
        **{"H": h, "Sq": sq, "Sk": _capacity(k_cache, block_table)},
        **{"num_splits": num_splits, "split_size": split_size},
        **head_strides("q", q, packed=False),
        **head_strides("k", k_cache, packed=False),
        **head_strides("v", v_cache, packed=False),
        **scores,
    }
    constants = {
        **block_constants(tile, d, dv, group),
        **switches,
        "PAGE_SIZE": 1 if block_table is None else k_cache.shape[1],
        "MERGED": num_splits > 1,
    }
    grid = (b * kv_heads * cdiv(sq * group, tile.queries), num_splits)
    return Launch(_decode_kernel, grid, arguments, constants, tile.num_warps, tile.num_stages)


def _capacity(k_cache: torch.Tensor, block_table: torch.Tensor | None) -> int:
    """The most keys that a sequence can have."""
    return k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])


def _splits(
    q: torch.Tensor, v_cache: torch.Tensor, capacity: int, num_splits: int, split_size: int
) -> int:
    """How many splits, from sizes and the device alone: lengths are not read by the host."""
    if split_size > 0:
        return max(1, cdiv(capacity, split_size))
    if num_splits > 0:
        return num_splits
    b, sq, h, d = q.shape
    kv_heads, dv = v_cache.shape[2:]
    rows = sq * (h // kv_heads)
    tile = decode_tile(q.dtype, d, dv, rows)
    programs = b * kv_heads * cdiv(rows, tile.queries)
    room = persistent_programs(q.device, capacity + programs, _PROGRAMS_PER_MULTIPROCESSOR)
    most = min(_MOST_SPLITS, capacity // (_LEAST_TILES * tile.keys))
    return max(1, min(room // programs, most))


@on_own_device
def attention_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    num_splits: int,
    split_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of the op `attention_decode`, whose reference says what the arguments are."""
    q, k_cache, v_cache = (with_unit_last_stride(tensor) for tensor in (q, k_cache, v_cache))
    b, sq, h, _ = q.shape
    dv = v_cache.shape[3]
    out = torch.empty((b, sq, h, dv), dtype=q.dtype, device=q.device)
    lse = torch.empty((b, h, sq), dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    splits = _splits(q, v_cache, _capacity(k_cache, block_table), num_splits, split_size)
    of_splits = (out, lse)
    if splits > 1:
        of_splits = (
            torch.empty((splits, b, sq, h, dv), dtype=torch.float32, device=q.device),
            torch.empty((splits, b, h, sq), dtype=torch.float32, device=q.device),
        )
    _launch(
        q, k_cache, v_cache, cache_seqlens, block_table, alibi_slopes, sinks, softmax_scale,
        window_left, window_right, softcap, splits, split_size, *of_splits,
    ).run()  # fmt: skip
    if splits > 1:
        merge_splits(*of_splits, out, lse).run()
    return out, lse


def why_not(*args: object) -> list[str]:
    """What these kernels cannot do with the arguments of `attention_decode`."""
    return why_not_attention(*args)


def aot_cases() -> list[AheadOfTimeCase]:
    def tensor(*shape: int, of: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    cases = []
    b, h, kv_heads = 2, 8, 2
    for name, dtype, d, page_size, features in (
        ("bf16 D=64", torch.bfloat16, 64, 0, False),
        ("bf16 D=128 pages of 16", torch.bfloat16, 128, 16, False),
        ("bf16 D=256 pages of 64, all features", torch.bfloat16, 256, 64, True),
        ("fp32 D=128", torch.float32, 128, 0, True),
    ):
        cache = tensor(64, page_size or 1024, kv_heads, d, of=dtype)
        launch = _launch(
            tensor(b, 1, h, d, of=dtype),
            cache,
            cache,
            tensor(b, of=torch.int32),
            tensor(b, 64, of=torch.int32) if page_size else None,
            tensor(b, h) if features else None,
            tensor(h) if features else None,
            0.125,
            256 if features else -1,
            0,
            30.0 if features else 0.0,
            4,
            0,
            tensor(4, b, 1, h, d),
            tensor(4, b, h, 1),
        )
        cases.append(launch.ahead_of_time(name))
    return cases
