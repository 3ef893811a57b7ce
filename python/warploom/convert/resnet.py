"""ResNets of transformers as `warploom.models.resnet`: the same weights under other names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from warploom.models.resnet import BasicBlock, Bottleneck, ResNet

_HEAD = {"classifier.1.": "fc."}
_STEM = {"embedder.embedder.convolution.": "conv1.", "embedder.embedder.normalization.": "bn1."}
_PARTS = {"convolution": ("conv", "0"), "normalization": ("bn", "1")}
_BLOCK = re.compile(
    r"encoder\.stages\.(\d)\.layers\.(\d+)\."
    r"(?:layer\.(\d)|(shortcut))\.(convolution|normalization)\.(.+)"
)


def _our_name(name: str) -> str:
    """transformers' name of a tensor in torchvision's words; KeyError of another model's."""
    bare = name.removeprefix("resnet.")
    for theirs, ours in (_STEM | _HEAD).items():
        if bare.startswith(theirs):
            return ours + bare.removeprefix(theirs)
    match = _BLOCK.fullmatch(bare)
    if match is None:
        raise KeyError(f"resnet_from_transformers: expected a tensor of a ResNet, got {name!r}")
    stage, block, layer, shortcut, part, rest = match.groups()
    letters, index = _PARTS[part]
    place = f"downsample.{index}" if shortcut else f"{letters}{int(layer) + 1}"
    return f"layer{int(stage) + 1}.{block}.{place}.{rest}"


def rename_from_transformers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of transformers' `ResNetModel`, `ResNetBackbone` or `ResNetForImageClassification` under
    torchvision's names; without a classifier there is no `fc`.

    Raises:
        KeyError: a name that no ResNet of transformers has.
    """
    return {_our_name(name): tensor for name, tensor in state_dict.items()}


def resnet_from_transformers(config: Any, state_dict: Mapping[str, Tensor]) -> ResNet:
    """A `ResNet` with the weights of transformers' ResNet, and with its place of the bottlenecks' stride.

    Args:
        config: its `ResNetConfig`; widths must be the paper's (64 after the stem, then 64, 128, 256 and 512
            times the block's expansion), the activation ReLU, and the first stage must keep its stride 1.
        state_dict: with or without a classifier; without, `fc` stays random and has 1000 outputs.

    Raises:
        ValueError: a setting that `ResNet` has not.
    """
    blocks: dict[str, type[BasicBlock] | type[Bottleneck]] = {
        "basic": BasicBlock,
        "bottleneck": Bottleneck,
    }
    block = blocks[config.layer_type]
    expected = {
        "num_channels": 3,
        "embedding_size": 64,
        "hidden_sizes": [width * block.expansion for width in (64, 128, 256, 512)],
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
    }
    for name, value in expected.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"resnet_from_transformers: {name}: expected {value}, got {getattr(config, name)}"
            )
    tensors = rename_from_transformers(state_dict)
    head = tensors.get("fc.weight")
    model = ResNet(
        block,
        config.depths,
        num_classes=1000 if head is None else len(head),
        downsample_in_bottleneck=block is Bottleneck and config.downsample_in_bottleneck,
    )
    missing = set(model.state_dict()) - tensors.keys()
    if missing - {"fc.weight", "fc.bias"}:
        raise KeyError(f"resnet_from_transformers: state_dict: missing {sorted(missing)[0]!r}")
    model.load_state_dict(tensors, strict=False)
    return model
