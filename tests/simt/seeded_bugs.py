"""The catalogue of seeded bugs: what each kernel of `kernels/` computes, how its bug must show."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

KERNELS = Path(__file__).resolve().parent / "kernels"
THREADS = 128

Meaning = Callable[[np.ndarray], np.ndarray]

# How a bug shows in a mode.
REPORTED = "reported"  # the launch fails, under every schedule, with the message and the BUG line
WRONG = "wrong"  # the launch passes; its result is wrong under some schedule
UNSEEN = "unseen"  # nothing shows: what the other mode is for

# Messages, as regular expressions.
RACE = "race: .* is not ordered after the "
UNINITIALISED = "is uninitialised: nothing in this block has written it"
#: A missing barrier is one or the other, as the schedule has it.
RACE_OR_UNINITIALISED = f"({RACE})|({UNINITIALISED})"
UNFINISHED_COPY = "an unfinished asynchronous copy"
MISALIGNED = "expected a multiple of 16"
OUT_OF_BOUNDS = r"bytes \d+ to \d+ of 'allocation', which has \d+ bytes"
DEADLOCK = "deadlock: no thread can go on"
ABSENT_LANE = "exits while other lanes wait for it at|names lane .* which has exited"


@dataclass(frozen=True)
class SeededBug:
    """A kernel of `kernels/`: its name, its meaning without the bug, how the bug shows."""

    name: str
    meaning: Meaning
    message: str
    plain: str = REPORTED
    instrumented: str = REPORTED
    elements: int = THREADS

    def shows(self, mode: str) -> str:
        return self.plain if mode == "plain" else self.instrumented

    @property
    def values(self) -> np.ndarray:
        """Small positive whole numbers, all sums of which float32 holds."""
        return (np.arange(self.elements) * 37 % 251 + 1).astype(np.float32)

    def place(self) -> str:
        """'FILE:LINE' of the kernel's first BUG comment; a wrong launch's is the launch itself."""
        for path in sorted(KERNELS.glob("*.cu*")):
            lines = path.read_text().split("\n")
            marked = self.name.startswith("launch_") and path.name == "seeded.cu"
            for number, line in enumerate(lines, start=1):
                marked = marked or re.search(rf"\b{self.name}\(WARPLOOM", line) is not None
                if marked and line.endswith("// BUG"):
                    return f"{path.name}:{number}"
        raise LookupError(f"{self.name}: no line of its kernel ends in // BUG")


def same(values: np.ndarray) -> np.ndarray:
    return values


def reverse(values: np.ndarray) -> np.ndarray:
    return values[::-1]


def from_lane(source: Callable[[np.ndarray], np.ndarray]) -> Meaning:
    """Each thread gets the value of the thread source(its index)."""
    return lambda values: values[source(np.arange(values.size))]


def lower_lanes_from(source: Callable[[np.ndarray], np.ndarray]) -> Meaning:
    """Lanes 0 to 15 of each warp get the value of the thread source(index)."""
    return from_lane(lambda index: np.where(index % 32 < 16, source(index), index))


def warp_totals(values: np.ndarray) -> np.ndarray:
    return np.repeat(values.reshape(-1, 32).sum(axis=1), 32)


def plus_row(values: np.ndarray) -> np.ndarray:
    """Plus the row of the 8x8 matrix of which the lane holds two elements."""
    return values + np.arange(values.size) % 32 // 4


def first_half(values: np.ndarray) -> np.ndarray:
    return np.where(np.arange(values.size) < values.size // 2, values, 0)


def reverse_in_lower_half(values: np.ndarray) -> np.ndarray:
    return first_half(values[::-1])


def consumed_rounds(values: np.ndarray) -> np.ndarray:
    rounds = values.reshape(2, -1)[:, ::-1].sum(axis=0)
    return np.concatenate([rounds, np.zeros_like(rounds)])


def plus_successor(values: np.ndarray) -> np.ndarray:
    return values + np.append(values[1:], 0)


def total_in_first(values: np.ndarray) -> np.ndarray:
    return np.where(np.arange(values.size) == 0, values.sum(), 0)


CATALOGUE = [
    # Barriers
    SeededBug("missing_sync_after_write", reverse, RACE_OR_UNINITIALISED, plain=WRONG),
    SeededBug("missing_sync_before_overwrite", same, RACE, plain=WRONG),
    SeededBug("missing_sync_warp", from_lane(lambda i: i ^ 1), RACE_OR_UNINITIALISED, plain=WRONG),
    SeededBug(
        "sync_warp_too_narrow", from_lane(lambda i: i ^ 16), RACE_OR_UNINITIALISED, plain=WRONG
    ),
    SeededBug("shuffle_as_barrier", from_lane(lambda i: i ^ 1), RACE, plain=UNSEEN),
    SeededBug("divergent_barrier", reverse, "divergent barrier: .* expected every thread"),
    SeededBug("conditional_barrier", reverse, DEADLOCK),
    SeededBug(
        "early_return_before_barrier",
        reverse,
        "expected every thread of the block at the barrier",
        elements=100,
    ),
    SeededBug("named_barrier_wrong_count", reverse, "expected a multiple of 32 .* got 160"),
    SeededBug("named_barrier_odd_count", reverse, "expected a multiple of 32 .* got 127"),
    SeededBug("named_barrier_unequal_counts", reverse, f"expected one number|{DEADLOCK}"),
    SeededBug("named_barrier_bad_id", reverse, "id: expected 1 to 15 .* got 16"),
    SeededBug("crossed_barriers", reverse, DEADLOCK),
    SeededBug("arrive_at_wrong_barrier", reverse_in_lower_half, DEADLOCK),
    SeededBug("stage_released_early", consumed_rounds, RACE, plain=WRONG),
    # Collectives
    SeededBug("mask_without_caller", from_lane(lambda i: i ^ 1), "does not name lane"),
    SeededBug(
        "source_outside_mask",
        lower_lanes_from(lambda i: i // 32 * 32 + 4),
        "reads lane 20, which the mask 0x0000ffff does not name",
    ),
    SeededBug("divergent_collective", lower_lanes_from(lambda i: i ^ 1), ABSENT_LANE),
    SeededBug(
        "collective_in_two_lines",
        from_lane(lambda i: i ^ 1),
        "expected every lane of the mask at one line with one mask",
    ),
    SeededBug("vote_in_divergent_loop", np.ones_like, ABSENT_LANE, elements=100),
    SeededBug("short_butterfly", warp_totals, "", plain=WRONG, instrumented=WRONG),
    SeededBug("partial_warp_product", same, ABSENT_LANE),
    SeededBug("matrix_row_misaligned", plus_row, MISALIGNED),
    SeededBug("matrix_load_unsynchronised", plus_row, RACE_OR_UNINITIALISED, plain=WRONG),
    # Asynchronous copies
    SeededBug("missing_copy_wait", reverse, UNFINISHED_COPY, plain=WRONG),
    SeededBug("copy_wait_off_by_one", reverse, UNFINISHED_COPY, plain=WRONG),
    SeededBug("missing_copy_commit", reverse, UNFINISHED_COPY, plain=WRONG),
    SeededBug("copy_wait_without_barrier", reverse, RACE_OR_UNINITIALISED, plain=WRONG),
    SeededBug(
        "barrier_before_copy_wait", reverse, f"{UNFINISHED_COPY}|{RACE}", plain=WRONG
    ),
    SeededBug("copy_unfinished_at_exit", same, "exits while this asynchronous copy is unfinished"),
    SeededBug("copy_over_unread_tile", reverse, f"{UNFINISHED_COPY}|{RACE}", plain=WRONG),
    SeededBug("store_under_copy", np.negative, UNFINISHED_COPY, plain=WRONG),
    SeededBug("copy_misaligned", from_lane(lambda i: i % 64), MISALIGNED),
    SeededBug("copy_out_of_bounds", same, OUT_OF_BOUNDS, elements=100),
    # Memory
    SeededBug("global_read_out_of_bounds", plus_successor, OUT_OF_BOUNDS),
    SeededBug("global_write_out_of_bounds", same, OUT_OF_BOUNDS, elements=100),
    SeededBug("shared_out_of_bounds", same, "expected to lie within its 512 bytes"),
    SeededBug("shared_launch_too_small", reverse, "the plan has 512 bytes, the launch gave 256"),
    SeededBug("vector_load_misaligned", first_half, MISALIGNED),
    SeededBug("vector_store_misaligned", first_half, MISALIGNED),
    SeededBug("shared_vector_load_misaligned", first_half, MISALIGNED),
    SeededBug("shared_read_uninitialised", reverse, UNINITIALISED, plain=WRONG),
    SeededBug(
        "shared_accumulate_not_atomic", lambda v: np.full_like(v, v.sum()), RACE, plain=UNSEEN
    ),
    SeededBug("global_accumulate_not_atomic", total_in_first, RACE, plain=UNSEEN),
    SeededBug("global_exchange_race", reverse, RACE, plain=WRONG),
    SeededBug("host_pointer", same, "in no memory that the caller passed", plain=UNSEEN),
    SeededBug("blocks_write_one_place", same, "block", plain=WRONG),
    SeededBug("block_reads_other_block", same, "block", plain=WRONG),
    SeededBug("mask_off_by_one", np.cumsum, "", plain=WRONG, instrumented=WRONG),
    # Launches
    SeededBug("launch_plan_too_large", reverse, "shared_bytes: expected at most 232448"),
    SeededBug("launch_empty_grid", reverse, r"grid: expected 1 to .* got \(0, 1, 1\)"),
    SeededBug("launch_too_many_threads", reverse, "threads: expected 1 to 1024, got 1025"),
    SeededBug("launch_no_threads", reverse, "threads: expected 1 to 1024, got 0"),
]  # fmt: skip
