"""Linear cross-entropy from blocks of logits, each of some rows and of some classes."""

from __future__ import annotations

import torch
from torch import Tensor

from warploom._library import OPS
from warploom.ops._fakes import dense, statistics_dtype


def _block_size(hidden: Tensor, classes: int) -> tuple[int, int]:
    """Rows and classes of a block, at most 2 MiB in float32: it stays in the cache between the product that
    makes it and the one that takes it. 512 rows read weight once. Up to 1024 classes as long as the block
    has a quarter of hidden's numbers; 512, or of few rows more, are enough to be worth the calls."""
    rows = min(len(hidden), 512)
    each = max(1, rows)
    columns = max(512, 2**15 // each, min(1024, hidden.numel() // (4 * each)))
    return rows, min(columns, classes)


def linear_cross_entropy_in_blocks(
    backend: str,
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
    needs_hidden: bool,
    needs_shrunk: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [M], grad_hidden, grad_shrunk) of `reference.linear_cross_entropy`, one product a gradient.

    With p_j = exp(z_j - lse) and slope_j = d z_j / d logit_j, hidden's gradient is sum_j p_j slope_j W_j less
    a multiple of the target's W_j. The sum is made of exp(z_j - maximum so far), is scaled whenever a block
    raises the maximum, and is divided at the end. The target is left out of it and comes last, with its
    p - 1 in float32: near 0 that would drown in what products of 16-bit numbers round off.
    """
    sums = statistics_dtype(hidden)
    # PyTorch's float16 products on a CPU may take 200 times as long as float32 ones.
    of_products = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    block_op = OPS["cross_entropy_block"].overloads[backend]
    classes = len(weight)
    rows, columns = _block_size(hidden, classes)
    buffer = hidden.new_empty(rows * columns, dtype=of_products)
    loss = hidden.new_empty(len(hidden), dtype=sums)
    grads = [
        hidden.new_empty(0) if like is None or not needed else dense(like)
        for needed, like in ((needs_hidden, hidden), (needs_shrunk, shrunk))
    ]
    # A gradient, the matrix that logits' gradients are multiplied by, and a factor.
    products = [
        (grad, matrix, factor)
        for grad, matrix, factor in zip(grads, (weight, lora_b), (1.0, scaling))
        if grad.numel() > 0 and matrix is not None
    ]
    means = [matrix.mean(0, dtype=sums) if label_smoothing else None for _, matrix, _ in products]
    for first in range(0, len(hidden), max(1, rows)):
        chunk = slice(first, first + rows)
        x, places = hidden[chunk].to(of_products), targets[chunk]
        down = None if shrunk is None else shrunk[chunk].to(of_products)
        state = x.new_zeros(len(x), 4, dtype=sums)
        state[:, 0] = float("-inf")
        totals = [
            grad[chunk].zero_()
            if grad.dtype == sums
            else grad.new_zeros(grad[chunk].shape, dtype=sums)
            for grad, _, _ in products
        ]
        for start in range(0, classes, columns):
            block = slice(start, start + columns)
            part = weight[block].to(of_products)
            logits = buffer[: len(x) * len(part)].view(len(x), len(part))
            if bias is None:
                torch.mm(x, part.T, out=logits)
            else:
                torch.addmm(bias[block].to(of_products), x, part.T, out=logits)
            if down is not None and lora_b is not None:
                logits.addmm_(down, lora_b[block].to(of_products).T, alpha=scaling)
            raised = block_op(
                logits, state, places, start, classes, ignore_index, softcap, bool(products)
            )
            for total, (_, matrix, _) in zip(totals, products):
                total.mul_(raised[:, None])
                terms = part if matrix is weight else matrix[block].to(of_products)
                if total.dtype == of_products:
                    total.addmm_(logits, terms)
                else:
                    total += torch.mm(logits, terms)
        scale = None if row_scale is None else row_scale[chunk]
        loss[chunk], of_sum, of_target, of_mean = _row_factors(
            state, classes, scale, places == ignore_index, label_smoothing, z_loss, softcap
        )
        kept = torch.where(places == ignore_index, 0, places)
        for total, mean, (grad, matrix, factor) in zip(totals, means, products):
            total.mul_(of_sum * factor)
            of_matrix = of_target * factor
            for some, index, of_some in zip(*(x.split(64) for x in (total, kept, of_matrix))):
                some.addcmul_(matrix[index].to(sums), of_some)
            if mean is not None:
                total.addcmul_(mean, of_mean * factor)
            if grad.dtype != sums:
                grad[chunk] = total
    return loss, grads[0], grads[1]


def _row_factors(
    state: Tensor,
    classes: int,
    row_scale: Tensor | None,
    ignored: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, ...]:
    """The loss [M] and, each [M, 1], what a row of the gradient has of the sum, of the target's row of the
    matrix, and of the mean of its rows."""
    maximum, exponentials, total, target = state.unbind(1)
    log_sum = exponentials.log()
    lse = maximum + log_sum
    loss = log_sum + (1.0 - label_smoothing) * (maximum - target) + z_loss * lse.square()
    if label_smoothing:
        loss += label_smoothing * (maximum - total / classes)
    of_lse = 1.0 + 2.0 * z_loss * lse
    of_target = ((target - maximum) - log_sum).exp() * of_lse - (1.0 - label_smoothing)
    if softcap:
        of_target *= 1.0 - (target / softcap).square()
    found: tuple[Tensor, ...] = (
        of_lse / exponentials,
        of_target,
        torch.full_like(loss, -label_smoothing),
    )
    if row_scale is not None:
        found = tuple(x * row_scale for x in found)
    return loss.masked_fill(ignored, 0.0), *(x.masked_fill(ignored, 0.0)[:, None] for x in found)
