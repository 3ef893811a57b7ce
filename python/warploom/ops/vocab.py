"""Family `vocab`: a loss over a vocabulary whose logits are never stored as a whole, and what sequences of
its tokens have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from warploom._library import OPS, Differentiable, define
from warploom.ops._autocast import autocast
from warploom.ops._check import (
    check_device,
    check_dim,
    check_floating,
    check_int32,
    check_same,
    check_shape,
    check_tensor,
    fail,
)
from warploom.ops._cross_entropy_blocks import linear_cross_entropy_in_blocks
from warploom.ops._fakes import dense, statistics_dtype
from warploom.ops._lora_linear import lora_shrink
from warploom.reference import vocab as reference

_REDUCTIONS = ("mean", "sum", "none")

_cross_entropy_rows_op = define(
    "cross_entropy_rows",
    "(Tensor(a!) logits, Tensor targets, Tensor? row_scale, int ignore_index, float label_smoothing,"
    " float z_loss, float softcap, bool gradients) -> Tensor",
    reference=reference.cross_entropy_rows,
    fake=lambda logits, *rest: logits.new_empty(len(logits), dtype=statistics_dtype(logits)),
    triton="vocab.cross_entropy_rows:cross_entropy_rows",
)

_cross_entropy_block_op = define(
    "cross_entropy_block",
    "(Tensor(a!) logits, Tensor(b!) state, Tensor targets, int first, int classes, int ignore_index,"
    " float softcap, bool gradients) -> Tensor",
    reference=reference.cross_entropy_block,
    fake=lambda logits, state, *rest: state.new_empty(len(state)),
    native=("cpu",),
)


def _chunk_rows(hidden: Tensor, weight: Tensor, needs_weight: bool) -> int:
    """Rows whose logits are held at a time: as many numbers as hidden has, or half of weight's, where it
    gets a gradient of its size; and so many that products read the weight, all of it for every chunk, at
    their own pace."""
    rows, features = hidden.shape
    like_hidden = rows * features // len(weight)
    return min(rows, max(256, like_hidden, features // 2 if needs_weight else 0))


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """total [V, D] += scale left^T right: left [M, V], right [M, D]. A wider total takes it piece by piece,
    so that what PyTorch gives in a narrow dtype is never as large as total."""
    if total.dtype == left.dtype:
        total.addmm_(left.T, right, alpha=scale)
        return
    for part, columns in zip(total.split(8192), left.split(8192, dim=1)):
        part.add_(torch.mm(columns.T, right), alpha=scale)


def _linear_cross_entropy(
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
    summed: bool,
    *needs: bool,
) -> tuple[Tensor, ...]:
    """`reference.linear_cross_entropy` with the logits of some rows, or some classes of those, at a time."""
    options = (scaling, ignore_index, label_smoothing, z_loss, softcap, summed)
    needs_hidden, needs_weight, needs_bias, needs_shrunk, needs_b = needs
    sums = statistics_dtype(hidden)
    # What sums over rows takes probabilities, and these a row's log-sum-exp first. A cap and smoothing make
    # two sums over classes instead of one.
    sums_over_rows = needs_weight or needs_bias or needs_b
    smooth_cap = softcap != 0 and label_smoothing != 0 and any(needs)
    if backend in _cross_entropy_block_op.backends and not sums_over_rows and not smooth_cap:
        tensors = (hidden, weight, targets, bias, shrunk, lora_b, row_scale)
        loss, grad_hidden, grad_shrunk = linear_cross_entropy_in_blocks(
            backend, *tensors, *options[:-1], needs_hidden, needs_shrunk
        )
        grad_weight, grad_bias, grad_b = (hidden.new_empty(0, dtype=sums) for _ in range(3))
        gradients = (grad_hidden, grad_weight, grad_bias, grad_shrunk, grad_b)
        return loss.sum() if summed else loss, *gradients
    if hidden.dtype == torch.float16 and hidden.device.type == "cpu":
        # PyTorch's float16 products on a CPU may take 200 times as long as float32 ones.
        tensors = (hidden, weight, targets, bias, shrunk, lora_b, row_scale)
        wide = (x.float() if x is not None and x.dtype == torch.float16 else x for x in tensors)
        results = _linear_cross_entropy(backend, *wide, *options, *needs)  # type: ignore[arg-type]
        return tuple(x.half() if index in (1, 4) else x for index, x in enumerate(results))
    rows = _chunk_rows(hidden, weight, needs_weight)

    def empty(like: Tensor | None, needed: bool) -> Tensor:
        return hidden.new_empty(0) if like is None or not needed else dense(like)

    def zeros(like: Tensor | None, needed: bool) -> Tensor:
        return hidden.new_zeros(0 if like is None or not needed else like.shape, dtype=sums)

    loss = hidden.new_empty(len(hidden), dtype=sums)
    grad_hidden, grad_shrunk = empty(hidden, needs_hidden), empty(shrunk, needs_shrunk)
    grad_weight, grad_bias = zeros(weight, needs_weight), zeros(bias, needs_bias)
    grad_b = zeros(lora_b, needs_b)
    expand = None if lora_b is None else lora_b.to(hidden.dtype)
    buffer = hidden.new_empty(rows, len(weight))
    rows_loss = OPS["cross_entropy_rows"].overloads[backend]
    for first in range(0, len(hidden), max(1, rows)):
        chunk = slice(first, first + rows)
        x = hidden[chunk]
        logits = buffer[: len(x)]
        if bias is None:
            torch.mm(x, weight.T, out=logits)
        else:
            torch.addmm(bias, x, weight.T, out=logits)
        if shrunk is not None and expand is not None:
            logits.addmm_(shrunk[chunk], expand.T, alpha=scaling)
        scale = None if row_scale is None else row_scale[chunk]
        loss[chunk] = rows_loss(logits, targets[chunk], scale, *options[1:-1], any(needs))
        if needs_hidden:
            torch.mm(logits, weight, out=grad_hidden[chunk])
        if needs_weight:
            _add_product(grad_weight, logits, x, 1.0)
        if needs_bias:
            grad_bias += logits.sum(0, dtype=sums)
        if needs_shrunk and expand is not None:
            grad_shrunk[chunk].addmm_(logits, expand, beta=0.0, alpha=scaling)
        if needs_b and shrunk is not None:
            _add_product(grad_b, logits, shrunk[chunk], scaling)
    gradients = (grad_hidden, grad_weight, grad_bias, grad_shrunk, grad_b)
    return loss.sum() if summed else loss, *gradients


def _linear_cross_entropy_fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    shrunk: Tensor | None,
    lora_b: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    summed, *needs = rest[-6:]
    sums = statistics_dtype(hidden)
    loss = hidden.new_empty(() if summed else hidden.shape[:1], dtype=sums)
    arguments = (hidden, weight, bias, shrunk, lora_b)
    dtypes = (hidden.dtype, sums, sums, hidden.dtype, sums)
    return loss, *(
        hidden.new_empty(0 if x is None or not need else x.shape, dtype=dtype)
        for x, need, dtype in zip(arguments, needs, dtypes)
    )


_linear_cross_entropy_op = define(
    "linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? shrunk, Tensor? lora_b,"
    " Tensor? row_scale, float scaling, int ignore_index, float label_smoothing, float z_loss, float softcap,"
    " bool summed, bool needs_hidden, bool needs_weight, bool needs_bias, bool needs_shrunk, bool needs_b)"
    " -> (Tensor loss, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, Tensor grad_shrunk,"
    " Tensor grad_b)",
    reference=reference.linear_cross_entropy,
    fake=_linear_cross_entropy_fake,
    composed=_linear_cross_entropy,
)


def _save(args: Any, outputs: Any) -> tuple[Tensor | None, ...]:
    """The gradients where the forward has made them, else the arguments."""
    saved: tuple[Tensor | None, ...] = outputs[1:] if any(args[-5:]) else args[:6]
    return saved


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """grad factor: in grad's own memory where nobody can ask for it again."""
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._autograd._get_current_graph_task_keep_graph()
    ):
        return (grad * factor).to(grad.dtype)
    return torch.mul(grad, factor, out=grad)


def _grads(
    overload: Any, saved: Any, scalars: Any, grads: Any, needs: Any
) -> tuple[Tensor | None, ...]:
    *options, summed = scalars[:6]
    made = scalars[6:]
    # Those of hidden, weight, bias, shrunk and lora_b.
    asked = (*needs[:2], *needs[3:6])
    if any(made):
        # A factor of one dimension, and not of none, takes part in the choice of the dtype of the product.
        factor = grads[0].reshape(1) if summed else grads[0].unsqueeze(1)
        results = [_scaled(grad, factor) if need else None for grad, need in zip(saved, asked)]
    else:
        found = overload(*saved, grads[0], *options, False, *asked)[1:]
        results = [grad if need else None for grad, need in zip(found, asked)]
    hidden, weight, *others = results
    # Autograd casts sums over rows to the dtype of what they are the gradient of.
    return hidden, weight, None, *others, None


_function = Differentiable(
    _linear_cross_entropy_op,
    _linear_cross_entropy_op,
    save=_save,
    backward=_grads,
    constants=(1, 2, 3, 4, 5),
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of z = hidden W^T + bias, a part of the logits at a time: never [N, V] of them.

      z = hidden W^T + bias + scaling (hidden A^T) B^T, capped to softcap tanh(z / softcap)
      loss = lse - (1 - label_smoothing) z_target - label_smoothing mean_j z_j + z_loss lse^2

    with lse = log sum_j exp(z_j). The gradients are made in the forward pass, from the logits at hand: three
    products in all, two where weight needs no gradient. With reduction "none" those that sum over rows wait
    for the backward pass, which then takes all products again. Without inputs that need gradients none is
    made.

    Args:
        hidden: [..., D]; float32, float16, bfloat16 (float64 on `reference` and `cpu`).
        weight: [V, D] in hidden's dtype: a language model's head, or its tied embedding.
        targets: int64 [...], each in [0, V) or ignore_index; others are an error on the CPU, and make the
            loss NaN on a GPU, where they are not read by the host.
        bias: [V] in hidden's dtype, or None.
        lora: (lora_a [R, D], lora_b [V, R], scaling), an adapter of the head, as in `lora_linear`.
        ignore_index: tokens of this target have no loss and no gradient.
        label_smoothing: in [0, 1], as in `torch.nn.functional.cross_entropy`.
        z_loss: the weight of lse^2 (PaLM, arXiv:2204.02311, section 5), averaged like the rest.
        softcap: logits are capped smoothly to (-softcap, softcap) (Gemma 2, arXiv:2408.00118); 0: they are
            not.
        reduction: "mean" over the tokens that are not ignored (NaN where there are none, as in torch), "sum",
            or "none".
        backend: one of `warploom.BACKENDS`; None chooses.

    Returns:
        float32 (float64 for float64): a scalar, or [...] with "none". Differentiable in hidden, weight, bias
        and the adapter, once; sums over tokens in float32 across chunks. Under autocast floating inputs are
        cast to its dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        RuntimeError: the named backend cannot serve the call; forward-mode differentiation.

    Source: Hsu et al., Liger Kernel (arXiv:2410.10989), section 3.2, for the chunks.
    """
    op = "linear_cross_entropy"
    check_floating(op, "hidden", hidden)
    check_floating(op, "weight", weight)
    check_dim(op, "weight", weight, 2, "[V, D]")
    classes, features = weight.shape
    if hidden.dim() == 0 or hidden.shape[-1] != features:
        fail(op, "hidden", f"shape (..., {features})", tuple(hidden.shape))
    if classes == 0:
        fail(op, "weight", "at least 1 row", tuple(weight.shape))
    hidden, weight = autocast(hidden, weight)
    check_same(op, "weight", weight, "hidden", hidden)
    check_tensor(op, "targets", targets)
    if targets.dtype != torch.int64:
        raise TypeError(f"{op}: targets: expected dtype torch.int64, got {targets.dtype}")
    check_device(op, "targets", targets, "hidden", hidden)
    check_shape(op, "targets", targets, hidden.shape[:-1])
    if bias is not None:
        check_floating(op, "bias", bias)
        (bias,) = autocast(bias)
        check_same(op, "bias", bias, "hidden", hidden)
        check_shape(op, "bias", bias, (classes,))
    if not 0 <= label_smoothing <= 1:
        fail(op, "label_smoothing", "a number in [0, 1]", label_smoothing)
    for argument, value in (("z_loss", z_loss), ("softcap", softcap)):
        if not value >= 0:
            fail(op, argument, "a number >= 0", value)
    if reduction not in _REDUCTIONS:
        fail(op, "reduction", "one of " + ", ".join(_REDUCTIONS), repr(reduction))
    rows = hidden.reshape(-1, features)
    shrunk = lora_b = None
    scaling = 1.0
    if lora is not None:
        lora_a, lora_b, scaling = lora
        shrunk = lora_shrink(rows, lora_a, backend=backend)
        check_floating(op, "lora_b", lora_b)
        check_device(op, "lora_b", lora_b, "hidden", hidden)
        check_shape(op, "lora_b", lora_b, (classes, lora_a.shape[0]))
    needs = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (rows, weight, bias, shrunk, lora_b)
    ]
    summed = reduction != "none"
    if not summed and (needs[1] or needs[2] or needs[4]):
        needs = [False] * len(needs)
    loss: Tensor = _function(
        rows, weight, targets.reshape(-1), bias, shrunk, lora_b, None, float(scaling), ignore_index,
        float(label_smoothing), float(z_loss), float(softcap), summed, *needs, backend=backend,
    )[0]  # fmt: skip
    if not summed:
        return loss.view(targets.shape)
    if reduction == "sum":
        return loss
    count = (targets != ignore_index).sum()
    # As torch has it: NaN, but gradients of 0, where every token is ignored.
    return (loss / count.clamp_min(1)).masked_fill(count == 0, float("nan"))


_lcs_lengths_op = define(
    "lcs_lengths",
    "(Tensor tokens, Tensor others, Tensor cu_seqlens) -> Tensor",
    reference=reference.lcs_lengths,
    fake=lambda tokens, others, cu_seqlens: cu_seqlens.new_empty(len(cu_seqlens) - 1),
    native=("cpu",),
)


def lcs_lengths(
    tokens: Tensor, others: Tensor, cu_seqlens: Tensor, *, backend: str | None = None
) -> Tensor:
    """Lengths of the longest common subsequences of one sequence of tokens and of each of many others.

    ROUGE-L of two texts follows from it: recall = length / M, precision = length / its own length.

    Args:
        tokens: int64 [M].
        others: int64 [T], sequences one behind the other.
        cu_seqlens: int32 [N + 1], rising from 0 to at most T: sequence i is
            others[cu_seqlens[i] : cu_seqlens[i + 1]].
        backend: "cpu" or "reference"; None chooses.

    Returns:
        int32 [N]. No gradients.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        RuntimeError: offsets that do not rise from 0 to at most T; the named backend cannot serve the call.

    Source: Hyyro, Bit-parallel LCS-length computation revisited (2004): 64 columns of the table a word.
    """
    op = "lcs_lengths"
    for argument, value in (("tokens", tokens), ("others", others)):
        check_tensor(op, argument, value)
        if value.dtype != torch.int64:
            raise TypeError(f"{op}: {argument}: expected dtype torch.int64, got {value.dtype}")
        check_dim(op, argument, value, 1, "[M]" if argument == "tokens" else "[T]")
    check_device(op, "others", others, "tokens", tokens)
    check_int32(op, "cu_seqlens", cu_seqlens, "tokens", tokens, (None,))
    if len(cu_seqlens) == 0:
        fail(op, "cu_seqlens", "at least 1 number", "none")
    chosen = _lcs_lengths_op.choose(tokens, others, cu_seqlens, backend=backend)
    lengths: Tensor = _lcs_lengths_op.overloads[chosen](tokens, others, cu_seqlens)
    return lengths
