"""The convolutions below a head: any module with a width and a stride."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from warploom.models.resnet import ResNet


class Trunk(nn.Module):
    """Convolutions whose response (x, y) is centred at (stride x, stride y) of the image.

    Args:
        layers: image [B, C, H, W] -> map [B, out_channels, about H / stride, about W / stride].
    """

    def __init__(self, layers: nn.Module, out_channels: int, stride: int) -> None:
        super().__init__()
        self.layers = layers
        self.out_channels = out_channels
        self.stride = stride

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.layers(images)
        return out


def conv_trunk(in_channels: int, channels: Sequence[int], strides: Sequence[int]) -> Trunk:
    """3 x 3 convolutions, each with batch norm and ReLU."""
    layers: list[nn.Module] = []
    stride, width = 1, in_channels
    for out_channels, step in zip(channels, strides, strict=True):
        layers += [
            nn.Conv2d(width, out_channels, 3, stride=step, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        ]
        stride, width = stride * step, out_channels
    return Trunk(nn.Sequential(*layers), width, stride)


def zf5_trunk(in_channels: int = 3) -> Trunk:
    """ZF-5 of arXiv:1406.4729, table 1: stride 16, 256 channels, a filter of size p padded by p // 2."""

    def conv(inputs: int, outputs: int, size: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, size, stride, size // 2), nn.ReLU(inplace=True)]

    def pool() -> list[nn.Module]:
        return [nn.LocalResponseNorm(5), nn.MaxPool2d(3, stride=2, padding=1)]

    layers = [*conv(in_channels, 96, 7, 2), *pool(), *conv(96, 256, 5, 2), *pool()]
    layers += [*conv(256, 384, 3, 1), *conv(384, 384, 3, 1), *conv(384, 256, 3, 1)]
    return Trunk(nn.Sequential(*layers), 256, 16)


def resnet_trunk(model: ResNet, last_stage: int = 3) -> Trunk:
    """The first stages of a ResNet without dilation, 1 to 4 of them."""
    stages = [model.layer1, model.layer2, model.layer3, model.layer4][:last_stage]
    stem = [model.conv1, model.bn1, model.relu, model.maxpool]
    width = model.fc.in_features >> (4 - last_stage)
    return Trunk(nn.Sequential(*stem, *stages), width, 2 << last_stage)
