"""Every primitive of the dialect under the host executor, against its meaning in numpy."""

from __future__ import annotations

import pytest

from tests.simt.executor import KernelFailure, KernelLibrary, Schedule, schedules
from tests.simt.primitives import CASES, case_named

# One worker builds the libraries, the others go on with other tests.
pytestmark = pytest.mark.xdist_group("simt")


@pytest.mark.parametrize("key", CASES, ids="-".join)
def test_primitive_has_its_numpy_meaning_under_every_schedule(
    library: KernelLibrary, key: tuple[str, str]
) -> None:
    case = case_named(key)
    for schedule in schedules():
        library.set_schedule(schedule)
        actual = library.run_primitive(key[0], case.a, case.b, case.out, case.argument)
        try:
            case.verify(actual)
        except AssertionError as error:
            raise AssertionError(f"{schedule}: {error}") from error


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (Schedule(lane_order="sideways"), "'forward', 'backward' or 'random', got 'sideways'"),
        (Schedule(async_policy="never"), "'late', 'early' or 'random', got 'never'"),
    ],
    ids=["lane_order", "async_policy"],
)
def test_unknown_schedule_is_refused_with_the_accepted_words(
    library: KernelLibrary, schedule: Schedule, words: str
) -> None:
    with pytest.raises(KernelFailure, match=words):
        library.set_schedule(schedule)
