"""`make abi-check`: the binary built here, under the oldest and the newest supported torch.

For each version: a fresh environment with the CUDA build of torch, and this checkout's package beside it;
then the CUDA ops are listed as registered and the CPU path runs. Downloads a few GB a version.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("2.11.0", "2.15.0")

PROBE = """
import torch, warploom
from warploom._library import OPS
from warploom.ops.norm import rms_norm
from warploom.ops.attention import attention
from warploom import _backends
assert not _backends.unavailable("cpu", "cpu"), _backends.unavailable("cpu", "cpu")
has = torch._C._dispatch_has_kernel_for_dispatch_key
ops = [name for name, op in OPS.items() if "cuda" in op.overloads]
cuda = [name for name in ops if has(f"warploom::{name}.cuda", "CUDA")]
print(f"torch {torch.__version__}: CUDA ops registered: {', '.join(cuda)}")
x, w = torch.randn(5, 96), torch.randn(96)
torch.testing.assert_close(rms_norm(x, w, backend="cpu"), rms_norm(x, w, backend="reference"))
large = torch.randn(1024, 1024)
torch.testing.assert_close(rms_norm(large, backend="cpu"), rms_norm(large, backend="reference"))
q = torch.randn(2, 32, 4, 64, requires_grad=True)
attention(q, q, q, causal=True, backend="cpu").sum().backward()
assert torch.isfinite(q.grad).all()
assert cuda == ops, set(ops) - set(cuda)
print(f"torch {torch.__version__}: CPU path agrees with the reference")
"""


def headers_refuse(environment: Path) -> int:
    """Compile the seam against that torch's own headers: users build with the torch they have."""
    include = next(environment.glob("lib/python*/site-packages/torch/include"))
    flags = ["-std=c++20", "-fsyntax-only", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-Icsrc"]
    sources = ["csrc/common/parallel.cpp", *sorted(map(str, (ROOT / "csrc").glob("*/*_ops.cpp")))]
    command = ["g++", *flags, "-DWARPLOOM_WITH_CUDA", "-isystem", str(include)]
    return max(subprocess.run([*command, source], cwd=ROOT).returncode for source in sources)


def check(version: str, scratch: Path) -> int:
    """A fresh environment with that torch and all it needs; the package is copied beside it."""
    environment = scratch / version
    python = environment / "bin" / "python"
    if not (environment / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, f"torch=={version}", "numpy"], check=True)
        (environment / "ready").touch()
    if headers_refuse(environment):
        return 1
    package = scratch / f"package-{version}"
    shutil.rmtree(package, ignore_errors=True)
    skipped = shutil.ignore_patterns("_simt*", "__pycache__")
    shutil.copytree(ROOT / "python" / "warploom", package / "warploom", ignore=skipped)
    variables = {**os.environ, "PYTHONPATH": str(package)}
    variables.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [str(python), "-W", "ignore", "-c", PROBE], env=variables, cwd=package
    ).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("versions", nargs="*", default=list(VERSIONS))
    parser.add_argument("--keep", type=Path, help="a folder for the environments, to be used again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = options.keep or Path(temporary)
        codes = [check(version, scratch.resolve()) for version in options.versions]
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
