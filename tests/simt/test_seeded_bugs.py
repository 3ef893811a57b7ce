"""Small kernels with one bug each: the executor reports it at its line, or its result is wrong.

Without the bug, the same text gives the right result under every schedule.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.simt.executor import FEW_SCHEDULES, MODES, KernelFailure, KernelLibrary, schedules
from tests.simt.seeded_bugs import CATALOGUE, REPORTED, UNSEEN, WRONG, SeededBug

# One worker builds the libraries, the others go on with other tests.
pytestmark = pytest.mark.xdist_group("simt")


def those_that_show(how: str) -> list[object]:
    """(bug, mode) for every mode in which a bug shows that way."""
    return [
        pytest.param(bug, mode, id=f"{bug.name}-{mode}")
        for bug in CATALOGUE
        for mode in MODES
        if bug.shows(mode) == how
    ]


@pytest.mark.parametrize(("bug", "library"), those_that_show(REPORTED), indirect=["library"])
def test_bug_is_reported_with_kernel_file_and_line(bug: SeededBug, library: KernelLibrary) -> None:
    kernel = "launched_wrongly" if bug.name.startswith("launch_") else bug.name
    for schedule in FEW_SCHEDULES:
        library.set_schedule(schedule)
        with pytest.raises(KernelFailure) as failure:
            library.run_seeded(bug.name, True, bug.values)
        message = str(failure.value)
        assert re.search(bug.message, message), f"{schedule}: {message}"
        assert f"{kernel}<true>: " in message, schedule
        assert bug.place() in message, schedule


@pytest.mark.parametrize(("bug", "library"), those_that_show(WRONG), indirect=["library"])
def test_bug_gives_a_wrong_result_under_some_schedule(
    bug: SeededBug, library: KernelLibrary
) -> None:
    wrong = []
    for schedule in schedules():
        library.set_schedule(schedule)
        result = library.run_seeded(bug.name, True, bug.values)
        wrong.append(not np.array_equal(result, bug.meaning(bug.values)))
    assert any(wrong)


@pytest.mark.parametrize("bug", CATALOGUE, ids=lambda bug: bug.name)
def test_kernel_without_its_bug_is_right_under_every_schedule(
    bug: SeededBug, library: KernelLibrary
) -> None:
    for schedule in schedules():
        library.set_schedule(schedule)
        result = library.run_seeded(bug.name, False, bug.values)
        np.testing.assert_array_equal(result, bug.meaning(bug.values), err_msg=str(schedule))


def test_every_bug_shows_in_the_instrumented_mode() -> None:
    assert not [bug.name for bug in CATALOGUE if bug.instrumented == UNSEEN]
