"""How large a model's cache is, and how large it would be with other kinds of attention.

DeepSeek-V2 (arXiv:2405.04434), tables 1 and 9. Elements a token, over all layers:
MHA 2 heads head_dim, GQA 2 groups head_dim, MQA 2 head_dim, MLA latent + rope.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warploom.models.auto import read_config
from warploom.recipes._extras import require
from warploom.reference.mla import compressed_row_bytes


@dataclass(frozen=True)
class CacheShape:
    """What decides the size of a cache.

    `d_latent` and `d_rope` are those of latent attention. Where a model has none they are the paper's,
    4 head_dim and head_dim / 2; where it has, `kv_heads` is None.
    """

    layers: int
    heads: int
    head_dim: int
    kv_heads: int | None = None
    d_latent: int = 0
    d_rope: int = 0

    @classmethod
    def of(cls, config: Any) -> CacheShape:
        """The shape of a `LlamaConfig` or a `DeepseekV2Config`."""
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        if hasattr(config, "kv_lora_rank"):
            return cls(
                layers,
                heads,
                config.v_head_dim,
                d_latent=config.kv_lora_rank,
                d_rope=config.qk_rope_head_dim,
            )
        return cls(layers, heads, config.head_dim, config.num_key_value_heads)

    @property
    def latent(self) -> tuple[int, int]:
        """Features of the latent and of the rotated key."""
        if self.d_latent:
            return self.d_latent, self.d_rope
        return 4 * self.head_dim, self.head_dim // 2

    @property
    def own(self) -> str:
        """The kind of attention that the model has."""
        if self.kv_heads is None:
            return "MLA"
        return "MHA" if self.kv_heads == self.heads else "MQA" if self.kv_heads == 1 else "GQA"

    def elements(self, kind: str) -> int:
        """Numbers that a token takes over all layers: "MHA", "GQA" (8 groups unless the model says), "MQA",
        "MLA"."""
        groups = self.kv_heads if self.own == "GQA" and self.kv_heads else min(8, self.heads)
        per_layer = {
            "MHA": 2 * self.heads * self.head_dim,
            "GQA": 2 * groups * self.head_dim,
            "MQA": 2 * self.head_dim,
            "MLA": sum(self.latent),
        }
        return self.layers * per_layer[kind]

    def compressed_bytes(self) -> int:
        """Bytes that a token takes in a latent cache of float8_e4m3fn or int8 rows."""
        return self.layers * compressed_row_bytes(*self.latent)


@dataclass(frozen=True)
class CacheSize:
    """One line of the table: bytes a token, and of a whole context."""

    kind: str
    dtype: str
    elements: int
    bytes_per_token: int
    total_bytes: int
    is_own: bool


def cache_sizes(model: str | Path, context: int, batch: int = 1) -> list[CacheSize]:
    """The sizes of a model's cache for `batch` texts of `context` tokens.

    Args:
        model: a Hugging Face directory, or the name of a published shape.
        context: tokens of a text.
        batch: texts.

    Returns:
        One entry for each kind of attention in 16 bits, and one for a compressed latent cache.
    """
    if context < 1 or batch < 1:
        raise ValueError(f"context, batch: expected 1 or more, got {context}, {batch}")
    shape = CacheShape.of(read_config(model))
    sizes = []
    for kind in ("MHA", "GQA", "MQA", "MLA"):
        elements = shape.elements(kind)
        total = 2 * elements * context * batch
        sizes.append(CacheSize(kind, "bfloat16", elements, 2 * elements, total, kind == shape.own))
    compressed = shape.compressed_bytes()
    sizes.append(
        CacheSize(
            "MLA",
            "float8 or int8",
            shape.elements("MLA"),
            compressed,
            compressed * context * batch,
            False,
        )
    )
    return sizes


def print_cache_sizes(sizes: list[CacheSize], console: Any) -> None:
    """The table, with each kind's part of what multi-head attention would take."""
    table = require("rich.table").Table()
    table.add_column("attention")
    table.add_column("dtype")
    for column in ("elements a token", "bytes a token", "GiB in all", "of MHA"):
        table.add_column(column, justify="right")
    whole = sizes[0].bytes_per_token
    for size in sizes:
        table.add_row(
            size.kind + (" (this model)" if size.is_own else ""),
            size.dtype,
            f"{size.elements:,}",
            f"{size.bytes_per_token:,}",
            f"{size.total_bytes / 2**30:.3f}",
            f"{size.bytes_per_token / whole:.1%}",
        )
    console.print(table)
