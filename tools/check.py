"""`make check`: style, types, layering, kernel budgets, ahead-of-time compilation of Triton kernels."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CXX_SUFFIXES = (".h", ".cuh", ".cu", ".cpp", ".c")


def cxx_files() -> list[str]:
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "csrc", "tests"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in listing.stdout.splitlines() if name.endswith(CXX_SUFFIXES)]


def main() -> None:
    python, scripts = sys.executable, sysconfig.get_path("scripts")
    steps = {
        "ruff check": [python, "-m", "ruff", "check", "."],
        "ruff format": [python, "-m", "ruff", "format", "--check", "."],
        "mypy": [python, "-m", "mypy"],
        "clang-format": [f"{scripts}/clang-format", "--dry-run", "-Werror", *cxx_files()],
        "layering": [python, "-m", "pytest", "-q", "tests/test_layering.py"],
        "kernel budgets": [python, "tools/check_kernels.py"],
        "Triton ahead of time": [python, "tools/compile_triton.py"],
        "verification state": [python, "tools/verification.py"],
    }
    failed = []
    for name, command in steps.items():
        start = time.monotonic()
        code = subprocess.run(command, cwd=ROOT).returncode
        seconds = time.monotonic() - start
        print(f"check: {name}: {'failed' if code else 'ok'} ({seconds:.0f} s)", flush=True)
        if code:
            failed.append(name)
    if failed:
        sys.exit(f"check: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
