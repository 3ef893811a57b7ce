"""Set before torch or triton is imported: Triton's interpreter runs the kernels where no GPU is."""

from __future__ import annotations

import json
import os
from pathlib import Path

#: `make device` sets WARPLOOM_TEST_DEVICE=cuda: then a GPU that torch cannot see is a failure.
GPU_REQUIRED = os.environ.get("WARPLOOM_TEST_DEVICE") == "cuda"
HAS_GPU = GPU_REQUIRED or (
    any(Path("/dev").glob("nvidia[0-9]*")) and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
)
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
#: `make device` sets WARPLOOM_TEST_LOG: each result goes there at once, a line of JSON, so that a run
#: that is cut off loses only what it had not reached.
TEST_LOG = os.environ.get("WARPLOOM_TEST_LOG")
#: pytest-xdist's name of this process; None where it is the one that reports.
WORKER = os.environ.get("PYTEST_XDIST_WORKER")

import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_configure() -> None:
    if GPU_REQUIRED and not torch.cuda.is_available():
        pytest.exit("WARPLOOM_TEST_DEVICE=cuda, but torch sees no CUDA device", returncode=2)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20240917)


def _log(test: str, outcome: str, detail: str, seconds: float) -> None:
    entry = {"test": test, "outcome": outcome, "seconds": round(seconds, 2), "detail": detail}
    with open(str(TEST_LOG), "a") as log:
        log.write(json.dumps(entry) + "\n")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Runs in the process that reports, which with pytest-xdist is not the one that tests."""
    if TEST_LOG and not WORKER and (report.when == "call" or report.outcome != "passed"):
        _log(report.nodeid, report.outcome, report.longreprtext[-3000:], report.duration)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """With pytest-xdist every process collects: the first one's failures stand for all."""
    if TEST_LOG and report.failed and WORKER in (None, "gw0"):
        _log(report.nodeid, "not collected", report.longreprtext[-3000:], 0.0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """A kernel that faults leaves its process without CUDA: the process ends, or every later test fails.

    pytest-xdist puts another in its place and reports the test as the one that crashed it.
    """
    if not GPU_REQUIRED:
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if TEST_LOG:
            _log(item.nodeid, "fault", str(error)[:500], 0.0)
        os._exit(3)
