"""Adapters from full fine-tunings: exact where the change has low rank, honest about what is lost."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM
from warploom.lora import load_adapter
from warploom.lora.extract import extract_lora, low_rank_factors
from warploom.models.llama import Llama
from warploom.recipes.lora_extract import extract


def low_rank(rows: int, columns: int, rank: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=draw, dtype=torch.float64)
    return left @ torch.randn(rank, columns, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (1100, 1050)], ids=str)
def test_a_change_of_low_rank_is_recovered(shape: tuple[int, int]) -> None:
    delta = low_rank(*shape, rank=3)
    lora_a, lora_b, kept = low_rank_factors(delta, rank=5)
    assert lora_a.shape == (3, shape[1]) and lora_b.shape == (shape[0], 3)
    torch.testing.assert_close(lora_b @ lora_a, delta, rtol=1e-9, atol=1e-9)
    assert kept == pytest.approx(1.0, abs=1e-12)


def test_the_energy_is_that_of_the_singular_values() -> None:
    left, right = (torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64)).Q for _ in range(2))
    values = torch.tensor([4.0, 2.0, 1.0, 0.5, *[0.0] * 5], dtype=torch.float64)
    delta = (left * values) @ right
    whole = 16 + 4 + 1 + 0.25
    assert low_rank_factors(delta, rank=2)[2] == pytest.approx(20 / whole)
    for energy, rank in ((0.7, 1), (0.94, 2), (0.95, 3), (0.99, 4), (1.0, 4)):
        lora_a, _, kept = low_rank_factors(delta, energy=energy)
        assert len(lora_a) == rank and kept >= energy - 1e-12


def test_no_change_has_rank_zero() -> None:
    lora_a, lora_b, kept = low_rank_factors(torch.zeros(4, 5), rank=2)
    assert lora_a.shape == (0, 5) and lora_b.shape == (4, 0) and kept == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected one of them"),
        ({"rank": 1, "energy": 0.5}, "expected one of them"),
        ({"rank": 0}, "rank: expected 1 or more, got 0"),
        ({"energy": 1.5}, r"energy: expected a share in \(0, 1\], got 1.5"),
    ],
)
def test_what_is_no_rank_is_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        low_rank_factors(torch.eye(3), **arguments)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tuned_model(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with q_proj changed by rank 2, down_proj by rank 3, and a norm."""
    directory = tmp_path_factory.mktemp("tuned") / "model"
    model = Llama.from_pretrained(base_model)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            query, down = layer.self_attn.q_proj.weight, layer.mlp.down_proj.weight
            query += 0.01 * low_rank(*query.shape, rank=2, seed=index).float()
            down += 0.01 * low_rank(*down.shape, rank=3, seed=index).float()
        model.model.norm.weight[0] += 0.5
    model.save_pretrained(directory)
    for file in base_model.glob("tokenizer*"):
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def test_the_adapter_makes_the_tuned_model(
    base_model: Path, tuned_model: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Repeat the number 7. Repeat the instruction. " * 20)
    found = extract(base_model, tuned_model, tmp_path / "adapter", rank=3, text=text, context=32)
    ranks = {layer.name: layer.rank for layer in found.extraction.layers if layer.rank}
    expected = {}
    for index in range(2):
        expected[f"model.layers.{index}.self_attn.q_proj"] = 2
        expected[f"model.layers.{index}.mlp.down_proj"] = 3
    assert ranks == expected
    assert found.extraction.energy == pytest.approx(1.0, abs=1e-6)
    assert found.extraction.left_behind == {"model.norm.weight": pytest.approx(0.5)}
    perplexities = found.perplexities
    assert perplexities["with the adapter"] == pytest.approx(perplexities["merged"], rel=1e-4)
    assert perplexities["tuned"] != pytest.approx(perplexities["base"], rel=1e-4)

    model = Llama.from_pretrained(base_model)
    load_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base_model), tmp_path / "adapter"
    )
    tuned = Llama.from_pretrained(tuned_model)
    with torch.no_grad():
        model.model.norm.weight.copy_(tuned.model.norm.weight)
        theirs.base_model.model.model.norm.weight.copy_(tuned.model.norm.weight)
        tokens = torch.randint(400, (1, 12))
        torch.testing.assert_close(model(tokens), tuned(tokens), rtol=0, atol=1e-4)
        torch.testing.assert_close(theirs(tokens).logits, tuned(tokens), rtol=0, atol=1e-4)


def test_less_energy_takes_less_rank(base_model: Path, tuned_model: Path, tmp_path: Path) -> None:
    found = extract_lora(base_model, tuned_model, tmp_path, energy=0.5)
    for layer in found.layers:
        assert layer.rank <= 2
        assert layer.energy >= 0.5
    assert 0.5 <= found.energy < 0.99


def test_models_that_do_not_differ_are_refused(base_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected other matrices than"):
        extract_lora(base_model, base_model, tmp_path / "adapter", rank=2)
    assert not (tmp_path / "adapter").exists()
