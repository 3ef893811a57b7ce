"""LLaMA checkpoints in Meta's layout: params.json and consolidated.NN.pth.

Two things differ from transformers' layout beside the names. Each matrix is split over the files
(model-parallel ranks): by output features, by input features, or not at all. And q and k have the
rows of a head in pair order (2i, 2i + 1), which `apply_rotary(interleaved=True)` would turn; here
they are in half-split order (i, i + D / 2).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from warploom.models.checkpoint import (
    CheckpointError,
    WeightSource,
    load_pytorch_file,
    read_config,
    write_config,
)
from warploom.models.directory import replace_directory
from warploom.models.llama_config import LlamaConfig

# transformers' name -> (Meta's name, dimension split over the files or None)
_TOP = {
    "model.norm.weight": ("norm.weight", None),
    "lm_head.weight": ("output.weight", 0),
}
_PER_LAYER = {
    "self_attn.q_proj.weight": ("attention.wq.weight", 0),
    "self_attn.k_proj.weight": ("attention.wk.weight", 0),
    "self_attn.v_proj.weight": ("attention.wv.weight", 0),
    "self_attn.o_proj.weight": ("attention.wo.weight", 1),
    "mlp.gate_proj.weight": ("feed_forward.w1.weight", 0),
    "mlp.down_proj.weight": ("feed_forward.w2.weight", 1),
    "mlp.up_proj.weight": ("feed_forward.w3.weight", 0),
    "input_layernorm.weight": ("attention_norm.weight", None),
    "post_attention_layernorm.weight": ("ffn_norm.weight", None),
}
_EMBEDDING = "tok_embeddings.weight"
_EMBEDDING_HERE = "model.embed_tokens.weight"
_FREQUENCIES = r"(layers\.\d+\.attention\.inner_attention\.)?rope\.freqs"
_ROTARY = re.compile(r"model\.layers\.\d+\.self_attn\.([qk])_proj\.weight")


def to_half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows [H * D, in] of q or k from pair order to half-split order within each head."""
    rows, features = weight.shape
    return weight.view(heads, rows // heads // 2, 2, features).transpose(1, 2).reshape(rows, -1)


def to_pairs(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `to_half_split`."""
    rows, features = weight.shape
    return weight.view(heads, 2, rows // heads // 2, features).transpose(1, 2).reshape(rows, -1)


def _names(config: LlamaConfig, embedding_dim: int) -> dict[str, tuple[str, int | None]]:
    names = {_EMBEDDING_HERE: (_EMBEDDING, embedding_dim), **_TOP}
    for layer in range(config.num_hidden_layers):
        for name, (meta_name, dim) in _PER_LAYER.items():
            names[f"model.layers.{layer}.{name}"] = (f"layers.{layer}.{meta_name}", dim)
    return names


def _embedding_split(shape: tuple[int, ...], hidden_size: int) -> int:
    """LLaMA 3 splits the embedding over the vocabulary, LLaMA 1 and 2 over the features."""
    return 0 if shape[1] == hidden_size else 1


class _MetaSource:
    """The tensors of consolidated.*.pth joined, reordered and under transformers' names."""

    def __init__(self, config: LlamaConfig, shards: list[tuple[Path, dict[str, Tensor]]]) -> None:
        self._config = config
        self._shards = shards
        embedding = tuple(shards[0][1][_EMBEDDING].shape)
        known = _names(config, _embedding_split(embedding, config.hidden_size))
        self._names = {here: known[here] for here in known if known[here][0] in shards[0][1]}
        used = {meta_name for meta_name, _ in known.values()}
        self._others = {
            name: tuple(tensor.shape)
            for name, tensor in shards[0][1].items()
            if name not in used and not re.fullmatch(_FREQUENCIES, name)
        }
        for path, tensors in shards[1:]:
            difference = tensors.keys() ^ shards[0][1].keys()
            if difference:
                raise CheckpointError(
                    f"{path}: expected the tensors of {shards[0][0].name}; only one of the two "
                    f"has {', '.join(sorted(difference)[:8])}"
                )

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        shapes = dict(self._others)
        for name, (meta_name, dim) in self._names.items():
            parts = [tuple(tensors[meta_name].shape) for _, tensors in self._shards]
            shape = list(parts[0])
            if dim is not None:
                shape[dim] = sum(part[dim] for part in parts)
            for (path, _), part in zip(self._shards, parts, strict=True):
                if any(i != dim and part[i] != size for i, size in enumerate(shape)):
                    raise CheckpointError(
                        f"{path}: {meta_name}: expected a part of {tuple(shape)} split over "
                        f"dimension {dim}, got {part}"
                    )
            shapes[name] = tuple(shape)
        return shapes

    def where(self, name: str) -> str:
        names = [path.name for path, _ in self._shards]
        files = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        return f"{files} as {self._names[name][0]}" if name in self._names else files

    def read(self, name: str) -> Tensor:
        meta_name, dim = self._names[name]
        parts = [tensors[meta_name] for _, tensors in self._shards]
        weight = parts[0] if dim is None or len(parts) == 1 else torch.cat(parts, dim)
        heads = _rotary_heads(name, self._config)
        return weight if heads is None else to_half_split(weight, heads)


def _rotary_heads(name: str, config: LlamaConfig) -> int | None:
    match = _ROTARY.fullmatch(name)
    if match is None:
        return None
    return config.num_attention_heads if match[1] == "q" else config.num_key_value_heads


def open_checkpoint(directory: Path) -> tuple[LlamaConfig, WeightSource]:
    """The config and the weights of a directory in Meta's layout."""
    paths = sorted(directory.glob("consolidated.*.pth"))
    expected = [directory / f"consolidated.{i:02d}.pth" for i in range(max(len(paths), 1))]
    for path in expected:
        if path not in paths:
            raise FileNotFoundError(f"{path}: no such file")
    shards = [(path, load_pytorch_file(path)) for path in paths]
    if _EMBEDDING not in shards[0][1]:
        raise CheckpointError(f"{paths[0]}: missing tensors: {_EMBEDDING}")

    def parse(params: Mapping[str, Any]) -> LlamaConfig:
        rows = [tensors[_EMBEDDING].shape[0] for _, tensors in shards if _EMBEDDING in tensors]
        shape = tuple(shards[0][1][_EMBEDDING].shape)
        split = _embedding_split(shape, params["dim"])
        config = LlamaConfig.from_meta(params, sum(rows) if split == 0 else rows[0])
        config.tie_word_embeddings = "output.weight" not in shards[0][1]
        return config

    config = read_config(directory / "params.json", parse)
    return config, _MetaSource(config, shards)


def save_checkpoint(
    directory: str | Path, config: LlamaConfig, tensors: Mapping[str, Tensor], ranks: int = 1
) -> None:
    """Writes params.json and `ranks` files; the embedding is split as the model's family does.

    Raises:
        ValueError: for a shape that the layout cannot express, or that `ranks` does not divide.
    """
    params = config.to_meta()
    if ranks < 1 or config.num_key_value_heads % ranks or config.intermediate_size % ranks:
        raise ValueError(
            "model_parallel_size: expected a divisor of num_key_value_heads "
            f"{config.num_key_value_heads} and intermediate_size {config.intermediate_size}, "
            f"got {ranks}"
        )
    embedding_dim = 0 if config.vocab_size == 128256 else 1
    names = _names(config, embedding_dim)
    if config.vocab_size % ranks:
        raise ValueError(
            "model_parallel_size: expected a divisor of vocab_size "
            f"{config.vocab_size}, got {ranks}"
        )
    with replace_directory(directory) as staging:
        write_config(staging / "params.json", params)
        for rank in range(ranks):
            shard = {}
            for name, tensor in tensors.items():
                meta_name, dim = names[name]
                heads = _rotary_heads(name, config)
                weight = tensor if heads is None else to_pairs(tensor, heads)
                part = weight if dim is None else weight.chunk(ranks, dim)[rank]
                shard[meta_name] = part.clone()
            torch.save(shard, staging / f"consolidated.{rank:02d}.pth")
