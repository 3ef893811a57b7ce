"""Attention forward in one pass over the keys (FlashAttention-2, Dao 2023, algorithm 1)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from warploom.triton_kernels.attention.arguments import (
    UNSPECIALIZED,
    Launch,
    block_constants,
    dense_arguments,
    example,
    head_strides,
    is_plain,
    score_arguments,
    sequence_arguments,
)
from warploom.triton_kernels.attention.attend import attend, finish, initial_state
from warploom.triton_kernels.attention.scoring import LN_2, LOG2_E, key_range, sequence
from warploom.triton_kernels.attention.tiles import forward_tile, why_not_attention
from warploom.triton_kernels.common.launch import (
    AheadOfTimeCase,
    cdiv,
    on_own_device,
    with_unit_last_stride,
)
from warploom.triton_kernels.common.numerics import cast


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_kernel(
    q_ptr,  # [B, Sq, H, D], strides q_stride_{b,s,h}, 1; packed [Tq, H, D] with q_stride_b 0
    k_ptr,  # [B, Sk, H / GROUP, D], packed [Tk, ..], or pages [num_blocks, PAGE_SIZE, ..]
    v_ptr,  # [.., H / GROUP, DV], else as k
    out_ptr,  # [B, Sq, H, DV] or [Tq, H, DV], strides out_stride_{b,s,h}, 1
    lse_ptr,  # [B, H, Sq] or [H, Tq] float32, strides lse_stride_{b,h}, 1
    bias_ptr,  # [B, H, Sq, Sk], strides bias_stride_{b,h,q,k}; or None
    alibi_ptr,  # [B, H] float32, contiguous; or None
    sinks_ptr,  # [H] float32; or None
    padding_ptr,  # [B, Sk] bytes, contiguous, not 0 where the key is hidden; or None
    cu_seqlens_q_ptr,  # [B + 1] int32; or None: dense
    cu_seqlens_k_ptr,  # [B + 1] int32; or None: dense
    block_table_ptr,  # [B, max_blocks] int32, row stride block_table_stride; or None: no pages
    seed_ptr,  # [1] int64; or None: no dropout
    H,
    Sq,  # packed: no sequence is longer
    Sk,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    k_stride_b,  # with pages: of blocks
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    out_stride_b,
    out_stride_s,
    out_stride_h,
    lse_stride_b,
    lse_stride_h,
    bias_stride_b,
    bias_stride_h,
    bias_stride_q,
    bias_stride_k,
    block_table_stride,
    window_left,
    window_right,
    dropout_threshold,
    keep_scale,  # 1 / (1 - dropout_p)
    score_scale,  # softmax_scale log2(e); with SOFTCAP softmax_scale / softcap
    softcap_log2,  # softcap log2(e)
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    LEFT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """out = dropout(softmax(scores)) v and lse = log(exp(sink) + sum(exp(scores))).

    Grid: [B * H * cdiv(Sq, BLOCK_M)]: query tiles fastest, the last one (causally the longest)
    first, so that programs that run together read the same keys.
    """
    query_tiles = tl.cdiv(Sq, BLOCK_M)
    first_row = (query_tiles - 1 - tl.program_id(0) % query_tiles) * BLOCK_M
    i_bh = tl.program_id(0) // query_tiles
    i_b = (i_bh // H).to(tl.int64)
    i_h = (i_bh % H).to(tl.int64)
    i_kv = i_h // GROUP
    q_start, k_start, Sq, Sk = sequence(cu_seqlens_q_ptr, cu_seqlens_k_ptr, i_b, Sq, Sk)
    if first_row >= Sq:
        return

    rows = first_row + tl.arange(0, BLOCK_M)
    wide_rows = (q_start + rows)[:, None]
    features = tl.arange(0, BLOCK_D)[None, :]
    value_features = tl.arange(0, BLOCK_DV)[None, :]
    row_mask = rows < Sq
    # [BLOCK_M, BLOCK_D]
    p_q = q_ptr + i_b * q_stride_b + i_h * q_stride_h + wide_rows * q_stride_s + features
    b_q = tl.load(p_q, mask=row_mask[:, None] & (features < D), other=0.0)

    k_head = k_ptr + i_kv * k_stride_h
    v_head = v_ptr + i_kv * v_stride_h
    if block_table_ptr is None:
        k_head += i_b * k_stride_b + k_start * k_stride_s
        v_head += i_b * v_stride_b + k_start * v_stride_s
    key_strides = (k_stride_s, v_stride_s, k_stride_b, v_stride_b)
    pages = (block_table_ptr, i_b * block_table_stride)
    sizes = (Sq, Sk)
    window = (window_left, window_right)
    bias_offset = i_b * bias_stride_b + i_h * bias_stride_h
    bias = (bias_ptr, bias_offset, bias_stride_q, bias_stride_k)
    alibi = (alibi_ptr, i_bh)
    padding = (padding_ptr, i_b * Sk)
    dropout = (seed_ptr, i_bh, dropout_threshold)
    b_sink = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    if sinks_ptr is not None:
        b_sink = tl.zeros([BLOCK_M], dtype=tl.float32) + tl.load(sinks_ptr + i_h) * LOG2_E

    state = initial_state(b_sink, BLOCK_M, BLOCK_DV)
    start, whole_start, whole_end, end = key_range(first_row, sizes, window, LEFT, BLOCK_M, BLOCK_N)
    # A bias may hide keys too, by -inf.
    HIDDEN: tl.constexpr = bias_ptr is not None or padding_ptr is not None
    if HIDDEN:
        whole_end = whole_start
    if LEFT:
        state = attend(
            state, b_q, k_head, v_head, key_strides, pages, rows, first_row,
            start, tl.minimum(whole_start, end), sizes, window, bias, alibi, padding, dropout,
            score_scale, softcap_log2, D, DV, PAGE_SIZE, LEFT, SOFTCAP, True,
            BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    if not HIDDEN:
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
    p_out = out_ptr + i_b * out_stride_b + i_h * out_stride_h + wide_rows * out_stride_s
    b_out = cast(b_out * keep_scale, out_ptr.dtype.element_ty)
    tl.store(p_out + value_features, b_out, mask=row_mask[:, None] & (value_features < DV))
    p_lse = lse_ptr + i_b * lse_stride_b + i_h * lse_stride_h + q_start + rows
    tl.store(p_lse, b_lse * LN_2, mask=row_mask)


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    bias: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    block_table: torch.Tensor | None,
    dropout_seed: torch.Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> Launch:
    packed = cu_seqlens_q is not None
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    (heads, d), dv = q.shape[-2:], v.shape[-1]
    plain = is_plain(
        window_left, softcap, bias, alibi_slopes, key_padding_mask, cu_seqlens_q, dropout_seed
    )
    tile = forward_tile(q.dtype, d, dv, plain)
    scores, switches = score_arguments(
        alibi_slopes, softmax_scale, window_left, window_right, softcap
    )
    paged = block_table is not None
    arguments = {
        **{"q_ptr": q, "k_ptr": k, "v_ptr": v, "out_ptr": out, "lse_ptr": lse},
        "sinks_ptr": None if sinks is None else sinks.contiguous(),
        "block_table_ptr": None if block_table is None else block_table.contiguous(),
        "block_table_stride": 0 if block_table is None else block_table.shape[1],
        **head_strides("q", q, packed),
        **head_strides("k", k, packed and not paged),
        **head_strides("v", v, packed and not paged),
        **head_strides("out", out, packed),
        **sequence_arguments(q, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
        **scores,
        **dense_arguments(bias, key_padding_mask, dropout_seed, dropout_p),
    }
    constants = {
        **block_constants(tile, d, dv, heads // k.shape[-2]),
        **switches,
        "PAGE_SIZE": k.shape[1] if paged else 1,
    }
    grid = (batch * heads * cdiv(max_seqlen_q, tile.queries),)
    return Launch(_attention_kernel, grid, arguments, constants, tile.num_warps, tile.num_stages)


@on_own_device
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    block_table: torch.Tensor | None,
    dropout_seed: torch.Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of the op `attention`, whose reference says what the arguments are."""
    q, k, v = (with_unit_last_stride(tensor) for tensor in (q, k, v))
    *rows, heads, _ = q.shape
    out = torch.empty((*rows, heads, v.shape[-1]), dtype=q.dtype, device=q.device)
    lse_shape = (*rows[:-1], heads, rows[-1])
    lse = torch.empty(lse_shape, dtype=torch.float32, device=q.device)
    if cu_seqlens_q is not None:
        # Rows that belong to no sequence.
        out.zero_()
        lse.fill_(float("-inf"))
    launch = _launch(
        q, k, v, out, lse, bias, alibi_slopes, sinks, key_padding_mask, cu_seqlens_q, cu_seqlens_k,
        block_table, dropout_seed, softmax_scale, window_left, window_right, softcap, dropout_p,
        max_seqlen_q, max_seqlen_k,
    )  # fmt: skip
    if lse.numel() > 0 and launch.grid[0] > 0:
        launch.run()
    return out, lse


def why_not(*args: object) -> list[str]:
    """What this kernel cannot do with the arguments of `attention`."""
    return why_not_attention(*args)


def aot_cases() -> list[AheadOfTimeCase]:
    cases = []
    for dtype, d, dv, *features in (
        (torch.bfloat16, 64, 64),
        (torch.bfloat16, 128, 128),
        (torch.float16, 192, 128),
        (torch.bfloat16, 256, 256),
        (torch.float32, 256, 256),
        (torch.bfloat16, 64, 64, "alibi", "dropout"),
        (torch.bfloat16, 128, 128, "packed", "window", "sinks"),
        (torch.bfloat16, 128, 128, "pages", "softcap"),
        (torch.bfloat16, 128, 128, "bias", "alibi", "padding", "dropout"),
        (torch.bfloat16, 256, 256, "window", "softcap"),
    ):
        name, (q, k, v, out), options = example(dtype, d, dv, *features)
        lse = torch.empty((2, 8, 1024), dtype=torch.float32, device="meta")
        cases.append(_launch(q, k, v, out, lse, **options).ahead_of_time(name))
    return cases
