"""Attention backward (FlashAttention-2, Dao 2023, algorithm 2), deterministic.

Two kernels recompute P = exp(score - lse) tile by tile: one owns a tile of keys and
sums over the queries of every head in the group, the other owns a tile of queries and sums over the
keys. Each sum has a fixed order and nothing is added across programs.
"""

from __future__ import annotations

import torch
from warploom.triton_kernels.attention.arguments import (
    Launch,
    block_constants,
    dense_arguments,
    example,
    head_strides,
    is_plain,
    score_arguments,
    sequence_arguments,
)
from warploom.triton_kernels.attention.delta import delta_launch
from warploom.triton_kernels.attention.key_gradients import key_gradients_kernel
from warploom.triton_kernels.attention.query_gradients import query_gradients_kernel
from warploom.triton_kernels.attention.tiles import (
    key_gradients_tile,
    query_gradients_tile,
    why_not_attention,
)
from warploom.triton_kernels.common.launch import (
    AheadOfTimeCase,
    cdiv,
    on_own_device,
    with_unit_last_stride,
)


def _launches(
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    grad_bias: torch.Tensor | None,
    grad_distance: torch.Tensor | None,
    delta: torch.Tensor,
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    bias: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    dropout_seed: torch.Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> tuple[Launch, Launch]:
    """The kernel of dK and dV and that of dQ, in this order."""
    packed = cu_seqlens_q is not None
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    (heads, d), (kv_heads, dv) = q.shape[-2:], v.shape[-2:]
    scores, switches = score_arguments(
        alibi_slopes, softmax_scale, window_left, window_right, softcap
    )
    grad_q, grad_k, grad_v = grads
    shared = {
        **{"grad_out_ptr": grad_out, "q_ptr": q, "k_ptr": k, "v_ptr": v},
        **{"lse_ptr": lse, "delta_ptr": delta, "softmax_scale": softmax_scale},
        **head_strides("grad_out", grad_out, packed),
        **head_strides("q", q, packed),
        **head_strides("k", k, packed),
        **head_strides("v", v, packed),
        **sequence_arguments(q, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
        **scores,
        **dense_arguments(bias, key_padding_mask, dropout_seed, dropout_p),
    }
    plain = is_plain(
        window_left, softcap, bias, alibi_slopes, key_padding_mask, cu_seqlens_q, dropout_seed
    )
    tile = key_gradients_tile(q.dtype, d, dv, plain)
    of_keys = Launch(
        key_gradients_kernel,
        (batch * kv_heads * cdiv(max_seqlen_k, tile.keys),),
        {
            **shared,
            **{"grad_k_ptr": grad_k, "grad_v_ptr": grad_v},
            **head_strides("grad_k", grad_k, packed),
            **head_strides("grad_v", grad_v, packed),
        },
        {**block_constants(tile, d, dv, heads // kv_heads), **switches},
        tile.num_warps,
        tile.num_stages,
    )
    tile = query_gradients_tile(q.dtype, d, dv, plain)
    of_queries = Launch(
        query_gradients_kernel,
        (batch * heads * cdiv(max_seqlen_q, tile.queries),),
        {
            **shared,
            **{"grad_q_ptr": grad_q, "grad_bias_ptr": grad_bias},
            "grad_distance_ptr": grad_distance,
            **head_strides("grad_q", grad_q, packed),
        },
        {**block_constants(tile, d, dv, heads // kv_heads), **switches},
        tile.num_warps,
        tile.num_stages,
    )
    return of_keys, of_queries


@on_own_device
def attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_lse: torch.Tensor | None,
    bias: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    dropout_seed: torch.Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    max_seqlen_q: int,
    max_seqlen_k: int,
    needs_bias: bool,
    needs_distance: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of the op `attention_backward`, whose reference says what the arguments are."""
    grad_out, q, k, v, out = (with_unit_last_stride(tensor) for tensor in (grad_out, q, k, v, out))
    lse = lse.contiguous()
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    bias_shape = (*lse.shape, k.shape[1]) if needs_bias else (0,)
    grad_bias = torch.empty(bias_shape, dtype=q.dtype, device=q.device)
    distance_shape = tuple(lse.shape) if needs_distance else (0,)
    grad_distance = torch.empty(distance_shape, dtype=torch.float32, device=q.device)
    # Tiles that no query sees are skipped.
    grad_bias.zero_()
    delta = torch.empty(tuple(lse.shape), dtype=torch.float32, device=q.device)
    launches = _launches(
        grads, grad_bias if needs_bias else None, grad_distance if needs_distance else None, delta,
        grad_out, q, k, v, lse, bias, alibi_slopes, key_padding_mask, cu_seqlens_q, cu_seqlens_k,
        dropout_seed, softmax_scale, window_left, window_right, softcap, dropout_p, max_seqlen_q,
        max_seqlen_k,
    )  # fmt: skip
    nothing = min(q.numel(), k.numel(), *(launch.grid[0] for launch in launches)) == 0
    if nothing or cu_seqlens_q is not None:
        # Rows that belong to no sequence.
        for grad in (*grads, grad_distance):
            grad.zero_()
    if not nothing:
        delta_launch(delta, grad_out, out, grad_lse).run()
        for launch in launches:
            launch.run()
    return (*grads, grad_bias, grad_distance)


def why_not(*args: object) -> list[str]:
    """What these kernels cannot do with the arguments of `attention_backward`."""
    return why_not_attention(*args)


def aot_cases() -> list[AheadOfTimeCase]:
    cases = []
    for dtype, d, dv, *features in (
        (torch.bfloat16, 64, 64),
        (torch.bfloat16, 128, 128),
        (torch.float16, 192, 128),
        (torch.float32, 256, 256),
        (torch.bfloat16, 64, 64, "alibi", "dropout"),
        (torch.bfloat16, 128, 128, "packed", "window", "softcap"),
        (torch.bfloat16, 128, 128, "bias", "alibi", "padding", "dropout"),
        (torch.bfloat16, 256, 256, "window", "softcap"),
    ):
        name, (q, k, v, out), options = example(dtype, d, dv, *features)
        lse = torch.empty((2, 8, 1024), dtype=torch.float32, device="meta")
        unused = ("sinks", "block_table")
        options = {key: value for key, value in options.items() if key not in unused}
        grad_distance = lse if "alibi" in features else None
        grads = ((q, k, v), options["bias"], grad_distance, lse)
        for launch in _launches(*grads, out, q, k, v, lse, **options):
            cases.append(launch.ahead_of_time(name))
    return cases
