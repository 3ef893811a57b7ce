"""Compiles every Triton kernel ahead of time, for several architectures, without a GPU.

Prints one row per kernel, specialisation and architecture, with what ptxas made of it, and fails if
one does not compile. Runs in a process of its own: with TRITON_INTERPRET set there is no compiler.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNEL_ROOT = ROOT / "triton_kernels"
PACKAGE = "warploom.triton_kernels"


def module_names() -> list[str]:
    """The modules that have ahead-of-time cases."""
    return [
        ".".join((PACKAGE, *path.relative_to(KERNEL_ROOT).with_suffix("").parts))
        for path in sorted(KERNEL_ROOT.rglob("*.py"))
        if "def aot_cases" in path.read_text()
    ]


def resources(cubin: bytes) -> str:
    """Registers, stack and shared memory as cuobjdump states them; '-' without that tool."""
    import triton

    try:
        cuobjdump = triton.knobs.nvidia.cuobjdump.path
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            command = [cuobjdump, "-res-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (RuntimeError, OSError, subprocess.CalledProcessError):
        return "-"
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return " ".join(
        f"{key.lower()}={found[key]}" for key in ("REG", "STACK", "LOCAL") if key in found
    )


def compile_case(module_name: str, index: int, architecture: int) -> tuple[str, str]:
    """Compiles one case -> (the row to print, the error or '')."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch = importlib.import_module(f"{PACKAGE}.common.launch")
    case = importlib.import_module(module_name).aot_cases()[index]
    title = f"{case.kernel.__name__.strip('_'):34} {case.name:28} sm_{architecture:<4}"
    missing = set(case.kernel.arg_names) ^ set(case.arguments)
    if missing:
        return title, f"arguments and parameters differ: {sorted(missing)}"

    signature: dict[str, str] = {}
    constants: dict[str, object] = {}
    attributes: dict[tuple[int], list[list[object]]] = {}
    for position, name in enumerate(case.kernel.arg_names):
        argument = case.arguments[name]
        if isinstance(argument, launch.Constant):
            signature[name] = "constexpr"
            constants[name] = argument.value
        else:
            signature[name], _, divisor = argument.partition(":")
            if divisor:
                attributes[(position,)] = [["tt.divisibility", int(divisor)]]
    began = time.perf_counter()
    try:
        compiled = triton.compile(
            ASTSource(case.kernel, signature, constants, attributes),
            target=GPUTarget("cuda", architecture, 32),
            options={
                "num_warps": case.num_warps,
                "num_stages": case.num_stages,
                **launch.COMPILE_OPTIONS,
            },
        )
    except Exception as error:
        return title, f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - began
    used = f"{resources(compiled.asm['cubin']):28} shared={compiled.metadata.shared:<7}"
    return f"{title} {used} {seconds:.1f} s", ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--architectures", default="80,90,100", help="comma-separated, as 80 for sm_80"
    )
    parser.add_argument(
        "--only", default="", help="compile only the modules whose name contains this"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "python"))

    import triton

    if triton.knobs.runtime.interpret:
        print(
            "compile_triton: TRITON_INTERPRET is set, there is nothing to compile", file=sys.stderr
        )
        return 2

    tasks = [
        (module_name, index, int(architecture))
        for module_name in module_names()
        if arguments.only in module_name
        for index in range(len(importlib.import_module(module_name).aot_cases()))
        for architecture in arguments.architectures.split(",")
    ]
    began = time.perf_counter()
    failures = 0
    # A fresh cache, so that the times and the compilation itself are real.
    with tempfile.TemporaryDirectory() as cache:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(
            arguments.jobs, context, initializer=_start_worker, initargs=(list(sys.path), cache)
        ) as pool:
            for row, error in pool.map(compile_case, *zip(*tasks, strict=True)):
                print(f"{row} FAILED {error}" if error else row, flush=True)
                failures += bool(error)
    seconds = time.perf_counter() - began
    print(f"triton {triton.__version__}: {len(tasks)} compiled, {failures} failed, {seconds:.0f} s")
    return 1 if failures or not tasks else 0


def _start_worker(path: list[str], cache: str) -> None:
    import triton

    sys.path[:] = path
    triton.knobs.cache.dir = cache


if __name__ == "__main__":
    sys.exit(main())
