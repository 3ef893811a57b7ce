"""The gradient of absorbed latent attention, deterministic.

Two kernels recompute P = exp(score - lse) tile by tile: one owns a tile of rows of the cache and
sums over queries and heads, the other owns a tile of queries and heads and sums over the cache.
Each sum has a fixed order and nothing is added across programs.
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
from warploom.triton_kernels.attention.delta import delta_launch
from warploom.triton_kernels.attention.scoring import LOG2_E, key_range, query_range, seen_keys
from warploom.triton_kernels.common.launch import (
    AheadOfTimeCase,
    cdiv,
    on_own_device,
    with_unit_last_stride,
)
from warploom.triton_kernels.common.numerics import cast, dot
from warploom.triton_kernels.mla.latent_rows import (
    load_features,
    packed_rows,
    row_constants,
    why_not_latents,
)
from warploom.triton_kernels.mla.tiles import backward_tile


@triton.jit
def _score_gradients(
    p_q,  # [BLOCK_M] pointers to [L + R]
    p_grad_out,  # [BLOCK_M] pointers to [L]
    p_kv,  # [BLOCK_N] pointers to [L + R]
    i_row,  # [BLOCK_M], of rows in lse and delta
    lse_ptr,
    delta_ptr,
    rows,  # [BLOCK_M] the queries
    row_mask,
    keys,  # [BLOCK_N]
    sizes,
    window,
    score_scale,
    L: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """P and P (dP - delta), both float32 [BLOCK_M, BLOCK_N], 0 where a key is not seen.

    Products over the latent are taken CHUNK features at a time: three whole tiles do not fit.
    """
    key_mask = keys < sizes[1]
    # [BLOCK_M, BLOCK_N]
    b_score = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    b_grad_p = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for first in range(0, BLOCK_L, CHUNK):
        # [BLOCK_N, CHUNK]
        b_kv = load_features(p_kv, key_mask, first, L, CHUNK)
        # [BLOCK_M, CHUNK]
        b_q = load_features(p_q, row_mask, first, L, CHUNK)
        b_grad_out = load_features(p_grad_out, row_mask, first, L, CHUNK)
        b_score = dot(b_q, tl.trans(b_kv), b_score)
        b_grad_p = dot(b_grad_out, tl.trans(b_kv), b_grad_p)
    if R > 0:
        b_q = load_features(p_q, row_mask, L, L + R, BLOCK_R)
        b_score = dot(b_q, tl.trans(load_features(p_kv, key_mask, L, L + R, BLOCK_R)), b_score)
    # [BLOCK_M]
    b_lse = tl.load(lse_ptr + i_row, mask=row_mask, other=0.0) * LOG2_E
    b_delta = tl.load(delta_ptr + i_row, mask=row_mask, other=0.0)
    b_p = tl.exp2(b_score * score_scale - b_lse[:, None])
    # Before the product: the exponential of a key that is not seen may be infinite, and always is
    # where a query sees no key, whose lse is -inf.
    seen = seen_keys(rows[:, None], keys[None, :], sizes, window, (None, 0), False)
    b_p = tl.where(seen, b_p, 0.0)
    return b_p, b_p * (b_grad_p - b_delta[:, None])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _kv_gradients_kernel(
    grad_out_ptr,  # [B, Sq, H, L], strides grad_out_stride_{b,s,h}, 1
    q_ptr,  # [B, Sq, H, L + R], strides q_stride_{b,s,h}, 1
    kv_ptr,  # [B, Sk, L + R], strides kv_stride_{b,s}, 1
    lse_ptr,  # [B, H, Sq] float32, contiguous
    delta_ptr,  # [B, H, Sq] float32, contiguous
    kv_seqlens_ptr,  # [B] int32
    grad_kv_ptr,  # [B, Sk, L + R], contiguous
    H,
    Sq,
    Sk,
    grad_out_stride_b,
    grad_out_stride_s,
    grad_out_stride_h,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    kv_stride_b,
    kv_stride_s,
    window_right,  # 0: causal
    softmax_scale,
    score_scale,  # softmax_scale log2(e)
    L: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """dC = dS^T Q, plus P^T dO in its latent part; 0 in rows that do not count.

    Grid: [B * cdiv(Sk, BLOCK_N)]: the first tile (causally the longest) first.
    """
    tiles = tl.cdiv(Sk, BLOCK_N)
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    first_key = tl.program_id(0) % tiles * BLOCK_N
    keys = first_key + tl.arange(0, BLOCK_N)
    p_kv = kv_ptr + i_b * kv_stride_b + keys.to(tl.int64) * kv_stride_s
    length = tl.minimum(tl.load(kv_seqlens_ptr + i_b), Sk)
    sizes = (Sq, length)
    window = (0, window_right)
    first_row = query_range(first_key, sizes, window, False, 1, BLOCK_N)[0]
    end = tl.where(first_key < length, Sq * H, 0)

    b_grad = tl.zeros([BLOCK_N, BLOCK_L], dtype=tl.float32)
    if R > 0:
        b_grad_rope = tl.zeros([BLOCK_N, BLOCK_R], dtype=tl.float32)
    for first in range(first_row * H, end, BLOCK_M):
        rows, heads, row_mask = packed_rows(first, Sq, H, BLOCK_M)
        p_q = q_ptr + i_b * q_stride_b + rows.to(tl.int64) * q_stride_s + heads * q_stride_h
        p_grad_out = grad_out_ptr + i_b * grad_out_stride_b + heads * grad_out_stride_h
        p_grad_out += rows.to(tl.int64) * grad_out_stride_s
        b_p, b_grad_score = _score_gradients(
            p_q, p_grad_out, p_kv, (i_b * H + heads) * Sq + rows, lse_ptr, delta_ptr, rows,
            row_mask, keys, sizes, window, score_scale, L, R, BLOCK_M, BLOCK_N, BLOCK_L, BLOCK_R,
            CHUNK,
        )  # fmt: skip
        # [BLOCK_M, BLOCK_L]
        b_grad_out = load_features(p_grad_out, row_mask, 0, L, BLOCK_L)
        b_grad = dot(tl.trans(cast(b_p, b_grad_out.dtype)), b_grad_out, b_grad)
        b_grad_score = cast(b_grad_score * softmax_scale, b_grad_out.dtype)
        b_q = load_features(p_q, row_mask, 0, L, BLOCK_L)
        b_grad = dot(tl.trans(b_grad_score), b_q, b_grad)
        if R > 0:
            # [BLOCK_M, BLOCK_R]
            b_q_rope = load_features(p_q, row_mask, L, L + R, BLOCK_R)
            b_grad_rope = dot(tl.trans(b_grad_score), b_q_rope, b_grad_rope)

    p_grad = grad_kv_ptr + (i_b * Sk + keys) * (L + R)
    _store_features(p_grad, keys < Sk, b_grad, 0, L, BLOCK_L)
    if R > 0:
        _store_features(p_grad, keys < Sk, b_grad_rope, L, L + R, BLOCK_R)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _query_gradients_kernel(
    grad_out_ptr,  # [B, Sq, H, L], strides grad_out_stride_{b,s,h}, 1
    q_ptr,  # [B, Sq, H, L + R], strides q_stride_{b,s,h}, 1
    kv_ptr,  # [B, Sk, L + R], strides kv_stride_{b,s}, 1
    lse_ptr,  # [B, H, Sq] float32, contiguous
    delta_ptr,  # [B, H, Sq] float32, contiguous
    kv_seqlens_ptr,  # [B] int32
    grad_q_ptr,  # [B, Sq, H, L + R], contiguous
    H,
    Sq,
    Sk,
    grad_out_stride_b,
    grad_out_stride_s,
    grad_out_stride_h,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    kv_stride_b,
    kv_stride_s,
    window_right,  # 0: causal
    softmax_scale,
    score_scale,  # softmax_scale log2(e)
    L: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """dQ = dS C.

    Grid: [B * cdiv(Sq * H, BLOCK_M)]: the last tile (causally the longest) first.
    """
    tiles = tl.cdiv(Sq * H, BLOCK_M)
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    first_packed = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    rows, heads, row_mask = packed_rows(first_packed, Sq, H, BLOCK_M)
    p_q = q_ptr + i_b * q_stride_b + rows.to(tl.int64) * q_stride_s + heads * q_stride_h
    p_grad_out = grad_out_ptr + i_b * grad_out_stride_b + heads * grad_out_stride_h
    p_grad_out += rows.to(tl.int64) * grad_out_stride_s
    sizes = (Sq, tl.minimum(tl.load(kv_seqlens_ptr + i_b), Sk))
    window = (0, window_right)
    # The queries that the tile's rows belong to.
    first_row = first_packed // H
    row_count = (first_packed + BLOCK_M - 1) // H - first_row + 1
    end = key_range(first_row, sizes, window, False, row_count, BLOCK_N)[3]

    b_grad = tl.zeros([BLOCK_M, BLOCK_L], dtype=tl.float32)
    if R > 0:
        b_grad_rope = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for first in range(0, end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        key_mask = keys < end
        p_kv = kv_ptr + i_b * kv_stride_b + keys.to(tl.int64) * kv_stride_s
        b_grad_score = _score_gradients(
            p_q, p_grad_out, p_kv, (i_b * H + heads) * Sq + rows, lse_ptr, delta_ptr, rows,
            row_mask, keys, sizes, window, score_scale, L, R, BLOCK_M, BLOCK_N, BLOCK_L, BLOCK_R,
            CHUNK,
        )[1]  # fmt: skip
        # [BLOCK_N, BLOCK_L]
        b_kv = load_features(p_kv, key_mask, 0, L, BLOCK_L)
        b_grad_score = cast(b_grad_score, b_kv.dtype)
        b_grad = dot(b_grad_score, b_kv, b_grad)
        if R > 0:
            # [BLOCK_N, BLOCK_R]
            b_rope = load_features(p_kv, key_mask, L, L + R, BLOCK_R)
            b_grad_rope = dot(b_grad_score, b_rope, b_grad_rope)

    p_grad = grad_q_ptr + ((i_b * Sq + rows) * H + heads) * (L + R)
    _store_features(p_grad, row_mask, b_grad * softmax_scale, 0, L, BLOCK_L)
    if R > 0:
        _store_features(p_grad, row_mask, b_grad_rope * softmax_scale, L, L + R, BLOCK_R)


@triton.jit
def _store_features(p_rows, mask, b_values, first, end, WIDTH: tl.constexpr):
    """`load_features` the other way round: float32 values, rounded."""
    features = first + tl.arange(0, WIDTH)[None, :]
    b_values = cast(b_values, p_rows.dtype.element_ty)
    tl.store(p_rows[:, None] + features, b_values, mask=mask[:, None] & (features < end))


def _launches(
    grad_q: torch.Tensor,
    grad_kv: torch.Tensor,
    delta: torch.Tensor,
    grad_out: torch.Tensor,
    q: torch.Tensor,
    kv: torch.Tensor,
    lse: torch.Tensor,
    kv_seqlens: torch.Tensor,
    softmax_scale: float,
    causal: bool,
) -> tuple[Launch, Launch]:
    """The kernel of grad_kv and that of grad_q, in this order."""
    b, sq, h, d_latent = grad_out.shape
    sk, d = kv.shape[1:]
    shared = {
        **{"grad_out_ptr": grad_out, "q_ptr": q, "kv_ptr": kv, "lse_ptr": lse},
        **{"delta_ptr": delta, "kv_seqlens_ptr": kv_seqlens.contiguous()},
        **{"H": h, "Sq": sq, "Sk": sk},
        **head_strides("grad_out", grad_out, packed=False),
        **head_strides("q", q, packed=False),
        **{"kv_stride_b": kv.stride(0), "kv_stride_s": kv.stride(1)},
        **{"window_right": 0 if causal else UNLIMITED, "softmax_scale": softmax_scale},
        "score_scale": softmax_scale * LOG2_E.value,
    }
    tile, chunk = backward_tile(q.dtype)
    widths = row_constants(d_latent, d - d_latent)
    constants = {
        **widths,
        **{"BLOCK_M": tile.rows, "BLOCK_N": tile.keys, "CHUNK": min(chunk, widths["BLOCK_L"])},
    }
    of_kv = Launch(
        _kv_gradients_kernel,
        (b * cdiv(sk, tile.keys),),
        {**shared, "grad_kv_ptr": grad_kv},
        constants,
        tile.num_warps,
        tile.num_stages,
    )
    of_queries = Launch(
        _query_gradients_kernel,
        (b * cdiv(sq * h, tile.rows),),
        {**shared, "grad_q_ptr": grad_q},
        constants,
        tile.num_warps,
        tile.num_stages,
    )
    return of_kv, of_queries


@on_own_device
def mla_absorbed_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    kv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_lse: torch.Tensor | None,
    kv_seqlens: torch.Tensor,
    d_latent: int,
    softmax_scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(grad_q, grad_kv) of the op `mla_absorbed_backward`, whose reference says what the arguments
    are."""
    grad_out, q, kv, out = (with_unit_last_stride(tensor) for tensor in (grad_out, q, kv, out))
    lse = lse.contiguous()
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grad_kv = torch.empty(kv.shape, dtype=kv.dtype, device=kv.device)
    if min(q.numel(), kv.numel()) == 0:
        return grad_q.zero_(), grad_kv.zero_()
    delta = torch.empty(tuple(lse.shape), dtype=torch.float32, device=q.device)
    delta_launch(delta, grad_out, out, grad_lse).run()
    for launch in _launches(
        grad_q, grad_kv, delta, grad_out, q, kv, lse, kv_seqlens, softmax_scale, causal
    ):
        launch.run()
    return grad_q, grad_kv


def why_not(*args: object) -> list[str]:
    """What these kernels cannot do with the arguments of `mla_absorbed_backward`, or with those of
    the forward, `mla_decode`, when the backend is chosen for both."""
    q = args[0] if isinstance(args[4], int) else args[1]
    d_latent = next(arg for arg in args if isinstance(arg, int))
    return why_not_latents(d_latent, q.shape[-1] - d_latent, *args)


def aot_cases() -> list[AheadOfTimeCase]:
    def tensor(*shape: int, of: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    cases = []
    b, s, h = 2, 1024, 16
    for name, dtype, d_latent, d_rope in (
        ("bf16 512+64", torch.bfloat16, 512, 64),
        ("fp16 448+128", torch.float16, 448, 128),
        ("bf16 128+0", torch.bfloat16, 128, 0),
        ("fp32 512+64", torch.float32, 512, 64),
    ):
        grad_out = tensor(b, s, h, d_latent, of=dtype)
        q, kv = (
            tensor(b, s, h, d_latent + d_rope, of=dtype),
            tensor(b, s, d_latent + d_rope, of=dtype),
        )
        lse, lengths = tensor(b, h, s), tensor(b, of=torch.int32)
        for launch in _launches(q, kv, lse, grad_out, q, kv, lse, lengths, 0.1, True):
            cases.append(launch.ahead_of_time(name))
    return cases
