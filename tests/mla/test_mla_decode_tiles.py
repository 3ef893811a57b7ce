"""The tiles and schedules that mla_decode's CUDA kernels choose by the device, on the host executor."""

from __future__ import annotations

import importlib

import pytest
import torch

from tests.conftest import HAS_GPU
from tests.mla.caches import Case, prepare

pytestmark = pytest.mark.skipif(HAS_GPU, reason="the executor's controls choose the device")
MODES = ["simt", "simt_instrumented"]
KIB = 1024


@pytest.fixture(params=MODES)
def backend(request):
    return request.param


@pytest.fixture
def executor(backend):
    module = importlib.import_module(f"warploom._{backend}")
    yield module
    module.reset()


@pytest.mark.parametrize(
    ("limit", "least"), [(99, 0), (163, 100), (227, 164)], ids=["99", "163", "227"]
)
@pytest.mark.parametrize("format", [None, torch.float8_e4m3fn, torch.int8], ids=str)
def test_every_shared_memory(executor, backend, limit, least, format):
    """40 heads: 3 tiles of 16 rows, or one of 64 that a device with more shared memory has."""
    executor.set_shared_memory_limit(limit * KIB)
    case = Case(
        (70, 3, 0, 129), queries=2, heads=20, page_size=16, format=format, options={"num_splits": 1}
    )
    call = prepare(case, torch.bfloat16)
    call.check(call.decode(backend))
    assert least * KIB <= executor.last_report()["shared_bytes"] <= limit * KIB


@pytest.mark.parametrize("format", [None, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_widest_rows(backend, dtype, format):
    case = Case((65, 20), heads=20, d_latent=512, d_rope=256, page_size=16, format=format)
    call = prepare(case, dtype)
    call.check(call.decode(backend))


@pytest.mark.parametrize("heads", [2, 64])
def test_many_sequences_share_the_parts(backend, heads):
    """More than a warp of the scheduler has lanes; long ones are cut, neighbours share a part."""
    lengths = [(0, 1, 5, 33, 64, 17)[index % 6] for index in range(70)]
    lengths[3], lengths[40], lengths[69] = 700, 450, 300
    call = prepare(Case(tuple(lengths), heads=heads, page_size=16), torch.bfloat16)
    call.check(call.decode(backend))


@pytest.mark.parametrize("order", ["backward", "random"])
@pytest.mark.parametrize("policy", ["early", "random"])
@pytest.mark.parametrize("format", [None, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_order_of_lanes_and_copies_matters(executor, backend, dtype, format, policy, order):
    call = prepare(Case((150, 0, 40), queries=2, heads=20, format=format), dtype)
    usual = call.decode(backend)
    executor.set_lane_order(order)
    executor.set_async_policy(policy)
    executor.set_seed(3)
    assert all(torch.equal(one, two) for one, two in zip(usual, call.decode(backend)))
