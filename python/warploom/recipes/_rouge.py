"""ROUGE-L between instructions: which new ones say what an old one says."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from warploom.ops.vocab import lcs_lengths

_WORD = re.compile("[a-z0-9]+")


class InstructionPool:
    """Instructions that differ from each other: the seeds, and what was admitted since.

    Two are compared by ROUGE-L, the harmonic mean of l / n and l / m, with l the length of the longest common
    subsequence of their n and m words (Lin, ROUGE, 2004, section 3); it is 0 where either has none. Words are
    runs of a-z and 0-9 in the lowercase text, not stemmed: `rouge_score` 0.1.2 has the same.
    """

    def __init__(self, instructions: Iterable[str]) -> None:
        self.instructions: list[str] = []
        self._ids: dict[str, int] = {}
        self._tokens = torch.empty(0, dtype=torch.int64)
        self._cu_seqlens = torch.zeros(1, dtype=torch.int32)
        for instruction in instructions:
            self.add(instruction)

    def add(self, instruction: str) -> None:
        tokens = self._words(instruction)
        self.instructions.append(instruction)
        self._tokens = torch.cat((self._tokens, tokens))
        end = self._cu_seqlens[-1:] + len(tokens)
        self._cu_seqlens = torch.cat((self._cu_seqlens, end.int()))

    def similarities(self, instruction: str) -> Tensor:
        """float64 [N]: ROUGE-L of an instruction with each of the pool."""
        tokens = self._words(instruction)
        lengths = self._cu_seqlens.diff()
        common = lcs_lengths(tokens, self._tokens, self._cu_seqlens)
        return 2.0 * common.double() / (len(tokens) + lengths).clamp(min=1)

    def _words(self, text: str) -> Tensor:
        """int64 [words], a number for each different one."""
        words = _WORD.findall(text.lower())
        ids = [self._ids.setdefault(word, len(self._ids)) for word in words]
        return torch.tensor(ids, dtype=torch.int64)
