"""torch.nn.MultiheadAttention with its masks and options, on `warploom.ops.attention`."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from warploom.ops.attention import attention


def _fail(name: str, expected: str, got: Any) -> NoReturn:
    raise ValueError(f"MultiheadAttention: {name}: expected {expected}, got {got}")


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` whose core is one call of the fused op.

    Constructor, initialisation and state dict are torch's, and so are the arguments and results of
    `forward`, with two differences: a query whose keys are all masked attends to nothing (torch gives
    NaN or 0, depending on the path it takes), and nested tensors are refused.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends from L queries to S keys.

        Args:
            query: [L, N, embed_dim], with `batch_first` [N, L, embed_dim], or [L, embed_dim]; key and
                value likewise with S rows of kdim and vdim features.
            key_padding_mask: [N, S] ([S] without a batch): bool, true where a key is hidden, or floating,
                added to its scores.
            need_weights: also return the probabilities. This takes the unfused computation: memory and
                time grow with L S.
            attn_mask: [L, S] or [N H, L, S], likewise bool or floating.
            average_attn_weights: the mean of the heads' weights instead of each head's.
            is_causal: says that attn_mask, which must be given, is the causal one: query i sees j <= i.
                The fused op then masks by itself where L is S.

        Returns:
            out like query, and the weights [N, L, S] or [N, H, L, S] (no N without a batch; S grows by
            one each with `add_bias_kv` and `add_zero_attn`), after dropout in training, or None.
        """
        batched = query.dim() == 3
        q, k, v = self._project(query, key, value)
        if not batched:
            q, k, v = (tensor.unsqueeze(0) for tensor in (q, k, v))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))
        self._check(q, k, v, key_padding_mask, attn_mask, is_causal)
        # Causal is bottom-right in the op and top-left here: the same where L is S.
        k, v, appended = self._append(k, v)
        causal = is_causal and not need_weights and q.shape[1] == k.shape[1]
        # [N, L, H, D] and twice [N, S, H, D]
        q, k, v = (tensor.unflatten(-1, (self.num_heads, self.head_dim)) for tensor in (q, k, v))
        bias = None if causal else _score_bias(attn_mask, q, appended)
        hidden = None if key_padding_mask is None else F.pad(key_padding_mask, (0, appended))
        if hidden is not None and hidden.dtype != torch.bool:
            added = hidden[:, None, None].to(q.dtype)
            bias, hidden = added if bias is None else bias + added, None
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            attended, weights = _attention_with_weights(q, k, v, bias, hidden, dropout_p)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            attended = attention(
                q, k, v, causal=causal, bias=bias, key_padding_mask=hidden, dropout_p=dropout_p
            )
        attended = attended.flatten(2)
        if not batched:
            attended = attended.squeeze(0)
        elif not self.batch_first:
            attended = attended.transpose(0, 1)
        out: Tensor = self.out_proj(attended)
        return out, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., embed_dim] each; inputs that are one tensor share one product."""
        features = (self.embed_dim, self.kdim, self.vdim)
        inputs = zip(("query", "key", "value"), (query, key, value), features, strict=True)
        for name, tensor, size in inputs:
            if tensor.is_nested:
                _fail(name, "a dense tensor", "a nested one")
            dims = (2, 3) if name == "query" else (query.dim(),)
            if tensor.dim() not in dims or tensor.shape[-1] != size:
                count = " or ".join(map(str, dims))
                _fail(name, f"{count} dimensions, the last of {size}", tuple(tensor.shape))
        size, weight, bias = self.embed_dim, self.in_proj_weight, self.in_proj_bias
        if weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            q, k, v = map(F.linear, (query, key, value), weights, biases)
            return q, k, v

        def project(x: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
            rows = slice(first * size, last * size)
            product = F.linear(x, weight[rows], None if bias is None else bias[rows])
            return product.chunk(last - first, -1)

        if query is key and key is value:
            q, k, v = project(query, 0, 3)
        elif key is value:
            (q,), (k, v) = project(query, 0, 1), project(key, 1, 3)
        else:
            (q,), (k,), (v,) = project(query, 0, 1), project(key, 1, 2), project(value, 2, 3)
        return q, k, v

    def _append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """k and v [N, S, embed_dim] with the learned and the zero key behind them, and their number."""
        before = k.shape[1]
        if self.bias_k is not None and self.bias_v is not None:
            rows = [
                bias.to(k.dtype).expand(k.shape[0], 1, -1) for bias in (self.bias_k, self.bias_v)
            ]
            k, v = torch.cat((k, rows[0]), 1), torch.cat((v, rows[1]), 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return k, v, k.shape[1] - before

    def _check(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        """The shapes beside q [N, L, embed_dim]; k, v [N, S, embed_dim]."""
        batch, queries, keys = *q.shape[:2], k.shape[1]
        if k.shape[0] != batch:
            _fail("key", f"query's batch size {batch}", k.shape[0])
        if v.shape != k.shape:
            _fail("value", f"key's batch size and length {tuple(k.shape[:2])}", tuple(v.shape[:2]))
        if key_padding_mask is not None:
            _check_mask("key_padding_mask", key_padding_mask, (batch, keys))
        if attn_mask is not None:
            _check_mask(
                "attn_mask",
                attn_mask,
                (queries, keys),
                (batch * self.num_heads, queries, keys),
            )
        elif is_causal:
            _fail("attn_mask", "the causal mask beside is_causal", None)


def _check_mask(name: str, mask: Tensor, *shapes: tuple[int, ...]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        _fail(name, "a bool or floating tensor", mask.dtype)
    if tuple(mask.shape) not in shapes:
        _fail(name, f"shape {' or '.join(map(str, shapes))}", tuple(mask.shape))


def _score_bias(attn_mask: Tensor | None, q: Tensor, appended: int) -> Tensor | None:
    """What attn_mask adds to the scores, [1 or N, 1 or H, L, S], 0 for the appended keys."""
    if attn_mask is None:
        return None
    if attn_mask.dtype == torch.bool:
        attn_mask = q.new_zeros(attn_mask.shape).masked_fill(attn_mask, float("-inf"))
    attn_mask = F.pad(attn_mask, (0, appended)).to(q.dtype)
    sizes = (1, 1) if attn_mask.dim() == 2 else (q.shape[0], q.shape[2])
    return attn_mask.reshape(*sizes, *attn_mask.shape[-2:])


def _attention_with_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    hidden: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """`attention` written out: out [N, L, H, D] and, after dropout, the probabilities [N, H, L, S]."""
    scores = (q * q.shape[-1] ** -0.5).transpose(1, 2) @ k.permute(0, 2, 3, 1)
    if bias is not None:
        scores = scores + bias
    if hidden is not None:
        scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
    blind = torch.isneginf(scores).all(-1, keepdim=True)
    weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    weights = F.dropout(weights, dropout_p)
    return (weights @ v.transpose(1, 2)).transpose(1, 2), weights
