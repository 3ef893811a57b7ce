"""The examples under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.test_deepseek import make

ROOT = Path(__file__).resolve().parents[2]


def torchrun(example: str, *arguments: object) -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "python")}
    # Two processes need two GPUs, which a machine may lack.
    environment["CUDA_VISIBLE_DEVICES"] = ""
    run = subprocess.run(
        [*launcher, ROOT / "examples" / example, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("tensor_parallel", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_pretrain_then_generate(tmp_path, tensor_parallel):
    text = tmp_path / "text"
    text.write_text("abcdefgh" * 100)
    model = tmp_path / "model"
    small = ("--batch-size", 2, "--sequence-length", 32, "--tensor-parallel", tensor_parallel)
    out = torchrun("pretrain_fsdp.py", text, model, "--steps", 20, *small)
    assert "step 20/20: loss" in out
    assert float(out.rsplit(maxsplit=1)[-1]) < 2.0
    out = torchrun("tensor_parallel_generate.py", model, "abcdefgh", "--max-new-tokens", 8)
    assert out.strip() == "abcdefghabcdefgh"


def test_generate_with_a_deepseek(tmp_path):
    model = make(vocab_size=256, initializer_range=0.5, eos_token_id=None)
    model.save_pretrained(tmp_path / "model")
    [expected] = model.generate([list(b"abc")], 8)
    out = torchrun("tensor_parallel_generate.py", tmp_path / "model", "abc", "--max-new-tokens", 8)
    assert out.removesuffix("\n") == bytes(expected).decode(errors="replace")
