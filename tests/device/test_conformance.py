"""Each primitive of the dialect on a real GPU, against the host executor and against numpy.

The kernels of `primitives.cuh` are compiled twice through `conformance.cu`: by nvcc for this
machine's GPU and by g++ for the executor. This is the only check of the PTX wrappers themselves.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.simt.executor import ROOT, KernelFailure, KernelLibrary, build, digest_of_sources
from tests.simt.primitives import CASES, case_named

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.xdist_group("device"),
]


def build_for_gpu(folder: Path) -> Path:
    """conformance.cu compiled by nvcc for the GPU that is there."""
    major, minor = torch.cuda.get_device_capability()
    suffix = "a" if (major, minor) == (9, 0) else ""
    library = folder / f"conformance_sm_{major}{minor}{suffix}_{digest_of_sources()}.so"
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    finished = subprocess.run(
        [
            nvcc, "-std=c++20", "-O3", f"-arch=sm_{major}{minor}{suffix}", "-Xcompiler=-fPIC",
            "-shared", str(ROOT / "tests/device/conformance.cu"), "-o", str(library),
        ],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    return library


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> KernelLibrary:
    return KernelLibrary(build_for_gpu(tmp_path_factory.mktemp("conformance")))


@pytest.fixture(scope="module")
def executor() -> KernelLibrary:
    return KernelLibrary(build("plain"))


@pytest.mark.parametrize("key", CASES, ids="-".join)
def test_gpu_and_executor_agree(
    gpu: KernelLibrary, executor: KernelLibrary, key: tuple[str, str]
) -> None:
    case = case_named(key)
    on_gpu = gpu.run_primitive(key[0], case.a, case.b, case.out, case.argument)
    case.verify(on_gpu)
    on_host = executor.run_primitive(key[0], case.a, case.b, case.out, case.argument)
    case.verify(on_host)
    if case.tolerance == 0.0:
        np.testing.assert_array_equal(on_gpu.view(np.uint8), on_host.view(np.uint8))
    elif case.tolerance is not None:
        finite = np.isfinite(on_host)
        np.testing.assert_array_equal(on_gpu[~finite], on_host[~finite])
        scale = np.broadcast_to(case.scale, on_host.shape)[finite]
        difference = np.abs(on_gpu[finite].astype(np.float64) - on_host[finite])
        assert np.all(difference <= 2 * case.tolerance * scale)


def test_launch_error_names_kernel_and_cuda_error(gpu: KernelLibrary) -> None:
    nothing = np.zeros(4, np.uint8)
    with pytest.raises(KernelFailure, match=r"indices.*cudaErrorInvalid.*2048 threads"):
        gpu.run_primitive("refused_launch", nothing, nothing, nothing, 0)
