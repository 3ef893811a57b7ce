"""ROUGE-L of instructions is rouge_score's, and the pool keeps what differs."""

from __future__ import annotations

import random

import torch
from rouge_score import rouge_scorer
from warploom.recipes._rouge import InstructionPool

WORDS = ["sort", "the", "list", "of", "42", "names", "by", "Length", "don't", "e-mail", "naïve"]


def test_the_numbers_are_rouge_score_s():
    draw = random.Random(0)
    texts = [
        " ".join(draw.choices(WORDS, k=draw.randrange(90))) + draw.choice(["", ".", " ?!"])
        for _ in range(60)
    ]
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    pool = InstructionPool(texts)
    for text in texts[:10]:
        theirs = [scorer.score(other, text)["rougeL"].fmeasure for other in texts]
        torch.testing.assert_close(
            pool.similarities(text).double(), torch.tensor(theirs).double(), rtol=0, atol=1e-6
        )
