"""Losses over a vocabulary."""

from __future__ import annotations

from torch import Tensor, nn

from warploom.ops.vocab import linear_cross_entropy


class LinearCrossEntropy(nn.Module):
    """`torch.nn.CrossEntropyLoss` of logits = hidden W^T + bias that are never stored as a whole.

    It has no parameters: weight and bias are those of the model's head, given with every call, so that a
    tied or sharded head stays where it is.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float = 0.0,
    ) -> None:
        """ignore_index, reduction and label_smoothing are `torch.nn.CrossEntropyLoss`'s; z_loss and softcap
        those of `warploom.ops.vocab.linear_cross_entropy`."""
        super().__init__()
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.softcap = softcap

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None = None,
        lora: tuple[Tensor, Tensor, float] | None = None,
    ) -> Tensor:
        """hidden [..., D], weight [V, D], targets int64 [...], bias [V] -> a scalar, or [...] with "none".

        `lora` is (lora_a [R, D], lora_b [V, R], scaling), an adapter of the head.
        """
        return linear_cross_entropy(
            hidden,
            weight,
            targets,
            bias=bias,
            lora=lora,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        names = ("ignore_index", "reduction", "label_smoothing", "z_loss", "softcap")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
