"""Cross-entropy of rows of logits, replaced by their gradients, on every backend against float64."""

from __future__ import annotations

import pytest
import torch
from warploom.ops.vocab import _cross_entropy_rows_op

from tests import plain
from tests.backends import DEVICE, every_backend, every_dtype
from tests.numerics import FORWARD, GRADIENT, assert_within

OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 0.02},
    "soft-cap": {"softcap": 3.0},
    "everything": {"label_smoothing": 0.2, "z_loss": 0.01, "softcap": 5.0},
}
NAMES = ("ignore_index", "label_smoothing", "z_loss", "softcap")
DEFAULTS = {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0, "softcap": 0.0}
#: Kernels take 512 columns (C++), 8192 (Triton) or up to 16384 (CUDA, 4 vectors a thread) at a time.
COLUMNS = [1, 7, 64, 513, 1000, 8200, 16393, 16400]


def rows_op(backend, logits, targets, row_scale=None, gradients=True, **options):
    scalars = [{**DEFAULTS, **options}[name] for name in NAMES]
    op = _cross_entropy_rows_op.overloads[backend]
    return op(logits, targets, row_scale, *scalars, gradients)


def draw(rows, columns, dtype=torch.float32, ignored=()):
    logits = (2 * torch.randn(rows, columns)).to(DEVICE, dtype)
    targets = torch.randint(columns, (rows,), device=DEVICE)
    targets[list(ignored)] = -100
    return logits, targets


def check(backend, logits, targets, row_scale=None, **options):
    """loss and gradients obey the rule; both sides get the same rounded scale of each row."""

    def plainly(dtype):
        leaf = logits.to(dtype).requires_grad_()
        loss = plain.cross_entropy(leaf, targets, **options)
        scale = torch.ones_like(loss) if row_scale is None else row_scale.to(loss.dtype)
        return loss.detach(), torch.autograd.grad(loss, leaf, scale)[0]

    exact, exact_grad = plainly(torch.float64)
    rough, rough_grad = plainly(logits.dtype)
    gradient = logits.clone()
    loss = rows_op(backend, gradient, targets, row_scale, **options)
    assert loss.dtype == torch.float32
    assert_within(loss, exact, rough, factor=FORWARD, what="loss")
    assert_within(gradient, exact_grad, rough_grad, factor=GRADIENT, what="gradient")


@every_backend
@every_dtype
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option(backend, dtype, options):
    check(backend, *draw(64, 300, dtype, ignored=[1]), **options)


@every_backend
@every_dtype
@pytest.mark.parametrize("columns", COLUMNS)
def test_every_size_of_a_row(backend, dtype, columns):
    check(backend, *draw(2, columns, dtype))


@every_backend
def test_rows_are_scaled(backend):
    logits, targets = draw(4, 100)
    check(backend, logits, targets, torch.tensor([0.0, 2.0, -0.5, 1e-3], device=DEVICE))


@every_backend
def test_ignored_rows_are_zero_whatever_their_logits(backend):
    logits, _ = draw(3, 70)
    logits[2] = float("nan")
    loss = rows_op(backend, logits, torch.tensor([1, 8, 5], device=DEVICE), ignore_index=5)
    assert loss[2] == 0 and not logits[2].any()
    assert (loss[:2] > 0).all() and torch.isfinite(logits).all()


@every_backend
def test_without_gradients_logits_stay(backend):
    logits, targets = draw(3, 70, ignored=[1])
    before = logits.clone()
    loss = rows_op(backend, logits, targets, gradients=False)
    assert torch.equal(logits, before)
    assert torch.equal(loss, rows_op(backend, logits.clone(), targets))


@every_backend
def test_logits_of_any_size(backend):
    """Neither overflows where logits are large, nor counts those that a mask has set to -infinity."""
    logits, targets = draw(4, 1000)
    logits[0] *= 1e4
    logits[1] += 3e4
    logits[2, :600] = float("-inf")
    targets[2] = 800
    gradient = logits.clone()
    loss = rows_op(backend, gradient, targets)
    exact = plain.cross_entropy(logits.double(), targets)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-4)
    assert torch.isfinite(gradient).all() and not gradient[2, :600].any()


@every_backend
def test_the_maximum_is_found_wherever_it_stands(backend):
    """One large logit a row, beside each of which exponentials to another maximum would overflow: with odd
    rows each is another warp's."""
    logits, targets = draw(16, 1003)
    rows = torch.arange(16, device=DEVICE)
    logits[rows, 5 + 33 * rows] = 1e4
    gradient = logits.clone()
    loss = rows_op(backend, gradient, targets)
    exact = plain.cross_entropy(logits.double(), targets)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)
    assert torch.isfinite(gradient).all()


@every_backend
def test_a_bad_row_spoils_no_other(backend):
    logits, targets = draw(3, 90)
    expected = rows_op(backend, logits.clone(), targets)
    logits[1, 40] = float("nan")
    loss = rows_op(backend, logits, targets)
    assert torch.isnan(loss[1]) and torch.isnan(logits[1]).all()
    assert torch.equal(loss[[0, 2]], expected[[0, 2]]) and torch.isfinite(logits[[0, 2]]).all()


@every_backend
def test_a_target_outside_the_row(backend):
    """An error where the host can look, else NaN in the row of that target alone."""
    if backend == "reference":
        pytest.skip("PyTorch's own error")
    logits, targets = draw(3, 90)
    targets[1] = 90
    if backend == "cpu":
        with pytest.raises(
            RuntimeError, match="targets: expected numbers from 0 to 89 or -100, got 90"
        ):
            rows_op(backend, logits, targets)
        return
    loss = rows_op(backend, logits, targets)
    assert torch.isnan(loss).tolist() == [False, True, False]


@every_backend
@every_dtype
def test_two_runs_agree_to_the_bit(backend, dtype):
    logits, targets = draw(4, 1000, dtype)
    first, second = logits.clone(), logits.clone()
    losses = [rows_op(backend, x, targets, label_smoothing=0.1) for x in (first, second)]
    assert torch.equal(*losses) and torch.equal(first, second)


@every_backend
def test_no_rows(backend):
    logits, targets = draw(0, 8)
    assert rows_op(backend, logits, targets).shape == (0,)
