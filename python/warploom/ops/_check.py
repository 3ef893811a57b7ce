"""Argument checks of the public functions: metadata only, so that they can be traced.

Every message names the op, the argument, what was expected and what came.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def fail(op: str, argument: str, expected: str, got: object) -> None:
    raise ValueError(f"{op}: {argument}: expected {expected}, got {got}")


def check_tensor(op: str, argument: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {argument}: expected a tensor, got {type(value).__name__}")


def check_floating(op: str, argument: str, value: Tensor) -> None:
    check_tensor(op, argument, value)
    if value.dtype not in FLOATING:
        raise TypeError(
            f"{op}: {argument}: expected dtype float32, float16, bfloat16 or float64, "
            f"got {str(value.dtype).removeprefix('torch.')}"
        )


def check_dim(op: str, argument: str, value: Tensor, dim: int, layout: str) -> None:
    if value.dim() != dim:
        fail(op, argument, f"{dim} dimensions {layout}", f"shape {tuple(value.shape)}")


def check_shape(op: str, argument: str, value: Tensor, shape: Sequence[int]) -> None:
    if tuple(value.shape) != tuple(shape):
        fail(op, argument, f"shape {tuple(shape)}", tuple(value.shape))


def check_same(op: str, argument: str, value: Tensor, other: str, like: Tensor) -> None:
    """`value` has the dtype and device of `like`, the argument named `other`."""
    check_tensor(op, argument, value)
    if value.dtype != like.dtype:
        raise TypeError(
            f"{op}: {argument}: expected {other}'s dtype "
            f"{str(like.dtype).removeprefix('torch.')}, got {str(value.dtype).removeprefix('torch.')}"
        )
    check_device(op, argument, value, other, like)


def check_device(op: str, argument: str, value: Tensor, other: str, like: Tensor) -> None:
    if value.device != like.device:
        fail(op, argument, f"{other}'s device {like.device}", value.device)


def check_choice(op: str, argument: str, value: object, choices: Collection[object]) -> None:
    if value not in choices:
        fail(op, argument, "one of " + ", ".join(map(str, choices)), repr(value))


def check_parameter(op: str, argument: str, value: Tensor, x: Tensor) -> None:
    """`value` is on x's device, in x's dtype or float32."""
    check_floating(op, argument, value)
    if value.dtype not in (x.dtype, torch.float32):
        raise TypeError(
            f"{op}: {argument}: expected dtype {x.dtype} or torch.float32, got {value.dtype}"
        )
    check_device(op, argument, value, "x", x)


def refuse_gradient(op: str, argument: str, value: Tensor, reason: str) -> None:
    """RuntimeError where a gradient of `value` would be lost; `reason` says why there is none."""
    if torch.is_grad_enabled() and value.requires_grad:
        raise RuntimeError(
            f"{op}: {argument}: expected a tensor that needs no gradient, got one that does: {reason}"
        )


def check_splits(op: str, num_splits: int, split_size: int) -> None:
    """How decoding cuts the keys: into a number of parts, or into parts of a size, or as it chooses."""
    if num_splits < 0:
        fail(op, "num_splits", "a number >= 0 (0: chosen)", num_splits)
    if split_size < 0 or split_size % 64:
        fail(op, "split_size", "a multiple of 64 (0: none)", split_size)
    if num_splits and split_size:
        fail(op, "split_size", "0 beside num_splits", split_size)


def check_int32(
    op: str, argument: str, value: Tensor, other: str, like: Tensor, shape: Sequence[int | None]
) -> None:
    """An int32 tensor on the device of `like`, the argument named `other`; None in `shape`: any size."""
    check_tensor(op, argument, value)
    if value.dtype != torch.int32:
        dtype = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{op}: {argument}: expected dtype int32, got {dtype}")
    check_device(op, argument, value, other, like)
    fits = value.dim() == len(shape) and all(
        want is None or have == want for have, want in zip(value.shape, shape)
    )
    if not fits:
        expected = ", ".join("*" if size is None else str(size) for size in shape)
        fail(op, argument, f"shape ({expected})", tuple(value.shape))


def unit_last_stride(value: Tensor) -> Tensor:
    """`value` itself when its last dimension is dense, else a contiguous copy."""
    return value if value.stride(-1) == 1 or value.shape[-1] == 1 else value.contiguous()
