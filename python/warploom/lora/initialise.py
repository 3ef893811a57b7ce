"""How adapters begin: peft's defaults, and those that take a part of the base's weight into the adapter."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from warploom.lora.config import LoraConfig
from warploom.nn.lora import LoRAEmbedding, LoRALinear
from warploom.nn.lora_layer import LoRALayer
from warploom.nn.quantized_linear import QuantizedLinear
from warploom.ops.lora import QuantizedWeight

_FORMATS = {4: "nf4", 8: "int8"}


@torch.no_grad()
def initialise(layer: LoRALayer, adapter: str, config: LoraConfig) -> None:
    """Draws or computes an adapter's A and B as `config.init_lora_weights` says.

    With "pissa", "olora" and "loftq" the base's weight changes so that it and the adapter make up the
    original one (with "loftq" nearly: the base is then quantised). Embeddings know True and False only,
    others are True there, as in peft.

    Raises:
        ValueError: a base whose weight must change and is quantised already.
    """
    method = config.init_lora_weights
    if isinstance(layer, LoRAEmbedding):
        if method is False:
            nn.init.normal_(layer.lora_embedding_A[adapter])
    elif isinstance(layer, LoRALinear):
        lora_a, lora_b = layer.factors(adapter)
        if method is False:
            nn.init.kaiming_uniform_(lora_b, a=math.sqrt(5))
        elif method == "gaussian":
            nn.init.normal_(lora_a, std=1 / layer.r[adapter])
        elif config.changes_base and lora_a.device.type != "meta":
            _from_base(layer, adapter, config)
    layer.reset_magnitude(adapter)


def _from_base(layer: LoRALinear, adapter: str, config: LoraConfig) -> None:
    method, rank, scaling = str(config.init_lora_weights), layer.r[adapter], layer.scaling[adapter]
    weight = layer.weight
    if isinstance(weight, QuantizedWeight):
        raise ValueError(
            f"init_lora_weights: {method}: expected a base that is not quantised, got one in "
            f"{weight.format}"
        )
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if method == "loftq":
        bits, iterations = (
            config.loftq_config.get(f"loftq_{k}", d) for k, d in (("bits", 4), ("iter", 1))
        )
        quantised, new_a, new_b = _loftq(wide, rank, scaling, _FORMATS[bits], iterations)
        layer.base_layer = QuantizedLinear(quantised, layer.bias, weight.dtype)
    else:
        factors = _pissa if method.startswith("pissa") else _olora
        new_a, new_b = factors(wide, rank, scaling, method)
        residual = wide - scaling * new_b @ new_a
        layer.base_layer.weight = nn.Parameter(residual.to(weight.dtype), requires_grad=False)
        layer.initial[adapter] = (new_a, new_b)
    for parameter, value in zip(layer.factors(adapter), (new_a, new_b), strict=True):
        parameter.copy_(value)


def _pissa(weight: Tensor, rank: int, scaling: float, method: str) -> tuple[Tensor, Tensor]:
    """The principal singular values and vectors, half of the values in A and half in B.

    Meng et al., arXiv:2404.02948, equations 2 to 4; "pissa_niter_N": by a randomised method of N iterations.
    """
    if method == "pissa":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    else:
        left, values, right = torch.svd_lowrank(weight, rank, niter=int(method.rpartition("_")[2]))
        right = right.T
    root = (values[:rank] / scaling).sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def _olora(weight: Tensor, rank: int, scaling: float, method: str) -> tuple[Tensor, Tensor]:
    """The first columns of Q and rows of R. Büyükakyüz, arXiv:2406.01775, section 3."""
    q, r = torch.linalg.qr(weight)
    return r[:rank].contiguous(), q[:, :rank].contiguous()


def _loftq(
    weight: Tensor, rank: int, scaling: float, format: str, iterations: int
) -> tuple[QuantizedWeight, Tensor, Tensor]:
    """Quantises what the adapter leaves, and gives the adapter what quantisation leaves, in turn.

    Li et al., arXiv:2310.08659, algorithm 1.
    """
    rest = weight
    for _ in range(iterations):
        quantised = QuantizedWeight.quantize(rest, format)
        error = weight - quantised.dequantize(weight.dtype)
        lora_a, lora_b = _pissa(error, rank, scaling, "pissa")
        rest = weight - scaling * lora_b @ lora_a
    return quantised, lora_a, lora_b
