"""PyTorch's registry of flash-attention implementations: `torch.nn.attention` runs on warploom.

    from warploom.integrations import torch_attention

    torch_attention.activate()                  # register, and make it the implementation in use
    F.scaled_dot_product_attention(q, k, v)     # CUDA tensors, where torch chooses its flash kernel
    torch.nn.attention.varlen.varlen_attn(...)  # CUDA and CPU tensors
    torch.nn.attention.restore_flash_attention_impl()

Activation gives the dispatcher new kernels for aten's five ops of flash attention, for CUDA tensors and for
CPU tensors, for which torch has none. `scaled_dot_product_attention` sends CPU tensors to an op of their own,
which stays torch's: warploom's CPU backend calls it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from warploom.ops import _attention_ops as ops
from warploom.ops._check import fail

NAME = "warploom"


def register(name: str = NAME) -> None:
    """Add `name` to `torch.nn.attention.list_flash_attention_impls()`. Calling it twice is harmless.

    Raises: RuntimeError where torch has no such registry.
    """
    _registry().register_flash_attention_impl(name, register_fn=_Kernels)


def activate(name: str = NAME) -> None:
    """`register`, and make it torch's implementation in place of the one in use."""
    register(name)
    _registry().activate_flash_attention_impl(name)


def _registry() -> Any:
    from torch.nn import attention

    if not hasattr(attention, "register_flash_attention_impl"):
        raise RuntimeError(
            "register: torch: expected 2.11 or newer, with torch.nn.attention.register_flash_attention_impl, "
            f"got {torch.__version__}"
        )
    return attention


class _Kernels:
    """The kernels in the dispatcher, until `remove`: what the registry keeps of the implementation in use."""

    def __init__(self) -> None:
        self._library: torch.library.Library | None = torch.library.Library("aten", "IMPL")
        for name, kernel in _KERNELS.items():
            for key in ("CUDA", "CPU"):
                # Not every torch has every one.
                if hasattr(torch.ops.aten, name):
                    self._library.impl(name, kernel, key)

    def remove(self) -> None:
        self._library = None


def flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """aten::_flash_attention_forward: out, log-sum-exp, the dropout's seed as uint64 [2], two unused tensors.

    query [B, Sq, H, D], key and value [B, Sk, Hkv, D]; packed by cum_seq_*, [T, H, D]; with block_table key
    and value are pages [num_blocks, page_size, Hkv, D]. seqused_k: int32 [B], how many of its keys each
    sequence uses. num_splits asks for speed alone: nothing is split. Causal is aligned bottom-right.
    """
    op = "_flash_attention_forward"
    for name, given in {"return_debug_mask": return_debug_mask or None, **others}.items():
        if given is not None:
            fail(op, name, "none: it is not served", given)
    if value.shape[-1] != query.shape[-1]:
        fail(op, "value", f"query's head dim {query.shape[-1]}", tuple(value.shape))
    if block_table is not None and seqused_k is None and cum_seq_k is None:
        fail(op, "seqused_k", "the lengths of the sequences in block_table", None)
    if seqused_k is not None:
        if cum_seq_q is None:
            fail(op, "seqused_k", "none where nothing is packed", tuple(seqused_k.shape))
        if block_table is None and cum_seq_k is not None:
            # Rows as pages of one key each: the keys in use then need not lie next to each other.
            steps = torch.arange(max_k, dtype=torch.int32, device=query.device)
            block_table = cum_seq_k[:-1].unsqueeze(1) + steps
            key, value = key.unsqueeze(1), value.unsqueeze(1)
        cum_seq_k = nn.functional.pad(seqused_k.cumsum(0), (1, 0)).to(torch.int32)
    rng_state = torch.zeros(2, dtype=torch.int64, device=query.device)
    if dropout_p > 0:
        rng_state[:1] = torch.randint(2**62, (1,), device=query.device)
    args = (
        query, key, value, None, None, None, None, cum_seq_q, cum_seq_k, block_table,
        _seed(rng_state, dropout_p),
        *_scalars(query, scale, window_size_left, window_size_right, dropout_p, is_causal),
        max_q, max_k,
    )  # fmt: skip
    forward = ops.attention_function.forward_op
    out, lse = forward.overloads[forward.choose(*args)](*args)
    offset = torch.zeros((), dtype=torch.uint64, device=query.device)
    return _laid_out(out, query), lse, rng_state.view(torch.uint64), offset, query.new_empty(0)


def flash_attention_forward_inplace(out: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """aten::_flash_attention_forward_no_dropout_inplace: writes out, returns the log-sum-exp."""
    result, lse, *_ = flash_attention_forward(*args, **kwargs)
    out.copy_(result)
    return lse


def flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """aten::_flash_attention_backward: the gradients of query, key and value."""
    scalars = _scalars(query, scale, window_size_left, window_size_right, dropout_p, is_causal)
    scalars = (*scalars, max_q, max_k)
    seed = _seed(rng_state.view(torch.int64), dropout_p)
    packed = (cum_seq_q, cum_seq_k)
    backward = ops.attention_function.backward_op
    # A backward is chosen by the arguments of its forward.
    chosen = backward.choose(
        query, key, value, None, None, None, None, *packed, None, seed, *scalars
    )
    grad_query, grad_key, grad_value, *_ = backward.overloads[chosen](
        grad_out, query, key, value, out, logsumexp,
        None, None, None, None, *packed, seed, *scalars, False, False,
    )  # fmt: skip
    return _laid_out(grad_query, query), _laid_out(grad_key, key), _laid_out(grad_value, value)


def sdpa_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """aten::_scaled_dot_product_flash_attention, query [B, H, Sq, D], key and value [B, Hkv, Sk, D]."""
    max_q, max_k = query.shape[2], key.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out, lse, *rest = flash_attention_forward(
        q, k, v, None, None, max_q, max_k, dropout_p, is_causal, return_debug_mask, scale=scale
    )
    return (out.transpose(1, 2), lse, None, None, max_q, max_k, *rest)


def sdpa_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    *args: Any,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """aten::_scaled_dot_product_flash_attention_backward, laid out as in `sdpa_forward`."""
    go, q, k, v, o = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
    grads = flash_attention_backward(go, q, k, v, o, *args, scale=scale)
    return tuple(grad.transpose(1, 2) for grad in grads)


def _scalars(
    query: Tensor,
    scale: float | None,
    left: int | None,
    right: int | None,
    dropout_p: float,
    is_causal: bool,
) -> tuple[Any, ...]:
    """The ops' softmax_scale, window_left, window_right, softcap and dropout_p."""
    left, right = (-1 if side is None else side for side in (left, right))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return scale, left, 0 if is_causal else right, 0.0, dropout_p


def _seed(rng_state: Tensor, dropout_p: float) -> Tensor | None:
    return rng_state[:1] if dropout_p > 0 else None


def _laid_out(result: Tensor, like: Tensor) -> Tensor:
    """`result` in the strides that torch's shape inference promised: those of an empty tensor like `like`."""
    promised = torch.empty_like(like, device="meta").stride()
    return result if result.stride() == promised else torch.empty_like(like).copy_(result)


#: By their names in aten.
_KERNELS: dict[str, Any] = {
    "_flash_attention_forward": flash_attention_forward,
    "_flash_attention_forward_no_dropout_inplace": flash_attention_forward_inplace,
    "_flash_attention_backward": flash_attention_backward,
    "_scaled_dot_product_flash_attention": sdpa_forward,
    "_scaled_dot_product_flash_attention_backward": sdpa_backward,
}
