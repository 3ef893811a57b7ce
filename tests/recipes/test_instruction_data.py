"""Alpaca's data: its templates, its tokens, and batches of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from warploom.recipes import instruction_data as data
from warploom.recipes.instruction_data import IGNORED, Example, Instruction, ShuffledExamples
from warploom.recipes.text_corpus import load_tokenizer

from tests.models.tiny_llama import tiny_llama


def test_the_templates_are_alpacas() -> None:
    assert Instruction("Say {so}.", "", "so").prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nSay {so}.\n\n### Response:"
    )
    assert Instruction("Say it.", "it {}", "it").prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nSay it.\n\n### "
        "Input:\nit {}\n\n### Response:"
    )


def test_files_are_read_as_they_are_written(tmp_path: Path) -> None:
    tasks = [Instruction("Say né.", "", "né"), Instruction("Add.", "1 2", "3")]
    data.write_instructions(tmp_path / "new" / "data.json", tasks)
    assert data.read_instructions(tmp_path / "new" / "data.json") == tasks
    (tmp_path / "published.json").write_text('[{"instruction": "a", "output": "b", "source": 1}]')
    assert data.read_instructions(tmp_path / "published.json") == [Instruction("a", "", "b")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "expected a list of examples, got dict"),
        ("[]", "expected a list of examples"),
        ('[{"instruction": "a"}]', "example 0: expected texts as instruction and output"),
        ('[{"instruction": "a", "output": 3}]', "example 0: expected texts"),
        ('[{"instr', "truncated or no JSON"),
    ],
)
def test_other_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        data.read_instructions(tmp_path / "data.json")


@pytest.fixture
def tokenizer(base_model: Path) -> Any:
    return load_tokenizer(base_model)


def test_the_loss_is_on_the_answer_and_the_end_alone(tokenizer: Any) -> None:
    task = Instruction("Repeat.", "", "It is 7.")
    [example] = data.tokenize([task], tokenizer, end_token=1, max_length=512)
    prompt = tokenizer.encode(task.prompt).ids
    answer = tokenizer.encode(task.output, add_special_tokens=False).ids
    assert prompt[0] == 0  # <s>
    assert example.input_ids.tolist() == [*prompt, *answer]
    assert example.targets.tolist() == [IGNORED] * (len(prompt) - 1) + [*answer, 1]


def test_what_is_behind_the_length_is_cut_off(tokenizer: Any) -> None:
    task = Instruction("Repeat.", "", "It is 7 and 8 and 9.")
    prompt = len(tokenizer.encode(task.prompt).ids)
    [example] = data.tokenize([task], tokenizer, 1, prompt + 3)
    assert len(example.targets) == prompt + 2
    assert (example.targets != IGNORED).sum() == 3 and example.targets[-1] != 1
    longer = Instruction("Repeat " * 50, "", "It is 7.")
    assert len(data.tokenize([task, longer], tokenizer, 1, prompt + 3)) == 1
    with pytest.raises(ValueError, match=f"max_length: .* got {prompt}; .* has {prompt}"):
        data.tokenize([task], tokenizer, 1, prompt)


@pytest.fixture
def merging_tokenizer() -> Any:
    """Characters, and one token for ":Y": it would lie over the boundary of "...Response:" and "Yes"."""
    characters = sorted({*data.PROMPT, *"Say it.Yes:"})
    vocabulary = {character: index for index, character in enumerate([*characters, ":Y"])}
    return Tokenizer(models.BPE(vocab=vocabulary, merges=[(":", "Y")]))


def test_a_prompts_tokens_do_not_depend_on_the_answer(merging_tokenizer: Any) -> None:
    """Tokenised as one text, the answer's first character is in the prompt's last token: the length of the
    prompt's own tokens then says that "Y" is part of the prompt, and "Y" is never learnt."""
    task = Instruction("Say it.", "", "Yes")
    prompt = merging_tokenizer.encode(task.prompt).ids
    naive = merging_tokenizer.encode(task.prompt + task.output).ids
    assert naive[: len(prompt)] != prompt
    end = merging_tokenizer.get_vocab_size()
    [example] = data.tokenize([task], merging_tokenizer, end, 512)
    assert example.input_ids[: len(prompt)].tolist() == prompt
    learnt = [target for target in example.targets.tolist() if target != IGNORED]
    assert learnt == [*(merging_tokenizer.token_to_id(c) for c in "Yes"), end]


def random_examples(lengths: list[int]) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    examples = []
    for length in lengths:
        tokens = torch.randint(192, (length + 1,), generator=generator)
        targets = tokens[1:].clone()
        targets[: length // 2] = IGNORED
        examples.append(Example(tokens[:-1].int(), targets))
    return examples


def test_packing_gives_the_loss_of_padding() -> None:
    """And the gradients; one token of another document seen would change them."""
    examples = random_examples([5, 17, 1, 9])
    losses, gradients = [], []
    for batch in (data.packed(examples), data.padded(examples)):
        model = tiny_llama(initializer_range=0.2).double()
        loss = model.loss(*batch[:4], fused=False, reduction="sum")
        loss.backward()
        losses.append(loss.item() / batch.target_count)
        gradients.append(model.model.embed_tokens.weight.grad)
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


def test_a_batch_says_what_it_holds() -> None:
    examples = random_examples([5, 2])
    batch = data.packed(examples)
    assert batch.input_ids.shape == batch.targets.shape == (1, 7)
    assert batch.cu_seqlens is not None and batch.cu_seqlens.tolist() == [0, 5, 7]
    assert (batch.max_seqlen, batch.target_count) == (5, 4)
    batch = data.padded(examples)
    assert batch.targets[1].tolist() == [IGNORED, int(examples[1].targets[1]), *[IGNORED] * 3]
    assert (batch.cu_seqlens, batch.max_seqlen, batch.target_count) == (None, None, 4)


def test_each_example_is_read_once_an_epoch_in_another_order() -> None:
    examples = random_examples(list(range(1, 12)))
    order = ShuffledExamples(examples, seed=3)
    epochs = [[len(e.input_ids) for e in order.take(epoch * 11, 11)] for epoch in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(1, 12))] * 2
    assert epochs[0] != epochs[1]
    fresh = ShuffledExamples(examples, seed=3).take(7, 9)
    assert [len(e.input_ids) for e in fresh] == (epochs[0] + epochs[1])[7:16]


def test_a_digest_names_the_examples() -> None:
    tasks = [Instruction("a", "", "b"), Instruction("c", "d", "e")]
    assert data.digest(tasks) == data.digest(list(tasks))
    assert data.digest(tasks) != data.digest(tasks[::-1])
