"""Losses over a vocabulary, and what two sequences of its tokens have in common, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy_rows(
    logits: Tensor,
    targets: Tensor,
    row_scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    gradients: bool,
) -> Tensor:
    """The loss [M] of logits [M, V] and int64 targets [M], in float32 or wider.

    With z = logits, or softcap tanh(logits / softcap) where softcap is not 0, and lse = log sum_j exp(z_j):
      loss = lse - (1 - label_smoothing) z_target - label_smoothing mean_j z_j + z_loss lse^2.
    Where `gradients`, row_scale_i d loss_i / d logits_ij takes the place of the logits (row_scale of None:
    1). Rows whose target is ignore_index have a loss and gradients of 0.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    kept = targets != ignore_index
    z = logits.to(wide)
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    lse = torch.logsumexp(z, -1)
    places = torch.where(kept, targets, 0)[:, None]
    log_probability = torch.log_softmax(z, -1)
    at_target = log_probability.gather(1, places)[:, 0]
    loss = z_loss * lse.square() - (1.0 - label_smoothing) * at_target
    if label_smoothing:
        loss = loss - label_smoothing * log_probability.mean(-1)
    if gradients:
        grad = torch.exp(log_probability) * (1.0 + 2.0 * z_loss * lse)[:, None]
        grad -= label_smoothing / logits.shape[1]
        grad.scatter_add_(1, places, torch.full_like(places, -(1.0 - label_smoothing), dtype=wide))
        if softcap:
            grad = grad * (1.0 - (z / softcap).square())
        if row_scale is not None:
            grad = grad * row_scale[:, None]
        logits.copy_(torch.where(kept[:, None], grad, 0.0))
    return torch.where(kept, loss, 0.0)


def cross_entropy_block(
    logits: Tensor,
    state: Tensor,
    targets: Tensor,
    first: int,
    classes: int,
    ignore_index: int,
    softcap: float,
    gradients: bool,
) -> Tensor:
    """Takes the classes [first, first + C) of logits [M, C] into what the others so far amount to.

    state [M, 4], in float32 or wider, has of each row the maximum, the sum of exp(z - maximum), the sum of z
    and z of the target, z as in `cross_entropy_rows`: at first (-infinity, 0, 0, any). Returns
    exp(maximum before - maximum) [M], by which sums of terms exp(z - maximum) that were made before are to
    be multiplied. Where `gradients`, such terms, times d z / d logits, take the place of the logits, but 0 at
    the target and in rows whose target is ignore_index. Those rows' state stays.
    """
    kept = (targets != ignore_index)[:, None]
    columns = torch.arange(first, first + logits.shape[1], device=logits.device)
    at_target = columns == targets[:, None]
    z = logits.to(state.dtype)
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    maximum, exponentials, total, target = state.split(1, dim=1)
    highest = torch.maximum(maximum, z.amax(1, keepdim=True))
    shift = highest.masked_fill(highest == float("-inf"), 0.0)
    factor = torch.exp(maximum - shift)
    terms = torch.exp(z - shift)
    found = torch.where(at_target, z, 0.0).sum(1, keepdim=True)
    after = (
        highest,
        exponentials * factor + terms.sum(1, keepdim=True),
        total + z.sum(1, keepdim=True),
        torch.where(at_target.any(1, keepdim=True), found, target),
    )
    state.copy_(torch.where(kept, torch.cat(after, 1), state))
    if gradients:
        if softcap:
            terms = terms * (1.0 - (z / softcap).square())
        logits.copy_(torch.where(kept & ~at_target, terms, 0.0))
    return torch.where(kept, factor, 1.0)[:, 0]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    shrunk: Tensor | None,
    lora_b: Tensor | None,
    row_scale: Tensor | None,
    scaling: float,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    summed: bool,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    needs_shrunk: bool,
    needs_b: bool,
) -> tuple[Tensor, ...]:
    """(loss, gradients of hidden, weight, bias, shrunk and lora_b), with all logits at once.

    hidden [M, D], weight [V, D], int64 targets [M], bias [V], shrunk [M, R], lora_b [V, R]. With logits
    hidden W^T + bias + scaling shrunk B^T, loss [M] is `cross_entropy_rows`'s, or where `summed` its sum. The
    gradients are those of sum_i row_scale_i loss_i: hidden's and shrunk's in their dtype, the others, which
    sum over rows, in float32 or wider. One that is not asked for is empty.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    x = hidden.to(wide)
    logits = x @ weight.to(wide).T
    if bias is not None:
        logits += bias
    if shrunk is not None and lora_b is not None:
        logits += scaling * (shrunk.to(wide) @ lora_b.to(wide).T)
    options = (ignore_index, label_smoothing, z_loss, softcap)
    loss = cross_entropy_rows(logits, targets, row_scale, *options, True)
    narrow_empty, wide_empty = hidden.new_empty(0), logits.new_empty(0)
    grad_hidden = (logits @ weight.to(wide)).to(hidden.dtype) if needs_hidden else narrow_empty
    grad_weight = logits.T @ x if needs_weight else wide_empty
    grad_bias = logits.sum(0) if needs_bias else wide_empty
    grad_shrunk, grad_b = narrow_empty, wide_empty
    if lora_b is not None and needs_shrunk:
        grad_shrunk = (scaling * (logits @ lora_b.to(wide))).to(hidden.dtype)
    if shrunk is not None and needs_b:
        grad_b = scaling * (logits.T @ shrunk.to(wide))
    gradients = (grad_hidden, grad_weight, grad_bias, grad_shrunk, grad_b)
    return loss.sum() if summed else loss, *gradients


def lcs_lengths(tokens: Tensor, others: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Lengths of the longest common subsequences of tokens [M] and of each packed sequence: int32 [N].

    Sequence i is others[cu_seqlens[i] : cu_seqlens[i + 1]]. Row t of the table, over the prefixes of
    `tokens`: L_t[j] = max(L_t-1[j], L_t[j - 1], L_t-1[j - 1] + 1 where the last tokens are equal).
    """
    lengths = []
    for first, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()):
        table = tokens.new_zeros(len(tokens) + 1)
        for token in others[first:end]:
            longer = table[:-1] + (tokens == token)
            table[1:] = torch.maximum(table[1:], longer).cummax(0).values
        lengths.append(table[-1])
    if not lengths:
        return cu_seqlens.new_empty(0)
    return torch.stack(lengths).to(torch.int32)
