"""What the configs of all recipes check of their fields."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

#: Whole numbers that may be 0; all others are at least 1.
_FROM_ZERO = ("seed", "warmup_steps")


def check_whole_numbers(recipe: str, config: Any) -> None:
    """ValueError where a whole number of the dataclass ``config`` is below 1, or 0 where that is allowed."""
    for field in fields(config):
        value = getattr(config, field.name)
        least = 0 if field.name in _FROM_ZERO else 1
        if type(value) is int and value < least:
            raise ValueError(f"{recipe}: {field.name}: expected at least {least}, got {value}")
