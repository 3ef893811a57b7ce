from __future__ import annotations

import pytest

from tests.simt.executor import MODES, KernelLibrary, build


@pytest.fixture(scope="session", params=MODES)
def library(request: pytest.FixtureRequest) -> KernelLibrary:
    """The test kernels under the host executor, once with and once without instrumentation."""
    return KernelLibrary(build(request.param))
