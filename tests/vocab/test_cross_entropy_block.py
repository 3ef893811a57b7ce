"""Cross-entropy of rows of logits taken block by block of their columns, against all of them in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from warploom.ops.vocab import _cross_entropy_block_op

from tests.backends import every_dtype

every_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])
every_softcap = pytest.mark.parametrize("softcap", [0.0, 3.0], ids=["uncapped", "soft-cap"])


def take(backend, logits, targets, bounds, softcap=0.0, gradients=True):
    """The state after all blocks between `bounds`, and the terms of each scaled to the last maximum."""
    state = torch.zeros(len(logits), 4)
    state[:, 0] = float("-inf")
    op = _cross_entropy_block_op.overloads[backend]
    terms = torch.zeros(len(logits), 0)
    for first, end in itertools.pairwise(bounds):
        block = logits[:, first:end].contiguous()
        raised = op(block, state, targets, first, bounds[-1], -100, softcap, gradients)
        assert raised.dtype == torch.float32
        terms = torch.cat((terms * raised[:, None], block.float()), 1)
    return state, terms


def draw(rows, columns, dtype=torch.float32):
    logits = (2 * torch.randn(rows, columns)).to(dtype)
    return logits, torch.randint(columns, (rows,))


@every_backend
@every_dtype
@every_softcap
@pytest.mark.parametrize(
    "bounds",
    [[0, 1], [0, 700], [0, 513, 514, 1200], [0, 64, 1100, 1103]],
    ids=["one class", "one block", "a block of one class", "an odd last block"],
)
def test_state_and_terms(backend, dtype, softcap, bounds):
    logits, targets = draw(5, bounds[-1], dtype)
    exact = logits.double().requires_grad_()
    z = softcap * torch.tanh(exact / softcap) if softcap else exact
    maximum, lse = z.amax(1), torch.logsumexp(z, 1)
    (slope,) = torch.autograd.grad(z.sum(), exact, retain_graph=True)
    state, terms = take(backend, logits, targets, bounds, softcap)
    at_target = z.gather(1, targets[:, None])
    wanted = (maximum, (lse - maximum).exp(), z.sum(1), at_target[:, 0])
    torch.testing.assert_close(state.double(), torch.stack(wanted, 1), rtol=1e-5, atol=1e-4)
    wanted_terms = (torch.exp(z - maximum[:, None]) * slope).scatter(1, targets[:, None], 0.0)
    tolerance = torch.finfo(dtype).eps + 1e-6
    torch.testing.assert_close(terms.double(), wanted_terms, rtol=tolerance, atol=tolerance)


@every_backend
def test_ignored_rows_are_zero_whatever_their_logits(backend):
    logits, targets = draw(3, 70)
    logits[1], targets[1] = float("nan"), -100
    state, terms = take(backend, logits, targets, [0, 40, 70])
    assert state[1].tolist() == [float("-inf"), 0.0, 0.0, 0.0] and not terms[1].any()
    assert torch.isfinite(state[[0, 2]]).all() and torch.isfinite(terms).all()


@every_backend
def test_logits_of_any_size(backend):
    """Neither overflows where logits are large, nor counts blocks that a mask has set to -infinity."""
    logits, targets = draw(3, 90)
    logits[0] *= 1e4
    logits[1] += 3e4
    logits[2, :60] = float("-inf")
    state, terms = take(backend, logits, targets, [0, 30, 60, 90])
    lse = state[:, 0].double() + state[:, 1].double().log()
    torch.testing.assert_close(lse, torch.logsumexp(logits.double(), 1), rtol=1e-6, atol=1e-3)
    assert torch.isfinite(terms).all() and not terms[2, :60].any()


@every_backend
def test_a_bad_row_spoils_no_other(backend):
    logits, targets = draw(3, 90)
    expected = take(backend, logits, targets, [0, 50, 90])
    logits[1, 40] = float("nan")
    state, terms = take(backend, logits, targets, [0, 50, 90])
    assert torch.isnan(state[1, 1])
    assert torch.equal(state[[0, 2]], expected[0][[0, 2]])
    assert torch.equal(terms[[0, 2]], expected[1][[0, 2]])


@every_backend
def test_without_gradients_logits_stay(backend):
    logits, targets = draw(3, 70)
    state, same = take(backend, logits, targets, [0, 70], gradients=False)
    assert torch.equal(same, logits)
    assert torch.equal(state, take(backend, logits, targets, [0, 70])[0])


def test_arguments_that_do_not_fit():
    logits, targets = draw(3, 90)
    state, op = torch.zeros(3, 4), _cross_entropy_block_op.overloads["cpu"]
    rest = (-100, 0.0, True)
    targets[1] = 200
    message = "targets: expected numbers from 0 to 199 or -100, got 200"
    with pytest.raises(RuntimeError, match=message):
        op(logits, state, targets, 0, 200, *rest)
    with pytest.raises(RuntimeError, match="first: expected columns among 200 classes, got 111"):
        op(logits, state, targets, 111, 200, *rest)
    with pytest.raises(RuntimeError, match="state: expected contiguous Float"):
        op(logits, state.double(), targets, 0, 201, *rest)
