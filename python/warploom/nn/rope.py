"""Rotary position embedding: inverse frequencies under every scaling rule, and their table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from warploom.ops.rope import apply_rotary

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "explicit")
_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "explicit": ("inverse_frequencies",),
}
_MINIMUM_TABLE_ROWS = 256


def _powers(base: float, dim: int) -> Tensor:
    """base ** (2 i / dim) for i in [0, dim / 2), float32."""
    return base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)


def _temperature(factor: float, weight: float) -> float:
    """YaRN's sqrt(1 / t) for a context that is `factor` times the original one (equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def yarn_softmax_factor(rope_parameters: Mapping[str, Any] | None) -> float:
    """What DeepSeek-V2 and V3 multiply the softmax scale by: YaRN's temperature squared, on the whole score.

    With `mscale_all_dim` the temperature is taken from cos and sin, which turn a part of a head alone, and
    goes to the scale: (0.1 mscale_all_dim ln(factor) + 1)^2, 1.58963 for V2 (0.707, 40) and 1.87385 for V3
    (1, 40). Without it, or without scaling, 1.
    """
    rope = rope_parameters or {}
    weight = rope.get("mscale_all_dim")
    if rope.get("rope_type", "default") == "default" or not weight:
        return 1.0
    return _temperature(rope["factor"], weight) ** 2


def _yarn(dim: int, base: float, rope: Mapping[str, Any]) -> tuple[Tensor, float]:
    """YaRN (arXiv:2309.00071), section 3.2 (NTK-by-parts) and equation 22 (the temperature)."""
    factor, original = rope["factor"], rope["original_max_position_embeddings"]
    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        if mscale and mscale_all_dim:
            attention_factor = _temperature(factor, mscale) / _temperature(factor, mscale_all_dim)
        else:
            attention_factor = _temperature(factor, 1.0)

    def pair_with_rotations(count: float) -> float:
        """The (fractional) pair index that turns `count` times within the original context."""
        return dim * math.log(original / (count * 2 * math.pi)) / (2 * math.log(base))

    low = pair_with_rotations(rope.get("beta_fast") or 32)
    high = pair_with_rotations(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    pairs = torch.arange(dim // 2, dtype=torch.float32, device="cpu")
    kept = 1 - ((pairs - low) / width).clamp(0, 1)  # 1: the frequency stays, 0: it is divided
    powers = _powers(base, dim)
    return (1.0 / (factor * powers)) * (1 - kept) + (1.0 / powers) * kept, attention_factor


def _llama3(dim: int, base: float, rope: Mapping[str, Any]) -> Tensor:
    """Llama 3.1's rule: long waves are divided by `factor`, short ones kept, a ramp between."""
    factor, original = rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    frequencies = 1.0 / _powers(base, dim)
    wavelength = 2 * math.pi / frequencies
    ramp = (original / wavelength - low) / (high - low)
    between = (1 - ramp) * frequencies / factor + ramp * frequencies
    scaled = torch.where(wavelength > original / low, frequencies / factor, between)
    return torch.where(wavelength < original / high, frequencies, scaled)


def inverse_frequencies(
    dim: int,
    rope_parameters: Mapping[str, Any] | None = None,
    *,
    max_position_embeddings: int = 2048,
    length: int | None = None,
) -> tuple[Tensor, float]:
    """The angle per position of each rotary pair, and the factor on cos and sin.

    The rules and field names are those of transformers' `ROPE_INIT_FUNCTIONS`; "explicit", whose field
    `inverse_frequencies` lists the R / 2 angles, is this library's.

    Args:
        dim: rotated features R of a head, even.
        rope_parameters: `rope_type` ("default", "linear", "dynamic", "yarn", "llama3",
            "explicit"), `rope_theta` (default 10000) and the fields of that type. None: the defaults.
        max_position_embeddings: the context length beyond which "dynamic" changes its base.
        length: current sequence length, read by "dynamic" alone.

    Returns:
        (float32 [R / 2] on the CPU, factor).
    """
    rope = {"rope_type": "default", "rope_theta": 10000.0, **(rope_parameters or {})}
    rope_type, base = rope["rope_type"], rope["rope_theta"]
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"rope_type: expected one of {', '.join(ROPE_TYPES)}, got {rope_type!r}")
    absent = [name for name in _REQUIRED[rope_type] if rope.get(name) is None]
    if absent:
        raise ValueError(f"rope_parameters: rope_type {rope_type!r} needs {', '.join(absent)}")
    if dim <= 0 or dim % 2:
        raise ValueError(f"rotary dimension: expected a positive even number, got {dim}")
    if rope_type == "explicit":
        frequencies = torch.tensor(rope["inverse_frequencies"], dtype=torch.float32, device="cpu")
        if frequencies.shape != (dim // 2,):
            raise ValueError(
                f"rope_parameters: inverse_frequencies: expected {dim // 2} numbers, got "
                f"{len(frequencies)}"
            )
        return frequencies, 1.0
    if rope_type == "yarn":
        return _yarn(dim, base, rope)
    if rope_type == "llama3":
        return _llama3(dim, base, rope), 1.0
    if rope_type == "linear":
        return 1.0 / _powers(base, dim) / rope["factor"], 1.0
    if rope_type == "dynamic":
        ratio = max(length or 0, max_position_embeddings) / max_position_embeddings
        factor = rope["factor"]
        base = base * (factor * ratio - (factor - 1)) ** (dim / (dim - 2))
    return 1.0 / _powers(base, dim), 1.0


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (RoFormer, arXiv:2104.09864) with its cos / sin table.

    The table is float32 whatever the module's dtype, grows on demand, and is derived from the
    constructor's arguments alone: it is in no state dict, is not touched by `.to(dtype)`, is not
    pickled, and needs nothing after meta-device initialisation.

    Args:
        head_dim: features of a head, D.
        max_position_embeddings: context length of the model; only "dynamic" scaling reads it.
        rope_parameters: as in `inverse_frequencies`, and `partial_rotary_factor` (default 1): the
            first R = int(D * partial_rotary_factor) features are turned.
        interleaved: pairs (2i, 2i + 1) instead of (i, i + R / 2).
    """

    def __init__(
        self,
        head_dim: int,
        max_position_embeddings: int = 2048,
        rope_parameters: Mapping[str, Any] | None = None,
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        self.rope_parameters = dict(rope_parameters or {})
        self.dim = int(head_dim * (self.rope_parameters.get("partial_rotary_factor") or 1.0))
        self.max_position_embeddings = max_position_embeddings
        self.interleaved = interleaved
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._frequencies(max_position_embeddings)  # refuses wrong parameters here

    def extra_repr(self) -> str:
        return f"dim={self.dim}, {self.rope_parameters}, interleaved={self.interleaved}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}

    def _frequencies(self, length: int) -> tuple[Tensor, float]:
        return inverse_frequencies(
            self.dim,
            self.rope_parameters,
            max_position_embeddings=self.max_position_embeddings,
            length=length,
        )

    @property
    def inv_freq(self) -> Tensor:
        """float32 [R / 2] on the CPU: radians per position of each pair."""
        return self._frequencies(self.max_position_embeddings)[0]

    def _compute(
        self, rows: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        frequencies, factor = self._frequencies(rows)
        positions = torch.arange(rows, dtype=torch.float32, device=device)
        angles = positions[:, None] * frequencies.to(device)
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)

    def table(
        self, length: int, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """cos and sin for positions [0, P) with P >= length, each [P, R / 2].

        Angles are computed in float32 as transformers does; `dtype` float64 holds the same
        values. With "dynamic" scaling and a length beyond `max_position_embeddings` the
        frequencies are those of exactly this length.
        """
        device = torch.device(device)
        is_dynamic = self.rope_parameters.get("rope_type") == "dynamic"
        if is_dynamic and length > self.max_position_embeddings:
            return self._compute(length, device, dtype)
        held = self._tables.get((device, dtype))
        if held is not None and held[0].shape[0] >= length:
            return held
        if torch.compiler.is_compiling() or device.type == "meta":
            return self._compute(length, device, dtype)
        rows = max(_MINIMUM_TABLE_ROWS, 1 << (length - 1).bit_length() if length else 0)
        if is_dynamic:
            rows = max(length, min(rows, self.max_position_embeddings))
        # The table outlives this call, so it must not become an inference tensor.
        with torch.inference_mode(False), torch.no_grad():
            held = self._compute(rows, device, dtype)
        self._tables[device, dtype] = held
        return held

    def forward(
        self, x: Tensor, positions: Tensor | None = None, position_offset: int = 0
    ) -> Tensor:
        """Turns x [B, S, H, D] at `positions` [B, S], or at position_offset + arange(S).

        With `positions` the largest one is read by the host to size the table; a caller that
        knows the bound takes `table` once and calls `warploom.ops.rope.apply_rotary` itself.
        """
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if positions is None:
            length = position_offset + x.shape[1]
        else:
            length = int(positions.max()) + 1 if positions.numel() else 0
        cos, sin = self.table(length, x.device, dtype)
        return apply_rotary(
            x,
            cos,
            sin,
            positions=positions,
            position_offset=position_offset,
            interleaved=self.interleaved,
        )
