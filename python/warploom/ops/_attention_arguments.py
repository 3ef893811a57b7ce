"""The arguments of family `attention`'s public functions, checked and turned into those of its ops."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from warploom.ops._check import check_device, check_floating, check_shape, fail
from warploom.ops._fakes import statistics_dtype


def window(op: str, causal: bool, window: Sequence[int]) -> tuple[int, int]:
    """(left, right) with the causal limit taken in."""
    if len(window) != 2 or any(side < -1 for side in window):
        fail(op, "window", "(left, right), each -1 (no limit) or more", tuple(window))
    left, right = (int(side) for side in window)
    return left, 0 if causal else right


def softcap(op: str, softcap: float) -> float:
    if not softcap >= 0:
        fail(op, "softcap", "a number >= 0 (0: none)", softcap)
    return float(softcap)


def sinks(op: str, sinks: Tensor | None, q: Tensor) -> Tensor | None:
    """[H] in the statistics' dtype."""
    if sinks is None:
        return None
    check_floating(op, "sinks", sinks)
    check_device(op, "sinks", sinks, "q", q)
    check_shape(op, "sinks", sinks, (q.shape[-2],))
    return sinks.to(statistics_dtype(q)).contiguous()


def slopes(op: str, slopes: Tensor | None, q: Tensor, batch: int) -> Tensor | None:
    """[B, H] in the statistics' dtype."""
    if slopes is None:
        return None
    check_floating(op, "alibi_slopes", slopes)
    check_device(op, "alibi_slopes", slopes, "q", q)
    heads = q.shape[-2]
    if tuple(slopes.shape) not in ((heads,), (batch, heads)):
        fail(op, "alibi_slopes", f"shape {(heads,)} or {(batch, heads)}", tuple(slopes.shape))
    return slopes.to(statistics_dtype(q)).expand(batch, heads).contiguous()


def check_heads(op: str, q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str]) -> None:
    """k and v have one head count, which divides q's, and q's head dim is k's."""
    heads, dim = q.shape[-2:]
    kv_heads = k.shape[-2]
    if k.shape[-1] != dim:
        fail(op, names[0], f"q's head dim {dim}", tuple(k.shape))
    if tuple(v.shape[:-1]) != tuple(k.shape[:-1]):
        fail(op, names[1], f"shape {(*k.shape[:-1], v.shape[-1])}", tuple(v.shape))
    if kv_heads == 0 or heads % kv_heads:
        fail(op, names[0], f"a head count that divides q's {heads}", kv_heads)
    if dim == 0 or v.shape[-1] == 0:
        fail(op, "q" if dim == 0 else names[1], "a head dim of at least 1", 0)


def scale(softmax_scale: float | None, dim: int) -> float:
    return dim**-0.5 if softmax_scale is None else float(softmax_scale)
