"""Rotary embedding on every backend against float64."""

from __future__ import annotations

import pytest
import torch
from warploom.ops.rope import apply_rotary

from tests import plain
from tests.backends import BACKENDS, DEVICE, every_backend, every_dtype
from tests.numerics import check_against_float64, inside_larger

LAYOUTS = pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])


def tables(rows, rotary_dim, dtype=torch.float32):
    angles = torch.arange(rows, dtype=torch.float64).unsqueeze(1) * torch.rand(
        rotary_dim // 2, dtype=torch.float64
    )
    return angles.cos().to(DEVICE, dtype), angles.sin().to(DEVICE, dtype)


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


@every_backend
@every_dtype
@LAYOUTS
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"), [(64, 64), (80, 32), (6, 6), (7, 4)], ids=lambda size: str(size)
)
def test_rotation_and_its_gradient(backend, dtype, interleaved, head_dim, rotary_dim):
    cos, sin = tables(11, rotary_dim)
    positions = torch.arange(5, device=DEVICE).expand(2, 5)
    check_against_float64(
        lambda x: apply_rotary(x, cos, sin, interleaved=interleaved, backend=backend),
        lambda x: plain.apply_rotary(x, cos, sin, positions, interleaved),
        [normal(2, 5, 3, head_dim, dtype=dtype)],
    )


@every_backend
@LAYOUTS
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_positions_of_each_token(backend, interleaved, index_dtype):
    cos, sin = tables(40, 16)
    positions = torch.randint(0, 40, (3, 4), device=DEVICE)
    given = positions.to(index_dtype)
    check_against_float64(
        lambda x: apply_rotary(
            x, cos, sin, positions=given, interleaved=interleaved, backend=backend
        ),
        lambda x: plain.apply_rotary(x, cos, sin, positions, interleaved),
        [normal(3, 4, 2, 16)],
    )


@every_backend
def test_offset_is_the_position_of_the_first_token(backend):
    cos, sin = tables(20, 8)
    x = normal(1, 12, 2, 8)
    whole = apply_rotary(x, cos, sin, backend=backend)
    assert torch.equal(
        apply_rotary(x[:, 9:], cos, sin, position_offset=9, backend=backend), whole[:, 9:]
    )


@every_backend
@LAYOUTS
def test_slices_of_larger_buffers(backend, interleaved):
    cos, sin = tables(6, 24)
    positions = torch.arange(6, device=DEVICE).expand(2, 6)
    check_against_float64(
        lambda x: apply_rotary(
            x, inside_larger(cos), inside_larger(sin), interleaved=interleaved, backend=backend
        ),
        lambda x: plain.apply_rotary(x, cos, sin, positions, interleaved),
        [inside_larger(normal(2, 6, 3, 40, dtype=torch.bfloat16))],
    )


@every_backend
def test_heads_first_memory_gives_the_same(backend):
    """[B, H, S, D] memory seen as [B, S, H, D]: what Hugging Face models hand over."""
    cos, sin = tables(5, 16)
    x = normal(2, 3, 5, 16).transpose(1, 2)
    assert torch.equal(
        apply_rotary(x, cos, sin, backend=backend),
        apply_rotary(x.contiguous(), cos, sin, backend=backend),
    )


@every_backend
def test_no_tokens(backend):
    cos, sin = tables(4, 8)
    assert apply_rotary(normal(2, 0, 3, 8), cos, sin, backend=backend).shape == (2, 0, 3, 8)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("cpu", "simt")])
def test_a_position_outside_the_table_is_an_error(backend):
    cos, sin = tables(4, 8)
    with pytest.raises(
        RuntimeError, match="apply_rotary: positions: expected values from 0 to 3, got 4"
    ):
        apply_rotary(normal(1, 1, 1, 8), cos, sin, positions=torch.tensor([[4]]), backend=backend)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 3, 8)}, ValueError, r"x: expected 4 dimensions \[B, S, H, D\]"),
        ({"cos": torch.ones(4, 5)}, ValueError, "sin: expected shape"),
        (
            {"cos": torch.ones(4, 8), "sin": torch.ones(4, 8)},
            ValueError,
            "cos: expected .* R <= D = 8",
        ),
        (
            {"cos": torch.ones(2, 4), "sin": torch.ones(2, 4)},
            ValueError,
            "cos: expected rows for the positions 0 to 2",
        ),
        ({"position_offset": 2}, ValueError, "cos: expected rows for the positions 2 to 4"),
        ({"position_offset": -1}, ValueError, "cos: expected rows for the positions"),
        ({"cos": torch.ones(4, 4).half()}, TypeError, "cos: expected dtype torch.float32"),
        (
            {"positions": torch.zeros(1, 2, dtype=torch.long)},
            ValueError,
            "positions: expected shape",
        ),
        ({"positions": torch.zeros(1, 3)}, TypeError, "positions: expected dtype int64 or int32"),
        (
            {"cos": torch.ones(4, 4, requires_grad=True)},
            ValueError,
            "cos: expected a constant table",
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_bad_input_is_named(change, error, message):
    good = {"x": torch.ones(1, 3, 2, 8), "cos": torch.ones(4, 4), "sin": torch.ones(4, 4)}
    arguments = {**good, **change}
    with pytest.raises(error, match=f"apply_rotary: {message}"):
        apply_rotary(**arguments)
