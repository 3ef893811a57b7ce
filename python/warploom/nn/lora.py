"""Layers with low-rank adapters: LoRA, rsLoRA and DoRA over a frozen linear layer or embedding.

Parameters are called as in peft: lora_A.<adapter>.weight [R, K] and lora_B.<adapter>.weight [N, R], of
embeddings lora_embedding_A.<adapter> [R, V] and lora_embedding_B.<adapter> [D, R], and
lora_magnitude_vector.<adapter>.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from warploom.nn.lora_layer import LoRALayer
from warploom.nn.quantized_linear import QuantizedLinear
from warploom.ops.lora import lora_embedding, lora_linear, lora_shrink


class LoRALinear(LoRALayer):
    """y = x W^T + bias + the sum of scaling drop(x) A^T B^T over the active adapters, one fused product.

    Hu et al., arXiv:2106.09685; with `use_dora` Liu et al., arXiv:2402.09353. State dict: base_layer.weight,
    base_layer.bias, lora_A.<adapter>.weight [R, K], lora_B.<adapter>.weight [N, R] and
    lora_magnitude_vector.<adapter> [N]. A is drawn as torch's linear layers are, B is zero.

    `LoRALinear.wrap(linear, r=..., lora_alpha=...)` puts adapters on an existing `torch.nn.Linear` or
    `QuantizedLinear`.

    Args:
        in_features, out_features, bias: as in `torch.nn.Linear`.
        r, lora_alpha, lora_dropout, use_rslora, use_dora: of the first adapter; see `add_adapter`.
        adapter: its name.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        *,
        bias: bool = True,
        use_rslora: bool = False,
        use_dora: bool = False,
        adapter: str = "default",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(nn.Linear(in_features, out_features, bias, device, dtype))
        self._make_factors()
        options: dict[str, Any] = {"use_rslora": use_rslora, "use_dora": use_dora}
        self.add_adapter(adapter, r, lora_alpha, lora_dropout, **options)
        self.set_adapter(adapter)

    @property
    def in_features(self) -> int:
        features: int = self.base_layer.in_features
        return features

    @property
    def out_features(self) -> int:
        features: int = self.base_layer.out_features
        return features

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.base_layer.bias
        return bias

    def _make_factors(self) -> None:
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()

    def _add_factors(self, adapter: str, r: int, **factory: Any) -> None:
        self.lora_A[adapter] = nn.Linear(self.in_features, r, bias=False, **factory)
        self.lora_B[adapter] = nn.Linear(r, self.out_features, bias=False, **factory)

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        lora_a: Any = self.lora_A[adapter]
        lora_b: Any = self.lora_B[adapter]
        return lora_a.weight, lora_b.weight

    def reset_adapter(self, adapter: str) -> None:
        lora_a, lora_b = self.factors(adapter)
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
        nn.init.zeros_(lora_b)

    def adapter_parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        lora_a, lora_b = self.factors(adapter)
        parameters: dict[str, Any] = {"lora_A.weight": lora_a, "lora_B.weight": lora_b}
        if adapter in self.lora_magnitude_vector:
            parameters["lora_magnitude_vector"] = self.lora_magnitude_vector[adapter]
        return parameters

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], differentiable in x, the bias and the adapters that act."""
        names = self._acting()
        if self.merged_weight is not None and not self.disabled:
            return F.linear(x, self.merged_weight, self.bias)
        if not names:
            out: Tensor = self.base_layer(x)
            return out
        if len(names) == 1:
            (name,) = names
            return lora_linear(
                x,
                self.weight,
                self.bias,
                *self.factors(name),
                self.scaling[name],
                dropout_p=self._dropout_p(name),
                dropout_rng=self.dropout_rng,
                magnitude=self.magnitude(name),
            )
        shrunk = torch.cat([self._shrink(x, name) for name in names], dim=-1)
        lora_b = torch.cat([self._scaled_b(name) for name in names], dim=1)
        return lora_linear(x, self.weight, self.bias, None, lora_b, 1.0, shrunk=shrunk)

    def effective_weight(self) -> Tensor:
        """The weight [N, K] that acts, for what reads it instead of calling the layer.

        Raises:
            RuntimeError: in training an adapter with dropout, which is no product with one weight.
        """
        dropped = [name for name in self._acting() if self._dropout_p(name)]
        if dropped:
            raise RuntimeError(
                "LoRALinear: lora_dropout: expected 0 where the weight is read as a whole (kv_b_proj of "
                f"latent attention), got more in {dropped}"
            )
        return self.adapted_weight()

    def _dropout_p(self, adapter: str) -> float:
        dropout: Any = self.lora_dropout[adapter]
        return dropout.p if dropout.training else 0.0

    def _shrink(self, x: Tensor, adapter: str) -> Tensor:
        """drop(x) A^T: each adapter drops for itself."""
        dropout_p = self._dropout_p(adapter)
        if self.dropout_rng == "torch":
            x, dropout_p = F.dropout(x, dropout_p), 0.0
        return lora_shrink(x, self.factors(adapter)[0], dropout_p=dropout_p)


class LoRAEmbedding(LoRALayer):
    """E[ids] + the sum of scaling A[:, ids]^T B^T over the active adapters.

    There is no dropout, as in peft.

    State dict: base_layer.weight [V, D], lora_embedding_A.<adapter> [R, V], lora_embedding_B.<adapter> [D, R]
    and, with `use_dora`, lora_magnitude_vector.<adapter> [D]. A is zero, B normal.

    Args:
        num_embeddings, embedding_dim, padding_idx: as in `torch.nn.Embedding`.
        r, lora_alpha, use_rslora, use_dora: of the first adapter; see `LoRALayer.add_adapter`.
        adapter: its name.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int,
        lora_alpha: float,
        *,
        padding_idx: int | None = None,
        use_rslora: bool = False,
        use_dora: bool = False,
        adapter: str = "default",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(nn.Embedding(num_embeddings, embedding_dim, padding_idx, **factory))
        self._make_factors()
        self.add_adapter(adapter, r, lora_alpha, use_rslora=use_rslora, use_dora=use_dora)
        self.set_adapter(adapter)

    def _make_factors(self) -> None:
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()

    def _add_factors(self, adapter: str, r: int, **factory: Any) -> None:
        vocabulary, features = self.weight.shape
        self.lora_embedding_A[adapter] = nn.Parameter(torch.empty(r, vocabulary, **factory))
        self.lora_embedding_B[adapter] = nn.Parameter(torch.empty(features, r, **factory))

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        return self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]

    def reset_adapter(self, adapter: str) -> None:
        nn.init.zeros_(self.lora_embedding_A[adapter])
        nn.init.normal_(self.lora_embedding_B[adapter])

    def adapter_parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        names = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
        containers = {name: getattr(self, name) for name in names}
        return {name: held[adapter] for name, held in containers.items() if adapter in held}

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 or int32 [...] -> [..., D] in the weight's dtype."""
        if self.merged_weight is not None and not self.disabled:
            return F.embedding(ids, self.merged_weight, self.base_layer.padding_idx)
        names = self._acting()
        if not names:
            out: Tensor = self.base_layer(ids)
            return out
        lora_a, lora_b, scaling = *self.factors(names[0]), self.scaling[names[0]]
        if len(names) > 1:
            lora_a = torch.cat([self.factors(name)[0] for name in names])
            lora_b, scaling = torch.cat([self._scaled_b(name) for name in names], dim=1), 1.0
        padding = self.base_layer.padding_idx
        out = lora_embedding(ids, self.weight, lora_a, lora_b, scaling, padding_idx=padding)
        magnitude = self.magnitude(names[0])
        if magnitude is not None:
            out = (out * (magnitude / self.weight_norm(names[0]))).to(out.dtype)
        return out

    def _as_stored(self, weight: Tensor) -> Tensor:
        return weight.T


def wrap_layer(layer: nn.Module) -> LoRALayer | None:
    """A layer with room for adapters over a `torch.nn.Linear`, `QuantizedLinear` or `torch.nn.Embedding`.

    None for anything else, subclasses that compute something else included.
    """
    if isinstance(layer, QuantizedLinear) or type(layer).forward is nn.Linear.forward:
        return LoRALinear.wrap(layer)
    if type(layer).forward is nn.Embedding.forward and getattr(layer, "max_norm", 0) is None:
        return LoRAEmbedding.wrap(layer)
    return None
