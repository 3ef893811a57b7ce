"""Compiles every kernel unit for every supported architecture and holds it to its budget.

    python tools/check_kernels.py [--all] [--update]

csrc/resources.json is the committed table: per unit the digest of all that it is compiled from, its
CPU seconds, and per architecture the registers of each kernel. A unit whose digest has not changed is
taken from the table (--all compiles it nevertheless). Fails on any spill, on a register count over the
table's, on a unit or family over its budget of CPU seconds. --update writes the table anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from kernel_table import demangle, parse_report  # noqa: E402

CSRC = ROOT / "csrc"
TABLE = CSRC / "resources.json"
#: Every chip that the library supports has one of these; the default build holds two of them.
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
#: The compile-time budget: CPU seconds of all architectures, per family, twice what a fast CPU takes.
FAMILY_SECONDS = {
    "norm": 240, "rope": 120, "activation": 120, "grouped_linear": 200, "attention": 900, "mla": 600,
    "lora": 300, "vocab": 60, "coupling": 400, "spp": 300,
}  # fmt: skip


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    return f"{home}/bin/nvcc" if home else "nvcc"


def flags() -> list[str]:
    return ["-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-I{CSRC}", "-Xptxas=-v"]


def digest_of(unit: Path) -> str:
    """What a unit's machine code depends on: its files, the flags and the compiler's version."""
    listing = subprocess.run(
        [nvcc(), "-std=c++20", f"-I{CSRC}", "-M", str(unit)],
        capture_output=True,
        text=True,
        check=True,
    )
    files = sorted({path for path in re.findall(r"\S+", listing.stdout) if str(CSRC) in path})
    state = hashlib.sha256(" ".join(flags()[:3]).encode())
    version = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True)
    state.update(version.stdout.splitlines()[-1].encode())
    for name in files:
        path = Path(name).resolve()
        state.update(str(path.relative_to(CSRC)).encode() + path.read_bytes())
    return state.hexdigest()[:16]


def compile_unit(job: tuple[Path, str]) -> dict[str, dict[str, int]]:
    """Compile one unit for one architecture; registers, spills and stack of each kernel."""
    unit, architecture = job
    with tempfile.TemporaryDirectory() as scratch:
        command = [nvcc(), *flags(), f"-arch=sm_{architecture}", "-cubin", "-o", f"{scratch}/unit"]
        done = subprocess.run([*command, str(unit)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{unit.relative_to(ROOT)} for sm_{architecture}:\n{done.stderr}")
    kernels = demangle(parse_report(done.stderr))
    keys = ("registers", "spill_bytes", "stack_bytes")
    return {kernel["name"]: {key: kernel[key] for key in keys} for kernel in kernels}


def problems_of(unit: str, measured: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    found = []
    for architecture, kernels in measured.items():
        for name, used in kernels.items():
            where = f"{unit} sm_{architecture} {name}"
            if used["spill_bytes"]:
                found.append(f"{where}: {used['spill_bytes']} bytes of spills")
            budget = committed.get(architecture, {}).get(name)
            if budget and used["registers"] > budget["registers"]:
                found.append(
                    f"{where}: {used['registers']} registers, budget {budget['registers']}"
                )
    return found


def child_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--all", action="store_true", help="compile unchanged units too")
    parser.add_argument("--update", action="store_true", help="write csrc/resources.json")
    options = parser.parse_args()
    table: dict[str, Any] = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    fresh: dict[str, Any] = {}
    problems: list[str] = []
    for unit in sorted(CSRC.glob("*/*.cu")):
        name = str(unit.relative_to(CSRC))
        digest, committed = digest_of(unit), table.get(name, {})
        unchanged = committed.get("digest") == digest
        if unchanged and not options.all:
            print(f"{name}: unchanged since the committed table ({digest})")
            fresh[name] = committed
            problems += problems_of(name, committed["kernels"], committed["kernels"])
            continue
        wanted = ("90a",) if unit.stem.endswith("_sm90") else ARCHITECTURES
        before = child_seconds()
        with ThreadPoolExecutor(max_workers=2) as pool:
            results = list(
                pool.map(compile_unit, [(unit, architecture) for architecture in wanted])
            )
        seconds = child_seconds() - before
        measured = dict(zip(wanted, results))
        worst = max(used["registers"] for kernels in results for used in kernels.values())
        print(f"{name}: {len(results[0])} kernels, up to {worst} registers, {seconds:.0f} CPU s")
        problems += problems_of(
            name, measured, {} if options.update else committed.get("kernels", {})
        )
        if not options.update and not committed:
            problems.append(
                f"{name}: not in csrc/resources.json: python tools/check_kernels.py --update"
            )
        fresh[name] = {"digest": digest, "cpu_seconds": round(seconds), "kernels": measured}
    for family, budget in FAMILY_SECONDS.items():
        spent = sum(
            unit["cpu_seconds"] for name, unit in fresh.items() if name.startswith(f"{family}/")
        )
        if spent > budget:
            problems.append(f"family {family}: {spent} CPU s to compile, budget {budget}")
    if options.update:
        TABLE.write_text(json.dumps(fresh, indent=1, sort_keys=True) + "\n")
    for problem in problems:
        print(f"error: {problem}")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
