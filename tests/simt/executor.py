"""Builds test kernels with the host compiler against `csrc/device/simt` and runs them by ctypes.

`build(mode)` gives one shared library for a mode: the executor, `tests/device/conformance.cu` and
`tests/simt/kernels/seeded.cu`. Objects are kept under `build/simt_tests/<digest of the sources>`,
so that only changed sources cost time.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import shutil
import site
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SIMT = ROOT / "csrc" / "device" / "simt"
KERNELS = (ROOT / "tests/device/conformance.cu", ROOT / "tests/simt/kernels/seeded.cu")
HEADERS = ("csrc/device", "csrc/common", "tests/device", "tests/simt/kernels")

MODES = ("plain", "instrumented")
LANE_ORDERS = ("forward", "backward", "random")
ASYNC_POLICIES = ("late", "early", "random")

COMMON_FLAGS = ("-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
# Kernel units: debug information names the lines of plain loads and stores.
KERNEL_FLAGS = {
    "plain": ("-O1", "-x", "c++"),
    "instrumented": ("-O1", "-fsanitize=thread", "-x", "c++"),
}


def cuda_include() -> Path:
    """The directory of CUDA's type headers (cuda_bf16.h, vector_types.h)."""
    candidates = [Path("/usr/local/cuda/include")]
    nvcc = shutil.which("nvcc")
    if nvcc:
        candidates.append(Path(nvcc).resolve().parents[1] / "include")
    candidates += [Path(folder) / "nvidia/cu13/include" for folder in site.getsitepackages()]
    for candidate in candidates:
        if (candidate / "cuda_bf16.h").exists():
            return candidate
    raise RuntimeError(f"cuda_bf16.h: not found in any of {[str(path) for path in candidates]}")


def digest_of_sources() -> str:
    """Changes with any source, header or flag that the libraries are built from."""
    digest = hashlib.sha256(repr((COMMON_FLAGS, KERNEL_FLAGS)).encode())
    for folder in HEADERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in {".h", ".cuh", ".cu", ".cpp"}:
                digest.update(path.relative_to(ROOT).as_posix().encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def compile_object(source: Path, target: Path, flags: tuple[str, ...]) -> Path:
    if not target.exists():
        partial = target.with_suffix(".partial")
        command = [
            "g++", *COMMON_FLAGS, *flags, "-isystem", str(cuda_include()),
            "-c", str(source), "-o", str(partial),
        ]  # fmt: skip
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{finished.stderr}")
        partial.rename(target)
    return target


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """One builder at a time in `folder`, over all processes of a test run."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(mode: str) -> Path:
    """The shared library of a mode, built unless it is there."""
    folder = ROOT / "build" / "simt_tests" / digest_of_sources()
    library = folder / f"kernels_{mode}.so"
    with exclusive(folder):
        if library.exists():
            return library
        executor = [path for path in sorted(SIMT.glob("*.cpp")) if path.name != "bindings.cpp"]
        executor.append(ROOT / "tests/device/host_controls.cpp")
        jobs = [(path, folder / f"{path.stem}.o", ("-O2",)) for path in executor]
        jobs += [(path, folder / f"{path.stem}_{mode}.o", KERNEL_FLAGS[mode]) for path in KERNELS]
        with ThreadPoolExecutor(max_workers=2) as pool:
            futures = [pool.submit(compile_object, *job) for job in reversed(jobs)]
            objects = [future.result() for future in reversed(futures)]
        # The executor's objects come first: of a template that several objects hold the linker
        # keeps the first one, and the executor must not run those of the instrumented kernels. It
        # brings the entry points of -fsanitize=thread itself, so no sanitizer is linked.
        subprocess.run(["g++", "-shared", "-o", str(library), *map(str, objects)], check=True)
    return library


@dataclass(frozen=True)
class Schedule:
    """What the executor leaves to the test: the order of lanes, the moment of copies, a seed."""

    lane_order: str = "forward"
    async_policy: str = "late"
    seed: int = 0

    def __str__(self) -> str:
        return f"lanes {self.lane_order}, copies {self.async_policy}, seed {self.seed}"


def schedules() -> list[Schedule]:
    """Every lane order with every policy, two seeds where a seed matters."""
    result = []
    for lane_order in LANE_ORDERS:
        for async_policy in ASYNC_POLICIES:
            seeds = (1, 2) if "random" in (lane_order, async_policy) else (0,)
            result += [Schedule(lane_order, async_policy, seed) for seed in seeds]
    return result


#: Every lane order and every policy once, for launches that end in an error: naming a line costs.
FEW_SCHEDULES = (
    Schedule("forward", "late"),
    Schedule("backward", "early"),
    Schedule("random", "random", 1),
)


class KernelFailure(RuntimeError):
    """The text with which a launch failed."""


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


class KernelLibrary:
    """The C entry points of one shared library, built by g++ or by nvcc."""

    def __init__(self, path: Path | str) -> None:
        self.library = ctypes.CDLL(str(path))

    def call(self, entry: str, *arguments: object) -> None:
        error = ctypes.create_string_buffer(4096)
        size = ctypes.c_size_t(len(error))
        if getattr(self.library, entry)(*arguments, error, size) != 0:
            raise KernelFailure(error.value.decode())

    def set_schedule(self, schedule: Schedule) -> None:
        self.call(
            "set_controls",
            schedule.lane_order.encode(),
            schedule.async_policy.encode(),
            ctypes.c_uint64(schedule.seed),
        )

    def run_primitive(
        self, name: str, a: np.ndarray, b: np.ndarray, out: np.ndarray, argument: int
    ) -> np.ndarray:
        """What the primitive's kernel makes of `out`, which stays as it is."""
        result = out.copy()
        sized = [
            value
            for array in (a, b, result)
            for value in (pointer(array), ctypes.c_size_t(array.nbytes))
        ]
        self.call("run_primitive", name.encode(), *sized, ctypes.c_int(argument))
        return result

    def report(self, counter: str) -> int:
        """A counter of the last launch: bank_conflicts or barriers_passed."""
        entry = getattr(self.library, counter)
        entry.restype = ctypes.c_uint64
        return int(entry())

    def run_seeded(self, name: str, seeded: bool, values: np.ndarray) -> np.ndarray:
        """What the case's kernel writes for `values` (float32); unwritten places are 0."""
        out = np.zeros_like(values)
        self.call(
            "run_seeded",
            name.encode(),
            ctypes.c_int(seeded),
            pointer(values),
            pointer(out),
            ctypes.c_int(values.size),
        )
        return out
