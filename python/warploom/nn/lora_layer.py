"""What linear layers and embeddings with low-rank adapters have in common."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from warploom.ops.lora import QuantizedWeight, lora_weight_norm

if TYPE_CHECKING:
    from typing_extensions import Self  # in `typing` from Python 3.11 on


class LoRALayer(nn.Module, ABC):
    """A frozen base layer and named adapters, any of which act: y = base(x) + the sum of their updates.

    Attributes:
        base_layer: the layer as it was.
        r, lora_alpha, scaling: of each adapter; scaling is lora_alpha / r, or lora_alpha / sqrt(r) (rsLoRA,
            arXiv:2312.03732), and may be changed.
        active_adapters: those that act, a DoRA adapter (arXiv:2402.09353) alone.
        merged_adapters: those that are in the weight at the moment.
        disabled: whether the layer is its base alone.
        dropout_rng: "philox", or "torch": peft's own masks (`warploom.ops.lora.lora_linear`).
        frozen_a: whether A stays as it is in training (LoRA-FA, arXiv:2308.03303).
        initial: A and B of each adapter that began as a part of the base's weight, which was reduced by their
            product (`warploom.lora.initialise`).
    """

    merged_weight: Tensor | None

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        base_layer.requires_grad_(False)
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.lora_dropout = nn.ModuleDict()
        self.lora_magnitude_vector = nn.ParameterDict()
        self.active_adapters: list[str] = []
        self.merged_adapters: list[str] = []
        self.disabled = False
        self.dropout_rng = "philox"
        self.frozen_a = False
        self.initial: dict[str, tuple[Tensor, Tensor]] = {}
        self._merged_norms: dict[str, Tensor] = {}
        self.register_buffer("merged_weight", None, persistent=False)

    @classmethod
    def wrap(cls, base_layer: nn.Module, **adapter: Any) -> Self:
        """Over an existing layer, which is frozen; with `r` and the other arguments of `add_adapter` (its
        name is "default" where none is given) an adapter that acts, without them none."""
        layer = cls.__new__(cls)
        LoRALayer.__init__(layer, base_layer)
        layer._make_factors()
        if adapter:
            name = adapter.pop("adapter", "default")
            layer.add_adapter(name, **adapter)
            layer.set_adapter(name)
        return layer

    @abstractmethod
    def _make_factors(self) -> None:
        """Makes the containers of the adapters' matrices, empty."""

    @abstractmethod
    def _add_factors(self, adapter: str, r: int, **factory: Any) -> None:
        """Matrices of rank r, not yet drawn."""

    @abstractmethod
    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A [R, K] and B [N, R], the update being scaling B A; of an embedding K = V, N = D."""

    @abstractmethod
    def reset_adapter(self, adapter: str) -> None:
        """Draws A and B as peft does by default: their product is zero."""

    @abstractmethod
    def adapter_parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """The adapter's parameters under their names in a peft checkpoint."""

    @property
    def weight(self) -> Any:
        """The base's weight, without adapters: a parameter, or a `QuantizedWeight`."""
        return self.base_layer.weight

    def add_adapter(
        self,
        adapter: str,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        *,
        use_rslora: bool = False,
        use_dora: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        """A further adapter, whose update is zero; it does not act before `set_adapter`.

        Args:
            dtype: of its parameters; default: the base's, float32 where that has 16 bits.

        Raises:
            ValueError: a name that is taken or has a dot, r < 1, a dropout outside [0, 1).
        """
        kind = type(self).__name__
        if adapter in self.r or "." in adapter or not adapter:
            raise ValueError(f"{kind}: adapter: expected a new name without dots, got {adapter!r}")
        if r < 1:
            raise ValueError(f"{kind}: r: expected 1 or more, got {r}")
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"{kind}: lora_dropout: expected [0, 1), got {lora_dropout}")
        if dtype is None:
            dtype = torch.promote_types(self.base_dtype, torch.float32)
        self.r[adapter], self.lora_alpha[adapter] = r, lora_alpha
        self.scaling[adapter] = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.lora_dropout[adapter] = nn.Dropout(lora_dropout)
        self._add_factors(adapter, r, device=self._base_device, dtype=dtype)
        self.reset_adapter(adapter)
        if use_dora:
            norms = torch.empty(self.factors(adapter)[1].shape[0], device=self._base_device)
            self.lora_magnitude_vector[adapter] = nn.Parameter(norms.to(dtype))
            self.reset_magnitude(adapter)
        for parameter in self.adapter_parameters(adapter).values():
            parameter.requires_grad_(False)

    def magnitude(self, adapter: str) -> Tensor | None:
        """DoRA's m [N]; None of an adapter without."""
        held = self.lora_magnitude_vector
        return held[adapter] if adapter in held else None  # noqa: SIM401

    @torch.no_grad()
    def reset_magnitude(self, adapter: str) -> None:
        """DoRA's magnitude becomes the rows' norms of the weight with the update."""
        if adapter in self.lora_magnitude_vector and self._base_device.type != "meta":
            self.lora_magnitude_vector[adapter].copy_(self.weight_norm(adapter))

    def set_adapter(self, adapters: str | Sequence[str], trainable: bool = True) -> None:
        """Which adapters act, those that the layer lacks left out; they alone need gradients, if at all."""
        names = [adapters] if isinstance(adapters, str) else list(adapters)
        names = [name for name in names if name in self.r]
        self._refuse_order(names)
        self.active_adapters = names
        for name in self.r:
            for parameter in self.adapter_parameters(name).values():
                parameter.requires_grad_(trainable and name in names)
        if self.frozen_a:
            self.freeze_a()

    def freeze_a(self, frozen: bool = True) -> None:
        """Whether A stays as it is in training (LoRA-FA)."""
        self.frozen_a = frozen
        for name in self.active_adapters:
            lora_a, lora_b = self.factors(name)
            lora_a.requires_grad_(lora_b.requires_grad and not frozen)

    def delete_adapter(self, adapter: str) -> None:
        """Forgets an adapter, if the layer has it; what it took from the base's weight stays away."""
        if adapter in self.merged_adapters:
            raise RuntimeError(
                f"{type(self).__name__}: delete_adapter: {adapter} is merged: unmerge first"
            )
        for held in (self.r, self.lora_alpha, self.scaling, self.initial):
            held.pop(adapter, None)
        for container in self.children():
            if isinstance(container, nn.ModuleDict | nn.ParameterDict) and adapter in container:
                del container[adapter]
        self.active_adapters = [name for name in self.active_adapters if name != adapter]

    def weight_norm(self, adapter: str) -> Tensor:
        """Norms [N] of the rows of W + scaling B A, without gradient."""
        return lora_weight_norm(self._rows(), *self.factors(adapter), self.scaling[adapter])

    def adapted_weight(self, adapters: Sequence[str] | None = None) -> Tensor:
        """The base's weight with adapters (default: those that act), summed in float32; differentiable in
        them."""
        if adapters is None and self.merged_weight is not None and not self.disabled:
            return self.merged_weight
        rows = self._rows()
        weight = rows.dequantize(self.base_dtype) if isinstance(rows, QuantizedWeight) else rows
        total = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for name in self._acting() if adapters is None else adapters:
            total = total + self._update(name).to(total.dtype)
            magnitude = self.magnitude(name)
            if magnitude is not None:
                total = (magnitude / self.weight_norm(name))[:, None] * total
        return self._as_stored(total.to(self.base_dtype))

    @torch.no_grad()
    def merge(
        self, adapters: str | Sequence[str] | None = None, *, keep_base: bool = True
    ) -> float:
        """Puts adapters (default: the active ones) into the weight; the layer then costs what its base does.

        Args:
            keep_base: the base stays beside the merged weight, so that `unmerge` restores every bit. Without
                it the base's weight is overwritten and `unmerge` subtracts: 16-bit weights come back inexact.

        Returns:
            The largest absolute error that `unmerge` will leave in the weight: 0 with `keep_base`.

        Raises:
            ValueError: adapters that are unknown, merged already or not finite; a quantised base to
                overwrite.
        """
        kind = type(self).__name__
        chosen = self.active_adapters if adapters is None else adapters
        names = [chosen] if isinstance(chosen, str) else list(chosen)
        if self.merged_adapters or not {*names} <= {*self.r}:
            raise ValueError(
                f"{kind}: merge: expected adapters of {list(self.r)} and none merged, got {names} and "
                f"{self.merged_adapters}"
            )
        self._refuse_order(names)
        if not keep_base and isinstance(self.weight, QuantizedWeight):
            raise ValueError(f"{kind}: merge: keep_base: expected True for a quantised base")
        if not names:
            return 0.0
        merged = self.adapted_weight(names)
        if not merged.isfinite().all():
            raise ValueError(f"{kind}: merge: expected finite weights, got others from {names}")
        error = 0.0
        if keep_base:
            self.merged_weight = merged
        else:
            dora = [name for name in names if name in self.lora_magnitude_vector]
            self._merged_norms = {name: self.weight_norm(name) for name in dora}
            restored = self._without(merged, names)
            error = (restored.double() - self.weight.double()).abs().max().item()
            self.base_layer.weight.data = merged
        self.merged_adapters = names
        return error

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undoes `merge`."""
        if self.merged_weight is None and self.merged_adapters:
            self.base_layer.weight.data = self._without(self.weight, self.merged_adapters)
        self.merged_weight = None
        self.merged_adapters, self._merged_norms = [], {}

    def disable(self, disabled: bool = True) -> None:
        """The layer is its base alone, or no longer so."""
        if disabled and self.merged_adapters and self.merged_weight is None:
            raise RuntimeError(
                f"{type(self).__name__}: disable: expected a base that was kept, got one that "
                f"{self.merged_adapters} are merged into: unmerge first"
            )
        self.disabled = disabled

    def _refuse_order(self, names: Sequence[str]) -> None:
        """ValueError for a DoRA adapter beside others: it scales those before it, so that order counts."""
        if len(names) > 1 and any(name in self.lora_magnitude_vector for name in names):
            raise ValueError(
                f"{type(self).__name__}: adapters: expected a DoRA adapter alone, got {[*names]}"
            )

    def _without(self, merged: Tensor, adapters: Sequence[str]) -> Tensor:
        """The stored weight `merged` without the adapters that were put into it."""
        total = self._as_stored(merged).to(torch.promote_types(merged.dtype, torch.float32))
        for name in reversed(adapters):
            if name in self._merged_norms:
                magnitude = self.lora_magnitude_vector[name]
                total = total * (self._merged_norms[name] / magnitude)[:, None]
            total = total - self._update(name).to(total.dtype)
        return self._as_stored(total.to(merged.dtype))

    def _acting(self) -> list[str]:
        """The adapters whose updates are added to what the base gives."""
        return [] if self.disabled or self.merged_adapters else self.active_adapters

    def _update(self, adapter: str) -> Tensor:
        """scaling B A [N, K], in float32 or wider."""
        lora_a, lora_b = self.factors(adapter)
        wide = torch.promote_types(lora_a.dtype, torch.float32)
        return self.scaling[adapter] * (lora_b.to(wide) @ lora_a.to(wide))

    def _scaled_b(self, adapter: str) -> Tensor:
        lora_b = self.factors(adapter)[1]
        return self.scaling[adapter] * lora_b.to(torch.promote_types(lora_b.dtype, torch.float32))

    def _rows(self) -> Tensor | QuantizedWeight:
        """The base's weight as a matrix [N, K]."""
        weight = self.weight
        return weight if isinstance(weight, QuantizedWeight) else self._as_stored(weight.detach())

    def _as_stored(self, weight: Tensor) -> Tensor:
        """[N, K] as the base stores it, and the other way round."""
        return weight

    @property
    def base_dtype(self) -> torch.dtype:
        source = self.base_layer if isinstance(self.weight, QuantizedWeight) else self.weight
        dtype: torch.dtype = source.dtype
        return dtype

    @property
    def _base_device(self) -> torch.device:
        weight = self.weight
        values: Tensor = weight.values if isinstance(weight, QuantizedWeight) else weight
        return values.device
