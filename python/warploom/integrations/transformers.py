"""transformers: models with `attn_implementation="warploom"` run their attention on warploom.

    from warploom.integrations import transformers as warploom_transformers

    warploom_transformers.register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="warploom")

transformers asks an implementation for a mask once per forward and kind of layer, `make_mask`, and hands it
to `attend` in each layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from warploom.integrations._transformers_masks import make_mask, read_mask
from warploom.ops.attention import attention, attention_varlen

NAME = "warploom"
#: What a model may ask of its attention and is not served.
_NOT_SERVED = {
    "cache": "the paged cache of continuous batching",
    "output_attentions": "attention weights: they are never in memory",
    "sinks": "a sink of its own for each query",
}


def register(name: str = NAME) -> None:
    """Let models run on warploom by `attn_implementation=name`. Calling it twice is harmless.

    Raises: ImportError without transformers; ValueError where `name` is another implementation's.
    """
    for interface, function in _interfaces():
        if name == "eager" or interface().get(name, function) is not function:
            raise ValueError(f"register: name: expected one that is not taken, got {name!r}")
    for interface, function in _interfaces():
        interface.register(name, function)


def unregister(name: str = NAME) -> None:
    """Undo `register`; a model that still names it raises at its next forward."""
    for interface, function in _interfaces():
        if interface().get(name) is function:
            del interface._global_mapping[name]  # the interface has no method for it


def _interfaces() -> tuple[tuple[Any, Callable[..., Any]], ...]:
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(f"register: expected transformers 5 or newer: {error}") from error
    return (AttentionInterface, attend), (AttentionMaskInterface, make_mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One layer's attention: query [B, H, Sq, D], key and value [B, Hkv, Sk, D] -> ([B, Sq, H, Dv], None).

    attention_mask: one of `make_mask` or of the caller. s_aux: [H], sinks. position_bias: added to the
    scores, broadcast to [B, H, Sq, Sk]. cu_seq_lens_q: packed documents; cu_seq_lens_k, max_length_q and
    max_length_k may say more of them.
    """
    for name, what in _NOT_SERVED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f"attend: {name}: expected none, got one: {what} is not served")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    q, k, v = (states.transpose(1, 2) for states in (query, key, value))
    seen = read_mask(attention_mask, q, is_causal)
    documents = seen.pop("documents", None)
    if cu_seq_lens_q is not None:
        documents = cu_seq_lens_q
        seen = _read_packed(module, attention_mask, seen, is_causal, kwargs)
    options = {
        "softmax_scale": scaling,
        "softcap": softcap or 0.0,
        "sinks": s_aux,
        "dropout_p": float(dropout),
        **seen,
    }
    if documents is not None:
        if position_bias is not None:
            raise ValueError("attend: position_bias: expected none for packed documents, got one")
        return _attend_packed(q, k, v, documents, options, kwargs), None
    # A static cache's unused tail: the mask is as long as what is in use.
    keys = attention_mask.shape[-1] if attention_mask is not None else k.shape[1]
    if position_bias is not None:
        bias = position_bias[..., :keys].to(q.dtype)
        options["bias"] = bias + options["bias"] if "bias" in options else bias
    return attention(q, k[:, :keys], v[:, :keys], **options), None


def _read_packed(
    module: nn.Module,
    mask: Tensor | None,
    seen: dict[str, Any],
    is_causal: bool,
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """What `read_mask` gave, for documents that the caller gives: they stand in for padding and tables.

    Where position ids cannot be read, while a graph is traced, the mask is a table. It holds the layer's
    window too, which the layer therefore has to say.
    """
    if mask is None or mask.dim() < 4:
        if "key_padding_mask" in seen:
            raise ValueError(
                "attend: attention_mask: expected none beside cu_seq_lens_q, got one with padding"
            )
        return seen
    window = kwargs.get("sliding_window")
    if "sliding_window" not in kwargs and getattr(module.config, "sliding_window", None):
        raise ValueError(
            f"attend: sliding_window: expected it from {type(module).__name__}, got nothing: "
            "its packed documents cannot be served while compiling"
        )
    if window is None:
        return {"causal": is_causal}
    return {"window": (window - 1, 0 if is_causal else window - 1)}


def _attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    options: dict[str, Any],
    kwargs: dict[str, Any],
) -> Tensor:
    """[B, Sq, H, Dv] for q [B, Sq, H, D], k and v [B, Sk, Hkv, ...]: documents in their flattened rows."""
    packed_q, packed_k, packed_v = (states.flatten(0, 1) for states in (q, k, v))
    cu_seqlens_k = kwargs.get("cu_seq_lens_k")
    lengths = [kwargs.get(name) for name in ("max_length_q", "max_length_k")]
    out = attention_varlen(
        packed_q,
        packed_k,
        packed_v,
        cu_seqlens_q.int(),
        (cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k).int(),
        # A length on the device is not read: all rows are at least as many.
        *(n if isinstance(n, int) else len(rows) for n, rows in zip(lengths, (packed_q, packed_k))),
        **options,
    )
    rows: Tensor = out.unflatten(0, q.shape[:2])
    return rows
