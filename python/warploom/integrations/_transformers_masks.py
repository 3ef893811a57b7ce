"""The masks that transformers makes once per forward and hands to `transformers.attend` in each layer.

Only what has no plain form becomes a table of Sq x Sk:

| mask | query i of Sq sees |
|---|---|
| None | every key; in a causal module the keys j <= i + Sk - Sq |
| bool [B, L] | the keys j <= i + L - Sq where it is true; behind L is a static cache's unused tail |
| bool [0, L] | the same where no key is padding |
| bool [B or 0, W, L] of stride 0 along W | the last W of those |
| int32 [N + 1] or [W, N + 1] | the same within its document: cu_seqlens of the batch's rows, flattened |
| bool [B, 1, 1, Sk] | the keys where it is true |
| any other [B, 1 or H, Sq, Sk] | what it says, by true or by what it adds to the scores |

A window is told by a shape: a shape outlives copies to other devices, and not every model tells its layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None,
    *,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of one kind of layer, in the shortest form that says it.

    Query i stands at position q_offset + i, key j at kv_offset + j. mask_function: transformers' rule of
    which position sees which; local_size: the rule's window or chunk; attention_mask: bool [B, positions],
    true for a real token; allow_..._skip: whether the model takes another form than Sq x Sk.
    """
    from transformers import masking_utils
    from transformers.utils.import_utils import is_tracing

    if attention_mask is not None and (attention_mask.dim() == 3 or attention_mask.shape[0] == 0):
        return attention_mask  # made here before: `generate` asks ahead of the model for a static cache
    tracing = is_tracing(attention_mask) or is_tracing(q_offset)  # then no value may be read
    if isinstance(q_offset, Tensor) and not tracing:
        q_offset = int(q_offset)
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)

    def real(length: int) -> Tensor | None:
        """bool [B, length]; None where no key is padding."""
        keys = None if padding is None else padding[:, kv_offset : kv_offset + length]
        return None if keys is None or (not tracing and keys.all()) else keys

    if allow_is_bidirectional_skip and mask_function is masking_utils.bidirectional_mask_function:
        keys = real(kv_length)
        return None if keys is None else keys[:, None, None, :]

    documents, rule = None, mask_function
    if not tracing and not use_vmap:
        documents, rule = _documents(mask_function)
    window = _window(local_size, config)
    causal = rule is masking_utils.causal_mask_function or window is not None
    if causal and documents is not None:
        return _within(_cu_seqlens(documents), window)
    if causal and allow_is_causal_skip and not isinstance(q_offset, Tensor):
        length = q_offset + q_length - kv_offset  # the keys in use
        if 0 < length <= kv_length:
            keys = real(length)
            if window is not None and window >= length:
                window = None
            if keys is None and window is None and length == kv_length:
                return None
            if keys is None:
                keys = torch.ones((0, length), dtype=torch.bool, device=device)
            return _within(keys, window)

    table: Tensor = masking_utils.sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
        allow_is_causal_skip=False, use_vmap=use_vmap, device=device,
    )  # fmt: skip
    # Additive here and not in each layer: the layers then save one tensor for their backwards.
    return table if q_length == 1 else additive(table, dtype)


def _window(local_size: int | None, config: Any) -> int | None:
    """`local_size` if it is a causal window and not a chunk."""
    chunk = getattr(config, "attention_chunk_size", None)
    return local_size if local_size == getattr(config, "sliding_window", None) != chunk else None


def _within(mask: Tensor, window: int | None) -> Tensor:
    """[..., L], in a window [..., window, L] of stride 0, which takes no memory."""
    if window is None:
        return mask
    return mask.unsqueeze(-2).expand(*mask.shape[:-1], window, mask.shape[-1])


def _documents(rule: Callable[..., Any]) -> tuple[Tensor | None, Callable[..., Any]]:
    """The number of each token's document, [B, S], and the rule within a document.

    transformers finds packed documents in the position ids and tells them by closures alone. Of any other
    rule: None and the rule itself.
    """
    parts = inspect.getclosurevars(rule).nonlocals.get("mask_functions", ())
    names = [part.__qualname__.partition(".")[0] for part in parts]
    if names != ["packed_sequence_mask_function", "remap_positions_for_packed_sequence"]:
        return None, rule
    separate, remapped = (inspect.getclosurevars(part).nonlocals for part in parts)
    return separate["packed_sequence_mask"], remapped["mask_function"]


def _cu_seqlens(documents: Tensor) -> Tensor:
    """int32 [N + 1]: where documents [B, S] begin in the flattened batch, and its length."""
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = begins.flatten().nonzero().flatten()
    return nn.functional.pad(starts, (0, 1), value=documents.numel()).to(torch.int32)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores: for a bool mask 0 where it is true, else -inf."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))


def read_mask(mask: Tensor | None, q: Tensor, is_causal: bool) -> dict[str, Any]:
    """A mask as arguments of `ops.attention.attention`; the cu_seqlens of packed documents as `documents`."""
    if mask is None:
        return {"causal": is_causal}
    if mask.dim() == 4:
        if mask.dtype == torch.bool and mask.shape[1] == mask.shape[2] == 1:
            return {"key_padding_mask": ~mask[:, 0, 0].expand(q.shape[0], -1)}
        return {"bias": additive(mask, q.dtype)}
    plain = {torch.bool: 2, torch.int32: 1}.get(mask.dtype)
    if plain is None or mask.dim() not in (plain, plain + 1):
        raise ValueError(
            "attend: attention_mask: expected one that `make_mask` makes or [B, H or 1, Sq, Sk], "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    seen: dict[str, Any] = {"causal": True}
    if mask.dim() > plain:
        seen["window"] = (mask.shape[-2] - 1, 0)
        mask = mask.select(-2, 0)
    if mask.dtype == torch.int32:
        seen["documents"] = mask
    elif mask.shape[0]:
        seen["key_padding_mask"] = ~mask
    return seen
