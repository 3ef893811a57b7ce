"""Instructions with their answers, in Alpaca's JSON, as batches of tokens for a language model.

Taori et al., Stanford Alpaca (2023): a list of {instruction, input, output}, two templates of a prompt, the
answer ended by the tokenizer's end of text, and a loss on the answer alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from warploom.recipes._windows import epoch_generator

IGNORED = -100
_TASK = "Below is an instruction that describes a task"
_CONTEXT = ", paired with an input that provides further context"
_ANSWER = ". Write a response that appropriately completes the request.\n\n"
PROMPT = f"{_TASK}{_ANSWER}### Instruction:\n{{instruction}}\n\n### Response:"
PROMPT_WITH_INPUT = (
    f"{_TASK}{_CONTEXT}{_ANSWER}### Instruction:\n{{instruction}}\n\n### Input:\n{{input}}\n\n"
    "### Response:"
)


@dataclass(frozen=True)
class Instruction:
    """One example; ``input`` may be empty."""

    instruction: str
    input: str
    output: str

    @property
    def prompt(self) -> str:
        """Alpaca's prompt, for training and for asking."""
        template = PROMPT_WITH_INPUT if self.input else PROMPT
        return template.format(instruction=self.instruction, input=self.input)


class Example(NamedTuple):
    """Tokens int32 [S] of a prompt and its answer, without the last, and what follows each: int64 [S],
    ``IGNORED`` where that is a token of the prompt."""

    input_ids: Tensor
    targets: Tensor


class Batch(NamedTuple):
    """Arguments of ``CausalLanguageModel.loss``, and how many targets count."""

    input_ids: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None
    max_seqlen: int | None
    target_count: int


def read_instructions(path: Path) -> list[Instruction]:
    """A JSON list of {instruction, output} and maybe input; other fields are not read."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: truncated or no JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: expected a list of examples, got {type(entries).__name__}")
    examples = []
    for index, entry in enumerate(entries):
        values = [entry.get("instruction"), entry.get("input") or "", entry.get("output")]
        if not all(isinstance(value, str) for value in values):
            raise ValueError(
                f"{path}: example {index}: expected texts as instruction and output, got "
                f"{json.dumps(entry)[:80]}"
            )
        examples.append(Instruction(*values))
    return examples


def write_instructions(path: Path, examples: Sequence[Instruction]) -> None:
    """The JSON that ``read_instructions`` reads."""
    entries = [
        {"instruction": example.instruction, "input": example.input, "output": example.output}
        for example in examples
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def digest(examples: Sequence[Instruction]) -> str:
    """Names the examples and their order."""
    text = json.dumps([[e.instruction, e.input, e.output] for e in examples])
    return hashlib.sha256(text.encode()).hexdigest()


def tokenize(
    examples: Sequence[Instruction], tokenizer: Any, end_token: int, max_length: int
) -> list[Example]:
    """The examples' tokens; one whose answer lies behind ``max_length`` is left out.

    Prompt and answer are tokenised apart and joined. Of the two as one text a token may cover the end of the
    one and the start of the other; its prompt would then not be the tokens that generation starts from.

    Args:
        tokenizer: a ``tokenizers.Tokenizer``; its special tokens are put around the prompt.
        end_token: what ends an answer.
        max_length: most tokens of prompt, answer and end together; what is behind is cut off.
    """
    prompts = tokenizer.encode_batch([example.prompt for example in examples])
    answers = tokenizer.encode_batch(
        [example.output for example in examples], add_special_tokens=False
    )
    tokenized = []
    for prompt, answer in zip(prompts, answers):
        tokens = torch.tensor([*prompt.ids, *answer.ids, end_token][:max_length])
        targets = tokens[1:].clone()
        targets[: len(prompt.ids) - 1] = IGNORED
        if len(tokens) > len(prompt.ids):
            tokenized.append(Example(tokens[:-1].int(), targets))
    if not tokenized:
        raise ValueError(
            f"tokenize: max_length: expected more than a prompt's tokens, got {max_length}; the shortest "
            f"prompt has {min(len(prompt.ids) for prompt in prompts)}"
        )
    return tokenized


def packed(examples: Sequence[Example]) -> Batch:
    """Examples one after the other, each a document of its own: input_ids and targets [1, T]."""
    lengths = torch.tensor([0, *(len(example.input_ids) for example in examples)])
    return Batch(
        torch.cat([example.input_ids for example in examples])[None],
        torch.cat([example.targets for example in examples])[None],
        lengths.cumsum(0).int(),
        int(lengths.max()),
        _count(examples),
    )


def padded(examples: Sequence[Example]) -> Batch:
    """Examples as rows [B, S], padded on the right with token 0, whose targets do not count."""
    pad = torch.nn.utils.rnn.pad_sequence
    return Batch(
        pad([example.input_ids for example in examples], batch_first=True),
        pad([example.targets for example in examples], batch_first=True, padding_value=IGNORED),
        None,
        None,
        _count(examples),
    )


def _count(examples: Sequence[Example]) -> int:
    return sum(int((example.targets != IGNORED).sum()) for example in examples)


class ShuffledExamples:
    """Examples without end, each once an epoch, in an order of its own each epoch; the one at a position is a
    function of the seed and the position alone."""

    def __init__(self, examples: Sequence[Example], seed: int) -> None:
        self.examples = examples
        self.seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def take(self, position: int, count: int) -> list[Example]:
        """The examples at ``position``, ``position`` + 1, and so on."""
        return [self._at(index) for index in range(position, position + count)]

    def _at(self, position: int) -> Example:
        epoch, index = divmod(position, len(self.examples))
        if epoch != self._epoch:
            generator = epoch_generator(self.seed, epoch)
            self._order = torch.randperm(len(self.examples), generator=generator).tolist()
            self._epoch = epoch
        return self.examples[self._order[index]]
