"""Family `lora`: linear maps with a low-rank update, for fine-tuning and for serving its results.

LoRA (Hu et al., arXiv:2106.09685): y = x W^T + bias + scaling drop(x) A^T B^T with lora_a A [R, K], lora_b B
[N, R] and scaling = lora_alpha / R. The first of the two small products is called shrink, the second expand.
"""

from warploom.ops._lora_blocks import (
    Adapter,
    expert_factors,
    lora_embedding,
    lora_expert_linear,
    lora_qkv,
    lora_swiglu_mlp,
    multi_lora_linear,
)
from warploom.ops._lora_linear import (
    lora_linear,
    lora_shrink,
    lora_weight_norm,
    weight_squares,
)
from warploom.ops._lora_shrink import rms_norm_shrink, swiglu_shrink
from warploom.ops._quantized import CompressedScale, QuantizedWeight

__all__ = [
    "Adapter",
    "CompressedScale",
    "QuantizedWeight",
    "expert_factors",
    "lora_embedding",
    "lora_expert_linear",
    "lora_linear",
    "lora_qkv",
    "lora_shrink",
    "lora_swiglu_mlp",
    "lora_weight_norm",
    "multi_lora_linear",
    "rms_norm_shrink",
    "swiglu_shrink",
    "weight_squares",
]
