"""Turns ptxas reports into the table of kernels that the extension carries.

    python tools/kernel_table.py --output kernel_table.cpp unit.o ...

Reads UNIT.log beside each object, where the build left what `ptxas -v` said, and writes a C++ unit
that registers `warploom::kernel_table() -> str`: a JSON list of
{"name", "architecture", "registers", "spill_bytes", "stack_bytes", "static_shared_bytes"}.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from pathlib import Path
from typing import Any

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def parse_report(text: str) -> list[dict[str, Any]]:
    """The kernels of one `ptxas -v` report, in its order; names are mangled."""
    kernels: list[dict[str, Any]] = []
    for line in text.splitlines():
        if entry := _ENTRY.search(line):
            kernels.append(
                {
                    "name": entry[1],
                    "architecture": entry[2],
                    "registers": 0,
                    "spill_bytes": 0,
                    "stack_bytes": 0,
                    "static_shared_bytes": 0,
                }
            )
        elif kernels and (spills := _SPILLS.search(line)):
            kernels[-1]["stack_bytes"] = int(spills[1])
            kernels[-1]["spill_bytes"] = int(spills[2]) + int(spills[3])
        elif kernels and (used := _USED.search(line)):
            kernels[-1]["registers"] = int(used[1])
            if shared := _SHARED.search(line):
                kernels[-1]["static_shared_bytes"] = int(shared[1])
    return kernels


def demangle(kernels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give every kernel its C++ name without the parameter list."""
    if not kernels:
        return kernels
    names = "\n".join(kernel["name"] for kernel in kernels)
    filtered = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True)
    for kernel, name in zip(kernels, filtered.stdout.splitlines()):
        name = (
            name.removeprefix("void ")
            .replace("warploom::", "")
            .replace("(anonymous namespace)::", "")
        )
        kernel["name"] = re.sub(r"\([^()]*\)$", "", name)
    return kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("objects", type=Path, nargs="*")
    options = parser.parse_args()
    kernels = []
    for unit in options.objects:
        kernels += parse_report(Path(f"{unit}.log").read_text())
    text = json.dumps(demangle(kernels))
    # String literals are limited to 64 KiB by some compilers: one literal a piece.
    pieces = "\n".join(
        f'    R"json({text[start : start + 8000]})json"' for start in range(0, len(text), 8000)
    )
    options.output.write_text(
        "// Written by tools/kernel_table.py.\n"
        "#include <torch/csrc/stable/library.h>\n\n#include <string>\n\n"
        "namespace {\n\n"
        f"const char* const kTable =\n{pieces};\n\n"
        "std::string kernel_table() { return kTable; }\n\n"
        "STABLE_TORCH_LIBRARY_IMPL(warploom, CompositeExplicitAutograd, library) {\n"
        '    library.impl("kernel_table", TORCH_BOX(&kernel_table));\n'
        "}\n\n}  // namespace\n"
    )


if __name__ == "__main__":
    main()
