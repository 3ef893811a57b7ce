"""Drop-in modules: the constructor and state dict of the class that each replaces."""

from warploom.nn.activation import SwiGLU
from warploom.nn.attention import GroupedQueryAttention
from warploom.nn.cache import KeyValueCache, StaticKeyValueCache
from warploom.nn.channel_maps import ActNorm, Invertible1x1, Squeeze
from warploom.nn.conditioners import CouplingConvNet, CouplingMLP
from warploom.nn.coupling import AdditiveCoupling, AffineCoupling, SplineCoupling
from warploom.nn.latent_cache import LatentCache, PagedLatentCache, StaticLatentCache
from warploom.nn.lora import LoRAEmbedding, LoRALinear
from warploom.nn.mla import MultiheadLatentAttention
from warploom.nn.multihead_attention import MultiheadAttention
from warploom.nn.norm import LayerNorm, RMSNorm
from warploom.nn.paged_cache import PagedKeyValueCache
from warploom.nn.quantized_linear import QuantizedLinear
from warploom.nn.reversible_stack import ReversibleStack, reversible
from warploom.nn.rope import RotaryEmbedding
from warploom.nn.spp import SPPF, RoISpatialPyramidPool, SpatialPyramidPool
from warploom.nn.token_cache import TokenCache
from warploom.nn.vocab import LinearCrossEntropy

__all__ = [
    "SPPF",
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "CouplingConvNet",
    "CouplingMLP",
    "GroupedQueryAttention",
    "Invertible1x1",
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
    "ReversibleStack",
    "RoISpatialPyramidPool",
    "RotaryEmbedding",
    "SpatialPyramidPool",
    "SplineCoupling",
    "Squeeze",
    "StaticKeyValueCache",
    "StaticLatentCache",
    "SwiGLU",
    "TokenCache",
    "reversible",
]
