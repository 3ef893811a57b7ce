"""Tensors of more than 2^31 elements: 64-bit offsets all the way (4.3 GB each, so `make test-all`)."""

from __future__ import annotations

import pytest
import torch
from warploom.ops.activation import swiglu
from warploom.ops.norm import layer_norm, rms_norm

from tests.backends import DEVICE

COLUMNS = 4096
ROWS = 2**31 // COLUMNS + 3

FUNCTIONS = {
    "rms_norm": lambda x: rms_norm(x),
    "layer_norm": lambda x: layer_norm(x),
    "swiglu": lambda x: swiglu(x, x),
}


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_the_last_row_is_as_right_as_the_first(function):
    row = torch.randn(1, COLUMNS, device=DEVICE).bfloat16()
    whole = function(row.expand(ROWS, COLUMNS))
    assert whole.numel() > 2**31
    expected = function(row)[0]
    for index in (0, 2**31 // COLUMNS - 1, 2**31 // COLUMNS, ROWS - 1):
        assert torch.equal(whole[index], expected), index
