"""`make device STAGE=...`: what a machine with a GPU is for, in stages that end inside 9 minutes each.

    build        build the extension and the host executor in place, for this GPU alone
    conformance  every primitive of the dialect on the GPU against its host twin
    test         the families' tests on the GPU; records the digest of each kernel that passed
    bench        the benches against their floors and peers
    all          these, one after the other

Uses python3 as it is: makes no environment, downloads nothing. Results go to bench/results/<gpu>.json as
each stage ends, so that a stage that is cut off loses only itself.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from verification import digest, kernel_units  # noqa: E402

STAGE_SECONDS = 530
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


def test(name: str, stamp: dict[str, str]) -> int:
    """One run a family, so that one family's failure hides no other's success."""
    codes = []
    for family in FAMILIES:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"tests/{family}",
        ]
        codes.append(run(command))
        if codes[-1] == 0:
            passed = {
                unit: {"digest": digest(files), **stamp}
                for unit, files in kernel_units().items()
                if f"/{family}/" in unit
            }
            record(name, "verified", passed)
    codes.append(
        run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                "tests/test_every_op.py",
            ]
        )
    )
    return max(codes)


def bench(name: str) -> int:
    output = str(results_file(name).with_suffix(""))
    return run([sys.executable, "-m", "bench", "--device", "cuda", "--output", output])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    stages = ("build", "conformance", "test", "bench", "all")
    parser.add_argument("stage", choices=stages, nargs="?", default="all")
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
    actions = {
        "build": lambda: build(name, capability),
        "conformance": lambda: conformance(name, stamp),
        "test": lambda: test(name, stamp),
        "bench": lambda: bench(name),
    }
    wanted = actions if stage == "all" else [stage]
    codes = {each: actions[each]() for each in wanted}
    for each, code in codes.items():
        print(f"make device: {each}: {'passed' if code == 0 else f'failed ({code})'}")
    sys.exit(max(codes.values()))


if __name__ == "__main__":
    main()
