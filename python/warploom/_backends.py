"""Which backends there are, which are present, and which one a caller asked for."""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from warploom import env

#: Every backend, in the order in which they are listed to a user.
BACKENDS = ("cuda", "triton", "cpu", "reference", "simt", "simt_instrumented")

#: What is tried, in this order, when no backend is named. `simt` runs only when it is named.
AUTOMATIC = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}

#: Backends whose implementations live in a compiled module of the package.
_MODULES = {
    "cpu": "warploom._C",
    "cuda": "warploom._C",
    "simt": "warploom._simt",
    "simt_instrumented": "warploom._simt_instrumented",
}

_FLOATING = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = {
    "reference": (*_FLOATING, torch.float64),
    "cpu": (*_FLOATING, torch.float64),
    "triton": _FLOATING,
    "cuda": _FLOATING,
    "simt": _FLOATING,
    "simt_instrumented": _FLOATING,
}


@functools.cache
def _load(module: str) -> tuple[ModuleType | None, str]:
    """Import a compiled module; loading it registers its implementations with the dispatcher."""
    try:
        return importlib.import_module(module), ""
    except ModuleNotFoundError as error:
        if error.name != module:
            return None, f"{module} cannot be imported: {error}"
        hint = "run `make build` in a source checkout"
        if module == "warploom._C":
            hint = "install warploom with pip, or " + hint
        return None, f"{module} is not built: {hint}"
    except ImportError as error:
        return None, f"{module} cannot be loaded: {error}"


@functools.cache
def _triton_unavailable() -> str:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    return ""


@functools.cache
def triton_interprets() -> bool:
    """True when Triton runs kernels in its interpreter (TRITON_INTERPRET=1), on the CPU."""
    if _triton_unavailable():
        return False
    knobs = importlib.import_module("triton").knobs
    return bool(knobs.runtime.interpret)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def unavailable(backend: str, device_type: str) -> str:
    """Why `backend` cannot serve tensors of `device_type` on this machine, or "".

    A constant of the process: a graph being traced takes the answer and not the question.
    """
    return _unavailable(backend, device_type)


@functools.cache
def _unavailable(backend: str, device_type: str) -> str:
    if backend == "triton":
        if reason := _triton_unavailable():
            return reason
        if device_type == "cpu":
            interprets = triton_interprets()
            return "" if interprets else "CPU tensors need Triton's interpreter: TRITON_INTERPRET=1"
        return "" if device_type == "cuda" else f"no {device_type} tensors, only cuda"
    if backend in ("cpu", "simt", "simt_instrumented") and device_type != "cpu":
        return f"no {device_type} tensors, only cpu"
    if backend == "cuda" and device_type != "cuda":
        return f"no {device_type} tensors, only cuda"
    if backend in _MODULES:
        module, reason = _load(_MODULES[backend])
        if module is None:
            return reason
        if backend == "cuda" and not getattr(module, "has_cuda", True):
            return (
                "warploom._C was built without CUDA kernels: nvcc was not found, or WARPLOOM_CUDA=0"
            )
    return ""


def load_extensions() -> None:
    """Load the extension if it is there, so that its implementations are registered."""
    _load("warploom._C")


class _Selection(threading.local):
    backend: str | None = env.DEFAULT_BACKEND


_selection = _Selection()


def selected_backend() -> str | None:
    """The backend set by `use_backend` in this thread, or the environment's, or None."""
    return _selection.backend


def check_backend(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Serve every call of this thread inside the block with backend `name` (None: automatic).

    A call's own `backend=` argument comes first. A backend that cannot serve a call raises.
    """
    if name is not None:
        check_backend(name)
    before = _selection.backend
    _selection.backend = name
    try:
        yield
    finally:
        _selection.backend = before
