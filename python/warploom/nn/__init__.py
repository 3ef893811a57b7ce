"""Drop-in modules: the constructor and state dict of the class that each replaces."""

from warploom.nn.activation import SwiGLU
from warploom.nn.attention import GroupedQueryAttention, KeyValueCache
from warploom.nn.norm import LayerNorm, RMSNorm
from warploom.nn.rope import RotaryEmbedding

__all__ = [
    "GroupedQueryAttention",
    "KeyValueCache",
    "LayerNorm",
    "RMSNorm",
    "RotaryEmbedding",
    "SwiGLU",
]
