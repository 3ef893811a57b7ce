"""The commands of fine-tuning, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from warploom import cli


def test_a_fine_tuning_becomes_an_adapter(
    base_model: Path,
    instruction_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
            raise SystemExit(0)
        return int(stop.value.code or 0), *capsys.readouterr()

    options = ("--model", base_model, "--data", instruction_file, "--output", tmp_path / "run")
    small = ("--steps", "1", "--batch-size", "2", "--accumulation-steps", "1", "--device", "cpu")
    status, out, _ = run("sft", *options, *small, "--method", "full", "--no-fused-loss")
    tuned = tmp_path / "run" / "model"
    assert status == 0 and out.splitlines()[-1] == str(tuned)
    adapter = tmp_path / "adapter"
    (tmp_path / "text.txt").write_text("Repeat the number 7. " * 20)
    text = ("--text", tmp_path / "text.txt", "--context", "64")
    models = ("--base", base_model, "--tuned", tuned, "--output", adapter)
    status, out, _ = run("lora", "extract", *models, "--rank", "8", *text)
    assert status == 0
    assert re.search(r"model\.layers\.0\.self_attn\.q_proj\W+[\d.e-]+\W+8\W+[\d.]+%", out)
    for name in ("base", "tuned", "with the adapter", "merged"):
        assert f"perplexity, {name}: " in out
    prompt = ("--prompt", "Repeat", "--max-new-tokens", "3")
    assert run("generate", "--model", base_model, "--adapter", adapter, *prompt)[0] == 0
    status, _, err = run("lora", "extract", *models)
    assert status == 1 and "expected one of them, got both or none" in err
