"""What every launcher needs: block sizes, the view as rows, the reasons not to serve a call."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import triton

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Whether Triton runs kernels on the CPU, under its interpreter. Decided once, when triton decides
# it too: `@triton.jit` wraps a function for the interpreter or for the compiler as it is defined.
INTERPRETED = bool(triton.knobs.runtime.interpret)

# Options of every compilation. Triton's default for this one differs between releases.
COMPILE_OPTIONS = {"enable_fp_fusion": True}

# Programs of a persistent grid where there is no GPU whose size could decide it: few, because the
# interpreter runs them one after another, and more than one, so that partial results are combined.
INTERPRETER_PROGRAMS = 3


def on_own_device(launcher: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Launches where the first tensor lies: Triton itself takes the current device."""

    @functools.wraps(launcher)
    def launch(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        device = args[0].device if isinstance(args[0], torch.Tensor) else None
        if device is None or device.type != "cuda" or device.index == torch.cuda.current_device():
            return launcher(*args, **kwargs)
        with torch.cuda.device(device):
            return launcher(*args, **kwargs)

    return launch


def next_power_of_2(n: int) -> int:
    """The least power of two that is >= n; 1 for n <= 1."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def cdiv(a: int, b: int) -> int:
    """ceil(a / b) for non-negative integers."""
    return -(-a // b)


def warp_count(elements: int) -> int:
    """Warps for a program that holds a tile of `elements`: about 16 per lane, 4 to 16 warps."""
    return max(4, min(16, next_power_of_2(elements // 512)))


@functools.cache
def _multiprocessor_count(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def persistent_programs(device: torch.device, tiles: int, per_multiprocessor: int) -> int:
    """Programs of a grid that walks over `tiles` tiles: enough to fill the device, no more."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return min(tiles, per_multiprocessor * _multiprocessor_count(index))
    return min(tiles, INTERPRETER_PROGRAMS)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., N] as [M, N] with stride(-1) == 1 and one row stride; copies only where no view does.

    A 0-d tensor becomes [1, 1].
    """
    if x.dim() == 0:
        return x.view(1, 1)
    return with_unit_last_stride(x).reshape(math.prod(x.shape[:-1]), x.shape[-1])


def with_unit_last_stride(x: torch.Tensor) -> torch.Tensor:
    """x itself where its last dimension is dense (or has at most one element), else a copy."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def why_not_tensors(*args: object) -> list[str]:
    """The reasons that hold for every kernel, from the tensors among an op's arguments."""
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    reasons = []
    for dtype in {tensor.dtype for tensor in tensors if tensor.is_floating_point()}:
        if dtype not in SUPPORTED_DTYPES:
            name = str(dtype).removeprefix("torch.")
            reasons.append(f"{name} tensors (takes float32, float16, bfloat16)")
    for device in {tensor.device.type for tensor in tensors}:
        if device != "cuda" and not INTERPRETED:
            reasons.append(f"{device} tensors (takes cuda)")
    return reasons


@dataclasses.dataclass(frozen=True)
class Constant:
    """A kernel argument that is known at compile time."""

    value: Any


@dataclasses.dataclass(frozen=True)
class AheadOfTimeCase:
    """One specialisation of a kernel that tools/compile_triton.py compiles without a GPU.

    arguments maps every parameter of the kernel to a `Constant` or to Triton's name of its type:
    "*bf16", "i32", "fp32", with ":16" behind it where address or value is a multiple of 16.
    """

    name: str
    kernel: Any
    arguments: dict[str, Constant | str]
    num_warps: int
    num_stages: int = 3
