"""`make device STAGE=...`: what a machine with a GPU is for, in stages that end inside 9 minutes each.

    build        build the extension and the host executor in place, for this GPU alone
    conformance  every primitive of the dialect on the GPU against its host twin
    test         the families' tests on the GPU, hand-written kernels (test-csrc) and Triton's
                 (test-triton_kernels); records the digest of each kernel whose family passed
    bench        the benches against their floors and peers
    all          these, one after the other

Uses python3 as it is: makes no environment, downloads nothing. Results go to bench/results/<gpu>.json as
each stage ends, so that a stage that is cut off loses only itself.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from verification import digest, kernel_units  # noqa: E402

#: Seconds after which a stage is stopped; WARPLOOM_STAGE_SECONDS where there is less time.
STAGE_SECONDS = int(os.environ.get("WARPLOOM_STAGE_SECONDS", "530"))
#: The two kinds of kernel units, by their folders.
BACKENDS = ("csrc", "triton_kernels")
FAMILIES = (
    "norm", "rope", "activation", "grouped_linear", "attention", "mla", "lora", "vocab", "coupling", "spp",
)  # fmt: skip


def gpu() -> tuple[str, str, str]:
    """Name, compute capability and driver of the first GPU; exits where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"make device: needs a machine with an NVIDIA GPU (nvidia-smi: {error})")
    name, capability, driver = (part.strip() for part in listing.splitlines()[0].split(","))
    return name, capability, driver


def results_file(name: str) -> Path:
    return (
        ROOT / "bench" / "results" / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    )


def record(name: str, section: str, entry: dict[str, Any]) -> None:
    """Merge `entry` into a section of the GPU's results, replacing the file in one step."""
    path = results_file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {}
    results.setdefault(section, {}).update(entry)
    scratch = path.with_suffix(".new")
    scratch.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    scratch.replace(path)


def run(command: list[str], **environment: str) -> int:
    variables = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "python"),
        "WARPLOOM_TEST_DEVICE": "cuda",
        **environment,
    }
    print("$", " ".join(command), flush=True)
    try:
        return subprocess.run(command, cwd=ROOT, env=variables, timeout=STAGE_SECONDS).returncode
    except subprocess.TimeoutExpired:
        print(f"make device: stopped after {STAGE_SECONDS} s", flush=True)
        return 124


def build(name: str, capability: str) -> int:
    architecture = f"{capability}a" if capability.startswith("9") else capability
    return run(
        [sys.executable, "setup.py", "build_ext", "--inplace"], TORCH_CUDA_ARCH_LIST=architecture
    )


def conformance(name: str, stamp: dict[str, str]) -> int:
    code = run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/device"]
    )
    record(name, "conformance", {"passed": code == 0, **stamp})
    return code


def parallel() -> list[str]:
    """pytest's options for several processes on one GPU, and an end for a kernel that hangs."""
    options = []
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(min(16, os.cpu_count() or 1)), "--dist", "loadgroup"]
        options += ["--max-worker-restart", "200"]
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout", "120", "--timeout-method", "thread"]
    return options


def failures(log: Path) -> list[dict[str, str]]:
    """The entries of a log (tests/conftest.py) that failed; prints those for want of a peer's package."""
    entries = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    failed = []
    for entry in entries:
        missing = re.search(
            r"ModuleNotFoundError: No module named '(?!warploom)(\w+)", entry["detail"]
        )
        if missing and entry["outcome"] != "passed":
            print(f"make device: not run, {missing[1]} is missing: {entry['test']}")
        elif entry["outcome"] not in ("passed", "skipped"):
            failed.append(entry)
    return failed


def family_of(test: str) -> str:
    """tests/norm/..., tests/triton/test_triton_norm.py::... -> norm."""
    match = re.match(r"tests/(?:triton/test_triton_)?(\w+)", test)
    family = match[1] if match else ""
    return {"decode": "attention"}.get(family, family)


def test(name: str, stamp: dict[str, str], backends: tuple[str, ...] = BACKENDS) -> int:
    """The families' tests, a run for each kind of kernel: a unit is verified when its family's all pass."""
    folders = [f"tests/{family}" for family in FAMILIES]
    codes = []
    for backend in backends:
        log = ROOT / "build" / f"device_{backend}.jsonl"
        log.parent.mkdir(exist_ok=True)
        log.unlink(missing_ok=True)
        triton = backend == "triton_kernels"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *parallel()]
        command += ["--tb=short", "--continue-on-collection-errors", "--no-header"]
        command += ["-k", "triton" if triton else "not triton", *folders, "tests/test_every_op.py"]
        codes.append(
            run([*command, *(["tests/triton"] if triton else [])], WARPLOOM_TEST_LOG=str(log))
        )
        failed = sorted({family_of(entry["test"]) for entry in failures(log)})
        print(f"make device: {backend}: failures in {', '.join(failed) or 'no family'}", flush=True)
        if codes[-1] in (0, 1):  # pytest ran to its end
            passed = {
                unit: {"digest": digest(files), **stamp}
                for unit, files in kernel_units().items()
                if unit.startswith(f"{backend}/") and unit.split("/")[1] not in failed
            }
            record(name, "verified", passed)
    return max(codes)


def bench(name: str) -> int:
    output = str(results_file(name).with_suffix(""))
    seconds = str(STAGE_SECONDS - 30)
    command = [sys.executable, "-m", "bench", "--device", "cuda", "--output", output]
    return run([*command, "--rounds", "9", "--seconds", seconds])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    stages = ("build", "conformance", "test", "bench")
    parts = tuple(f"test-{backend}" for backend in BACKENDS)
    parser.add_argument("stage", choices=(*stages, *parts, "all"), nargs="?", default="all")
    stage = parser.parse_args().stage
    name, capability, driver = gpu()
    # Only metadata: importing torch here would start CUDA before the stages do.
    from importlib.metadata import version

    stamp = {
        "gpu": name,
        "date": datetime.date.today().isoformat(),
        "driver": driver,
        "torch": version("torch"),
    }
    actions: dict[str, Callable[[], int]] = {
        "build": partial(build, name, capability),
        "conformance": partial(conformance, name, stamp),
        "test": partial(test, name, stamp),
        "bench": partial(bench, name),
        **{f"test-{each}": partial(test, name, stamp, (each,)) for each in BACKENDS},
    }
    wanted = stages if stage == "all" else (stage,)
    codes = {each: actions[each]() for each in wanted}
    for each, code in codes.items():
        print(f"make device: {each}: {'passed' if code == 0 else f'failed ({code})'}")
    sys.exit(max(codes.values()))


if __name__ == "__main__":
    main()
