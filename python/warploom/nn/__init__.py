"""Drop-in modules: the constructor and state dict of the class that each replaces."""

from warploom.nn.activation import SwiGLU
from warploom.nn.attention import GroupedQueryAttention
from warploom.nn.cache import KeyValueCache, StaticKeyValueCache
from warploom.nn.latent_cache import LatentCache, PagedLatentCache, StaticLatentCache
from warploom.nn.lora import LoRAEmbedding, LoRALinear
from warploom.nn.mla import MultiheadLatentAttention
from warploom.nn.multihead_attention import MultiheadAttention
from warploom.nn.norm import LayerNorm, RMSNorm
from warploom.nn.paged_cache import PagedKeyValueCache
from warploom.nn.quantized_linear import QuantizedLinear
from warploom.nn.rope import RotaryEmbedding
from warploom.nn.token_cache import TokenCache
from warploom.nn.vocab import LinearCrossEntropy

__all__ = [
    "GroupedQueryAttention",
    "KeyValueCache",
    "LatentCache",
    "LayerNorm",
    "LinearCrossEntropy",
    "LoRAEmbedding",
    "LoRALinear",
    "MultiheadAttention",
    "MultiheadLatentAttention",
    "PagedKeyValueCache",
    "PagedLatentCache",
    "QuantizedLinear",
    "RMSNorm",
    "RotaryEmbedding",
    "StaticKeyValueCache",
    "StaticLatentCache",
    "SwiGLU",
    "TokenCache",
]
