"""The backends that a test runs on here, and how much of a grid each can afford."""

from __future__ import annotations

import pytest
import torch
from warploom import _backends

from tests.conftest import HAS_GPU

#: Executed on the CPU: the kernels of every backend, the CUDA ones through the host executor.
ON_CPU = ["reference", "cpu", "triton", "simt", "simt_instrumented"]
#: The same names on a machine with a GPU, where Triton compiles instead of interpreting.
ON_GPU = ["cuda", "triton"]

BACKENDS = ON_GPU if HAS_GPU else ON_CPU
DEVICE = "cuda" if HAS_GPU else "cpu"
# Loads the module of each: some tests call overloads by name.
for _backend in BACKENDS:
    _backends.unavailable(_backend, DEVICE)
#: Triton's interpreter: one program after the other, a thousand times slower than a kernel.
INTERPRETED = () if HAS_GPU else ("triton",)
#: Interpreted or instrumented: a case costs a hundred times a native one.
SLOW_BACKENDS = ("triton", "simt", "simt_instrumented")
#: Backends whose sums may take another order for other strides: Triton compiles for what divides them.
ORDER_FOLLOWS_STRIDES = ("reference", "triton") if HAS_GPU else ("reference",)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "float16"])
