"""The shape of a LLaMA or a relative: transformers' config.json, Meta's params.json, the published sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from warploom.models.config_fields import (
    complete_rope,
    old_rope_fields,
    read_fields,
    token_ids,
)

#: The model types that are this model with other switches, and transformers' defaults where they
#: differ in fields that a config.json may leave out.
_MODEL_TYPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"bos_token_id": None, "eos_token_id": None},
    "qwen3": {"head_dim": 128, "bos_token_id": None, "eos_token_id": None},
}
_LAYER_TYPES = ("full_attention", "sliding_attention")
_WINDOW = 4096  # transformers' default sliding_window
_LLAMA3_SCALING = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass
class LlamaConfig:
    """Fields and defaults of transformers' `LlamaConfig`, and what its relatives add.

    `model_type` "mistral" is the same model; "qwen2" has no bias in the attention's output
    projection; "qwen3" normalises the heads of q and k. In layers whose entry of `layer_types` is
    "sliding_attention" (None: all) a token sees itself and `sliding_window` - 1 tokens before.

    `rope_parameters` holds `rope_type`, `rope_theta` and the fields of that type
    (`warploom.nn.rope.inverse_frequencies`). `num_key_value_heads` and `head_dim` default to
    multi-head attention over hidden_size.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] = field(default_factory=dict)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None
    model_type: str = "llama"
    sliding_window: int | None = None
    layer_types: list[str] | None = None

    def __post_init__(self) -> None:
        if self.model_type not in _MODEL_TYPES:
            raise ValueError(
                f"model_type: expected one of {', '.join(_MODEL_TYPES)}, got {self.model_type!r}"
            )
        if self.model_type == "qwen2":
            self.attention_bias = True
        self._check_windows()
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.rope_parameters = complete_rope(self.rope_parameters, self.max_position_embeddings)

    def _check_windows(self) -> None:
        if self.sliding_window is not None and self.model_type == "llama":
            raise ValueError(
                "sliding_window: expected None for model_type 'llama' ('mistral' has windows), got "
                f"{self.sliding_window}"
            )
        kinds = self.layer_types
        if kinds is None:
            return
        if not self.model_type.startswith("qwen"):
            raise ValueError(f"layer_types: expected None for {self.model_type!r}, got {kinds}")
        if len(kinds) != self.num_hidden_layers or not {*kinds} <= {*_LAYER_TYPES}:
            raise ValueError(
                f"layer_types: expected {self.num_hidden_layers} of {', '.join(_LAYER_TYPES)}, got "
                f"{kinds}"
            )

    def window(self, layer: int) -> tuple[int, int]:
        """(left, right) of a layer's attention, as `warploom.ops.attention` has it."""
        sliding = self.layer_types is None or self.layer_types[layer] == "sliding_attention"
        return (self.sliding_window - 1 if self.sliding_window and sliding else -1, -1)

    @property
    def attention_output_bias(self) -> bool:
        return self.attention_bias and self.model_type != "qwen2"

    @property
    def rotary_head_dim(self) -> int:
        return self.head_dim

    @property
    def qk_norm_eps(self) -> float | None:
        return self.rms_norm_eps if self.model_type == "qwen3" else None

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a text."""
        return token_ids(self.eos_token_id)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> LlamaConfig:
        """The published shape `name`, a key of `PRESETS`, with fields changed by keyword."""
        if name not in PRESETS:
            raise ValueError(f"LlamaConfig: expected one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LlamaConfig:
        """Reads a config.json, with `rope_parameters` or with `rope_theta` and `rope_scaling`."""
        given = read_fields(cls, values, _MODEL_TYPES)
        return cls(**given | _windows(given.get("model_type", "llama"), values))

    def to_dict(self) -> dict[str, Any]:
        """A config.json that transformers reads, with the old rope fields beside the new one."""
        return {
            "architectures": [f"{self.model_type.capitalize()}ForCausalLM"],
            "hidden_act": "silu",
            **dataclasses.asdict(self),
            "use_sliding_window": self.sliding_window is not None,
            "max_window_layers": 0,
            **old_rope_fields(self.rope_parameters),
        }

    @classmethod
    def from_meta(cls, params: Mapping[str, Any], vocab_size: int) -> LlamaConfig:
        """Reads a params.json. `vocab_size` is the embedding's, for files that say -1.

        The context length is not in the file unless as `max_seq_len`; 2048, or 131072 with
        scaled rotary frequencies, is taken then.
        """
        dim, heads = params["dim"], params["n_heads"]
        rope: dict[str, Any] = {"rope_theta": float(params.get("rope_theta", 10000.0))}
        if params.get("use_scaled_rope"):
            factor = float(params.get("rope_scaling_factor") or 8.0)
            rope |= {"rope_type": "llama3", "factor": factor, **_LLAMA3_SCALING}
        is_llama3 = vocab_size == 128256
        return cls(
            vocab_size=vocab_size,
            hidden_size=dim,
            intermediate_size=meta_intermediate_size(
                dim, params.get("multiple_of", 256), params.get("ffn_dim_multiplier")
            ),
            num_hidden_layers=params["n_layers"],
            num_attention_heads=heads,
            num_key_value_heads=params.get("n_kv_heads") or heads,
            max_position_embeddings=params.get("max_seq_len")
            or (131072 if params.get("use_scaled_rope") else 2048),
            rms_norm_eps=params.get("norm_eps", 1e-5),
            rope_parameters=rope,
            bos_token_id=128000 if is_llama3 else 1,
            eos_token_id=128001 if is_llama3 else 2,
        )

    def to_meta(self) -> dict[str, Any]:
        """The params.json of this shape; ValueError where Meta's layout cannot express it."""
        rope = self.rope_parameters
        scaling = {key: rope[key] for key in rope if key not in ("rope_theta", "rope_type")}
        factor = scaling.pop("factor", None)
        reasons = []
        if rope["rope_type"] not in ("default", "llama3"):
            reasons.append(f"rope_type {rope['rope_type']!r}")
        elif scaling != (_LLAMA3_SCALING if rope["rope_type"] == "llama3" else {}):
            reasons.append(f"rope_parameters {scaling}")
        if self.model_type != "llama":
            reasons.append(f"model_type {self.model_type!r}")
        if self.attention_bias or self.mlp_bias:
            reasons.append("biases")
        if self.sliding_window is not None:
            reasons.append(f"sliding_window {self.sliding_window}")
        if self.head_dim * self.num_attention_heads != self.hidden_size:
            reasons.append(f"head_dim {self.head_dim}")
        if reasons:
            raise ValueError(f"Meta's layout has no place for {', '.join(reasons)}")
        params: dict[str, Any] = {
            "dim": self.hidden_size,
            "n_layers": self.num_hidden_layers,
            "n_heads": self.num_attention_heads,
            "n_kv_heads": self.num_key_value_heads,
            "vocab_size": self.vocab_size,
            "multiple_of": 256,
            "norm_eps": self.rms_norm_eps,
            "rope_theta": rope["rope_theta"],
            "max_seq_len": self.max_position_embeddings,
        }
        if rope["rope_type"] == "llama3":
            params |= {"use_scaled_rope": True, "rope_scaling_factor": factor}
        if meta_intermediate_size(self.hidden_size, 256, None) != self.intermediate_size:
            base = int(8 * self.hidden_size / 3)
            params["multiple_of"] = 1
            params["ffn_dim_multiplier"] = (self.intermediate_size + 0.5) / base
        return params


def _windows(model_type: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """sliding_window and layer_types, from the fields by which transformers' class decides them."""
    window = values.get("sliding_window", _WINDOW)
    if model_type == "mistral":
        return {"sliding_window": window, "layer_types": None}
    if model_type == "llama" or not values.get("use_sliding_window"):
        return {"sliding_window": None, "layer_types": None}
    first, layers = values.get("max_window_layers", 28), values["num_hidden_layers"]
    by_place = [_LAYER_TYPES[layer >= first] for layer in range(layers)]
    return {"sliding_window": window, "layer_types": values.get("layer_types") or by_place}


def meta_intermediate_size(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Features of the feed-forward block: 8/3 dim, scaled, rounded up to a multiple."""
    size = int(8 * dim / 3)
    if multiplier is not None:
        size = int(multiplier * size)
    return multiple_of * -(-size // multiple_of)


def _shape(hidden: int, intermediate: int, layers: int, heads: int, **rest: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **rest,
    }


_LLAMA2 = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_LLAMA3 = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


def _llama3_long(factor: float, **rest: Any) -> dict[str, Any]:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, **_LLAMA3_SCALING}
    return {**_LLAMA3, "max_position_embeddings": 131072, "rope_parameters": rope, **rest}


PRESETS: dict[str, dict[str, Any]] = {
    "llama-7b": _shape(4096, 11008, 32, 32),
    "llama-13b": _shape(5120, 13824, 40, 40),
    "llama-30b": _shape(6656, 17920, 60, 52),
    "llama-65b": _shape(8192, 22016, 80, 64),
    "llama-2-7b": _shape(4096, 11008, 32, 32, **_LLAMA2),
    "llama-2-13b": _shape(5120, 13824, 40, 40, **_LLAMA2),
    "llama-2-70b": _shape(8192, 28672, 80, 64, num_key_value_heads=8, **_LLAMA2),
    "llama-3-8b": _shape(4096, 14336, 32, 32, **_LLAMA3),
    "llama-3-70b": _shape(8192, 28672, 80, 64, **_LLAMA3),
    "llama-3.1-8b": _shape(4096, 14336, 32, 32, **_llama3_long(8.0)),
    "llama-3.1-70b": _shape(8192, 28672, 80, 64, **_llama3_long(8.0)),
    "llama-3.1-405b": _shape(16384, 53248, 126, 128, **_llama3_long(8.0)),
    "llama-3.2-1b": _shape(2048, 8192, 16, 32, **_llama3_long(32.0, tie_word_embeddings=True)),
    "llama-3.2-3b": _shape(3072, 8192, 28, 24, **_llama3_long(32.0, tie_word_embeddings=True)),
}
