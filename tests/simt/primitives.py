"""What each primitive of the dialect means, in numpy: its kernel's inputs, and the verdict.

The kernels are in `tests/device/primitives.cuh`. `tests/simt` asks the host executor,
`tests/device` a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

THREADS = 128
WARP = 32
STRIDES = (0, 1, 2, 3, 8, 31, 32)
NO_DATA = np.zeros(4, np.uint8)

Verdict = Callable[[np.ndarray], None]


@dataclass(frozen=True)
class Case:
    """One call: `verify` raises AssertionError unless its argument is right.

    `tolerance` is how far, relative to `scale`, a GPU may be from the executor: 0 is bit for bit,
    None leaves the matter to `verify` (outputs that depend on the order of threads).
    """

    a: np.ndarray
    out: np.ndarray
    verify: Verdict
    b: np.ndarray = field(default_factory=lambda: NO_DATA)
    argument: int = 0
    tolerance: float | None = 0.0
    scale: np.ndarray | float = 1.0


def equal_to(expected: np.ndarray) -> Verdict:
    def verify(actual: np.ndarray) -> None:
        np.testing.assert_array_equal(actual, expected)

    return verify


def close_to(expected: np.ndarray, relative: float, absolute: np.ndarray | float = 0.0) -> Verdict:
    """Within `relative` of float64 `expected` or within `absolute`; infinities and NaN exactly."""

    def verify(actual: np.ndarray) -> None:
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(actual[~finite], expected[~finite].astype(actual.dtype))
        error = np.abs(actual[finite].astype(np.float64) - expected[finite])
        allowed = np.broadcast_to(np.abs(expected) * relative + absolute, expected.shape)[finite]
        assert np.all(error <= allowed), (
            f"error {error.max():.3g}, {np.max(error / allowed):.3g} times the allowed"
        )

    return verify


def values_of(rng: np.random.Generator, dtype: np.dtype | type, count: int = THREADS) -> np.ndarray:
    """Distinct values of a type, negative ones among them, whole where the type is a float."""
    signed = rng.permutation(count) * 3 - count
    return signed.astype(np.int64).astype(dtype)


def by_warp(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1, WARP)


LANES = np.arange(WARP)


def shuffle_case(dtype: type, source: Callable[[int], np.ndarray], argument: int) -> CaseMaker:
    """Each lane l of a warp receives the value of lane source(argument)[l]."""

    def make(rng: np.random.Generator) -> Case:
        values = values_of(rng, dtype)
        expected = by_warp(values)[:, source(argument)].reshape(-1)
        return Case(values, np.zeros_like(values), equal_to(expected), argument=argument)

    return make


CaseMaker = Callable[[np.random.Generator], Case]


def indexed(argument: int) -> np.ndarray:
    return (LANES * 7 + argument) % WARP


def exclusive_or(argument: int) -> np.ndarray:
    return LANES ^ argument


def up(argument: int) -> np.ndarray:
    return np.where(argument <= LANES, LANES - argument, LANES)


def down(argument: int) -> np.ndarray:
    return np.where(LANES + argument < WARP, LANES + argument, LANES)


def lower_half_xor(argument: int) -> np.ndarray:
    return np.where(LANES < 16, LANES ^ argument, LANES)


def indices(rng: np.random.Generator) -> Case:
    block, thread = np.divmod(np.arange(3 * THREADS), THREADS)
    constant = np.ones_like(block)
    expected = np.stack(
        [thread % WARP, thread // WARP, block, 3 * constant, THREADS * constant, thread], axis=1
    )
    return Case(NO_DATA, np.zeros(expected.shape, np.int32), equal_to(expected))


def votes(first_lane: int, threshold: Callable[[np.ndarray], int]) -> CaseMaker:
    def make(rng: np.random.Generator) -> Case:
        values = values_of(rng, np.int32)
        argument = threshold(values)
        taking_part = by_warp(values)[:, first_lane:] > argument
        weights = np.uint32(1) << LANES[first_lane:].astype(np.uint32)
        expected = np.full((THREADS // WARP, WARP, 3), 77, np.uint32)
        for warp, predicates in enumerate(taking_part):
            ballot = np.sum(weights[predicates], dtype=np.uint32)
            expected[warp, first_lane:] = [ballot, predicates.any(), predicates.all()]
        out = np.full((THREADS, 3), 77, np.uint32)
        return Case(values, out, equal_to(expected.reshape(out.shape)), argument=argument)

    return make


def reversed_in(groups: int) -> CaseMaker:
    """The block's values, each of `groups` equal parts reversed."""

    def make(rng: np.random.Generator) -> Case:
        values = values_of(rng, np.float32)
        expected = values.reshape(groups, -1)[:, ::-1].reshape(-1)
        return Case(values, np.zeros_like(values), equal_to(expected))

    return make


def producer(rng: np.random.Generator) -> Case:
    values = values_of(rng, np.float32)[: THREADS // 2]
    return Case(values, np.zeros_like(values), equal_to(values[::-1] * (1 + 2 + 3 + 4)))


def copied(size: int, skipped: int) -> CaseMaker:
    """Rows of `size` bytes; those of threads with (thread + tile) % 3 == skipped are zeros."""

    def make(rng: np.random.Generator) -> Case:
        tiles = rng.integers(1, 256, (4, THREADS, size), np.uint8)
        tile, thread, _ = np.indices(tiles.shape)
        expected = np.where((thread + tile) % 3 == skipped, 0, tiles)
        return Case(tiles, np.full_like(tiles, 0xAB), equal_to(expected), argument=skipped)

    return make


def vectors(size: int, is_reversed: bool) -> CaseMaker:
    def make(rng: np.random.Generator) -> Case:
        rows = rng.integers(0, 256, (THREADS, size), np.uint8)
        return Case(rows, np.zeros_like(rows), equal_to(rows[::-1] if is_reversed else rows))

    return make


def matrices(count: int, is_transposed: bool) -> CaseMaker:
    """Lane l gets elements (l / 4, 2 (l % 4)) and the next of each 8x8 matrix or its transpose."""

    def make(rng: np.random.Generator) -> Case:
        elements = rng.permutation(32 * 8).astype(np.uint16)
        matrix = elements.reshape(4, 8, 8)
        if is_transposed:
            matrix = matrix.transpose(0, 2, 1)
        row, column = LANES // 4, 2 * (LANES % 4)
        low = matrix[:count, row, column].astype(np.uint32)
        high = matrix[:count, row, column + 1].astype(np.uint32)
        expected = (low | high << 16).T
        return Case(elements, np.zeros(expected.shape, np.uint32), equal_to(expected))

    return make


def product(dtype: torch.dtype, depth: int, magnitude: float) -> CaseMaker:
    """out (16, 8) += a (16, K) b (8, K)^T in float64, over inputs rounded to the type.

    The tolerance is that of 2 K float32 roundings of the largest partial sum.
    """

    def make(rng: np.random.Generator) -> Case:
        a = torch.from_numpy(rng.standard_normal((16, depth)).astype(np.float32)) * magnitude
        b = torch.from_numpy(rng.standard_normal((8, depth)).astype(np.float32))
        start = rng.standard_normal((16, 8)).astype(np.float32)
        if dtype is torch.float32:
            exact_a, exact_b = rounded_to_tf32(a.numpy()), rounded_to_tf32(b.numpy())
            raw_a, raw_b = a.numpy(), b.numpy()
        else:
            exact_a, exact_b = a.to(dtype).double().numpy(), b.to(dtype).double().numpy()
            raw_a = a.to(dtype).view(torch.int16).numpy()
            raw_b = b.to(dtype).view(torch.int16).numpy()
        expected = start + exact_a @ exact_b.T
        scale = np.abs(start) + np.abs(exact_a) @ np.abs(exact_b).T
        tolerance = 2 * depth * 2.0**-24
        return Case(
            raw_a, start, close_to(expected, 0.0, scale * tolerance), b=raw_b,
            tolerance=2 * tolerance, scale=scale,
        )  # fmt: skip

    return make


def rounded_to_tf32(values: np.ndarray) -> np.ndarray:
    """float64 values with 11 significant bits, ties away from zero."""
    mantissa, exponent = np.frexp(values.astype(np.float64))
    rounded = np.trunc(mantissa * 2**11 + np.copysign(0.5, mantissa))
    return np.ldexp(rounded, exponent - 11)


def awkward_floats(rng: np.random.Generator) -> np.ndarray:
    """Ties of every 16-bit format, huge and tiny values, infinities; 128 of them."""
    ties = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 2049.0, 2051.0, -(1 + 2**-11)]
    limits = [65504.0, 65519.0, 65520.0, 3.3895e38, 3.4e38, 2.0**-14, 2.0**-24, 2.0**-25, 1.5e-8]
    special = [0.0, -0.0, np.inf, -np.inf]
    fixed = np.array(ties + limits + special, np.float32)
    drawn = rng.standard_normal(THREADS - fixed.size) * 10.0 ** rng.integers(
        -6, 7, THREADS - fixed.size
    )
    return np.concatenate([fixed, drawn.astype(np.float32)])


def to_tf32(rng: np.random.Generator) -> Case:
    values = awkward_floats(rng)
    expected = np.where(np.isfinite(values), rounded_to_tf32(values), values).astype(np.float32)
    return Case(values, np.zeros(THREADS, np.uint32), equal_to(expected.view(np.uint32)))


def bits_of(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)


def packed(dtype: torch.dtype) -> CaseMaker:
    def make(rng: np.random.Generator) -> Case:
        low = awkward_floats(rng)
        high = rng.permutation(awkward_floats(rng))
        expected = bits_of(low, dtype).astype(np.uint32) | (
            bits_of(high, dtype).astype(np.uint32) << 16
        )
        return Case(low, np.zeros(THREADS, np.uint32), equal_to(expected), b=high)

    return make


def round_trip(dtype: torch.dtype) -> CaseMaker:
    def make(rng: np.random.Generator) -> Case:
        values = awkward_floats(rng)
        expected = torch.from_numpy(values).to(dtype).float().numpy()
        return Case(values, np.zeros_like(values), equal_to(expected))

    return make


def function(
    exact: Callable[[np.ndarray], np.ndarray],
    low: float,
    high: float,
    special: list[float],
    tolerance: float,
) -> CaseMaker:
    """A float32 function over [low, high] and special arguments; `tolerance` is the instruction's.

    Results below the smallest normal number may be flushed to zero.
    """

    def make(rng: np.random.Generator) -> Case:
        drawn = rng.uniform(low, high, THREADS - len(special))
        values = np.concatenate([special, drawn]).astype(np.float32)
        with np.errstate(all="ignore"):
            expected = exact(values.astype(np.float64))
            expected[np.isinf(expected.astype(np.float32))] = np.inf
        scale = np.where(np.isfinite(expected), np.abs(expected), 0.0) + 2.0**-126 / tolerance
        verify = close_to(expected, tolerance, 2.0**-126)
        return Case(values, np.zeros_like(values), verify, tolerance=tolerance, scale=scale)

    return make


def log2_case(rng: np.random.Generator) -> Case:
    """The absolute error counts where the logarithm is near 0."""
    values = np.concatenate(
        [[0.0, 1.0, np.inf], rng.uniform(0.5, 2.0, 61), 10.0 ** rng.uniform(-30, 30, 64)]
    )
    values = values.astype(np.float32)
    with np.errstate(divide="ignore"):
        expected = np.log2(values.astype(np.float64))
    tolerance = 2.0**-21
    scale = 1 + np.where(np.isfinite(expected), np.abs(expected), 0.0)
    verify = close_to(expected, tolerance, tolerance)
    return Case(values, np.zeros_like(values), verify, tolerance=tolerance, scale=scale)


def updated(
    dtype: type, start: int, result: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> CaseMaker:
    """Atomics of 256 threads on out[0]; out[1:] are the values that they found.

    In whatever order they came, the values found and the last one are the first one and the values
    left behind, `result(found, operand)`.
    """

    def make(rng: np.random.Generator) -> Case:
        operands = values_of(rng, dtype, 2 * THREADS)
        out = np.zeros(1 + operands.size, dtype)
        out[0] = start

        def verify(actual: np.ndarray) -> None:
            left_behind = result(actual[1:], operands)
            assert Counter(actual.tolist()) == Counter([out[0].item(), *left_behind.tolist()])

        return Case(operands, out, verify, tolerance=None)

    return make


def summed(dtype: type) -> CaseMaker:
    """`updated` by sums, and the total is right."""

    def make(rng: np.random.Generator) -> Case:
        case = updated(dtype, 5, lambda found, operand: found + operand)(rng)
        total = case.a.sum(dtype=dtype) + dtype(5)

        def verify(actual: np.ndarray) -> None:
            assert actual[0] == total
            case.verify(actual)

        return Case(case.a, case.out, verify, tolerance=None)

    return make


def claimed(rng: np.random.Generator) -> Case:
    """One thread finds 7 and leaves its own value, which all others find."""
    operands = rng.permutation(2 * THREADS).astype(np.uint32) + 100
    out = np.zeros(1 + operands.size, np.uint32)
    out[0] = 7

    def verify(actual: np.ndarray) -> None:
        winners = np.flatnonzero(actual[1:] == 7)
        assert winners.size == 1
        assert actual[0] == operands[winners[0]]
        assert np.all(np.delete(actual[1:], winners) == actual[0])

    return Case(operands, out, verify, argument=7, tolerance=None)


def shared_sums(rng: np.random.Generator) -> Case:
    values = values_of(rng, np.int32, 2 * THREADS)
    return Case(values, np.zeros(2, np.int32), equal_to(values.reshape(2, -1).sum(axis=1)))


def reductions(rng: np.random.Generator) -> Case:
    values = values_of(rng, np.float32)
    warps = by_warp(values)
    expected = np.stack(
        [
            np.repeat(warps.sum(axis=1), WARP),
            np.repeat(warps.max(axis=1), WARP),
            np.full(THREADS, values.sum()),
        ]
    )
    return Case(values, np.zeros_like(expected), equal_to(expected))


def reduction_pair(rng: np.random.Generator) -> Case:
    a, b = values_of(rng, np.float32), values_of(rng, np.float32)
    again_a = THREADS * a.sum() + np.arange(THREADS).sum()
    again_b = THREADS * b.sum()
    expected = np.tile(np.array([again_a, again_b], np.float32), (THREADS, 1))
    return Case(a, np.zeros_like(expected), equal_to(expected), b=b)


def strided(stride: int) -> CaseMaker:
    def make(rng: np.random.Generator) -> Case:
        values = values_of(rng, np.float32, WARP * WARP)
        expected = np.tile(values[LANES * stride], THREADS // WARP)
        return Case(values, np.zeros_like(expected), equal_to(expected), argument=stride)

    return make


def large_plan(rng: np.random.Generator) -> Case:
    values = rng.standard_normal(24576).astype(np.float32)
    return Case(values, np.zeros_like(values), equal_to(values[::-1]))


def reciprocal_sqrt(values: np.ndarray) -> np.ndarray:
    return 1 / np.sqrt(values)


# (kernel, what distinguishes the case) -> its maker
CASES: dict[tuple[str, str], CaseMaker] = {
    ("indices", "three_blocks"): indices,
    ("shuffle_uint32", "by_7_lanes"): shuffle_case(np.uint32, indexed, 3),
    ("shuffle_float32", "by_7_lanes"): shuffle_case(np.float32, indexed, 31),
    ("shuffle_float64", "by_7_lanes"): shuffle_case(np.float64, indexed, 1),
    ("shuffle_int64", "by_7_lanes"): shuffle_case(np.int64, indexed, 0),
    **{
        ("shuffle_xor_float32", f"distance_{distance}"): shuffle_case(
            np.float32, exclusive_or, distance
        )
        for distance in (0, 1, 2, 4, 8, 16, 31)
    },
    ("shuffle_xor_int64", "distance_5"): shuffle_case(np.int64, exclusive_or, 5),
    ("shuffle_up_float32", "by_1"): shuffle_case(np.float32, up, 1),
    ("shuffle_up_float64", "by_31"): shuffle_case(np.float64, up, 31),
    ("shuffle_down_float32", "by_16"): shuffle_case(np.float32, down, 16),
    ("shuffle_down_uint32", "by_1"): shuffle_case(np.uint32, down, 1),
    ("shuffle_half_warp", "distance_8"): shuffle_case(np.float32, lower_half_xor, 8),
    ("votes", "mixed"): votes(0, lambda values: int(np.median(values))),
    ("votes", "one_lane"): votes(0, lambda values: int(values.max()) - 1),
    ("votes", "all_lanes"): votes(0, lambda values: int(values.min()) - 1),
    ("votes_masked", "mixed"): votes(8, lambda values: int(np.median(values))),
    ("votes_masked", "all_lanes"): votes(8, lambda values: int(values.min()) - 1),
    ("barrier_block", "reversed"): reversed_in(1),
    ("barrier_warp", "reversed"): reversed_in(4),
    ("barrier_named", "halves_reversed"): reversed_in(2),
    ("barrier_producer", "four_rounds"): producer,
    **{
        (f"copy_async_{size}", f"zeros_at_{skipped}" if skipped < 3 else "all_valid"): copied(
            size, skipped
        )
        for size in (4, 8, 16)
        for skipped in (0, 1, 3)
    },
    **{(f"vector_{size}", "reversed"): vectors(size, True) for size in (4, 8, 16)},
    **{(f"readonly_{size}", "copied"): vectors(size, False) for size in (4, 8, 16)},
    **{(f"load_matrix_x{count}", "rows"): matrices(count, False) for count in (1, 2, 4)},
    **{(f"load_matrix_x{count}_transposed", "columns"): matrices(count, True) for count in (2, 4)},
    ("mma_bfloat16", "unit_values"): product(torch.bfloat16, 16, 1.0),
    ("mma_bfloat16", "large_values"): product(torch.bfloat16, 16, 1e30),
    ("mma_float16", "unit_values"): product(torch.float16, 16, 1.0),
    ("mma_float16", "large_values"): product(torch.float16, 16, 1e4),
    ("mma_tf32", "unit_values"): product(torch.float32, 8, 1.0),
    ("mma_tf32", "large_values"): product(torch.float32, 8, 1e30),
    ("to_tf32", "awkward_values"): to_tf32,
    ("pack_bfloat16", "awkward_values"): packed(torch.bfloat16),
    ("pack_float16", "awkward_values"): packed(torch.float16),
    ("convert_bfloat16", "awkward_values"): round_trip(torch.bfloat16),
    ("convert_float16", "awkward_values"): round_trip(torch.float16),
    ("convert_float32", "awkward_values"): round_trip(torch.float32),
    ("exp2_approximate", "whole_range"): function(
        np.exp2, -140.0, 127.0, [0.0, 1.0, -np.inf, np.inf, -200.0, 200.0], 2.0**-21
    ),
    ("log2_approximate", "whole_range"): log2_case,
    ("reciprocal_sqrt", "whole_range"): function(
        reciprocal_sqrt, 1e-6, 1e6, [0.0, 1.0, np.inf], 2.0**-21
    ),
    ("reciprocal_approximate", "whole_range"): function(
        np.reciprocal, -1e6, 1e6, [0.0, 1.0, -1.0, np.inf, -np.inf], 2.0**-21
    ),
    ("tanh_approximate", "whole_range"): function(
        np.tanh, -10.0, 10.0, [0.0, 1e-3, -1e-3, np.inf, -np.inf], 2.0**-10
    ),
    ("atomic_add_float32", "two_blocks"): summed(np.float32),
    ("atomic_add_int32", "two_blocks"): summed(np.int32),
    ("atomic_add_uint32", "two_blocks"): summed(np.uint32),
    ("atomic_max", "two_blocks"): updated(np.int32, 5, np.maximum),
    ("atomic_exchange_float32", "two_blocks"): updated(np.float32, 5, lambda found, new: new),
    ("atomic_exchange_int32", "two_blocks"): updated(np.int32, 5, lambda found, new: new),
    ("atomic_exchange_uint32", "two_blocks"): updated(np.uint32, 5, lambda found, new: new),
    ("atomic_compare_and_swap", "two_blocks"): claimed,
    ("atomic_add_shared", "two_blocks"): shared_sums,
    ("reductions", "warp_and_block"): reductions,
    ("reduction_pair", "twice"): reduction_pair,
    **{("shared_strided", f"by_{stride}"): strided(stride) for stride in STRIDES},
    ("shared_large", "reversed"): large_plan,
}  # fmt: skip


def case_named(key: tuple[str, str]) -> Case:
    """The case with inputs that are the same in every process."""
    return CASES[key](np.random.default_rng(list(CASES).index(key)))
