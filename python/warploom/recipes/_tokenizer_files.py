"""Beside the weights, what a model directory's text goes through."""

from __future__ import annotations

import shutil
from pathlib import Path

_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template*",
)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer's files from one model directory to another."""
    for pattern in _PATTERNS:
        for path in source.glob(pattern):
            shutil.copyfile(path, target / path.name)
