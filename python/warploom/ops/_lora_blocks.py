"""Low-rank updates of several linear maps at a time: of a block, of a batch, of experts, of an embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from warploom.ops._check import check_device, check_dim, check_shape, check_tensor, fail
from warploom.ops._fakes import statistics_dtype
from warploom.ops._lora_linear import lora_linear, lora_shrink, lora_weight_norm
from warploom.ops._lora_shrink import swiglu_shrink
from warploom.ops._quantized import QuantizedWeight
from warploom.ops.activation import swiglu
from warploom.ops.grouped_linear import grouped_linear


class Adapter(NamedTuple):
    """The low-rank update of one linear map: lora_a [R, K], lora_b [N, R], and for DoRA magnitude [N]."""

    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    magnitude: Tensor | None = None


def _check_members(op: str, count: int, **members: Sequence[object]) -> None:
    for argument, values in members.items():
        if len(values) != count:
            fail(op, argument, f"{count} of them, one a weight", len(values))


def lora_qkv(
    x: Tensor,
    weights: Sequence[Tensor | QuantizedWeight],
    biases: Sequence[Tensor | None],
    adapters: Sequence[Adapter | None],
    *,
    dropout_p: float = 0.0,
    seeds: Sequence[Tensor | None] | None = None,
    shrunk: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Linear maps of one input, each with its own update: y_m = x W_m^T + bias_m + scaling_m drop(x) A_m^T
    B_m^T.

    The shrinks are one product with the lora_a stacked, so that x is read once for all of them; with dropout
    they are several, since each member drops other elements, as peft's layers do.

    Args:
        x: [..., K]; float32, float16, bfloat16 (float64 on `reference` and `cpu`).
        weights: [N_m, K] each, or `QuantizedWeight`s: query, key and value, gate and up, or any others.
        biases: [N_m] or None each.
        adapters: an `Adapter` each, of any ranks, or None where there is no update.
        dropout_p: as in `lora_linear`.
        seeds: a seed a member, as `lora_linear`'s; default: drawn.
        shrunk: x A^T [..., sum of the ranks] where the op before has made it (`rms_norm_shrink` with the
            lora_a of the members that have one, stacked in order); without dropout only.
        backend: one of `warploom.BACKENDS`; None chooses.

    Returns:
        [..., N_m] each. Differentiable as `lora_linear`.

    Raises: as `lora_linear`.
    """
    op = "lora_qkv"
    seeds = [None] * len(weights) if seeds is None else seeds
    _check_members(op, len(weights), biases=biases, adapters=adapters, seeds=seeds)
    present = [adapter for adapter in adapters if adapter is not None]
    ranks = [adapter.lora_a.shape[0] for adapter in present]
    if shrunk is not None and dropout_p:
        fail(op, "shrunk", "None beside dropout_p", tuple(shrunk.shape))
    if dropout_p or not present:
        return tuple(
            lora_linear(
                x, weight, bias, None, None, 1.0, backend=backend
            )
            if adapter is None
            else lora_linear(
                x, weight, bias, *adapter[:3], magnitude=adapter.magnitude,
                dropout_p=dropout_p, seed=seed, backend=backend,
            )
            for weight, bias, adapter, seed in zip(weights, biases, adapters, seeds)
        )  # fmt: skip
    if shrunk is None:
        wide = max((a.lora_a.dtype for a in present), key=lambda dtype: dtype.itemsize)
        shrunk = lora_shrink(x, torch.cat([a.lora_a.to(wide) for a in present]), backend=backend)
    check_shape(op, "shrunk", shrunk, (*x.shape[:-1], sum(ranks)))
    parts = iter(shrunk.split(ranks, dim=-1))
    return tuple(
        lora_linear(x, weight, bias, None, None, 1.0, backend=backend)
        if adapter is None
        else _expand(x, weight, bias, adapter, next(parts), backend)
        for weight, bias, adapter in zip(weights, biases, adapters)
    )


def _expand(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    adapter: Adapter,
    shrunk: Tensor,
    backend: str | None,
) -> Tensor:
    lora_a, lora_b, scaling, magnitude = adapter
    norm = None if magnitude is None else lora_weight_norm(weight, lora_a, lora_b, scaling)
    return lora_linear(
        x, weight, bias, None, lora_b, scaling, magnitude=magnitude, weight_norm=norm,
        shrunk=shrunk, backend=backend,
    )  # fmt: skip


def lora_swiglu_mlp(
    x: Tensor,
    weights: Sequence[Tensor | QuantizedWeight],
    biases: Sequence[Tensor | None],
    adapters: Sequence[Adapter | None],
    *,
    dropout_p: float = 0.0,
    seeds: Sequence[Tensor | None] | None = None,
    shrunk: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """down(silu(gate(x)) up(x)), each of the three linear maps with its own update or none.

    gate and up share one shrink, as in `lora_qkv`; down's is emitted by the activation's kernel.

    Args:
        weights, biases, adapters, seeds: of gate [N, K], up [N, K] and down [D, N], as in `lora_qkv`.
        x, dropout_p, backend: as in `lora_qkv`.
        shrunk: as in `lora_qkv`, of gate and up.

    Returns:
        [..., D]. Differentiable as `lora_linear`.

    Raises: as `lora_linear`.
    """
    op = "lora_swiglu_mlp"
    seeds = [None] * 3 if seeds is None else seeds
    _check_members(op, 3, weights=weights, biases=biases, adapters=adapters, seeds=seeds)
    gate, up = lora_qkv(
        x, weights[:2], biases[:2], adapters[:2], dropout_p=dropout_p, seeds=seeds[:2],
        shrunk=shrunk, backend=backend,
    )  # fmt: skip
    down = adapters[2]
    if down is None or dropout_p:
        hidden = swiglu(gate, up, backend=backend)
        (out,) = lora_qkv(
            hidden, weights[2:], biases[2:], adapters[2:], dropout_p=dropout_p, seeds=seeds[2:],
            backend=backend,
        )  # fmt: skip
        return out
    hidden, emitted = swiglu_shrink(gate, up, down.lora_a, backend=backend)
    return _expand(hidden, weights[2], biases[2], down, emitted, backend)


def _stack(matrices: Sequence[Tensor], dim: int, rank: int) -> Tensor:
    """The matrices one above the other, filled up with zeros to `rank` in dimension `dim`.

    A few operations, however many matrices there are: on a GPU each is a launch.
    """
    sizes = [matrix.shape[dim] for matrix in matrices]
    if all(size == rank for size in sizes):
        return torch.stack(tuple(matrices))
    together = torch.cat(tuple(matrices), dim)
    places = [number * rank + row for number, size in enumerate(sizes) for row in range(size)]
    shape = list(together.shape)
    shape[dim] = len(sizes) * rank
    index = torch.tensor(places, dtype=torch.int64, device=together.device)
    filled = together.new_zeros(shape).index_copy(dim, index, together)
    stacked: Tensor = filled.unflatten(dim, (len(sizes), rank)).movedim(dim, 0)
    return stacked


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    adapter_ids: Tensor,
    *,
    dropout_p: float = 0.0,
    batch_invariant: bool = True,
    backend: str | None = None,
) -> Tensor:
    """A linear map whose rows have each their own adapter, for training and for serving many at once.

      y_i = x_i W^T + bias + scaling_a drop(x_i) A_a^T B_a^T,   a = adapter_ids[i]

    The rows are sorted by adapter, and each group goes through its own pair of small products
    (`warploom.ops.grouped_linear`).

    Args:
        x: [..., K]; float32, float16, bfloat16 (float64 on `reference` and `cpu`).
        weight: [N, K] in x's dtype.
        bias: [N] in x's dtype, or None.
        adapters: of any ranks; filled up with zeros to the largest of them. With a magnitude: DoRA, without
            dropout.
        adapter_ids: int [...] as x's rows, or [B] for an x of [B, ..., K]; -1: no adapter. Others than -1 to
            len(adapters) - 1 are an error on the CPU, and no adapter on a GPU, where they are not read.
        dropout_p: `torch.nn.functional.dropout` of what goes into the updates.
        batch_invariant: whether a row's result has the same bits whatever rows are beside it, as the kernels
            have it; on a CPU that takes our product in place of PyTorch's, slower from some ten rows on.
        backend: one of `warploom.BACKENDS`; None chooses.

    Returns:
        [..., N] in x's dtype. Differentiable in x, weight, bias and the adapters; deterministic.

    Raises: as `lora_linear`.

    Source: Chen et al., Punica (arXiv:2310.18547); Sheng et al., S-LoRA (arXiv:2311.03285).
    """
    op = "multi_lora_linear"
    check_tensor(op, "x", x)
    check_dim(op, "weight", weight, 2, "[N, K]")
    out_features, in_features = weight.shape
    check_tensor(op, "adapter_ids", adapter_ids)
    check_device(op, "adapter_ids", adapter_ids, "x", x)
    lead = x.shape[:-1]
    if x.shape[-1:] != (in_features,):
        fail(op, "x", f"shape (..., {in_features})", tuple(x.shape))
    if adapter_ids.shape != lead:
        if adapter_ids.shape != lead[:1]:
            fail(
                op,
                "adapter_ids",
                f"shape {tuple(lead)} or {tuple(lead[:1])}",
                tuple(adapter_ids.shape),
            )
        adapter_ids = adapter_ids.view(-1, *(1,) * (len(lead) - 1)).expand(lead)
    if adapter_ids.device.type == "cpu" and adapter_ids.numel():
        low, high = (int(bound) for bound in torch.aminmax(adapter_ids))
        if low < -1 or high >= len(adapters):
            fail(op, "adapter_ids", f"numbers from -1 to {len(adapters) - 1}", f"{low} to {high}")
    rows = x.reshape(-1, in_features)
    everything = torch.tensor([0, len(rows)], dtype=torch.int32, device=x.device)
    product = partial(grouped_linear, batch_invariant=batch_invariant, backend=backend)
    out = product(rows, weight[None], everything)
    if adapters:
        out = _add_updates(rows, weight, out, adapters, adapter_ids.reshape(-1), dropout_p, product)
    if bias is not None:
        out = out + bias.to(out.dtype)
    return out.view(*lead, out_features)


def _add_updates(
    rows: Tensor,
    weight: Tensor,
    base: Tensor,
    adapters: Sequence[Adapter],
    adapter_ids: Tensor,
    dropout_p: float,
    product: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """base [M, N] and what the adapters add to it, scaled by their magnitudes."""
    count = len(adapters)
    # The rows without an adapter are a last group, which grouped_linear leaves at zero.
    group = torch.where((adapter_ids < 0) | (adapter_ids >= count), count, adapter_ids)
    ordered, order = torch.sort(group, stable=True)
    bounds = torch.arange(count + 1, dtype=ordered.dtype, device=rows.device)
    offsets = torch.searchsorted(ordered, bounds, out_int32=True)
    rank = max(adapter.lora_a.shape[0] for adapter in adapters)
    lora_a = _stack([adapter.lora_a for adapter in adapters], 0, rank).to(rows.dtype)
    lora_b = _stack([adapter.lora_b for adapter in adapters], 1, rank).to(rows.dtype)
    scalings = [adapter.scaling for adapter in adapters] + [0.0]
    scale = torch.tensor(scalings, dtype=statistics_dtype(rows), device=rows.device)[ordered, None]
    shrunk = product(F.dropout(rows[order], dropout_p), lora_a, offsets)
    update = product((shrunk * scale).to(rows.dtype), lora_b, offsets)
    out = base + torch.zeros_like(base).index_copy(0, order, update)
    if all(adapter.magnitude is None for adapter in adapters):
        return out
    magnitudes = [_column_scale(weight, adapter) for adapter in adapters]
    magnitudes.append(torch.ones_like(magnitudes[0]))
    return (out * torch.stack(magnitudes)[group]).to(out.dtype)


def _column_scale(weight: Tensor, adapter: Adapter) -> Tensor:
    """DoRA's magnitude over the norm of the adapted weight's rows; ones for an adapter without."""
    lora_a, lora_b, scaling, magnitude = adapter
    if magnitude is None:
        return torch.ones(len(weight), dtype=statistics_dtype(weight), device=weight.device)
    norm = lora_weight_norm(weight, lora_a, lora_b, scaling)
    return magnitude.to(norm.dtype) / norm


def expert_factors(lora_a: Tensor, lora_b: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """peft's adapter of an expert weight [E, N, K] as [E, R, K] and [E, N, R], views.

    peft stores lora_a as [E R, K], an expert's rows together, and lora_b as [N, R E], the experts of one
    column side by side (`target_parameters`).
    """
    op = "expert_factors"
    total = lora_a.shape[0]
    if num_experts < 1 or total % num_experts:
        fail(op, "lora_a", f"a multiple of {num_experts} rows", tuple(lora_a.shape))
    check_shape(op, "lora_b", lora_b, (lora_b.shape[0], total))
    rank = total // num_experts
    split = lora_b.unflatten(1, (rank, num_experts))
    return lora_a.unflatten(0, (num_experts, rank)), split.permute(2, 0, 1)


def lora_expert_linear(
    x: Tensor,
    weight: Tensor,
    group_offsets: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """A linear map per expert, each with its own low-rank update; W + scaling B A is never made.

    Args:
        x: [M, K], rows sorted by expert; float32, float16, bfloat16 (float64 on `reference` and `cpu`).
        weight: [E, N, K] in x's dtype.
        group_offsets: int32 [E + 1], as in `warploom.ops.grouped_linear`.
        lora_a, lora_b: [E R, K] and [N, R E] in peft's layout, see `expert_factors`.
        scaling: lora_alpha / R.
        dropout_p: `torch.nn.functional.dropout` of what goes into the updates.
        backend: one of `warploom.BACKENDS`; None chooses.

    Returns:
        [M, N] in x's dtype. Differentiable in x, weight, lora_a and lora_b.

    Raises: as `warploom.ops.grouped_linear`.
    """
    a, b = (factor.to(x.dtype) for factor in expert_factors(lora_a, lora_b, weight.shape[0]))
    shrunk = grouped_linear(F.dropout(x, dropout_p), a, group_offsets, backend=backend)
    update = grouped_linear(shrunk, b.contiguous(), group_offsets, backend=backend)
    return torch.add(
        grouped_linear(x, weight, group_offsets, backend=backend), update, alpha=scaling
    )


def lora_embedding(
    ids: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    padding_idx: int | None = None,
) -> Tensor:
    """Rows of weight + scaling (B A)^T: weight[i] + scaling A[:, i] B^T for every id i.

    Args:
        ids: int [...].
        weight: [V, D].
        lora_a, lora_b: [R, V] and [D, R], peft's lora_embedding_A and lora_embedding_B.
        scaling: lora_alpha / R.
        padding_idx: as in `torch.nn.functional.embedding`.

    Returns:
        [..., D] in weight's dtype. Differentiable in weight, lora_a and lora_b.
    """
    base = F.embedding(ids, weight, padding_idx)
    update = F.embedding(ids, lora_a.T, padding_idx) @ lora_b.T
    return torch.add(base, update.to(base.dtype), alpha=scaling)
