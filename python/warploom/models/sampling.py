"""From logits to the next token: the penalties and filters of transformers, in its order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: repetition penalty, temperature, top-k, top-p, then the draw.

    Args:
        do_sample: draw from the distribution; None: draw if temperature, top_k or top_p is given.
            Where nothing is drawn the highest score wins and these three play no part.
        temperature: divides the scores; 0 means no draw. Default 1.
        top_k: keep the k highest scores (all that equal the k-th); None or 0 keeps all.
        top_p: keep the smallest set of tokens whose probabilities reach top_p; None or 1 keeps
            all. (Holtzman et al., arXiv:1904.09751.)
        repetition_penalty: scores of tokens that are in the row, its prompt included, are divided
            by it if positive and multiplied by it if negative. (Keskar et al., arXiv:1909.05858,
            section 4.1.)
    """

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature is not None and not self.temperature >= 0:
            raise ValueError(f"generate: temperature: expected >= 0, got {self.temperature}")
        if self.top_k is not None and not self.top_k >= 0:
            raise ValueError(f"generate: top_k: expected >= 0, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"generate: top_p: expected in (0, 1], got {self.top_p}")
        if not self.repetition_penalty > 0:
            raise ValueError(
                f"generate: repetition_penalty: expected > 0, got {self.repetition_penalty}"
            )

    @property
    def draws(self) -> bool:
        """Whether a token is drawn, rather than the one with the highest score taken."""
        if self.temperature == 0:
            return False
        if self.do_sample is not None:
            return self.do_sample
        return any(value is not None for value in (self.temperature, self.top_k, self.top_p))

    def scores(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """logits [B, V] -> float32 scores, -inf where removed; seen bool [B, V], in the row."""
        scores = logits.float()
        if seen is not None:
            scores = penalize_repetition(scores, seen, self.repetition_penalty)
        if self.draws:
            if self.temperature is not None:
                scores = scores / self.temperature
            if self.top_k:
                scores = keep_top_k(scores, self.top_k)
            if self.top_p is not None and self.top_p < 1:
                scores = keep_top_p(scores, self.top_p)
        return scores

    def choose(
        self, scores: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None
    ) -> Tensor:
        """scores [B, V] -> token ids int64 [B]; one generator for all rows, or one for each."""
        if not self.draws:
            return scores.argmax(-1)
        probabilities = scores.softmax(-1)
        if generator is None or isinstance(generator, torch.Generator):
            return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
        draws = [
            torch.multinomial(row, 1, generator=own)
            for row, own in zip(probabilities, generator, strict=True)
        ]
        return torch.cat(draws)


def penalize_repetition(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Moves the scores [B, V] of seen tokens (bool [B, V]) down for a penalty above 1."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """-inf for scores [B, V] below the k-th highest of the row."""
    threshold = scores.topk(min(k, scores.shape[-1])).values[:, -1:]
    return scores.masked_fill(scores < threshold, -torch.inf)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """-inf for the least likely tokens of scores [B, V] while their sum stays within 1 - p.

    The most likely token always stays.
    """
    ascending, order = scores.sort(-1)
    removed = ascending.softmax(-1).cumsum(-1) <= 1 - p
    removed[:, -1] = False
    return scores.masked_fill(torch.zeros_like(removed).scatter(1, order, removed), -torch.inf)
