"""Text from a model directory."""

from __future__ import annotations

from pathlib import Path

import pytest
from warploom.models.llama import Llama
from warploom.recipes.generate import generate_text
from warploom.recipes.text_corpus import load_tokenizer

PROMPT = "The first"


def test_greedy_text_is_that_of_the_models_own_generate(trained_model: Path) -> None:
    generated = generate_text(trained_model, PROMPT, max_new_tokens=12)
    prompt_ids = load_tokenizer(trained_model).encode(PROMPT).ids
    expected = Llama.from_pretrained(trained_model).generate([prompt_ids], 12)
    assert [generated.prompt_ids + generated.new_ids] == expected
    assert generated.text == load_tokenizer(trained_model).decode(generated.new_ids)


def test_pieces_add_up_to_prompt_and_text(trained_model: Path) -> None:
    pieces: list[str] = []
    generated = generate_text(trained_model, PROMPT, max_new_tokens=12, on_text=pieces.append)
    assert pieces[0] == PROMPT
    assert "".join(pieces[1:]) == generated.text
    assert len(pieces) > 3


def test_seed_decides_the_sample(trained_model: Path) -> None:
    options = {"max_new_tokens": 20, "temperature": 2.0}
    one, same, other = (
        generate_text(trained_model, PROMPT, seed=seed, **options).new_ids for seed in (1, 1, 2)
    )
    assert one == same
    assert one != other


def test_stop_string_ends_the_text(trained_model: Path) -> None:
    whole = generate_text(trained_model, PROMPT, max_new_tokens=30).text
    stop = whole[5:8]
    stopped = generate_text(trained_model, PROMPT, max_new_tokens=30, stop=[stop])
    assert stopped.finish == "stop"
    assert whole.startswith(stopped.text)
    assert stop in stopped.text


def test_no_tokens_is_no_text(trained_model: Path) -> None:
    generated = generate_text(trained_model, PROMPT, max_new_tokens=0)
    assert (generated.new_ids, generated.text, generated.finish) == ([], "", None)


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        generate_text(tmp_path / "nowhere", PROMPT)
