"""A linear map per group of rows on every backend, against a loop over the groups in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from warploom.ops.grouped_linear import grouped_linear

from tests import plain
from tests.backends import DEVICE, every_backend, every_dtype
from tests.numerics import check_against_float64, inside_larger


@dataclass(frozen=True)
class Case:
    """Groups of `sizes` rows, then `behind` rows of no group."""

    sizes: list[int]
    behind: int = 0
    in_features: int = 40
    out_features: int = 24

    @property
    def rows(self) -> int:
        return sum(self.sizes) + self.behind

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.rows, self.in_features).to(DEVICE, dtype)
        weight = torch.randn(len(self.sizes), self.out_features, self.in_features)
        return x, weight.to(DEVICE, dtype)

    @property
    def offsets(self) -> Tensor:
        return torch.tensor([0, *self.sizes], dtype=torch.int32, device=DEVICE).cumsum(
            0, dtype=torch.int32
        )

    def ours(self, backend: str) -> Callable[[Tensor, Tensor], Tensor]:
        return functools.partial(grouped_linear, group_offsets=self.offsets, backend=backend)

    @property
    def exactly(self) -> Callable[[Tensor, Tensor], Tensor]:
        return functools.partial(plain.grouped_linear, sizes=self.sizes)


#: Kernels have tiles of 64 rows, 128 columns and 32 or 64 terms of a sum, in 3 stages.
CASES = {
    "one group": Case([5]),
    "single rows, as when decoding": Case([1, 1, 1], in_features=200),
    "a few rows each": Case([2, 3, 4, 5, 8, 9], in_features=72),
    "empty groups, rows behind": Case([0, 0, 3, 0, 1, 0], behind=4),
    "around a tile of rows": Case([63, 64, 65], behind=1),
    "all rows in one group": Case([0, 210, 0]),
    "tiles of both features, more steps than stages": Case([3, 0, 66], 2, 328, 264),
    "odd features": Case([5, 0, 9], 2, 33, 7),
    "odd features, 4-byte units": Case([70, 2], 0, 130, 134),
    "no group has rows": Case([0, 0], behind=5),
    "no rows": Case([0, 0, 0]),
    "no terms": Case([2, 1], in_features=0),
    "no columns": Case([2, 1], out_features=0),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@every_backend
@every_dtype
@every_case
def test_values_and_gradients(backend, dtype, case):
    check_against_float64(case.ours(backend), case.exactly, case.tensors(dtype))


@every_backend
@every_dtype
def test_slices_of_larger_buffers(backend, dtype):
    """Rows a stride apart that no vector fits, NaN around them; grad_out is such a slice too."""
    case = Case([9, 0, 70], 3, 72, 40)

    def sliced(x: Tensor, weight: Tensor) -> Tensor:
        out = case.ours(backend)(x, weight)
        return _GradientInside.apply(out)

    tensors = [inside_larger(tensor) for tensor in case.tensors(dtype)]
    check_against_float64(sliced, case.exactly, tensors)


class _GradientInside(torch.autograd.Function):
    """Nothing, but that its gradient is a slice of a larger buffer of NaN."""

    @staticmethod
    def forward(ctx, out):
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        return inside_larger(grad)


@every_backend
@every_dtype
def test_a_row_does_not_depend_on_its_batch(backend, dtype):
    case = Case([3, 70], 0, 72, 40)
    x, weight = case.tensors(dtype)
    together = grouped_linear(x, weight, case.offsets, batch_invariant=True, backend=backend)
    for rows in (slice(0, 1), slice(1, 3), slice(3, 4), slice(7, 40)):
        group, count = int(rows.start >= 3), rows.stop - rows.start
        offsets = Case([0, count] if group else [count, 0]).offsets
        alone = grouped_linear(x[rows], weight, offsets, batch_invariant=True, backend=backend)
        assert torch.equal(alone, together[rows])


@every_backend
def test_no_groups_at_all(backend):
    case = Case([], behind=3)
    x, weight = (tensor.requires_grad_() for tensor in case.tensors(torch.float32))
    out = case.ours(backend)(x, weight)
    grad_x, grad_weight = torch.autograd.grad(out.sum(), (x, weight))
    assert torch.equal(out, torch.zeros_like(out)) and not grad_x.any()
    assert grad_weight.shape == weight.shape


@every_backend
def test_columns_apart_are_copied(backend):
    case = Case([3, 4])
    x, weight = case.tensors(torch.float32)
    apart = torch.stack((x, x), dim=-1)[..., 0]
    check_against_float64(
        case.ours(backend), case.exactly, [apart, weight.mT.contiguous().mT], gradients=False
    )


@every_backend
def test_a_bad_row_spoils_no_other(backend):
    """Not even where it shares a tile, nor do rows behind the last group add anything."""
    case = Case([2, 0, 3], behind=2)
    x, weight = case.tensors(torch.float32)
    x[1] = float("nan")
    x[5:] = float("nan")
    grad_out = torch.randn(case.rows, case.out_features, device=DEVICE)
    grad_out[3] = float("inf")
    grad_out[5:] = float("nan")
    leaves = [tensor.requires_grad_() for tensor in (x, weight)]
    out = case.ours(backend)(*leaves)
    grad_x, grad_weight = torch.autograd.grad(out, leaves, grad_out)
    assert torch.isfinite(out[[0, 2, 3, 4]]).all() and torch.isnan(out[1]).all()
    assert not out[5:].any()
    assert torch.isfinite(grad_x[[0, 1, 2, 4]]).all() and not torch.isfinite(grad_x[3]).any()
    assert not grad_x[5:].any()
    assert torch.isnan(grad_weight[0]).all() and not grad_weight[1].any()
    assert not torch.isfinite(grad_weight[2]).any()


@every_backend
@pytest.mark.parametrize("wanted", [0, 1], ids=["x", "weight"])
def test_only_one_gradient_is_asked_for(backend, wanted):
    case = Case([4, 0, 5], behind=1)
    tensors = case.tensors(torch.float32)
    grad_out = torch.randn(case.rows, case.out_features, device=DEVICE)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    both = torch.autograd.grad(case.ours(backend)(*leaves), leaves, grad_out)
    single = [tensor.detach() for tensor in tensors]
    single[wanted].requires_grad_()
    (grad,) = torch.autograd.grad(case.ours(backend)(*single), single[wanted], grad_out)
    assert torch.equal(grad, both[wanted])


@every_backend
@every_dtype
def test_two_runs_agree_to_the_bit(backend, dtype):
    case = Case([70, 1, 9], behind=1)
    leaves = [tensor.requires_grad_() for tensor in case.tensors(dtype)]
    grad_out = torch.randn(case.rows, case.out_features).to(DEVICE, dtype)
    runs = []
    for _ in range(2):
        out = case.ours(backend)(*leaves)
        runs.append((out, *torch.autograd.grad(out, leaves, grad_out)))
    assert all(torch.equal(first, second) for first, second in zip(*runs))


@every_backend
def test_autocast_casts_the_inputs(backend):
    case = Case([3, 4])
    x, weight = case.tensors(torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = case.ours(backend)(x, weight)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, case.ours(backend)(x.bfloat16(), weight.bfloat16()))


def test_float64_on_the_cpu():
    case = Case([2, 0, 40], behind=1)
    x, weight = (tensor.cpu() for tensor in case.tensors(torch.float64))
    out = grouped_linear(x, weight, case.offsets.cpu(), backend="cpu")
    torch.testing.assert_close(out, case.exactly(x, weight), rtol=1e-13, atol=1e-13)


def test_errors_name_the_argument():
    case = Case([3, 4])
    x, weight = case.tensors(torch.float32)
    with pytest.raises(ValueError, match="grouped_linear: x: expected"):
        grouped_linear(x[0], weight, case.offsets)
    with pytest.raises(ValueError, match="grouped_linear: weight: expected shape"):
        grouped_linear(x, weight[:, :, 1:], case.offsets)
    with pytest.raises(TypeError, match="grouped_linear: weight: expected"):
        grouped_linear(x, weight.half(), case.offsets)
    with pytest.raises(TypeError, match="grouped_linear: group_offsets: expected"):
        grouped_linear(x, weight, case.offsets.long())
    with pytest.raises(ValueError, match="grouped_linear: group_offsets: expected shape"):
        grouped_linear(x, weight, case.offsets[1:])
