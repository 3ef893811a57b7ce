"""Fields that the config.json of every model here has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NEUTRAL = {"attention_dropout": 0.0, "hidden_act": "silu"}


def check_neutral(values: Mapping[str, Any]) -> None:
    """ValueError where a field that no model here serves changes something."""
    for name, neutral in _NEUTRAL.items():
        if values.get(name, neutral) != neutral:
            raise ValueError(f"config.json: {name}: expected {neutral}, got {values[name]!r}")


def read_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters`, or what `rope_theta` and `rope_scaling` say in older files."""
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    if "type" in rope:
        rope.setdefault("rope_type", rope.pop("type"))
    for name in ("rope_theta", "partial_rotary_factor"):
        if values.get(name) is not None:
            rope.setdefault(name, values[name])
    return rope


def complete_rope(rope: Mapping[str, Any], max_position_embeddings: int) -> dict[str, Any]:
    """The parameters with transformers' defaults in them."""
    completed = {"rope_type": "default", "rope_theta": 10000.0, **rope}
    if completed["rope_type"] in ("yarn", "llama3"):
        completed.setdefault("original_max_position_embeddings", max_position_embeddings)
    return completed


def old_rope_fields(rope: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, for readers that do not know `rope_parameters`."""
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    is_default = scaling == {"rope_type": "default"}
    return {"rope_theta": rope["rope_theta"], "rope_scaling": None if is_default else scaling}


def token_ids(token: int | list[int] | None) -> tuple[int, ...]:
    """A field that holds no token, one or several."""
    if token is None:
        return ()
    return (token,) if isinstance(token, int) else (*token,)
