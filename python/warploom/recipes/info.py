"""What this installation is made of, and what would serve each op on this machine."""

from __future__ import annotations

import json
import platform
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import warploom
from warploom import _backends
from warploom._library import OPS
from warploom.recipes._extras import make_console, require
from warploom.recipes.op_cases import CASES, OpCase
from warploom.recipes.op_table import chosen_backends

_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors")


def print_info() -> None:
    """Print versions, devices, backends, the compiled kernels, and the backend of every op."""
    console = make_console()
    console.print(_table("", ["", ""], _versions(), show_header=False))
    for device in devices():
        rows = [
            [name, _backends.unavailable(name, device) or "ready"] for name in warploom.BACKENDS
        ]
        console.print(_table(f"Backends for {device} tensors", ["backend", "state"], rows))
    kernels = kernel_table()
    if kernels:
        architectures = sorted({str(kernel.get("architecture", "?")) for kernel in kernels})
        fields = list(dict.fromkeys(name for kernel in kernels for name in kernel))
        rows = [[str(kernel.get(name, "")) for name in fields] for kernel in kernels]
        title = f"CUDA kernels, compiled for {', '.join(architectures)}"
        console.print(_table(title, fields, rows))
    else:
        console.print("CUDA kernels: none compiled into this installation")
    for device in devices():
        rows = [list(serving(case, device)) for case in CASES]
        columns = ["op", "forward", "backward", "refused by"]
        console.print(_table(f"What serves float32 {device} tensors", columns, rows))


def devices() -> list[str]:
    """The device types that are here."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def kernel_table() -> list[dict[str, Any]]:
    """The compiled CUDA kernels with their resources; empty where the extension is not built."""
    try:
        report = torch.ops.warploom.kernel_table()
    except (AttributeError, NotImplementedError):
        return []
    kernels: list[dict[str, Any]] = json.loads(report)
    return kernels


def serving(case: OpCase, device: str) -> tuple[str, str, str, str]:
    """An op's name, the backends of its forward and backward, and what else was refused and why.

    Backends that cannot serve any tensor of that device are left out of the refusals.
    """
    arguments = tuple(
        value.to(device) if isinstance(value, torch.Tensor) else value
        for value in case.make(8, torch.float32)
    )
    refusals = []
    for backend in warploom.BACKENDS:
        if not _backends.unavailable(backend, device):
            reasons = OPS[case.op].why_not(backend, *arguments)
            refusals += [f"{backend}: {reason}" for reason in reasons]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table says what falls back, and why
        forward, backward = chosen_backends(case, arguments)
    return case.name, forward, backward, "\n".join(refusals)


def _versions() -> list[list[str]]:
    rows = [["warploom", warploom.__version__], ["python", platform.python_version()]]
    for package in _PACKAGES:
        try:
            rows.append([package, version(package)])
        except PackageNotFoundError:
            rows.append([package, "not installed"])
    capability = torch.backends.cpu.get_cpu_capability()
    rows.append(["cpu", f"{capability}, {torch.get_num_threads()} threads"])
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        rows.append([f"cuda:{index}", f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})"])
    return rows


def _table(title: str, columns: list[str], rows: list[list[str]], **options: Any) -> Any:
    table = require("rich.table").Table(title=title, title_justify="left", **options)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(require("rich.markup").escape(cell) for cell in row))
    return table
