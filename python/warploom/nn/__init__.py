"""Drop-in modules: the constructor and state dict of the class that each replaces."""

from warploom.nn.activation import SwiGLU
from warploom.nn.attention import GroupedQueryAttention
from warploom.nn.cache import KeyValueCache, StaticKeyValueCache
from warploom.nn.multihead_attention import MultiheadAttention
from warploom.nn.norm import LayerNorm, RMSNorm
from warploom.nn.paged_cache import PagedKeyValueCache
from warploom.nn.rope import RotaryEmbedding

__all__ = [
    "GroupedQueryAttention",
    "KeyValueCache",
    "LayerNorm",
    "MultiheadAttention",
    "PagedKeyValueCache",
    "RMSNorm",
    "RotaryEmbedding",
    "StaticKeyValueCache",
    "SwiGLU",
]
