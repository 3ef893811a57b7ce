from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from tests.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two processes on the CPU."""
    if not dist.is_available():
        pytest.skip("torch without torch.distributed")
    members = Ranks(2, tmp_path_factory.mktemp("distributed"))
    yield members
    members.close()
