"""The rotary launcher against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from warploom.reference import rope as reference
from warploom.triton_kernels.rope import rotary

Draw = Callable[..., Tensor]
Check = Callable[..., None]
Embed = Callable[[Tensor], Tensor]

TABLE = 11  # positions that the tables know


def _tables(random: Draw, r: int) -> tuple[Tensor, Tensor]:
    angles = random(TABLE, r // 2, scale=3.0)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("interleaved", (False, True), ids=("halves", "interleaved"))
@pytest.mark.parametrize("conjugate", (False, True), ids=("forward", "backward"))
@pytest.mark.parametrize(
    ("d", "r"), ((2, 2), (64, 64), (20, 20), (20, 6), (100, 64)), ids=lambda n: str(n)
)
def test_apply_rotary(
    d: int,
    r: int,
    interleaved: bool,
    conjugate: bool,
    dtype: torch.dtype,
    random: Draw,
    embedded: Embed,
    assert_close: Check,
) -> None:
    x = embedded(random(2, 5, 3, d, dtype=dtype))
    cos, sin = (embedded(table) for table in _tables(random, r))
    args = (x, cos, sin, None, interleaved, conjugate)
    assert_close((rotary.apply_rotary(*args),), reference.apply_rotary, *args, factor=2)


@pytest.mark.parametrize("index", (torch.int64, torch.int32), ids=str)
def test_positions_choose_the_angle(
    index: torch.dtype, random: Draw, generator: torch.Generator, assert_close: Check
) -> None:
    x = random(3, 7, 2, 16)
    cos, sin = _tables(random, 16)
    drawn = torch.randint(0, TABLE, (7, 6), generator=generator).to(index)
    args = (x, cos, sin, drawn.t()[1:4], False, False)
    assert_close((rotary.apply_rotary(*args),), reference.apply_rotary, *args, factor=2)


def test_one_row_of_positions_may_serve_the_whole_batch(random: Draw, assert_close: Check) -> None:
    x = random(3, 4, 2, 16)
    cos, sin = _tables(random, 16)
    positions = torch.tensor([[4, 9, 0, 4]]).expand(3, 4)
    args = (x, cos, sin, positions, True, False)
    assert_close((rotary.apply_rotary(*args),), reference.apply_rotary, *args, factor=2)


def test_heads_and_sequence_may_be_swapped_in_memory(random: Draw) -> None:
    x = random(2, 3, 5, 16).transpose(1, 2)
    cos, sin = _tables(random, 16)
    got = rotary.apply_rotary(x, cos, sin, None, False, False)
    assert torch.equal(got, rotary.apply_rotary(x.contiguous(), cos, sin, None, False, False))


@pytest.mark.parametrize("shape", ((0, 3, 2, 8), (2, 0, 2, 8)), ids=str)
def test_nothing_to_turn(shape: tuple[int, ...], random: Draw) -> None:
    cos, sin = _tables(random, 8)
    assert rotary.apply_rotary(torch.zeros(shape), cos, sin, None, False, False).shape == shape


def test_features_behind_the_rotated_ones_are_copied_bit_for_bit(
    dtype: torch.dtype, random: Draw
) -> None:
    x = random(1, 3, 2, 12, dtype=dtype)
    cos, sin = _tables(random, 4)
    out = rotary.apply_rotary(x, cos, sin, None, False, False)
    assert torch.equal(out[..., 4:], x[..., 4:])


def test_why_not_names_float64(random: Draw) -> None:
    cos, sin = _tables(random, 4)
    x = random(1, 3, 2, 4)
    assert rotary.why_not(x, cos, sin, torch.zeros(1, 3, dtype=torch.int64), False, False) == []
    (reason,) = rotary.why_not(x.double(), cos.double(), sin.double(), None, False, False)
    assert "float64" in reason
