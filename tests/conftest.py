"""Set before torch or triton is imported: Triton's interpreter runs the kernels where no GPU is."""

from __future__ import annotations

import os
from pathlib import Path

#: `make device` sets WARPLOOM_TEST_DEVICE=cuda: then a GPU that torch cannot see is a failure.
GPU_REQUIRED = os.environ.get("WARPLOOM_TEST_DEVICE") == "cuda"
HAS_GPU = GPU_REQUIRED or (
    any(Path("/dev").glob("nvidia[0-9]*")) and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
)
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_configure() -> None:
    if GPU_REQUIRED and not torch.cuda.is_available():
        pytest.exit("WARPLOOM_TEST_DEVICE=cuda, but torch sees no CUDA device", returncode=2)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20240917)
