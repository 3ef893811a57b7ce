"""Which kernels ran on a GPU as they are now, and which changed since.

    python tools/verification.py [--table]

bench/results/<gpu>.json records, for each kernel unit, the digest of its sources when its tests passed
on that GPU. Prints a line for each unit; --table prints the README's column.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def kernel_units() -> dict[str, list[Path]]:
    """Each hand-written or Triton kernel unit with the files of its own family that it is made of."""
    units = {}
    for unit in sorted((ROOT / "csrc").glob("*/*.cu")):
        # What the CPU's units alone are made of ends in _cpu.h.
        headers = [path for path in unit.parent.glob("*.h") if not path.name.endswith("_cpu.h")]
        files = [unit, *sorted([*unit.parent.glob("*.cuh"), *headers])]
        units[str(unit.relative_to(ROOT))] = files
    for unit in sorted((ROOT / "triton_kernels").glob("*/*.py")):
        if unit.parent.name != "common":
            units[str(unit.relative_to(ROOT))] = [unit]
    return units


def digest(files: list[Path]) -> str:
    state = hashlib.sha256()
    for path in files:
        state.update(path.name.encode() + path.read_bytes())
    return state.hexdigest()[:16]


def state_of(unit: str, files: list[Path]) -> str:
    """'verified on GPU, DATE', 'changed since GPU, DATE' or 'executed on CPU only'."""
    now, changed = digest(files), ""
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        record = json.loads(path.read_text()).get("verified", {}).get(unit)
        if record is None:
            continue
        if record["digest"] == now:
            return f"verified on {record['gpu']}, {record['date']}"
        changed = f"changed since {record['gpu']}, {record['date']}"
    return changed or "executed on CPU only"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--table", action="store_true", help="as Markdown")
    options = parser.parse_args()
    for unit, files in kernel_units().items():
        state = state_of(unit, files)
        print(f"| `{unit}` | {state} |" if options.table else f"{unit}: {state}")


if __name__ == "__main__":
    main()
