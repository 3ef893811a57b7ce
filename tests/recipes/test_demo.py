"""The demo, with a training of a few steps and small ops."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from warploom.recipes import demo


def test_demo_runs_through_and_leaves_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    demo.run_demo(Path("out"), steps=2, op_tokens=4)
    shown = capsys.readouterr().out
    assert "transformers generates the same tokens" in shown
    assert demo.PROMPT in shown
    assert "bits per dimension" in shown
    for name in ("pretrain/loss.png", "ops.png", "flow_samples.png", "spp.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    rows = json.loads((tmp_path / "out" / "ops.json").read_text())
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert {path.name for path in (tmp_path / "out/pretrain/model").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }


def test_other_tokens_than_transformers_fail_the_demo(
    trained_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = demo.generate_text
    text = demo.PROMPT + generate(trained_model, demo.PROMPT, max_new_tokens=48).text
    demo.compare_with_transformers(trained_model, text)
    with pytest.raises(demo.DemoError, match="warploom generate printed"):
        demo.compare_with_transformers(trained_model, text + " and more")

    monkeypatch.setattr(
        demo, "generate_text", lambda *a, **k: generate(trained_model, "Other", max_new_tokens=48)
    )
    with pytest.raises(demo.DemoError, match="tokens: transformers generated"):
        demo.compare_with_transformers(trained_model, text)
