"""Rows of unit length on every backend against float64."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn import functional as F
from warploom.ops.norm import l2_norm

from tests import plain
from tests.backends import DEVICE, every_backend, every_dtype
from tests.norm.test_norm import normal
from tests.numerics import check_against_float64, inside_larger


@every_backend
@every_dtype
@pytest.mark.parametrize(
    "shape",
    [(9, 7), (5, 32), (5, 33), (9, 128), (4, 1000), (2, 3, 65), (2, 4099)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_rows_and_their_gradient(backend, dtype, shape):
    check_against_float64(
        functools.partial(l2_norm, backend=backend), plain.l2_norm, [normal(*shape, dtype=dtype)]
    )


@every_backend
def test_slices_of_larger_buffers(backend):
    x = inside_larger(normal(3, 5, 136, dtype=torch.bfloat16))
    check_against_float64(functools.partial(l2_norm, backend=backend), plain.l2_norm, [x])


@every_backend
def test_zeros_and_no_rows(backend):
    assert torch.equal(
        l2_norm(torch.zeros(2, 9, device=DEVICE), backend=backend).cpu(), torch.zeros(2, 9)
    )
    empty = torch.empty(0, 8, device=DEVICE, requires_grad=True)
    l2_norm(empty, backend=backend).sum().backward()
    assert empty.grad.shape == (0, 8)


@every_backend
def test_a_bad_row_spoils_no_other(backend):
    x = normal(4, 40)
    x[1, 3] = float("nan")
    whole = l2_norm(x, backend=backend)
    assert torch.equal(whole[[0, 2, 3]], l2_norm(x[[0, 2, 3]], backend=backend))
    assert torch.isnan(whole[1]).all()


def test_agrees_with_torch():
    x = normal(6, 48)
    torch.testing.assert_close(l2_norm(x), F.normalize(x, dim=-1))


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="l2_norm: x: expected dtype"):
        l2_norm(torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="l2_norm: eps: expected a number >= 0"):
        l2_norm(torch.ones(2, 3), eps=-1.0)
