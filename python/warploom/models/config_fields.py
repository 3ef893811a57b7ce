"""Fields that the config.json of every model here has."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

_NEUTRAL = {"attention_dropout": 0.0, "hidden_act": "silu"}


def check_neutral(values: Mapping[str, Any]) -> None:
    """ValueError where a field that no model here serves changes something."""
    for name, neutral in _NEUTRAL.items():
        if values.get(name, neutral) != neutral:
            raise ValueError(f"config.json: {name}: expected {neutral}, got {values[name]!r}")


def read_fields(
    kind: Any,
    values: Mapping[str, Any],
    model_types: Mapping[str, Mapping[str, Any]],
    nullable: Collection[str] = (),
) -> dict[str, Any]:
    """What a config.json says of the fields of the dataclass `kind`, over the defaults of its model type.

    `model_types`: the types that are served, the first where none is named, each with its defaults.
    `nullable`: fields, beside those of special tokens, in which null is a value.
    """
    model_type = values.get("model_type", next(iter(model_types)))
    if model_type not in model_types:
        raise ValueError(
            f"config.json: model_type: expected one of {', '.join(model_types)}, got {model_type!r}"
        )
    check_neutral(values)
    kept = {"bos_token_id", "eos_token_id", "pad_token_id", *nullable}
    names = {field.name for field in dataclasses.fields(kind)} & values.keys()
    given = {name: values[name] for name in names if values[name] is not None or name in kept}
    return {**model_types[model_type], **given, "rope_parameters": read_rope(values)}


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
