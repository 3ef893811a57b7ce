"""A frozen linear layer whose weight lies in 4 or 8 bits and is read inside the product."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from warploom.ops.lora import CompressedScale, QuantizedWeight, lora_linear

if TYPE_CHECKING:
    from typing_extensions import Self  # in `typing` from Python 3.11 on


class QuantizedLinear(nn.Module):
    """y = x W^T + bias with W as a `QuantizedWeight`, which gets no gradient.

    The state dict is weight_values (uint8; int8's in their own type), weight_scale (float32), bias; with
    compressed scales weight_scale (uint8), scale_block and scale_offset (float32). Casts of the module
    (`.to(torch.bfloat16)`, `.half()`) change the bias and `dtype`, never the weight.

    Args:
        weight: [N, K] in 4 or 8 bits.
        bias: [N] or None.
        dtype: the dtype of the weight that it stands for (default: the bias's, else torch's default dtype).
    """

    weight_values: Tensor
    weight_scale: Tensor
    scale_block: Tensor | None
    scale_offset: Tensor | None

    def __init__(
        self, weight: QuantizedWeight, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.format = weight.format
        values = weight.values.view(torch.uint8) if weight.format == "fp8_e4m3" else weight.values
        self.register_buffer("weight_values", values)
        scale = weight.scale
        compressed = scale if isinstance(scale, CompressedScale) else None
        codes = scale.codes if isinstance(scale, CompressedScale) else scale
        self.register_buffer("weight_scale", codes)
        self.register_buffer("scale_block", None if compressed is None else compressed.block_scale)
        self.register_buffer("scale_offset", None if compressed is None else compressed.offset)
        if dtype is None:
            dtype = torch.get_default_dtype() if bias is None else bias.dtype
        # An empty buffer, because casts of a module reach its tensors alone.
        self.register_buffer("_dtype", torch.empty(0, dtype=dtype), persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        format: str,
        block_size: int | None = None,
        *,
        double_quantize: bool = False,
    ) -> Self:
        """The layer with its weight rounded to the nearest values; see `QuantizedWeight.quantize`."""
        options = {"double_quantize": double_quantize}
        weight = QuantizedWeight.quantize(linear.weight, format, block_size, **options)
        return cls(weight, linear.bias, linear.weight.dtype)

    @property
    def weight(self) -> QuantizedWeight:
        scale: Tensor | CompressedScale = self.weight_scale
        if self.scale_block is not None and self.scale_offset is not None:
            scale = CompressedScale(self.weight_scale, self.scale_block, self.scale_offset)
        return QuantizedWeight(self.weight_values, scale, self.format)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.get_buffer("_dtype").dtype
        return dtype

    def effective_weight(self) -> Tensor:
        """The weight [N, K] in `dtype`."""
        return self.weight.dequantize(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], differentiable in x and bias."""
        return lora_linear(x, self.weight, self.bias, None, None, 1.0)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        names = ("weight_scale", "scale_block", "scale_offset")
        before = {name: getattr(self, name) for name in names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, scale in before.items():
            if scale is not None and getattr(self, name).dtype != scale.dtype:
                setattr(self, name, scale.to(getattr(self, name).device))
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        given = state_dict.get(f"{prefix}weight_values")
        if given is not None and given.dtype != self.weight_values.dtype:
            raise ValueError(
                f"QuantizedLinear: {prefix}weight_values: expected {self.weight_values.dtype}, of format "
                f"{self.format}, got {given.dtype}"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def quantize_linears(
    module: nn.Module,
    format: str = "nf4",
    block_size: int | None = None,
    *,
    double_quantize: bool = False,
    exclude: tuple[str, ...] = ("lm_head",),
) -> nn.Module:
    """Puts a `QuantizedLinear` in the place of every `torch.nn.Linear` of `module`, in place.

    A layer that has LoRA adapters keeps them, its base is quantised. One after the other, so that the peak
    is the model plus one layer.

    Args:
        format, block_size, double_quantize: as in `QuantizedWeight.quantize`.
        exclude: names of submodules that stay as they are, with all that is in them.
    """
    for name, child in list(module.named_children()):
        if name in exclude or name.startswith("lora_"):
            continue
        if type(child) is nn.Linear:
            layer = QuantizedLinear.from_linear(
                child, format, block_size, double_quantize=double_quantize
            )
            setattr(module, name, layer)
        else:
            options: dict[str, Any] = {"double_quantize": double_quantize, "exclude": exclude}
            quantize_linears(child, format, block_size, **options)
    return module
