"""The table of ops: complete, honest about errors, and written where it should be."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from warploom._library import OPS
from warploom.recipes import op_table
from warploom.recipes.op_cases import CASES, OpCase
from warploom.recipes.op_table import measure, write_results

BY_NAME = {case.name: case for case in CASES}


def test_every_forward_op_has_a_case() -> None:
    forward = {name for name in OPS if not name.endswith(("_backward", "_out"))}
    assert {case.op for case in CASES} == forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_sides_of_a_case_compute_the_same(case: OpCase, dtype: torch.dtype) -> None:
    result = measure(case, dtype, size=6, pairs=1)
    rounding = torch.finfo(dtype).eps
    assert result.pytorch_error <= 32 * rounding  # results up to 10, of some BLAS's order of sums
    assert result.error <= 2 * result.pytorch_error + 4 * rounding
    assert result.backend in ("cpu", "reference")
    assert result.dtype == str(dtype).removeprefix("torch.")


def test_a_wrong_result_shows_in_the_error() -> None:
    right = BY_NAME["swiglu"]
    wrong = dataclasses.replace(right, call=lambda *arguments: right.call(*arguments) + 0.25)
    result = measure(wrong, torch.float32, size=6, pairs=1)
    assert result.error == pytest.approx(0.25, rel=1e-3)
    assert result.pytorch_error < 1e-5


def test_speedup_is_pytorchs_time_over_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = object(), object()
    seconds = {ours: 0.002, theirs: 0.006}
    monkeypatch.setattr(op_table, "_time", lambda function, device: seconds[function()])
    assert op_table._compare(lambda: ours, lambda: theirs, 5, "cpu") == pytest.approx((2.0, 3.0))


def test_results_are_written_as_json_and_png(tmp_path: Path) -> None:
    results = [measure(BY_NAME["rms_norm"], torch.float32, size=4, pairs=1)]
    write_results(results, tmp_path)
    assert json.loads((tmp_path / "ops.json").read_text()) == [dataclasses.asdict(results[0])]
    assert (tmp_path / "ops.png").read_bytes().startswith(b"\x89PNG")
