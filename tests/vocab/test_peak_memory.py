"""The loss and its gradients in less memory than the logits alone would take."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: Prints how far one call, forward and backward, raises the peak of the process: bytes.
MEASURE = """
import sys, torch
from warploom.ops.vocab import linear_cross_entropy
torch.set_num_threads(1)
rows, classes, features, trained = map(int, sys.argv[1:])
def step(rows):
    hidden = torch.randn(rows, features, requires_grad=True)
    weight = torch.randn(classes, features, requires_grad=bool(trained))
    linear_cross_entropy(hidden, weight, torch.randint(classes, (rows,))).backward()
def peak():  # getrusage has the parent's, where that was larger when it forked
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
step(1)
before = peak()
step(rows)
print(peak() - before)
"""


@pytest.mark.parametrize("trained", [0, 1], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("classes", [32000, 151936])
def test_peak_memory(classes, trained):
    rows, features = 1024, 32
    command = [sys.executable, "-c", MEASURE, *map(str, (rows, classes, features, trained))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    logits = rows * classes * 4
    assert int(done.stdout) < logits / 2
