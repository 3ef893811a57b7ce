"""One training step of a head, and no more memory than Liger Kernel's chunks and buffers take for it."""

from __future__ import annotations

import pytest
import torch
from warploom.ops.vocab import linear_cross_entropy

from bench.vocab.peers import liger_scheme, unfused


def peak(loss, hidden, weight, targets):
    """How far PyTorch's allocator rises in one step, gradients included: bytes."""
    hidden.grad = weight.grad = None
    with torch.profiler.profile(profile_memory=True) as profile:
        loss(hidden, weight, targets).backward()
    events = [event for event in profile.profiler.kineto_results.events() if event.nbytes()]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize(
    ("rows", "features", "classes"),
    [(8, 512, 32000), (32, 2048, 32000), (512, 512, 4000), (1024, 512, 8000), (4, 512, 151936)],
)
def test_no_more_than_ligers(rows, features, classes, trained):
    hidden = torch.randn(rows, features, requires_grad=True)
    weight = torch.randn(classes, features, requires_grad=trained)
    arguments = (hidden, weight, torch.randint(classes, (rows,)))
    assert peak(linear_cross_entropy, *arguments) <= peak(liger_scheme, *arguments)


def test_the_logits_are_what_unfused_takes():
    """The measure finds the logits and their gradients where they are stored."""
    rows, classes = 64, 8000
    hidden, weight = torch.randn(rows, 32, requires_grad=True), torch.randn(classes, 32)
    found = peak(unfused, hidden, weight, torch.randint(classes, (rows,)))
    assert 2 <= found / (rows * classes * 4) <= 4
