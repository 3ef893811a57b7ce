"""The loss of a language model's head, ours and as others have it: (hidden, weight, targets) -> a scalar."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from warploom.ops.vocab import linear_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def unfused(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets)


def torch_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """PyTorch's own loss in chunks, with its default sizes of them."""
    return F.linear_cross_entropy(
        hidden, weight, targets, options=torch.nn.LinearCrossEntropyOptions()
    )


def liger_scheme(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Liger Kernel's chunks and its buffers, in plain PyTorch: what its kernel would allocate on a GPU."""
    return _LigerScheme.apply(hidden, weight, targets)


class _LigerScheme(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets):  # type: ignore[no-untyped-def]
        count, parts = len(targets), -(-len(weight) // hidden.shape[1])
        rows = 1 << (-(-count // parts) - 1).bit_length()
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        for first in range(0, count, rows):
            chunk = slice(first, first + rows)
            logits = hidden[chunk] @ weight.T
            places = torch.arange(len(logits), device=hidden.device), targets[chunk]
            maximum, at_target = logits.amax(-1, keepdim=True), logits[places]
            # In place, as its kernel has it.
            sums = logits.sub_(maximum).exp_().sum(-1, keepdim=True)
            loss += (sums.log() + maximum).sum() - at_target.sum()
            logits /= sums
            logits[places] -= 1
            logits /= count
            grad_hidden[chunk] = logits @ weight
            if grad_weight is not None:
                grad_weight += logits.T @ hidden[chunk]
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss / count

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        return *(None if grad is None else grad.mul_(upstream) for grad in ctx.saved_tensors), None


def losses(device: str) -> dict[str, Loss]:
    """Those that run here, by name; ours first."""
    found: dict[str, Loss] = {"warploom": linear_cross_entropy, "unfused": unfused}
    found["compiled"] = torch.compile(unfused)
    if hasattr(F, "linear_cross_entropy"):
        found["torch chunked"] = torch_chunked
    if device == "cuda":
        try:
            liger = importlib.import_module("liger_kernel.transformers.functional")
        except ImportError:
            return found
        found["liger"] = lambda hidden, weight, targets: liger.liger_fused_linear_cross_entropy(
            hidden, weight, targets
        )
    else:
        found["liger scheme"] = liger_scheme
    return found
