"""ResNet-18, 34, 50 and 101 with torchvision's constructors and state dicts.

He et al., "Deep Residual Learning for Image Recognition" (arXiv:1512.03385), table 1; a bottleneck has its
stride in the 3 x 3 convolution, as torchvision has it ("v1.5"), not in the first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

NormLayer = Callable[[int], nn.Module]


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm2d whose statistics and affine parameters are constants: x * scale + shift.

    scale = weight / sqrt(running_var + eps), shift = bias - running_mean * scale. The four are buffers with
    the names of torchvision's `FrozenBatchNorm2d`; a checkpoint's num_batches_tracked is passed over.

    Args:
        num_features: channels.
        eps: added to the variance.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> the same shape."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None].to(x.dtype) + shift[:, None, None].to(x.dtype)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


def _conv3x3(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(
        inputs, outputs, 3, stride=stride, padding=dilation, dilation=dilation, bias=False
    )


class _Block(nn.Module, ABC):
    """relu(residual(x) + shortcut(x)); a subclass gives the residual."""

    expansion: ClassVar[int]

    def __init__(self, downsample: nn.Module | None) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    @abstractmethod
    def residual(self, x: Tensor) -> Tensor:
        """What is added to the shortcut, before the last ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(self.residual(x) + shortcut)
        return out


class BasicBlock(_Block):
    """Two 3 x 3 convolutions (ResNet-18 and 34)."""

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        dilation: int = 1,
        norm_layer: NormLayer = nn.BatchNorm2d,
    ) -> None:
        super().__init__(downsample)
        if dilation > 1:
            raise ValueError(f"BasicBlock: dilation: expected 1, got {dilation}")
        self.conv1 = _conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.conv2 = _conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)

    def residual(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return out


class Bottleneck(_Block):
    """1 x 1, 3 x 3 and 1 x 1 convolutions, the last to four times the planes (ResNet-50 and 101)."""

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        dilation: int = 1,
        norm_layer: NormLayer = nn.BatchNorm2d,
        downsample_in_bottleneck: bool = False,
    ) -> None:
        super().__init__(downsample)
        first, second = (stride, 1) if downsample_in_bottleneck else (1, stride)
        self.conv1 = nn.Conv2d(inplanes, planes, 1, stride=first, bias=False)
        self.bn1 = norm_layer(planes)
        self.conv2 = _conv3x3(planes, planes, second, dilation)
        self.bn2 = norm_layer(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = norm_layer(planes * self.expansion)

    def residual(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        out: Tensor = self.bn3(self.conv3(x))
        return out


class ResNet(nn.Module):
    """A residual network; state dict: conv1, bn1, layer1.0.conv1, ..., layer4, fc, as torchvision's.

    Args:
        block: BasicBlock or Bottleneck.
        layers: blocks of each of the four stages.
        num_classes: outputs of `fc`.
        zero_init_residual: start the last norm of each block at zero.
        replace_stride_with_dilation: for layer2, layer3 and layer4, whether dilation takes the place of the
            stride, so that the map stays large (Bottleneck only).
        norm_layer: makes a norm of a number of channels; default BatchNorm2d.
        downsample_in_bottleneck: a bottleneck's stride is in its first convolution, as in the paper and in
            transformers' models of that setting (Bottleneck only).
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        *,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer | None = None,
        downsample_in_bottleneck: bool = False,
    ) -> None:
        super().__init__()
        dilate = tuple(replace_stride_with_dilation or (False, False, False))
        if len(dilate) != 3:
            raise ValueError(
                f"ResNet: replace_stride_with_dilation: expected 3 values, got {len(dilate)}"
            )
        self._block = block
        self._options: dict[str, Any] = {"norm_layer": norm_layer or nn.BatchNorm2d}
        if downsample_in_bottleneck:
            self._options["downsample_in_bottleneck"] = True
        self.inplanes, self.dilation = 64, 1
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = self._options["norm_layer"](64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._stage(64, layers[0], 1, False)
        self.layer2 = self._stage(128, layers[1], 2, dilate[0])
        self.layer3 = self._stage(256, layers[2], 2, dilate[1])
        self.layer4 = self._stage(512, layers[3], 2, dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        self._reset_parameters(zero_init_residual)

    def _stage(self, planes: int, blocks: int, stride: int, dilate: bool) -> nn.Sequential:
        """Stage of `planes`; its first block still has the dilation of the stage before it."""
        first_dilation = self.dilation
        if dilate:
            self.dilation, stride = self.dilation * stride, 1
        outputs = planes * self._block.expansion
        downsample = None
        if stride != 1 or self.inplanes != outputs:
            downsample = nn.Sequential(
                nn.Conv2d(self.inplanes, outputs, 1, stride=stride, bias=False),
                self._options["norm_layer"](outputs),
            )
        first = self._block(
            self.inplanes, planes, stride, downsample, first_dilation, **self._options
        )
        others = [
            self._block(outputs, planes, dilation=self.dilation, **self._options)
            for _ in range(1, blocks)
        ]
        self.inplanes = outputs
        return nn.Sequential(first, *others)

    def _reset_parameters(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, _Block) and zero_init_residual:
                last: Any = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                nn.init.zeros_(last.weight)

    def features(self, x: Tensor) -> dict[str, Tensor]:
        """x [B, 3, H, W] -> the maps of "layer1" to "layer4", strides 4, 8, 16 and 32 without dilation."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        maps = {}
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = maps[name] = self.get_submodule(name)(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, H, W] -> logits [B, num_classes]."""
        out: Tensor = self.fc(self.avgpool(self.features(x)["layer4"]).flatten(1))
        return out


def resnet18(**options: Any) -> ResNet:
    """ResNet-18; the options are `ResNet`'s."""
    return ResNet(BasicBlock, (2, 2, 2, 2), **options)


def resnet34(**options: Any) -> ResNet:
    """ResNet-34; the options are `ResNet`'s."""
    return ResNet(BasicBlock, (3, 4, 6, 3), **options)


def resnet50(**options: Any) -> ResNet:
    """ResNet-50; the options are `ResNet`'s."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **options)


def resnet101(**options: Any) -> ResNet:
    """ResNet-101; the options are `ResNet`'s."""
    return ResNet(Bottleneck, (3, 4, 23, 3), **options)
