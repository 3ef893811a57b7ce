"""What the executor counts: bank conflicts in the instrumented mode, barriers in both."""

from __future__ import annotations

from math import gcd

import pytest

from tests.simt.executor import KernelLibrary, Schedule
from tests.simt.primitives import STRIDES, case_named

pytestmark = pytest.mark.xdist_group("simt")

WARPS = 4
BANKS = 32


def run(library: KernelLibrary, kernel: str, variant: str) -> None:
    case = case_named((kernel, variant))
    library.set_schedule(Schedule())
    library.run_primitive(kernel, case.a, case.b, case.out, case.argument)


@pytest.mark.parametrize("library", ["instrumented"], indirect=True)
@pytest.mark.parametrize("stride", STRIDES)
def test_bank_conflicts_are_the_passes_beyond_the_first(
    library: KernelLibrary, stride: int
) -> None:
    run(library, "shared_strided", f"by_{stride}")
    # One address for all lanes is one pass; otherwise gcd(stride, 32) lanes share each bank.
    passes = gcd(stride, BANKS) if stride else 1
    assert library.report("bank_conflicts") == WARPS * (passes - 1)


@pytest.mark.parametrize("library", ["instrumented"], indirect=True)
def test_rows_48_bytes_apart_load_as_matrices_without_conflict(library: KernelLibrary) -> None:
    run(library, "load_matrix_x4", "rows")
    # The conflicts are those of the eight stores before: 12 words apart, 4 lanes share a bank.
    assert library.report("bank_conflicts") == 8 * 3


@pytest.mark.parametrize(
    ("kernel", "variant", "expected"),
    [("barrier_block", "reversed", 1), ("barrier_named", "halves_reversed", 2 * (3 + 5))],
)
def test_barriers_are_counted_once_each(
    library: KernelLibrary, kernel: str, variant: str, expected: int
) -> None:
    run(library, kernel, variant)
    assert library.report("barriers_passed") == expected
