"""The training loss of a language model, its logits never stored as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

from warploom.nn.lora import LoRALinear
from warploom.ops.vocab import linear_cross_entropy

if TYPE_CHECKING:
    from warploom.models.causal_lm import CausalLanguageModel

Head = tuple[Tensor, Tensor | None, tuple[Tensor, Tensor, float] | None]


def next_token_loss(
    model: CausalLanguageModel,
    input_ids: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    *,
    fused: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of a model's logits.

    Args:
        input_ids: int [B, S].
        targets: int64 [B, S], what follows each token; -100 where that does not count.
        cu_seqlens, max_seqlen: as in the model's forward.
        fused: `warploom.ops.vocab.linear_cross_entropy` of the hidden states and the head. A head whose
            adapter drops inputs or scales columns (DoRA), or that has several, gives its logits all the same.
        reduction: "mean" over the targets that count, or "sum".

    Returns:
        float32 (float64 for float64), a scalar.
    """
    hidden = model.model(input_ids, None, cu_seqlens, max_seqlen)
    head = _as_product(model.lm_head) if fused else None
    if head is not None:
        weight, bias, lora = head
        return linear_cross_entropy(
            hidden, weight, targets, bias=bias, lora=lora, reduction=reduction
        )
    logits = model.lm_head(hidden)
    wide = logits if logits.dtype.itemsize > 4 else logits.float()
    return F.cross_entropy(wide.flatten(0, -2), targets.flatten(), reduction=reduction)


def _as_product(head: nn.Module) -> Head | None:
    """(weight, bias, adapter) of a head that is a product with them; None for any other."""
    if isinstance(head, nn.Linear):
        return head.weight, head.bias, None
    if not isinstance(head, LoRALinear) or head.merged_adapters or head.disabled:
        return None
    weight: Any = head.weight
    if len(head.active_adapters) != 1 or not isinstance(weight, Tensor):
        return None
    (name,) = head.active_adapters
    dropout: Any = head.lora_dropout[name]
    if name in head.lora_magnitude_vector or (dropout.training and dropout.p):
        return None
    return weight, head.bias, (*head.factors(name), head.scaling[name])
